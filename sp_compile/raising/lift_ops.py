"""How each op becomes part of a score rule: a table from ATen ops to the functions that rules know.

Beside pointwise ops there are those that move dims (followed back to the value they view), triangles and outer products
(comparisons and products of row vectors), and entries read out of small tables by an index, such as relative position
biases or the corner of a stored mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from sp_compile.raising.axes import Dims, before_view
from sp_compile.raising.lookups import NotLifted, embedding, indexed, sliced
from sp_compile.symbols import is_tensor, shape_of

if TYPE_CHECKING:
    from sp_compile.raising.lift import Lifter

__all__ = ["NotLifted", "constant", "hides", "is_zero_one", "lift"]

aten = torch.ops.aten

_DIRECT = {
    "add": "add", "sub": "sub", "subtract": "sub", "mul": "mul", "multiply": "mul", "div": "div", "divide": "div",
    "floor_divide": "floor_divide", "remainder": "remainder", "neg": "neg", "abs": "abs", "pow": "pow", "exp": "exp",
    "exp2": "exp2", "log": "log", "log2": "log2", "log1p": "log1p", "sqrt": "sqrt", "tanh": "tanh",
    "sigmoid": "sigmoid", "sign": "sign", "floor": "floor", "ceil": "ceil", "round": "round",
    "maximum": "maximum", "minimum": "minimum", "max": "maximum", "min": "minimum",
    "le": "le", "lt": "lt", "ge": "ge", "gt": "gt", "eq": "eq", "ne": "ne", "where": "where",
    "logical_and": "and", "logical_or": "or", "logical_xor": "xor", "logical_not": "not",
}  # fmt: skip
_BITWISE = {"__and__": "and", "bitwise_and": "and", "__or__": "or", "bitwise_or": "or", "bitwise_not": "not",
            "__xor__": "xor", "bitwise_xor": "xor"}  # fmt: skip
_FILLS = {"zeros": 0, "zeros_like": 0, "ones": 1, "ones_like": 1, "new_zeros": 0, "new_ones": 1}
_CASTS = ("_to_copy", "to", "type_as")


def lift(lifter: Lifter, node: fx.Node, dims: Dims, vectors: bool) -> Any:
    """Name or number for a node's value.

    Raises:
        NotLifted: rules do not know the op.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        raise NotLifted("an input of the model" if node.op == "placeholder" else f"{node.target} is not pointwise")
    view = before_view(node, dims)
    if view is not None:
        return lifter.lift(*view, vectors)
    name, arguments = op_of(node), arguments_of(node)
    if name in _HANDLERS:
        return _HANDLERS[name](lifter, node, dims)

    def value(each: Any) -> Any:
        return lifter.lift(each, dims, vectors)

    if name == "masked_fill":
        return lifter.call("where", value(node.args[1]), value(node.args[2]), value(node.args[0]))
    if name in _CASTS:
        return _cast(lifter, node, value(node.args[0]))
    if name == "clamp":
        return _clamp(lifter, value, arguments)
    if name == "rsub":
        return lifter.call("sub", value(node.args[1]), _scaled(lifter, value(node.args[0]), arguments))
    function = _function(node, name, arguments)
    values = [value(each) for each in node.args]
    if "alpha" in arguments:
        values = [values[0], _scaled(lifter, values[1], arguments)]
    return lifter.call(function, *values)


def _function(node: fx.Node, name: str, arguments: Mapping[str, Any]) -> str:
    rounding = arguments.get("rounding_mode")
    if rounding is not None and rounding != "floor":
        raise NotLifted(f"{name} that rounds by {rounding}")
    if rounding == "floor":
        return "floor_divide"
    if name in _DIRECT and (name not in ("max", "min") or len(node.args) == 2) and "dim" not in arguments:
        return _DIRECT[name]
    if name in _BITWISE and node.meta["val"].dtype == torch.bool:
        return _BITWISE[name]
    raise NotLifted(f"{name} is not a pointwise op that rules know")


def _scaled(lifter: Lifter, value: Any, arguments: Mapping[str, Any]) -> Any:
    alpha = arguments.get("alpha", 1)
    return value if alpha == 1 else lifter.call("mul", value, alpha)


def _clamp(lifter: Lifter, value: Callable[[Any], Any], arguments: Mapping[str, Any]) -> Any:
    result = value(arguments["self"])
    for side, function in (("min", "maximum"), ("max", "minimum")):
        if arguments.get(side) is not None:
            result = lifter.call(function, result, value(arguments[side]))
    return result


def _cast(lifter: Lifter, node: fx.Node, value: Any) -> Any:
    source: Any = node.args[0]
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    if not isinstance(value, str):
        return bool(value) if after == torch.bool else float(value) if after.is_floating_point else int(value)
    if after == torch.bool:
        return value if before == torch.bool else lifter.call("bool", value)
    if not after.is_floating_point:
        return value if not before.is_floating_point and before != torch.bool else lifter.call("int", value)
    return value if before.is_floating_point else lifter.call("float", value)


def _triangle(lifter: Lifter, node: fx.Node, dims: Dims) -> Any:
    diagonal = arguments_of(node).get("diagonal", 0)
    row_dims = [each for each in dims[-2:] if each in ((lifter.frame.queries,), (lifter.frame.keys,))]
    if not isinstance(diagonal, int) or len(row_dims) != 2:
        raise NotLifted(f"{op_of(node)} with a symbolic diagonal or over other dims than queries and keys")
    of_keys = row_dims[1] == (lifter.frame.keys,)
    columns, rows = lifter.rows(of_keys), lifter.rows(not of_keys)
    rows = rows if diagonal == 0 else lifter.call("add", rows, diagonal)
    inside = lifter.call("le" if op_of(node) == "tril" else "ge", columns, rows)
    value = lifter.lift(node.args[0], dims)
    if node.meta["val"].dtype == torch.bool:
        return inside if value is True else lifter.call("and", inside, value)
    return lifter.call("where", inside, value, 0)


def _diagonal(lifter: Lifter, node: fx.Node, dims: Dims) -> Any:
    on = lifter.call("eq", lifter.rows(of_keys=True), lifter.rows(of_keys=False))
    return on if node.meta["val"].dtype == torch.bool else lifter.call("where", on, 1, 0)


def _outer(lifter: Lifter, node: fx.Node, dims: Dims) -> Any:
    """A product over an inner dim of size 1."""
    left, right = node.args[:2]
    if op_of(node) in ("outer", "ger"):
        parts = (left, dims[:1]), (right, dims[1:])
    elif len(shape_of(left)) >= 2 and len(shape_of(right)) >= 2 and shape_of(left)[-1] == 1:
        parts = (left, (*dims[:-1], ())), (right, (*dims[:-2], (), dims[-1]))
    else:
        raise NotLifted(f"{op_of(node)} is not a pointwise op that rules know")
    return lifter.call("mul", *(lifter.lift(each, own) for each, own in parts))


def _einsum(lifter: Lifter, node: fx.Node, dims: Dims) -> Any:
    equation, parts = node.args[:2]
    inputs, _, output = str(equation).replace(" ", "").partition("->")
    letters = dict(zip(output, dims, strict=False))
    values = []
    for text, each in zip(inputs.split(","), parts, strict=True):
        kept = dict(zip(text, shape_of(each), strict=False))
        if len(set(text)) != len(text) or "." in text or any(s != 1 for x, s in kept.items() if x not in letters):
            raise NotLifted(f"einsum {equation!r} sums over a dim")
        values.append(lifter.lift(each, tuple(letters.get(letter, ()) for letter in text)))
    result = values[0]
    for each in values[1:]:
        result = lifter.call("mul", result, each)
    return result


_HANDLERS: Mapping[str, Callable[[Any, fx.Node, Dims], Any]] = {
    "eye": _diagonal,
    "tril": _triangle,
    "triu": _triangle,
    "matmul": _outer,
    "bmm": _outer,
    "mm": _outer,
    "outer": _outer,
    "ger": _outer,
    "einsum": _einsum,
    "embedding": embedding,
    "index": indexed,
    "index_select": indexed,
    "slice": sliced,
    "select": sliced,
}


def op_of(node: fx.Node) -> str:
    """Name of the op without its overload, empty for what is no op."""
    return node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else ""


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Arguments by name."""
    schema = node.target._schema
    named = {arg.name: value for arg, value in zip(schema.arguments, node.args, strict=False)}
    return {**named, **node.kwargs}


def constant(node: Any) -> Any:
    """A number, or the number that every element of the node is made from; None for anything else."""
    if not isinstance(node, fx.Node):
        return node
    if node.op == "get_attr":
        held: Any = getattr(node.graph.owning_module, str(node.target), None)
        is_number = isinstance(held, torch.Tensor) and held.dim() == 0 and not isinstance(held, FakeTensor)
        return held.item() if is_number else None
    if not is_tensor(node) or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name, dtype = op_of(node), node.meta["val"].dtype
    if name in _FILLS:
        return bool(_FILLS[name]) if dtype == torch.bool else _FILLS[name]
    if name in ("full", "full_like", "new_full", "scalar_tensor"):
        value = node.args[{"new_full": 2, "scalar_tensor": 0}.get(name, 1)]
        return None if isinstance(value, fx.Node) else value
    if name in ("expand", "clone", "unsqueeze", "reshape", "detach"):
        return constant(node.args[0])
    return None


def hides(node: Any, blind: float = -1e9, depth: int = 8) -> bool:
    """Whether a vector is made by pointwise ops with a number so low that it hides keys."""
    if not is_tensor(node):
        return isinstance(node, (int, float)) and node <= blind
    number = constant(node)
    if number is not None or depth == 0:
        return isinstance(number, (int, float)) and number <= blind
    if op_of(node) not in ("where", "masked_fill", "mul", "add", "_to_copy", *_MOVES):
        return False
    return any(hides(each, blind, depth - 1) for each in node.args)


_MOVES = ("expand", "unsqueeze", "reshape", "permute", "transpose", "squeeze", "clone")


def is_zero_one(node: fx.Node) -> bool:
    """Whether the node holds only 0 and 1 for sure: it is bool, or cast from bool."""
    while is_tensor(node) and node.meta["val"].dtype != torch.bool:
        if op_of(node) not in (*_CASTS, *_MOVES):
            return False
        node = node.args[0]
    return is_tensor(node)
