"""How far back an attention sees, as far as its rule proves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile import ops
from sp_compile.needs import Reach
from sp_compile.windows import needed_by, reach_of, window_of
from tests.passes.graphs import after, embeds, qkv, repeated

Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def masked(mask: Mask) -> Any:
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv(inputs_embeds)
        rows = torch.arange(inputs_embeds.shape[1])
        seen = mask(rows[:, None], rows[None, :])
        return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=seen[None, None])

    return forward


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        (lambda q, k: (k <= q) & (k > q - 7), 7),
        (lambda q, k: (k <= q) & (k >= q - 7), 8),
        (lambda q, k: (q - k < 7) & (k <= q), 7),
        (lambda q, k: (q + 3 < k + 10) & (k <= q), 7),
        (lambda q, k: (k <= q) & (k > q - 7) & (k > q - 5), 5),
        (lambda q, k: k <= q, None),
        (lambda q, k: (k <= q) & ((k > q - 7) | (k < 2)), None),  # what begins the row is always seen
        (lambda q, k: (k <= q) & (2 * k > q - 7), None),
        (lambda q, k: (k <= q) & (k // 8 == q // 8), None),  # no more than 8, but another bound for each
        (lambda q, k: (k <= q) & (k.flip(-1) > q - 7), None),
    ],
)
def test_a_window_is_what_a_rule_over_row_numbers_says(mask: Mask, window: int | None):
    program = after("propagate_placements", masked(mask), embeds(32))
    (node,) = ops.attention_nodes(program.graph)
    assert window_of(node, program.tokens) == window


def test_positions_that_come_from_outside_prove_nothing():
    def forward(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv(inputs_embeds)
        rows, keys = position_ids[0][:, None], position_ids[0][None, :]
        seen = ((keys <= rows) & (keys > rows - 7))[None, None]
        return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=seen)

    program = after("propagate_placements", forward, embeds(32) | {"position_ids": torch.arange(11)[None]})
    (node,) = ops.attention_nodes(program.graph)
    assert window_of(node, program.tokens) is None


def test_rows_of_a_batch_have_one_window():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv(inputs_embeds)
        rows = torch.arange(inputs_embeds.shape[1])[None].expand(3, -1)
        queries, keys = rows.reshape(3, 1, -1, 1), rows.reshape(3, 1, 1, -1)
        seen = (keys <= queries) & (keys > queries - 7)
        return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=seen)

    program = after("propagate_placements", forward, {"inputs_embeds": torch.randn(3, 11, 32)})
    (node,) = ops.attention_nodes(program.graph)
    assert window_of(node, program.tokens) == 7


def by_positions(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv(inputs_embeds)
    rows, keys = position_ids[0][:, None], position_ids[0][None, :]
    seen = ((keys <= rows) & (keys > rows - 7))[None, None]
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=seen)


def by_both(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Rows of the whole batch against positions in a request: how far that is depends on where the request begins."""
    q, k, v = qkv(inputs_embeds)
    rows, keys = position_ids[0][:, None], torch.arange(inputs_embeds.shape[1])[None, :]
    seen = ((keys <= rows) & (keys > rows - 7))[None, None]
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=seen)


@pytest.mark.parametrize(
    ("forward", "counted", "reach"),
    [
        (by_positions, True, Reach(7, 0)),
        (by_positions, False, Reach(None, None)),
        (by_both, True, Reach(None, None)),
    ],
)
def test_positions_tell_how_far_where_they_are_known_to_count(forward: Any, counted: bool, reach: Reach):
    program = after("propagate_placements", forward, embeds(32) | {"position_ids": torch.arange(11)[None]})
    (node,) = ops.attention_nodes(program.graph)
    assert reach_of(node, program.tokens, counted) == reach


def jumps(positions: torch.Tensor) -> torch.Tensor:
    """Counts of the jumps up to each row, as transformers tells packed requests apart."""
    return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def by_runs(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> Any:
    return jumps(position_ids), position_ids


def by_runs_of_others(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> Any:
    return jumps(position_ids * 2), position_ids


def by_runs_of_the_first_row(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> Any:
    return jumps(position_ids)[:1].expand(position_ids.shape[0], -1), position_ids


def by_positions_of_the_first_row(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> Any:
    return jumps(position_ids), position_ids[0][None].expand(position_ids.shape[0], -1)


@pytest.mark.parametrize(
    ("numbers", "rows", "window"),
    [
        (by_runs, 1, 7),
        (by_runs, 3, 7),
        (by_runs_of_others, 3, None),
        (by_runs_of_the_first_row, 3, None),
        (by_positions_of_the_first_row, 3, None),
    ],
)
def test_positions_count_where_the_rule_hides_what_lies_behind_a_jump(numbers: Any, rows: int, window: int | None):
    def forward(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv(inputs_embeds)
        runs, places = (each[:, None] for each in numbers(self, inputs_embeds, position_ids))
        queries, keys = places[..., None], places[..., None, :]
        seen = (runs[..., None] == runs[..., None, :]) & (keys <= queries) & (keys > queries - 7)
        return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=seen)

    inputs = {"inputs_embeds": torch.randn(rows, 11, 32), "position_ids": torch.arange(11).repeat(rows, 1)}
    program = after("propagate_placements", forward, inputs)
    (node,) = ops.attention_nodes(program.graph)
    assert window_of(node, program.tokens) == window


def written_out(mask: Mask) -> Any:
    """A softmax by hand, with a mask value that leaves rows that see nothing the mean of all values."""

    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv(inputs_embeds)
        rows = torch.arange(inputs_embeds.shape[1])
        scores = q @ repeated(k).transpose(-1, -2)
        scores = scores.masked_fill(~mask(rows[:, None], rows[None, :]), torch.finfo(torch.float32).min)
        return scores.softmax(-1) @ repeated(v)

    return forward


@pytest.mark.parametrize(
    ("mask", "reach"),
    [
        (lambda q, k: (k <= q) & (k > q - 7), Reach(7, 0)),  # every row sees itself
        (lambda q, k: (k <= q) & (k > q - 7) & (k > 3), Reach(None, None)),  # the first rows see nothing
    ],
)
def test_rows_that_may_see_nothing_need_all_keys(mask: Mask, reach: Reach):
    program = after("propagate_placements", written_out(mask), embeds(32))
    (node,) = ops.attention_nodes(program.graph)
    assert ops.AttentionArgs(*node.args).empty_mean
    assert needed_by(node, program.tokens) == reach
    assert reach_of(node, program.tokens) == Reach(7, 0)


@pytest.mark.parametrize(
    ("mask", "reach"),
    [
        (lambda q, k: k <= q, Reach(None, 0)),
        (lambda q, k: k < q, Reach(None, None)),  # a row that sees not even itself
        (lambda q, k: (k <= q + 3) & (k > q - 7), Reach(7, 3)),
        (lambda q, k: q - k >= 0, Reach(None, 0)),
        (lambda q, k: (k - q).abs() < 4, Reach(None, None)),
        (lambda q, k: (k <= q) | (k < 5), Reach(None, None)),
    ],
)
def test_how_far_back_and_ahead(mask: Mask, reach: Reach):
    program = after("propagate_placements", masked(mask), embeds(32))
    (node,) = ops.attention_nodes(program.graph)
    assert reach_of(node, program.tokens) == reach
