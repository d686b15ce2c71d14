"""Functions of a model that say their own derivative: of elements it is kept, else they are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sp_compile
from tests.training import Plain, apart, batch_of, plain_step, told

EXACT = 1e-10


class Halved(torch.autograd.Function):
    """Hands on half of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad / 2


class Bounded(torch.autograd.Function):
    """A root whose derivative has a bound."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.abs().sqrt()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * x.sign() / torch.sqrt(torch.clip(4 * x.abs(), min=0.5))


class Rounded(torch.autograd.Function):
    """Rounds, with the derivative of what it rounds."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, steps: float) -> torch.Tensor:
        return torch.round(x * steps) / steps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad.clone(), None


class Product(torch.autograd.Function):
    """Of two, with a derivative by each that is not the product's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, y = ctx.saved_tensors
        return 2 * (grad * y), -(x * grad) + grad


class Flipped(torch.autograd.Function):
    """Its backward moves elements."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad.flip(-1)


class Constant(torch.autograd.Function):
    """Its backward does not read the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.saved_tensors[0]


class Scaled(torch.autograd.Function):
    """By a weight that all rows share."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum((0, 1))


KEPT = {
    "halved": lambda model, x: Halved.apply(x),
    "bounded": lambda model, x: Bounded.apply(x),
    "rounded": lambda model, x: Rounded.apply(x, 4.0),
    "product": lambda model, x: Product.apply(x, model.norms[0](x)),
    "checkpointed": lambda model, x: checkpoint(lambda y: Bounded.apply(y).tanh(), x, use_reentrant=False),
}
REFUSED = {
    "flipped": lambda model, x: Flipped.apply(x),
    "constant": lambda model, x: Constant.apply(x),
    "scaled": lambda model, x: Scaled.apply(x, model.norms[0].weight),
    "flipped, checkpointed": lambda model, x: checkpoint(lambda y: Flipped.apply(y).tanh(), x, use_reentrant=False),
}


def hooked(model: Any, x: torch.Tensor) -> torch.Tensor:
    y = x.tanh()
    if y.requires_grad:
        y.register_hook(lambda grad: grad / 2)
    return y


class Own(Plain):
    """Every layer begins with one of these."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return super().layer(self.function(self, x), i)


def own(name: str) -> Own:
    torch.manual_seed(0)
    return Own((KEPT | REFUSED)[name]).double()


def step_on_ranks(name: str, sp: int | None, codegen: str) -> dict[str, torch.Tensor]:
    return plain_step(sp_compile.parallelize(own(name), sp=sp, codegen=codegen), batch_of())


@pytest.mark.parametrize("name", KEPT)
def test_derivatives_of_elements_are_kept(name: str):
    assert apart(step_on_ranks(name, 1, "eager"), plain_step(own(name), batch_of())) <= EXACT


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_they_are_kept_on_ranks(ranks, codegen: str):
    expected = plain_step(own("bounded"), batch_of())
    for found in ranks(2).run(step_on_ranks, "bounded", None, codegen, timeout=300):
        assert apart(found, expected) <= EXACT


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(name: str):
    model = Own(REFUSED[name])
    parallel = sp_compile.parallelize(model, sp=1, codegen="eager")
    message = told(lambda: parallel(**batch_of()))
    assert message.startswith("CaptureError: the torch.autograd.Function at tests/test_own_backwards.py:")
    assert "has a backward of its own that is not one of elements, and would be lost" in message


def test_hooks_on_gradients_are_refused_by_name():
    parallel = sp_compile.parallelize(Own(hooked), sp=1, codegen="eager")
    message = told(lambda: parallel(**batch_of()))
    assert message.startswith("CaptureError: ")
    assert "test_own_backwards.py" in message


def test_others_do_not_matter_to_a_forward_nor_to_what_is_frozen():
    model = own("flipped")
    parallel = sp_compile.parallelize(model, sp=1, codegen="eager")
    with torch.no_grad():
        torch.testing.assert_close(parallel(**batch_of()), model(**batch_of()))
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    found = plain_step(parallel, batch_of())["head.weight"].clone()
    torch.testing.assert_close(found, plain_step(model, batch_of())["head.weight"])
