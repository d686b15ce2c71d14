"""FlexAttention is written out when it is captured, and raised like any other attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from torch.utils._pytree import tree_leaves

from sp_compile.errors import CaptureError
from sp_compile.layout import token_layout
from sp_compile.ops import AttentionArgs
from tests.passes.graphs import LENGTHS, Ranks, after, call, embeds, ops_of, outputs, packed, qkv, run_whole
from tests.passes.test_raise_attention import wide_nodes

Make = Callable[["Flex", torch.Tensor], Callable[..., torch.Tensor]]


class Flex(nn.Module):
    """FlexAttention with a ``mask_mod`` and a ``score_mod`` that are made in forward."""

    def __init__(self, mask: Make | None = None, score: Make | None = None, **options: Any) -> None:
        super().__init__()
        self.mask, self.score, self.options = mask, score, options
        self.table = nn.Parameter(torch.randn(4, 64), requires_grad=False)
        self.prefix = nn.Parameter(torch.tensor([3]), requires_grad=False)

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> Any:
        tokens = inputs_embeds.shape[1]
        mask = None
        if self.mask is not None:
            mask = create_block_mask(self.mask(self, position_ids), 1, None, tokens, tokens, device="cpu")
        score = None if self.score is None else self.score(self, position_ids)
        return flex_attention(*qkv(inputs_embeds), score, mask, enable_gqa=True, **self.options)


def causal(_: Flex, positions: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda b, h, q, k: k <= q


def documents(_: Flex, positions: torch.Tensor) -> Callable[..., torch.Tensor]:
    starts = (positions == 0).cumsum(-1)
    return lambda b, h, q, k: (k <= q) & (starts[b][q] == starts[b, k])


def prefix(model: Flex, positions: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda b, h, q, k: (k <= q) | (k < model.prefix[b])


def distances(model: Flex, _: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda score, b, h, q, k: score + model.table[h, q - k + 16]


def alibi(model: Flex, _: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda score, b, h, q, k: score - model.table[h, 0] * (q - k)


def softcap(_: Flex, positions: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda score, b, h, q, k: 3 * torch.tanh(score / 3)


CAUSAL = "mask = le(x0, x1)"
DOCUMENTS = "t0 = le(x0, x1); t1 = eq(x2, x3); mask = and(t0, t1)"
TABLE = "t3 = add(t2, 16); t4 = lt(t3, 0); t5 = add(t3, 64); t6 = where(t4, t5, t3); bias = lookup(table0, t6)"
CASES = {
    "no mask": (Flex(), "", 0.5),
    "causal": (Flex(causal), CAUSAL, 0.5),
    "documents": (Flex(documents, scale=0.3), DOCUMENTS, 0.3),
    "prefix of each sequence": (Flex(prefix), "t0 = le(x0, x1); mask = or(t0, x2)", 0.5),
    "relative positions": (
        Flex(None, distances),
        "t0 = sub(x0, x1); t1 = add(t0, 16); t2 = lt(t1, 0); t3 = add(t1, 64); t4 = where(t2, t3, t1); "
        "bias = lookup(table0, t4)",
        0.5,
    ),
    "ALiBi": (Flex(causal, alibi), "mask = le(x0, x1); t0 = sub(x1, x0); t1 = mul(x2, t0); bias = neg(t1)", 0.5),
    "softcap": (
        Flex(causal, softcap),
        "mask = le(x0, x1); t0 = mul(score, 0.5); t1 = div(t0, 3); t2 = tanh(t1); score = mul(t2, 3.0)",
        1.0,
    ),
    "log-sum-exp": (Flex(documents, return_lse=True), DOCUMENTS, 0.5),
    "auxiliary log-sum-exp": (
        Flex(documents, distances, return_aux=AuxRequest(lse=True)),
        f"{DOCUMENTS}; t2 = sub(x1, x0); {TABLE}",
        0.5,
    ),
}


@pytest.mark.parametrize(("model", "rule", "scale"), CASES.values(), ids=CASES)
def test_flex_attention_is_raised_and_computes_the_same(model: Flex, rule: str, scale: float):
    inputs = packed(32)
    program = after("raise_attention", model, inputs)
    attention = AttentionArgs(*call(program, "sp_compile.attention").args)
    assert (attention.rule, attention.scale, attention.empty_mean) == (rule, scale, False)
    assert [each.meta["val"].shape[1] for each in (attention.k, attention.v)] == [2, 2]
    assert program.fallbacks == []
    assert wide_nodes(program) == []
    expected = [each for each in tree_leaves(model(**inputs)) if each is not None]
    found = tree_leaves(outputs(program, run_whole(program, inputs)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["documents", "prefix of each sequence", "relative positions", "softcap"])
def test_flex_attention_computes_the_same_on_ranks(name: str):
    model = CASES[name][0]
    program = after("localize_shapes", model, packed(32), options={"plan_attention": {"kernel": "tiles"}})
    for lengths in (LENGTHS, (1, 2), (30, 15)):
        inputs = packed(32, lengths)
        for (found,) in Ranks(program, inputs, token_layout(lengths, 2, min_shard_length=2)).outputs():
            torch.testing.assert_close(found, model(**inputs), atol=1e-5, rtol=1e-5)


def test_rows_that_see_nothing_are_zero_and_their_log_sum_exp_is_minus_infinity():
    def later(_: Flex, positions: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda b, h, q, k: (k < q) & (k >= 4)

    model = Flex(later, return_lse=True)
    program = after("raise_attention", model, packed(32))
    out, lse = outputs(program, run_whole(program, packed(32)))
    assert (out[:, :, :5] == 0).all()
    assert (lse[:, :, :5] == -torch.inf).all()
    assert lse[:, :, 5:].isfinite().all()


def test_blocks_of_a_mask_are_not_computed():
    program = after(None, Flex(documents), packed(32))
    assert not {"aten.argsort", "aten.sort", "aten.index_put"} & set(ops_of(program))


def test_a_function_of_whole_rows_is_refused():
    def dot(model: Flex, _: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda score, b, h, q, k: score + (model.table[h] * model.table[h]).sum()

    with pytest.raises(CaptureError, match=r"score_mod of flex_attention computes with whole rows \(%mul.*test_flex"):
        after("raise_attention", Flex(None, dot), packed(32))


def test_blocks_without_a_mask_mod_are_refused():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        tokens = inputs_embeds.shape[1]
        counts, indices = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
        blocks = BlockMask.from_kv_blocks(counts, indices, seq_lengths=(tokens, tokens))
        return flex_attention(*qkv(inputs_embeds, 2, 2), block_mask=blocks)

    with pytest.raises(CaptureError, match="without mask_mod hides keys by its blocks alone"):
        after("raise_attention", forward, embeds(24))
