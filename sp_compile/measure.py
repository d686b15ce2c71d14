"""What a job measures: time, peak memory, and the machine it ran on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def median_seconds(run: Callable[[], Any], repeats: int, device: torch.device, before: Callable[[], None]) -> float:
    """Median wall-clock seconds of ``run()``; ``before()`` lines the ranks up and is not timed."""
    return statistics.median(seconds(run, device, before) for _ in range(repeats))


def seconds(run: Callable[[], Any], device: torch.device, before: Callable[[], None]) -> float:
    """Wall-clock seconds of one ``run()`` with what it started on the device."""
    before()
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for what was started on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def least_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The least wall-clock seconds of five runs, for rates that a machine can reach."""
    return min(seconds(run, device, lambda: None) for _ in range(5))


def write_timeline(run: Callable[[], Any], path: Path, device: torch.device) -> None:
    """Write what ``run()`` does when, in the format of Chrome's trace viewer, which Perfetto opens."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        run()
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))


@contextlib.contextmanager
def threads_of_all(ranks: int) -> Iterator[int]:
    """Run on the threads that the ranks of this machine have together; how many these are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads * ranks, len(os.sched_getaffinity(0))))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)


class PeakMemory:
    """Bytes in use at the peak of a ``with`` block above those before it.

    On CUDA what tensors occupy, else the process' resident memory. Linux resets the high-water mark when 5 is written
    to ``/proc/self/clear_refs``; where that is not allowed, a peak below an earlier one reads as 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._before = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        _return_freed_memory()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _resident_peak()
        return self

    def __exit__(self, *_: object) -> None:
        cuda = self.device.type == "cuda"
        self.bytes = (torch.cuda.max_memory_allocated(self.device) if cuda else _resident_peak()) - self._before


def _resident_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _return_freed_memory() -> None:
    """Make glibc give freed memory back, which a later peak would otherwise hide in."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def revision() -> str:
    """The git revision of these sources, with a ``+`` where they have changed since; empty outside of a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return ""
    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{git('rev-parse', 'HEAD') or ''}{changed}"


def versions() -> dict[str, str]:
    """Versions of Python and of what decides over a result; those that are not installed are left out."""
    found = {"python": platform.python_version(), "revision": revision()}
    for name in ("sp_compile", "torch", "transformers", "tokenizers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The hardware, without a name or a place."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu(),
        "memory_bytes": memory,
        "system": platform.system(),
        "gpus": gpus,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
