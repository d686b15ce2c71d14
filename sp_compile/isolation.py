"""Does a model keep packed requests apart? If not, which op mixes them.

Tokens meet in attention, whose masks are evaluated for the batch at hand, and in ops that run over the token dim, which
are those that the rule table cannot shard. Besides, a request must not depend on where in the row it lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from sp_compile.errors import RequestsMixedError
from sp_compile.masks import MaskKind, Masks, keys_per_query, read_masks
from sp_compile.placements import REPLICATE, Partial, Placement, Shard
from sp_compile.program import Program, op_name, placement, source_line
from sp_compile.rules import Call, NoRule, apply
from sp_compile.score_rule import assigns, evaluate
from sp_compile.symbols import is_float, is_tensor, token_dims

# Rows that are chosen by what they hold (expert routing) go back to their tokens.
ROW_MOVES = frozenset({"aten.index", "aten.index_select", "aten.index_add", "aten.gather", "aten.scatter_add"})
FILLS = frozenset(
    {"aten.full", "aten.zeros", "aten.ones", "aten.empty", "aten.expand", "aten.new_zeros", "aten.new_ones"}
)
COMPARED = 32  # requests that are compared with themselves alone, and rows of each


@dataclass(frozen=True)
class Isolation:
    """What was found in one captured graph: its masks, and the op that mixes requests whatever the masks say."""

    masks: Masks
    mixer: str | None

    def check(self, inputs: Mapping[str, Any], lengths: Sequence[int]) -> None:
        """Check that the requests of one packed row neither see nor move each other.

        Args:
            inputs: the graph's integer inputs by name: tensors ``[1, T]`` and the token length.
            lengths: tokens of each request.

        Raises:
            RequestsMixedError: they do; the message names the op and its source line.
        """
        reason = self.mixer or self._mixing_mask(inputs, lengths)
        if reason is not None:
            raise RequestsMixedError(
                f"packed requests are not kept apart: {reason}. Pass use_cache=False if that was not done, since with "
                "a cache transformers does not look for packed requests; or run the requests one to a batch, or as "
                "rows with an attention_mask"
            )

    def _mixing_mask(self, inputs: Mapping[str, Any], lengths: Sequence[int]) -> str | None:
        tokens = sum(lengths)
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        together = self.masks.evaluate(inputs)
        for kind, operands in zip(self.masks.kinds, together, strict=True):
            if kind.chosen:
                return f"the attention at {kind.source} chooses its keys by the tokens of the whole row"
            if not assigns(kind.rule, "mask") or keys_per_query(*_across(kind.rule, operands, owner), tokens).any():
                return f"the attention at {kind.source} lets a request see the one before it"
        ends = np.cumsum(lengths).tolist()
        for i in _sample(lengths):
            rows = slice(ends[i] - lengths[i], ends[i])
            alone = self.masks.evaluate({name: _only(value, rows, tokens) for name, value in inputs.items()})
            for kind, packed, single in zip(self.masks.kinds, together, alone, strict=True):
                if not _agree(kind, packed, single, rows, tokens):
                    return f"the mask of the attention at {kind.source} depends on where in the row a request lies"
        return None


def _across(
    rule: str, operands: Sequence[torch.Tensor | None], owner: torch.Tensor
) -> tuple[str, list[torch.Tensor | None]]:
    """The rule for pairs of different requests only."""
    i = len(operands)
    own = f"{rule.replace('mask =', 'own =')}; other = ne(x{i}, x{i + 1}); mask = and(own, other)"
    return own, [*operands, owner[:, None], owner[None, :]]


def _sample(lengths: Sequence[int]) -> list[int]:
    """The longest requests and the last: a misplaced mask shows most in them."""
    longest = np.argsort(lengths)[::-1][: COMPARED - 1].tolist()
    return sorted({*longest, len(lengths) - 1})


def _only(value: Any, rows: slice, tokens: int) -> Any:
    """An input of the whole row cut to one request."""
    if isinstance(value, torch.Tensor):
        return value[..., rows] if value.dim() and value.shape[-1] == tokens else value
    return rows.stop - rows.start if value == tokens else value


def _agree(
    kind: MaskKind,
    packed: Sequence[torch.Tensor | None],
    single: Sequence[torch.Tensor | None],
    rows: slice,
    tokens: int,
) -> bool:
    """Whether a request's mask and bias, at some of its queries, are those that it has alone."""
    length = rows.stop - rows.start
    at = torch.from_numpy(np.unique(np.linspace(0, length - 1, min(length, COMPARED)).astype(np.int64)))
    wanted = [name for name in ("mask", "bias") if assigns(kind.rule, name)]
    operands = []
    for mine, alone in zip(packed, single, strict=True):
        if mine is None or alone is None:  # depends on activations: the same for both
            operands.append((torch.zeros(1, 1), torch.zeros(1, 1)))
        else:
            cut = _cut(_cut(mine, -2, tokens, at + rows.start), -1, tokens, torch.arange(rows.start, rows.stop))
            operands.append((cut, _cut(alone, -2, length, at)))
    results = [evaluate(kind.rule, [pair[i] for pair in operands], wanted) for i in range(2)]
    return all(_same(results[0][name], results[1][name]) for name in wanted)


def _cut(value: torch.Tensor, dim: int, size: int, rows: torch.Tensor) -> torch.Tensor:
    return value.index_select(dim, rows) if value.dim() >= -dim and value.shape[dim] == size else value


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    first, second = torch.broadcast_tensors(first, second)
    return bool(torch.allclose(first.double(), second.double(), rtol=1e-6))


def find_isolation(program: Program, device: torch.device | None = None) -> Isolation:
    """Analyse a program whose placements are known, in the global view."""
    return Isolation(read_masks(program, device), _Mixers(program).find())


class _Mixers:
    """Looks for ops outside attention through which a token reaches others, or its place in the row."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.from_tokens: set[fx.Node] = set()  # computed from the tokens, integers included
        self.activations: set[fx.Node] = set()
        self.crossed: set[fx.Node] = set()  # integers computed from the ids of several tokens
        self.places: set[fx.Node] = set()  # computed from row numbers

    def find(self) -> str | None:
        """What mixes requests, if anything does."""
        if self.program.tokens is None:
            return "the model fixes the token length, and nothing tells its requests apart"
        for node in self.program.graph.nodes:
            reason = self._visit(node)
            if reason is not None:
                where = source_line(node)
                return f"{op_name(node)}{f' ({where})' if where else ''} {reason}"
        positions = [node for node in self.program.graph.find_nodes(op="placeholder") if "position_ids" in node.name]
        if not any(node.users for node in positions if not node.meta.get("weight")):
            return "the model does not read position_ids"
        return None

    def _visit(self, node: fx.Node) -> str | None:
        if node.op == "placeholder":
            if node.name in self.program.token_inputs:
                self.from_tokens.add(node)
                if is_float(node):
                    self.activations.add(node)
            return None
        if node.op != "call_function":
            return None
        inputs = set(node.all_input_nodes)
        reason = None
        if inputs & self.activations:
            self.activations.add(node)
            reason = self._mixes(node, inputs)
        elif inputs & self.from_tokens:
            self.from_tokens.add(node)
            if inputs & self.crossed or self._runs_over_tokens(node, inputs):
                self.crossed.add(node)
            if is_float(node):
                self.activations.add(node)
                reason = "computes from the ids of other tokens" if node in self.crossed else None
        elif inputs & self.places or self._numbers_rows(node):
            self.places.add(node)
        return reason

    def _mixes(self, node: fx.Node, inputs: set[fx.Node]) -> str | None:
        if not is_float(node) or node.target is torch.ops.sp_compile.attention.default:
            return None
        if "fallback" in node.meta:
            routed = op_name(node) in ROW_MOVES and not all(is_float(each) for each in inputs & self.activations)
            return None if routed else f"computes over the tokens of the whole row: {node.meta['fallback']}"
        if any(is_float(each) for each in inputs & self.places):
            return "takes the place of a token in the row, not its position_ids"
        if isinstance(placement(node), Shard) and any(self._is_of_single_tokens(each) for each in inputs):
            return "brings single tokens to all others"
        return None

    def _runs_over_tokens(self, node: fx.Node, inputs: set[fx.Node]) -> bool:
        """Whether the op on token ids could not be computed row by row."""
        if op_name(node) == "redistribute":
            return False
        rows: dict[fx.Node, Placement] = {}
        for each in filter(is_tensor, inputs):
            dims = token_dims(each, self.program.tokens) if each in self.from_tokens else {}
            rows[each] = Shard(next(iter(dims))) if list(dims.values()) == [1] else REPLICATE
        if REPLICATE in [rows[each] for each in rows if each in self.from_tokens] or not rows:
            return bool(rows)
        assert self.program.tokens is not None
        try:
            return isinstance(apply(Call(node, self.program.tokens, rows)).output, Partial)
        except NoRule:
            return True

    def _numbers_rows(self, node: fx.Node) -> bool:
        """Whether the node makes something of the row's length out of nothing of that length, other than a fill."""
        if not is_tensor(node) or not token_dims(node, self.program.tokens) or op_name(node) in FILLS:
            return False
        return not any(is_tensor(each) and token_dims(each, self.program.tokens) for each in node.all_input_nodes)

    def _is_of_single_tokens(self, node: fx.Node) -> bool:
        one = node in self.activations and is_tensor(node) and is_float(node)
        return one and not token_dims(node, self.program.tokens)
