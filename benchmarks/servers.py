"""Processes of several setups that live through a whole benchmark and answer in turn, so that runs interleave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

import sp_compile
from sp_compile.measure import PeakMemory

POLL = 0.05  # seconds between looks at files: processes that wait must not take time from the one that runs


class Server:
    """A setup's processes, fed through a folder of order files.

    Args:
        name: of the setup.
        script: what is run, with ``--serve``, the arguments, and the folder; it calls :func:`serve`.
    """

    def __init__(self, name: str, script: str, arguments: Sequence[str], sp: int, threads: int) -> None:
        self.name, self.sp = name, sp
        self.folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        self.step = 0
        command = [sys.executable, script, "--serve", *arguments, str(sp), str(threads), self.folder.name]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(command, env=environment)

    def ask(self, order: str, timeout: float = 1200.0, join: Callable[[Sequence[float]], float] = max) -> float:
        """The ranks' answers, joined to one; by default the largest."""
        write(Path(self.folder.name, f"order-{self.step}"), order)
        results = []
        deadline = time.monotonic() + timeout
        for rank in range(self.sp):
            path = Path(self.folder.name, f"result-{self.step}-{rank}")
            while not path.exists():
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name} ended or took longer than {timeout:g} s")
                time.sleep(POLL)
            results.append(json.loads(path.read_text()))
        self.step += 1
        return join(results)

    def end(self) -> None:
        """Stop the processes."""
        write(Path(self.folder.name, f"order-{self.step}"), "end")
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.folder.cleanup()


def serve(run: Callable[..., None], arguments: Sequence[str]) -> None:
    """Start what ``--serve`` asks for: ``run(*arguments, sp, threads, folder)`` on each rank."""
    *own, sp, threads, folder = arguments
    if int(sp) > 1:
        sp_compile.launch(run, int(sp), *own, int(sp), int(threads), folder, timeout=7200)
    else:
        run(*own, 1, int(threads), folder)


def spent(what: str, run: Callable[[], object]) -> float:
    """Seconds that something takes, or for ``memory`` the most bytes that it holds on the CPU."""
    if what == "memory":
        with PeakMemory(torch.device("cpu")) as peak:
            run()
        return peak.bytes
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def answer(orders: str, sp: int, reply: Callable[[str], float]) -> None:
    """Answer order by order until there are no more; ranks begin each together."""
    rank = dist.get_rank() if dist.is_initialized() and sp > 1 else 0
    step = 0
    while True:
        order = Path(orders, f"order-{step}")
        while not order.exists():
            time.sleep(POLL)
        text = order.read_text()
        if text == "end":
            return
        if sp > 1:
            dist.barrier()
        write(Path(orders, f"result-{step}-{rank}"), json.dumps(reply(text)))
        step += 1


def write(path: Path, text: str) -> None:
    """Write whole or not at all."""
    part = path.with_name(f".{path.name}")
    part.write_text(text)
    part.rename(path)
