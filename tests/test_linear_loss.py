"""Loss and gradients of a linear layer's logits, a few rows at a time, are those of all rows at once."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from sp_compile import linear_loss
from sp_compile.linear_loss import linear_cross_entropy

ROWS, FEATURES, CLASSES = 13, 5, 7
CAPPED = "score = div(score, 3.0); score = tanh(score); score = mul(score, 3.0)"
CASES = list(itertools.product(["", CAPPED], [False, True], [0.0, 0.1]))


def inputs(dtype: torch.dtype, bias: bool) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows, weight and bias, which are trained; labels of which two are ignored; a gradient of each row's loss."""
    torch.manual_seed(3)
    shapes = [(ROWS, FEATURES), (CLASSES, FEATURES), *([(CLASSES,)] if bias else [])]
    trained = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    labels = torch.randint(0, CLASSES, (ROWS,))
    labels[[3, 12]] = -100
    return trained, labels, torch.randn(ROWS, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)


def reference(trained: list[torch.Tensor], labels: torch.Tensor, rule: str, smoothing: float) -> torch.Tensor:
    logits = F.linear(*trained).to(torch.promote_types(trained[0].dtype, torch.float32))
    logits = torch.tanh(logits / 3) * 3 if rule else logits
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("held", [1, 3 * CLASSES, 1 << 24])
@pytest.mark.parametrize(("rule", "bias", "smoothing"), CASES)
def test_exact_whatever_is_held_at_a_time(monkeypatch, held: int, rule: str, bias: bool, smoothing: float):
    monkeypatch.setattr(linear_loss, "HELD", held)
    trained, labels, grad = inputs(torch.float64, bias)
    expected = reference(trained, labels, rule, smoothing)
    found = linear_cross_entropy(*trained, *[None] * (not bias), labels, rule, -100, smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found[3] == found[12] == 0
    pairs = zip(*(torch.autograd.grad(each, trained, grad) for each in (found, expected)), strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_bf16_is_as_exact_as_all_rows_at_once(monkeypatch):
    monkeypatch.setattr(linear_loss, "HELD", 2 * CLASSES)
    trained, labels, grad = inputs(torch.bfloat16, True)
    wide = [each.detach().double().requires_grad_() for each in trained]
    exact = torch.autograd.grad(reference(wide, labels, CAPPED, 0.1), wide, grad.double())
    whole = torch.autograd.grad(reference(trained, labels, CAPPED, 0.1), trained, grad)
    found = torch.autograd.grad(linear_cross_entropy(*trained, labels, CAPPED, -100, 0.1), trained, grad)
    for own, other, right in zip(found, whole, exact, strict=True):
        assert own.dtype == torch.bfloat16
        assert (own - right).norm() <= 1.5 * (other - right).norm()


@pytest.mark.parametrize("frozen", [(1, 2), (0,)])
def test_what_is_frozen_has_no_gradient(frozen: tuple[int, ...]):
    trained, labels, grad = inputs(torch.float64, True)
    expected = torch.autograd.grad(reference(trained, labels, "", 0.0), trained, grad)
    for i in frozen:
        trained[i].requires_grad_(False)
    linear_cross_entropy(*trained, labels, "", -100, 0.0).backward(grad)
    for i, each in enumerate(trained):
        if i in frozen:
            assert each.grad is None
        else:
            torch.testing.assert_close(each.grad, expected[i])


def test_no_rows_and_torch_s_own_checks():
    trained, labels, _ = inputs(torch.float32, False)
    none = linear_cross_entropy(trained[0][:0], trained[1], None, labels[:0], "", -100, 0.0)
    assert none.shape == (0,)
    torch.library.opcheck(linear_cross_entropy, (*trained, None, labels, CAPPED, -100, 0.1))
