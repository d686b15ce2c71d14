"""Changes of placement become index selections and functional collectives that move the right rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from sp_compile import mesh
from sp_compile.graph_text import lines
from sp_compile.layout import token_layout
from tests.passes.graphs import LENGTHS, Ranks, after, calls, embeds, ops_of, qkv, small

COLLECTIVES = ("all_gather_into_tensor", "all_reduce")


def causal(x: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv(x, 1, 1)
    rows = torch.arange(x.shape[1])
    return F.scaled_dot_product_attention(q, k, v, rows[None] <= rows[:, None])


def unlifted(x: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv(x, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, (x @ x.transpose(1, 2)).cumsum(-1)[:, None] > 0)


def key_in_both_orders(x: torch.Tensor) -> Any:
    q, k, v = qkv(x, 1, 1)
    return F.scaled_dot_product_attention(q, k, v), k


CHANGES: dict[str, tuple[Callable[..., Any], int]] = {
    "rows to whole": (lambda x: 2 * x, 1),
    "rows in the last dim to whole": (lambda x: x.transpose(1, 2), 1),
    "whole to rows": (lambda x: x + torch.arange(x.shape[1]).view(1, -1, 1), 1),
    "whole to rows and back": (lambda x: x + (2 * x).cumsum(1), 2),
    "merged dim to whole": (lambda x: (2 * x).view(1, -1, 4), 1),
    "merged dim in front to whole": (lambda x: torch.cat([x, 2 * x]).flatten(0, 1), 1),
    "merged dim from whole": (lambda x: x.view(-1) + (2 * x).cumsum(1).view(-1), 2),
    "rows to rows of another dim": (lambda x: x[..., :1] + (2 * x[..., 0])[:, None], 2),
    "keys": (causal, 2),
    "mask that was not lifted": (unlifted, 3),
    "keys in both orders": (key_in_both_orders, 2),
}


@pytest.mark.parametrize(("forward", "collectives"), CHANGES.values(), ids=CHANGES)
def test_every_change_of_placement_brings_the_right_rows(forward: Callable[..., Any], collectives: int):
    model = small(lambda self, inputs_embeds: forward(inputs_embeds))
    lowered = after("lower_redistributes", model, embeds(12))
    found = ops_of(lowered)
    assert sum(f"_c10d_functional.{name}" in each for each in found for name in COLLECTIVES) == collectives
    assert found.count("_c10d_functional.wait_tensor") == collectives
    assert not {"redistribute", "select_rows", "row_numbers"} & set(found)
    for lengths, sp, scheme in ((LENGTHS, 2, "zigzag"), ((4, 9), 3, "contiguous"), ((1, 2), 4, "zigzag")):
        inputs = embeds(12, lengths)
        program = after("localize_shapes", model, embeds(12), sp=sp)
        expected = forward(inputs["inputs_embeds"])
        for outputs in Ranks(program, inputs, token_layout(lengths, sp, scheme, min_shard_length=2)).outputs():
            wanted = expected if isinstance(expected, tuple) else (expected,)
            torch.testing.assert_close(tuple(outputs), wanted, atol=1e-5, rtol=1e-5)


def test_collectives_run_over_dense_rows_in_front():
    program = after("localize_shapes", lambda self, inputs_embeds: (2 * inputs_embeds).transpose(1, 2))
    (gather,) = calls(program, "_c10d_functional.all_gather_into_tensor")
    part = gather.args[0].meta["val"]
    assert part.is_contiguous()
    assert part.shape[0].node.expr == program.symbols["shard_length"].node.expr
    assert gather.args[1:] == (2, "pretend")


def test_every_rank_has_the_same_graph():
    def text(rank: int) -> list[str]:
        with mock.patch.object(mesh, "pretend", lambda sp, _: mesh.Group(sp, rank, "pretend")):
            return list(lines(after("localize_shapes", lambda self, inputs_embeds: causal(inputs_embeds), embeds(12))))

    assert text(0) == text(1)
    assert any("local_index" in each for each in text(0))


def test_one_rank_has_no_collectives():
    program = after("lower_redistributes", lambda self, inputs_embeds: causal(inputs_embeds), embeds(12), sp=1)
    assert not any("c10d" in each or "index_select" in each for each in ops_of(program))


SELECTED = {
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "last two": lambda x: x[:, -2:],
    "numbered": lambda x: x[:, torch.tensor([-1, 0])],
}


@pytest.mark.parametrize("at", SELECTED.values(), ids=SELECTED)
def test_selected_token_rows_are_summed_over_ranks(at: Callable[..., Any]):
    program = after("localize_shapes", lambda self, inputs_embeds: at(2 * inputs_embeds))
    collectives = [each for each in ops_of(program) if "c10d" in each]
    assert collectives == ["_c10d_functional.all_reduce", "_c10d_functional.wait_tensor"]
    for lengths in (LENGTHS, (7,)):
        inputs = embeds(8, lengths)
        for outputs in Ranks(program, inputs, token_layout(lengths, 2, min_shard_length=2)).outputs():
            torch.testing.assert_close(outputs[0], at(2 * inputs["inputs_embeds"]))
