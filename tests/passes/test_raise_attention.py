"""Attention in all its forms becomes one node that computes the same; what is not attention is left and said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile.layout import token_layout
from sp_compile.ops import AttentionArgs
from tests.passes.graphs import LENGTHS, Ranks, after, call, calls, embeds, ops_of, outputs, qkv, repeated, run_whole

LOW = torch.finfo(torch.float32).min
CAUSAL = "mask = le(x0, x1)"


def numbers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers of the queries and of the keys."""
    rows = torch.arange(x.shape[1])
    return rows[:, None], rows[None, :]


def seen(x: torch.Tensor) -> torch.Tensor:
    queries, keys = numbers(x)
    return keys <= queries


def added(x: torch.Tensor, low: float = LOW) -> torch.Tensor:
    return torch.where(seen(x), 0.0, low)


def slopes() -> torch.Tensor:
    return torch.exp2(-torch.arange(1, 5).float())[:, None, None]


def whole(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = qkv(x)
    return q, repeated(k), repeated(v)


def sdpa(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(*whole(x), *args, **kwargs)


def by_keywords(x: torch.Tensor) -> torch.Tensor:
    q, k, v = whole(x)
    return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=seen(x)[None, None], scale=0.1)


def grouped(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*qkv(x), is_causal=True, enable_gqa=True)


def interleaved(x: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv(x)
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, dim=1))


def eager(x: torch.Tensor, change: Callable[..., Any] = lambda scores: scores) -> torch.Tensor:
    q, k, v = whole(x)
    return change(0.5 * (q @ k.transpose(-1, -2))).softmax(-1) @ v


def with_sink(x: torch.Tensor, less_maximum: bool = False) -> torch.Tensor:
    """A learned score per head that takes a share of the softmax and has no value, as in gpt-oss."""
    q, k, v = whole(x)
    scores = 0.5 * (q @ k.transpose(-1, -2)) + added(x)
    sink = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, x.shape[1], 1)
    scores = torch.cat([scores, sink], -1)
    scores = scores - scores.max(-1, keepdim=True).values if less_maximum else scores
    return scores.softmax(-1)[..., :-1] @ v


def softmax_in_float(x: torch.Tensor) -> torch.Tensor:
    q, k, v = (each.double() for each in qkv(x))
    k, v = repeated(k), repeated(v)
    scores = 0.5 * (q @ k.transpose(-1, -2)) + added(x)
    return scores.softmax(-1, dtype=torch.float32).double() @ v


def batched_products(x: torch.Tensor) -> torch.Tensor:
    """Three dims and a bias in the product, as in Bloom."""
    q, k, v = (each.flatten(0, 1) for each in whole(x))
    scores = torch.baddbmm(slopes() * numbers(x)[1], q, k.transpose(1, 2), beta=1, alpha=0.5)
    tokens = x.shape[1]
    weights = (scores.view(1, 4, tokens, tokens) + added(x)).softmax(-1)
    return torch.bmm(weights.view(4, tokens, tokens), v)


def distance(x: torch.Tensor) -> torch.Tensor:
    queries, keys = numbers(x)
    return keys - queries


@dataclass(frozen=True)
class Form:
    """An attention over embeddings of width 32, and what its node carries."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    rule: str
    scale: float = 0.5
    empty_mean: bool = False
    misses: str = ""


FORMS = {
    "sdpa": Form(sdpa, ""),
    "sdpa positional": Form(lambda x: sdpa(x, seen(x)), CAUSAL),
    "sdpa keywords": Form(by_keywords, CAUSAL, scale=0.1),
    "sdpa is_causal": Form(lambda x: sdpa(x, is_causal=True), CAUSAL),
    "sdpa enable_gqa": Form(grouped, CAUSAL),
    "sdpa repeat_interleave": Form(interleaved, ""),
    "sdpa float mask of -inf": Form(lambda x: sdpa(x, added(x, -torch.inf)), CAUSAL),
    "sdpa float mask of finfo.min": Form(lambda x: sdpa(x, added(x)), CAUSAL, empty_mean=True),
    "sdpa masked bias": Form(
        lambda x: sdpa(x, (0.1 * distance(x)).masked_fill(~seen(x), -torch.inf)),
        "mask = le(x0, x1); t0 = sub(x2, x3); bias = mul(t0, 0.1)",
    ),
    "eager": Form(eager, ""),
    "eager added mask": Form(lambda x: eager(x, lambda s: s + added(x)), CAUSAL, empty_mean=True),
    "eager where": Form(lambda x: eager(x, lambda s: torch.where(seen(x), s, LOW)), CAUSAL, empty_mean=True),
    "eager masked_fill": Form(lambda x: eager(x, lambda s: s.masked_fill(~seen(x), -torch.inf)), CAUSAL),
    "eager less maximum": Form(lambda x: eager(x, lambda s: s - s.amax(-1, keepdim=True)), ""),
    "eager softcap": Form(
        lambda x: eager(x, lambda s: 3 * torch.tanh(s / 3) + added(x)),
        "mask = le(x0, x1); t0 = mul(score, 0.5); t1 = div(t0, 3); t2 = tanh(t1); score = mul(t2, 3.0)",
        scale=1.0,
        empty_mean=True,
    ),
    "eager ALiBi": Form(
        lambda x: eager(x, lambda s: s + slopes() * distance(x) + added(x)),
        "mask = le(x0, x1); t0 = sub(x3, x4); bias = mul(x2, t0)",
        empty_mean=True,
    ),
    "eager ALiBi of keys": Form(
        lambda x: eager(x, lambda s: s + slopes() * numbers(x)[1] + added(x)),
        "mask = le(x0, x1); bias = copy(x2)",
        empty_mean=True,
    ),
    "eager sink": Form(with_sink, CAUSAL, empty_mean=True),
    "eager sink less maximum": Form(lambda x: with_sink(x, less_maximum=True), CAUSAL, empty_mean=True),
    "eager softmax in float": Form(softmax_in_float, CAUSAL, empty_mean=True),
    "eager baddbmm": Form(batched_products, "mask = le(x0, x1); bias = copy(x2)", empty_mean=True),
    "mask that cannot be lifted": Form(
        lambda x: sdpa(x, seen(x).int().cumsum(-1) > 2), "mask = gt(x0, 2)", misses="cumsum is not a pointwise op"
    ),
    "bias that cannot be lifted": Form(
        lambda x: eager(x, lambda s: s + x @ x.transpose(1, 2)),
        "bias = copy(x0)",
        misses="matmul is not a pointwise op",
    ),
}


def program_of(form: Form, last: str) -> Any:
    return after(last, lambda self, inputs_embeds: form.forward(inputs_embeds), embeds(32))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_attention_becomes_one_node_with_its_rules_that_computes_the_same(form: Form):
    program = program_of(form, "raise_attention")
    attention = AttentionArgs(*call(program, "sp_compile.attention").args)
    assert (attention.rule, attention.scale, attention.empty_mean) == (form.rule, form.scale, form.empty_mean)
    assert [each.meta["val"].shape[1] for each in (attention.k, attention.v)] == [2, 2]  # not repeated
    assert not {"aten.softmax", "aten.scaled_dot_product_attention"} & set(ops_of(program))
    assert [form.misses in each.reason for each in program.fallbacks] == [True] * bool(form.misses)
    found = outputs(program, run_whole(program, embeds(32)))[0]
    torch.testing.assert_close(found, form.forward(**{"x": embeds(32)["inputs_embeds"]}))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_raised_attention_computes_the_same_on_ranks(form: Form):
    program = program_of(form, "localize_shapes")
    for lengths, scheme in ((LENGTHS, "zigzag"), ((1, 2), "zigzag"), ((150, 70), "contiguous")):
        inputs = embeds(32, lengths)
        expected = form.forward(inputs["inputs_embeds"])
        for (found,) in Ranks(program, inputs, token_layout(lengths, 2, scheme, min_shard_length=2)).outputs():
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_masks_are_not_built_for_all_queries_by_all_keys():
    program = program_of(FORMS["eager ALiBi"], "raise_attention")
    for node in program.graph.nodes:
        sizes = list(getattr(node.meta.get("val"), "shape", ()))
        assert sum(isinstance(size, torch.SymInt) for size in sizes) <= 1, f"%{node.name} is {sizes}"


def returns_weights(x: torch.Tensor) -> Any:
    q, k, v = whole(x)
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return weights @ v, weights


def sums_weights(x: torch.Tensor) -> torch.Tensor:
    q, k, _ = whole(x)
    return (q @ k.transpose(-1, -2)).softmax(-1).sum(-2)


def over_queries(x: torch.Tensor) -> torch.Tensor:
    q, k, v = whole(x)
    return (q @ k.transpose(-1, -2)).softmax(-2) @ v


def two_columns(x: torch.Tensor) -> torch.Tensor:
    q, k, v = whole(x)
    return torch.cat([q @ k.transpose(-1, -2), q[..., :2]], -1).softmax(-1)[..., :-2] @ v


MISSES = {
    "the weights are used 2 times": (returns_weights, r"the weights %softmax are used 2 times"),
    "no product with the values": (sums_weights, r"the weights go into %sum_1, not into a product with the values"),
    "over queries": (over_queries, r"%matmul_1 is not a product over the keys"),
    "a change that is not pointwise": (lambda x: eager(x, lambda s: s.cumsum(-1)), r"%cumsum between the product and"),
    "two columns beside the scores": (
        two_columns,
        r"%cat concatenates scores with something that is not one sink column",
    ),
}


@pytest.mark.parametrize(("forward", "reason"), MISSES.values(), ids=MISSES)
def test_what_is_almost_attention_is_left_with_the_node_that_does_not_fit(forward: Callable[..., Any], reason: str):
    program = after("raise_attention", lambda self, inputs_embeds: forward(inputs_embeds), embeds(32))
    (miss,) = program.fallbacks
    assert (miss.op, miss.count) == ("aten.softmax", 1)
    assert miss.source.startswith("passes/test_raise_attention.py:")
    assert reason in miss.reason
    assert calls(program, "sp_compile.attention") == []
    assert len(calls(program, "aten.softmax")) == 1


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda x: sdpa(x, dropout_p=0.1), "dropout_p=0.1; call model.eval()"),
        (
            lambda x: F.scaled_dot_product_attention(x[None], x[None, :, :4], x[None, :, :4]),
            "its key %slice_1 is not over the tokens: [1, 1, 4, 32]",
        ),
    ],
    ids=["dropout", "keys that are no tokens"],
)
def test_sdpa_that_is_not_raised_carries_the_reason(forward: Callable[..., Any], reason: str):
    program = after("raise_attention", lambda self, inputs_embeds: forward(inputs_embeds), embeds(32))
    assert reason in call(program, "aten.scaled_dot_product_attention").meta["not_raised"]
    (miss,) = program.fallbacks
    assert (miss.op, miss.reason) == ("aten.scaled_dot_product_attention", f"attention not raised: {reason}")
    assert miss.source.startswith("passes/test_raise_attention.py:")


def test_a_softmax_over_features_is_not_taken_for_attention():
    program = after("raise_attention", lambda self, inputs_embeds: (2 * inputs_embeds).softmax(-1))
    assert (ops_of(program), program.fallbacks) == (["aten.mul", "aten.softmax"], [])


def test_values_may_be_computed_after_the_softmax():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv(inputs_embeds)
        return (q @ repeated(k).transpose(-1, -2)).softmax(-1) @ repeated(v)

    assert len(calls(after("raise_attention", forward, embeds(32)), "sp_compile.attention")) == 1
