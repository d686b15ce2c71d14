"""Earlier keys and values are seen where they are held, and new ones leave the graph once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile import invariants, ops
from sp_compile.errors import CacheError
from sp_compile.placements import REPLICATE, Gathered, Held, Kept, Shard
from sp_compile.program import placement
from tests.passes.graphs import after, call, calls, embeds, qkv, repeated


def causal(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv(inputs_embeds)
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)


def shared(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Two layers that read the same keys and values."""
    q, k, v = qkv(inputs_embeds)
    once = F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)
    return F.scaled_dot_product_attention(q + once, repeated(k), repeated(v), is_causal=True)


def test_queries_meet_held_keys_and_partial_outputs_are_merged():
    program = after("shard_cache", causal, embeds(32), cached="more")
    new, held = ops.attention_nodes(program.graph)
    assert [placement(each) for each in new.args[:3]] == [Shard(2), Gathered(2), Gathered(2)]
    assert [placement(each) for each in held.args[:3]] == [Gathered(2), Held(2), Held(2)]
    assert sorted(str(placement(each)) for each in held.args[3]) == ["Gathered(0)", "Held(1)"] or held.args[3]
    assert len(calls(program, "merge_partials")) == 1
    kept = [each for each in program.graph.output_node().all_input_nodes if placement(each) == Kept(2)]
    assert len(kept) == 2
    assert program.kept == (None, None)


def test_of_each_request_queries_or_earlier_keys_are_picked():
    program = after("shard_cache", causal, embeds(32), cached="mixed")
    new, held = ops.attention_nodes(program.graph)
    assert [placement(each) for each in new.args[:3]] == [Shard(2), *[Gathered(2, "seen_0")] * 2]
    assert [placement(each) for each in held.args[:3]] == [Gathered(2, "queries_0"), Held(2), Held(2)]
    for whole, past in zip(calls(program, "joined_keys"), (new.args[1], new.args[2]), strict=True):
        assert whole is past
        assert [placement(each) for each in whole.args[:2]] == [Gathered(2), Gathered(2, "past_0")]
    assert [placement(each) for each in call(program, "exchange_partials").args] == [Gathered(2, "queries_0")] * 2
    (whole,) = calls(program, "put_back")
    assert placement(whole) == Shard(2)
    assert program.query_bytes == {None: 4 * (2 * 4 * 4 + 4)}  # heads, queries and outputs of 4 floats, an exponent
    after("localize_shapes", causal, embeds(32), cached="mixed")  # the rules hold, and the local shapes fit


def test_layers_that_share_keys_fetch_earlier_ones_once():
    program = after("shard_cache", shared, embeds(32), cached="mixed")
    assert len(ops.attention_nodes(program.graph)) == 4
    assert len(calls(program, "joined_keys")) == 2
    assert program.query_bytes == {None: 2 * 4 * (2 * 4 * 4 + 4)}


def test_earlier_keys_and_values_cross_together():
    program = after("minimize_communication", causal, embeds(32), cached="mixed")
    gathers = [node for node in calls(program, "redistribute") if node.meta["val"].is_floating_point()]
    crossing = [node for node in gathers if isinstance(placement(node), Gathered)]
    assert {(str(placement(node)), node.meta["val"].shape[1]) for node in crossing} == {
        ("Gathered(0)", (2 + 2) * 4), ("Gathered(0, past_0)", (2 + 2) * 4), ("Gathered(2, queries_0)", 4)}  # fmt: skip


def test_the_first_forward_only_keeps():
    program = after("shard_cache", causal, embeds(32), cached="first")
    assert len(ops.attention_nodes(program.graph)) == 1
    assert program.kept == (None, None)


def test_keys_and_values_of_several_layers_are_kept_once():
    program = after("shard_cache", shared, embeds(32), cached="more")
    assert len(ops.attention_nodes(program.graph)) == 4
    assert program.kept == (None, None)


def test_without_a_cache_nothing_changes():
    program = after("shard_cache", causal, embeds(32))
    assert program.kept == ()
    assert len(ops.attention_nodes(program.graph)) == 1


def test_one_exchange_a_layer_and_none_on_one_rank():
    names = ["c10d.all_to_all_single", "_c10d_functional.all_to_all_single"]
    two = after("lower_redistributes", causal, embeds(32), cached="more")
    one = after("lower_redistributes", causal, embeds(32), cached="more", sp=1)
    assert sum(len(calls(two, name)) for name in names) == 1
    assert not any("c10d" in str(node.target) for node in one.graph.nodes)


def test_a_layer_that_mixes_tokens_otherwise_is_refused_by_name():
    def smoothed(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return causal(self, inputs_embeds.cumsum(1))

    with pytest.raises(CacheError, match=r"aten\.cumsum at .*test_shard_cache.py:\d+ is computed on the tokens"):
        after("shard_cache", smoothed, embeds(32), cached="more")


def test_the_invariant_finds_an_attention_that_does_not_see_the_cache():
    program = after("shard_cache", causal, embeds(32), cached="more")
    invariants.CACHE_SEEN.check(program)
    program.kept = (None,) * 3
    with pytest.raises(invariants.Violation, match="3 outputs to keep"):
        invariants.CACHE_SEEN.check(program)


def test_queries_for_the_cache_cross_with_the_new_keys_and_values():
    program = after("minimize_communication", causal, embeds(32), cached="more")
    gathers = [node for node in calls(program, "redistribute") if node.meta["val"].is_floating_point()]
    crossing = [node for node in gathers if isinstance(placement(node.args[0]), Shard)]
    assert [placement(node) for node in crossing] == [Gathered(0), REPLICATE]  # what attends in one, and the output
    assert crossing[0].meta["val"].shape[1] == (4 + 2 + 2) * 4  # heads and kv heads x width
