"""Functions of a model that say their own derivative: of elements it is kept, else they are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import sp_compile
from sp_compile import codegen
from sp_compile.dynamo.backwards import without_own_backwards
from tests.training import Plain, apart, batch_of, plain_step, told

EXACT = 1e-10


def function(backward: Callable[..., Any]) -> Any:
    """A root of ``|x|`` whose backward is this function of the gradient and ``x``."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.abs().sqrt()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return backward(grad, ctx.saved_tensors[0])

    return Own.apply


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


class Both(torch.autograd.Function):
    """Of two outputs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Any:
        return x.clone(), 2 * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, other: torch.Tensor) -> Any:
        return grad + other


class Doubled(torch.autograd.Function):
    """Writes to its input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        x.mul_(2)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad / 2


@torch.library.custom_op("sp_compile_tests::mul", mutates_args=())
def other_mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Named as torch's, and another."""
    return a.flip(-1) * b


@other_mul.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(a)


hidden = function(lambda grad, x: grad.flip(-1))


@torch._dynamo.allow_in_graph
def in_graph(x: torch.Tensor) -> torch.Tensor:
    """What Dynamo does not look into."""
    result: torch.Tensor = hidden(x)
    return result


def bounded(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return grad * x.sign() / torch.sqrt(torch.clip(4 * x.abs(), min=0.5))


rooted = function(bounded)
ELEMENTS: dict[str, Callable[..., torch.Tensor]] = {
    "halved": lambda grad, x: grad / 2,
    "bounded": bounded,
    "a sum": lambda grad, x: grad * x - grad.neg() / 3,
    "chosen": lambda grad, x: torch.where(x > 0, grad, 0.0) + grad.masked_fill(x > 0.1, 0),
    "cast": lambda grad, x: (grad.to(torch.float64) * torch.sign(x).type_as(grad)).reshape(x.shape).to(grad.dtype),
}
OTHERS: dict[str, Callable[..., torch.Tensor]] = {
    "flipped": lambda grad, x: grad.flip(-1),
    "constant": lambda grad, x: x,
    "squared": lambda grad, x: grad * grad,
    "a quotient by it": lambda grad, x: 2 / grad,
    "shifted": lambda grad, x: grad + 1,
    "filled": lambda grad, x: grad.masked_fill(x > 0, 1.0),
    "chosen by it": lambda grad, x: torch.where(grad > 0, grad, 0.0),
    "rounded": lambda grad, x: grad.to(torch.float32).to(grad.dtype),
    "whole numbers": lambda grad, x: grad.to(torch.int64).to(grad.dtype),
    "divided to whole numbers": lambda grad, x: torch.div(grad, x, rounding_mode="floor"),
    "a sum of multiples": lambda grad, x: torch.add(grad, grad, alpha=2),
    "written": lambda grad, x: grad * x.mul_(2),
    "another op of the name": lambda grad, x: torch.ops.sp_compile_tests.mul(grad, x),
}
Run = Callable[[torch.Tensor], torch.Tensor]
KEPT: dict[str, Run] = {
    **{name: function(backward) for name, backward in ELEMENTS.items()},
    "straight through": lambda x: Rounded.apply(x, 4.0),
    "of two": lambda x: Product.apply(x, x.exp()),
}
REFUSED: dict[str, Run] = {
    **{name: function(backward) for name, backward in OTHERS.items()},
    "of what rows share": lambda x: Scaled.apply(x, x[0, 0]),
    "two outputs": lambda x: sum(Both.apply(x)),
    "written to": lambda x: Doubled.apply(x.clone()),
}


def gradient(run: Run) -> torch.Tensor:
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (run(x) * torch.arange(30.0, dtype=torch.float64).view(2, 3, 5)).sum().backward()
    assert x.grad is not None
    return x.grad


def compiled(run: Run) -> Run:
    torch._dynamo.reset()
    return torch.compile(run, backend=lambda gm, _: without_own_backwards(gm).forward, fullgraph=True)


@pytest.mark.parametrize("name", KEPT)
def test_derivatives_of_elements_are_kept(name: str):
    torch.testing.assert_close(gradient(compiled(KEPT[name])), gradient(KEPT[name]), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused(name: str):
    with pytest.raises(BackendCompilerFailed, match="of its own that is not known to be one of elements"):
        gradient(compiled(REFUSED[name]))


def hooked(x: torch.Tensor) -> torch.Tensor:
    y = x.tanh()
    if y.requires_grad:
        y.register_hook(lambda grad: grad / 2)
    return y


MODELS: dict[str, Run] = {
    "bounded": rooted,
    "in a checkpoint": lambda x: checkpoint(lambda y: rooted(y).tanh(), x, use_reentrant=False),
    "flipped": hidden,
    "flipped in a checkpoint": lambda x: checkpoint(lambda y: hidden(y).tanh(), x, use_reentrant=False),
    "hooked": hooked,
    "not in the graph": in_graph,
}


class Own(Plain):
    """Every layer begins with one of these."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.begin = MODELS[name]

    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return super().layer(self.begin(x), i)


def own(name: str) -> Own:
    torch.manual_seed(0)
    return Own(name).double()


def step_on_ranks(name: str, codegen: str) -> dict[str, torch.Tensor]:
    return plain_step(sp_compile.parallelize(own(name), codegen=codegen), batch_of())


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_they_are_kept_on_ranks(ranks, codegen: str):
    expected = plain_step(own("bounded"), batch_of())
    for found in ranks(2).run(step_on_ranks, "bounded", codegen, timeout=300):
        assert apart(found, expected) <= EXACT


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flipped", "the torch.autograd.Function at tests/test_own_backwards.py:"),
        ("flipped in a checkpoint", "the torch.autograd.Function at tests/test_own_backwards.py:"),
        ("hooked", "the hook on a gradient at tests/test_own_backwards.py:"),
        ("not in the graph", "in_graph at tests/test_own_backwards.py:"),
    ],
)
def test_models_are_refused_by_name(name: str, message: str):
    parallel = sp_compile.parallelize(own(name), sp=1, codegen="eager")
    assert told(lambda: parallel(**batch_of())).startswith(f"CaptureError: {message}")


def test_what_is_checkpointed_is_computed_again(monkeypatch: pytest.MonkeyPatch):
    graphs = []
    monkeypatch.setattr(codegen, "with_derivatives", lambda gm: graphs.append(gm) or gm)
    model = own("in a checkpoint")
    sp_compile.parallelize(model, sp=1, codegen="eager")(**batch_of())
    roots = [node for node in graphs[0].graph.nodes if node.target is torch.ops.aten.sqrt.default]
    assert len(roots) == 2 * len(model.qkv)  # of the value and of the slope in each layer
    assert all(node.meta.get("recompute") is not None for node in roots)


def test_others_do_not_matter_to_a_forward_nor_to_what_is_frozen():
    model = own("flipped")
    parallel = sp_compile.parallelize(model, sp=1, codegen="eager")
    with torch.no_grad():
        torch.testing.assert_close(parallel(**batch_of()), model(**batch_of()))
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    found = plain_step(parallel, batch_of())["head.weight"].clone()
    torch.testing.assert_close(found, plain_step(model, batch_of())["head.weight"])
