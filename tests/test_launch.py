"""Local ranks: results come back by rank, and a rank that fails ends the call, naming itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sp_compile.errors import ConfigError, MeshError, RankFailedError
from sp_compile.launch import launch


def total(base: torch.Tensor, *, scale: int = 1) -> tuple[int, torch.Tensor]:
    value = base * scale + dist.get_rank()
    dist.all_reduce(value)
    return dist.get_rank(), value


def settings() -> dict[str, object]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_WAIT_POLICY")
    return {name: os.environ[name] for name in names} | {"threads": torch.get_num_threads()}


def large() -> torch.Tensor:
    return torch.full((8 << 20,), float(dist.get_rank()))


def fail_on(rank: int, how: str) -> None:
    if dist.get_rank() == rank:
        if how == "raise":
            raise ValueError("no such token")
        if how == "exit":
            os._exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(600)
        if how == "result":
            return lambda: None  # type: ignore[return-value]  # cannot be sent back
    dist.all_reduce(torch.ones(1))
    return None


def start_child_and_hang() -> None:
    subprocess.Popen(["sleep", "612"])
    if dist.get_rank() == 0:
        raise RuntimeError("after starting a child")
    time.sleep(600)


def children() -> set[int]:
    """Processes of ours, zombies too, without multiprocessing's resource tracker."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_text()
        except (OSError, IndexError):
            continue
        if parent == os.getpid() and "resource_tracker" not in command:
            found.add(int(stat.parent.name))
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before = children()
    yield
    assert children() <= before


def test_results_come_back_by_rank():
    results = launch(total, 3, torch.ones(2), scale=10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    for _, value in results:
        torch.testing.assert_close(value, torch.full((2,), 33.0))


def test_large_results():
    for rank, value in enumerate(launch(large, 2)):
        assert value.shape == (8 << 20,)
        assert bool((value == rank).all())


def test_ranks_find_what_torchrun_would_set(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    first, second = launch(settings, 2)
    assert (first["RANK"], second["LOCAL_RANK"], second["WORLD_SIZE"]) == ("0", "1", "2")
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["OMP_WAIT_POLICY"] == "PASSIVE"
    assert first["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert "OMP_NUM_THREADS" not in os.environ


def test_threads_that_the_user_chose_stay(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch(settings, 1)[0]["threads"] == 3


def test_a_rank_that_raises_is_named_with_its_traceback():
    with pytest.raises(RankFailedError, match=r"^rank 1 of 2 raised ValueError: no such token") as caught:
        launch(fail_on, 2, 1, "raise", timeout=60)
    assert 'raise ValueError("no such token")' in str(caught.value)


@pytest.mark.parametrize(("how", "words"), [("exit", "ended with exit code 3"), ("kill", "was killed by SIGKILL")])
def test_a_rank_that_dies_is_named(how: str, words: str):
    start = time.monotonic()
    with pytest.raises(RankFailedError, match=rf"^rank 0 of 2 {words}"):
        launch(fail_on, 2, 0, how, timeout=60)
    assert time.monotonic() - start < 90


def test_a_rank_that_hangs_is_ended_and_says_where_it_was():
    start = time.monotonic()
    with pytest.raises(RankFailedError, match=r"did not finish within 30 s") as caught:
        launch(fail_on, 2, 1, "hang", timeout=30)
    assert "in fail_on" in str(caught.value)
    assert time.monotonic() - start < 90


def test_a_result_that_cannot_be_sent_names_the_rank():
    with pytest.raises(RankFailedError, match="rank 1 of 2 raised"):
        launch(fail_on, 2, 1, "result", timeout=60)


def test_what_a_rank_started_ends_with_it():
    with pytest.raises(RankFailedError, match="after starting a child"):
        launch(start_child_and_hang, 2, timeout=60)
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert b"sleep\x00612\x00" not in running


def test_ranks_end_when_the_launching_process_is_killed(tmp_path: Path):
    script = tmp_path / "job.py"
    script.write_text(
        "import os, sys, time, pathlib\n"
        "from sp_compile.launch import launch\n"
        "def stay(folder):\n"
        "    pathlib.Path(folder, os.environ['RANK']).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        f"    launch(stay, 2, {str(tmp_path)!r})\n"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "TMPDIR": str(temporary)})
    files = [tmp_path / "0", tmp_path / "1"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files), 60)
    process.kill()
    process.wait()
    wait_for(lambda: not any(Path("/proc", file.read_text()).exists() for file in files), 20)
    assert not list(temporary.glob("sp_compile-*"))


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_functions_that_cannot_be_sent_are_refused_before_a_process_starts():
    with pytest.raises(ConfigError, match=r"lambda.*top level of a module"):
        launch(lambda: 0, 2)
    with pytest.raises(ConfigError, match="an argument of total cannot be sent"):
        launch(total, 2, lambda: 0)


def test_functions_of_an_interactive_session_are_refused():
    code = (
        "from sp_compile.launch import launch\ndef fn(): pass\ntry:\n  launch(fn, 2)\nexcept ValueError as e: print(e)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fn is defined in an interactive session" in found.stdout


def test_a_script_without_a_main_guard_is_told(tmp_path: Path):
    script = tmp_path / "job.py"
    script.write_text("from sp_compile.launch import launch\ndef fn(): pass\nlaunch(fn, 1, timeout=60)\n")
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 1
    assert "call launch under `if __name__ == '__main__':`" in found.stderr


def test_wrong_numbers_of_ranks_and_nesting_are_refused(monkeypatch):
    for sp in (0, -1, "2"):
        with pytest.raises(MeshError, match="not a number of ranks"):
            launch(total, sp)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(MeshError, match="torchrun started this process"):
        launch(total, 2)
