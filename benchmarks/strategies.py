"""Strategies for attention and token layouts: time, bytes on the wire, balance; in one interleaved run.

Run ``python benchmarks/strategies.py`` on an otherwise idle machine; ``--help`` shows what can be chosen. Bytes on the
wire are those that the loopback device carried during a forward, with the headers of its packets; other traffic on it
spoils them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prefill import llama
from servers import Server, answer, serve, write

import sp_compile
from sp_compile.layout import token_layout
from sp_compile.measure import machine, versions


def mixes() -> dict[str, list[int]]:
    """Requests of about 8,192 tokens: one, of all lengths, a long one among short ones, and short ones."""
    generator = np.random.default_rng(0)
    spread = np.exp(generator.uniform(np.log(64), np.log(4096), 8))
    return {
        "one": [8192],
        "of all lengths": np.maximum(1, spread * 8192 / spread.sum()).astype(int).tolist(),
        "one long, 31 short": [6144, *generator.integers(4, 128, 31).tolist()],
        "64 short": generator.integers(4, 253, 64).tolist(),
    }


SETUPS = {  # scheme, strategy, ranks
    "sp=1": ("zigzag", "allgather_kv", 1),
    "zigzag, allgather_kv": ("zigzag", "allgather_kv", 2),
    "zigzag, fetch": ("zigzag", "fetch", 2),
    "whole, fetch": ("whole", "fetch", 2),
    "zigzag, ulysses": ("zigzag", "ulysses", 2),
    "auto, auto": ("auto", "auto", 2),
}


def run(scheme: str, strategy: str, sp: int, threads: int, orders: str) -> None:
    """Serve forwards of one setup."""
    torch.set_num_threads(threads)
    parallel = sp_compile.parallelize(llama(), sp=sp, scheme=scheme, attention=strategy, outputs="sharded")
    generator, batches = torch.Generator().manual_seed(0), {}
    for name, lengths in mixes().items():
        ids = [torch.randint(3, 1024, (length,), generator=generator) for length in lengths]
        batches[name] = {"input_ids": ids[0][None]} if len(ids) == 1 else dict(sp_compile.pack(ids))

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


def balance(scheme: str, lengths: list[int], sp: int) -> dict[str, float]:
    """The most that a rank has over the mean, of causal attention's area and of tokens."""
    layout = token_layout(lengths, sp, scheme)
    seen = np.concatenate([np.arange(1, length + 1) for length in lengths])
    area = (seen[layout.local_index.numpy()] * layout.valid.numpy()).sum(axis=1)
    tokens = np.asarray(layout.tokens_per_rank)
    return {"area": float(area.max() / area.mean()), "tokens": float(tokens.max() / tokens.mean())}


def measure(rounds: int, names: list[str]) -> list[dict[str, Any]]:
    """Medians of all rounds, a row for each mix and setup."""
    servers = {}
    for name, (scheme, strategy, sp) in SETUPS.items():
        servers[name] = Server(name, __file__, [scheme, strategy], sp, 1)
    found: dict[tuple[str, str], list[float]] = {(mix, name): [] for mix in names for name in servers}
    rows = []
    try:
        for mix in names:
            for server in servers.values():
                server.ask(f"seconds {mix}")  # compiles
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


def table(rows: list[dict[str, Any]]) -> str:
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
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    rows = measure(options.rounds, options.mixes)
    print(table(rows))
    ranks = {
        name: {scheme: balance(scheme, lengths, 8) for scheme in ("contiguous", "zigzag", "whole", "chunked")}
        for name, lengths in mixes().items()
    }
    print(json.dumps(ranks, indent=1))
    if options.json is not None:
        result = {"machine": machine(), "versions": versions(), "rounds": options.rounds, "rows": rows,
                  "most over mean on 8 ranks": ranks}  # fmt: skip
        write(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(run, sys.argv[2:])
    else:
        main()
