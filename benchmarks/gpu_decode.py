"""Steps of decoding on one device, for ``gpu.py``: attention over a rank's keys, and whole steps with a cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_models import model_of
from gpu_runs import RULE
from gpu_timing import LAYERS, Run, Shape, copying, difference, figure, host_seconds, medians
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

import sp_compile
from sp_compile import parts
from sp_compile.kernels import flex
from sp_compile.kernels.plan import joined_with_valid
from sp_compile.kernels.split import part_size, query_blocks, spare_parts
from sp_compile.passes.lower_attention import OPTIONS, few_tile
from sp_compile.steps import Kept

REQUESTS = 16
RECORDED_AT = 4  # the third run of a step is recorded, and this one replayed
OF_MODEL = 2  # layers of a model whose steps are measured
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
SEES = flex.rule_graph(
    torch.nn.Module(), joined_with_valid(RULE, 4), "mask", dict(enumerate(((0,), (3,), (3,), (0,), (3,)))), {}
)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockMask, tile: dict[str, int]) -> Any:
    """Parts of the keys of single queries, as models compute them."""
    options = {"BACKEND": OPTIONS["BACKEND"], **tile}
    out, aux = flex_attention(q, k, v, block_mask=blocks, kernel_options=options, return_aux=AuxRequest(lse=True))
    return out.float(), aux.lse


attended_by_code = torch.compile(attended, fullgraph=True)
merged_by_code = torch.compile(parts.merged_queries, fullgraph=True)


def decode(shape: Shape, context: int, sizes: list[int], rounds: int) -> dict[str, Any]:
    """One new token of each request over the keys of the first and the last rank, split as in compiled models.

    Planning, on the host, is done once a step for all layers of a kind of mask; ``plan over layers`` is what it takes
    of a step of :data:`~gpu_timing.LAYERS` of them.
    """
    found = {}
    for sp in sizes:
        for rank in sorted({0, sp - 1}):
            held = context // sp
            q = shape.random(shape.heads, REQUESTS)
            k, v = (shape.random(shape.kv_heads, held * REQUESTS) for _ in range(2))
            places = torch.arange(rank * held, (rank + 1) * held, device=shape.device).repeat(REQUESTS)
            requests = torch.arange(REQUESTS, device=shape.device)
            ends = torch.full((REQUESTS, 1), context, device=shape.device)
            read = [requests[:, None], requests.repeat_interleave(held)[None], places[None], ends]
            plan = partial(_planned, shape, read, held)
            run = _decoding(shape, q, k, v, read, plan())
            wrong = difference(run(), _decoded(q, k, v))
            moved = k.nbytes + v.nbytes
            times = medians({"ours": run, "copy": copying(moved, shape.device)}, rounds)
            planned = medians({0: plan}, rounds, host_seconds)[0]
            more = {"seconds": times["ours"], "bytes_per_second": moved / times["ours"]}
            name, of_layers = f"sp={sp}, rank {rank}", planned / (LAYERS * times["ours"])
            found[name] = figure(times["copy"] / times["ours"], "bandwidth", wrong, **more)
            found[f"{name}, plan over layers"] = figure(of_layers, "plan", wrong, seconds=planned)
            del k, v, run
    return found


def _planned(shape: Shape, read: list[torch.Tensor], held: int) -> torch.Tensor:
    """The blocks of each part, on the device."""
    starts, keys = torch.arange(REQUESTS), held * REQUESTS
    runs = torch.stack([starts, starts + 1, starts * held, (starts + 1) * held], dim=1)
    spare = spare_parts(keys, shape.kv_heads)
    real = torch.ones(keys, dtype=torch.bool, device=shape.device)
    size = part_size(keys, REQUESTS, spare)
    found = query_blocks(read, [], RULE, real, REQUESTS, keys, runs, REQUESTS + spare, size)
    return torch.from_numpy(found).to(shape.device)[:, None]


def _decoding(
    shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, read: list[torch.Tensor], listed: torch.Tensor
) -> Run:
    """What compiled models run over a rank's keys, of which each belongs to a request."""
    on_card, group = shape.device.type == "cuda", shape.heads // shape.kv_heads
    numbers = parts.numbers_of_parts(listed)
    real = torch.ones(k.shape[2], dtype=torch.bool, device=shape.device)
    captured = [parts.operand_of_parts(each, numbers).reshape(-1) for each in (*read, real)]
    lists = [listed[:, :, :, kind] for kind in range(2)]
    counts_and_blocks = [part.contiguous() for each in lists for part in (each[..., 0], each[..., 1:])]
    rows = parts.filled_rows(group)
    blocks = BlockMask.from_kv_blocks(
        *counts_and_blocks, flex.BLOCK, lambda *place: SEES(*place, *captured), seq_lengths=(rows, k.shape[2]),
        compute_q_blocks=False,
    )  # fmt: skip
    tile = few_tile(rows, shape.width, q.element_size())
    code, merge = (attended_by_code, merged_by_code) if on_card else (attended, parts.merged_queries)
    most = len(numbers) - REQUESTS + 1

    def run() -> torch.Tensor:
        out, lse = code(parts.queries_of_parts(q, numbers, group), k, v, blocks, tile)
        merged: torch.Tensor = merge(out, lse, numbers, 1, group, REQUESTS, most)[0]
        return merged

    return run


def _decoded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Each request's attention over its keys, by products and a softmax."""
    found = []
    for i, (keys, values) in enumerate(zip(k.chunk(REQUESTS, 2), v.chunk(REQUESTS, 2), strict=True)):
        one = q[:, :, i].reshape(1, k.shape[1], -1, q.shape[-1]).float()
        scores = one @ keys.float().transpose(-1, -2) * q.shape[-1] ** -0.5
        found.append((scores.softmax(-1) @ values.float()).reshape(1, -1, 1, q.shape[-1]))
    return torch.cat(found, dim=2)


def steps(shape: Shape, context: int, rounds: int, small: bool) -> dict[str, Any]:
    """Whole steps of requests with that many tokens each in a cache, in bf16 and fp8, replayed and not.

    ``over the cache's bytes`` compares a step with a copy of as many bytes as it reads of weights and keys, and
    ``replayed over run`` with the same step without CUDA graphs. Caches are filled with random keys and values; that
    they give what the model gives is what the tests of caches compare, and here only that both ways agree.
    """
    found: dict[str, Any] = {}
    model = model_of(shape, OF_MODEL, context + 64, small)
    weights = sum(each.nbytes for each in model.parameters())
    for name, dtype in DTYPES.items():
        runs: dict[str, Callable[[], torch.Tensor]] = {}
        models = {graphs: sp_compile.parallelize(model, sp=1, cuda_graphs=graphs) for graphs in ("auto", "never")}
        for graphs, parallel in models.items():
            torch.manual_seed(0)
            runs[graphs], held = _step(parallel, shape, context, dtype)
        for _ in range(RECORDED_AT):
            results = {key: run() for key, run in runs.items()}
        replayed = models["auto"].report().replayed
        if shape.device.type == "cuda" and not (replayed and replayed[1]):
            raise RuntimeError(f"no step was replayed: {[each.reason for each in models['auto'].report().fallbacks]}")
        wrong = difference(results["auto"], results["never"])
        times = medians({**runs, "copy": copying(held + weights, shape.device)}, rounds, host_seconds)
        more = {"seconds": times["auto"], "bytes": held + weights}
        found[f"{name} cache, over its bytes"] = figure(times["copy"] / times["auto"], "bandwidth", wrong, **more)
        found[f"{name} cache, replayed over run"] = figure(times["auto"] / times["never"], "time", wrong, **more)
        del runs, models
    return found


def _step(parallel: Any, shape: Shape, context: int, dtype: torch.dtype) -> tuple[Callable[[], torch.Tensor], int]:
    """A call that runs a step of all requests, and the bytes of their keys and values."""
    cache = sp_compile.ShardedCache(parallel, dtype=dtype)

    def batch(tokens: int) -> Any:
        ids = [torch.full((tokens,), 7) for _ in range(REQUESTS)]
        return sp_compile.pack(ids, device=shape.device)

    with torch.no_grad():
        parallel(**batch(2), past_key_values=cache)
    step, _ = cache.begin({**batch(context - 2)}, "zigzag")
    rows = step.index_inputs["kept_rows"].numel()
    cache.commit(Kept([shape.random(each.shape[1], rows) for each in cache.tensors], cache.windows))

    def run() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = parallel(**batch(1), past_key_values=cache).logits
            return logits

    return run, sum(each.shape[1] * each.shape[3] * each.element_size() for each in cache.tensors) * REQUESTS * context
