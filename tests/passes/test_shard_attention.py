"""Queries stay on their rank; keys, values and what masks them come in the order in which ranks stack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile import ops
from sp_compile.errors import ConfigError, StrategyError
from sp_compile.layout import token_layout
from sp_compile.needs import Fetch, Reach
from sp_compile.pipeline import build_pipeline
from sp_compile.placements import Gathered, Shard, describe
from sp_compile.program import placement
from tests.passes.graphs import LENGTHS, after, call, calls, check_placements, embeds, packed, placed, qkv, repeated


def attention(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    q, k, v = qkv(x)
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), mask)


def causal(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    queries, keys = position_ids[:, None, :, None], position_ids[:, None, None, :]
    return attention(inputs_embeds, keys <= queries)


def unlifted(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    scores = inputs_embeds @ inputs_embeds.transpose(1, 2)
    return attention(inputs_embeds, scores.cumsum(-1)[:, None] > 0)


def test_keys_values_and_masks_of_keys_are_gathered_in_padded_order_and_queries_stay():
    program = after("shard_attention", causal, packed(32))
    q, k, v, operands, *_, valid, _ = call(program, "sp_compile.attention").args
    assert [describe(placement(each)) for each in (q, k, v)] == ["Shard(2)", "Gathered(2)", "Gathered(2)"]
    assert sorted(describe(placement(each)) for each in operands) == ["Gathered(3)", "Shard(2)"]
    assert [k.meta["val"].shape[1], v.meta["val"].shape[1]] == [2, 2]  # not repeated
    assert valid.meta["index_input"] == "gathered_valid"
    assert placed(program, "sp_compile.attention") == ["(Shard(2), Shard(2))"]
    assert program.fallbacks == []


def test_gathers_to_normal_order_are_dropped():
    before = placed(after("propagate_placements", causal, packed(32)), "redistribute")
    found = placed(after("shard_attention", causal, packed(32)), "redistribute")
    assert (before.count("Replicate"), found.count("Replicate")) == (2, 0)
    assert sorted(set(found)) == ["Gathered(2)", "Gathered(3)", "Shard(1)"]


def test_a_mask_that_was_not_lifted_is_cut_along_queries_and_reordered_along_keys():
    program = after("shard_attention", unlifted, embeds(32))
    (mask,) = call(program, "sp_compile.attention").args[3]
    assert describe(placement(mask)) == "QueriesByKeys(1, 2)"
    assert describe(placement(mask.args[0])) == "Shard(1)"


def test_attentions_with_the_same_mask_share_its_reordered_operands():
    def twice(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        mask = position_ids[:, None, None, :] <= position_ids[:, None, :, None]
        return attention(inputs_embeds, mask) + attention(2 * inputs_embeds, mask)

    first, second = calls(after("shard_attention", twice, packed(32)), "sp_compile.attention")
    assert first.args[3] == second.args[3]
    assert first.args[1] is not second.args[1]


@pytest.mark.parametrize(("forward", "inputs"), [(causal, packed), (unlifted, embeds)], ids=["lifted", "not lifted"])
def test_every_rank_computes_its_rows_of_the_attention(forward: Any, inputs: Any):
    program = after("plan_attention", forward, inputs(32))
    for lengths, sp, scheme in ((LENGTHS, 2, "zigzag"), ((4, 9), 3, "contiguous"), ((1, 2), 4, "zigzag")):
        layout = token_layout(lengths, sp, scheme, min_shard_length=2)
        assert check_placements(program, inputs(32, lengths), layout) > 10


def test_one_rank_keeps_its_keys():
    program = after("shard_attention", causal, packed(32), sp=1)
    assert calls(program, "redistribute") == []
    assert ops.AttentionArgs(*call(program, "sp_compile.attention").args).valid is None


def test_an_unknown_strategy_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown attention strategy 'allgather'; did you mean 'allgather_kv'\?"):
        build_pipeline(attention="allgather")


def local_and_global(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """A layer of a window of 3, and one that sees all before."""
    rows = torch.arange(inputs_embeds.shape[1])
    causal = rows[None, :] <= rows[:, None]
    near = causal & (rows[None, :] > rows[:, None] - 3)
    return attention(inputs_embeds, near[None, None]) + attention(2 * inputs_embeds, causal[None, None])


def keys_of(options: dict[str, Any], last: str = "shard_attention", **more: Any) -> list[str]:
    program = after(last, local_and_global, embeds(32), options={"shard_attention": options}, **more)
    for node in calls(program, "sp_compile.attention"):
        k, v = node.args[1:3]
        assert placement(k) == placement(v)
        valid = ops.AttentionArgs(*node.args).valid.meta["index_input"]
        assert valid == {"": "gathered", "local": "local"}.get(placement(k).of, placement(k).of[:-2]) + (
            f"_valid{placement(k).of[-2:] if placement(k).of.startswith('reach') else ''}"
        )
    return [describe(placement(node.args[1])) for node in calls(program, "sp_compile.attention")]


def test_what_is_fetched_is_what_the_rule_reaches():
    assert keys_of({"strategy": "fetch"}) == ["Gathered(2, reach_0)", "Gathered(2, reach_1)"]
    program = after("shard_attention", local_and_global, embeds(32), options={"shard_attention": {"strategy": "fetch"}})
    assert program.fetches == [Fetch(Reach(3, 0)), Fetch(Reach(None, 0))]
    operands = {describe(placement(each)) for node in calls(program, "sp_compile.attention") for each in node.args[3]}
    assert operands == {"Shard(0)", "Gathered(1, reach_0)", "Gathered(1, reach_1)"}


def test_layers_may_have_strategies_of_their_own():
    assert keys_of({"layers": {"0": "window"}}) == ["Gathered(2, reach_0)", "Gathered(2)"]
    assert keys_of({"strategy": "local", "layers": {"1-1": "allgather_kv"}}) == ["Gathered(2, local)", "Gathered(2)"]
    cached = {"cached": "first", "last": "shard_cache"}
    assert keys_of({"strategy": "fetch"}, **cached) == ["Gathered(2)", "Gathered(2)"]  # new keys are shared out


def test_a_strategy_that_does_not_apply_is_refused_with_those_that_do():
    told = (
        r"window for attention 1 at .*test_shard_attention.py:\d+.*; what applies is allgather_kv, fetch, ring, ulysses"
    )
    with pytest.raises(StrategyError, match=told):
        keys_of({"strategy": "window"})
    with pytest.raises(StrategyError, match=r"hybrid for attention 0 .*there is no 2-D mesh; pass one of"):
        keys_of({"strategy": "hybrid"})
    with pytest.raises(StrategyError, match="layers name attention 2, and the model has 2"):
        keys_of({"layers": {"0-2": "fetch"}})
    with pytest.raises(ConfigError, match="layers='first' is no number"):
        keys_of({"layers": {"first": "fetch"}})
    with pytest.raises(ConfigError, match="unknown attention strategy 'windows'; did you mean 'window'"):
        keys_of({"layers": {"0": "windows"}})


def test_heads_are_spread_and_outputs_come_back():
    program = after("shard_attention", causal, packed(32), options={"shard_attention": {"strategy": "ulysses"}})
    node = call(program, "sp_compile.attention")
    q, k, v, operands, *_, valid, _ = node.args
    assert [describe(placement(each)) for each in (q, k, v)] == ["Heads(1, 2 a rank)", *["Heads(1, 1 a rank)"] * 2]
    assert placement(q).lists == ((0, 1), (2, 3))
    assert sorted(describe(placement(each)) for each in operands) == ["Gathered(2)", "Gathered(3)"]
    assert not any(each.args[0].meta.get("placement") == Shard(2) for each in operands)  # known of all, not gathered
    assert valid.meta["index_input"] == "gathered_valid"
    (part,) = node.users
    (back,) = part.users
    assert describe(placement(back)) == "Shard(2)"
    after("localize_shapes", causal, packed(32), options={"shard_attention": {"strategy": "ulysses"}})


def test_a_mask_of_pairs_cannot_be_had_for_some_heads():
    for strategy in ("ulysses", "ring"):
        with pytest.raises(
            StrategyError, match=r"has a value for every query and key.*what applies is allgather_kv, fetch$"
        ):
            after("shard_attention", unlifted, embeds(32), options={"shard_attention": {"strategy": strategy}})


def test_a_row_that_sees_nothing_needs_all_values_at_once():
    """Softmax by hand over a mask that may hide all: such a row is the mean of all values."""

    def forward(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv(inputs_embeds)
        seen = (position_ids[:, None, None, :] > 0) & (position_ids[:, None, None, :] <= position_ids[:, None, :, None])
        scores = (q @ repeated(k).transpose(2, 3)).masked_fill(~seen, torch.finfo(torch.float32).min)
        return scores.softmax(-1) @ repeated(v)

    with pytest.raises(
        StrategyError, match=r"ring .*may see nothing gets the mean of all values; what applies is .*fetch"
    ):
        after("shard_attention", forward, packed(32), options={"shard_attention": {"strategy": "ring"}})


def test_a_ring_attends_to_one_rank_after_another_and_merges():
    program = after("shard_attention", causal, packed(32), sp=4, options={"shard_attention": {"strategy": "ring"}})
    attentions = calls(program, "sp_compile.attention")
    assert [describe(placement(each.args[1])) for each in attentions] == [
        "Gathered(2, local)", *(f"Gathered(2, stage_{i})" for i in range(3))
    ]  # fmt: skip
    assert [each.stage for each in program.fetches] == [(1, 2), (2, 3), (3, 4)]
    for node in attentions:
        q, k, v, operands, *_, valid, partial = node.args
        assert describe(placement(q)) == "Shard(2)"
        assert placement(k) == placement(v)
        assert placement(k).of in {placement(each).of for each in operands if isinstance(placement(each), Gathered)}
        assert valid.meta["index_input"].startswith(placement(k).of[:5])
        assert partial
    assert len(calls(program, "merge_partials")) == 3
    after("localize_shapes", causal, packed(32), sp=4, options={"shard_attention": {"strategy": "ring"}})


def test_one_round_of_many_ranks_is_few_attentions():
    program = after("shard_attention", causal, packed(32), sp=64, options={"shard_attention": {"strategy": "ring"}})
    assert len(calls(program, "sp_compile.attention")) == 1 + 8


def test_heads_are_spread_in_nodes_and_keys_come_from_all():
    options = {"shard_attention": {"strategy": "hybrid"}}
    program = after("shard_attention", causal, packed(32), sp=6, options=options, ranks_per_node=2)
    q, k, v, operands, *_ = call(program, "sp_compile.attention").args
    assert [describe(placement(each)) for each in (q, k, v)] == [
        "Heads(1, 2 a rank, node)", "Heads(1, 1 a rank)", "Heads(1, 1 a rank)"
    ]  # fmt: skip
    assert sorted(describe(placement(each)) for each in operands) == ["Gathered(2, node)", "Gathered(3)"]
    after("overlap_communication", causal, packed(32), sp=6, options=options, ranks_per_node=2)


def test_indices_of_activations_are_gathered_for_heads_and_not_taken_for_known():
    def by_largest(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        limits = inputs_embeds.max(-1)[1][0]
        rows = torch.arange(inputs_embeds.shape[1])
        seen = (rows[None, :] <= rows[:, None]) & (rows[None, :] >= rows[:, None] - limits[:, None])
        return attention(inputs_embeds, seen[None, None])

    after("localize_shapes", by_largest, embeds(32), options={"shard_attention": {"strategy": "ulysses"}})
    after("localize_shapes", by_largest, embeds(32), cached="mixed")
