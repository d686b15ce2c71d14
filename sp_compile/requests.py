"""What keeps packed requests apart: the same-request rule, and counts that restart with every request.

A graph knows requests by two index inputs in normal order: ``request_index`` (which request a token belongs to) and
``request_start`` (the row of that request's first token)::

    requests        a a a b b c
    request_index   0 0 0 1 1 2
    request_start   0 0 0 3 3 5
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx

from sp_compile.lasting import lasting
from sp_compile.program import Program, op_name
from sp_compile.score_rule import Assignment, format_rule, parse
from sp_compile.symbols import computed, is_tensor, shape_of

INDEX, START = "request_index", "request_start"


@lru_cache(maxsize=8)
@lasting
def request_inputs(lengths: tuple[int, ...], device: torch.device | None = None) -> Mapping[str, torch.Tensor]:
    """The index inputs of a row that holds requests of these lengths, each int64 ``[tokens]``.

    >>> request_inputs((3, 2))["request_start"].tolist()
    [0, 0, 0, 3, 3]
    """
    sizes = torch.tensor(lengths)
    starts = torch.cumsum(sizes, 0) - sizes
    return {
        INDEX: torch.repeat_interleave(torch.arange(len(lengths)), sizes).to(device),
        START: torch.repeat_interleave(starts, sizes).to(device),
    }


@torch.library.custom_op("sp_compile::request_cumsum", mutates_args=())
def request_cumsum(value: torch.Tensor, dim: int, start: torch.Tensor) -> torch.Tensor:
    """Running sums of integers along ``dim`` that begin anew at the first row of every request."""
    total = value.cumsum(dim)
    return total - (total - value).index_select(dim, start)


@request_cumsum.register_fake
def _(value: torch.Tensor, dim: int, start: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value)


def joined(rule: str, function: str, operand: int) -> str:
    """The rule with its mask narrowed to the pairs for which ``function`` of two further operands holds.

    Args:
        rule: a score rule, with or without a mask.
        function: ``eq`` for pairs of the same request, ``ne`` for pairs of different ones.
        operand: number of the first of the two further operands: each token's request, as a query and as a key.

    >>> joined("mask = le(x0, x1)", "eq", 2)
    'own = le(x0, x1); pair = eq(x2, x3); mask = and(own, pair)'
    """
    steps = parse(rule)
    taken = {each.name for each in steps}
    own, pair = _fresh("own", taken), _fresh("pair", taken)
    last = Assignment("mask", function, (f"x{operand}", f"x{operand + 1}"))
    if "mask" not in taken:
        return format_rule([*steps, last])
    words = {"mask": own}
    kept = [
        Assignment(words.get(each.name, each.name), each.function, tuple(words.get(a, a) for a in each.arguments))
        for each in steps
    ]
    both = Assignment("mask", "and", (own, pair))
    return format_rule([*kept, Assignment(pair, function, last.arguments), both])


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def keeps_apart(rule: str, operands: Sequence[fx.Node]) -> bool:
    """Whether the rule's mask hides other requests because :func:`joined` made it so."""
    steps = {each.name: each for each in parse(rule)}
    mask = steps.get("mask")
    if mask is not None and mask.function == "and":
        mask = steps.get(str(mask.arguments[-1]))
    if mask is None or mask.function != "eq":
        return False
    return all(_reads_requests(operands[int(str(each)[1:])]) for each in mask.arguments)


def _reads_requests(node: fx.Node) -> bool:
    seen, stack = set(), [node]
    while stack:
        each = stack.pop()
        if each.meta.get("index_input") == INDEX:
            return True
        if each not in seen:
            seen.add(each)
            stack.extend(each.all_input_nodes)
    return False


def request_input(program: Program, name: str) -> fx.Node:
    """The placeholder of :data:`INDEX` or :data:`START`, with a fake value of the token length."""
    node = program.index_input(name)
    if "val" not in node.meta:
        tokens = _tokens(program)
        like, dim = tokens.meta["val"], program.token_inputs[tokens.name]
        with like.fake_mode:
            node.meta["val"] = torch.empty(like.shape[dim], dtype=torch.int64, device=like.device)
    return node


def insert(program: Program, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new call in front of ``before``, with its fake value."""
    with program.graph.inserting_before(before):
        node = computed(program.graph, target, args, kwargs, _tokens(program).meta["val"].fake_mode)
    node.meta["stack_trace"] = before.meta.get("stack_trace")
    return node


def _tokens(program: Program) -> fx.Node:
    placeholders = program.graph.find_nodes(op="placeholder")
    return next(each for each in placeholders if each.name in program.token_inputs)


def rows_read(node: fx.Node, tokens: sympy.Symbol | None) -> list[fx.Node]:
    """Inputs of an indexing op whose values number the rows of another input's token dim."""
    args: Any = node.args
    found: list[Any] = []
    if op_name(node) == "aten.index":
        found = [each for each, size in zip(args[1], shape_of(args[0]), strict=False) if size == tokens]
    elif op_name(node) in ("aten.index_select", "aten.gather"):
        found = [args[2]] if shape_of(args[0])[args[1]] == tokens else []
    elif node.target is torch.ops.sp_compile.request_cumsum.default:
        found = [args[2]]
    return [each for each in found if is_tensor(each)]
