"""What a rank holds at a time is its share of what one rank holds, and what its strategy is documented to hold."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

import sp_compile
from sp_compile import costs, memory, mesh, needs
from sp_compile.config import compile_config
from sp_compile.layout import TokenLayout, token_layout
from sp_compile.pipeline import build_pipeline
from sp_compile.program import Program
from sp_compile.runtime import ParallelModule
from sp_compile.schedule import Schedule
from sp_compile.steps import Step, index_inputs

transformers = pytest.importorskip("transformers")

TOKENS = 1 << 17
NODE = 2  # ranks of a node, by the strategy hybrid
LENGTHS = (50000, 30001, 20480, 1, 7, 20583, 7001, 2999)
HEADS: dict[str, Any] = {"num_attention_heads": 32, "head_dim": 128, "vocab_size": 64}
MODELS = {
    "llama_8b": lambda: transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_key_value_heads=8, num_hidden_layers=2, **HEADS
    ),
    "attention": lambda: transformers.LlamaConfig(  # has no wide products, beside which what attention holds is little
        hidden_size=4096, intermediate_size=1024, num_key_value_heads=8, num_hidden_layers=2, **HEADS
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, num_key_value_heads=4,
        num_hidden_layers=1, **HEADS
    ),
}  # fmt: skip


class Captured:
    """A model's graph, captured once, of which programs for any ranks are made."""

    def __init__(self, name: str) -> None:
        torch._dynamo.reset()
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(MODELS[name](), attn_implementation="sdpa").bfloat16().eval()
        batch = {**sp_compile.pack([[5] * 40, [6] * 30]), "use_cache": False}
        config = compile_config(outputs="sharded", verify_passes=False)
        self.parallel = ParallelModule(model, mesh.pretend(2, None), config)
        self.parallel.builder.pretend_device(torch.device("cuda"))
        with self.parallel._only_captured(batch) as (compiled, step):
            self.build, self.kind = compiled._build, step.kind
            (self.attention,) = {*compiled._analysis(False).attentions(step.counted)}

    def program(self, strategy: str, sp: int) -> Program:
        """The local graph of a rank."""
        self.parallel.group = mesh.pretend(sp, NODE if strategy == "hybrid" else None)
        self.parallel.builder.schedule = Schedule(build_pipeline(None, strategy, "flex"))
        return self.build(self.kind, {})


captured = lru_cache(maxsize=None)(Captured)


def peak(program: Program, layout: TokenLayout, rank: int = 0) -> memory.Peak:
    """Of a rank of this layout."""
    return memory.peak(program, sizes_of(program, layout, rank))


def sizes_of(program: Program, layout: TokenLayout, rank: int = 0) -> dict[str, int]:
    """True sizes of a rank of this layout."""
    inputs = index_inputs(layout, rank) | needs.index_inputs(layout, rank, program.fetches, apart=True)
    return Step(layout, inputs, promised=True).sizes()


@pytest.mark.parametrize("strategy", ["allgather_kv", "fetch", "ring", "ulysses", "hybrid"])
@pytest.mark.parametrize("model", MODELS)
def test_a_rank_holds_its_share_and_what_its_strategy_is_documented_to(model: str, strategy: str):
    one = captured(model)
    whole = peak(one.program("allgather_kv", 1), token_layout(LENGTHS, 1, "zigzag")).bytes
    for sp in (2, 4, 8) if model != "attention" else (8,):
        if strategy == "hybrid" and sp == NODE:
            continue  # one node, which is Ulysses
        layout = token_layout(LENGTHS, sp, "zigzag")
        found = peak(one.program(strategy, sp), layout)
        documented = costs.held(strategy, layout, one.attention, True, one.parallel.group.nodes)
        assert found.bytes <= 1.1 * (whole / sp + documented), found
        if model != "attention":  # whose widest products are long after what was exchanged is gone
            assert found.bytes <= 1.02 * whole / sp, found


def test_what_is_held_is_counted_once_and_as_long_as_it_is_read():
    """Views are no memory of their own; a collective holds what it sends until its wait, an exchange a copy of it."""

    layout, width = token_layout(LENGTHS, 2, "zigzag"), 2 * 8 * 128 * 2  # of keys and values of a token
    found, rows = peak(captured("attention").program("allgather_kv", 2), layout).values, layout.shard_length
    assert found["all_gather_into_tensor_default"] == 2 * rows * width
    assert found["clone_default"] == rows * width
    assert not any(each.startswith(("wait", "split", "getitem", "permute", "layers")) for each in found)


def test_a_report_says_what_a_rank_holds():
    torch._dynamo.reset()
    with torch.device("meta"):
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
        )
        model = transformers.LlamaForCausalLM(config).eval()
    found = {}
    for outputs in ("full", "sharded"):
        batch = {**sp_compile.pack([[5] * 400, [6] * 300]), "use_cache": False}
        report = sp_compile.explain(model, batch, 2, outputs=outputs)
        found[outputs] = report.peak_bytes
        assert f"{report.peak_bytes} bytes held at most by a rank" in str(report)
    assert found["full"] - found["sharded"] >= 700 * config.vocab_size * 4 // 2
    ids = torch.arange(3, 40)[None]
    report = sp_compile.explain(model.train(), {"input_ids": ids, "labels": ids, "use_cache": False}, 2)
    assert report.peak_bytes is None  # what the backward needs is held too
    assert "held at most" not in str(report)


@pytest.mark.parametrize("strategy", ["allgather_kv", "fetch", "ring", "ulysses"])
def test_nothing_of_the_whole_sequence_is_as_wide_as_a_hidden_state(strategy: str):
    """Of all rows there are keys and values, or some heads; every node counts, those of FlexAttention too."""
    one, sp = captured("attention"), 8
    layout, program = token_layout(LENGTHS, sp, "zigzag"), one.program(strategy, sp)
    heads, kv_heads, dim, hidden = 32, 8, 128, 4096
    keys = 2 * kv_heads * dim
    allowed = {"ulysses": (heads // sp + 2 * kv_heads // sp) * dim, "ring": 1}.get(strategy, keys)  # a ring has a block
    assert allowed < hidden
    assert widest_of_all_rows(program, layout) == allowed


def widest_of_all_rows(program: Program, layout: TokenLayout) -> int:
    """Elements for a row of values that have more rows than twice those of a rank, but for block lists."""
    most = 0
    for node, values in memory.values(program, sizes_of(program, layout)).items():
        for each in values if "block" not in node.name else []:
            if node.op == "call_function" and each.numel() and max(each.shape) > 2 * layout.shard_length:
                most = max(most, each.numel() // max(each.shape))
    return most
