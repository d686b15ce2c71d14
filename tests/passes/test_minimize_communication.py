"""What crosses crosses once: keys with values, a value in both orders, nothing repeated for grouped queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import sp_compile
from sp_compile.errors import ConfigError
from sp_compile.layout import token_layout
from sp_compile.pipeline import build_pipeline
from sp_compile.placements import Shard, describe
from sp_compile.program import placement
from tests.passes.graphs import LENGTHS, after, call, calls, check_placements, embeds, placed, qkv, repeated, small

JOINED, APART = {}, {"minimize_communication": {"join_keys_and_values": False}}


def grouped(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv(inputs_embeds)
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)


def last(forward: Any, options: Mapping[str, Any] = JOINED, **config: Any) -> Any:
    return after("minimize_communication", forward, embeds(32), options=options, **config)


def cheap(operations_per_byte: float) -> dict[str, Any]:
    return {"minimize_communication": {"operations_per_byte": operations_per_byte}}


def gathers(program: Any) -> list[Any]:
    """Redistributes that move floats between ranks."""
    return [node for node in calls(program, "redistribute")
            if isinstance(placement(node.args[0]), Shard) and not isinstance(placement(node), Shard)
            and node.meta["val"].is_floating_point()]  # fmt: skip


def test_keys_and_values_cross_together_and_not_repeated():
    output, joined = sorted(gathers(last(grouped)), key=lambda node: node.meta["val"].dim(), reverse=True)
    assert list(output.meta["val"].shape[1:2]) == [4]
    assert joined.meta["val"].dim() == 2
    assert joined.meta["val"].shape[1] == 2 * 2 * 4  # keys and values x kv heads x width
    assert joined.args[0].target is torch.ops.aten.cat.default
    assert describe(placement(joined)) == "Gathered(0)"
    assert check_placements(last(grouped), embeds(32), token_layout(LENGTHS, 2, min_shard_length=2)) > 20


def test_keys_and_values_cross_apart_where_asked():
    found = [list(node.meta["val"].shape[1:2]) for node in gathers(last(grouped, APART))]
    assert found == [[2], [2], [4]]


@pytest.mark.parametrize("options", [JOINED, APART], ids=["joined", "apart"])
@pytest.mark.parametrize("sp", [2, 4])
def test_bytes_are_those_of_the_unrepeated_keys_and_values(options: Mapping[str, Any], sp: int):
    pipeline = [{name: dict(options.get(name, {}))} for name in sp_compile.pipeline.registered_passes()]
    report = sp_compile.explain(small(grouped), embeds(32, (37,)), sp=sp, config={"pipeline": pipeline})
    rows = report.shard_length * 4  # a float for each row of a rank
    found = sorted(each.bytes_sent for each in report.collectives)
    keys, output = 2 * 4 * rows * (sp - 1), 4 * 4 * rows * (sp - 1)
    assert found == sorted([2 * keys, output] if options is JOINED else [keys, keys, output])


def test_a_value_needed_in_both_orders_crosses_once():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> Any:
        q, k, v = qkv(inputs_embeds)
        return F.scaled_dot_product_attention(q, repeated(k), repeated(v)), k

    program = last(forward, APART)
    _, key = program.graph.output_node().args[0]
    padded = call(program, "sp_compile.attention").args[1]
    assert [describe(placement(each)) for each in (key, padded)] == ["Replicate", "Gathered(2)"]
    assert key.args[0] is padded
    assert len(gathers(program)) == 3
    assert check_placements(program, embeds(32), token_layout(LENGTHS, 3, min_shard_length=2)) > 10


@pytest.mark.parametrize("options", [JOINED, APART], ids=["joined", "apart"])
def test_a_value_gathered_for_two_readers_crosses_once(options: Mapping[str, Any]):
    def forward(self: Any, inputs_embeds: torch.Tensor) -> Any:
        q, k, v = qkv(inputs_embeds)
        first = F.scaled_dot_product_attention(q, repeated(k), repeated(v))
        return F.scaled_dot_product_attention(first, repeated(k), repeated(v), is_causal=True)

    first, second = calls(last(forward, options), "sp_compile.attention")
    assert first.args[1:3] == second.args[1:3]


def test_keys_that_are_the_values_cross_once():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        q, k, _ = qkv(inputs_embeds)
        return F.scaled_dot_product_attention(q, repeated(k), repeated(k))

    program = last(forward)
    attention = call(program, "sp_compile.attention")
    assert attention.args[1] is attention.args[2]
    assert len(gathers(program)) == 2


def test_keys_and_values_of_different_widths_cross_together():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv(inputs_embeds)
        return F.scaled_dot_product_attention(q, repeated(k), repeated(torch.cat([v, v], -1)))

    program = last(forward, cheap(0))
    assert sorted(list(node.meta["val"].shape)[1:] for node in gathers(program))[-1] == [2 * (4 + 8)]
    assert check_placements(program, embeds(32), token_layout(LENGTHS, 2, min_shard_length=2)) > 20


def test_one_rank_gathers_nothing():
    program = last(grouped, sp=1)
    assert placed(program, "redistribute") == []
    assert calls(program, "aten.cat") == []


def latent(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Keys and values of 4 heads of 8, expanded from a latent of 4; half of a key is the same for all heads."""
    x = F.linear(inputs_embeds, self.first)
    q, compressed, shared = x.split([4 * 8, 4, 4], -1)
    own = F.linear(compressed, self.wide).unflatten(-1, (4, 12)).transpose(1, 2)
    k = torch.cat([own[..., :4], shared[:, None].expand(-1, 4, -1, -1)], -1)
    q = q.unflatten(-1, (4, 8)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, own[..., 4:], is_causal=True).transpose(1, 2).flatten(2)


def of_latent() -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    return small(latent, first=torch.randn(40, 16, generator=generator), wide=torch.randn(48, 4, generator=generator))


@pytest.mark.parametrize(
    ("operations_per_byte", "elements"),
    [(0, 4 * 8 + 4 * 8), (1e-3, 4 * 8 + 4 * 8), (1e3, 4 + 4)],
    ids=["as they are", "computing is dear", "the latent and what is shared"],
)
def test_what_is_expanded_crosses_before(operations_per_byte: float, elements: int):
    program = after("minimize_communication", of_latent(), embeds(16), options=cheap(operations_per_byte))
    crossing = [node.meta["val"].shape[1] for node in gathers(program) if node.meta["val"].dim() == 2]
    assert crossing == [elements]
    for lengths, sp in ((LENGTHS, 2), ((1, 2), 4), ((17,), 3)):
        layout = token_layout(lengths, sp, min_shard_length=2)
        assert check_placements(program, embeds(16, lengths), layout) > 20


def test_the_hidden_state_crosses_where_it_is_smaller_than_keys_and_values():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(F.linear(inputs_embeds, self.before))
        q, k, v = (F.linear(x, each).unflatten(-1, (4, 4)).transpose(1, 2) for each in self.weights.chunk(3))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    model = small(forward, before=torch.randn(16, 16) / 4, weights=torch.randn(48, 16) / 4)
    program = after("minimize_communication", model, embeds(16), options=cheap(1e3))
    hidden, _ = gathers(program)
    assert hidden.meta["val"].shape[-1] == 16  # of 16 + 16
    assert describe(placement(hidden)) == "Gathered(1)"
    assert len(calls(program, "aten.linear")) == 4  # keys and values once, from all rows
    assert check_placements(program, embeds(16), token_layout(LENGTHS, 2, min_shard_length=2)) > 10


def test_what_others_gather_too_crosses_once():
    """The hidden state is summed over tokens, which needs all of it, and keys and values are computed from it."""

    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(F.linear(inputs_embeds, self.before))
        q, k, v = (F.linear(x, each).unflatten(-1, (4, 4)).transpose(1, 2) for each in self.weights.chunk(3))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return attended + x.cumsum(1) / 10

    model = small(forward, before=torch.randn(16, 16) / 4, weights=torch.randn(48, 16) / 4)
    program = after("minimize_communication", model, embeds(16), options=cheap(1e3))
    assert len(gathers(program)) == 2
    assert check_placements(program, embeds(16), token_layout(LENGTHS, 2, min_shard_length=2)) > 10
    after("overlap_communication", model, embeds(16), options=cheap(1e3))


def test_attentions_that_share_keys_share_what_crosses_for_them():
    """Two attentions with the same keys and values of their own, as in differential transformers."""

    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(F.linear(inputs_embeds, self.before))
        q, k, v = (F.linear(x, each).unflatten(-1, (4, 4)).transpose(1, 2) for each in self.weights.chunk(3))
        first = F.scaled_dot_product_attention(q, k, torch.cat([v, v], -1), is_causal=True)
        second = F.scaled_dot_product_attention(q, k, torch.cat([v, 2 * v], -1), is_causal=True)
        return (first - second).transpose(1, 2).flatten(2)

    model = small(forward, before=torch.randn(16, 16) / 4, weights=torch.randn(48, 16) / 4)
    for price in (0, 4, 25, 1e3):  # at 4 the keys stay, and values are made wider afterwards
        program = after("minimize_communication", model, embeds(16), options=cheap(price))
        assert check_placements(program, embeds(16), token_layout(LENGTHS, 2, min_shard_length=2)) > 10


def test_nothing_is_computed_anew_from_the_tokens():
    """The first layer's keys could be had from the tokens, through all of the model that comes before."""
    program = after("minimize_communication", grouped, embeds(32), options=cheap(1e9))
    assert len(gathers(program)) == 2


def test_a_price_is_not_negative():
    with pytest.raises(ConfigError, match="operations_per_byte=-1 is negative; pass 0 or more"):
        build_pipeline([{"minimize_communication": {"operations_per_byte": -1}}])
