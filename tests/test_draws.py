"""What is drawn by place is as likely as asked, and draws know nothing of each other."""

from __future__ import annotations

import pytest
import torch

from sp_compile.draws import BITS, STEPS, drawn, mixed
from sp_compile.score_rule import evaluate


def mixed_by_definition(value: int) -> int:
    """The finalizer in whole numbers."""
    for shift, factor in STEPS:
        value ^= value >> shift
        value = value if factor is None else value * factor & BITS
    return value


def test_bits_are_mixed_as_the_source_says():
    values = [0, 1, 2, 12345, 2**31 - 1, 2**31, 3141592653, BITS]
    signed = torch.tensor([each - (each >> 31 << 32) for each in values], dtype=torch.int32)
    found = [each & BITS for each in mixed(signed).tolist()]
    assert found == [mixed_by_definition(each) for each in values]
    assert len(set(found)) == len(values)


def bits(count: int, start: int) -> torch.Tensor:
    return torch.tensor([mixed_by_definition(start + i) for i in range(count)])


@pytest.mark.parametrize("chance", [0.0, 0.1, 0.75, 1.0])
def test_shares_are_as_asked(chance: float):
    found = drawn(bits(400, 900)[:, None], bits(500, 0)[None, :], chance)
    assert found.shape == (400, 500)
    assert found.dtype == torch.bool
    spread = 4 * (chance * (1 - chance) / found.numel()) ** 0.5
    assert abs(float(found.double().mean()) - chance) <= spread + 2**-31
    for dim in (0, 1):  # nor is a query or a key more likely than others
        shares, usual = found.double().mean(dim=dim), (chance * (1 - chance) / found.shape[dim]) ** 0.5
        assert float(shares.std()) == pytest.approx(usual, rel=0.2, abs=1e-9)


def test_pairs_know_nothing_of_each_other():
    found = 2 * drawn(bits(300, 900)[:, None], bits(300, 0)[None, :], 0.5).double() - 1
    for other in (found.roll(1, 0), found.roll(1, 1), found.roll((1, 1), (0, 1)), found.t()):
        agree = (found * other).fill_diagonal_(0).mean()
        assert abs(float(agree)) < 4 / 300


def test_a_rule_draws_by_order_or_by_place():
    torch.manual_seed(0)
    score = torch.zeros(1, 2, 100, 100)
    by_order = evaluate("keep = bernoulli(score, 0.9)", [], ("keep",), score)["keep"]
    assert by_order.shape == score.shape
    assert abs(float(by_order.double().mean()) - 0.9) < 4 * (0.09 / score.numel()) ** 0.5
    operands = [bits(200, 900).view(1, 2, 100, 1), bits(100, 0)[None, :]]
    by_place = evaluate("keep = drawn(x0, x1, 0.9)", operands, ("keep",), score)["keep"]
    assert torch.equal(by_place, drawn(*operands, 0.9))
