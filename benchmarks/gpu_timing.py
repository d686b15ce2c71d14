"""Times, ratios and differences, for the parts of ``gpu.py``."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sp_compile import measure

Run = Callable[[], Any]
Key = TypeVar("Key")
LAYERS = 32  # that the plan of a forward is for
LONG, FEWEST = 0.5, 3  # seconds of a run from which on there are fewer rounds, and how many
AT_ONCE = 1 << 26  # elements that are compared in fp32 at once
HALF_ERROR = 2e-2  # of the norm, of one operation in bf16
TARGETS = {
    "bandwidth": (">=", 0.8),
    "best": (">=", 0.9),
    "even": ("<=", 1.05),
    "exact": ("<=", 1e-4),
    "memory": ("<=", 1.1),
    "plan": ("<=", 0.1),
    "time": ("<=", 1.0),
}


@dataclass(frozen=True)
class Shape:
    """Heads of a model's attention, and where they are computed."""

    name: str
    heads: int
    kv_heads: int
    device: torch.device
    width: int = 128

    def random(self, heads: int, tokens: int) -> torch.Tensor:
        """Bf16 ``[1, heads, tokens, width]``."""
        return torch.randn(1, heads, tokens, self.width, device=self.device, dtype=torch.bfloat16)


def seconds_of(run: Run) -> float:
    """Seconds of one run, by events on a GPU and by the clock on a CPU."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def host_seconds(run: Run) -> float:
    """Seconds of one run on the host, with what it sends to the GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return measure.seconds(run, device, lambda: measure.synchronize(device))


def medians(
    runs: Mapping[Key, Run],
    rounds: int,
    measured: Callable[[Run], float] = seconds_of,
    warm: Collection[Key] = (),
) -> dict[Key, float]:
    """Median seconds of each; rounds visit all in turn, after one that is not counted.

    Args:
        rounds: as many of each, but :data:`FEWEST` where one takes :data:`LONG` seconds.
        warm: those that ran before, of which none is left out.
    """
    for key, run in runs.items():
        if key not in warm:
            run()
    times: dict[Key, list[float]] = {key: [] for key in runs}
    for i in range(rounds):
        for key, run in runs.items():
            if i < FEWEST or min(times[key]) < LONG:
                times[key].append(measured(run))
    return {key: statistics.median(each) for key, each in times.items()}


def able(runs: Mapping[Key, Run]) -> tuple[dict[Key, Run], dict[Key, str]]:
    """What runs here, each of which ran once then, and why the others do not.

    Raises:
        RuntimeError: nothing does.
    """
    found, refused = dict[Key, Run](), dict[Key, str]()
    for key, run in runs.items():
        try:
            run()
            measure.synchronize(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            found[key] = run
        except Exception as error:
            refused[key] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if not found:
        raise RuntimeError(f"none of torch's own runs here: {refused}")
    return found, refused


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected, a part of the longest dim after the other."""
    if found.shape != expected.shape:
        raise ValueError(f"a result is {list(found.shape)}; {list(expected.shape)} was expected")
    dim = max(range(expected.dim()), key=lambda each: expected.shape[each])
    rows = max(1, AT_ONCE * expected.shape[dim] // expected.numel())
    squares = [0.0, 0.0]
    for one, other in zip(found.split(rows, dim), expected.split(rows, dim), strict=True):
        one, other = one.float(), other.float()
        squares[0] += float((one - other).norm()) ** 2
        squares[1] += float(other.norm()) ** 2
    return math.sqrt(squares[0] / squares[1])


def difference(found: torch.Tensor, expected: torch.Tensor, most: float = HALF_ERROR) -> float:
    """As :func:`apart`.

    Raises:
        ValueError: it is more than that, by default more than bf16 explains.
    """
    value = apart(found, expected)
    if not value < most:
        raise ValueError(f"a result is off its reference by {value:.1e} of its norm; less than {most:.1e} was expected")
    return value


def figure(ratio: float, target: str, wrong: float, **more: Any) -> dict[str, Any]:
    """A ratio and whether it reaches its target."""
    sign, limit = TARGETS[target]
    met = ratio <= limit if sign == "<=" else ratio >= limit
    return {"ratio": ratio, "target": f"{sign} {limit}", "met": met, "error": wrong, **more}


def copying(count: int, device: torch.device) -> Run:
    """A copy that reads and writes ``count`` bytes in all."""
    source = torch.ones(max(1, count // 2), dtype=torch.uint8, device=device)
    return lambda: source.clone()
