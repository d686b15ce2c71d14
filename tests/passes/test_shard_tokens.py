"""Token inputs are read through one redistribute to the rank's rows; everything else is left whole."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from sp_compile import ops
from sp_compile.placements import describe
from sp_compile.program import placement
from tests.passes.graphs import after, call, calls, ops_of, packed, small


def test_all_readers_of_the_tokens_read_the_ranks_rows():
    program = after("shard_tokens", lambda self, inputs_embeds: inputs_embeds.sin() + inputs_embeds.cos())
    cut = call(program, "redistribute")
    assert describe(placement(cut)) == "Shard(1)"
    assert [each.name for each in cut.all_input_nodes] == ["inputs_embeds"]
    assert [call(program, op).args[0] for op in ("aten.sin", "aten.cos")] == [cut, cut]


def test_token_ids_are_cut_before_the_embedding():
    def forward(self: Any, input_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(input_ids, self.table)

    program = after("shard_tokens", small(forward, table=torch.randn(9, 4)), {"input_ids": torch.arange(8)[None]})
    assert ops_of(program) == ["redistribute", "aten.embedding"]
    assert call(program, "aten.embedding").args[1] is call(program, "redistribute")


def test_positions_masks_and_weights_stay_whole():
    def forward(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return inputs_embeds * self.gain + position_ids[..., None]

    program = after("shard_tokens", small(forward, gain=torch.randn(8)), packed())
    assert [each.args[0].name for each in calls(program, "redistribute")] == ["inputs_embeds"]


def test_a_batch_of_rows_is_cut_along_its_second_dim():
    program = after(
        "shard_tokens", lambda self, inputs_embeds: inputs_embeds + 1, {"inputs_embeds": torch.ones(3, 7, 5)}
    )
    assert describe(placement(call(program, "redistribute"))) == "Shard(1)"


def test_integers_that_follow_from_token_ids_stay_whole_up_to_the_embedding():
    def forward(self: Any, input_ids: torch.Tensor) -> Any:
        shifted = input_ids + 1
        return F.embedding(shifted, self.table), input_ids != 3

    program = after("shard_tokens", small(forward, table=torch.randn(9, 4)), {"input_ids": torch.arange(8)[None]})
    assert call(program, "redistribute").args[0] is call(program, "aten.add")
    assert call(program, "aten.ne").args[0].name == "input_ids"


def test_an_op_with_several_outputs_reads_the_ranks_rows():
    program = after("shard_tokens", lambda self, inputs_embeds: inputs_embeds.split(4, -1))
    assert len(calls(program, "redistribute")) == 1


def test_one_rank_cuts_nothing():
    program = after("shard_tokens", lambda self, inputs_embeds: 2 * inputs_embeds, sp=1)
    assert ops_of(program) == ["aten.mul"]
    assert program.graph.find_nodes(op="call_function", target=ops.redistribute) == []
