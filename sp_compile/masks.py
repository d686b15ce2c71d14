"""The attention masks of a captured program, evaluated on the host for one batch.

Lifted masks are rules over per-token vectors that follow from the inputs alone (positions, padding), so which query
sees which key is known without running the model: for attention area, and to tell whether packed requests are kept
apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from sp_compile import ops
from sp_compile.program import Program, source_line
from sp_compile.rule_intervals import Interval, mask_ranges
from sp_compile.score_rule import assigns
from sp_compile.symbols import is_tensor, shape_of

LEAF = 32
UNKNOWN: Interval = (np.asarray(-np.inf), np.asarray(np.inf))


@dataclass(frozen=True)
class MaskKind:
    """One rule with the outputs of :attr:`Masks.gm` that are its operands; None where it depends on activations.

    Attributes:
        tables: entries and dtype of the tables that the rule reads.
        chosen: which keys a query sees depends on the tokens themselves, as with an indexer.
        empty_mean: a query that sees no key takes the mean of all values.
    """

    rule: str
    operands: tuple[int | None, ...]
    layers: int
    source: str
    tables: tuple[tuple[int, torch.dtype], ...] = ()
    chosen: bool = False
    empty_mean: bool = False


@dataclass(frozen=True)
class Masks:
    """All kinds of masks of one program, and the part of its graph that computes their operands from the inputs."""

    gm: fx.GraphModule
    inputs: tuple[str, ...]
    kinds: tuple[MaskKind, ...]

    def evaluate(self, inputs: Mapping[str, Any]) -> list[list[torch.Tensor | None]]:
        """Operands of each kind for these inputs, on the host."""
        values = self.gm(*(inputs[name] for name in self.inputs))
        return [[None if i is None else values[i].cpu() for i in kind.operands] for kind in self.kinds]


def read_masks(program: Program, device: torch.device | None = None) -> Masks:
    """Collect the masks of a program whose attention is raised.

    Args:
        program: in the global view.
        device: where the operands are computed, if not where the program runs.
    """
    found: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in ops.attention_nodes(program.graph):
        args = ops.AttentionArgs(*node.args)
        kind = (tuple(args.operands), args.rule, tuple(map(_table, args.tables)), args.empty_mean)
        found.setdefault(kind, []).append(node)
    known, of_tokens = follows_from_inputs(program), _depends_on_tokens(program)
    operands = list(dict.fromkeys(each for nodes, *_ in found for each in nodes if each in known))
    kinds = tuple(
        MaskKind(
            rule,
            tuple(operands.index(each) if each in known else None for each in nodes),
            len(users),
            source_line(users[0]),
            tables,
            any(each not in known and each in of_tokens and _is_matrix(each, program) for each in nodes),
            empty_mean,
        )
        for (nodes, rule, tables, empty_mean), users in found.items()
    )
    return Masks(*slice_of(program, operands, device), kinds)


def _table(node: fx.Node) -> tuple[int, torch.dtype]:
    value = node.meta["val"]
    return int(value.shape[-1]), value.dtype


def _depends_on_tokens(program: Program) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        is_input = node.op == "placeholder" and node.name in program.token_inputs
        if is_input or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_matrix(node: fx.Node, program: Program) -> bool:
    return len(shape_of(node)) >= 2 and list(shape_of(node)[-2:]) == [program.tokens] * 2


def follows_from_inputs(program: Program) -> set[fx.Node]:
    """Nodes computed from integer inputs and constants: no weights, no floating-point inputs."""
    known: set[fx.Node] = set()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            is_float = is_tensor(node) and value.is_floating_point()
            if value is not None and not node.meta.get("weight") and not is_float:
                known.add(node)
        elif node.op == "get_attr" or (node.op == "call_function" and known.issuperset(node.all_input_nodes)):
            known.add(node)
    return known


def slice_of(
    program: Program, outputs: Sequence[fx.Node], device: torch.device | None
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The part of the graph that computes these nodes, and the names of its inputs."""
    needed, stack = set(), list(outputs)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in program.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if device is not None and "device" in node.kwargs:
                copies[node].kwargs = {**copies[node].kwargs, "device": device}
    graph.output(tuple(copies[each] for each in outputs))
    inputs = tuple(node.name for node in copies if node.op == "placeholder")
    return fx.GraphModule(program.gm, graph), inputs


class _Operand:
    """Bounds of one operand over aligned blocks of ``LEAF * 2**level`` tokens."""

    def __init__(self, value: torch.Tensor | None, levels: int) -> None:
        self.axes: tuple[bool, bool] | None = None
        if value is None:
            return
        array = value.reshape((1,) * (4 - value.dim()) + tuple(value.shape)).to(torch.float64).numpy()
        low, high = array.min(axis=(0, 1)), array.max(axis=(0, 1))
        self.axes = low.shape[0] != 1, low.shape[1] != 1
        if all(self.axes):
            self.matrix = low, high
            return
        size = LEAF << levels
        self.leaf = _padded(low.reshape(-1), size, np.inf), _padded(high.reshape(-1), size, -np.inf)
        self.levels = [(self.leaf[0].reshape(-1, LEAF).min(axis=1), self.leaf[1].reshape(-1, LEAF).max(axis=1))]
        for _ in range(levels):
            low, high = self.levels[-1]
            self.levels.append((low.reshape(-1, 2).min(axis=1), high.reshape(-1, 2).max(axis=1)))

    def blocks(self, level: int, queries: np.ndarray, keys: np.ndarray) -> Interval:
        """Bounds over pairs of blocks."""
        if self.axes is None or all(self.axes):
            return UNKNOWN
        low, high = self.levels[level]
        at = queries if self.axes[0] else keys if self.axes[1] else np.zeros(1, dtype=np.int64)
        return low[at], high[at]

    def elements(self, queries: np.ndarray, keys: np.ndarray) -> Interval:
        """Values ``[pairs, LEAF, LEAF]`` of pairs of leaf blocks."""
        if self.axes is None:
            return UNKNOWN
        rows, columns = (each[:, None] * LEAF + np.arange(LEAF) for each in (queries, keys))
        if all(self.axes):
            last = np.array(self.matrix[0].shape) - 1
            rows, columns = np.minimum(rows, last[0])[:, :, None], np.minimum(columns, last[1])[:, None, :]
            return self.matrix[0][rows, columns], self.matrix[1][rows, columns]
        if not any(self.axes):
            return self.leaf[0][:1], self.leaf[1][:1]
        at = rows[:, :, None] if self.axes[0] else columns[:, None, :]
        return self.leaf[0][at], self.leaf[1][at]


def _padded(values: np.ndarray, multiple: int, fill: float) -> np.ndarray:
    return np.pad(values, (0, -len(values) % multiple), constant_values=fill)


def keys_per_query(rule: str, operands: Sequence[torch.Tensor | None], tokens: int, coarsest: int = LEAF) -> np.ndarray:
    """How many keys each query may attend to, int64 ``[tokens]``; over batch and heads, those that any lets it see.

    Pairs of blocks are refined until the rule's bounds decide them (a quadtree), so time and memory grow with the edge
    of the mask. Where an operand is not known the count is an upper bound, and such blocks of no more than ``coarsest``
    tokens are counted whole.
    """
    counts = np.zeros(tokens, dtype=np.int64)
    if not assigns(rule, "mask"):
        return counts + tokens
    levels = max(0, int(np.ceil(np.log2(max(1, -(-tokens // LEAF))))))
    pyramids = [_Operand(operand, levels) for operand in operands]
    vague = any(each.axes is None for each in pyramids)
    queries = keys = np.zeros(1, dtype=np.int64)
    for level in range(levels, -1, -1):
        low, high = _bounds(rule, [each.blocks(level, queries, keys) for each in pyramids], queries.shape)
        width = LEAF << level
        coarse = vague and LEAF < width <= coarsest
        full = (high > 0) & ((low == 1) | coarse)
        _add(counts, queries[full], keys[full], width)
        open_pairs = (high > 0) & ~full
        queries, keys = queries[open_pairs], keys[open_pairs]
        if level:
            queries = (2 * queries[:, None] + np.array([0, 0, 1, 1])).reshape(-1)
            keys = (2 * keys[:, None] + np.array([0, 1, 0, 1])).reshape(-1)
            inside = (np.maximum(queries, keys) * (width // 2)) < tokens
            queries, keys = queries[inside], keys[inside]
    for start in range(0, len(queries), 4096):
        _add_elements(counts, rule, pyramids, queries[start : start + 4096], keys[start : start + 4096])
    return counts


def _bounds(rule: str, ranges: list[Interval], shape: tuple[int, ...]) -> Interval:
    low, high = mask_ranges(rule, ranges)
    return np.broadcast_to(low, shape), np.broadcast_to(high, shape)


def _add(counts: np.ndarray, queries: np.ndarray, keys: np.ndarray, width: int) -> None:
    """Whole blocks: every query of the block sees every key of the other."""
    tokens = len(counts)
    steps = np.zeros(tokens + 1, dtype=np.int64)
    seen = np.minimum((keys + 1) * width, tokens) - keys * width
    np.add.at(steps, queries * width, seen)
    np.add.at(steps, np.minimum((queries + 1) * width, tokens), -seen)
    counts += np.cumsum(steps[:-1])


def _add_elements(
    counts: np.ndarray, rule: str, pyramids: list[_Operand], queries: np.ndarray, keys: np.ndarray
) -> None:
    shape = (len(queries), LEAF, LEAF)
    _, high = _bounds(rule, [each.elements(queries, keys) for each in pyramids], shape)
    held = keys[:, None] * LEAF + np.arange(LEAF) < len(counts)
    seen = ((high > 0) & held[:, None, :]).sum(axis=2)
    rows = queries[:, None] * LEAF + np.arange(LEAF)
    inside = rows < len(counts)
    np.add.at(counts, rows[inside], seen[inside])


def attention_rows(masks: Masks, inputs: Mapping[str, Any], tokens: int) -> np.ndarray:
    """Query-key pairs of each token over all layers and sequences of the batch, int64 ``[tokens]``."""
    total = np.zeros(tokens, dtype=np.int64)
    for kind, operands in zip(masks.kinds, masks.evaluate(inputs), strict=True):
        batch = max([1, *(each.shape[0] for each in operands if each is not None and each.dim() == 4)])
        for i in range(batch):
            own = [each[i : i + 1] if each is not None and each.dim() == 4 and each.shape[0] > 1 else each
                   for each in operands]  # fmt: skip
            total += kind.layers * keys_per_query(kind.rule, own, tokens, coarsest=tokens // 256)
    return total
