"""A kernel for every attention, and one plan for each kind of mask, however many attentions share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile.errors import ConfigError
from sp_compile.kernels import fused
from sp_compile.kernels.choice import Need
from sp_compile.layout import token_layout
from sp_compile.ops import AttentionArgs
from sp_compile.passes import plan_attention
from sp_compile.passes.plan_attention import PlanAttention
from sp_compile.placements import describe
from sp_compile.program import placement
from tests.passes.graphs import after, call, calls, check_placements, embeds, outputs, qkv, repeated, run_whole


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
    made = [AttentionArgs(*each.args).plan for each in attentions]
    assert made == [made[windows.index(window)] for window in windows]


@pytest.mark.parametrize("sp", [1, 2])
def test_attention_reads_its_plan_with_the_operands_and_validity_that_made_it(sp: int):
    program = planned([None], sp=sp)
    plan = call(program, "sp_compile.tile_plan")
    attention = AttentionArgs(*call(program, "sp_compile.attention").args)
    operands, tables, rule, valid, q_rows, k_rows = plan.args
    assert (attention.operands, attention.tables, attention.rule) == (operands, tables, rule)
    assert (attention.kernel, attention.plan, attention.valid) == ("tiles", plan, valid)
    names = [each.meta["index_input"] if each is not None else None for each in (q_rows, k_rows, valid)]
    on_ranks = ["local_index", "gathered_index", "gathered_valid"]
    assert names == (on_ranks if sp == 2 else ["restore_index", "restore_index", None])
    assert describe(placement(plan)) == (f"RankLocal(by {plan.name})" if sp == 2 else "Replicate")


def asked(forward: Any, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Need:
    """What a kernel must serve, of the one attention of a model."""
    found: list[Need] = []
    monkeypatch.setattr(plan_attention, "choose", lambda kernel, need, faster: found.append(need) or ("tiles", None))
    after("plan_attention", forward, embeds(32), **more)
    return found[-1]


def masked(mask: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """One attention under a mask of the inputs."""

    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv(inputs_embeds)
        return F.scaled_dot_product_attention(q, repeated(k), repeated(v), mask(inputs_embeds))

    return forward


@pytest.mark.parametrize(("attention", "heads"), [("allgather_kv", (4, 2)), ("ulysses", (2, 1))])
def test_kernels_are_measured_for_the_heads_of_a_rank(
    attention: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    def grouped(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        q, k, v = (each.unflatten(2, (-1, 8)).transpose(1, 2) for each in inputs_embeds.split([32, 16, 16], dim=2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)

    found: list[Need] = []
    monkeypatch.setattr(plan_attention, "choose", lambda kernel, need, faster: found.append(need) or ("tiles", None))
    after("plan_attention", grouped, embeds(64), attention=attention)
    assert (found[-1].heads, found[-1].kv_heads) == heads


def test_masks_that_are_read_by_pairs_are_irregular(monkeypatch: pytest.MonkeyPatch):
    def causal(x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(x.shape[1])
        return rows[None, :] <= rows[:, None]

    def by_pairs(x: torch.Tensor) -> torch.Tensor:
        return (x[0] @ x[0].T) > 0

    assert not asked(masked(causal), monkeypatch).irregular
    assert asked(masked(by_pairs), monkeypatch).irregular


@pytest.mark.parametrize(("cached", "steps"), [("", False), ("first", False), ("more", True), ("mixed", False)])
def test_steps_of_a_cache_are_told_from_prefill(cached: str, steps: bool, monkeypatch: pytest.MonkeyPatch):
    forward = lambda self, inputs_embeds: layers([None], inputs_embeds)  # noqa: E731
    assert asked(forward, monkeypatch, cached=cached).steps == steps


def test_regions_stay_apart_for_kernels_that_compute_many_in_a_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "serves", lambda *_: None)
    program = planned([None, 3], options={"plan_attention": {"kernel": "fused"}})
    assert [each.kwargs for each in calls(program, "sp_compile.tile_plan")] == [{"boxes": False}] * 2


@pytest.mark.parametrize("kernel", ["dense", "dense_fp64"])
def test_kernels_without_a_plan_get_none(kernel: str):
    program = planned([None, 3], options={"plan_attention": {"kernel": kernel}})
    assert calls(program, "sp_compile.tile_plan") == []
    for each in calls(program, "sp_compile.attention"):
        attention = AttentionArgs(*each.args)
        assert (attention.kernel, attention.plan) == (kernel, None)


def test_a_kernel_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"^unknown kernel 'tile'; did you mean 'tiles'\?$"):
        PlanAttention(kernel="tile")


@pytest.mark.parametrize("sp", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["tiles", "dense"])
def test_ranks_compute_from_their_plans_what_the_model_does(kernel: str, sp: int):
    program = planned([None, 3, None], sp=sp, options={"plan_attention": {"kernel": kernel}})
    inputs = embeds(32, [70, 130, 1, 9])
    assert check_placements(program, inputs, token_layout([70, 130, 1, 9], sp)) > 0 or sp == 1
    expected = layers([None, 3, None], inputs["inputs_embeds"])
    (found,) = outputs(program, run_whole(program, inputs))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_model_without_attention_needs_no_plan():
    program = after("plan_attention", lambda self, inputs_embeds: 2 * inputs_embeds)
    assert [each for each in program.graph.nodes if "index_input" in each.meta] == []
