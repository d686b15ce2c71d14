"""Sweeps: a job at every point of a grid, each in processes of its own, with results that outlive them.

A sweep file is a job file with a section more::

    defaults: [prefill]
    sweep:
      timeout: 600                            # seconds of a point
      over:
        run.sp: [1, 2]
        compile.attention: [allgather_kv, ring]

Results are lines of JSON, written whole, one by one. A sweep that is started again goes on behind those that are there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sp_compile.config import SWEEP, JobConfig, full_name, merged_job, parsed, with_sections
from sp_compile.config_files import Part, read_parts
from sp_compile.errors import ConfigError, PipelineError, nearest
from sp_compile.files import written_whole
from sp_compile.fingerprint import digest
from sp_compile.measure import machine, versions
from sp_compile.pipeline import build_pipeline

FORMAT = 1  # of a line of results
TIMEOUT, LONGEST = 1800.0, 1e6  # seconds
FIELDS = {"format", "key", "point", "status", "error", "config", "result"}
DONE, FAILED, TIMED_OUT = "done", "failed", "timed out"


@dataclass(frozen=True)
class Point:
    """A point of the grid: what it sets, by dotted names, and the job that it makes."""

    values: Mapping[str, Any]
    job: JobConfig

    @property
    def key(self) -> str:
        """What tells the point from others: its job, whatever file says so."""
        return digest(json.dumps(dataclasses.asdict(self.job), sort_keys=True))


@dataclass(frozen=True)
class Sweep:
    """All points, in order, and the seconds that each may take."""

    points: Sequence[Point]
    timeout: float


def load_sweep(source: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file; every point's job is checked.

    Args:
        source, overrides: as of :func:`sp_compile.config.load_config`; the points are set over the overrides.

    Raises:
        ConfigError: as there; no sweep in the file, or a point whose job is not valid, which is named.
    """
    parts, grid, timeout = [], {}, TIMEOUT
    for part in read_parts(source):
        content = dict(part.content)
        grid_here, timeout = _section(content.pop(SWEEP, None), part.origin, timeout)
        grid.update(grid_here)
        parts.append(Part(part.origin, content))
    if not grid:
        raise ConfigError(f"{source} describes no sweep; add sweep: {{over: {{run.sp: [1, 2]}}}}")
    whole = [full_name(name) for name in grid]
    if len({*whole}) < len(whole):
        twice = next(name for name in whole if whole.count(name) > 1)
        raise ConfigError(f"{source}: {SWEEP}.over names {twice} twice")
    fixed = [part.content for part in parts] + [parsed(each) for each in overrides]
    points = []
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        try:
            job = merged_job([*fixed, *(with_sections(*each) for each in values.items())])
            build_pipeline(job.compile.pipeline, job.compile.attention, job.compile.kernel)
            points.append(Point(values, job))
        except (ConfigError, PipelineError) as error:
            raise ConfigError(f"point {told(values)}: {error}") from error
    return Sweep(points, timeout)


def _section(section: Any, origin: str, timeout: float) -> tuple[dict[str, list[Any]], float]:
    if section is None:
        return {}, timeout
    if not isinstance(section, Mapping):
        raise ConfigError(f"{origin}: {SWEEP} is {section!r}; expected over and timeout")
    for key in section:
        if key not in ("over", "timeout"):
            raise ConfigError(f"{origin}: unknown key '{SWEEP}.{key}'{nearest(str(key), ('over', 'timeout'))}")
    grid, timeout = section.get("over") or {}, section.get("timeout", timeout)
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout <= LONGEST:
        raise ConfigError(f"{origin}: {SWEEP}.timeout={timeout!r}; expected seconds, above 0 and at most {LONGEST:g}")
    if not isinstance(grid, Mapping):
        raise ConfigError(f"{origin}: {SWEEP}.over is {grid!r}; expected keys with lists of values")
    for name, values in grid.items():
        if not isinstance(name, str):
            raise ConfigError(f"{origin}: {SWEEP}.over has the key {name!r}; expected names such as run.sp")
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{origin}: {SWEEP}.over.{name} is {values!r}; expected a list of values")
    return dict(grid), float(timeout)


def told(values: Mapping[str, Any]) -> str:
    """A point's values in a line, as on the command line."""
    return " ".join(f"{name}={value}" for name, value in values.items())


class Results:
    """A file of results, open for one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All results; a line at the end that was not written whole is none.

        Raises:
            ConfigError: the file cannot be read, or is of another format.
        """
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from error
        return [self._result(i, line) for i, line in enumerate(lines, 1)]

    def _result(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
            of = found["format"]
            whole = of != FORMAT or found.keys() >= FIELDS
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise ConfigError(f"{self.path}: line {number} is no result of a sweep; name another file")
        if of != FORMAT:
            raise ConfigError(
                f"{self.path}: line {number} has format {of}, this version reads {FORMAT}; name another file"
            )
        return dict(found)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Gives what adds a result.

        Raises:
            ConfigError: another process writes, or the file cannot be written; what was there is kept.
        """
        try:
            file = self.path.open("ab")
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"{self.path} is being written by another sweep; name another file") from None
            whole = self.path.read_bytes()
            file.truncate(whole.rfind(b"\n") + 1)  # a line that was not written whole

            def add(result: Mapping[str, Any]) -> None:
                before = os.fstat(file.fileno()).st_size
                try:
                    file.write(json.dumps(result).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                except OSError as error:
                    with contextlib.suppress(OSError):
                        os.ftruncate(file.fileno(), before)
                    raise ConfigError(f"{self.path} cannot be written: {error.strerror}") from error

            yield add


Show = Callable[[int, int, Point | None], None]


def run_sweep(
    sweep: Sweep, results: Results, retry: bool = False, show: Show = lambda *_: None
) -> list[dict[str, Any]]:
    """Run the points that have no result yet.

    Args:
        retry: run those again that failed.
        show: told how many points have a result, of how many, and which is next; None at the end.

    Returns:
        The last result of every point, in their order. A point that fails has one that says why.

    Raises:
        ConfigError: the file of results is not one, or cannot be written.
    """
    results.read()  # what is no file of results is not touched
    with results.writing() as add, _ended_by_signals():
        known = {each["key"]: each for each in results.read()}
        wanted = [
            each for each in sweep.points if each.key not in known or (retry and known[each.key]["status"] != DONE)
        ]
        wanted = list({each.key: each for each in wanted}.values())
        for i, point in enumerate(wanted):
            show(len(sweep.points) - len(wanted) + i, len(sweep.points), point)
            known[point.key] = _run(point, sweep.timeout)
            add(known[point.key])
    show(len(sweep.points), len(sweep.points), None)
    return [{**known[each.key], "point": dict(each.values)} for each in sweep.points]


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let signals that end this process end what it started, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: Any) -> None:
        sys.exit(128 + number)

    before = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _run(point: Point, timeout: float) -> dict[str, Any]:
    """Run a point in a process of its own, which starts its ranks."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        config, output = Path(folder, "point.yaml"), Path(folder, "result.json")
        job = dataclasses.asdict(point.job)
        job["run"]["timeout"] = max(job["run"]["timeout"], timeout)  # which ends the point here
        config.write_text(yaml.safe_dump(job), encoding="utf-8")
        run = [sys.executable, "-m", "sp_compile", "run", str(config), "--json", str(output)]
        status, error = _finish(run, timeout)
        result = json.loads(output.read_text(encoding="utf-8")) if output.exists() else None
    if status != TIMED_OUT and result is not None and not result["ok"]:
        status, error = FAILED, "the results are not those of the unsharded model"
    return {
        "format": FORMAT,
        "key": point.key,
        "point": dict(point.values),
        "status": status,
        "error": error,
        "started": start,
        "seconds": time.time() - start,
        "config": dataclasses.asdict(point.job),
        "versions": versions(),
        "machine": machine(),
        "result": result,
    }


def _finish(command: Sequence[str], timeout: float) -> tuple[str, str | None]:
    """How a command ended, and what it said if not well."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    try:
        _, told = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return TIMED_OUT, f"it took longer than {timeout:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with ranks that it left
        process.wait()
    if process.returncode == 0:
        return DONE, None
    lines = [line for line in told.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    what = (errors or lines or [""])[-1]
    return FAILED, what or f"it ended with status {process.returncode}"


def flat_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of plain values for each result, with the point's values by their dotted names."""
    return [_flat(each) for each in results]


def _flat(each: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: value if _plain(value) else json.dumps(value) for name, value in each["point"].items()}
    row |= {"status": each["status"], "error": each["error"], "sp": each["config"]["run"]["sp"]}
    result = each["result"]
    if result is None:
        return row
    if "forward_seconds" not in result:  # of a job that generates
        prompts, new = sum(result["lengths"]), sum(result["new_tokens"])
        return row | {
            "tokens": prompts,
            "requests": len(result["lengths"]),
            "new_tokens": new,
            "prefill_seconds": result["prefill_seconds"],
            "decode_seconds": result["decode_seconds"],
            "new_tokens_per_second": new / result["decode_seconds"] if result["decode_seconds"] else None,
            "cache_bytes": max(result["cache_bytes"]),
        }
    ranks, alone = result["ranks"], result["unsharded"]
    area, tokens = ([rank[name] for rank in ranks] for name in ("attention_area", "tokens"))
    return row | {
        "tokens": sum(result["lengths"]),
        "requests": len(result["lengths"]),
        "seconds": result["forward_seconds"],
        "first_seconds": result["first_forward_seconds"],
        "bytes_sent": result["bytes_sent"],
        "bytes_by_formula": result.get("bytes_by_formula"),  # results of before have none
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "area_most_over_mean": max(area) * len(area) / max(sum(area), 1),
        "tokens_most_over_mean": max(tokens) * len(tokens) / max(sum(tokens), 1),
        "unsharded_seconds": alone and alone["forward_seconds"],
        "max_abs_diff": alone and alone["max_abs_diff"],
        "right": None if alone is None else alone["ok"],
    }


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def write_table(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write :func:`flat_rows` as a Parquet file, whole or not at all.

    Raises:
        ConfigError: pandas or pyarrow is not installed, or the file cannot be written.
    """
    pandas = pandas_module()
    frame = pandas.DataFrame(flat_rows(results))
    for name in frame.columns:
        kinds = {float if isinstance(each, int | float) and not isinstance(each, bool) else type(each)
                 for each in frame[name].dropna()}  # fmt: skip
        if len(kinds) > 1:  # a column of a table has one type
            frame[name] = [None if each is None else str(each) for each in frame[name]]
    with written_whole(path) as part:
        frame.to_parquet(part)


def pandas_module() -> Any:
    """The module pandas, with pyarrow beside it.

    Raises:
        ConfigError: one of them is not installed.
    """
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed, which tables of results need; pip install 'sp_compile[experiments]'"
        ) from error
    return pandas
