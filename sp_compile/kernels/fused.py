"""torch's fused kernels for GPUs, flash and cuDNN: queries by keys of one rectangle, under a window of its corner.

Both return log-sum-exps, so that rectangles over other keys can be merged, and take them back for gradients. They
compute fp16 and bf16 with heads of at most 256 dims. Flash computes many rectangles in one call too, packed behind one
another. On a CPU there are others, see :mod:`sp_compile.kernels.flash`.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D head dim, E value head dim; T queries and S
keys of all packed rectangles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

from sp_compile.kernels.backward import Gradients, Saved
from sp_compile.kernels.dense import Partial
from sp_compile.kernels.plan import HALF

aten = torch.ops.aten
LARGEST = 256  # dims of a head
ALIGNED = 8  # dims of a head are a multiple of it
PLANNED = 1 << 24  # pairs from where on cuDNN is taken: it plans anew for every size, in about 0.1 s


class Window(NamedTuple):
    """Keys that a query sees, around the diagonal that ends in the corner of the last query and the last key.

    Attributes:
        left, right: how many before and behind the diagonal; -1 for all.
    """

    left: int = -1
    right: int = -1


EVERYTHING, CAUSAL = Window(), Window(-1, 0)


class Lengths(NamedTuple):
    """Queries and keys of packed rectangles.

    Attributes:
        queries, keys: int32 ``[rectangles + 1]`` on the device, where each begins and the last ends; None where
            nothing is packed, and the rectangles are rows of a batch.
        most_queries, most_keys: of one rectangle.
    """

    queries: torch.Tensor | None
    keys: torch.Tensor | None
    most_queries: int
    most_keys: int


class Kernel(NamedTuple):
    """One of torch's kernels.

    Attributes:
        forward: output and log-sum-exp of ``q, k, v, scale, window``, for tensors as in :func:`attend`.
        backward: gradients of what was saved, with ``scale`` and ``window``; its ``out`` and ``lse`` may be those of a
            softmax over further keys.
        takes: whether it computes a window over so many queries and keys.
    """

    forward: Callable[..., Partial]
    backward: Callable[..., Gradients]
    takes: Callable[[Window, int, int], bool]


def serves(device: str, dtypes: Sequence[torch.dtype], head_dim: int, value_dim: int) -> str | None:
    """Why these kernels cannot compute such queries and keys; None where they can."""
    if device != "cuda":
        return f"torch has no such kernel on {device}"
    strange = next((each for each in dtypes if each not in HALF), None)
    if strange is not None or len({*dtypes}) > 1:
        return f"they take float16 or bfloat16, not {strange or 'both'}"
    largest = max(head_dim, value_dim)
    return f"they take head dims of at most {LARGEST}, not {largest}" if largest > LARGEST else None


def attend(
    name: str, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKE: torch.Tensor, scale: float, window: Window
) -> Partial:
    """Attention of all queries over all keys of a window.

    Returns:
        Output ``[B, H, Q, E]`` in q's dtype and natural log-sum-exp ``[B, H, Q]`` in fp32.
    """
    return _unpadded(q_BHQD, k_BGKD, v_BGKE, partial(KERNELS[name].forward, scale=scale, window=window))


def attend_backward(
    name: str,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    scale: float,
    window: Window,
) -> Gradients:
    """Gradients of q, k and v of :func:`attend`, from the output and log-sum-exp over all keys that queries see."""
    return _unpadded_backward(qkv, out, lse, grad, partial(KERNELS[name].backward, scale=scale, window=window))


def attend_packed(
    q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGE: torch.Tensor, lengths: Lengths, scale: float, window: Window
) -> Partial:
    """Attention of each rectangle's queries over its keys of a window.

    Returns:
        Output ``[T, H, E]`` in q's dtype and natural log-sum-exp ``[H, T]`` in fp32.
    """
    return _unpadded(q_THD, k_SGD, v_SGE, partial(_flash_rows, lengths=lengths, scale=scale, window=window))


def attend_packed_backward(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    lengths: Lengths,
    scale: float,
    window: Window,
) -> Gradients:
    """Gradients of q, k and v of :func:`attend_packed`, as :func:`attend_backward`."""
    backward = partial(_flash_rows_backward, lengths=lengths, scale=scale, window=window)
    return _unpadded_backward(qkv, out, lse, grad, backward)


def _unpadded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward: Callable[..., Partial]) -> Partial:
    """Output and log-sum-exp by a forward that takes heads of one width."""
    out, lse = forward(*(_padded(each, _width(q, v)) for each in (q, k, v)))
    return out[..., : v.shape[-1]], lse


def _unpadded_backward(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    backward: Callable[[Saved], Gradients],
) -> Gradients:
    """Gradients by a backward that takes heads of one width and one dtype."""
    q, v, dtype = qkv[0], qkv[2], qkv[0].dtype
    *padded, grad = (_padded(each.to(dtype), _width(q, v)) for each in (*qkv, out, grad))
    found = backward(Saved._make([*padded, lse.contiguous(), grad, None]))
    dq, dk, dv = (each[..., : own.shape[-1]] for each, own in zip(found, qkv, strict=True))
    return dq, dk, dv


def _width(q: torch.Tensor, v: torch.Tensor) -> int:
    """The dims that all heads are filled up to."""
    return -(-max(q.shape[-1], v.shape[-1]) // ALIGNED) * ALIGNED


def _padded(tensor: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - tensor.shape[-1]
    if missing:
        return F.pad(tensor, (0, missing))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """``[B, rows, heads, dim]``, as flash takes them."""
    return [each.transpose(1, 2) for each in tensors]


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window) -> Partial:
    lengths = Lengths(None, None, q.shape[2], k.shape[2])
    q, k, v = _rows_first(q, k, v)
    out, lse = _flash_rows(q, k, v, lengths, scale, window)
    return out.transpose(1, 2), lse


def _flash_backward(saved: Saved, scale: float, window: Window) -> Gradients:
    lengths = Lengths(None, None, saved.q.shape[2], saved.k.shape[2])
    q, k, v, out, grad = _rows_first(*saved[:4], saved.grad)
    dq, dk, dv = _rows_first(*_flash_rows_backward(Saved(q, k, v, out, saved.lse, grad, None), lengths, scale, window))
    return dq, dk, dv


def _flash_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths, scale: float, window: Window
) -> Partial:
    """Flash of tensors with rows in front of heads."""
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, window == CAUSAL, False,
        scale=scale, window_size_left=window.left, window_size_right=window.right,
    )  # fmt: skip
    return out, lse


def _flash_rows_backward(saved: Saved, lengths: Lengths, scale: float, window: Window) -> Gradients:
    found: Gradients = aten._flash_attention_backward(
        saved.grad, *saved[:5], *lengths, 0.0, window == CAUSAL, *_no_draws(saved.q),
        scale=scale, window_size_left=window.left, window_size_right=window.right,
    )  # fmt: skip
    return found


def _no_draws(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of random numbers, none of which are drawn."""
    return torch.zeros(2, dtype=torch.uint64, device=q.device), torch.zeros((), dtype=torch.uint64, device=q.device)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window) -> Partial:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, window == CAUSAL, scale=scale)
    return out, lse.reshape(q.shape[:3])


def _cudnn_backward(saved: Saved, scale: float, window: Window) -> Gradients:
    q, k, v, out, lse, grad, _ = saved
    draws = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    found: Gradients = aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.unsqueeze(-1), *draws, None, None, None, q.shape[2], k.shape[2], 0.0, window == CAUSAL,
        scale=scale,
    )  # fmt: skip
    return found


def _any_window(window: Window, queries: int, keys: int) -> bool:
    return True


def _whole_or_square(window: Window, queries: int, keys: int) -> bool:
    """cuDNN's causal mask starts in the first corner, in which a square has the same diagonal."""
    return window == EVERYTHING or (window == CAUSAL and queries == keys)


KERNELS: Mapping[str, Kernel] = {
    "cudnn": Kernel(_cudnn, _cudnn_backward, _whole_or_square),
    "flash": Kernel(_flash, _flash_backward, _any_window),
}
