"""What crosses crosses once: keys with values, a value in both orders, nothing repeated for grouped queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import sp_compile
from sp_compile.layout import token_layout
from sp_compile.placements import Shard, describe
from sp_compile.program import placement
from tests.passes.graphs import LENGTHS, after, call, calls, check_placements, embeds, placed, qkv, repeated, small

JOINED, APART = {}, {"minimize_communication": {"join_keys_and_values": False}}


def grouped(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv(inputs_embeds)
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)


def last(forward: Any, options: Mapping[str, Any] = JOINED, **config: Any) -> Any:
    return after("minimize_communication", forward, embeds(32), options=options, **config)


def gathers(program: Any) -> list[Any]:
    """Redistributes that move floats between ranks."""
    return [node for node in calls(program, "redistribute")
            if isinstance(placement(node.args[0]), Shard) and not isinstance(placement(node), Shard)
            and node.meta["val"].is_floating_point()]  # fmt: skip


def test_keys_and_values_cross_together_and_not_repeated():
    output, joined = sorted(gathers(last(grouped)), key=lambda node: node.meta["val"].dim(), reverse=True)
    assert list(output.meta["val"].shape[1:2]) == [4]
    assert joined.meta["val"].dim() == 2
    assert joined.meta["val"].shape[1] == 2 * 2 * 4  # keys and values x kv heads x width
    assert joined.args[0].target is torch.ops.aten.cat.default
    assert describe(placement(joined)) == "Gathered(0)"
    assert check_placements(last(grouped), embeds(32), token_layout(LENGTHS, 2, min_shard_length=2)) > 20


def test_keys_and_values_cross_apart_where_asked():
    found = [list(node.meta["val"].shape[1:2]) for node in gathers(last(grouped, APART))]
    assert found == [[2], [2], [4]]


@pytest.mark.parametrize("options", [JOINED, APART], ids=["joined", "apart"])
@pytest.mark.parametrize("sp", [2, 4])
def test_bytes_are_those_of_the_unrepeated_keys_and_values(options: Mapping[str, Any], sp: int):
    pipeline = [{name: dict(options.get(name, {}))} for name in sp_compile.pipeline.registered_passes()]
    report = sp_compile.explain(small(grouped), embeds(32, (37,)), sp=sp, config={"pipeline": pipeline})
    rows = report.shard_length * 4  # a float for each row of a rank
    found = sorted(each.bytes_sent for each in report.collectives)
    keys, output = 2 * 4 * rows * (sp - 1), 4 * 4 * rows * (sp - 1)
    assert found == sorted([2 * keys, output] if options is JOINED else [keys, keys, output])


def test_a_value_needed_in_both_orders_crosses_once():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> Any:
        q, k, v = qkv(inputs_embeds)
        return F.scaled_dot_product_attention(q, repeated(k), repeated(v)), k

    program = last(forward, APART)
    _, key = program.graph.output_node().args[0]
    padded = call(program, "sp_compile.attention").args[1]
    assert [describe(placement(each)) for each in (key, padded)] == ["Replicate", "Gathered(2)"]
    assert key.args[0] is padded
    assert len(gathers(program)) == 3
    assert check_placements(program, embeds(32), token_layout(LENGTHS, 3, min_shard_length=2)) > 10


def test_a_value_gathered_for_two_readers_crosses_once():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> Any:
        q, k, v = qkv(inputs_embeds)
        first = F.scaled_dot_product_attention(q, repeated(k), repeated(v))
        return F.scaled_dot_product_attention(first, repeated(k), repeated(v), is_causal=True)

    first, second = calls(last(forward, APART), "sp_compile.attention")
    assert first.args[1:3] == second.args[1:3]


def test_keys_that_are_the_values_cross_once():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        q, k, _ = qkv(inputs_embeds)
        return F.scaled_dot_product_attention(q, repeated(k), repeated(k))

    program = last(forward)
    attention = call(program, "sp_compile.attention")
    assert attention.args[1] is attention.args[2]
    assert len(gathers(program)) == 2


def test_keys_and_values_of_different_widths_cross_together():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv(inputs_embeds)
        return F.scaled_dot_product_attention(q, repeated(k), repeated(torch.cat([v, v], -1)))

    program = last(forward)
    assert sorted(list(node.meta["val"].shape)[1:] for node in gathers(program))[-1] == [2 * (4 + 8)]
    assert check_placements(program, embeds(32), token_layout(LENGTHS, 2, min_shard_length=2)) > 20


def test_one_rank_gathers_nothing():
    program = last(grouped, sp=1)
    assert placed(program, "redistribute") == []
    assert calls(program, "aten.cat") == []
