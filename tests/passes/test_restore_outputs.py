"""Outputs come back whole and in order, or stay on the ranks where that was asked."""

from __future__ import annotations

from typing import Any

import torch

from sp_compile.layout import token_layout
from sp_compile.placements import REPLICATE, Shard, describe
from sp_compile.program import placement
from tests.passes.graphs import LENGTHS, Ranks, after, call, embeds, placed


def several(self: Any, inputs_embeds: torch.Tensor) -> Any:
    doubled = 2 * inputs_embeds
    return doubled, doubled.transpose(1, 2), doubled.view(-1), torch.arange(3), doubled


def placements(program: Any) -> list[str]:
    return [describe(placement(each)) for each in program.graph.output_node().args[0]]


def test_full_outputs_are_replicated_each_by_one_redistribute():
    program = after("restore_outputs", several)
    assert placements(program) == ["Replicate"] * len(placements(program))
    assert placed(program, "redistribute") == ["Shard(1)", "Replicate", "Replicate", "Replicate"]
    layout = token_layout(LENGTHS, 3, min_shard_length=2)
    expected = several(None, embeds()["inputs_embeds"])
    for found in Ranks(program, embeds(), layout).outputs():
        torch.testing.assert_close(list(found)[:3], list(expected)[:3])


def test_sharded_outputs_stay_on_the_ranks():
    program = after("restore_outputs", several, outputs="sharded")
    assert placements(program)[:4] == ["Shard(1)", "Shard(2)", "Shard(0 of 1x tokens x8)", "Replicate"]
    assert placed(program, "redistribute") == ["Shard(1)"]
    layout = token_layout(LENGTHS, 2, "contiguous", min_shard_length=2)
    for rank, found in enumerate(Ranks(program, embeds(), layout).outputs()):
        rows = layout.local_index[rank]
        torch.testing.assert_close(found[0], 2 * embeds()["inputs_embeds"][:, rows])


def test_outputs_that_are_whole_already_are_not_touched():
    program = after("restore_outputs", lambda self, inputs_embeds: (2 * inputs_embeds).sum(1))
    assert call(program, "aten.sum") in program.graph.output_node().args[0]


def test_rows_in_a_ranks_own_order_do_not_stay_sharded():
    def sorted_rows(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return inputs_embeds[0][inputs_embeds[0].argmax(-1).argsort()]

    program = after("restore_outputs", sorted_rows, outputs="sharded")
    assert placement(program.graph.output_node().args[0][0]) == Shard(0)
    assert "its order of rows is not undone" in [each.reason for each in program.fallbacks]


def test_row_numbers_of_one_rank_do_not_stay_sharded():
    def ranking(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return inputs_embeds[0].argmax(-1).argsort().argsort()

    program = after("restore_outputs", ranking, outputs="sharded")
    assert placement(program.graph.output_node().args[0][0]) == Shard(0)
    assert program.fallbacks


def test_chosen_rows_are_summed_though_outputs_stay_sharded():
    program = after("restore_outputs", lambda self, inputs_embeds: (2 * inputs_embeds)[:, -1:], outputs="sharded")
    assert placement(program.graph.output_node().args[0][0]) == REPLICATE
