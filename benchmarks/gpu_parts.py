"""Layout kernels and decoding on one device, for ``gpu.py``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_timing import LAYERS, Run, Shape, copying, difference, figure, host_seconds, medians

from sp_compile.kernels import flex
from sp_compile.layout import token_layout
from sp_compile.ops import merge_partials
from sp_compile.passes.lower_attention import as_parts, merged_parts

REQUESTS = 16


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


def decode(
    shape: Shape, context: int, sizes: list[int], rounds: int, mask: Callable[..., Any], code: Any
) -> dict[str, Any]:
    """One new token of each request over the keys of the first and the last rank, split as in compiled models.

    Planning, on the host, is done once a step for all layers of a kind of mask; ``plan_over_layers`` is what it takes
    of a step of :data:`LAYERS` of them.
    """
    q, group = shape.random(shape.heads, REQUESTS), shape.heads // shape.kv_heads
    requests = torch.arange(REQUESTS, device=shape.device)
    found = {}
    for sp in sizes:
        for rank in sorted({0, sp - 1}):
            held = context // sp
            k, v = (shape.random(shape.kv_heads, held * REQUESTS) for _ in range(2))
            places = torch.arange(rank * held, (rank + 1) * held, device=shape.device).repeat(REQUESTS)
            ends = torch.full((REQUESTS, 1), context, device=shape.device)
            real = torch.ones_like(places, dtype=torch.bool)
            splits = flex.split_count(group * REQUESTS, held * REQUESTS, shape.kv_heads)
            operands = [requests[:, None], requests.repeat_interleave(held)[None], places[None], ends, real]
            starts = torch.arange(REQUESTS)
            runs = torch.stack([starts, starts + 1, starts * held, (starts + 1) * held], dim=1)
            rows = max(flex.BLOCK, group * REQUESTS)
            plan = partial(mask, operands, runs, rows, splits)
            planned = medians({0: plan}, rounds, host_seconds)[0]
            run = _decoding(as_parts(q, group, rows, splits), k, v, plan(), group, code)
            wrong = difference(run(), _decoded(q, k, v))
            moved = k.nbytes + v.nbytes
            times = medians({"ours": run, "copy": copying(moved, shape.device)}, rounds)
            rate = moved / times["ours"]
            more = {"bytes_per_second": rate, "plan_seconds": planned}
            name, of_layers = f"sp={sp}, rank {rank}", planned / (LAYERS * times["ours"])
            found[name] = figure(times["copy"] / times["ours"], "bandwidth", wrong, **more)
            found[f"{name}, plan over layers"] = figure(of_layers, "plan", wrong, **more)
            del k, v, run
    return found


def _decoding(parts: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: Any, group: int, code: Any) -> Run:
    """What compiled models run over a rank's keys."""
    merge = torch.compile(merged_parts, fullgraph=True)
    return lambda: merge(*code(parts, k, v, blocks), group, REQUESTS)[0]


def _decoded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Each request's attention over its keys, by products and a softmax."""
    parts = []
    for i, (keys, values) in enumerate(zip(k.chunk(REQUESTS, 2), v.chunk(REQUESTS, 2), strict=True)):
        one = q[:, :, i].reshape(1, k.shape[1], -1, q.shape[-1]).float()
        scores = one @ keys.float().transpose(-1, -2) * q.shape[-1] ** -0.5
        parts.append((scores.softmax(-1) @ values.float()).reshape(1, -1, 1, q.shape[-1]))
    return torch.cat(parts, dim=2)
