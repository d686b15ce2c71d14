"""The rule table: what each op's result is placed as, and that every rank then holds its rows of the whole result.

Each case captures a small function, places it, and runs it whole and on pretended ranks: whatever a rank holds of any
value must be the rows of that value that its placement says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile.layout import token_layout
from sp_compile.linear_loss import linear_cross_entropy
from sp_compile.ops import sloped
from sp_compile.placements import REPLICATE, Partial, Shard, describe
from sp_compile.program import placement
from sp_compile.rules import RULES, Call, NoRule, apply
from tests.passes.graphs import LENGTHS, after, call, calls, check_placements, embeds, small

aten = torch.ops.aten
LAYOUTS = [
    token_layout(LENGTHS, 2, "zigzag", min_shard_length=2),
    token_layout((4, 9), 3, "contiguous", min_shard_length=2),
    token_layout((1, 2), 4, "zigzag", min_shard_length=2),  # fewer tokens than ranks
]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@dataclass(frozen=True)
class Case:
    """A function of ``x`` ``[1, T, 8]`` and weights ``w``, ``b``; the op in question and its result's placement.

    ``overload``, where only that one has a row; ``functional=False`` keeps composite ops as the model wrote them;
    ``random`` values are not compared.
    """

    op: str
    placed: str
    forward: Callable[..., Any]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    functional: bool = True
    random: bool = False
    overload: str = ""

    def program(self, **config: Any) -> Any:
        function = self.forward

        def alone(self: Any, inputs_embeds: torch.Tensor) -> Any:
            return function(2 * inputs_embeds)

        def with_weight(self: Any, inputs_embeds: torch.Tensor) -> Any:
            return function(2 * inputs_embeds, self.w)

        def with_bias(self: Any, inputs_embeds: torch.Tensor) -> Any:
            return function(2 * inputs_embeds, self.w, self.b)

        forward = (alone, with_weight, with_bias)[len(self.weights)]

        return after("propagate_placements", small(forward, **self.weights), functional=self.functional, **config)


ROWS = "Shard(1)"
PAIRS_OF_ROWS = "Shard(1 of 1x tokens x2)"
WRITTEN = {"functional": False}


def w(*shape: int) -> dict[str, torch.Tensor]:
    return {"w": random(*shape)}


def wb(weight: tuple[int, ...], bias: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {"w": random(*weight), "b": random(*bias)}


def pairs(x: torch.Tensor) -> torch.Tensor:
    return x.view(1, -1, 4)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(1, -1, 2, 4)


POINTWISE = [
    Case("aten.mul", ROWS, lambda x, w: w * x, w(8)),
    Case("aten.add", "Shard(2)", lambda x: x + x[:, None]),
    Case("aten.add", ROWS, lambda x: x[:, :, None] + x[:, None]),
    Case("aten.where", ROWS, lambda x: torch.where(x > 0, x, 2 * x)),
    Case("aten.masked_fill", ROWS, lambda x: x.masked_fill(x > 0, 3.0)),
    Case("sp_compile.sloped", ROWS, lambda x: sloped(x.tanh(), x, x * x), **WRITTEN),
    Case("aten.copy", ROWS, lambda x: aten.copy.default(2 * x, x[..., :1])),
    Case(
        "aten.cross_entropy_loss",
        "Shard(0)",
        lambda x: F.cross_entropy(x[0], x[0].argmax(-1), reduction="none"),
        **WRITTEN,
    ),
    Case(
        "sp_compile.linear_cross_entropy",
        "Shard(0)",
        lambda x, w: linear_cross_entropy(x[0], w, None, x[0].argmax(-1), "", -100, 0.1),
        w(12, 8),
        **WRITTEN,
    ),
    Case("aten.full_like", PAIRS_OF_ROWS, lambda x: torch.full_like(pairs(x), 3.0)),
    Case("aten.zeros_like", PAIRS_OF_ROWS, lambda x: torch.zeros_like(pairs(x))),
    Case("aten.ones_like", PAIRS_OF_ROWS, lambda x: torch.ones_like(pairs(x))),
    Case("aten.empty_like", ROWS, lambda x: torch.empty_like(2 * x), random=True),
    Case("aten.rand_like", ROWS, lambda x: torch.rand_like(2 * x), random=True),
    Case("aten.lerp", ROWS, lambda x: torch.lerp(x, 2 * x, 0.3)),
    Case("aten.maximum", ROWS, lambda x, w: torch.maximum(x, w), w(8)),
    Case("aten.minimum", ROWS, lambda x, w: torch.minimum(x, w), w(8)),
    Case("aten.addcmul", ROWS, lambda x, w: torch.addcmul(x, x, w), w(8)),
    Case("aten._to_copy", ROWS, lambda x: (2 * x).double()),
    Case("aten.type_as", ROWS, lambda x, w: (2 * x).type_as(w), {"w": random(3).double()}, **WRITTEN),
    Case("aten.floor_divide", ROWS, lambda x: x.argmax(-1) // 3),
    Case("aten.max", ROWS, lambda x, w: torch.max(x, w), w(8), overload="other"),
    Case("aten.min", ROWS, lambda x, w: torch.min(w, x), w(8), overload="other"),
    Case("aten.rsub", ROWS, lambda x: torch.rsub(x, 2.0)),
    Case("aten.true_divide", ROWS, lambda x: torch.true_divide(x, 3), **WRITTEN),
    Case("aten.__and__", ROWS, lambda x: (x > 0) & (x < 1)),
    Case("aten.__or__", ROWS, lambda x: (x > 1) | (x < 0)),
    Case("aten.__xor__", ROWS, lambda x: (x > 0) ^ (x < 1)),
    Case("aten.isclose", ROWS, lambda x, w: torch.isclose(x, w), w(8), **WRITTEN),
    Case("aten.hardswish", ROWS, lambda x: F.hardswish(x)),
    Case("aten.log_sigmoid", ROWS, lambda x: F.logsigmoid(x), **WRITTEN),
    Case("aten.to", ROWS, lambda x: x.double(), **WRITTEN),
    Case("aten.polar", ROWS, lambda x: torch.polar(x, 2 * x)),
    Case("aten.complex", ROWS, lambda x: torch.complex(x, 2 * x)),
    Case("aten.real", ROWS, lambda x: torch.complex(x, 2 * x).real, **WRITTEN),
    Case("aten.imag", ROWS, lambda x: torch.complex(x, 2 * x).imag, **WRITTEN),
    Case("aten._conj", ROWS, lambda x: torch.complex(x, 2 * x).conj().real),
]

DIMS = [
    Case("aten.reshape", ROWS, lambda x: x.view(1, -1, 2, 4)),
    Case("aten.reshape", PAIRS_OF_ROWS, pairs),
    Case("aten.reshape", "Shard(0 of 1x tokens x8)", lambda x: x.view(-1)),
    Case("aten.reshape", "Shard(1 of 2x tokens x1)", lambda x: x.unflatten(2, (2, 4)).transpose(1, 2).flatten(1, 2)),
    Case("aten.flatten", "Shard(0)", lambda x: x.flatten(0, 1), **WRITTEN),
    Case("aten.reshape", "Shard(3)", lambda x: x.transpose(1, 2).unflatten(1, (2, 4)), **WRITTEN),
    Case("aten.expand", ROWS, lambda x: x[:, :, None].expand(-1, -1, 3, -1)),
    Case("aten.expand", "Shard(0)", lambda x, w: w.expand(x.shape[1], 8) * x, w(1, 8)),
    Case("aten.expand_as", ROWS, lambda x: aten.expand_as.default(2 * x[..., :1], x), **WRITTEN),
    Case("aten.expand", ROWS, lambda x: aten.broadcast_to.default(x[..., :1], [2, -1, 8]), **WRITTEN),
    Case("aten.permute", "Shard(2)", lambda x: x.permute(2, 0, 1)),
    Case("aten.transpose", "Shard(2)", lambda x: x.transpose(1, -1)),
    Case("aten.swapaxes", "Shard(0)", lambda x: aten.swapaxes.default(x, 0, 1), **WRITTEN),
    Case("aten.t", "Shard(1)", lambda x: x[0].t(), **WRITTEN),
    Case("aten.numpy_T", "Shard(1)", lambda x: aten.numpy_T.default(x[0]), **WRITTEN),
    Case("aten.unsqueeze", "Shard(2)", lambda x: x.unsqueeze(1)),
    Case("aten.unsqueeze", ROWS, lambda x: x.unsqueeze(-1)),
    Case("aten.squeeze", "Shard(0)", lambda x: (2 * x).squeeze()),
    Case("aten.squeeze", "Shard(0)", lambda x: x[..., :1].squeeze((0, -1))),
    Case("aten.squeeze", ROWS, lambda x: x.squeeze(-1)),
    Case("aten.select", ROWS, lambda x: x.select(2, 3)),
    Case("aten.select", "Shard(0)", lambda x: x[0]),
    Case("aten.slice", ROWS, lambda x: x[..., 2:6]),
    Case("aten.split", f"({ROWS}, {ROWS})", lambda x: x.split(4, -1), **WRITTEN),
    Case("aten.split_with_sizes", f"({ROWS}, {ROWS})", lambda x: x.split([3, 5], 2), **WRITTEN),
    Case("aten.chunk", f"({ROWS}, {ROWS})", lambda x: x.chunk(2, -1), **WRITTEN),
    Case("aten.tensor_split", f"({ROWS}, {ROWS})", lambda x: torch.tensor_split(x, 2, -1), **WRITTEN),
    Case("aten.unbind", f"({ROWS}, {ROWS})", lambda x: heads(x).unbind(2)),
    Case("aten.unbind", "(Shard(0), Shard(0))", lambda x: torch.cat([x, x]).unbind(0)),
    Case("aten.cat", ROWS, lambda x, w: torch.cat([w.expand(1, x.shape[1], 3), x], -1), w(1, 1, 3)),
    Case("aten.concat", "Shard(2)", lambda x: torch.concat([x[None], 2 * x[None]], 0), **WRITTEN),
    Case("aten.stack", "Shard(2)", lambda x: torch.stack([x, 2 * x], 1)),
    Case("aten.stack", ROWS, lambda x: torch.stack([x, 2 * x], -1)),
    Case("aten.repeat", ROWS, lambda x: x.repeat(3, 1, 2)),
    Case("aten.repeat", "Shard(2)", lambda x: x.repeat(2, 1, 1, 1)),
    Case("aten.repeat", "Shard(1 of 2x tokens x1)", lambda x: x.repeat(1, 2, 1)),
    Case("aten.repeat_interleave", ROWS, lambda x: x.repeat_interleave(2, 2)),
    Case("aten.repeat_interleave", "Shard(1 of 1x tokens x2)", lambda x: x.repeat_interleave(2, 1)),
    Case("aten.constant_pad_nd", ROWS, lambda x: F.pad(x, (1, 2, 0, 0, 1, 1))),
    Case("aten.pad", ROWS, lambda x: F.pad(x, (1, 2), mode="circular")),
    Case("aten.slice_scatter", ROWS, lambda x: aten.slice_scatter.default(x, 2 * x[..., :3], 2, 1, 4)),
    Case("aten.select_scatter", ROWS, lambda x: aten.select_scatter.default(x, 2 * x[..., 0], 2, 1)),
    Case("aten.select_scatter", ROWS, lambda x: aten.select_scatter.default(x, 2 * x[0], 0, 0)),
]

COMPLEX = [
    Case("aten.view_as_complex", ROWS, lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2))).abs()),
    Case("aten.view_as_real", ROWS, lambda x: torch.view_as_real(torch.polar(x, x))),
]

CONSTANTS = [
    Case("aten.zeros", ROWS, lambda x: x + torch.zeros(1, x.shape[1], 8)),
    Case("aten.ones", "Shard(0)", lambda x: x + torch.ones(x.shape[1], 1)),
    Case("aten.full", ROWS, lambda x: x + torch.full((1, x.shape[1], 1), 2.0)),
    Case("aten.empty", ROWS, lambda x: x + torch.empty(1, x.shape[1], 1), random=True),
    Case("aten.new_zeros", ROWS, lambda x, w: x + w.new_zeros(1, x.shape[1], 8), w(3)),
    Case("aten.new_ones", "Shard(0)", lambda x, w: x + w.new_ones(x.shape[1], 1), w(3)),
    Case("aten.new_full", ROWS, lambda x, w: x + w.new_full((1, x.shape[1], 1), 2.0), w(3)),
    Case("aten.new_empty", ROWS, lambda x, w: x + w.new_empty(1, x.shape[1], 1), w(3), random=True),
    Case("aten.ones", "Replicate", lambda x: (2 * x, torch.ones(x.shape[1]))),
    Case("aten.arange", "Replicate", lambda x: x + torch.arange(x.shape[1]).view(1, -1, 1)),
]

PRODUCTS = [
    Case("aten.matmul", ROWS, lambda x, w: x @ w, w(8, 3)),
    Case("aten.matmul", "Shard(2)", lambda x, w: w @ x.transpose(1, 2), w(3, 8)),
    Case("aten.matmul", ROWS, lambda x, w: x @ w, w(8)),
    Case("aten.matmul", "Shard(0)", lambda x, w: x.transpose(0, 1) @ w, w(8, 3)),
    Case("aten.matmul", ROWS, lambda x: x @ x.transpose(1, 2)),
    Case("aten.mm", "Shard(0)", lambda x, w: torch.mm(x[0], w), w(8, 3)),
    Case("aten.bmm", ROWS, lambda x, w: torch.bmm(x, w), w(1, 8, 3)),
    Case("aten.addmm", "Shard(0)", lambda x, w, b: torch.addmm(b, x[0], w), wb((8, 3), (3,))),
    Case("aten.addmm", "Shard(0)", lambda x, w: torch.addmm(x[0, :, :3], x[0], w), w(8, 3)),
    Case("aten.baddbmm", ROWS, lambda x, w, b: torch.baddbmm(b, x, w), wb((1, 8, 3), (1, 1, 3))),
    Case("aten.linear", ROWS, lambda x, w, b: F.linear(x, w, b), wb((3, 8), (3,))),
    Case("aten.einsum", "Shard(2)", lambda x, w: torch.einsum("bsd,dk->kbs", x, w), w(8, 3), **WRITTEN),
    Case("aten.einsum", ROWS, lambda x: torch.einsum("b s d, b s d -> b s", x, 2 * x), **WRITTEN),
]

ALONG = ("sum", "mean", "amax", "amin", "prod", "argmax", "argmin", "var", "std", "logsumexp", "softmax", "log_softmax",
         "cumprod", "cumsum")  # fmt: skip
PAIRS = ("max", "min", "median")
BOTH = f"({ROWS}, {ROWS})"
OVER_DIMS = [
    *(Case(f"aten.{name}", ROWS, lambda x, name=name: getattr(torch, name)(2 * x, -1)) for name in ALONG),
    *(Case(f"aten.{name}", BOTH, lambda x, name=name: getattr(torch, name)(2 * x, -1)) for name in PAIRS),
    *(Case(f"aten.{name}", ROWS, lambda x, name=name: getattr(torch, name)(x > 0, -1)) for name in ("any", "all")),
    Case("aten.sum", "Shard(0)", lambda x: heads(x).sum((0, -1))),
    Case("aten.sum", ROWS, lambda x: heads(x).sum((0, -1), keepdim=True)),
    Case("aten._softmax", ROWS, lambda x: aten._softmax.default(x, -1, False)),
    Case("aten._log_softmax", ROWS, lambda x: aten._log_softmax.default(x, -1, False)),
    Case("aten.topk", BOTH, lambda x: torch.topk(x, 3, -1)),
    Case("aten.kthvalue", BOTH, lambda x: torch.kthvalue(x, 2, -1)),
    Case("aten.flip", ROWS, lambda x: torch.flip(x, [-1])),
    Case("aten.roll", ROWS, lambda x: torch.roll(x, 1, -1)),
    Case("aten.diff", ROWS, lambda x: torch.diff(x, dim=-1)),
    Case("aten.glu", ROWS, lambda x: F.glu(x, -1)),
    Case(
        "aten.diff",
        ROWS,
        lambda x: torch.diff(x, dim=-1, prepend=x[..., :1]),
    ),
    Case("aten.linalg_vector_norm", ROWS, lambda x: torch.linalg.vector_norm(x, dim=-1)),
    Case("aten.norm", ROWS, lambda x: aten.norm.ScalarOpt_dim(x, 2, [-1])),
    Case("aten.layer_norm", ROWS, lambda x, w, b: F.layer_norm(x, (8,), w, b), wb((8,), (8,))),
    Case(
        "aten.native_layer_norm",
        f"({ROWS}, {ROWS}, {ROWS})",
        lambda x: aten.native_layer_norm(x, [8], None, None, 1e-5),
    ),
    Case("aten.rms_norm", ROWS, lambda x, w: F.rms_norm(x, (8,), w), w(8)),
    Case("aten._fused_rms_norm", BOTH, lambda x, w: aten._fused_rms_norm(x, [8], w, 1e-5), w(8)),
]


LOOK_UPS = [
    Case("aten.embedding", ROWS, lambda x, w: F.embedding(x.argmax(-1), w), w(8, 3)),
    Case("aten.index", ROWS, lambda x, w: w[x.argmax(-1)], w(8, 3)),
    Case("aten.index", "Shard(2)", lambda x, w: w[:, x.argmax(-1)], w(3, 8)),
    Case("aten.index", "Shard(1)", lambda x, w: w[x.argmax(-1), :, x.argmin(-1)], w(8, 3, 8)),
    Case("aten.index", ROWS, lambda x, w: x[..., w.argsort()], w(5)),
    Case("aten.index", "Shard(2)", lambda x, w: x[w.argsort() * 0], w(2, 2)),
    Case(
        "aten.index",
        "Shard(2)",
        lambda x, w: heads(x).transpose(1, 2)[:, w.argsort(), :, w.argsort()],
        w(2),
    ),
    Case("aten.index_select", ROWS, lambda x, w: torch.index_select(x, 2, w.argsort()), w(5)),
    Case("aten.index", ROWS, lambda x, w: x[..., w > 0], w(8)),
    Case("aten.index_put", ROWS, lambda x, w: aten.index_put(x, [None, None, w.argsort()], 3 * x[..., :2]), w(2)),
    Case("aten.gather", ROWS, lambda x: torch.gather(x, 2, x.argsort(-1)[..., :3])),
    Case("aten.scatter", ROWS, lambda x: torch.scatter(x, 2, x.argsort(-1)[..., :3], 2 * x)),
    Case("aten.scatter_add", ROWS, lambda x: torch.scatter_add(x, 2, x.argsort(-1)[..., :3], x)),
    Case("aten.sort", BOTH, lambda x: torch.sort(x, -1)),
    Case("aten.argsort", ROWS, lambda x: torch.argsort(x, -1)),
]


def across_layers(x: torch.Tensor) -> torch.Tensor:
    """Attention over 2 earlier hidden states of each token."""
    states = torch.stack([x, 2 * x], 2).view(1, -1, 2, 2, 4).transpose(2, 3)
    return F.scaled_dot_product_attention(states, states, states)


ATTENTION = [Case("aten.scaled_dot_product_attention", ROWS, across_layers)]
CASES = POINTWISE + DIMS + COMPLEX + CONSTANTS + PRODUCTS + OVER_DIMS + LOOK_UPS + ATTENTION


def parameters(cases: list[Case]) -> list[Any]:
    found, count = [], Counter()
    for each in cases:
        count[each.op] += 1
        found.append(pytest.param(each, id=f"{each.op.removeprefix('aten.')}-{count[each.op]}"))
    return found


@pytest.mark.parametrize("case", parameters(CASES))
def test_every_rank_holds_its_rows_of_the_whole_result(case: Case):
    program = case.program()
    assert describe(placement(calls(program, case.op)[-1])) == case.placed
    assert program.fallbacks == []
    for layout in [] if case.random else LAYOUTS:
        assert check_placements(program, embeds(lengths=layout.lengths), layout) > 0


GATHERED = [
    Case("aten.sum", "runs over the token dim", lambda x: x.sum(1)),
    Case("aten.mean", "reduces over all dims", lambda x: x.mean()),
    Case("aten.softmax", "runs over the token dim", lambda x: x.softmax(-2)),
    Case("aten.cumsum", "runs over the token dim", lambda x: x.cumsum(1)),
    Case("aten.layer_norm", "normalizes over the token dim", lambda x: F.layer_norm(x, tuple(x.shape[1:]))),
    Case("aten.matmul", "contracts over the token dim", lambda x: x.transpose(1, 2) @ (3 * x)),
    Case("aten.einsum", "contracts over the token dim", lambda x: torch.einsum("bsd,bse->bde", x, 2 * x), **WRITTEN),
    Case("aten.einsum", "without an explicit output", lambda x: torch.einsum("bsd,bsd", x, 2 * x), **WRITTEN),
    Case("aten.reshape", "holds the token rows", lambda x: x.view(1, -1, 4).view(2, -1)),
    Case("aten.flip", "runs over the token dim", lambda x: x.flip(1)),
    Case("aten.split_with_sizes", "splits the token dim", lambda x: x.split([2, x.shape[1] - 2], 1)),
    Case("aten.cat", "concatenates along the token dim", lambda x: torch.cat([x, 2 * x], 1)),
    Case("aten.repeat", "a symbolic number of times", lambda x: x.repeat(1, x.shape[1], 1)),
    Case("aten.repeat_interleave", "flattens the token dim", lambda x: x.repeat_interleave(2)),
    Case("aten.repeat_interleave", "a number of times", lambda x: x.repeat_interleave(x.shape[1], 1)),
    Case("aten.constant_pad_nd", "pads the token dim", lambda x: F.pad(x, (0, 0, 1, 0))),
    Case("aten.slice_scatter", "writes over part of the token dim",
         lambda x, w: aten.slice_scatter.default(x, w, 1, 0, 2), w(1, 2, 8)),
    Case("aten.slice", "a range of the token dim that grows with it", lambda x: x[:, 1:]),
    Case("aten.slice", "selects rows of integers", lambda x: x.argmax(-1)[:, :2]),
    Case("aten.slice", "selects rows of a merged token dim", lambda x: x.view(1, -1, 4)[:, :2]),
    Case("aten.gather", "looks up along the token dim", lambda x: torch.gather(x, 1, 0 * x.argsort(-1))),
    Case("aten.index", "indexes tokens of other ranks", lambda x: x[0][0 * x[0].argmax(-1)]),
    Case("aten.embedding", "another input than the main one", lambda x, w: F.embedding(w.argsort(), x[0]), w(1)),
    Case("aten.sort", "sorts tokens of all ranks", lambda x: x[0, :, 0].sort()),
    Case("aten.scaled_dot_product_attention", "attention over the token dim that was not raised",
         lambda x: F.scaled_dot_product_attention(*(i * x.transpose(1, 2) for i in (1, 2, 3)))),
    Case("aten.conv1d", "no rule", lambda x, w: F.conv1d(x.transpose(1, 2), w, padding=1), w(8, 8, 3)),
]  # fmt: skip


@pytest.mark.parametrize("case", parameters(GATHERED))
def test_an_op_whose_rule_does_not_apply_is_computed_on_gathered_inputs(case: Case):
    program = case.program()
    (fallback,) = program.fallbacks
    assert fallback.op == case.op
    assert case.placed in fallback.reason
    for node in calls(program, case.op)[-1:]:
        assert {describe(placement(each)) for each in (node, *node.all_input_nodes)} <= {
            "Replicate", "(Replicate, Replicate)"}  # fmt: skip
    for layout in LAYOUTS:
        check_placements(program, embeds(lengths=layout.lengths), layout)


def experts(x: torch.Tensor, gate: torch.Tensor, expert: torch.Tensor, invert: Callable[..., Any]) -> torch.Tensor:
    """Every token goes through 2 of 4 experts; rows are sorted by expert and put back."""
    weights, chosen = (x[0] @ gate).softmax(-1).topk(2, -1)
    by_expert, order = chosen.view(-1).sort()
    ends = torch.histc(by_expert.float(), 4, 0, 3).int().cumsum(0, dtype=torch.int32)
    rows = torch._grouped_mm(x[0][order // 2].bfloat16(), expert, offs=ends).float()
    return (rows[invert(order)].view(-1, 2, 8) * weights[..., None]).sum(1)


def scattered(order: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return inverse


@pytest.mark.parametrize("invert", [torch.argsort, scattered], ids=["argsort", "scatter"])
def test_experts_run_on_the_ranks_own_rows(invert: Callable[..., Any]):
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return experts(inputs_embeds, self.gate, self.expert, invert)

    weights = {"gate": random(8, 4), "expert": random(4, 8, 8).bfloat16()}
    program = after("propagate_placements", small(forward, **weights))
    assert program.fallbacks == []
    sort = call(program, "aten.sort").name
    by_expert = f"Shard(0 of 1x tokens x2 by {sort})"
    assert describe(placement(call(program, "aten.sort"))) == f"({by_expert}, {by_expert})"
    assert describe(placement(call(program, "aten._grouped_mm"))) == by_expert
    assert describe(placement(call(program, "aten.cumsum"))) == f"RankLocal(by {call(program, 'aten.histc').name})"
    assert describe(placement(call(program, "aten.sum"))) == "Shard(0)"
    for layout in LAYOUTS:
        check_placements(program, embeds(lengths=layout.lengths), layout)


def chosen(x: torch.Tensor) -> torch.Tensor:
    return x[0].topk(2, -1).indices.view(-1)


def unsorted(x: torch.Tensor) -> torch.Tensor:
    """Experts over the first rows, the next rows and so on, as many as chose each."""
    ends = torch.histc(x[0].argmax(-1).sort().values.float(), 8, 0, 7).int().cumsum(0, dtype=torch.int32)
    return torch._grouped_mm(x[0].bfloat16(), torch.arange(512.0).view(8, 8, 8).bfloat16(), offs=ends)


LEAKS = {
    "experts take rows that were not sorted": unsorted,
    "sorted rows are returned": lambda x: x[0][chosen(x).sort().indices // 2],
    "the order itself is returned": lambda x: chosen(x).sort().indices,
    "rows per expert are returned": lambda x: torch.histc(chosen(x).sort().values.float(), 8, 0, 7),
    "row numbers are divided by another number": lambda x: chosen(x).argsort() // 3,
    "row numbers are added to": lambda x: chosen(x).argsort() + 1,
    "sorted rows meet rows in the layout's order": lambda x: (
        x[0, :, 0].repeat_interleave(2, 0)[chosen(x).argsort()] + x[0, :, 1].repeat_interleave(2, 0)
    ),
}


@pytest.mark.parametrize("forward", LEAKS.values(), ids=LEAKS.keys())
def test_rows_are_not_sorted_by_expert_on_a_rank_where_that_could_be_seen(forward: Callable[..., Any]):
    program = after("propagate_placements", lambda self, inputs_embeds: forward(inputs_embeds))
    assert any(each.op in ("aten.sort", "aten.argsort") for each in program.fallbacks)
    for layout in LAYOUTS:
        check_placements(program, embeds(lengths=layout.lengths), layout)


SELECTED = {
    "first token": lambda x: (2 * x)[:, 0],
    "last token": lambda x: (2 * x)[:, -1],
    "last tokens": lambda x: (2 * x)[:, -2:],
    "numbered tokens": lambda x: (2 * x)[:, torch.tensor([2, 0])],
    "index_select": lambda x: (2 * x).index_select(1, torch.tensor([2, 0])),
}


@pytest.mark.parametrize("forward", SELECTED.values(), ids=SELECTED)
def test_a_few_token_rows_are_added_from_the_ranks_that_hold_them(forward: Callable[..., Any]):
    program = after("propagate_placements", lambda self, inputs_embeds: forward(inputs_embeds))
    assert program.fallbacks == []
    assert placement(call(program, "select_rows")) == Partial("sum")
    for layout in LAYOUTS[:2]:
        assert check_placements(program, embeds(lengths=layout.lengths), layout) > 0


REWRITTEN = {
    "aten::clone": (aten.clone.default, ()),
    "aten::alias": (aten.alias.default, ()),
    "aten::detach": (aten.detach.default, ()),
    "aten::contiguous": (aten.contiguous.default, ()),
    "aten::lift_fresh_copy": (aten.lift_fresh_copy.default, ()),
    "aten::view": (aten.view.default, ([1, -1, 8],)),
    "aten::_unsafe_view": (aten._unsafe_view.default, ([1, -1, 8],)),
}


@pytest.mark.parametrize("op", REWRITTEN)
def test_an_op_that_normalize_rewrites_keeps_its_rows_where_it_does_occur(op: str):
    program = after("propagate_placements", lambda self, inputs_embeds: 2 * inputs_embeds)
    doubled = call(program, "aten.mul")
    target, arguments = REWRITTEN[op]
    node = program.graph.call_function(target, (doubled, *arguments))
    node.meta["val"] = doubled.meta["val"]
    assert program.tokens is not None
    assert apply(Call(node, program.tokens, {doubled: Shard(1)})).output == Shard(1)
    if op in ("aten::view", "aten::_unsafe_view"):
        return
    counted = Shard(0, 1, 2, "sort", rows=2, of="sort")
    assert apply(Call(node, program.tokens, {doubled: counted})).output == counted


def test_the_size_of_another_dim_is_the_same_everywhere():
    program = after("propagate_placements", lambda self, inputs_embeds: 2 * inputs_embeds)
    doubled = call(program, "aten.mul")
    sizes = [program.graph.call_function(aten.sym_size.int, (doubled, dim)) for dim in (2, 1)]
    features, tokens = (Call(size, program.tokens, {doubled: Shard(1)}) for size in sizes)
    assert apply(features).output == REPLICATE
    with pytest.raises(NoRule):
        apply(tokens)


def test_every_row_of_the_table_has_a_case():
    tried = {each.op.replace(".", "::") + f".{each.overload}".rstrip(".") for each in CASES} | {*REWRITTEN}
    experts, single = {"aten::histc", "aten::_grouped_mm"}, {"select_rows", "aten::sym_size"}
    summed = {"sum_rows"}  # tests/passes/test_split_losses.py
    inserted = {"aten::unflatten"}  # normalize writes it as a reshape; minimize_communication uses it
    attention = {
        "sp_compile::attention",
        "sp_compile::tile_plan",
        "sp_compile::block_mask",
        "exchange_partials",
        "merge_partials",
        "joined_keys",
        "put_back",
    }  # tests/passes/test_shard_attention.py and test_shard_cache.py
    over_tp = {
        "_c10d_functional::all_reduce",
        "_c10d_functional::wait_tensor",
        "_c10d_functional::all_gather_into_tensor",
    }  # tests/test_tensor_parallel.py
    alike = {"aten::bincount": "aten::histc", "transformers::grouped_mm_fallback": "aten::_grouped_mm"}
    assert all(RULES[name] is RULES[other] for name, other in alike.items())
    assert set(RULES) - tried - experts - single - summed - inserted - attention - over_tp - {*alike} == set()
