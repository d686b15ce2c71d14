"""Which strategy is predicted to be fastest, and what the prediction rests on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sp_compile.costs import RATES, Attention, Predicted, fastest, measured_rates, predicted, rates_of
from sp_compile.layout import TokenLayout, token_layout
from sp_compile.mesh import Nodes, single
from sp_compile.needs import Reach, received

LONG, WINDOW, EVERYTHING = Reach(None, 0), Reach(64, 0), Reach(None, None)
GPU = RATES["cuda"]
FREE = ("allgather_kv", "fetch", "ring", "ulysses")
TWO_BYTES = 2


def attention(reach: Reach, heads: int = 32, kv_heads: int = 8, **more: Any) -> Attention:
    crossing = kv_heads * 256 * TWO_BYTES
    found = Attention(reach, heads, kv_heads, 256, TWO_BYTES, crossing, FREE)
    return found._replace(**more)


def chosen(layout: TokenLayout, *attentions: Attention, apart: bool = True, rates: Any = GPU, **more: Any) -> list[str]:
    def predict(layout: TokenLayout, each: Attention, apart: bool) -> dict[str, Predicted]:
        return predicted(layout, each, apart, rates, **more)

    return [*fastest(layout, attentions, apart, predict)]


def test_the_bytes_of_each_strategy_are_those_of_its_formula():
    """Llama-3-8B over 8 ranks, 32,768 tokens, bf16: 117 MB by an all-gather, 73 MB by Ulysses, a layer."""
    layout, each = token_layout([32768], 8, "zigzag"), attention(LONG)
    rates = replace(GPU, compute=1e30, latency=0.0, memory=1e30, hidden=0.0, link=1.0)
    seconds = {name: found.seconds for name, found in predicted(layout, each, True, rates).items()}
    assert seconds["allgather_kv"] == pytest.approx(7 / 8 * 32768 * 2 * 8 * 128 * 2, rel=1e-6)
    assert seconds["ulysses"] == pytest.approx(7 / 8 * (32768 / 8) * (2 * 32 + 2 * 8) * 128 * 2, rel=1e-6)
    assert seconds["fetch"] == seconds["ring"] == received(layout, LONG, True) * each.crossing


def test_what_a_ring_hides():
    layout, each = token_layout([65536], 4, "zigzag"), attention(LONG)
    slow = replace(GPU, link=2e10)
    by_ring, gathered = (predicted(layout, each, True, slow)[name].seconds for name in ("ring", "allgather_kv"))
    assert by_ring < gathered
    hides_nothing = replace(slow, hidden=0.0)
    assert predicted(layout, each, True, hides_nothing)["ring"].seconds > by_ring


def test_the_fastest_for_each_attention():
    long = token_layout([32768], 8, "zigzag")
    slow = replace(GPU, link=1e9, hidden=0.0)
    assert chosen(long, attention(WINDOW), attention(LONG), rates=slow) == ["fetch", "ulysses"]
    assert "ulysses" not in chosen(long, attention(LONG, heads=9, kv_heads=9))  # 2 heads of 9 on a rank
    assert chosen(long, attention(LONG, crossing=64.0), rates=slow) == ["allgather_kv"]  # a latent
    assert chosen(long, attention(WINDOW, applicable=("allgather_kv",)), rates=slow) == ["allgather_kv"]
    short = token_layout([100] * 16, 8, "whole")
    assert chosen(short, attention(LONG), attention(EVERYTHING)) == ["local", "local"]
    assert "local" not in chosen(short, attention(EVERYTHING), apart=False)


def test_nodes_are_spread_over_where_links_between_them_are_what_counts():
    layout, each = token_layout([32768], 16, "zigzag"), attention(LONG, applicable=(*FREE, "hybrid"))
    found = predicted(layout, each, True, replace(GPU, link=1e9), Nodes(8, "node", "peers"))
    seconds = {name: each.seconds for name, each in found.items()}
    assert seconds["hybrid"] < seconds["allgather_kv"]


def test_heads_are_not_spread_where_each_part_of_the_scores_is_a_call():
    """Every rank would compute the parts of all ranks' queries."""
    many = token_layout([64] * 64, 4, "zigzag")
    each = attention(LONG, heads=8, kv_heads=8)
    assert chosen(many, each, rates=replace(RATES["cpu"], link=1e9, part=0.0)) == ["ulysses"]
    assert chosen(many, each, rates=replace(RATES["cpu"], link=1e9)) != ["ulysses"]


def test_rates_are_given_usual_or_measured():
    cpu = torch.device("cpu")
    assert rates_of(cpu) == RATES["cpu"]
    assert rates_of(cpu, link=1e8).link == 1e8
    assert rates_of(torch.device("meta"), compute=1e12) == replace(GPU, compute=1e12)
    found = measured_rates(single(), cpu, torch.float32)
    assert 1e8 < found.compute < 1e14
    assert found.link == RATES["cpu"].link  # nothing to measure it by
