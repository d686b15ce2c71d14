"""Attention in all its forms becomes one node that computes the same; what is not attention is left and said."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, masking_utils

from sp_compile.layout import token_layout
from sp_compile.ops import AttentionArgs
from tests.passes.graphs import (
    LENGTHS,
    Ranks,
    after,
    call,
    calls,
    embeds,
    ops_of,
    outputs,
    packed,
    qkv,
    repeated,
    run_whole,
)

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


def in_einsum(x: torch.Tensor) -> torch.Tensor:
    q, k, v = (each.transpose(1, 2) for each in whole(x))
    scores = torch.einsum("bqhd,bkhd->bhqk", 0.5 * q, k)
    return torch.einsum("bhqk,bkhd->bqhd", (scores + added(x)).softmax(-1), v)


def heads_last(x: torch.Tensor) -> torch.Tensor:
    q, k, v = (each.transpose(1, 2) for each in whole(x))
    scores = torch.einsum("bqhd,bkhd->bqkh", 0.5 * q, k) + TABLE[:, 0]
    scores = scores.masked_fill(~seen(x)[:, :, None], -torch.inf)
    scores = scores - scores.amax(-2, keepdim=True)
    return torch.einsum("bqkh,bkhd->bqhd", scores.softmax(-2), v)


def in_groups(x: torch.Tensor) -> torch.Tensor:
    """Queries ``[B, H_kv, G, Q, D]`` over keys that broadcast, instead of repeated keys."""
    q, k, v = qkv(x)
    scores = 0.5 * q.unflatten(1, (2, 2)) @ k[:, :, None].transpose(-1, -2) + TABLE[:, :1].view(2, 2, 1, 1)
    return (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)


def heads_in_rows(x: torch.Tensor) -> torch.Tensor:
    """All heads share a key, and lie in one dim with the queries, as in GPT-BigCode."""
    q, k, v = qkv(x, heads=6, kv_heads=1)
    tokens = x.shape[1]
    q = q.transpose(1, 2).reshape(1, tokens * 6, 4)
    scores = 0.5 * torch.bmm(q, k[:, 0].transpose(1, 2)).view(1, tokens, 6, tokens)
    weights = torch.where(seen(x)[None, :, None, :], scores, LOW).softmax(-1)
    return torch.bmm(weights.view(1, tokens * 6, tokens), v[:, 0]).view(1, tokens, 24)


def by_hand(x: torch.Tensor, weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    q, k, v = whole(x)
    return weigh((0.5 * (q @ k.transpose(-1, -2))).masked_fill(~seen(x), -torch.inf), v)


def exponentials(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    maximum = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - maximum)
    return weights, weights.sum(-1, keepdim=True), maximum


def softmax_by_hand(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights, total, _ = exponentials(scores)
    return weights / total @ v


def divided_after_product(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights, total, _ = exponentials(scores)
    return (weights @ v) / (total + 1e-9)


def sink_in_sum(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights, total, maximum = exponentials(scores)
    return weights / (total + torch.exp(TABLE[:, :1, None] - maximum)) @ v


def softmax_plus_one(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(scores)
    return weights / (1 + weights.sum(-1, keepdim=True)) @ v


def softmax_plus_one_less_maximum(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights, total, maximum = exponentials(scores)
    return weights / (total + torch.exp(-maximum)) @ v


def masked_exponentials(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(scores.shape[-1])
    weights = torch.exp(scores) * (rows[:, None] - rows < 3).float()
    return weights / weights.sum(-1, keepdim=True) @ v


def plus_one_beside_maximum(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights, total, _ = exponentials(scores)
    return weights / (total + 1) @ v


def little_beside_mean(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(scores - scores.mean(-1, keepdim=True))
    return weights / (weights.sum(-1, keepdim=True) + 1e-9) @ v


TABLE = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
TRIANGLE = torch.ones(1, 1, 256, 256).tril()
WEIGHTS = {"TABLE": TABLE, "TRIANGLE": TRIANGLE}


def bucket(x: torch.Tensor) -> torch.Tensor:
    """The relative position buckets of T5, for 16 buckets a side."""
    far = distance(x).abs()
    large = 8 + (torch.log(far.float() / 8) / math.log(16) * 8).long()
    return (distance(x) > 0).long() * 16 + torch.where(far < 8, far, torch.min(large, torch.full_like(large, 15)))


T5_BUCKET = (
    "t0 = sub(x0, x1); t1 = gt(t0, 0); t2 = int(t1); t3 = mul(t2, 16); t4 = abs(t0); t5 = lt(t4, 8); t6 = float(t4); "
    "t7 = div(t6, 8); t8 = log(t7); t9 = div(t8, 2.772588722239781); t10 = mul(t9, 8); t11 = int(t10); "
    "t12 = add(t11, 8); t13 = minimum(t12, 15); t14 = where(t5, t4, t13); t15 = add(t3, t14); "
    "bias = lookup(table0, t15)"
)


def stored(x: torch.Tensor) -> torch.Tensor:
    tokens = x.shape[1]
    return TRIANGLE[:, :, :tokens, :tokens]


def biased(x: torch.Tensor, bias: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return eager(x, lambda scores: scores + bias(x))


def own_values(x: torch.Tensor) -> torch.Tensor:
    """Values of another width than the keys, normed queries and keys, and a partial rotation, as in MLA."""
    q, k, _ = whole(x)
    q, k = F.normalize(q, dim=-1), F.rms_norm(k, (4,))
    angles = torch.arange(x.shape[1]).float()[:, None]
    q, k = (torch.cat([each[..., :2] * angles.cos(), each[..., 2:]], -1) for each in (q, k))
    v = x[:, None, :, :7].expand(1, 4, x.shape[1], 7)
    return sdpa_of(q, k, v, is_causal=True)


sdpa_of = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Form:
    """An attention over embeddings of width 32, and what its node carries."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    rule: str
    scale: float = 0.5
    empty_mean: bool = False
    misses: str = ""
    kv_heads: tuple[int, int] = (2, 2)


def mask_form(mask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rule: str, **others: Any) -> Form:
    """A mask of row numbers, in SDPA."""
    return Form(lambda x: sdpa(x, mask(*numbers(x))), rule, **others)


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
        "mask = le(x0, x1); t0 = sub(x0, x1); bias = mul(t0, 0.1)",
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
        "mask = le(x0, x1); t0 = sub(x0, x1); bias = mul(x2, t0)",
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
    "sdpa three dims": Form(lambda x: sdpa_of(*(each[0] for each in whole(x)), seen(x)), CAUSAL),
    "sdpa five dims": Form(lambda x: sdpa_of(*(each[None] for each in whole(x)), seen(x)[None, None, None]), CAUSAL),
    "sdpa values of another width": Form(own_values, CAUSAL, kv_heads=(4, 4)),
    "eager einsum": Form(in_einsum, CAUSAL, scale=1.0, empty_mean=True),
    "eager heads last": Form(heads_last, "mask = le(x0, x1); bias = copy(x2)", scale=1.0),
    "eager groups": Form(in_groups, "bias = copy(x0)", scale=1.0),
    "eager heads in rows": Form(heads_in_rows, CAUSAL, empty_mean=True, kv_heads=(1, 1)),
    "eager scaled after the mask": Form(
        lambda x: eager(x, lambda s: (s + added(x)) / 2), CAUSAL, scale=0.25, empty_mean=True
    ),
    "eager nan_to_num": Form(lambda x: by_hand(x, lambda s, v: s.softmax(-1).nan_to_num() @ v), CAUSAL),
    "softmax by hand": Form(lambda x: by_hand(x, softmax_by_hand), CAUSAL),
    "softmax by hand, divided after the product": Form(lambda x: by_hand(x, divided_after_product), CAUSAL),
    "softmax by hand, sink": Form(lambda x: by_hand(x, sink_in_sum), CAUSAL),
    "softmax plus one": Form(lambda x: by_hand(x, softmax_plus_one), CAUSAL),
    "softmax plus one less maximum": Form(lambda x: by_hand(x, softmax_plus_one_less_maximum), CAUSAL),
    "softmax by hand, masked": Form(
        lambda x: by_hand(x, masked_exponentials),
        "t0 = le(x0, x1); t1 = sub(x1, x2); t2 = lt(t1, 3); mask = and(t0, t2)",
    ),
    "T5 embedding": Form(
        lambda x: biased(x, lambda x: F.embedding(bucket(x), TABLE.T).permute(2, 0, 1)[None]), T5_BUCKET
    ),
    "T5 index": Form(
        lambda x: biased(x, lambda x: TABLE[:, bucket(x)]),
        T5_BUCKET.replace(
            "bias = lookup(table0, t15)",
            "t16 = lt(t15, 0); t17 = add(t15, 64); t18 = where(t16, t17, t15); bias = lookup(table0, t18)",
        ),
    ),
    "table of differences, rows flattened": Form(
        lambda x: biased(
            x, lambda x: TABLE.T[distance(x).clamp(-9, 9).flatten()].view(*seen(x).shape, 4).movedim(-1, 0)
        ),
        "t0 = sub(x0, x1); t1 = maximum(t0, -9); t2 = minimum(t1, 9); t3 = lt(t2, 0); t4 = add(t2, 64); "
        "t5 = where(t3, t4, t2); bias = lookup(table0, t5)",
    ),
    "stored triangle": Form(
        lambda x: eager(x, lambda s: s.masked_fill(stored(x) == 0, -torch.inf)),
        "t0 = mul(x0, 256); t1 = add(t0, x1); t2 = lookup(table0, t1); t3 = eq(t2, 0); mask = not(t3)",
    ),
    "stored triangle, multiplied": Form(
        lambda x: eager(x, lambda s: s * stored(x) - 1e4 * (1 - stored(x))),
        "t0 = mul(x0, 256); t1 = add(t0, x1); t2 = lookup(table0, t1); t3 = sub(1, t2); t4 = mul(t3, 10000.0); "
        "bias = neg(t4); t5 = mul(score, 0.5); score = mul(t5, t2)",
        scale=1.0,
    ),
    "window": mask_form(
        lambda q, k: (k <= q) & (q - k < 4), "t0 = le(x0, x1); t1 = sub(x1, x0); t2 = lt(t1, 4); mask = and(t0, t2)"
    ),
    "chunks": mask_form(
        lambda q, k: (k <= q) & (q // 4 == k // 4), "t0 = le(x0, x1); t1 = eq(x2, x3); mask = and(t0, t1)"
    ),
    "prefix": mask_form(lambda q, k: (k <= q) | (k < 3), "t0 = le(x0, x1); mask = or(t0, x2)"),
    "strided": mask_form(lambda q, k: (q - k) % 3 == 0, "t0 = sub(x0, x1); t1 = remainder(t0, 3); mask = eq(t1, 0)"),
    "transposed": mask_form(lambda q, k: (q <= k).T, CAUSAL),
    "transposed as scores are": mask_form(lambda q, k: (q <= k)[None, None].transpose(-1, -2), CAUSAL),
    "permuted": mask_form(lambda q, k: (q <= k)[None, None].permute(0, 1, 3, 2), CAUSAL),
    "expanded and reshaped": mask_form(
        lambda q, k: (k <= q)[None].expand(4, -1, -1).reshape(1, 4, *(k <= q).shape), CAUSAL
    ),
    "exclusive or": mask_form(
        lambda q, k: torch.logical_xor(k <= q, torch.logical_not(k < 4)), "t0 = le(x0, x1); mask = xor(t0, x2)"
    ),
    "triangle of ones": mask_form(lambda q, k: torch.ones_like(k <= q).tril(1), "t0 = add(x1, 1); mask = le(x0, t0)"),
    "diagonal": mask_form(
        lambda q, k: (k < q) | (torch.eye(q.shape[0]) > 0),
        "t0 = lt(x0, x1); t1 = eq(x2, x3); t2 = where(t1, 1, 0); t3 = gt(t2, 0); mask = or(t0, t3)",
    ),
    "triangle of lows": mask_form(
        lambda q, k: torch.full_like(q + k, -torch.inf, dtype=torch.float32).triu(1),
        "t0 = add(x1, 1); t1 = ge(x0, t0); mask = not(t1)",
    ),
    "one less a mask": mask_form(lambda q, k: (1 - (k <= q).float()) * LOW, CAUSAL, empty_mean=True),
    "low times one less a vector": mask_form(
        lambda q, k: (1 - (k % 3 != 1).float()) * -1e9 + 0 * q,
        "t0 = mul(x0, -1000000000.0); bias = add(t0, x1); mask = gt(t0, -1000000000.0)",
        empty_mean=True,
    ),
    "outer product": Form(lambda x: sdpa(x, x[0, :, :1] @ x[0, :, 1:2].T > -1), "t0 = mul(x0, x1); mask = gt(t0, -1)"),
    "outer einsum": Form(
        lambda x: sdpa(x, torch.einsum("bq,bk->bqk", x[..., 0], x[..., 1]) > -1), "t0 = mul(x0, x1); mask = gt(t0, -1)"
    ),
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
    tiles = {"plan_attention": {"kernel": "tiles"}}
    return after(last, lambda self, inputs_embeds: form.forward(inputs_embeds), embeds(32), options=tiles)


def wide_nodes(program: Any) -> list[str]:
    """Nodes of more than one dim of tokens."""
    shapes = {node.name: list(getattr(node.meta.get("val"), "shape", ())) for node in program.graph.nodes}
    return [name for name, sizes in shapes.items() if sum(isinstance(size, torch.SymInt) for size in sizes) > 1]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_attention_becomes_one_node_with_its_rules_that_computes_the_same(form: Form):
    program = program_of(form, "raise_attention")
    attention = AttentionArgs(*call(program, "sp_compile.attention").args)
    assert (attention.rule, attention.scale, attention.empty_mean) == (form.rule, form.scale, form.empty_mean)
    assert [each.meta["val"].shape[1] for each in (attention.k, attention.v)] == [*form.kv_heads]  # not repeated
    assert not {"aten.softmax", "aten.scaled_dot_product_attention"} & set(ops_of(program))
    assert [form.misses in each.reason for each in program.fallbacks] == [True] * bool(form.misses)
    assert form.misses or not wide_nodes(program)
    found = outputs(program, run_whole(program, {**embeds(32), **WEIGHTS}))[0]
    torch.testing.assert_close(found, form.forward(embeds(32)["inputs_embeds"]))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_raised_attention_computes_the_same_on_ranks(form: Form):
    program = program_of(form, "localize_shapes")
    for lengths, scheme in ((LENGTHS, "zigzag"), ((1, 2), "zigzag"), ((150, 70), "contiguous")):
        inputs = {**embeds(32, lengths), **WEIGHTS}
        expected = form.forward(inputs["inputs_embeds"])
        for (found,) in Ranks(program, inputs, token_layout(lengths, 2, scheme, min_shard_length=2)).outputs():
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


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
    "a little beside what is no maximum": (
        lambda x: by_hand(x, little_beside_mean),
        "1e-09 is added to the sum of exponentials less %mean",
    ),
    "scores times their transpose": (
        lambda x: eager(x, lambda s: torch.tanh(s * s.transpose(-1, -2))),
        "between the product and the softmax: %matmul is used with other rows and columns",
    ),
    "one beside a maximum": (
        lambda x: by_hand(x, plus_one_beside_maximum),
        "1 is added to the sum of exponentials less",
    ),
    "weights that are dropped twice": (
        lambda x: by_hand(x, lambda s, v: F.dropout(F.dropout(s.softmax(-1), 0.1), 0.1) @ v),
        r"the weights go into %dropout_1, not into a product with the values",
    ),
    "two columns beside the scores": (
        two_columns,
        r"%cat concatenates scores with something that is not one sink column",
    ),
}


@pytest.mark.parametrize(("forward", "reason"), MISSES.values(), ids=MISSES)
def test_what_is_almost_attention_is_left_with_the_node_that_does_not_fit(forward: Callable[..., Any], reason: str):
    program = after("raise_attention", lambda self, inputs_embeds: forward(inputs_embeds), embeds(32))
    (miss,) = program.fallbacks
    assert miss.count == 1
    assert miss.source.startswith("passes/test_raise_attention.py:")
    assert reason in miss.reason
    assert calls(program, "sp_compile.attention") == []
    assert wide_nodes(program)


def test_sdpa_that_is_not_raised_carries_the_reason():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        few = inputs_embeds[None, :, :4]
        return F.scaled_dot_product_attention(inputs_embeds[None], few, few)

    program = after("raise_attention", forward, embeds(32))
    reason = call(program, "aten.scaled_dot_product_attention").meta["not_raised"]
    assert reason == "its key %slice_1 is not over the tokens: [1, 1, 4, 32]"
    assert program.fallbacks == []


def test_a_softmax_over_features_is_not_taken_for_attention():
    program = after("raise_attention", lambda self, inputs_embeds: (2 * inputs_embeds).softmax(-1))
    assert (ops_of(program), program.fallbacks) == (["aten.mul", "aten.softmax"], [])


def test_values_may_be_computed_after_the_softmax():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv(inputs_embeds)
        return (q @ repeated(k).transpose(-1, -2)).softmax(-1) @ repeated(v)

    assert len(calls(after("raise_attention", forward, embeds(32)), "sp_compile.attention")) == 1


class Masked(nn.Module):
    """SDPA under a mask that transformers or the caller makes of the inputs."""

    def __init__(self, mask: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        other: torch.Tensor | None = None,
    ) -> torch.Tensor:
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "other": other}
        inputs = {name: each for name, each in inputs.items() if each is not None}
        return sdpa(inputs_embeds, self.mask(inputs_embeds, **inputs))


def of_transformers(name: str, **options: Any) -> Callable[..., torch.Tensor]:
    """A mask of transformers' masking utilities."""
    config = LlamaConfig(num_attention_heads=4, sliding_window=4, attention_chunk_size=4, attn_implementation="sdpa")
    make = getattr(masking_utils, name)

    def mask(x: torch.Tensor, attention_mask: Any = None, other: Any = None, **inputs: Any) -> torch.Tensor:
        if other is not None:
            inputs["block_sequence_ids"] = other
        if "bidirectional" not in name:
            inputs["past_key_values"] = None
        return make(config, x, attention_mask=attention_mask, **inputs, **options)

    return mask


def two_sequences() -> dict[str, torch.Tensor]:
    """Padding on the left of one row and on the right of the other, and image blocks in both."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :3], mask[1, 9:] = 0, 0
    blocks = torch.tensor([[-1, -1, -1, 0, 0, 0, -1, 1, 1, -1, -1], [0, 0, -1, -1, 1, 1, 1, 1, -1, -1, -1]])
    embeds = torch.randn(2, 11, 32, generator=generator)
    return {"inputs_embeds": embeds, "attention_mask": mask, "other": blocks}


def padded_by_hand(x: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    """``(1 - m) * min`` of a causal mask times a padding mask, as before transformers 5."""
    both = seen(x)[None, None] * attention_mask[:, None, None, :]
    return (1.0 - both.to(x.dtype)) * LOW


def with_prefixes(x: torch.Tensor, other: torch.Tensor, **_: Any) -> torch.Tensor:
    queries, keys = numbers(x)
    return (keys <= queries) | (keys < (other == 0).sum(-1)[:, None, None, None])


def documents(x: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    starts = (attention_mask == 0).cumsum(-1)
    return torch.eq(starts[:, None, :, None], starts[:, None, None, :]).logical_and(seen(x))


def both_ways(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q - k).abs() < 2


def of_inputs(keep: tuple[str, ...]) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {name: each for name, each in two_sequences().items() if name in ("inputs_embeds", *keep)}


MASKS: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], dict[str, torch.Tensor]], str]] = {
    "packed": (
        of_transformers("create_causal_mask"),
        lambda: packed(32),
        "t0 = eq(x0, x1); t1 = le(x2, x3); mask = and(t0, t1)",
    ),
    "padded": (
        of_transformers("create_causal_mask"),
        of_inputs(("attention_mask",)),
        "t0 = le(x0, x1); mask = and(t0, x2)",
    ),
    "padded window": (
        of_transformers("create_sliding_window_causal_mask"),
        of_inputs(("attention_mask",)),
        "t0 = gt(x0, x1); t1 = le(x0, x2); t2 = and(t0, t1); mask = and(t2, x3)",
    ),
    "padded chunks": (
        of_transformers("create_chunked_causal_mask"),
        of_inputs(("attention_mask",)),
        "t0 = eq(x0, x1); t1 = le(x2, x3); t2 = and(t0, t1); mask = and(t2, x4)",
    ),
    "image blocks": (
        of_transformers("create_causal_mask"),
        of_inputs(("attention_mask", "other")),
        "t0 = le(x0, x1); t1 = eq(x2, x3); t2 = and(t1, x4); t3 = or(t0, t2); mask = and(t3, x5)",
    ),
    "or, and, through vmap": (
        of_transformers("create_causal_mask", or_mask_function=both_ways, and_mask_function=both_ways),
        of_inputs(("attention_mask",)),
        "t0 = le(x0, x1); t1 = sub(x1, x0); t2 = abs(t1); t3 = lt(t2, 2); t4 = or(t0, t3); t5 = and(t4, t3); "
        "mask = and(t5, x2)",
    ),
    "bidirectional": (
        of_transformers("create_bidirectional_mask"),
        of_inputs(("attention_mask",)),
        "mask = and(x0, x1)",
    ),
    "padded by hand": (
        padded_by_hand,
        of_inputs(("attention_mask",)),
        "t0 = le(x0, x1); t1 = mul(t0, x2); t2 = float(t1); t3 = sub(1.0, t2); t4 = mul(t3, -3.4028234663852886e+38); "
        "mask = gt(t4, -1000000000.0); bias = copy(t4)",
    ),
    "prefixes": (with_prefixes, of_inputs(("other",)), "t0 = le(x0, x1); mask = or(t0, x2)"),
    "documents": (documents, of_inputs(("attention_mask",)), "t0 = eq(x0, x1); t1 = le(x2, x3); mask = and(t0, t1)"),
}


@pytest.mark.parametrize(("mask", "inputs", "rule"), MASKS.values(), ids=MASKS)
def test_masks_of_inputs_are_lifted(mask: Any, inputs: Any, rule: str):
    model = Masked(mask)
    program = after("raise_attention", model, inputs())
    assert AttentionArgs(*call(program, "sp_compile.attention").args).rule == rule
    assert (program.fallbacks, wide_nodes(program)) == ([], [])
    found = outputs(program, run_whole(program, inputs()))[0]
    expected = model(**inputs())
    sees = inputs().get("attention_mask", torch.ones(1, 1))[:, None, :, None] > 0
    torch.testing.assert_close(found.where(sees, 0), expected.where(sees, 0), atol=1e-5, rtol=1e-5)


def test_a_vector_that_is_indexed_by_all_rows_in_order_is_itself():
    mask, inputs, _ = MASKS["padded"]
    assert calls(after("normalize", Masked(mask), inputs()), "aten.index")
    program = after("raise_attention", Masked(mask), inputs())
    assert calls(program, "aten.index") == []
    (padding,) = [
        each
        for each in AttentionArgs(*call(program, "sp_compile.attention").args).operands
        if each.meta["val"].shape[0] == 2
    ]
    torch.testing.assert_close(
        run_whole(program, inputs())[padding], inputs()["attention_mask"][:, None, None, :].bool()
    )


def test_a_matrix_that_the_caller_passes_stays_one_operand():
    inputs = {**embeds(32), "other": torch.randn(1, 4, 11, 11, generator=torch.Generator().manual_seed(0))}
    model = Masked(lambda x, other: torch.where(seen(x), other, -torch.inf))
    program = after("raise_attention", model, inputs)
    attention = AttentionArgs(*call(program, "sp_compile.attention").args)
    assert attention.rule == "mask = le(x0, x1); bias = copy(x2)"
    (miss,) = program.fallbacks
    assert miss.reason == "mask not lifted, cut to the rank's rows: an input of the model"
    torch.testing.assert_close(outputs(program, run_whole(program, inputs))[0], model(**inputs))
