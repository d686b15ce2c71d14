"""Attention of every rank of a layout, layout kernels, decoding and whole models on one GPU, without communication.

Run ``python benchmarks/gpu.py`` on an otherwise idle GPU; ``--help`` shows what can be chosen. The shapes are those of
Llama-3-8B and Qwen3-30B-A3B: 32 query and 8 or 4 key/value heads of 128 dims, bf16. A rank's queries meet the keys that
a strategy brings, in the order in which they come, under what is planned for them, by FlexAttention's code for any
length and by fused kernels; "ours" is the one that compiled models take on this card. Beside each rank stand torch's
kernels on one causal sequence with as many visible pairs of query and key, FlexAttention with code for that length
alone. Times are those of CUDA events, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attention import SHARES
from gpu_parts import Run, Shape, decode, difference, host_seconds, layers, layout_kernels, medians, whole_model
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from sp_compile import kernels, needs
from sp_compile.kernels import flex, rates
from sp_compile.kernels.plan import joined_with_valid, plan_regions
from sp_compile.kernels.regions import as_tensor
from sp_compile.layout import TokenLayout, token_layout
from sp_compile.measure import machine, versions
from sp_compile.passes.lower_attention import OPTIONS, repeated_rows

STRATEGIES = ("allgather_kv", "fetch")
RULE = "t0 = eq(x0, x1); t1 = le(x2, x3); mask = and(t0, t1)"  # of transformers' mask for packed requests
SDPA = {"flash SDPA": SDPBackend.FLASH_ATTENTION, "cuDNN SDPA": SDPBackend.CUDNN_ATTENTION}
CARD = torch.device("cuda", 0)
ROUNDED = 128  # tokens of a sequence that stands for an area
SEES = flex.rule_graph(
    torch.nn.Module(), joined_with_valid(RULE, 4), "mask", dict(enumerate(((2,), (3,), (3,), (2,), (3,)))), {}
)


@torch.compile(fullgraph=True)
def of_any_length(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockMask) -> Any:
    options = {"BACKEND": OPTIONS["BACKEND"]}
    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=True, kernel_options=options)


@torch.compile(fullgraph=True, dynamic=False)
def of_one_length(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockMask) -> Any:
    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockMask) -> Any:
    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)


def eager_with_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockMask) -> tuple[Any, Any]:
    options = {"BACKEND": OPTIONS["BACKEND"]}
    found, aux = flex_attention(q, k, v, block_mask=blocks, kernel_options=options, return_aux=AuxRequest(lse=True))
    return found.float(), aux.lse


with_lse = torch.compile(eager_with_lse, fullgraph=True)


@dataclass(frozen=True)
class Part:
    """Queries of a rank and the keys that it gets, as rows of the batch.

    Attributes:
        queries, keys: int64, normal-order rows; 0 on padding.
        real: bool, keys that are no padding.
        area: pairs of a query and a key that it sees.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    real: torch.Tensor
    area: int


def batches(tokens: int) -> dict[str, tuple[int, ...]]:
    """Lengths of the requests, by the name of the batch."""
    counts = [int(share * tokens) for share in SHARES]
    return {f"{tokens} tokens": (tokens,), f"{tokens} tokens, 8 requests": (*counts, tokens - sum(counts))}


def part_of(layout: TokenLayout, rank: int, strategy: str) -> Part:
    """What a rank computes."""
    reach = needs.Reach(None, 0)
    area = needs.seen_pairs(layout, reach, True)[rank]
    if strategy == "allgather_kv":
        return Part(layout.local_index[rank], layout.local_index.reshape(-1), layout.valid.reshape(-1), area)
    found = needs.index_inputs(layout, rank, [needs.Fetch(reach)], True)
    return Part(layout.local_index[rank], found["reach_index_0"], found["reach_valid_0"], area)


class Batch:
    """Queries, keys and values of a whole batch, and the attention of parts of it."""

    def __init__(self, lengths: tuple[int, ...], shape: Shape) -> None:
        self.shape, self.device = shape, shape.device
        self.lengths = lengths
        tokens = sum(lengths)
        self.q, self.k, self.v = (
            shape.random(heads, tokens) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        self.request = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(self.device)

    def operands(self, part: Part) -> list[torch.Tensor]:
        """Of :data:`RULE`, and the keys that exist."""
        queries, keys, real = (each.to(self.device) for each in (part.queries, part.keys, part.real))
        of_queries, of_keys = self.request[queries][:, None], self.request[keys][None, :]
        return [of_queries, of_keys, keys[None, :], queries[:, None], real]

    def plan(self, part: Part, operands: list[torch.Tensor]) -> torch.Tensor:
        """The block mask, made on the host and sent to the GPU, as before a forward."""
        made = flex.block_mask(operands[:-1], [], RULE, operands[-1], len(part.queries), len(part.keys))
        return made.to(self.device)

    def attention(self, part: Part, code: Callable[..., Any]) -> Run:
        """FlexAttention over the part, planned before."""
        operands = self.operands(part)
        q = self.q[:, :, part.queries.to(self.device)]
        k, v = (each[:, :, part.keys.to(self.device)] for each in (self.k, self.v))
        blocks = block_mask_of(self.plan(part, operands), operands)
        return lambda: code(q, k, v, blocks)

    def fused(self, part: Part) -> Run:
        """Fused kernels over the part, planned before."""
        operands, sizes = self.operands(part), (len(part.queries), len(part.keys))
        *read, real = operands
        q = self.q[:, :, part.queries.to(self.device)]
        k, v = (each[:, :, part.keys.to(self.device)] for each in (self.k, self.v))
        plan = as_tensor(plan_regions(read, [], RULE, real, *sizes, boxes=False))
        scale = self.shape.width**-0.5
        return lambda: kernels.attend("fused", q, k, v, read, [], RULE, scale, plan, real)[0].to(q.dtype)

    def each_request(self, backend: SDPBackend) -> Run:
        """``is_causal`` SDPA over every request on its own."""
        parts = [[part.contiguous() for part in each.split(self.lengths, dim=2)] for each in (self.q, self.k, self.v)]
        calls = [causal(*each, backend) for each in zip(*parts, strict=True)]
        return lambda: torch.cat([call() for call in calls], dim=2)


def block_mask_of(plan: torch.Tensor, operands: list[torch.Tensor]) -> BlockMask:
    """What :func:`sp_compile.kernels.flex.block_mask` planned, with the rule as a function of the element."""
    captured = [each.reshape(-1).contiguous() for each in operands]
    listed = [plan[:, None, :, i] for i in range(2)]
    parts = [part.contiguous() for each in listed for part in (each[..., 0], each[..., 1:])]
    lengths = len(captured[0]), len(captured[1])
    return BlockMask.from_kv_blocks(
        *parts, flex.BLOCK, lambda *place: SEES(*place, *captured), seq_lengths=lengths, compute_q_blocks=False
    )


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend) -> Run:
    """``is_causal`` SDPA by one of torch's kernels, keys and values repeated for grouped heads before."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def kernels_on(shape: Shape) -> dict[str, SDPBackend]:
    """Torch's kernels that the device has."""
    return SDPA if shape.device.type == "cuda" else {"flash SDPA": SDPBackend.FLASH_ATTENTION}


def code_on(shape: Shape, compiled: Any) -> Any:
    """Compiled FlexAttention on a GPU, eager on a CPU."""
    return compiled if shape.device.type == "cuda" else eager


def runs_of(batch: Batch, part: Part) -> dict[str, Run]:
    """A part by each kernel that compiled models may take."""
    found = {"FlexAttention, any length": batch.attention(part, code_on(batch.shape, of_any_length))}
    return found | ({"fused": batch.fused(part)} if batch.device.type == "cuda" else {})


def chosen(layout: TokenLayout, shape: Shape) -> str:
    """The kernel that compiled models take for a batch."""
    heads = rates.Shape(shape.heads, shape.kv_heads, shape.width, shape.width, "bfloat16", False)
    faster = shape.device.type == "cuda" and rates.refused(heads, CARD) is None and rates.beats_flex(heads, CARD)
    return "fused" if faster and not needs.short_runs(layout) else "FlexAttention, any length"


def sequence_of(area: int) -> int:
    """Tokens of a causal sequence with about that many visible pairs."""
    return max(1, round((2 * area) ** 0.5 / ROUNDED)) * ROUNDED


def of_area(tokens: int, shape: Shape) -> dict[str, Run]:
    """Torch's kernels on one causal sequence."""
    batch = Batch((tokens,), shape)
    whole = part_of(token_layout((tokens,), 1), 0, "allgather_kv")
    return {
        **{name: causal(batch.q, batch.k, batch.v, each) for name, each in kernels_on(shape).items()},
        "FlexAttention": batch.attention(whole, code_on(shape, of_one_length)),
    }


def compare(lengths: tuple[int, ...], sizes: Iterable[int], scheme: str, rounds: int, shape: Shape) -> dict[str, Any]:
    """All ranks of all sizes, each beside torch's kernels on its area; one rank at a time is held."""
    batch = Batch(lengths, shape)
    unsharded: dict[str, float] = {}
    for name, each in kernels_on(shape).items():
        unsharded |= medians({name: batch.each_request(each)}, rounds)
    expected = batch.each_request(SDPA["flash SDPA"])()
    found: dict[str, Any] = {"lengths": lengths, "unsharded_seconds": unsharded, "error": 0.0}
    for sp in sizes:
        layout = token_layout(lengths, sp, scheme)
        name_of_ours = chosen(layout, shape)
        for strategy in STRATEGIES[: 1 if sp == 1 else None]:
            ranks, outputs, planned = [], [], []
            for rank in range(sp):
                part = part_of(layout, rank, strategy)
                by_kernel = runs_of(batch, part)
                results = {name: run() for name, run in by_kernel.items()}
                outputs.append(results[name_of_ours])
                own = slice(layout.tokens_per_rank[rank])
                for each in results.values():
                    difference(each[:, :, own], results[name_of_ours][:, :, own])
                tokens = sequence_of(part.area)
                runs: dict[Any, Run] = {(tokens, name): each for name, each in of_area(tokens, shape).items()}
                seconds = medians({**by_kernel, **runs}, rounds)
                ranks.append(rank_figures(part, seconds, seconds[name_of_ours]))
                planned.append(medians({0: planning(batch, part)}, rounds, host_seconds)[0])
                del by_kernel, results, runs
            restored = torch.cat(outputs, dim=2)[:, :, layout.restore_index.to(batch.device)]
            found["error"] = max(found["error"], difference(restored, expected))
            spent = [each["seconds"] for each in ranks]
            unsharded.setdefault("sp=1", sum(spent))
            found[f"sp={sp}, {strategy}"] = {
                "slowest_over_mean": max(spent) / statistics.mean(spent),
                "sum_over_sp1": sum(spent) / unsharded["sp=1"],
                "sum_over_best_unsharded": sum(spent) / min(unsharded.values()),
                "plan_seconds": max(planned),
                "kernel": name_of_ours,
                "ranks": ranks,
            }
    return found


def generalize(shape: Shape) -> None:
    """Let the code that is for any length be made before what is measured."""
    for tokens in (1000, 1700, 2600):
        batch = Batch((tokens,), shape)
        for sp in (1, 2, 4):
            for strategy in STRATEGIES:
                batch.attention(part_of(token_layout((tokens,), sp), 0, strategy), of_any_length)()


def planning(batch: Batch, part: Part) -> Run:
    operands = batch.operands(part)
    return lambda: batch.plan(part, operands)


def rank_figures(part: Part, seconds: Mapping[Any, float], spent: float) -> dict[str, Any]:
    """One rank against torch's kernels on a causal sequence, their times by the pair."""
    tokens = sequence_of(part.area)
    share = part.area / (tokens * (tokens + 1) / 2)
    others = {key[1]: spent * share for key, spent in seconds.items() if isinstance(key, tuple)}
    return {
        "queries": len(part.queries),
        "keys": len(part.keys),
        "area": part.area,
        "seconds": spent,
        "of_that_area": others,
        "by_kernel": {key: each for key, each in seconds.items() if isinstance(key, str)},
        "ratio": spent / min(others.values()),
        "ratio_to_flex": spent / others["FlexAttention"],
    }


def tiles(tokens: int, rounds: int, shape: Shape) -> dict[str, Any]:
    """The kernel ``tiles``, which training uses, and torch's kernels, on one causal sequence, forward and backward."""
    batch, scale = Batch((tokens,), shape), shape.width**-0.5
    rows = torch.arange(tokens, device=shape.device)
    operands, rule = [rows[:, None], rows[None, :]], "mask = le(x1, x0)"
    plan = as_tensor(plan_regions(operands, [], rule, None, tokens, tokens))
    out, lse = kernels.attend("tiles", batch.q, batch.k, batch.v, operands, [], rule, scale, plan, None)
    grad = torch.randn_like(batch.q)
    saved = kernels.Saved(batch.q, batch.k, batch.v, out.to(grad.dtype), lse, grad, None)
    runs: dict[str, Run] = {
        "tiles": lambda: kernels.attend("tiles", *saved[:3], operands, [], rule, scale, plan, None),
        "tiles, backward": lambda: kernels.gradients("tiles", saved, operands, [], rule, scale, plan, None, ()),
    }
    for name, backend in {**SDPA, "efficient SDPA": SDPBackend.EFFICIENT_ATTENTION}.items():
        runs[name] = causal(batch.q, batch.k, batch.v, backend)
        runs[f"{name}, backward"] = causal_backward(batch, grad, backend)
    return medians(runs, rounds)


def causal_backward(batch: Batch, grad: torch.Tensor, backend: SDPBackend) -> Run:
    """The backward alone of ``is_causal`` SDPA."""
    leaves = [each.detach().requires_grad_() for each in (batch.q, batch.k, batch.v)]
    with torch.enable_grad():
        out = causal(*leaves, backend)()
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def show(name: str, found: Mapping[str, Any]) -> None:
    """Print one batch's figures, milliseconds."""
    alone = ", ".join(f"{key} {value * 1e3:.2f}" for key, value in found["unsharded_seconds"].items())
    print(f"\n{name}: unsharded {alone} ms; error {found['error']:.1e}")
    for key, each in found.items():
        if not key.startswith("sp="):
            continue
        ranks = each["ranks"]
        slowest = max(ranks, key=lambda one: float(one["seconds"]))
        beside = ", ".join(f"{kernel} {value * 1e3:.2f}" for kernel, value in slowest["of_that_area"].items())
        print(
            f"  {key:20} by {each['kernel']}: slowest {slowest['seconds'] * 1e3:8.2f} ({beside}), "
            f"{slowest['ratio']:.2f}x of the best, "
            f"{slowest['ratio_to_flex']:.2f}x of FlexAttention; slowest/mean {each['slowest_over_mean']:.3f}, "
            f"sum {each['sum_over_sp1']:.2f}x of sp=1, {each['sum_over_best_unsharded']:.2f}x of the best; "
            f"plan {each['plan_seconds'] * 1e3:.1f}"
        )


def rows_of(name: str, found: Mapping[str, Any]) -> list[tuple[str, float, str, bool]]:
    """Rows of the table: what, ratio, target, whether it is reached."""
    rows = []
    for key, each in found.items():
        if isinstance(each, dict) and "ratio" in each:
            rows.append((f"{name}, {key}", each["ratio"], each["target"], each["met"]))
        elif key.startswith("sp="):
            best = min(1 / rank["ratio"] for rank in each["ranks"])
            rows.append((f"{name}, {key}, best over ours", best, ">= 0.9", best >= 0.9))
            of_ranks = ("slowest_over_mean", "sum_over_sp1") if len(each["ranks"]) > 1 else ()
            for what in (*of_ranks, "sum_over_best_unsharded"):
                rows.append((f"{name}, {key}, {what.replace('_', ' ')}", each[what], "<= 1.05", each[what] <= 1.05))
    return rows


def markdown(results: Mapping[str, Any]) -> str:
    """The table, with the machine and the command."""
    lines = [
        "# One device",
        "",
        f"Machine: {json.dumps(results['machine'])}",
        "",
        f"Command: `{results['command']}`",
        "",
    ]
    lines += ["| what | ratio | target | |", "|---|---|---|---|"]
    for name, found in results["parts"].items():
        lines += [
            f"| {what} | {ratio:.3f} | {target} | {'met' if met else 'missed'} |"
            for what, ratio, target, met in rows_of(name, found)
        ]
    return "\n".join(lines) + "\n"


def write(results: Mapping[str, Any], asked: argparse.Namespace) -> None:
    """Write what was found so far, so that a part which fails loses no other."""
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2) + "\n")
    if asked.markdown:
        asked.markdown.write_text(markdown(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes of every part")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072, 524288])
    parser.add_argument("--sp", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--scheme", default="zigzag", help="the layout's")
    parser.add_argument("--tiles", type=int, nargs="*", default=[4096, 16384], help="tokens for the kernel tiles")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    asked = parser.parse_args()
    if (asked.device == "cuda") != torch.cuda.is_available():
        parser.error(f"--device {asked.device} was given; pass the other, or hide or show GPUs by CUDA_VISIBLE_DEVICES")
    device, smoke = torch.device(asked.device), asked.smoke
    if smoke:
        asked.rounds, asked.tokens, asked.sp, asked.tiles = 1, [256], [1, 2], []
    torch._dynamo.config.recompile_limit = 256  # one for each length of a sequence that stands for an area
    shapes = [Shape("Llama-3-8B", 32, 8, device), Shape("Qwen3-30B-A3B", 32, 4, device)]
    if smoke:
        shapes = [Shape(each.name, 8, each.kv_heads // 4, device, 16) for each in shapes]
    if device.type == "cpu":
        asked.tiles = []
        print("left out on a CPU: the kernel tiles, cuDNN SDPA, peak memory; FlexAttention is eager here")
    parts: dict[str, Any] = {}
    command = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
    results = {"machine": machine(), "versions": versions(), "command": command, "parts": parts}
    with torch.no_grad():
        for shape in shapes:
            if device.type == "cuda":
                generalize(shape)
            for tokens in asked.tokens:
                for name, lengths in batches(tokens).items():
                    found = compare(lengths, sorted({1, *asked.sp}), asked.scheme, asked.rounds, shape)
                    parts[f"{shape.name}, {name}"] = found
                    show(name, found)
                    write(results, asked)
            parts[f"{shape.name}, layout"] = layout_kernels(shape, 256 if smoke else 32768, asked.rounds)
            code = with_lse if device.type == "cuda" else eager_with_lse
            context = 64 if smoke else 131072
            write(results, asked)
            parts[f"{shape.name}, decode"] = decode(shape, context, asked.sp, asked.rounds, decoding_mask, code)
            write(results, asked)
            if not smoke or shape is shapes[0]:
                tokens = 256 if smoke else 131072
                parts[f"{shape.name}, layers"] = layers(shape, tokens, asked.sp, asked.rounds, smoke)
                write(results, asked)
                parts[f"{shape.name}, model"] = whole_model(shape, 64 if smoke else 8192, asked.rounds, smoke)
        for tokens in asked.tiles:
            results[f"tiles, {tokens} tokens"] = tiles(tokens, asked.rounds, shapes[0])
    print(markdown(results))
    write(results, asked)


def decoding_mask(operands: list[torch.Tensor], runs: torch.Tensor, rows: int, splits: int) -> BlockMask:
    """The block mask of new tokens, again and again in so many rows, over parts of the keys of a rank.

    Args:
        runs: int64 ``[runs, 4]``, ranges outside of which no query sees a key.
    """
    queries, keys = len(operands[0]), len(operands[-1])
    plan = flex.block_mask(operands[:-1], [], RULE, operands[-1], queries, keys, runs)
    split = torch.from_numpy(flex.split_blocks(plan.numpy(), queries, rows, splits))
    of_rows = [repeated_rows(each, rows) if each.dim() == 2 and len(each) == queries else each for each in operands]
    return block_mask_of(split.to(operands[-1].device), of_rows)


if __name__ == "__main__":
    main()
