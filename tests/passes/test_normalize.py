"""Canonical ATen: one op per meaning, no op that does nothing, and nothing else changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile.passes.normalize import Normalize
from tests.passes.graphs import after, call, embeds, ops_of, outputs, run_whole

aten = torch.ops.aten


def normalized(forward: Callable[..., Any], functional: bool = True) -> Any:
    """The program of a function of the embeddings, checked to compute the same as before."""
    program = after("normalize", lambda self, inputs_embeds: forward(inputs_embeds), functional=functional)
    found = outputs(program, run_whole(program, embeds()))[0]
    torch.testing.assert_close(found, forward(**{"x": embeds()["inputs_embeds"]}))
    return program


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: aten.view.default(2 * x, [1, x.shape[1], 2, 4]),
        lambda x: aten._unsafe_view.default(2 * x, [1, x.shape[1], 2, 4]),
        lambda x: (2 * x).reshape(1, -1, 2, 4),
    ],
    ids=["view", "_unsafe_view", "reshape"],
)
def test_every_change_of_shape_is_a_reshape(forward: Callable[..., Any]):
    assert ops_of(normalized(forward, functional=False)) == ["aten.mul", "aten.reshape"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: (2 * x).clone(),
        lambda x: (2 * x).contiguous(),
        lambda x: (2 * x).detach(),
        lambda x: (2 * x)[:, :],
        lambda x: (2 * x).expand(1, -1, 8),
        lambda x: (2 * x).reshape(1, -1, 8),
        lambda x: (2 * x).repeat(1, 1, 1),
        lambda x: F.dropout(2 * x, 0.0, training=True),
        lambda x: F.dropout(2 * x, 0.5, training=False),
        lambda x: (2 * x).type_as(x),
        lambda x: (2 * x).to(torch.float32, copy=True),
    ],
)
@pytest.mark.parametrize("functional", [True, False])
def test_what_does_nothing_is_taken_out(forward: Callable[..., Any], functional: bool):
    assert ops_of(normalized(forward, functional)) == ["aten.mul"]


@pytest.mark.parametrize(
    ("forward", "op"),
    [
        (lambda x: (2 * x)[..., 1:], "aten.slice"),
        (lambda x: (2 * x)[:, ::2], "aten.slice"),
        (lambda x: (2 * x).expand(3, -1, 8), "aten.expand"),
        (lambda x: (2 * x).repeat(1, 1, 2), "aten.repeat"),
        (lambda x: (2 * x).double(), "aten._to_copy"),
        (lambda x: F.pad(2 * x, (1, 1), mode="circular"), "aten.pad"),
    ],
)
def test_what_does_something_stays(forward: Callable[..., Any], op: str):
    assert ops_of(normalized(forward)) == ["aten.mul", op]


def test_dropout_of_a_model_in_training_stays():
    program = after("normalize", lambda self, inputs_embeds: F.dropout(2 * inputs_embeds, 0.5, training=True))
    assert ops_of(program) == ["aten.mul", "aten.dropout"]


@pytest.mark.parametrize("arguments", [((1, 2),), ((1, 2), "constant", 3.0)])
def test_constant_padding_is_one_op(arguments: tuple[Any, ...]):
    assert ops_of(normalized(lambda x: F.pad(2 * x, *arguments))) == ["aten.mul", "aten.constant_pad_nd"]


@pytest.mark.parametrize(
    ("forward", "op"),
    [
        (lambda x: torch.multiply(x, 2), "aten.mul"),
        (lambda x: torch.subtract(x, 2), "aten.sub"),
        (lambda x: torch.greater_equal(x, 2), "aten.ge"),
        (lambda x: torch.not_equal(x, 2), "aten.ne"),
        (lambda x: torch.negative(x), "aten.neg"),
    ],
)
def test_synonyms_are_one_op(forward: Callable[..., Any], op: str):
    assert ops_of(normalized(forward, functional=False)) == [op]


def test_a_concatenation_with_nothing_is_taken_out():
    assert "aten.cat" not in ops_of(normalized(lambda x: torch.cat([x.new_zeros(0), 2 * x], 1)))
    assert "aten.cat" in ops_of(normalized(lambda x: torch.cat([x, 2 * x], 1)))


@pytest.mark.parametrize(
    ("like", "fill"),
    [(torch.zeros_like, 0), (torch.ones_like, 1), (lambda x: torch.full_like(x, 3.0), 3.0)],
    ids=["zeros_like", "ones_like", "full_like"],
)
def test_a_fill_does_not_depend_on_the_tensor_that_lends_its_shape(like: Callable[..., Any], fill: float):
    program = normalized(lambda x: like(x.int()) + x)
    shape, value = call(program, "aten.full").args
    assert (shape[0], shape[1].name, shape[2], value) == (1, "tokens", 8, fill)
    assert ops_of(program) == ["aten.full", "aten.add"]


def test_assertions_on_metadata_are_taken_out():
    captured = after(None, lambda self, inputs_embeds: (2 * inputs_embeds).double())
    assert "aten._assert_tensor_metadata" in ops_of(captured)
    assert ops_of(normalized(lambda x: (2 * x).double())) == ["aten.mul", "aten._to_copy"]


def test_sizes_of_the_token_dim_read_the_token_length():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return 2 * inputs_embeds + torch.arange(inputs_embeds.shape[1]).view(1, -1, 1)

    program = after(None, forward)
    arange, doubled = call(program, "aten.arange"), call(program, "aten.mul")
    length = arange.args[0]
    with program.graph.inserting_before(arange):
        sizes = [program.graph.call_function(aten.sym_size.int, (doubled, dim)) for dim in (1, 2)]
    for size, value in zip(sizes, doubled.meta["val"].shape[1:], strict=True):
        size.meta["val"] = value
    arange.args = (sizes[0],)
    call(program, "aten.view").args = (arange, [1, -1, sizes[1]])
    Normalize().run(program)
    assert arange.args == (length,)
    assert call(program, "aten.sym_size").args == (doubled, 2)


def order(x: torch.Tensor) -> torch.Tensor:
    return x[0, :, 0].argsort()


def test_the_inverse_of_a_permutation_is_an_argsort():
    def forward(x: torch.Tensor) -> torch.Tensor:
        inverse = torch.empty_like(order(x))
        inverse[order(x)] = torch.arange(x.shape[1])
        return inverse

    found = ops_of(normalized(forward))
    assert found.count("aten.argsort") == 2
    assert "aten.index_put" not in found


@pytest.mark.parametrize(
    ("into", "index", "values"),
    [
        (torch.empty_like, lambda x: 0 * order(x), lambda x: torch.arange(x.shape[1])),
        (torch.empty_like, order, lambda x: 2 * torch.arange(x.shape[1])),
        (torch.zeros_like, lambda x: order(x)[:2], lambda x: torch.arange(2)),
    ],
    ids=["no permutation", "no range", "not all rows"],
)
def test_other_writes_by_index_stay(into: Callable[..., Any], index: Callable[..., Any], values: Callable[..., Any]):
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        written = into(order(inputs_embeds))
        written[index(inputs_embeds)] = values(inputs_embeds)
        return written

    assert "aten.index_put" in ops_of(after("normalize", forward))
