"""Prefill of a small Llama: sp_compile against plain eager and plain ``torch.compile``, in one interleaved run.

Run ``python benchmarks/prefill.py`` on an otherwise idle machine; ``--help`` shows what can be chosen. Every
configuration runs in processes of its own that live through the whole run; rounds visit them in turn, so that what the
machine does besides hits all alike. Medians of all rounds, and their ratios, are printed and written as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from servers import Server, answer, serve, spent, write

import sp_compile
from sp_compile.layout import _build as build_layout
from sp_compile.measure import machine, versions

LENGTHS = {
    "single 2048": [2048],
    "single 4096": [4096],
    "ragged 2048": [1000, 37, 1, 600, 410],
    "ragged 4096": [2000, 64, 1, 7, 1300, 500, 224],
}


@dataclass(frozen=True)
class Setup:
    """One way to run the model."""

    name: str
    kind: str
    sp: int
    threads: int


SETUPS = [
    Setup("eager, 1 thread", "eager", 1, 1),
    Setup("eager, 2 threads", "eager", 1, 2),
    Setup("torch.compile, 1 thread", "compile", 1, 1),
    Setup("torch.compile, 2 threads", "compile", 1, 2),
    Setup("sp=1, 1 thread", "ours", 1, 1),
    Setup("sp=1, 2 threads", "ours", 1, 2),
    Setup("sp=2, 1 thread a rank", "ours", 2, 1),
]


def llama(layers: int = 4) -> torch.nn.Module:
    """A Llama of hidden size 512 with 8 query and 4 key/value heads, random weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def batch_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    """One request as it is, several packed."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(0, 1024, (length,), generator=generator) for length in lengths]
    return dict(sp_compile.pack(rows)) if len(rows) > 1 else {"input_ids": rows[0][None]}


def forward_of(kind: str, sp: int) -> Callable[[dict[str, torch.Tensor]], Any]:
    """The model as the setup runs it."""
    model: Any = llama()
    if kind == "compile":
        model = torch.compile(model)
    elif kind == "ours":
        model = sp_compile.parallelize(model, sp=sp)

    def forward(batch: dict[str, torch.Tensor]) -> Any:
        with torch.no_grad():
            return model(**batch, use_cache=False).logits

    return forward


def run(kind: str, sp: int, threads: int, folder: str) -> None:
    """What a process (or each rank of a launch) runs: a forward for each order, timed or its memory measured."""
    torch.set_num_threads(threads)
    forward = forward_of(kind, sp)

    def reply(order: str) -> float:
        what, name = order.split(":")
        batch = batch_of(LENGTHS[name])
        return spent(what, lambda: forward(batch))

    answer(folder, sp, reply)


def speed(rounds: int) -> dict[str, dict[str, Any]]:
    """Median seconds and peak bytes of every setup and batch."""
    servers = []
    try:
        for setup in SETUPS:
            servers.append(Server(setup.name, __file__, [setup.kind], setup.sp, setup.threads))
            for name in LENGTHS:  # compile before the next is started
                servers[-1].ask(f"time:{name}")
            print(f"ready: {setup.name}", file=sys.stderr)
        times: dict[str, dict[str, list[float]]] = {name: {s.name: [] for s in SETUPS} for name in LENGTHS}
        for each in range(rounds):
            for name in LENGTHS:
                for server in servers:
                    times[name][server.name].append(server.ask(f"time:{name}"))
            print(f"round {each + 1} of {rounds}", file=sys.stderr)
        memory = {
            name: {s.name: statistics.median(s.ask(f"memory:{name}") for _ in range(5)) for s in servers}
            for name in LENGTHS
        }
    finally:
        for server in servers:
            server.end()
    medians = {name: {key: statistics.median(values) for key, values in each.items()} for name, each in times.items()}
    return {"seconds": medians, "peak_bytes": memory}


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """How many times as fast as the better of eager and ``torch.compile``."""
    best = {n: min(seconds[f"{kind}, {text}"] for kind in ("eager", "torch.compile"))
            for n, text in ((1, "1 thread"), (2, "2 threads"))}  # fmt: skip
    return {
        "sp=1 against the better with 1 thread": best[1] / seconds["sp=1, 1 thread"],
        "sp=1 against the better with 2 threads": best[2] / seconds["sp=1, 2 threads"],
        "sp=2 against the better with 1 thread": best[1] / seconds["sp=2, 1 thread a rank"],
        "sp=2 against the better with 2 threads": best[2] / seconds["sp=2, 1 thread a rank"],
    }


def layout_seconds() -> float:
    """``TokenLayout`` of 1,000,000 tokens in 10,000 requests over 64 ranks."""
    cuts = torch.sort(torch.randperm(999_999, generator=torch.Generator().manual_seed(0))[:9_999] + 1).values
    edges = [0, *cuts.tolist(), 1_000_000]
    lengths = tuple(b - a for a, b in itertools.pairwise(edges))
    found = []
    for _ in range(7):
        start = time.perf_counter()
        build_layout.__wrapped__(lengths, 64, "zigzag", 1)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def pass_seconds() -> dict[int, float]:
    """Seconds of all passes by depth, without the capture and the checks between passes."""
    found = {}
    for layers in (4, 8, 16, 32):
        report = sp_compile.explain(llama(layers), {**batch_of(LENGTHS["ragged 2048"]), "use_cache": False}, sp=2)
        found[layers] = sum(step.seconds for step in report.steps)
        torch._dynamo.reset()
    return found


def count_compiles() -> int:
    """Compilations of a rank over 20 different ragged batches, with the default code generation."""
    return max(sp_compile.launch(_many_batches, 2, timeout=1800))


def _many_batches() -> int:
    generator = torch.Generator().manual_seed(0)
    model = sp_compile.parallelize(llama())
    for _ in range(20):
        count = int(torch.randint(1, 9, (1,), generator=generator))
        lengths = torch.randint(1, 300, (count,), generator=generator).tolist()
        with torch.no_grad():
            model(**batch_of([*lengths, 1]), use_cache=False)
    return model.compiles


def start_seconds() -> tuple[float, float]:
    """Until a new process has its first logits, with an empty cache of Inductor on disk and with the one it left."""
    with tempfile.TemporaryDirectory() as cache:
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import prefill; prefill.first_result()"
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        found = []
        for _ in range(2):
            run = subprocess.run(
                [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
            )
            found.append(float(run.stdout.split()[-1]))
    return found[0], found[1]


def first_result() -> None:
    """Seconds that two ranks take from :func:`sp_compile.parallelize` to the first logits."""
    print(max(sp_compile.launch(_first_forward, 2, timeout=900)))


def _first_forward() -> float:
    model = llama()
    start = time.perf_counter()
    parallel = sp_compile.parallelize(model)
    with torch.no_grad():
        parallel(**batch_of(LENGTHS["ragged 2048"]), use_cache=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed forwards of each setup and batch")
    parser.add_argument("--only", choices=["speed", "layout", "passes", "compiles", "start"], action="append")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(run, chosen.serve)
        return
    parts: dict[str, Callable[[], Any]] = {
        "layout": layout_seconds,
        "passes": pass_seconds,
        "start": start_seconds,
        "compiles": count_compiles,
        "speed": lambda: speed(chosen.rounds),
    }
    results: dict[str, Any] = {"machine": machine(), "versions": versions(), "rounds": chosen.rounds}
    for name, part in parts.items():
        if not chosen.only or name in chosen.only:
            results[name] = part()
            show(name, results[name])
            if chosen.json:
                write(chosen.json, json.dumps(results, indent=2) + "\n")


def show(name: str, found: Any) -> None:
    """Print one part's figures."""
    if name != "speed":
        print(f"{name}: {found}")
        return
    for batch, seconds in found["seconds"].items():
        print(f"\n{batch} tokens")
        for setup, value in seconds.items():
            print(f"  {setup:26} {value:7.3f} s   peak {found['peak_bytes'][batch][setup] / 2**20:7.1f} MiB")
        for text, ratio in ratios(seconds).items():
            print(f"  {text:40} {ratio:5.2f}x")
        peaks = found["peak_bytes"][batch]
        for threads in ("1 thread", "2 threads"):
            share = peaks["sp=2, 1 thread a rank"] / peaks[f"eager, {threads}"]
            print(f"  sp=2 peak memory a rank against eager, {threads:9} {share:5.2f}x")


if __name__ == "__main__":
    main()
