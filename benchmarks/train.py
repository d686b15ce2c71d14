"""A step of training of a small Llama: sp_compile against plain ``torch.compile``, time and peak memory, in one run.

Run ``python benchmarks/train.py`` on an otherwise idle machine; ``--help`` shows what can be chosen. Forward, loss and
backward are timed; all setups keep their processes for the whole run, and rounds visit them in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from prefill import Setup, llama
from servers import Server, answer, serve, spent, write

import sp_compile
from sp_compile.measure import machine, versions

RETURNED = 1 << 20  # bytes from which on glibc gives freed memory back at once, so that a peak is that of tensors
SETUPS = [
    Setup("torch.compile, 1 thread", "compile", 1, 1),
    Setup("torch.compile, 2 threads", "compile", 1, 2),
    Setup("sp=1, 1 thread", "ours", 1, 1),
    Setup("sp=2, 1 thread a rank", "ours", 2, 1),
    Setup("sp=1, only the loss", "loss", 1, 1),
    Setup("sp=2, only the loss", "loss", 2, 1),
    Setup("sp=4, only the loss", "loss", 4, 1),
    Setup("sp=2, loss, gathered again", "again", 2, 1),
    Setup("sp=4, loss, gathered again", "again", 4, 1),
]


def run(kind: str, layers: str, sp: int, threads: int, folder: str) -> None:
    """What a process (or each rank of a launch) runs: a step for each order, timed or its memory measured."""
    torch.set_num_threads(threads)
    model: Any = llama(int(layers)).train()
    if kind == "compile":
        model = torch.compile(model)
    else:
        outputs = "full" if kind == "ours" else "loss"
        model = sp_compile.parallelize(model, sp=sp, outputs=outputs, keep_gathered=kind != "again")

    def step(tokens: int) -> None:
        ids = torch.randint(0, 1024, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def reply(order: str) -> float:
        what, tokens = order.split(":")
        model.zero_grad(set_to_none=False)  # gradients are there before and after: what is measured is the step's own
        return spent(what, lambda: step(int(tokens)))

    answer(folder, sp, reply)


def measure(rounds: int, lengths: list[int], names: list[str], layers: int) -> list[dict[str, Any]]:
    """Median seconds and peak bytes of these setups at every length, for a model of so many layers."""
    servers = []
    try:
        for setup in (each for each in SETUPS if each.name in names):
            servers.append(Server(setup.name, __file__, [setup.kind, str(layers)], setup.sp, setup.threads))
            for length in lengths:  # compile before the next is started
                servers[-1].ask(f"time:{length}")
            print(f"ready: {setup.name}", file=sys.stderr)
        rows = []
        for length in lengths:
            times: dict[str, list[float]] = {each.name: [] for each in servers}
            for _ in range(rounds):
                for each in servers:
                    times[each.name].append(each.ask(f"time:{length}"))
            for each in servers:
                peak = statistics.median(each.ask(f"memory:{length}") for _ in range(3))
                row = {"tokens": length, "setup": each.name, "seconds": statistics.median(times[each.name])}
                rows.append({**row, "peak_bytes": peak})
    finally:
        for each in servers:
            each.end()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, against the first setup."""
    text = ["| tokens | setup | seconds | faster | peak above rest | of it |", "|---|---|---|---|---|---|"]
    base = {row["tokens"]: row for row in rows if row["setup"] == rows[0]["setup"]}
    for row in rows:
        one = base[row["tokens"]]
        text.append(
            f"| {row['tokens']:,} | {row['setup']} | {row['seconds']:.2f} | {one['seconds'] / row['seconds']:.2f}x "
            f"| {row['peak_bytes'] / 1e6:.0f} MB | {row['peak_bytes'] / one['peak_bytes']:.2f}x |"
        )
    return "\n".join(text)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="visits of every setup (default 5)")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 4096], help="lengths of the sequence")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default 4)")
    names = [each.name for each in SETUPS]
    parser.add_argument(
        "--setups", nargs="*", default=names, choices=names, help="ways to run; the first is compared to"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(RETURNED))
    rows = measure(options.rounds, options.tokens, options.setups, options.layers)
    print(table(rows))
    if options.json is not None:
        result = {
            "machine": machine(),
            "versions": versions(),
            "rounds": options.rounds,
            "layers": options.layers,
            "rows": rows,
        }
        write(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(run, sys.argv[2:])
    else:
        main()
