"""Dropout draws by the seed and the place of an element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile.layout import token_layout
from tests.passes.graphs import Ranks, after, embeds, ops_of

LENGTHS = (40, 3)
WIDTH = 64


def twice(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    return torch.stack([F.dropout(inputs_embeds, 0.25), F.dropout(inputs_embeds, 0.25)], dim=-1)


def drawn(sp: int, scheme: str) -> list[torch.Tensor]:
    """What each rank has of ones that went through dropout twice."""
    inputs = {"inputs_embeds": torch.ones_like(embeds(WIDTH, LENGTHS)["inputs_embeds"])}
    program = after("localize_shapes", twice, inputs, sp=sp)
    assert not any("dropout" in each for each in ops_of(program))
    layout = token_layout(LENGTHS, sp, scheme, min_shard_length=2)
    return [outputs[0] for outputs in Ranks(program, inputs, layout).outputs()]


@pytest.mark.parametrize(("sp", "scheme"), [(2, "contiguous"), (3, "zigzag")])
def test_ranks_draw_what_a_rank_alone_would(sp: int, scheme: str):
    (reference, _) = drawn(2, "zigzag")
    for found in drawn(sp, scheme):
        assert torch.equal(found, reference)


def test_one_rank_alone_draws_by_place_where_it_can():
    def halved(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        every_second = inputs_embeds[:, torch.arange(0, inputs_embeds.shape[1], 2)]
        return F.dropout(inputs_embeds, 0.25).sum() + F.dropout(every_second, 0.25).sum()

    program = after("draw_by_position", halved, embeds(WIDTH, LENGTHS), sp=1)
    assert ops_of(program).count("aten.dropout") == 1


def weights(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Weights of two attentions with two heads, ``[2, 2, queries, WIDTH]``, for rows of the identity."""
    values = inputs_embeds[:, None].expand(-1, 2, -1, -1)
    q = 0.1 * values
    by_op = F.scaled_dot_product_attention(q, q, values, dropout_p=0.25)
    return torch.cat([by_op, F.dropout((q @ q.transpose(-1, -2)).softmax(-1), 0.25) @ values])


def drawn_weights(sp: int, scheme: str) -> list[torch.Tensor]:
    inputs = {"inputs_embeds": torch.eye(sum(LENGTHS), WIDTH)[None]}
    program = after("localize_shapes", weights, inputs, sp=sp)
    layout = token_layout(LENGTHS, sp, scheme, min_shard_length=2)
    return [outputs[0] for outputs in Ranks(program, inputs, layout).outputs()]


@pytest.mark.parametrize(("sp", "scheme"), [(2, "contiguous"), (3, "zigzag")])
def test_ranks_drop_the_same_weights_of_attention(sp: int, scheme: str):
    (reference, _) = drawn_weights(2, "zigzag")
    for found in drawn_weights(sp, scheme):
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-7)


def test_weights_of_attention_are_dropped_as_asked():
    found = drawn_weights(2, "zigzag")[0][..., : sum(LENGTHS)]
    kept = found != 0
    assert abs(float(kept.double().mean()) - 0.75) < 4 * (0.75 * 0.25 / kept.numel()) ** 0.5
    torch.testing.assert_close(found[kept] * 0.75 * sum(LENGTHS), torch.ones_like(found[kept]), rtol=0.05, atol=0)
    for first, second in ((kept[0], kept[1]), (kept[:, 0], kept[:, 1])):  # nor do attentions or heads draw alike
        both = (first & second).double()
        assert abs(float(both.mean()) - 0.5625) < 4 * (0.5625 * 0.4375 / both.numel()) ** 0.5


def test_shares_are_as_asked_and_draws_differ():
    found = drawn(2, "zigzag")[0]
    kept = found != 0
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / 0.75))
    share = kept.double().mean()
    assert abs(float(share) - 0.75) < 4 * (0.75 * 0.25 / kept.numel()) ** 0.5
    both = (kept[..., 0] & kept[..., 1]).double().mean()  # two dropouts know nothing of each other
    assert abs(float(both) - 0.5625) < 4 * (0.5625 * 0.4375 / kept[..., 0].numel()) ** 0.5
    rows = kept[0, :, :, 0].double()
    spread = rows.mean(dim=1).std()  # nor do rows
    assert float(spread) == pytest.approx((0.75 * 0.25 / WIDTH) ** 0.5, rel=0.35)
