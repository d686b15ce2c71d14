"""How fast torch's fused kernels are on a device: measured once for each shape of heads, and kept on disk.

A kernel is only taken where it ran here and gave what attention is by its definition, so that one which a device, a
driver or a version of torch does not have, or gets wrong, is passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sp_compile.errors import KernelError
from sp_compile.files import written_whole
from sp_compile.kernels import fused
from sp_compile.measure import least_seconds

FOLDER = "SP_COMPILE_CACHE_DIR"
CHECKED, SHORT, LONG = 192, 512, 8192  # queries and keys for which a kernel is compared, and timed
ERROR = 0.02  # of the largest value, for bf16, whose steps are 2 ** -8 of a value
PLANNED = 1 << 24  # pairs from where on cuDNN is taken: it plans anew for every size, in about 0.1 s


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


def fastest(shape: Shape, window: fused.Window, queries: int, keys: int, device: torch.device) -> str:
    """The kernel for so many queries and keys.

    Raises:
        KernelError: none runs here.
    """
    rates = measured(shape, device)
    pairs = queries * keys
    able = {
        name: rate.call + rate.pair * pairs
        for name, rate in rates.items()
        if not rate.refused and fused.KERNELS[name].takes(window, queries, keys)
        if name != "cudnn" or pairs >= PLANNED
    }
    if not able:
        reasons = "; ".join(f"{name}: {rate.refused}" for name, rate in rates.items() if rate.refused)
        raise KernelError(f"no fused kernel of torch runs here for {shape} ({reasons}); pass kernel='flex' or 'tiles'")
    return min(able, key=lambda name: able[name])


def refused(shape: Shape, device: torch.device) -> str | None:
    """Why no fused kernel serves any window on this device; None where one does."""
    rate = measured(shape, device)["flash"]
    return f"torch's flash attention does not run here: {rate.refused}" if rate.refused else None


@lru_cache(maxsize=256)
def measured(shape: Shape, device: torch.device) -> dict[str, Rate]:
    """The rates of all kernels, from disk where this device was measured before."""
    file = _file(shape, device)
    try:
        return {name: Rate(**each) for name, each in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError):
        found = {name: _measure(name, shape, device) for name in fused.KERNELS}
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as part:
        part.write_text(json.dumps({name: asdict(each) for name, each in found.items()}, indent=1))
    return found


def _file(shape: Shape, device: torch.device) -> Path:
    """Where the rates are kept: for a card, a version of torch, and a shape."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sp_compile"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    of = f"{card} torch {torch.__version__} cuda {torch.version.cuda}".replace(" ", "-").replace("/", "-")
    name = "-".join(str(each) for each in asdict(shape).values())
    return Path(os.environ.get(FOLDER) or default) / "rates" / of / f"{name}.json"


def _measure(name: str, shape: Shape, device: torch.device) -> Rate:
    """Compare a kernel with the definition, then time it."""
    try:
        for window in (fused.EVERYTHING, fused.CAUSAL, fused.Window(40, 0)):
            if fused.KERNELS[name].takes(window, CHECKED, CHECKED):
                apart = _error(name, shape, window, device)
                if not apart <= ERROR:
                    return Rate(refused=f"its result is off by {apart:.1e} of the largest value")
        short, long = (least_seconds(_run(name, shape, length, device), device) for length in (SHORT, LONG))
    except RuntimeError as error:
        return Rate(refused=str(error).splitlines()[0])
    pair = max(long - short, 0.0) / (LONG**2 - SHORT**2)
    return Rate(max(short - pair * SHORT**2, 0.0), pair)


def _inputs(shape: Shape, length: int, device: torch.device) -> list[torch.Tensor]:
    """Queries, keys, values and the gradient of the output."""
    sizes = ((shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim), (shape.kv_heads, shape.value_dim),
             (shape.heads, shape.value_dim))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    return [torch.randn(1, heads, length, dim, generator=generator).to(device, dtype) for heads, dim in sizes]


def _run(name: str, shape: Shape, length: int, device: torch.device) -> Callable[[], Any]:
    q, k, v, grad = _inputs(shape, length, device)
    scale, window = shape.head_dim**-0.5, fused.EVERYTHING
    if not shape.backward:
        return lambda: fused.attend(name, q, k, v, scale, window)
    out, lse = fused.attend(name, q, k, v, scale, window)
    return lambda: fused.attend_backward(name, (q, k, v), out, lse, grad, scale, window)


def _error(name: str, shape: Shape, window: fused.Window, device: torch.device) -> float:
    """The largest difference to the definition in fp32, over the largest value, of outputs and gradients."""
    q, k, v, grad = _inputs(shape, CHECKED, device)
    scale = shape.head_dim**-0.5
    out, lse = fused.attend(name, q, k, v, scale, window)
    right = _defined([each.float() for each in (q, k, v, grad)], window, scale)
    found = [out, lse]
    if shape.backward:
        found += fused.attend_backward(name, (q, k, v), out, lse, grad, scale, window)
    pairs = zip(found, right, strict=False)  # gradients only where they are asked for
    return float(torch.stack([(one.float() - other).abs().max() / other.abs().max() for one, other in pairs]).max())


def _defined(inputs: Sequence[torch.Tensor], window: fused.Window, scale: float) -> list[torch.Tensor]:
    """Output, log-sum-exp and gradients of q, k and v by the definition, without autograd, which ops do not have."""
    q, k, v, grad = inputs
    group = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(group, dim=1) for each in (k, v))
    rows = torch.arange(CHECKED, device=q.device)
    ahead = rows[None, :] - rows[:, None]
    left, right = (CHECKED if each < 0 else each for each in window)
    score = (q @ k.transpose(-1, -2) * scale).masked_fill((ahead < -left) | (ahead > right), -torch.inf)
    weights = score.softmax(dim=-1)
    out = weights @ v
    change = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(dim=-1, keepdim=True)) * scale
    of_keys = (change.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad)
    dk, dv = (each.unflatten(1, (-1, group)).sum(dim=2) for each in of_keys)
    return [out, score.logsumexp(dim=-1), change @ k, dk, dv]
