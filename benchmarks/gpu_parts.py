"""Layout kernels, decoding, layers of emulated ranks and whole models on one device, for ``gpu.py``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import sp_compile
from sp_compile.hardware import load_hardware
from sp_compile.kernels import flex
from sp_compile.layout import token_layout
from sp_compile.ops import merge_partials
from sp_compile.passes.lower_attention import as_parts, merged_parts
from sp_compile.planning import Planner

Run = Callable[[], Any]
REQUESTS = 16
LAYERS = 32  # that a step's plan is for
TARGETS = {"bandwidth": (">=", 0.8), "time": ("<=", 1.0), "memory": ("<=", 1.1), "plan": ("<=", 0.1)}
MODELS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "Llama-3-8B": (LlamaForCausalLM, LlamaConfig, {"hidden_size": 4096, "intermediate_size": 14336}),
    "Qwen3-30B-A3B": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    ),
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
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(runs: Mapping[Any, Run], rounds: int, measure: Callable[[Run], float] = seconds_of) -> dict[Any, float]:
    """Median seconds of each; rounds visit all in turn, after one that is not counted."""
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for i in range(rounds + 1):
        for key, run in runs.items():
            spent = measure(run)
            if i:
                times[key].append(spent)
    return {key: statistics.median(each) for key, each in times.items()}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected; raises where it is not that of bf16."""
    value = float((found.float() - expected.float()).norm() / expected.float().norm())
    if not value < 2e-2:
        raise ValueError(f"a result differs from its reference by {value:.1e} of its norm; at most 2e-2 was expected")
    return value


def figure(ratio: float, target: str, wrong: float, **more: float) -> dict[str, Any]:
    """A ratio and whether it reaches its target."""
    sign, limit = TARGETS[target]
    met = ratio <= limit if sign == "<=" else ratio >= limit
    return {"ratio": ratio, "target": f"{sign} {limit}", "met": met, "error": wrong, **more}


def copying(count: int, device: torch.device) -> Run:
    """A copy that reads and writes ``count`` bytes in all."""
    source = torch.ones(max(1, count // 2), dtype=torch.uint8, device=device)
    return lambda: source.clone()


def layout_kernels(shape: Shape, tokens: int, rounds: int) -> dict[str, Any]:
    """Packing, reordering and merging against copies of as many bytes."""
    k, v = (shape.random(shape.kv_heads, tokens) for _ in range(2))
    rows = shape.random(shape.heads, tokens)[0].transpose(0, 1).reshape(tokens, -1)
    index = token_layout((tokens,), 2).local_index.reshape(-1).to(shape.device)
    out, parts = shape.random(shape.heads, tokens), shape.random(shape.heads, tokens)[None]
    lse, lses = (torch.randn(*kind.shape[:-1], device=shape.device) for kind in (out, parts))
    cases: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
        "pack": (lambda *each: torch.cat(each), (k, v)),
        "reorder": (lambda rows, index: rows.index_select(0, index), (rows, index)),
        "merge": (lambda *each: merge_partials(*each)[0], (out, lse, parts, lses)),
    }
    found = {}
    for name, (function, given) in cases.items():
        code = torch.compile(function, fullgraph=True)
        result = code(*given)
        wrong = difference(result, function(*given))
        moved = sum(each.nbytes for each in (*given, result))
        times = medians({"ours": lambda: code(*given), "copy": copying(moved, shape.device)}, rounds)  # noqa: B023
        found[name] = figure(times["copy"] / times["ours"], "bandwidth", wrong, bytes_per_second=moved / times["ours"])
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


def layers(shape: Shape, tokens: int, sizes: list[int], rounds: int, smoke: bool) -> dict[str, Any]:
    """Two layers on every emulated rank, without the model's head: peak memory over what planning says of it.

    Planned are the values around the widest product, and the keys and values that one layer gathers.
    """
    model = _model(shape, 2, tokens, smoke).model
    lengths = [tokens - tokens // 3, tokens // 3]
    ids = [torch.randint(0, model.config.vocab_size, (each,)) for each in lengths]
    batch = {**sp_compile.pack(ids, device=shape.device), "use_cache": False}
    work = sp_compile.parallelize(model, sp=1).work(batch)
    planner, found = Planner(work, load_hardware("h100"), scheme="zigzag"), {}
    with torch.no_grad():  # each alone, without a mask of all pairs
        alone = [model(each[None].to(shape.device), use_cache=False).last_hidden_state for each in ids]
    expected = torch.cat(alone, dim=1)
    for sp in sizes:
        emulation = sp_compile.emulate(model, batch, sp, outputs="full", attention="allgather_kv", scheme="zigzag")
        wrong = difference(emulation.outputs.last_hidden_state, expected)
        emulation = sp_compile.emulate(model, batch, sp, outputs="sharded", attention="allgather_kv", scheme="zigzag")
        figures = emulation.figures(rounds).ranks
        wanted = "prefill", sp, "local" if sp == 1 else "allgather_kv"
        plans = (each for each in planner.plans(lengths, sp) if (each.kind, each.sp, each.strategy) == wanted)
        planned = next(plans).memory - work.weights
        peak = max(each.peak_bytes for each in figures)
        more = {"peak_bytes": peak, "planned_bytes": planned, "slowest_seconds": max(each.seconds for each in figures)}
        found[f"sp={sp}, peak over planned"] = figure(peak / planned, "memory", wrong, **more)
        del emulation
    return found


def whole_model(shape: Shape, tokens: int, rounds: int, smoke: bool) -> dict[str, Any]:
    """A model of four layers at sp=1 against eager and plain ``torch.compile``, with peak memory."""
    model = _model(shape, 1 if smoke else 4, tokens, smoke)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=shape.device)
    models = {"eager": model, "compile": torch.compile(model), "ours": sp_compile.parallelize(model, sp=1)}
    runs = {key: _forward(each, ids) for key, each in models.items()}
    wrong = difference(runs["ours"](), runs["eager"]())
    times = medians(runs, rounds)
    best = min(times["eager"], times["compile"])
    found = figure(times["ours"] / best, "time", wrong, **{f"{key}_seconds": each for key, each in times.items()})
    if shape.device.type == "cuda":
        found["peak_bytes"] = {key: _peak(run) for key, run in runs.items()}
    return {"sp=1": found}


def _model(shape: Shape, layers: int, tokens: int, smoke: bool) -> Any:
    """A model with the heads of a shape."""
    kind, config, sizes = MODELS[shape.name]
    if smoke:
        sizes = {key: min(value, 64) for key, value in sizes.items()}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.width}
    vocabulary = 512 if smoke else 32000
    made = config(**sizes, **heads, num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=tokens)
    return kind(made).to(shape.device, torch.float32 if smoke else torch.bfloat16).eval()


def _forward(model: Any, ids: torch.Tensor) -> Run:
    return lambda: model(input_ids=ids, use_cache=False).logits


def _peak(run: Run) -> int:
    """Bytes of a forward above what is allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
