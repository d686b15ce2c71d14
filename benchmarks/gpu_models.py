"""Layers of emulated ranks and whole models on one device, for ``gpu.py``.

What a model in bf16 gives is compared with the eager model in bf16, and may be off by twice as much as that is off the
same weights in fp32: both are rounded, and where experts are routed, roundings choose other experts for some tokens,
which no bound of one operation holds. That the two are the same is shown in fp32 by a small model on the same device.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from gpu_runs import batches
from gpu_timing import HALF_ERROR, TARGETS, Run, Shape, able, apart, difference, figure, medians
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import sp_compile
from sp_compile import costs
from sp_compile.layout import token_layout
from sp_compile.measure import PeakMemory, synchronize

MODELS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "Llama-3-8B": (LlamaForCausalLM, LlamaConfig, {"hidden_size": 4096, "intermediate_size": 14336}),
    "Qwen3-30B-A3B": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    ),
}
TOKENS, SMALL = 4096, 256  # of a sequence in fp32: with the model's weights, and of a small model
STRATEGY, SCHEME = "allgather_kv", "zigzag"  # of emulated ranks
TIMES = 2.0  # of the error of the eager model


def small_shape(shape: Shape) -> Shape:
    """The shape of a small model of the same kind."""
    return Shape(shape.name, 8, 8 * shape.kv_heads // shape.heads, shape.device, 16)


def in_fp32(shape: Shape, sizes: list[int]) -> dict[str, Any]:
    """A small model of the same kind in fp32, on every emulated rank and whole, against the eager model."""
    small = small_shape(shape)
    ids = _ids(batches(SMALL)[f"{SMALL} tokens, 8 requests"])
    found = {}
    with torch.no_grad():
        model = model_of(small, 2, SMALL, True)
        for sp in sizes:
            wrong = apart(emulated(model.model, ids, sp, small)[1], _alone(model.model, ids))
            found[f"sp={sp}, error in fp32"] = figure(wrong, "exact", wrong)
        ours = sp_compile.parallelize(model, sp=1)
        wrong = apart(ours(**batch_of(ids, small)).logits, _alone(model, ids))
        found["whole, error in fp32"] = figure(wrong, "exact", wrong)
    return found


def layers(shape: Shape, tokens: int, sp: int, rounds: int, small: bool) -> dict[str, Any]:
    """Two layers on every emulated rank, without the model's head: seconds, evenness, and peak memory.

    The table holds the peak, weights apart, against the share of what sp=1 takes and what the strategy is documented to
    hold, ``held_bytes``.
    """
    with torch.no_grad():
        model = model_of(shape, 2, tokens, small).model
        allowed = tolerance(model, tokens)
        ids = _ids((tokens - tokens // 3, tokens // 3))
        emulation, result = emulated(model, ids, sp, shape)
        wrong = difference(result, _alone(model, ids), allowed["allowed"])
        del result
        figures = emulation.figures(rounds)
    work = sp_compile.parallelize(model, sp=1).work(batch_of(ids, shape))
    layout = token_layout([len(each) for each in ids], sp, SCHEME)
    held = costs.held(STRATEGY, layout, work.attentions[0], apart=True)
    peak, slowest = (max(each) for each in zip(*((one.peak_bytes, one.seconds) for one in figures.ranks), strict=True))
    more = {"seconds": slowest, "rank_seconds": [each.seconds for each in figures.ranks], **allowed}
    found = {"sp": sp, "error": wrong, "peak_bytes": peak, "held_bytes": held, **more}
    return found | ({"slowest over mean": figure(figures.imbalance, "even", wrong, **more)} if sp > 1 else {})


def emulated(model: Any, ids: list[torch.Tensor], sp: int, shape: Shape) -> tuple[Any, torch.Tensor]:
    """Requests on every rank in this process, and the outputs of all in normal order."""
    options = {"outputs": "sharded", "attention": STRATEGY, "scheme": SCHEME}
    emulation = sp_compile.emulate(model, batch_of(ids, shape), sp, **options)
    layout = token_layout([len(each) for each in ids], sp, SCHEME)
    rows = torch.cat([emulation.values(rank)[0] for rank in range(sp)], dim=1)
    return emulation, rows.index_select(1, layout.restore_index.to(rows.device))


def whole_model(shape: Shape, lengths: tuple[int, ...], rounds: int, small: bool) -> dict[str, Any]:
    """A model of four layers at sp=1 against eager and plain ``torch.compile``, with peak memory.

    Several requests are one packed batch for ours, and each alone, one after another, for the others.
    """
    with torch.no_grad():
        model = model_of(shape, 1 if small else 4, sum(lengths), small)
        allowed = tolerance(model, sum(lengths))
        ids = [each.to(shape.device) for each in _ids(lengths)]
        ours, batch = sp_compile.parallelize(model, sp=1), batch_of(ids, shape)
        compiled = torch.compile(model, dynamic=len(lengths) > 1)  # one length has code of its own
        runs: dict[str, Run] = {"ours": lambda: ours(**batch).logits}
        others, refused = able({"eager": lambda: _alone(model, ids), "compile": lambda: _alone(compiled, ids)})
        wrong = difference(runs["ours"](), _alone(model, ids), allowed["allowed"])
        runs |= others
        times = medians(runs, rounds, warm=runs.keys())
        best = min(times[each] for each in others)
        more = {"seconds": times["ours"], "by_code": times, "refused": refused, **allowed}
        if shape.device.type == "cuda":
            more["peak_bytes"] = {key: _peak(run, shape.device) for key, run in runs.items()}
        return {"sp=1": figure(times["ours"] / best, "time", wrong, **more)}


def tolerance(model: Any, tokens: int) -> dict[str, float]:
    """How far a model's outputs are off those of its weights in fp32, and how far those of ours may be off them."""
    if model.dtype == torch.float32:
        return {"own_error": 0.0, "allowed": TARGETS["exact"][1]}
    ids = _ids((min(tokens, TOKENS),))
    own = apart(_alone(model, ids), _alone(copy.deepcopy(model).float(), ids))
    return {"own_error": own, "allowed": max(HALF_ERROR, TIMES * own)}


def model_of(shape: Shape, layers: int, tokens: int, small: bool) -> Any:
    """A model with the heads of a shape, in fp32 where it is small and in bf16 else."""
    kind, config, sizes = MODELS[shape.name]
    if small:
        sizes = {key: min(value, 64) for key, value in sizes.items()}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.width}
    vocabulary = 512 if small else 32000
    made = config(**sizes, **heads, num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=tokens)
    with shape.device:  # where weights are drawn faster
        model = kind(made)
    return model.to(shape.device, torch.float32 if small else torch.bfloat16).eval()


def batch_of(ids: list[torch.Tensor], shape: Shape) -> dict[str, Any]:
    """The requests as one packed batch."""
    return {**sp_compile.pack(ids, device=shape.device), "use_cache": False}


def _ids(lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Requests of words that every model has."""
    return [torch.randint(0, 512, (each,)) for each in lengths]


def _alone(model: Any, ids: list[torch.Tensor]) -> torch.Tensor:
    """The outputs of each request alone, without a mask of all pairs."""
    device = next(model.parameters()).device
    outputs = [model(input_ids=each[None].to(device), use_cache=False) for each in ids]
    return torch.cat([each.logits if "logits" in each else each.last_hidden_state for each in outputs], dim=1)


def _peak(run: Run, device: torch.device) -> int:
    """Bytes of a forward above what is allocated before."""
    synchronize(device)
    with PeakMemory(device) as peak:
        run()
        synchronize(device)
    return peak.bytes
