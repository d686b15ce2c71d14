"""Matrix products, each read as an einsum: the token dim must survive into the output."""

from __future__ import annotations

import string
from typing import Any

from torch import fx

from sp_compile.placements import REPLICATE, Placement
from sp_compile.rules.base import Call, NoRule, Outcome, output_shape, rank_of
from sp_compile.symbols import is_tensor, shape_of

Operands = list[tuple[fx.Node, str]]


def contract(call: Call, operands: Operands, output: str) -> Outcome:
    """Shard every operand that carries the output's token letter, replicate the others."""
    sizes = dict(zip(output, output_shape(call.node), strict=True))
    for node, letters in operands:
        placement = call.shard(node)
        if placement is not None and letters[placement.dim] in output:
            letter = letters[placement.dim]
            break
    else:
        raise NoRule("contracts over the token dim")
    needs: dict[fx.Node, Placement] = {}
    for node, letters in operands:
        dim = letters.find(letter)
        broadcast = dim < 0 or shape_of(node)[dim] != sizes[letter]
        needs[node] = REPLICATE if broadcast else placement.at(dim)
    return Outcome(placement.at(output.index(letter)), needs)


def _letters(count: int, skip: str = "") -> str:
    return "".join(letter for letter in string.ascii_letters if letter not in skip)[:count]


def _product(call: Call, left: fx.Node, right: fx.Node, bias: Any = None) -> Outcome:
    """``left @ right`` with broadcast batch dims, plus an optional broadcast bias."""
    batch = _letters(max(rank_of(left), rank_of(right)), skip="mnk")
    left_batch, right_batch = rank_of(left) - 2, rank_of(right) - 2
    most = max(left_batch, right_batch, 0)
    left_letters = batch[most - left_batch : most] + "mk" if left_batch >= 0 else "k"
    right_letters = batch[most - right_batch : most] + "kn" if right_batch >= 0 else "k"
    output = batch[:most] + ("m" if left_batch >= 0 else "") + ("n" if right_batch >= 0 else "")
    operands: Operands = [(left, left_letters), (right, right_letters)]
    if is_tensor(bias):
        operands.append((bias, output[len(output) - rank_of(bias) :]))
    return contract(call, operands, output)


def matmul(call: Call) -> Outcome:
    """``matmul``, ``mm``, ``bmm``."""
    left, right = call.node.args[:2]
    return _product(call, left, right)


def addmm(call: Call) -> Outcome:
    """``addmm`` and ``baddbmm``."""
    bias, left, right = call.node.args[:3]
    return _product(call, left, right, bias)


def linear(call: Call) -> Outcome:
    """``x @ weight.T + bias``."""
    values = call.arguments()
    rows = _letters(rank_of(values["input"]) - 1, skip="nk")
    operands: Operands = [(values["input"], rows + "k"), (values["weight"], "nk")]
    if values["bias"] is not None:
        operands.append((values["bias"], "n"))
    return contract(call, operands, rows + "n")


def einsum(call: Call) -> Outcome:
    """Any einsum with an explicit output and no ellipsis."""
    equation, tensors = call.node.args[:2]
    equation = str(equation).replace(" ", "")
    if "->" not in equation or "." in equation:
        raise NoRule(f"einsum {equation!r} without an explicit output")
    inputs, output = equation.split("->")
    return contract(call, list(zip(tensors, inputs.split(","), strict=True)), output)
