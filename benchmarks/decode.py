"""Decoding with a sharded cache: time per step against the context's length, and whole generations.

Run ``python benchmarks/decode.py`` on an otherwise idle machine; ``--help`` shows what can be chosen. Setups live in
processes of their own and are visited in turn. For steps at a given context the cache is filled with random keys and
values, the same number of tokens on each setup: what is in them does not change how long a step takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prefill import llama
from servers import Server, answer, serve, write

import sp_compile
from sp_compile import kernels
from sp_compile.measure import machine, versions
from sp_compile.steps import Kept

CONTEXTS = [1024, 2048, 4096, 8192, 16384, 32768]
STEPS = 8  # of which the median counts
REQUESTS = [1000, 37, 1, 600, 410, 3, 250, 90]
NEW = 32
SETUPS = {"transformers": ("whole", 1), "sp=1": ("ours", 1), "sp=2": ("ours", 2)}  # one thread a rank


class Clock:
    """Seconds spent in a function, summed until they are read."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run, self.spent = run, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.run(*args, **kwargs)
        finally:
            self.spent += time.perf_counter() - start

    def read(self) -> float:
        spent, self.spent = self.spent, 0.0
        return spent


def requests() -> list[torch.Tensor]:
    """Prompts of the whole generations."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 1024, (length,), generator=generator) for length in REQUESTS]


class Whole:
    """transformers alone."""

    def __init__(self) -> None:
        from transformers.integrations import sdpa_attention

        self.model: Any = llama()
        self.clock = Clock(torch.nn.functional.scaled_dot_product_attention)
        sdpa_attention.torch.nn.functional.scaled_dot_product_attention = self.clock

    def step(self, context: int) -> Callable[[], None]:
        from transformers import DynamicCache

        cache, config = DynamicCache(config=self.model.config), self.model.config
        for layer in range(config.num_hidden_layers):
            shape = (1, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
            cache.update(torch.randn(shape), torch.randn(shape), layer)

        def run() -> None:
            with torch.no_grad():
                self.model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)

        return run

    def generate(self) -> None:
        prompts = requests()
        longest = max(map(len, prompts))
        ids = torch.stack([torch.nn.functional.pad(each, (longest - len(each), 0)) for each in prompts])
        mask = torch.stack([torch.arange(longest) >= longest - len(each) for each in prompts]).long()
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        self.model.generate(ids, attention_mask=mask, use_cache=True, **options)


class Ours:
    """The parallel model."""

    def __init__(self, sp: int) -> None:
        self.model = sp_compile.parallelize(llama(), sp=sp)
        self.clock = Clock(kernels.attend)
        kernels.attend = self.clock  # type: ignore[assignment]

    def step(self, context: int) -> Callable[[], None]:
        cache = sp_compile.ShardedCache(self.model)
        ids = torch.randint(3, 1024, (1, 2))
        with torch.no_grad():
            self.model(input_ids=ids, past_key_values=cache)
        step, _ = cache.begin({"input_ids": torch.zeros(1, context - 2, dtype=torch.int64)}, "zigzag")
        rows = step.index_inputs["kept_rows"].numel()
        kept = [torch.randn(*each.shape[:2], rows, each.shape[3]) for each in cache.tensors]
        cache.commit(Kept(kept, [None] * len(kept)))

        def run() -> None:
            with torch.no_grad():
                self.model(input_ids=torch.tensor([[7]]), past_key_values=cache)

        return run

    def generate(self) -> None:
        sp_compile.generate(self.model, requests(), max_new_tokens=NEW, eos_token_id=-1)


def run(kind: str, sp: int, threads: int, folder: str) -> None:
    """What each process runs."""
    torch.set_num_threads(threads)
    setup = Whole() if kind == "whole" else Ours(sp)
    steps: dict[int, Callable[[], None]] = {}

    def reply(order: str) -> float:
        what, _, context = order.partition(":")
        if what == "generate":
            start = time.perf_counter()
            setup.generate()
            return time.perf_counter() - start
        if what == "fill":
            steps.clear()
            steps[int(context)] = setup.step(int(context))
            steps[int(context)]()  # compiles at the first
            return 0.0
        times, attention = [], []
        for _ in range(STEPS):
            setup.clock.read()
            start = time.perf_counter()
            steps[int(context)]()
            times.append(time.perf_counter() - start)
            attention.append(setup.clock.read())
        return statistics.median(attention if what == "attention" else times)

    answer(folder, sp, reply)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="visits of each setup at each context")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens in the cache")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(run, chosen.serve)
        return
    servers = [Server(name, __file__, [kind], sp, 1) for name, (kind, sp) in SETUPS.items()]
    found: dict[str, Any] = {"machine": machine(), "versions": versions(), "rounds": chosen.rounds,
                             "step_seconds": {}, "attention_seconds": {}}  # fmt: skip
    try:
        for context in chosen.contexts:
            for server in servers:
                server.ask(f"fill:{context}")
            for what in ("step", "attention"):
                times: dict[str, list[float]] = {each.name: [] for each in servers}
                for _ in range(chosen.rounds):
                    for server in servers:
                        times[server.name].append(server.ask(f"{what}:{context}"))
                found[f"{what}_seconds"][context] = {name: statistics.median(each) for name, each in times.items()}
            print(f"context of {context}", file=sys.stderr)
        for server in servers:
            server.ask("generate")  # compiles
        whole: dict[str, list[float]] = {each.name: [] for each in servers}
        for _ in range(chosen.rounds):
            for server in servers:
                whole[server.name].append(server.ask("generate"))
        found["generate_seconds"] = {name: statistics.median(each) for name, each in whole.items()}
    finally:
        for server in servers:
            server.end()
    show(found)
    if chosen.json:
        write(chosen.json, json.dumps(found, indent=2) + "\n")


def show(found: dict[str, Any]) -> None:
    """Print the figures."""
    for context, steps in found["step_seconds"].items():
        attention = found["attention_seconds"][context]
        print(f"\n{context} tokens in the cache")
        for name, value in steps.items():
            print(f"  {name:14} step {value * 1e3:8.2f} ms   attention {attention[name] * 1e3:8.2f} ms")
        print(f"  attention at sp=2 against sp=1 {attention['sp=2'] / attention['sp=1']:.2f}x")
    print(f"\n{len(REQUESTS)} requests of {min(REQUESTS)} to {max(REQUESTS)} tokens, {NEW} new ones each")
    for name, value in found["generate_seconds"].items():
        print(f"  {name:14} {value:6.2f} s")


if __name__ == "__main__":
    main()
