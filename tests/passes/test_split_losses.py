"""A loss is summed over ranks and divided by the labels of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile import ops
from sp_compile.layout import token_layout
from tests.passes.graphs import Ranks, after, embeds, ops_of

LENGTH = 11


def loss(**options: Any) -> Any:
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        labels = (torch.arange(inputs_embeds.shape[1]) * 3) % 8
        labels = torch.where(labels == 6, -100, labels)
        return F.cross_entropy(inputs_embeds.view(-1, 8), labels, **options)

    return forward


OPTIONS = [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_is_that_of_the_whole_batch(options: dict[str, Any]):
    inputs = embeds(8, (LENGTH,))
    program = after("localize_shapes", loss(**options), inputs)
    assert [each for each in ops_of(program) if "c10d" in each] == [
        "_c10d_functional.all_reduce", "_c10d_functional.wait_tensor"]  # fmt: skip
    assert not program.fallbacks
    wanted = loss(**options)(None, **inputs)
    for (found,) in Ranks(program, inputs, token_layout((LENGTH,), 2, min_shard_length=2)).outputs():
        torch.testing.assert_close(found, wanted)


def test_losses_row_by_row_and_of_class_probabilities_are_left_as_they_are():
    program = after("split_losses", loss(reduction="none"), embeds(8, (LENGTH,)))
    assert not program.graph.find_nodes(op="call_function", target=ops.sum_rows)
