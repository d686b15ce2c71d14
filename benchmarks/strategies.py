"""Strategies for attention and token layouts: time, bytes on the wire, balance, and how well ``auto`` chooses.

Run ``python benchmarks/strategies.py`` on an otherwise idle machine; ``--help`` shows what can be chosen. The first
part is one interleaved run of all setups on real ranks. Bytes on the wire are those that the loopback device carried
during a forward, with the headers of its packets; other traffic on it spoils them.

The second part asks how good the choices of ``auto`` are where links are slower or faster than here: ranks that are
pretended in one process, the first and the last of four, run their local graphs with collectives that carry nothing,
and what a collective takes is added by its bytes and the link's rate. The grid are models, mixes of requests and rates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from prefill import batch_of, llama
from servers import Server, answer, serve, write

import sp_compile
from sp_compile.layout import token_layout
from sp_compile.measure import machine, versions
from sp_compile.needs import Reach, seen_pairs


def mixes(tokens: int = 8192) -> dict[str, list[int]]:
    """Requests of about so many tokens: one, of all lengths, a long one among short ones, and short ones."""
    generator = np.random.default_rng(0)
    spread = np.exp(generator.uniform(np.log(64), np.log(4096), 8))
    short = generator.integers(4, 128, 31)
    return {
        "one": [tokens],
        "of all lengths": np.maximum(1, spread * tokens / spread.sum()).astype(int).tolist(),
        "one long, 31 short": [tokens * 3 // 4, *np.maximum(1, short * tokens // 8192).tolist()],
        "64 short": np.maximum(1, generator.integers(4, 253, 64) * tokens // 8192).tolist(),
    }


SETUPS = {  # scheme, strategy, ranks
    "sp=1": ("zigzag", "allgather_kv", 1),
    "zigzag, allgather_kv": ("zigzag", "allgather_kv", 2),
    "zigzag, fetch": ("zigzag", "fetch", 2),
    "zigzag, ring": ("zigzag", "ring", 2),
    "zigzag, ulysses": ("zigzag", "ulysses", 2),
    "whole, fetch": ("whole", "fetch", 2),
    "auto, auto": ("auto", "auto", 2),
}


def run(scheme: str, strategy: str, sp: int, threads: int, orders: str) -> None:
    """Serve forwards of one setup."""
    torch.set_num_threads(threads)
    parallel = sp_compile.parallelize(llama(), sp=sp, scheme=scheme, attention=strategy, outputs="sharded")
    batches = {name: batch_of(lengths) for name, lengths in mixes().items()}

    def reply(order: str) -> float:
        what, _, mix = order.partition(" ")
        start = time.perf_counter()
        with torch.no_grad():
            parallel(**batches[mix])
        spent = time.perf_counter() - start
        return spent if what == "seconds" else float(parallel.report().bytes_sent)

    answer(orders, sp, reply)


def carried() -> int:
    """Bytes that the loopback device has sent so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.strip().partition(":")
        if name == "lo":
            return int(counts.split()[8])
    raise RuntimeError("there is no device 'lo'")


def balance(scheme: str, lengths: Sequence[int], sp: int) -> dict[str, float]:
    """The most that a rank has over the mean, of causal attention's area and of tokens."""
    layout = token_layout(lengths, sp, scheme)
    area, tokens = np.asarray(seen_pairs(layout, Reach(None, 0), True)), np.asarray(layout.tokens_per_rank)
    return {"area": float(area.max() / area.mean()), "tokens": float(tokens.max() / tokens.mean())}


def measure(rounds: int, names: Sequence[str], setups: Sequence[str]) -> list[dict[str, Any]]:
    """Medians of all rounds, a row for each mix and setup."""
    servers: dict[str, Server] = {}
    rows = []
    try:
        for name in setups:  # one after another, for compiling takes both cores
            scheme, strategy, sp = SETUPS[name]
            servers[name] = Server(name, __file__, [scheme, strategy], sp, 1)
            for mix in names:
                servers[name].ask(f"seconds {mix}")
            print(f"compiled: {name}", flush=True)
        found: dict[tuple[str, str], list[float]] = {(mix, name): [] for mix in names for name in servers}
        for _ in range(rounds):
            for mix, name in found:
                found[mix, name].append(servers[name].ask(f"seconds {mix}"))
        for (mix, name), times in found.items():
            before = carried()
            predicted = servers[name].ask(f"bytes {mix}", join=sum)
            rows.append({"mix": mix, "setup": name, "seconds": statistics.median(times), "bytes": predicted,
                         "wire": carried() - before})  # fmt: skip
    finally:
        for server in servers.values():
            server.end()
    return rows


RANKS, TOKENS = 4, 4096  # of the grid
RATES = {"0.1 GB/s": 1e8, "1 GB/s": 1e9, "10 GB/s": 1e10, "100 GB/s": 1e11}
STRATEGIES = ("allgather_kv", "fetch", "ring", "ulysses")


def models() -> dict[str, torch.nn.Module]:
    """Many heads and few, all keys and a window."""
    import transformers

    sizes = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 2,
             "num_attention_heads": 8, "max_position_embeddings": 8192, "use_cache": False}  # fmt: skip
    kinds = {
        "MHA": transformers.LlamaConfig(num_key_value_heads=8, **sizes),
        "GQA": transformers.LlamaConfig(num_key_value_heads=2, **sizes),
        "window of 512": transformers.MistralConfig(num_key_value_heads=4, sliding_window=512, head_dim=64, **sizes),
    }
    torch.manual_seed(0)
    return {name: transformers.AutoModelForCausalLM.from_config(config).eval() for name, config in kinds.items()}


def grid(rounds: int) -> list[dict[str, Any]]:
    """For each model, mix and rate, the simulated seconds by each strategy, and which one ``auto`` took."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from sp_compile import mesh
    from sp_compile.config import compile_config
    from sp_compile.costs import measured_rates, rates_of
    from sp_compile.runtime import ParallelModule

    dist.all_to_all_single = _carries_nothing  # that of a fake group does not take a rank that sends nothing
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    torch.set_num_threads(1)
    compute = measured_rates(mesh.single(), torch.device("cpu"), torch.float32).compute
    rows = []
    for name, model in models().items():
        groups = [mesh.Group(RANKS, rank, dist.group.WORLD.group_name) for rank in (0, RANKS - 1)]
        common = {"check_inputs": False, "outputs": "sharded", "codegen": "eager"}
        ranks = {each: [ParallelModule(model, group, compile_config(attention=each, **common)) for group in groups]
                 for each in STRATEGIES}  # fmt: skip
        auto = ParallelModule(model, groups[0], compile_config(attention="auto", **common))
        for mix, lengths in mixes(TOKENS).items():
            seconds, reports = timed(ranks, batch_of(lengths), rounds)
            print(f"grid: {name}, {mix}", flush=True)
            for rate_name, rate in RATES.items():
                auto.rates = rates_of(torch.device("cpu"), rate, compute)
                taken = auto.explain(batch_of(lengths)).strategies[0]
                found = {each: seconds[each] + reports[each].bytes_sent / rate for each in STRATEGIES}
                rows.append({"model": name, "mix": mix, "rate": rate_name, "seconds": found, "auto": taken})
    dist.destroy_process_group()
    return rows


def _carries_nothing(*_: Any, **__: Any) -> Any:
    return dist.barrier(async_op=True)


def timed(
    ranks: Mapping[str, Sequence[Any]], inputs: dict[str, torch.Tensor], rounds: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Of each strategy the seconds of its slowest rank, medians of interleaved rounds, and its report."""
    times: dict[tuple[str, int], list[float]] = {}
    for i in range(rounds + 1):
        for name, group in ranks.items():
            for rank, each in enumerate(group):
                start = time.process_time()  # of one thread, and so not that of others
                with torch.no_grad():
                    each(**inputs)
                if i:  # the first captures
                    times.setdefault((name, rank), []).append(time.process_time() - start)
    slowest = {
        name: max(statistics.median(times[name, rank]) for rank in range(len(group))) for name, group in ranks.items()
    }
    return slowest, {name: group[0].report() for name, group in ranks.items()}


def near_best(row: Mapping[str, Any]) -> float:
    """What the choice of ``auto`` takes over the best, where nothing crosses that of the fewest bytes."""
    taken = "fetch" if row["auto"] == "local" else row["auto"]
    return float(row["seconds"][taken] / min(row["seconds"].values()))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    single = {row["mix"]: row["seconds"] for row in rows if row["setup"] == "sp=1"}
    text = [
        "| requests | setup | seconds | against sp=1 | bytes by the graph | on the wire |",
        "|---|---|---|---|---|---|",
    ]
    text += [
        f"| {row['mix']} | {row['setup']} | {row['seconds']:.3f} | {single[row['mix']] / row['seconds']:.2f}x "
        f"| {row['bytes'] / 1e6:.2f} MB | {row['wire'] / 1e6:.2f} MB |"
        for row in rows
    ]
    return "\n".join(text)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="visits of every setup (default 5)")
    parser.add_argument("--mixes", nargs="*", default=[*mixes()], help="which requests")
    parser.add_argument("--setups", nargs="*", default=[*SETUPS], help="layouts and strategies, sp=1 among them")
    parser.add_argument("--parts", nargs="*", default=["ranks", "grid"], help="ranks, grid or both (default)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "versions": versions(), "rounds": options.rounds}
    if "ranks" in options.parts:
        result["rows"] = measure(options.rounds, options.mixes, options.setups)
        print(table(result["rows"]))
        schemes = ("contiguous", "zigzag", "whole", "chunked")
        result["most over mean on 8 ranks"] = {
            name: {scheme: balance(scheme, lengths, 8) for scheme in schemes} for name, lengths in mixes().items()
        }
        print(json.dumps(result["most over mean on 8 ranks"], indent=1))
    if "grid" in options.parts:
        result["grid"] = grid(options.rounds)
        over = [near_best(row) for row in result["grid"]]
        for row, each in zip(result["grid"], over, strict=True):
            seconds = ", ".join(f"{name} {1e3 * value:.0f}" for name, value in row["seconds"].items())
            print(f"{row['model']:14} {row['mix']:20} {row['rate']:9} ms: {seconds}; auto: {row['auto']} {each:.3f}x")
        result["auto within 5% of the best"] = sum(each <= 1.05 for each in over) / len(over)
        print(f"auto within 5% of the best: {result['auto within 5% of the best']:.0%} of {len(over)}")
    if options.json is not None:
        write(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(run, sys.argv[2:])
    else:
        main()
