"""Collectives begin as soon as their input is there, and work that does not need them comes before their wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile.collectives import depends, is_heavy, is_start, is_wait, shadows
from sp_compile.errors import ConfigError
from sp_compile.invariants import OVERLAPPED, Violation
from sp_compile.layout import token_layout
from sp_compile.pipeline import build_pipeline
from sp_compile.program import Program, op_name
from tests.passes.graphs import LENGTHS, Ranks, after, embeds, outputs, run_whole, small

WIDTH, HEADS = 16, 4


def layers(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Two layers of attention, queries first, as models are written."""
    x = inputs_embeds
    for weights in (self.first, self.second):
        q, k, v = (F.linear(x, each).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in weights.chunk(3))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return x


def model() -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    return small(
        layers, **{name: torch.randn(3 * WIDTH, WIDTH, generator=generator) / 4 for name in ("first", "second")}
    )


def program(
    strategy: str = "allgather_kv", sp: int = 2, last: str = "overlap_communication", **options: Any
) -> Program:
    chosen = {
        "shard_attention": {"strategy": strategy},
        "minimize_communication": {"operations_per_byte": 0},
        "overlap_communication": options,
    }
    return after(last, model(), embeds(WIDTH), sp=sp, options=chosen)


def order(program: Program) -> list[str]:
    """Beginnings, waits and work, a letter each: collective, wait, product, attention."""
    letters = []
    for node in program.graph.nodes:
        if is_start(node) or is_wait(node):
            letters.append("c" if is_start(node) else "w")
        elif is_heavy(node):
            letters.append("a" if op_name(node).endswith("attention") else "p")
    return letters


def test_queries_are_computed_while_keys_and_values_travel():
    before, found = ("".join(order(program(last=last))) for last in ("lower_attention", "overlap_communication"))
    assert before == "pppcwapppcwacw"
    assert found == "ppcpwappcpwacw"
    collectives = shadows(program().graph)
    assert [[op_name(each) for each in work] for work in collectives.values()] == [["aten.linear"]] * 2 + [[]]


def test_a_block_of_a_ring_travels_while_the_one_before_is_attended_to():
    found = "".join(order(program("ring", sp=4)))
    assert found.startswith("ppccpawcawawa")  # two at a time
    assert "".join(order(program("ring", sp=4, in_flight=1))).startswith("ppcpawcawcawa")
    assert "".join(order(program("ring", sp=4, in_flight=3))).startswith("ppcccpawawawa")
    sources = [node.args[0] for node in program("ring", sp=4).graph.nodes if is_wait(node)]
    stages = [node.args[3].meta["index_input"] for node in sources[:3]]
    assert stages == ["fetched_rows_0", "fetched_rows_1", "fetched_rows_2"]  # nearest first


def test_exchanges_name_the_collective_before_them():
    """So that generated code begins them in the same order on all ranks."""
    first, *others = [node for node in program("ring", sp=4).graph.nodes if is_start(node)]
    assert len(first.args) == 5
    exchanges = [i for i, node in enumerate(others) if op_name(node) == "sp_compile.exchange_rows"]
    assert len(exchanges) == 5
    named = [i for i in exchanges if len(others[i].args) > 5]
    assert all(others[i].args[5] is [first, *others][i] for i in named)
    assert [i for i in exchanges if i not in named] == [2]  # the next layer's first, computed from what those brought
    assert depends(others[2], others[1])


def test_parts_of_a_ring_are_merged_before_the_next_is_attended_to():
    found = [op_name(each) for each in program("ring", sp=4).graph.nodes]
    steps = [each.rpartition(".")[2] for each in found if each in ("sp_compile.attention", "merge_partials")]
    assert steps == 2 * ["attention", *3 * ["attention", "merge_partials"]]
    packed = [node for node in program("ring", sp=4).graph.nodes if is_start(node)]
    assert len({node.args[0] for node in packed[:3]}) == 1


def test_what_is_computed_stays_the_same():
    inputs = embeds(WIDTH)
    whole = program(last="normalize")
    expected = outputs(whole, run_whole(whole, inputs))
    for found in Ranks(program(), inputs, token_layout(LENGTHS, 2, min_shard_length=2)).outputs():
        torch.testing.assert_close(found, expected)


def test_a_wait_before_its_time_and_a_late_beginning_are_found():
    early = program()
    wait = next(node for node in early.graph.nodes if is_wait(node))
    work = next(node for node in early.graph.nodes if node in shadows(early.graph)[wait.args[0]])
    work.prepend(wait)
    with pytest.raises(Violation, match="a wait behind all work that does not need it"):
        OVERLAPPED.check(early)
    late = program()
    start = next(node for node in late.graph.nodes if is_start(node))
    next(iter(shadows(late.graph)[start])).append(start)
    with pytest.raises(Violation, match="a collective before all work that it does not need"):
        OVERLAPPED.check(late)


def test_without_ranks_nothing_moves():
    alone = [node.name for node in program(sp=1).graph.nodes]
    assert alone == [node.name for node in program(sp=1, last="lower_attention").graph.nodes]


def test_at_least_one_collective_travels():
    with pytest.raises(ConfigError, match="in_flight=0 collectives at a time are too few; pass at least 1"):
        build_pipeline([{"overlap_communication": {"in_flight": 0}}])
