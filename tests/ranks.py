"""Ranks that stay: tests hand them functions, one after another, and get back what each rank returned or raised.

Importing what a rank needs takes seconds, so that one process imports it once and forks all ranks.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
LIMIT = timedelta(hours=2)
IMPORTED = ("torch._dynamo", "torch._inductor.compile_fx", "sp_compile", "tests.training", "tests.zoo.models",
            "transformers.modeling_utils", "transformers.models.llama.modeling_llama")  # fmt: skip
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class RankError(AssertionError):
    """A rank raised; the message holds the tracebacks of all that did."""


class RankPool:
    """``sp`` ranks of one gloo group with one thread each, started when first used."""

    def __init__(self, sp: int) -> None:
        self.sp = sp
        self._step = 0
        self._pids: list[int] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 600.0, **kwargs: Any) -> list[Any]:
        """Run a function of the top level of a module on every rank; its results by rank."""
        outcomes = self.outcomes(fn, *args, timeout=timeout, **kwargs)
        failed = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
        if failed:
            raise RankError("\n".join(failed))
        return [value for _, value in outcomes]

    def outcomes(self, fn: Callable[..., Any], *args: Any, timeout: float = 600.0, **kwargs: Any) -> list[Any]:
        """For each rank whether it returned, and what; or the traceback of what it raised."""
        if not self._pids:
            self._pids = self._start()
        _save((fn, args, kwargs), Path(self._folder.name, f"order-{self._step}"))
        deadline, found = time.monotonic() + timeout, []
        for rank in range(self.sp):
            path = Path(self._folder.name, f"result-{self._step}-{rank}")
            while not path.exists():
                if not all(map(_lives, self._pids)) or time.monotonic() > deadline:
                    self.close()
                    raise RankError(f"rank {rank} did not answer within {timeout:g} s, or died")
                time.sleep(0.01)
            found.append(torch.load(path, weights_only=False))
        self._step += 1
        return found

    def _start(self) -> list[int]:
        """Start the ranks; the processes to kill."""
        parent = _parent_of_ranks()
        assert parent.stdin is not None
        assert parent.stdout is not None
        print(json.dumps([self.sp, self._folder.name]), file=parent.stdin, flush=True)
        return [int(pid) for pid in json.loads(parent.stdout.readline())]

    def close(self) -> None:
        """End the ranks; the next run starts new ones."""
        for pid in self._pids:
            if _lives(pid):
                os.kill(pid, signal.SIGKILL)
        self._pids, self._step = [], 0
        self._folder.cleanup()
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@lru_cache(maxsize=1)
def _parent_of_ranks() -> subprocess.Popen[str]:
    environment = {**os.environ, **ONE_THREAD, "TORCH_WARM_POOL": "0"}
    command = [sys.executable, "-m", "tests.ranks"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def fork_ranks() -> None:
    """What the parent of ranks does, until the tests end."""
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ranks that end leave no process behind
    for line in sys.stdin:
        sp, folder = json.loads(line)
        print(json.dumps([_fork(rank, sp, folder) for rank in range(sp)]), flush=True)


def _fork(rank: int, sp: int, folder: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(2, 1)  # what comes out is what the parent says
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(sp), LOCAL_WORLD_SIZE=str(sp))
        torch.set_num_threads(1)
        store = dist.FileStore(str(Path(folder, "store")), sp)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=sp, timeout=LIMIT)
        serve(folder)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def serve(folder: str) -> None:
    """What a rank does: orders one after another, until it is killed."""
    rank, step = os.environ["RANK"], 0
    while True:
        order = Path(folder, f"order-{step}")
        while not order.exists():
            time.sleep(0.005)
        fn, args, kwargs = torch.load(order, weights_only=False)
        torch._dynamo.reset()
        try:
            outcome: tuple[bool, Any] = True, fn(*args, **kwargs)
        except Exception:
            outcome = False, traceback.format_exc()
        _save(outcome, Path(folder, f"result-{step}-{rank}"))
        step += 1


def _save(value: Any, path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    torch.save(value, part)
    part.rename(path)


if __name__ == "__main__":
    from tests.ranks import fork_ranks as _fork_ranks

    _fork_ranks()
