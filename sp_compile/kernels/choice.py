"""Which kernel computes an attention node: what each can serve, and what each device prefers.

``tiles``
    the planned regions through torch's flash kernel on a CPU, and as matrix products on other devices. Serves all.
``flex``
    torch's FlexAttention: Triton on a GPU, a C++ template for inference on a CPU.
``dense``, ``dense_fp64``
    the definition, which holds queries x keys elements; in the model's precision (at least fp32) or in fp64. For tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sp_compile.errors import KernelError

FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Need:
    """What a kernel must serve in one attention node."""

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    lse: bool
    empty_mean: bool


def _serves_all(need: Need) -> str | None:
    return None


def _flex(need: Need) -> str | None:
    """Why FlexAttention cannot serve; the limits of torch 2.11 to 2.13."""
    if need.device not in ("cpu", "cuda"):
        return f"it does not run on {need.device}"
    if need.dtype not in FLEX_DTYPES:
        return f"it does not take {need.dtype}"
    if need.device == "cuda":
        small = min(need.head_dim, need.value_dim)
        return f"it takes head dims of at least 16 on a GPU, not {small}" if small < 16 else None
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "it needs a CPU with AVX2"
    if need.lse:
        return "it returns no log-sum-exp on a CPU, which the model uses"
    if need.empty_mean:
        return (
            "in this model a query whose keys are all masked gets the mean of the values, which takes the log-sum-exp "
            "to tell, and on a CPU it returns none"
        )
    return None


KERNELS: Mapping[str, Callable[[Need], str | None]] = {
    "tiles": _serves_all,
    "flex": _flex,
    "dense": _serves_all,
    "dense_fp64": _serves_all,
}
PREFERRED = {"cuda": ("flex", "tiles")}


def choose(asked: str, need: Need) -> tuple[str, str | None]:
    """The kernel for a node, and why a preferred one was passed over.

    Args:
        asked: a key of :data:`KERNELS`, or ``auto`` for the first that serves on the device.

    Raises:
        KernelError: the kernel that was asked for cannot serve the node; says why and which can.
    """
    if asked == "auto":
        passed: str | None = None
        for name in PREFERRED.get(need.device, ("tiles",)):
            reason = KERNELS[name](need)
            if reason is None:
                return name, passed
            passed = f"kernel {name}: {reason}"
    reason = KERNELS[asked](need)
    if reason is not None:
        able = [name for name, refuses in KERNELS.items() if refuses(need) is None]
        raise KernelError(f"kernel {asked!r} cannot serve: {reason}; pass kernel={' or '.join(map(repr, able))}")
    return asked, None
