"""Which kernel computes an attention node: what each can serve, and what each device prefers.

``tiles``
    the planned regions through torch's flash kernel on a CPU, and as matrix products on other devices. Serves all.
``flex``
    torch's FlexAttention: Triton on a GPU, a C++ template for inference on a CPU.
``fused``
    the planned regions through torch's flash and cuDNN kernels, on a GPU; see :mod:`sp_compile.kernels.rectangles`.
``dense``, ``dense_fp64``
    the definition, which holds queries x keys elements; in the model's precision (at least fp32) or in fp64. For tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sp_compile.errors import KernelError
from sp_compile.kernels import fused
from sp_compile.kernels.rates import Shape, beats_flex, refused

FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
E4M3, E4M3_SINCE = torch.float8_e4m3fn, (8, 9)  # the compute capability from which Triton reads it


@dataclass(frozen=True)
class Need:
    """What a kernel must serve in one attention node.

    Attributes:
        device: its kind.
        lse: the log-sum-exp is used.
        empty_mean: a query that sees no key gets the mean of the values.
        mask_per_head: heads have masks of their own.
        changes_scores: the rule changes scores or adds a bias.
        drops_weights: the rule drops weights of the softmax.
        compiled: code is generated for the graph.
        kept_dtype: of keys and values, where a cache keeps them in another than that of the queries.
        differentiable: gradients are wanted.
        learns_rule: so are those of what the rule reads.
        steps: a cache is read, in steps of few queries that CUDA graphs replay.
        short: the scores are many small parts.
        irregular: the mask may be anything, since it is read by pairs of query and key.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    lse: bool
    heads: int = 1
    kv_heads: int = 1
    empty_mean: bool = False
    mask_per_head: bool = False
    changes_scores: bool = False
    drops_weights: bool = False
    compiled: bool = True
    kept_dtype: torch.dtype | None = None
    differentiable: bool = False
    learns_rule: bool = False
    steps: bool = False
    short: bool = False
    irregular: bool = False

    @property
    def shape(self) -> Shape:
        """The heads, for which kernels are measured."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Shape(self.heads, self.kv_heads, self.head_dim, self.value_dim, dtype, self.differentiable)


def _serves_all(need: Need) -> str | None:
    return None


def _flex(need: Need) -> str | None:
    """Why FlexAttention cannot serve; the limits of torch 2.11 to 2.13.

    Where no code is generated, torch computes it as matrix products of whole scores, on any device; for tests.
    """
    if need.device not in ("cpu", "cuda"):
        return f"it does not run on {need.device}"
    if need.dtype not in FLEX_DTYPES:
        return f"it does not take {need.dtype}"
    if need.learns_rule:
        return "it is not used where a bias is learned"
    if need.differentiable and need.compiled and need.device == "cpu":
        return "its generated code has no gradients on a CPU"
    if need.drops_weights:
        return "it does not drop weights"
    on_card = need.device == "cuda" and torch.cuda.is_available()
    if need.kept_dtype == E4M3 and on_card and torch.cuda.get_device_capability() < E4M3_SINCE:
        return f"code for this GPU does not read {need.kept_dtype}"
    if need.empty_mean and need.mask_per_head:
        return "it does not tell for each head which queries see no key, which get the mean of the values in this model"
    if need.device == "cuda":
        small, large = sorted((need.head_dim, need.value_dim))
        if small < 16:
            return f"it takes head dims of at least 16 on a GPU, not {small}"
        return f"it takes head dims of at most 256 on a GPU, not {large}" if large > 256 else None
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "it needs a CPU with AVX2"
    if need.lse and need.compiled:
        return "its generated code returns no log-sum-exp on a CPU, which the model uses"
    return None


def _fused(need: Need) -> str | None:
    """Why torch's fused kernels cannot serve on any card."""
    if need.changes_scores or need.drops_weights or need.learns_rule:
        return "it does not change scores, add a bias or drop weights"
    if need.differentiable and need.lse:
        return "it has no gradients of the log-sum-exp, which the model uses"
    if need.kept_dtype is not None:
        return "it takes queries, keys and values of one dtype"
    return fused.serves(need.device, [need.dtype], need.head_dim, need.value_dim)


def _card() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def measured_faster(shape: Shape) -> bool:
    """Whether fused kernels run on the GPU at hand and beat generated code there; False where there is none."""
    return torch.cuda.is_available() and refused(shape, _card()) is None and beats_flex(shape, _card())


# why each cannot serve, by what it is
KERNELS: Mapping[str, Callable[[Need], str | None]] = {
    "tiles": _serves_all,
    "flex": _flex,
    "fused": _fused,
    "dense": _serves_all,
    "dense_fp64": _serves_all,
}


@dataclass(frozen=True)
class Refusal:
    """Why a kernel cannot serve.

    Attributes:
        on_this_card: it was tried on the GPU at hand, where it fails; on others it may serve.
    """

    reason: str
    on_this_card: bool = False


def refusal(name: str, need: Need) -> Refusal | None:
    """Why a kernel of :data:`KERNELS` cannot serve here; None where it can."""
    reason = KERNELS[name](need)
    if reason is not None:
        return Refusal(reason)
    here = refused(need.shape, _card()) if name == "fused" and torch.cuda.is_available() else None
    return None if here is None else Refusal(here, on_this_card=True)


def preferred(need: Need, faster: Callable[[Shape], bool] = measured_faster) -> tuple[str, ...]:
    """Kernels for a device, best first; see ``benchmarks/results``.

    Args:
        faster: as :func:`measured_faster`, in agreement with other ranks.
    """
    if need.device == "cuda" and need.compiled:
        bands = not (need.steps or need.irregular or need.mask_per_head) and _fused(need) is None
        fused_first = not need.short and (need.differentiable or (bands and faster(need.shape)))
        return ("fused", "flex", "tiles") if fused_first else ("flex", "fused", "tiles")
    if need.device == "cuda":
        return ("fused", "tiles")
    return ("flex", "tiles") if need.device == "cpu" and need.compiled and need.changes_scores else ("tiles",)


def choose(asked: str, need: Need, faster: Callable[[Shape], bool] = measured_faster) -> tuple[str, str | None]:
    """The kernel for a node, and why the fast ones of a GPU were passed over where all are, or one does not run there.

    Args:
        asked: a key of :data:`KERNELS`, or ``auto`` for the first that serves on the device.
        faster: as of :func:`preferred`.

    Raises:
        KernelError: the kernel that was asked for cannot serve the node; says why and which can.
    """
    if asked == "auto":
        passed = dict[str, Refusal]()
        for name in preferred(need, faster):
            found = refusal(name, need)
            if found is None:
                told = [f"kernel {passed_over}: {each.reason}" for passed_over, each in passed.items()
                        if name == "tiles" or each.on_this_card]  # fmt: skip
                return name, "; ".join(told) or None if need.device == "cuda" else None
            passed[name] = found
        raise AssertionError("the last kernel of a device serves all")
    found = refusal(asked, need)
    if found is not None:
        able = [name for name in KERNELS if refusal(name, need) is None]
        raise KernelError(f"kernel {asked!r} cannot serve: {found.reason}; pass kernel={' or '.join(map(repr, able))}")
    return asked, None
