"""What runs around collectives on one device, for ``gpu.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import Shape, copying, difference, figure, medians

from sp_compile.layout import token_layout
from sp_compile.ops import merge_partials


def pack(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``[tokens, everything else]`` of keys and values, to be gathered in one collective."""
    rows = [each.permute(2, 0, 1, 3).flatten(1) for each in (k, v)]
    return torch.cat(rows, 1).clone(memory_format=torch.contiguous_format)


def merge(out: torch.Tensor, lse: torch.Tensor, parts_out: torch.Tensor, parts_lse: torch.Tensor) -> torch.Tensor:
    """The last stage of a ring, whose partial outputs are in fp32."""
    return merge_partials(out, lse, parts_out, parts_lse)[0].to(torch.bfloat16)


def layout_kernels(shape: Shape, tokens: int, rounds: int) -> dict[str, Any]:
    """What compiled models run around collectives, against copies of as many bytes.

    ``pack`` is what is gathered of keys and values, ``reorder`` cuts the rows of all ranks out of an input, ``restore``
    brings the gathered rows of an output back to normal order, ``merge`` ends a ring.
    """
    k, v = (shape.random(shape.kv_heads, tokens).transpose(1, 2).contiguous().transpose(1, 2) for _ in range(2))
    layout = token_layout((tokens,), 2)
    index, restore = (each.to(shape.device) for each in (layout.local_index.reshape(-1), layout.restore_index))
    rows = shape.random(shape.heads, tokens)[0].transpose(0, 1).reshape(tokens, -1)
    padded = rows.index_select(0, index)
    out, parts = (shape.random(shape.heads, tokens).float() for _ in range(2))
    lse, lses = (torch.randn(*each.shape[:-1], device=shape.device) for each in (out, parts))
    cases: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
        "pack": (pack, (k, v)),
        "reorder": (lambda whole, rows: whole.index_select(0, rows), (rows, index)),
        "restore": (lambda gathered, rows: gathered.index_select(0, rows), (padded, restore)),
        "merge": (merge, (out, lse, parts[None], lses[None])),
    }
    found = {}
    for name, (function, given) in cases.items():
        code = torch.compile(function, fullgraph=True)
        result = code(*given)
        wrong = difference(result, function(*given))
        moved = sum(each.nbytes for each in (*given, result))
        times = medians({"ours": lambda: code(*given), "copy": copying(moved, shape.device)}, rounds)  # noqa: B023
        more = {"seconds": times["ours"], "bytes_per_second": moved / times["ours"]}
        found[name] = figure(times["copy"] / times["ours"], "bandwidth", wrong, **more)
    return found
