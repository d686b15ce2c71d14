"""Sweeps: which points there are, what is kept of them whatever happens, and what is made of it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sp_compile import plots, sweep
from sp_compile.errors import ConfigError
from sp_compile.plots import draw
from sp_compile.sweep import DONE, FAILED, TIMED_OUT, Point, Results, flat_rows, load_sweep, run_sweep, write_table

GRID = """
defaults: [prefill]
model: {config: {hidden_size: 64, num_hidden_layers: 1, intermediate_size: 96}}
compile: {codegen: eager}
run: {repeats: 1, warmup: 0}
sweep:
  timeout: 120
  over: {sp: [1, 2], compile.attention: [allgather_kv, ring], max_tokens: [40]}
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return path

    return _write


def result_of(point: Point) -> dict[str, Any]:
    """What a job might find out."""
    sp = point.job.run.sp
    ranks = [{"tokens": 20, "attention_area": 100 + 10 * i, "peak_bytes": 1 << 20} for i in range(sp)]
    figures = {"forward_seconds": 1.0 / sp, "first_forward_seconds": 2.0}
    crossed = {"bytes_sent": 1000 * (sp - 1), "bytes_by_formula": 1000 * (sp - 1)}
    return {**figures, **crossed, "ranks": ranks, "lengths": [20, 20], "unsharded": None, "ok": True}


@pytest.fixture
def pretended(monkeypatch):
    """Points that take no time; those of a ring fail. The list grows with every run."""
    ran: list[dict[str, Any]] = []

    def run(point: Point, timeout: float) -> dict[str, Any]:
        ran.append(dict(point.values))
        fails = point.job.compile.attention == "ring"
        return {
            "format": sweep.FORMAT,
            "key": point.key,
            "point": dict(point.values),
            "status": FAILED if fails else DONE,
            "error": "it broke" if fails else None,
            "config": {"run": {"sp": point.job.run.sp}},
            "result": None if fails else result_of(point),
        }

    monkeypatch.setattr(sweep, "_run", run)
    return ran


def test_a_point_for_each_combination_in_order(write):
    found = load_sweep(write(GRID), ["model.seed=3"])
    assert found.timeout == 120
    assert [(each.job.run.sp, each.job.compile.attention) for each in found.points] == [
        (1, "allgather_kv"), (1, "ring"), (2, "allgather_kv"), (2, "ring")]  # fmt: skip
    assert {each.job.model.seed for each in found.points} == {3}
    assert {each.job.requests.max_tokens for each in found.points} == {40}
    assert len({each.key for each in found.points}) == 4
    assert len(load_sweep("sweep_strategies").points) == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {sp: 2}", "describes no sweep; add sweep:"),
        ("sweep: [1]", r"sweep is \[1\]; expected over and timeout"),
        ("sweep: {ovr: {sp: [1]}}", r"unknown key 'sweep.ovr'; did you mean 'over'\?"),
        ("sweep: {over: {sp: 2}}", r"sweep.over.sp is 2; expected a list of values"),
        ("sweep: {over: {sp: [1]}, timeout: 0}", r"sweep.timeout=0; expected seconds, above 0 and at most 1e\+06"),
        ("sweep: {over: {sp: [1]}, timeout: .inf}", r"sweep.timeout=inf; expected seconds"),
        ("sweep: {over: {spp: [1]}}", r"unknown key 'spp'; did you mean 'sp'\?"),
        ("sweep: {over: {1: [1]}}", r"sweep.over has the key 1; expected names"),
        ("sweep: {over: {sp: [1], run.sp: [2]}}", r"sweep.over names run.sp twice"),
        ("sweep: {over: {sp: [1, two]}}", r"point sp=two: run.sp: .*; expected a whole number"),
        ("sweep: {over: {attention: [rign]}}", r"point attention=rign: .*'rign'; did you mean 'ring'\?"),
    ],
)
def test_mistakes_are_told_before_anything_runs(write, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_sweep(write(text))


def test_points_with_a_result_are_not_run_again(write, tmp_path, pretended):
    grid, results, shown = load_sweep(write(GRID)), Results(tmp_path / "out.jsonl"), []
    half = sweep.Sweep(grid.points[:2], grid.timeout)
    run_sweep(half, results)
    with results.path.open("ab") as file:
        file.write(b'{"format": 1, "key": "a line that was not wri')
    found = run_sweep(grid, results, show=lambda done, total, point: shown.append((done, total, point is None)))
    assert [each["sp"] for each in pretended] == [1, 1, 2, 2]
    assert [each["status"] for each in found] == [DONE, FAILED, DONE, FAILED]
    assert shown == [(2, 4, False), (3, 4, False), (4, 4, True)]
    assert [each["key"] for each in results.read()] == [each.key for each in grid.points]
    run_sweep(grid, results)
    assert len(pretended) == 4
    run_sweep(grid, results, retry=True)  # those that failed
    assert [each["compile.attention"] for each in pretended[4:]] == ["ring", "ring"]


def test_results_that_are_not_ours_are_refused(write, tmp_path, pretended):
    grid, path = load_sweep(write(GRID)), tmp_path / "out.jsonl"
    path.write_text('{"format": 99, "key": "a"}\n')
    with pytest.raises(ConfigError, match="line 1 has format 99, this version reads 1"):
        run_sweep(grid, Results(path))
    path.write_text('{"format": 1}\n')
    with pytest.raises(ConfigError, match="line 1 is no result of a sweep"):
        run_sweep(grid, Results(path))
    path.write_text("seconds,bytes\n")
    with pytest.raises(ConfigError, match="line 1 is no result of a sweep"):
        run_sweep(grid, Results(path))
    assert path.read_text() == "seconds,bytes\n"
    path.unlink()
    with Results(path).writing(), pytest.raises(ConfigError, match="being written by another sweep"):
        run_sweep(grid, Results(path))
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        run_sweep(grid, Results(tmp_path / "nowhere" / "out.jsonl"))
    assert pretended == []


def test_a_full_disk_leaves_earlier_results(write, tmp_path, pretended, monkeypatch):
    grid, results, fsync = load_sweep(write(GRID)), Results(tmp_path / "out.jsonl"), os.fsync

    def full(file: int) -> None:
        if len(pretended) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        run_sweep(grid, results)
    assert [each["key"] for each in results.read()] == [each.key for each in grid.points[:2]]


def test_how_a_point_ends():
    def end(code: str, timeout: float = 60) -> tuple[str, str | None]:
        return sweep._finish([sys.executable, "-c", code], timeout)

    assert end("pass") == (DONE, None)
    assert end("import sys; print('error: no model', file=sys.stderr); print('x', file=sys.stderr); sys.exit(2)") == (
        FAILED, "error: no model")  # fmt: skip
    assert end("import os; os._exit(3)") == (FAILED, "it ended with status 3")
    assert end("import os, sys; os.write(2, b'\\xff error'); sys.exit(2)")[0] == FAILED
    start = time.perf_counter()
    # what it started ends with it
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert end(child, 2) == (TIMED_OUT, "it took longer than 2 s")
    assert time.perf_counter() - start < 30


def test_a_signal_ends_what_was_started(tmp_path):
    """A sweep that is ended by its scheduler leaves no job running beside the next."""
    note = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    child = f"{note}; time.sleep(60)"
    script = (
        "import sys; from sp_compile import sweep\n"
        f"with sweep._ended_by_signals(): sweep._finish([sys.executable, '-c', {child!r}], 60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started = int((tmp_path / "pid").read_text())
    process.terminate()
    assert process.wait(30) == 128 + 15
    with pytest.raises(ProcessLookupError):
        os.kill(started, 0)


def test_real_points(write, tmp_path):
    text = GRID.replace("sp: [1, 2]", "sp: [2]").replace("[allgather_kv, ring]", "[allgather_kv, hybrid]")
    results = Results(tmp_path / "out.jsonl")
    right, failed = run_sweep(load_sweep(write(text), ["max_requests=2"]), results)
    assert right["status"] == DONE, right["error"]
    assert right["result"]["unsharded"]["ok"]
    assert right["config"]["run"]["sp"] == 2
    assert {"torch", "revision"} <= right["versions"].keys()
    assert failed["status"] == FAILED
    assert "hybrid" in failed["error"]
    assert results.read() == [right, failed]


def test_tables_and_pictures(write, tmp_path, pretended):
    pandas = pytest.importorskip("pandas")
    found = run_sweep(load_sweep(write(GRID)), Results(tmp_path / "out.jsonl"))
    assert flat_rows(found)[2]["area_most_over_mean"] == pytest.approx(110 / 105)
    write_table(found, tmp_path / "out.parquet")
    table = pandas.read_parquet(tmp_path / "out.parquet")
    assert table["seconds"].dropna().tolist() == [1.0, 0.5]
    assert table["status"].tolist() == [DONE, FAILED, DONE, FAILED]
    mixed = [
        {**each, "point": {"of all kinds": value}} for each, value in zip(found, (1, "two", None, True), strict=True)
    ]
    write_table(mixed, tmp_path / "mixed.parquet")
    assert pandas.read_parquet(tmp_path / "mixed.parquet")["of all kinds"].dropna().tolist() == ["1", "two", "True"]
    files = draw(found, tmp_path / "pictures")
    names = ("speed_up", "bytes", "formula", "balance", "memory")
    assert {each.name for each in files} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert all(each.stat().st_size > 1000 for each in files)
    with pytest.raises(ConfigError, match="no point of the results has figures"):
        draw(found[1:2], tmp_path)
    generated = {"lengths": [3, 4], "new_tokens": [5, 5], "prefill_seconds": 1.0, "decode_seconds": 2.0}
    (row,) = flat_rows([{**found[0], "result": {**generated, "cache_bytes": [7, 9]}}])
    assert (row["new_tokens_per_second"], row["cache_bytes"]) == (5.0, 9)


def test_results_of_other_configurations_are_lines_of_their_own():
    job = load_sweep("sweep_strategies").points[0].job

    def result(sp: int, dtype: str, seconds: float) -> dict[str, Any]:
        found = {**result_of(Point({"sp": sp}, job)), "forward_seconds": seconds}
        config = {"run": {"sp": sp}, "model": {"dtype": dtype}}
        return {"key": f"{sp}{dtype}", "point": {"sp": sp}, "status": DONE, "error": None, "config": config,
                "result": found}  # fmt: skip

    results = [result(1, "float32", 4.0), result(2, "float32", 2.0), result(1, "bfloat16", 2.0)]
    assert plots._lines(flat_rows(results), results, "speed_up") == {
        "dtype=float32": [(1, 1.0), (2, 2.0)], "dtype=bfloat16": [(1, 1.0)]}  # fmt: skip


def test_the_command(write, tmp_path, pretended, monkeypatch, capsys):
    from sp_compile.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(write(GRID))]) == 1  # some points failed
    told = capsys.readouterr().out
    assert "it broke" in told
    assert len(json.loads((tmp_path / "grid.jsonl").read_text().splitlines()[0])) > 3
    assert (tmp_path / "grid.jsonl.parquet").is_file()
    assert main(["sweep", "grid.yaml", "--results", "."]) == 2
    assert "it is a directory" in capsys.readouterr().err
    assert main(["plot", "grid.jsonl", "--out", "pictures"]) == 0
    assert "pictures/speed_up.png" in capsys.readouterr().out
    assert main(["plot", "grd.jsonl"]) == 2
    assert "there is no file 'grd.jsonl'" in capsys.readouterr().err
    assert main(["run", str(write(GRID))]) == 2
    assert "run it with sp-compile sweep" in capsys.readouterr().err
