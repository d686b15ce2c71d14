"""Every value gets a placement, conflicts become redistributes, and what cannot be sharded is gathered and recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile.layout import token_layout
from sp_compile.placements import describe
from sp_compile.program import placement
from tests.passes.graphs import LENGTHS, after, call, calls, check_placements, embeds, ops_of, packed, placed, small


def last(forward: Any, inputs: Any = None, **config: Any) -> Any:
    return after("propagate_placements", forward, inputs, **config)


def test_values_follow_their_inputs_without_redistributes():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return F.linear(F.silu(inputs_embeds), self.weight).transpose(1, 2)

    program = last(small(forward, weight=torch.randn(3, 8)))
    assert ops_of(program) == ["redistribute", "aten.silu", "aten.linear", "aten.transpose"]
    assert [describe(placement(node)) for node in program.graph.nodes if node.op == "call_function"] == [
        "Shard(1)", "Shard(1)", "Shard(1)", "Shard(2)"]  # fmt: skip


def test_a_table_read_at_the_tokens_is_computed_in_parts():
    def forward(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        angles = position_ids[..., None] * self.frequencies
        return inputs_embeds * angles.cos()

    program = last(small(forward, frequencies=torch.randn(8)), packed())
    assert placed(program, "aten.cos") == ["Shard(1)"]
    assert [each.args[0].name for each in calls(program, "redistribute")] == ["position_ids", "inputs_embeds"]


def test_a_replicated_value_that_is_also_read_whole_stays_whole():
    def forward(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> Any:
        angles = position_ids[..., None].cos()
        return inputs_embeds * angles, angles.sum()

    program = last(forward, packed())
    assert placed(program, "aten.cos") == ["Replicate"]
    assert sorted(placed(program, "redistribute")) == ["Shard(1)", "Shard(1)"]
    assert program.fallbacks == []


def test_two_readers_of_the_same_change_share_one_redistribute():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> Any:
        doubled = 2 * inputs_embeds
        return doubled.sum(1), doubled.amax(1)

    program = last(forward)
    assert placed(program, "redistribute") == ["Shard(1)", "Replicate"]


def test_an_op_without_a_rule_is_gathered_and_recorded_with_its_line_and_bytes():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        x = (2 * inputs_embeds).transpose(1, 2)
        for _ in range(2):
            x = x + F.conv1d(x, self.kernel, padding=1)
        return x

    program = last(small(forward, kernel=torch.randn(8, 8, 3)), sp=4)
    (fallback,) = program.fallbacks
    assert (fallback.op, fallback.count, fallback.reason) == ("aten.conv1d", 2, "no rule")
    line = forward.__code__.co_firstlineno + 3
    assert fallback.source == f"passes/test_propagate_placements.py:{line}"
    assert fallback.bytes == 2 * (8 * sum(LENGTHS) * 4 * 3 // 4)  # 3 of 4 parts of f32[1, 8, T] come from other ranks
    assert placed(program, "aten.conv1d") == ["Replicate", "Replicate"]
    assert placed(program, "redistribute") == ["Shard(1)", *2 * ["Replicate", "Shard(2)"]]
    assert check_placements(program, embeds(), token_layout(LENGTHS, 4)) > 0


def test_fallbacks_of_different_ops_lines_and_reasons_are_counted_apart():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> Any:
        doubled = 2 * inputs_embeds
        first = doubled.sum(1)
        second = doubled.sum(1)
        return first, second, doubled.sum(), doubled.cumsum(1)

    found = [(each.op, each.count, each.reason) for each in last(forward).fallbacks]
    over = "runs over the token dim"
    assert found == [("aten.sum", 1, over), ("aten.sum", 1, over), ("aten.sum", 1, "reduces over all dims"),
                     ("aten.cumsum", 1, over)]  # fmt: skip


def test_what_follows_a_gathered_op_is_cut_again_only_where_it_meets_rows():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        whole = (2 * inputs_embeds).cumsum(1)
        return inputs_embeds + 3 * whole

    program = last(forward)
    assert placed(program, "aten.cumsum") == ["Replicate"]
    assert placed(program, "aten.add") == ["Shard(1)"]
    assert placed(program, "redistribute") == ["Shard(1)", "Replicate", "Shard(1)"]
    assert check_placements(program, embeds(), token_layout(LENGTHS, 2)) > 0


@pytest.mark.parametrize("sp", [1, 2])
def test_one_rank_moves_nothing(sp: int):
    program = last(lambda self, inputs_embeds: (2 * inputs_embeds).sum(1), sp=sp)
    assert len(calls(program, "redistribute")) == (0 if sp == 1 else 2)
    assert len(program.fallbacks) == (0 if sp == 1 else 1)


def test_a_model_that_starts_with_an_op_without_a_rule_falls_back():
    program = last(lambda self, inputs_embeds: inputs_embeds.cumsum(1))
    assert [each.op for each in program.fallbacks] == ["aten.cumsum"]
    assert call(program, "aten.cumsum").args[0].name == "inputs_embeds"
