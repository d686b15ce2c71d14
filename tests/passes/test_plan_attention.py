"""One tile plan for each kind of mask, however many attentions share it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile.placements import describe
from sp_compile.program import placement
from tests.passes.graphs import after, call, calls, embeds, qkv, repeated


def layers(windows: list[int | None], x: torch.Tensor) -> torch.Tensor:
    """Causal attentions after each other, some with sliding windows; their masks are built once per kind."""
    rows = torch.arange(x.shape[1])
    queries, keys = rows[:, None], rows[None, :]
    masks = {each: keys <= queries if each is None else (keys <= queries) & (keys > queries - each) for each in windows}
    for each in windows:
        q, k, v = qkv(x)
        out = F.scaled_dot_product_attention(q, repeated(k), repeated(v), masks[each])
        x = x + out.transpose(1, 2).flatten(2).repeat(1, 1, 2)
    return x


def planned(windows: list[int | None], **config: Any) -> Any:
    return after("plan_attention", lambda self, inputs_embeds: layers(windows, inputs_embeds), embeds(32), **config)


@pytest.mark.parametrize(
    ("windows", "plans"), [([None], 1), ([None] * 3, 1), ([None, 3, None, 3], 2), ([2, 3], 2)], ids=str
)
def test_attentions_share_a_plan_for_each_kind_of_mask(windows: list[int | None], plans: int):
    program = planned(windows)
    attentions = calls(program, "sp_compile.attention")
    assert len(attentions) == len(windows)
    assert len(calls(program, "sp_compile.tile_plan")) == plans
    assert [each.args[7] for each in attentions] == [
        attentions[windows.index(window)].args[7] for window in windows
    ]  # fmt: skip


@pytest.mark.parametrize("sp", [1, 2])
def test_attention_reads_its_plan_with_the_bounds_and_validity_that_made_it(sp: int):
    program = planned([None], sp=sp)
    plan, attention = call(program, "sp_compile.tile_plan"), call(program, "sp_compile.attention")
    operands, rule, valid, q_bounds, k_bounds = plan.args
    assert attention.args[3:5] == (operands, rule)
    assert attention.args[7:] == (plan, q_bounds, k_bounds, valid)
    names = [each.meta["index_input"] if each is not None else None for each in (q_bounds, k_bounds, valid)]
    assert names == ["q_bounds", "k_bounds", "gathered_valid" if sp == 2 else None]
    assert describe(placement(plan)) == (f"RankLocal(by {plan.name})" if sp == 2 else "Replicate")


def test_a_model_without_attention_needs_no_bounds():
    program = after("plan_attention", lambda self, inputs_embeds: 2 * inputs_embeds)
    assert [each for each in program.graph.nodes if "index_input" in each.meta] == []
