"""Attention kernels on one device: ours against torch's, on masks of many kinds, in one interleaved run.

Run ``python benchmarks/attention.py`` on an otherwise idle machine; ``--help`` shows what can be chosen. 8 query and 4
key/value heads of 64 dims, fp32 on a CPU with one thread, bf16 on a GPU. Besides the same inputs under other kernels, a
mask is measured against plain ``is_causal`` SDPA that computes the same number of query-key pairs: one sequence of that
area, and for packed requests also each request on its own. Medians of all rounds; areas count visible pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sp_compile import kernels
from sp_compile.kernels.plan import plan_regions
from sp_compile.kernels.regions import as_tensor
from sp_compile.measure import machine, versions
from sp_compile.score_rule import evaluate

HEADS, KV_HEADS, WIDTH, WINDOW = 8, 4, 64, 512
LENGTHS = (2048, 8192)
SHARES = (0.27, 0.05, 0.01, 0.2, 0.12, 0.16, 0.08)  # of the tokens, by the first seven of eight packed requests
Run = Callable[[], Any]


def masks(tokens: int, device: torch.device) -> dict[str, tuple[str, list[torch.Tensor]]]:
    """Rules with their operands, by name."""
    rows = torch.arange(tokens, device=device)
    counts = [int(share * tokens) for share in SHARES]
    owners = torch.repeat_interleave(torch.arange(8), torch.tensor([*counts, tokens - sum(counts)])).to(device)
    held = rows >= tokens // 4
    queries, keys = rows[:, None], rows[None, :]
    causal = "t0 = le(x1, x0)"
    return {
        "causal": ("mask = le(x1, x0)", [queries, keys]),
        f"window {WINDOW}": (f"{causal}; t1 = sub(x0, x1); t2 = lt(t1, {WINDOW}); mask = and(t0, t2)", [queries, keys]),
        "packed, 8 requests": (
            f"{causal}; t1 = eq(x2, x3); mask = and(t0, t1)",
            [queries, keys, owners[:, None], owners[None, :]],
        ),
        "left padded by a quarter": (f"{causal}; mask = and(t0, x2)", [queries, keys, held[None, :]]),
        "causal, soft-capped scores": ("mask = le(x1, x0); t1 = div(score, 50.0); t2 = tanh(t1); score = mul(t2, 50.0)",
                                       [queries, keys]),
        "causal, ALiBi": ("mask = le(x1, x0); t1 = sub(x1, x0); bias = mul(x2, t1)",
                          [queries, keys, torch.exp2(-torch.arange(1.0, 9.0, device=device))[:, None, None]]),
    }  # fmt: skip


def inputs(tokens: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values in the layout in which projections give them."""
    return [
        torch.randn(1, tokens, heads, WIDTH, device=device, dtype=dtype).transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def repeated(qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    """Keys and values for every query head, as models give them to SDPA."""
    q, k, v = qkv
    return [q, *(each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (k, v))]


def area_of(rule: str, operands: list[torch.Tensor]) -> int:
    """Visible pairs of query and key."""
    return int(evaluate(rule, operands, ("mask",))["mask"].sum())


def ours(rule: str, operands: list[torch.Tensor], qkv: list[torch.Tensor]) -> Run:
    """The kernel ``tiles`` with its plan made before; a model makes it once for all layers of a kind."""
    tokens = qkv[0].shape[2]
    plan = as_tensor(plan_regions(operands, [], rule, None, tokens, tokens))
    return lambda: kernels.attend("tiles", *qkv, operands, [], rule, WIDTH**-0.5, plan, None)


def causal_of_area(area: int, device: torch.device, dtype: torch.dtype) -> Run:
    """``is_causal`` SDPA over one sequence with this many visible pairs."""
    qkv = repeated(inputs(round((2 * area) ** 0.5), device, dtype))
    return lambda: F.scaled_dot_product_attention(*qkv, is_causal=True)


def causal_of_each(lengths: list[int], qkv: list[torch.Tensor]) -> Run:
    """``is_causal`` SDPA over every request on its own."""
    parts = list(zip(*(each.split(lengths, dim=2) for each in repeated(qkv)), strict=True))
    return lambda: [F.scaled_dot_product_attention(*each, is_causal=True) for each in parts]


def dense_sdpa(rule: str, operands: list[torch.Tensor], qkv: list[torch.Tensor]) -> Run:
    """SDPA with a mask that was made before."""
    values = evaluate(rule, operands, ("mask", "bias"))
    mask = values["mask"][None, None]
    if "bias" in values:
        mask = torch.where(mask, values["bias"].to(qkv[0].dtype), -torch.inf)
    whole = repeated(qkv)
    return lambda: F.scaled_dot_product_attention(*whole, attn_mask=mask)


def flex(rule: str, operands: list[torch.Tensor], qkv: list[torch.Tensor]) -> Run:
    """FlexAttention compiled for these shapes, its block mask made before."""
    tokens, device = qkv[0].shape[2], qkv[0].device
    vectors = [each.reshape(-1) for each in operands]

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen = vectors[1][k] <= vectors[0][q]
        if "eq(" in rule:
            seen = seen & (vectors[2][q] == vectors[3][k])
        if "lt(" in rule:
            seen = seen & (vectors[0][q] - vectors[1][k] < WINDOW)
        if "and(t0, x2)" in rule:
            seen = seen & vectors[2][k]
        return seen

    def score_mod(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        if "tanh" in rule:
            return 50.0 * torch.tanh(score / 50.0)
        return score + vectors[2][h] * (k - q) if "bias" in rule else score

    blocks = create_block_mask(mask_mod, None, None, tokens, tokens, device=device)
    changed = "tanh" in rule or "bias" in rule
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    call = {"score_mod": score_mod if changed else None, "block_mask": blocks, "enable_gqa": True}
    return lambda: compiled(*qkv, **call)


def setups(tokens: int, device: torch.device, dtype: torch.dtype) -> dict[tuple[str, str], Run]:
    """What is run, by mask and kernel."""
    found: dict[tuple[str, str], Run] = {}
    for name, (rule, operands) in masks(tokens, device).items():
        qkv = inputs(tokens, device, dtype)
        found[name, "ours"] = ours(rule, operands, qkv)
        found[name, "is_causal of that area"] = causal_of_area(area_of(rule, operands), device, dtype)
        if "eq(" in rule:
            lengths = torch.bincount(operands[2].flatten()).tolist()
            found[name, "is_causal of each request"] = causal_of_each(lengths, qkv)
        if "score" not in rule:
            found[name, "SDPA with a dense mask"] = dense_sdpa(rule, operands, qkv)
        found[name, "FlexAttention"] = flex(rule, operands, qkv)
    return found


def measure(run: Run, device: torch.device) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(tokens: int, rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Median seconds of every kernel on every mask, and the ratios of ours to the others."""
    runs = setups(tokens, device, dtype)
    for run in runs.values():  # compiles
        measure(run, device)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(measure(run, device))
    found: dict[str, dict[str, Any]] = {}
    for name, (rule, operands) in masks(tokens, device).items():
        medians = {kernel: statistics.median(each) for (mask, kernel), each in times.items() if mask == name}
        planned = [_plan_seconds(rule, operands, tokens) for _ in range(5)]
        found[name] = {"area": area_of(rule, operands), "seconds": medians, "plan_seconds": statistics.median(planned)}
    return found


def _plan_seconds(rule: str, operands: list[torch.Tensor], tokens: int) -> float:
    start = time.perf_counter()
    plan_regions(operands, [], rule, None, tokens, tokens)
    return time.perf_counter() - start


def show(tokens: int, found: dict[str, dict[str, Any]]) -> None:
    """Print a table of one length."""
    print(f"\n{tokens} tokens")
    for name, each in found.items():
        mine = each["seconds"]["ours"]
        print(f"  {name}: {each['area']} pairs, {mine * 1e9 / HEADS / each['area']:.2f} ns per pair and head, "
              f"plan {each['plan_seconds'] * 1e3:.1f} ms")  # fmt: skip
        for kernel, value in each["seconds"].items():
            print(f"    {kernel:28} {value * 1e3:9.1f} ms   ours takes {mine / value:5.2f}x of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each kernel and mask")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch._dynamo.config.recompile_limit = 64  # one for each mask and length
    device = torch.device(chosen.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    results: dict[str, Any] = {"machine": machine(), "versions": versions(), "rounds": chosen.rounds,
                               "threads": chosen.threads, "device": chosen.device}  # fmt: skip
    with torch.no_grad():
        for tokens in chosen.tokens:
            results[str(tokens)] = compare(tokens, chosen.rounds, device, dtype)
            show(tokens, results[str(tokens)])
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
