"""Ranks that stay: tests hand them functions, one after another, and get back what each rank returned or raised."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


class RankError(AssertionError):
    """A rank raised; the message holds the tracebacks of all that did."""


class RankPool:
    """``sp`` ranks of one gloo group with one thread each, started when first used."""

    def __init__(self, sp: int) -> None:
        self.sp = sp
        self._step = 0
        self._process: subprocess.Popen[bytes] | None = None
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
        if self._process is None:
            self._start()
        assert self._process is not None
        _save((fn, args, kwargs), Path(self._folder.name, f"order-{self._step}"))
        deadline, found = time.monotonic() + timeout, []
        for rank in range(self.sp):
            path = Path(self._folder.name, f"result-{self._step}-{rank}")
            while not path.exists():
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    raise RankError(f"rank {rank} did not answer within {timeout:g} s, or died")
                time.sleep(0.01)
            found.append(torch.load(path, weights_only=False))
        self._step += 1
        return found

    def _start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", "tests.ranks", str(self.sp), self._folder.name]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment)

    def close(self) -> None:
        """End the ranks; the next run starts new ones."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process, self._step = None, 0
        self._folder.cleanup()
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")


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
    from sp_compile import launch
    from tests.ranks import serve as _serve

    launch(_serve, int(sys.argv[1]), sys.argv[2], timeout=7200)
