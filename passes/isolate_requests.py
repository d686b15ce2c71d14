"""Keep the requests of a packed row apart where the model does not.

Requires: ``canonical``, ``attention_raised``.
Establishes: ``requests_apart``.

Works on programs that are made for batches which the model itself would mix. Every attention's mask is joined with "of
the same request". What counts rows restarts with each request: ``arange``, running sums of integers over the tokens,
and tables that are cut to the row's length. A row number that picks rows of the batch stays what it is.

Before::

    %arange: i64[T] = aten.arange(%tokens)
    %embedding: f32[T, 64] = aten.embedding(%weight, %arange)
    %attention = sp_compile.attention(%q, %k, %v, [%columns, %rows], [], 'mask = le(x0, x1)', ...)

After::

    %sub: i64[T] = aten.sub(%arange, %request_start)
    %embedding: f32[T, 64] = aten.embedding(%weight, %sub)
    %attention = sp_compile.attention(%q, %k, %v, [%columns, %rows, %of_query, %of_key], [],
                                      'own = le(x0, x1); pair = eq(x2, x3); mask = and(own, pair)', ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.errors import ConfigError
from sp_compile.invariants import APART, CANONICAL, RAISED
from sp_compile.masks import follows_from_inputs
from sp_compile.pipeline import Pass
from sp_compile.program import Program, op_name
from sp_compile.requests import INDEX, START, insert, joined, request_input, rows_read
from sp_compile.symbols import is_float, shape_of

aten = torch.ops.aten
BATCHES = ("packed", "all", "none")


@dataclass(frozen=True)
class IsolateRequests(Pass):
    """Packed requests do not see each other: in batches of ``pack`` (packed), of any tool (all), or none."""

    batches: str = "packed"

    name = "isolate_requests"
    requires = (CANONICAL, RAISED)
    establishes = (APART,)

    def __post_init__(self) -> None:
        if self.batches not in BATCHES:
            raise ConfigError(
                f"isolate_requests: batches={self.batches!r} is not known; pass one of {', '.join(BATCHES)}"
            )

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if not program.isolated or program.tokens is None:
            return
        counts = _Counts(program)
        counts.restart()
        masks = _join_masks(program)
        program.remove_dead_code()
        program.isolation = f"{masks} attention masks joined, {counts.restarted} counts of rows restarted"


def _join_masks(program: Program) -> int:
    nodes = ops.attention_nodes(program.graph)
    pair: list[fx.Node] = []
    for node in nodes:
        if not pair:
            request = request_input(program, INDEX)
            pair = [insert(program, node, aten.unsqueeze.default, request, dim) for dim in (1, 0)]
        args = ops.AttentionArgs(*node.args)
        rule = joined(args.rule, "eq", len(args.operands))
        node.args = tuple(args._replace(operands=[*args.operands, *pair], rule=rule))
    return len(nodes)


class _Counts:
    """Everything that counts rows from the start of the row."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.restarted = 0
        self.known = follows_from_inputs(program)
        self.in_row: dict[fx.Node, fx.Node] = {}  # what counts within the request, to what counts within the row

    def restart(self) -> None:
        """Let them count from the start of the request."""
        nodes = [node for node in self.program.graph.nodes if node.op == "call_function"]
        for node in nodes:
            if op_name(node) == "aten.arange" and self._counts_rows(node):
                self._replace(node, aten.sub.Tensor, node, self._start())
            elif op_name(node) == "aten.cumsum" and self._sums_rows(node):
                cumsum = torch.ops.sp_compile.request_cumsum.default
                self._replace(node, cumsum, self._summed(node), node.args[1], self._start())
            elif op_name(node) == "aten.slice" and self._cuts_table(node):
                self._replace(node, aten.index_select.default, node, node.args[1], self._positions(node))
        for node in nodes:
            for index in rows_read(node, self.program.tokens):
                node.replace_input_with(index, self._rows(index))

    def _start(self) -> fx.Node:
        return request_input(self.program, START)

    def _counts_rows(self, node: fx.Node) -> bool:
        step = node.args[2] if len(node.args) > 2 else 1
        return step == 1 and shape_of(node) == (self.program.tokens,) and not is_float(node)

    def _sums_rows(self, node: fx.Node) -> bool:
        exact = not is_float(node.args[0]) or node.args[0] in self.known  # sums of activations mix tokens
        return exact and shape_of(node)[node.args[1]] == self.program.tokens

    def _cuts_table(self, node: fx.Node) -> bool:
        args: Any = (*node.args, *(None, 0, 0, 0, 1)[len(node.args) :])
        source, dim, start, _, step = args
        cut = shape_of(source)[dim] != self.program.tokens == shape_of(node)[dim]
        return bool(cut and start == 0 and step == 1)

    def _summed(self, node: fx.Node) -> fx.Node:
        value, dtype = node.args[0], node.meta["val"].dtype
        if value.meta["val"].dtype == dtype:
            return value
        return insert(self.program, node, aten._to_copy.default, value, dtype=dtype)

    def _positions(self, node: fx.Node) -> fx.Node:
        """The number of each token within its request."""
        length, device = self.program.length_input(), node.meta["val"].device
        rows = insert(self.program, node, aten.arange.default, length, device=device)
        return insert(self.program, node, aten.sub.Tensor, rows, self._start())

    def _replace(self, old: fx.Node, target: Any, *args: Any) -> None:
        new = insert(self.program, old.next, target, *args)
        new.meta["stack_trace"] = old.meta.get("stack_trace")
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.in_row[new] = old
        self.restarted += 1

    def _rows(self, index: fx.Node) -> fx.Node:
        """The index as it was before counts restarted: what leads to it from them is copied."""
        for node in _integers_behind(index):
            if node not in self.in_row and not self.in_row.keys().isdisjoint(node.all_input_nodes):
                with self.program.graph.inserting_after(node):
                    self.in_row[node] = self.program.graph.node_copy(node, lambda each: self.in_row.get(each, each))
        return self.in_row.get(index, index)


def _integers_behind(node: fx.Node) -> list[fx.Node]:
    """The node and what it is computed from without a float between, in the graph's order."""
    found, stack = set[fx.Node](), [node]
    while stack:
        each = stack.pop()
        if each.op == "call_function" and each not in found and not is_float(each):
            found.add(each)
            stack.extend(each.all_input_nodes)
    return sorted(found)
