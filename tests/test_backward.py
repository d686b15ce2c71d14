"""The gradient of attention against autograd of its definition in double precision."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from sp_compile import ops
from sp_compile.rule_derivatives import underivable
from sp_compile.score_rule import evaluate

CAUSAL = "mask = le(x1, x0)"
RULES = {
    "causal": CAUSAL,
    "window": "t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, 7); mask = and(t0, t2)",
    "packed": "t0 = le(x1, x0); t1 = eq(x3, x2); mask = and(t0, t1)",
    "all": "bias = copy(0.0)",
    "no band": "t0 = remainder(x1, 3); t1 = remainder(x0, 3); mask = eq(t0, t1)",
    "alibi": "mask = le(x1, x0); t1 = sub(x1, x0); t2 = float(t1); bias = mul(t2, 0.25)",
    "softcap": "mask = le(x1, x0); t1 = div(score, 0.5); t2 = tanh(t1); score = mul(t2, 0.5)",
    "blind rows": "mask = lt(x1, x0)",
    "dropped weights": "mask = le(x1, x0); keep = drawn(x4, x5, 0.8)",
    "dropped weights of changed scores": "t1 = tanh(score); score = mul(t1, 0.5); keep = drawn(x4, x5, 0.3)",
}
LEARNED = {
    "per query and head": "mask = le(x1, x0); bias = mul(x6, 3.0)",
    "per key, twice": "mask = le(x1, x0); t1 = exp(x7); bias = add(t1, x7)",
    "a product of both": "mask = le(x1, x0); bias = mul(x6, x7)",
    "a table": "mask = le(x1, x0); t0 = sub(x0, x1); t1 = abs(t0); t2 = lookup(table0, t1); bias = mul(t2, 0.5)",
    "a table of all heads, and a factor of scores": (
        "t0 = sub(x0, x1); t1 = abs(t0); bias = lookup(table1, t1); t3 = mul(score, x6); score = tanh(t3)"
    ),
    "where dropped": "mask = le(x1, x0); t0 = eq(x2, x3); bias = where(t0, x6, x7); keep = drawn(x4, x5, 0.8)",
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("lse_too", [False, True], ids=["output", "log-sum-exp too"])
@pytest.mark.parametrize("empty_mean", [False, True], ids=["zero", "mean"])
def test_gradients_are_those_of_the_definition(rule: str, lse_too: bool, empty_mean: bool):
    q, k, v = random(2, 6, QUERIES, 16), random(2, 2, KEYS, 16), random(2, 2, KEYS, 24)
    operands = vectors()
    valid = torch.arange(KEYS) < 200
    out, lse = ops.attention(q, k, v, operands, [], rule, 0.25, empty_mean, "tiles", None, valid)
    wanted, wanted_lse, blind = definition(q, k, v, operands, [], rule, 0.25, valid)
    if empty_mean:
        mean = v[:, :, valid].mean(dim=2, keepdim=True).repeat_interleave(3, dim=1)
        wanted = torch.where(blind.unsqueeze(-1), mean, wanted)
    by_out, by_lse = torch.randn_like(out), torch.randn_like(lse)

    def loss(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        total = (out * by_out).sum()
        return total + (torch.where(blind, 0.0, lse) * by_lse).sum() if lse_too else total

    found = torch.autograd.grad(loss(out, lse), (q, k, v))
    for each, other in zip(found, torch.autograd.grad(loss(wanted, wanted_lse), (q, k, v)), strict=True):
        torch.testing.assert_close(each, other, rtol=1e-10, atol=1e-12)


QUERIES, KEYS = 150, 210


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def vectors() -> list[torch.Tensor]:
    """Numbers of rows, of requests, and bits to draw by."""
    rows, columns = torch.arange(QUERIES)[:, None], torch.arange(KEYS)[None, :]
    bits = torch.randint(0, 1 << 32, (2, 6, QUERIES, 1), generator=torch.Generator().manual_seed(1))
    return [rows, columns, rows // 40, columns // 40, bits, bits[0, 0, :1] ^ (columns * 2654435761 & 0xFFFFFFFF)]


@pytest.mark.parametrize("rule", LEARNED.values(), ids=LEARNED)
def test_what_a_rule_learns_from_gets_its_gradient(rule: str):
    q, k, v = random(2, 6, QUERIES, 16), random(2, 2, KEYS, 16), random(2, 2, KEYS, 24)
    learned = [random(2, 6, QUERIES, 1), random(1, KEYS)]
    tables = [random(6, KEYS), random(1, KEYS)]
    operands, valid = [*vectors(), *learned], torch.arange(KEYS) < 200
    out, _ = ops.attention(q, k, v, operands, tables, rule, 0.25, False, "tiles", None, valid)
    wanted, _, _ = definition(q, k, v, operands, tables, rule, 0.25, valid)
    by_out, leaves = torch.randn_like(out), (q, k, v, *learned, *tables)
    found = torch.autograd.grad((out * by_out).sum(), leaves)
    expected = torch.autograd.grad((wanted * by_out).sum(), leaves, allow_unused=True)
    assert any(each is not None for each in expected[3:])
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, torch.zeros_like(each) if other is None else other, rtol=1e-10, atol=1e-12)


def definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    scale: float,
    valid: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, log-sum-exp and which rows see nothing, out of ops that torch differentiates."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    score = q @ k.transpose(-1, -2) * scale
    values = evaluate(rule, operands, ("mask", "bias", "score", "keep"), score, tables)
    score = values.get("score", score) + values.get("bias", 0.0)
    mask = (values.get("mask", torch.tensor(True)) & valid).expand(score.shape)
    blind = ~mask.any(dim=-1)
    score = torch.where(mask, score, -1e300)
    weights = torch.where(blind.unsqueeze(-1), 0.0, torch.softmax(score, dim=-1))
    return (weights * values.get("keep", 1.0)) @ v, torch.logsumexp(score, dim=-1), blind


def test_functions_without_a_gradient_are_found_before_they_are_needed():
    rule = "t0 = remainder(x0, 2.0); t1 = floor(x1); bias = mul(t0, x1); mask = le(t1, x2)"
    assert underivable(rule, ["x0"]) == "remainder"
    assert underivable(rule, ["x1", "x2"]) is None
    beyond = "t0 = floor(x0); t1 = remainder(t0, 2.0); bias = mul(t1, x1)"  # through steps no gradient goes on
    assert underivable(beyond, ["x0"]) is None
    assert underivable("t0 = lookup(table0, x0); bias = exp(t0)", ["table0"]) is None
