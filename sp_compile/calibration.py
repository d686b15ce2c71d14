"""Rates of the machine at hand, read off jobs of a sweep, and how well they predict its other jobs.

A predicted time is a sum of amounts (operations, bytes, collectives) over rates. So rates follow from measured times by
non-negative least squares of the relative errors (Lawson and Hanson, Solving Least Squares Problems, chapter 23); one
that takes nothing, as far as the jobs show, is infinite. Memory is measured by itself: in jobs of one model, the bytes
that products move cannot be told from their operations.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sp_compile.config import JobConfig, merged_job
from sp_compile.costs import rates_of
from sp_compile.errors import ConfigError
from sp_compile.hardware import Hardware
from sp_compile.job import work_of_job
from sp_compile.layout import token_layout
from sp_compile.measure import least_seconds
from sp_compile.planning import AUTO, Planner
from sp_compile.sweep import DONE, told
from sp_compile.work import Work

RATES = ("products", "attention", "inside")  # amounts over these
TIMES = ("latency", "part", "layer")  # amounts times these
FEWEST = 2 * (len(RATES) + len(TIMES))  # jobs, of which half are read off
WITHIN = 0.2
COPIED = 1 << 24  # elements of fp32


@dataclass(frozen=True)
class Compared:
    """A job as predicted and as measured.

    Attributes:
        point: what sets it apart in its sweep.
        sp, strategy, lengths: as it ran.
        predicted, measured: seconds of a forward.
        used: the rates were read off it.
    """

    point: Mapping[str, Any]
    sp: int
    strategy: str
    lengths: tuple[int, ...]
    predicted: float
    measured: float
    used: bool

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class _Job:
    point: Mapping[str, Any]
    config: JobConfig
    work: Work
    lengths: tuple[int, ...]
    seconds: float

    @property
    def key(self) -> Any:
        """What makes it another job: on one rank all strategies are one."""
        sp, compiled = self.config.run.sp, self.config.compile
        apart = (compiled.attention, compiled.scheme) if sp > 1 else ()
        others = dataclasses.replace(compiled, attention=AUTO, scheme=AUTO)
        return self.lengths, sp, apart, repr(others), self.work

    def predicted(self, hardware: Hardware) -> float:
        sp = self.config.run.sp
        layout = token_layout(self.lengths, sp, self.config.compile.scheme, min_shard_length=2)
        planner = Planner(self.work, hardware, whole_outputs=self.config.compile.outputs == "full")
        found = planner.prefill(layout, sp)
        strategy = self.config.compile.attention if sp > 1 else "local"
        if strategy not in found:
            raise ConfigError(f"there is no prediction for {told(self.point)}: attention by {strategy} is not one")
        return found[strategy][0]


def calibrated(results: Sequence[Mapping[str, Any]]) -> tuple[Hardware, list[Compared]]:
    """The machine of a sweep, read off half of its jobs, and all of them compared.

    Args:
        results: what a sweep of prefill jobs wrote, all on one machine without a GPU.

    Raises:
        ConfigError: scipy is missing; or there are too few jobs, some of other machines, or some that do not say how
            they ran.
    """
    solve = _solver()
    done = [each for each in results if each["status"] == DONE and "forward_seconds" in each["result"]]
    machines = {json.dumps(each["result"]["machine"], sort_keys=True) for each in done}
    dtypes = {each["result"]["config"]["model"]["dtype"] for each in done}
    if not done:
        raise ConfigError("no point of the results is a prefill that has figures")
    for each in done:
        _check_fixed(each["point"], each["result"]["config"]["compile"])
    if len(machines) > 1 or len(dtypes) > 1:
        raise ConfigError("the points are of several machines or dtypes; rates are those of one")
    machine = done[0]["result"]["machine"]
    if machine["gpus"]:
        raise ConfigError("rates are read off jobs on a CPU; for GPUs pass a description, such as h100")
    jobs = _distinct(_jobs(done))
    if len(jobs) < FEWEST:
        raise ConfigError(f"{len(jobs)} jobs that differ have results; to read rates off takes {FEWEST} or more")
    order = np.random.default_rng(0).permutation(len(jobs))  # no value of the grid falls on one side only
    used = [jobs[i] for i in order[::2]]
    hardware = _fitted(used, machine, dtypes.pop(), solve)
    compared = [
        Compared(each.point, each.config.run.sp, each.config.compile.attention, each.lengths,
                 each.predicted(hardware), each.seconds, each in used)
        for each in jobs
    ]  # fmt: skip
    return hardware, compared


def share_within(compared: Sequence[Compared], limit: float = WITHIN) -> float:
    """Of the points that rates were not read off, those whose prediction is no further off than ``limit``."""
    others = [each for each in compared if not each.used]
    return sum(abs(each.error) <= limit for each in others) / len(others)


def _jobs(done: Sequence[Mapping[str, Any]]) -> list[_Job]:
    work: dict[str, Work] = {}
    found = []
    for each in done:
        result = each["result"]
        config = merged_job([result["config"]])
        key = json.dumps([result["config"]["model"], result["config"]["compile"]["kernel"]], sort_keys=True)
        if key not in work:
            work[key], _ = work_of_job(config, rates_of(torch.device("cpu")))
        found.append(_Job(each["point"], config, work[key], tuple(result["lengths"]), result["forward_seconds"]))
    return found


def _distinct(jobs: Sequence[_Job]) -> list[_Job]:
    """Jobs that are the same as one that takes the median of their times."""
    found: dict[Any, list[_Job]] = {}
    for each in jobs:
        found.setdefault(each.key, []).append(each)
    return [dataclasses.replace(same[0], seconds=statistics.median(each.seconds for each in same))
            for same in found.values()]  # fmt: skip


def _check_fixed(point: Mapping[str, Any], compiled: Mapping[str, Any]) -> None:
    """A job has to say how it ran, for a prediction to be one of it."""
    unsaid = [name for name in ("attention", "scheme") if compiled[name] == AUTO]
    for name in unsaid if compiled["pipeline"] is None else [*unsaid, "pipeline"]:
        raise ConfigError(
            f"compile.{name} of {told(point)} is {compiled[name]!r}; rates are read off jobs with the usual pipeline "
            "and a strategy and a scheme that are named"
        )


def _solver() -> Any:
    try:
        from scipy.optimize import nnls
    except ModuleNotFoundError as error:
        raise ConfigError(
            "scipy is not installed, to solve for rates; pip install 'sp_compile[experiments]'"
        ) from error
    return nnls


def _fitted(jobs: Sequence[_Job], machine: Mapping[str, Any], dtype: str, solve: Any) -> Hardware:
    free = Hardware(
        name=str(machine["cpu"]), dtype=dtype, products=math.inf, attention=math.inf, memory=math.inf,
        capacity=float(machine["memory_bytes"]), inside=math.inf, between=math.inf, latency=0.0,
        ranks_per_node=1 << 20, hidden=0.0, part=0.0, layer=0.0, cores=1,
    )  # fmt: skip
    units = [_with(free, {name: 1.0}) for name in (*RATES, *TIMES)]
    memory = _memory_rate()
    rest = np.asarray([each.predicted(_with(free, {"memory": memory})) for each in jobs])
    measured = np.asarray([each.seconds for each in jobs])
    amounts = np.asarray([[each.predicted(unit) for unit in units] for each in jobs]) / measured[:, None]
    scale = np.maximum(amounts.max(axis=0), np.finfo(float).tiny)
    found = solve(amounts / scale, np.maximum(1 - rest / measured, 0))[0] / scale
    values = {
        name: float(1 / each) if each else math.inf for name, each in zip(RATES, found[: len(RATES)], strict=True)
    }
    values |= {name: float(each) for name, each in zip(TIMES, found[len(RATES) :], strict=True)}
    return _with(free, {**values, "between": values["inside"], "memory": memory})


def _memory_rate() -> float:
    """Bytes per second that a copy reads and writes."""
    a = torch.zeros(COPIED)
    b = torch.empty_like(a)
    return 2 * a.nbytes / least_seconds(lambda: b.copy_(a), a.device)


def _with(hardware: Hardware, values: Mapping[str, Any]) -> Hardware:
    return dataclasses.replace(hardware, **values)
