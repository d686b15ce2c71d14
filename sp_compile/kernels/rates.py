"""How fast torch's kernels for GPUs are on a device: measured once for each shape of heads, and kept on disk.

A kernel is only taken where it ran here and gave what attention is by its definition, so that one which a device, a
driver or a version of torch does not have, or gets wrong, is passed over.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention.flex_attention import flex_attention

from sp_compile.compat import sources
from sp_compile.errors import ConfigError, KernelError
from sp_compile.files import written_whole
from sp_compile.kernels import fused
from sp_compile.measure import least_seconds

FOLDER = "SP_COMPILE_CACHE_DIR"
SHORT, LONG = 512, 8192  # queries and keys for which a kernel is timed
# ends of rectangles that are compared, one or two; windows that tall ones are not called with are WIDE_WINDOWS
WIDE, TALL = [([192], [192]), ([192], [256]), ([80, 192], [100, 256])], [([256], [192]), ([80, 192], [100, 190])]
WIDE_WINDOWS = (fused.CAUSAL, fused.Window(40, 0), fused.Window(40, -1))
WINDOWS = (fused.EVERYTHING, fused.Window(-1, 80))
ERROR = 0.02  # of the largest value, for bf16, whose steps are 2 ** -8 of a value
PACKED = "packed flash"
FLEX = "FlexAttention"
AGAIN = 60  # seconds after which what memory did not suffice for is tried again
Ends = tuple[list[int], list[int]]  # of the queries and the keys of rectangles behind one another


@dataclass(frozen=True)
class Shape:
    """Heads, for which the kernels are measured.

    Attributes:
        dtype: without ``torch.``.
        backward: of gradients, not of outputs.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    backward: bool

    @classmethod
    def of(cls, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKE: torch.Tensor, backward: bool) -> Shape:
        """The shape of an attention."""
        dtype = str(q_BHQD.dtype).removeprefix("torch.")
        return cls(q_BHQD.shape[1], k_BGKD.shape[1], q_BHQD.shape[3], v_BGKE.shape[3], dtype, backward)


@dataclass(frozen=True)
class Rate:
    """What one kernel takes.

    Attributes:
        call: seconds of a call that computes little.
        pair: seconds of a pair of a query and a key, of all heads.
        refused: why the kernel is not to be used; empty where it is.
    """

    call: float = 0.0
    pair: float = 0.0
    refused: str = ""

    def seconds(self, pairs: int) -> float:
        """What a call over so many pairs takes."""
        return self.call + self.pair * pairs


def fastest(shape: Shape, window: fused.Window, queries: int, keys: int, device: torch.device) -> str:
    """The kernel for so many queries and keys.

    Raises:
        KernelError: none runs here.
    """
    rates = {name: each for name, each in measured(shape, device).items() if name in fused.KERNELS}
    able = _seconds(rates, window, queries, keys)
    if not able:
        reasons = "; ".join(f"{name}: {rate.refused}" for name, rate in rates.items() if rate.refused)
        raise KernelError(f"no fused kernel of torch runs here for {shape} ({reasons}); pass kernel='flex' or 'tiles'")
    return min(able, key=lambda name: able[name])


def _seconds(rates: Mapping[str, Rate], window: fused.Window, queries: int, keys: int) -> dict[str, float]:
    """What the kernels that may be called for a rectangle take for it."""
    pairs = queries * keys
    return {
        name: rate.seconds(pairs)
        for name, rate in rates.items()
        if not rate.refused and fused.KERNELS[name].takes(window, queries, keys)
        if name != "cudnn" or pairs >= fused.PLANNED
    }


def refused(shape: Shape, device: torch.device) -> str | None:
    """Why no fused kernel serves any window on this device; None where one does."""
    rate = measured(shape, device)["flash"]
    return f"torch's flash attention does not run here: {rate.refused}" if rate.refused else None


def packs(shape: Shape, device: torch.device) -> bool:
    """Whether one call of many rectangles runs on this device."""
    return not measured(shape, device)[PACKED].refused


def beats_flex(shape: Shape, device: torch.device) -> bool:
    """Whether a fused kernel takes less than FlexAttention's generated code for as much as they are timed with.

    That is a square which cuDNN may be called for. Smaller rectangles go to flash, whatever was faster here.
    """
    of_flex = _rate(FLEX, shape, device)
    if of_flex.refused:
        return True
    rates = measured(shape, device)
    able = _seconds({name: rates[name] for name in fused.KERNELS}, fused.EVERYTHING, LONG, LONG)
    return min(able.values(), default=math.inf) < of_flex.seconds(LONG**2)


def measured(shape: Shape, device: torch.device) -> dict[str, Rate]:
    """The rates of torch's kernels, from disk where this device was measured before."""
    return {name: _rate(name, shape, device) for name in (*fused.KERNELS, PACKED)}


def _rate(name: str, shape: Shape, device: torch.device) -> Rate:
    """A kernel's rate; refused where it raises."""
    return _tried(name, shape, device, int(time.monotonic() / AGAIN))


@lru_cache(maxsize=1024)
def _tried(name: str, shape: Shape, device: torch.device, _: int) -> Rate:
    """A rate for some time: that there is too little memory says nothing of the kernel."""
    try:
        return _known(name, shape, device)
    except torch.OutOfMemoryError as error:
        return _refusing(error)


def _refusing(error: RuntimeError) -> Rate:
    return Rate(refused=(str(error).splitlines() or [type(error).__name__])[0])


@lru_cache(maxsize=1024)
def _known(name: str, shape: Shape, device: torch.device) -> Rate:
    """A kernel's rate, from disk where it was measured before.

    What it raises is known for this process only, since another may have the compiler or the driver that this one
    lacks.

    Raises:
        OutOfMemoryError: there is too little memory to measure it.
    """
    file = _file(name, shape, device)
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Rate(**json.loads(file.read_text()))
    try:
        found = (_measure_flex if name == FLEX else _measure)(name, shape, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return _refusing(error)
    with contextlib.suppress(OSError, ConfigError):  # a folder that takes no file; it is measured again then
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as part:
            part.write_text(json.dumps(asdict(found), indent=1))
    return found


def _file(name: str, shape: Shape, device: torch.device) -> Path:
    """Where a rate is kept: for a card, versions of torch, its libraries and ours, a shape and a kernel."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sp_compile"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    libraries = f"cuda {torch.version.cuda} cudnn {torch.backends.cudnn.version()}"
    of = f"{card} torch {torch.__version__} {libraries} sp_compile {sources()[:16]}".replace("/", "-")
    heads = "-".join(str(each) for each in asdict(shape).values())
    return Path(os.environ.get(FOLDER) or default) / "kernels" / of.replace(" ", "-") / heads / f"{name}.json"


def _measure(name: str, shape: Shape, device: torch.device) -> Rate:
    """Compare a kernel with the definition, then time it."""
    for window in (*WINDOWS, *WIDE_WINDOWS):
        for ends in [*WIDE, *(TALL if window in WINDOWS else [])]:
            packed = len(ends[0]) > 1
            if packed if name == PACKED else not packed and fused.KERNELS[name].takes(window, *map(max, ends)):
                apart = _error(name, shape, window, ends, device)
                if not apart <= ERROR:
                    return Rate(refused=f"its result is off by {apart:.1e} of the largest value")
    return _timed(lambda length: _run(name, shape, length, device), device)


def _measure_flex(name: str, shape: Shape, device: torch.device) -> Rate:
    """Time FlexAttention's code for any length."""
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=True)

    def run(length: int) -> Callable[[], Any]:
        q, k, v, _ = _inputs(shape, length, length, device)
        return lambda: compiled(q, k, v, enable_gqa=True, kernel_options={"BACKEND": "TRITON"})  # as models are lowered

    with torch.no_grad():
        return _timed(run, device)


def _timed(run: Callable[[int], Callable[[], Any]], device: torch.device) -> Rate:
    """What a function of so many queries and keys takes."""
    short, long = (least_seconds(run(length), device) for length in (SHORT, LONG))
    pair = max(long - short, 0.0) / (LONG**2 - SHORT**2)
    return Rate(max(short - pair * SHORT**2, 0.0), pair)


def _inputs(shape: Shape, queries: int, keys: int, device: torch.device) -> list[torch.Tensor]:
    """Queries, keys, values and the gradient of the output."""
    sizes = ((shape.heads, queries, shape.head_dim), (shape.kv_heads, keys, shape.head_dim),
             (shape.kv_heads, keys, shape.value_dim), (shape.heads, queries, shape.value_dim))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    return [torch.randn(1, *each, generator=generator).to(device, dtype) for each in sizes]


def _run(name: str, shape: Shape, length: int, device: torch.device) -> Callable[[], Any]:
    q, k, v, grad = _inputs(shape, length, length, device)
    run = _kernel(name, ([length], [length]), shape.head_dim**-0.5, fused.EVERYTHING, device)
    if not shape.backward:
        return lambda: run.forward(q, k, v)
    out, lse = run.forward(q, k, v)
    return lambda: run.backward((q, k, v), out, lse, grad)


class _Kernel(NamedTuple):
    """A kernel for ``[1, heads, rows, dim]`` tensors."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def _kernel(name: str, ends: Ends, scale: float, window: fused.Window, device: torch.device) -> _Kernel:
    """One of torch's kernels, or all rows packed as rectangles with these ends."""
    if name != PACKED:
        forward, backward = (partial(each, name, scale=scale, window=window)
                             for each in (fused.attend, fused.attend_backward))  # fmt: skip
        return _Kernel(forward, backward)
    of_queries, of_keys = (torch.tensor([0, *each], dtype=torch.int32, device=device) for each in ends)
    lengths = fused.Lengths(of_queries, of_keys, int(of_queries.diff().max()), int(of_keys.diff().max()))

    def packed_forward(*qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (each[0].transpose(0, 1) for each in qkv)
        out, lse = fused.attend_packed(q, k, v, lengths, scale, window)
        return out.transpose(0, 1)[None], lse[None]

    def packed_backward(qkv: Any, out: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        q, k, v, out, grad = (each[0].transpose(0, 1) for each in (*qkv, out, grad))
        found = fused.attend_packed_backward((q, k, v), out, lse[0], grad, lengths, scale, window)
        return [each.transpose(0, 1)[None] for each in found]

    return _Kernel(packed_forward, packed_backward)


def _error(name: str, shape: Shape, window: fused.Window, ends: Ends, device: torch.device) -> float:
    """The largest difference to the definition in fp32, over the largest value, of outputs and gradients."""
    q, k, v, grad = _inputs(shape, ends[0][-1], ends[1][-1], device)
    scale = shape.head_dim**-0.5
    run = _kernel(name, ends, scale, window, device)
    out, lse = run.forward(q, k, v)
    right = _defined([each.float() for each in (q, k, v, grad)], _seen(ends, window).to(device), scale)
    found = [out, lse]
    if shape.backward:
        found += run.backward((q, k, v), out, lse, grad)
    pairs = zip(found, right, strict=False)  # gradients only where they are asked for
    return float(torch.stack([(one.float() - other).abs().max() / other.abs().max() for one, other in pairs]).max())


def _seen(ends: Ends, window: fused.Window) -> torch.Tensor:
    """The keys that each query sees, bool ``[queries, keys]``: those of its rectangle, in a window of its corner."""
    sizes = zip(*(np.diff([0, *each]).tolist() for each in ends), strict=True)
    rectangles = []
    for queries, keys in sizes:
        ahead = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - (keys - queries)
        left, right = (queries + keys if each < 0 else each for each in window)
        rectangles.append((ahead >= -left) & (ahead <= right))
    seen: torch.Tensor = torch.block_diag(*rectangles)
    return seen.bool()


def _defined(inputs: Sequence[torch.Tensor], seen: torch.Tensor, scale: float) -> list[torch.Tensor]:
    """Output, log-sum-exp and gradients of q, k and v by the definition, without autograd, which ops do not have."""
    q, k, v, grad = inputs
    group = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(group, dim=1) for each in (k, v))
    score = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    weights = score.softmax(dim=-1)
    out = weights @ v
    change = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(dim=-1, keepdim=True)) * scale
    of_keys = (change.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad)
    dk, dv = (each.unflatten(1, (-1, group)).sum(dim=2) for each in of_keys)
    return [out, score.logsumexp(dim=-1), change @ k, dk, dv]
