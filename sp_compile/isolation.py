"""Does a model keep packed requests apart? If not, which op mixes them.

Tokens meet in attention, whose masks are evaluated for the batch at hand, and in ops that run over the token dim, which
are those that the rule table cannot shard. Besides, a request must not depend on where in the row it lies: masks and
whatever else does not come from the tokens are computed for the row and for requests alone, and compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from sp_compile.errors import RequestsMixedError
from sp_compile.facts import Facts, read_facts
from sp_compile.masks import MaskKind, Masks, keys_per_query, read_masks
from sp_compile.placements import REPLICATE, Partial, Placement, Shard
from sp_compile.program import Program, op_name, placement, source_line
from sp_compile.requests import INDEX, START, joined, request_inputs
from sp_compile.rules import Call, NoRule, apply
from sp_compile.score_rule import assigns, evaluate
from sp_compile.symbols import is_float, is_tensor, token_dims

# Rows that are chosen by what they hold (expert routing) go back to their tokens.
ROW_MOVES = frozenset({"aten.index", "aten.index_select", "aten.index_add", "aten.gather", "aten.scatter_add"})
LOOKUPS = frozenset({"aten.index", "aten.index_select", "aten.gather", "aten.embedding"})
COMPARED = 32  # requests that are compared with themselves alone, and rows of each


@dataclass(frozen=True)
class Isolation:
    """What was found in one captured graph.

    Attributes:
        masks: those of its attention.
        facts: what it computes without the tokens.
        mixer: the op that mixes requests whatever the masks say.
        curable: the mixer is none that isolating requests would leave.
        weights: names of the inputs that are weights.
        lasting: what holds for one batch holds for all of the same lengths.
    """

    masks: Masks
    facts: Facts
    mixer: str | None
    curable: bool
    weights: frozenset[str]
    lasting: bool

    def check(self, inputs: Mapping[str, Any], lengths: Sequence[int], growing: bool = False) -> None:
        """Check that the requests of one packed row neither see nor move each other.

        Args:
            inputs: the model's inputs by name: tensors ``[1, T]``, the token length, and weights.
            lengths: tokens of each request.
            growing: these are what the requests may grow to, so a request must not depend on its last rows either.

        Raises:
            RequestsMixedError: they do; the message names the op and its source line.
        """
        reason = self.mixer or self._mixing(inputs, lengths, growing)
        if reason is not None:
            raise RequestsMixedError(
                f"packed requests are not kept apart: {reason}. Run them one to a batch, or as rows with an "
                "attention_mask",
                curable=self.curable,
            )

    def _mixing(self, inputs: Mapping[str, Any], lengths: Sequence[int], growing: bool) -> str | None:
        tokens = sum(lengths)
        inputs = {**inputs, **request_inputs(tuple(lengths), _device(inputs))}
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        together = self.masks.evaluate(inputs)
        for kind, operands in zip(self.masks.kinds, together, strict=True):
            if kind.chosen:
                return f"the attention at {kind.source} chooses its keys by the tokens of the whole row"
            if not assigns(kind.rule, "mask") or keys_per_query(*_across(kind.rule, operands, owner), tokens).any():
                return f"the attention at {kind.source} lets a request see others"
            if kind.empty_mean and not keys_per_query(kind.rule, operands, tokens).all():
                return f"the attention at {kind.source} takes the mean of the whole row where a token sees none"
        facts, ends = self.facts.evaluate(inputs), np.cumsum(lengths).tolist()
        sizes = [(i, size) for i in _sample(lengths) for size in (lengths[i], -(-lengths[i] // 2))[: 1 + growing]]
        for i, size in sizes:
            start = ends[i] - lengths[i]
            rows = slice(start, start + size)
            single = _only(inputs, self.weights, rows, tokens)
            part = size < lengths[i]  # of a request that has not grown to its end
            for kind, packed, alone in zip(self.masks.kinds, together, self.masks.evaluate(single), strict=True):
                if not _agree(kind, packed, alone, rows, tokens):
                    what = "how many tokens will follow" if part else "where in the row a request lies"
                    return f"the mask of the attention at {kind.source} depends on {what}"
            user = self.facts.differ(facts, self.facts.evaluate(single), rows)
            if user is not None:
                what = (
                    "depends on how many tokens will follow"
                    if part
                    else "takes the place of a token in the row, not in its request"
                )
                return f"{user} {what}"
        return None


def _across(
    rule: str, operands: Sequence[torch.Tensor | None], owner: torch.Tensor
) -> tuple[str, list[torch.Tensor | None]]:
    """The rule for pairs of different requests only."""
    return joined(rule, "ne", len(operands)), [*operands, owner[:, None], owner[None, :]]


def _sample(lengths: Sequence[int]) -> list[int]:
    """The longest requests and the last: a misplaced mask shows most in them."""
    longest = np.argsort(lengths)[::-1][: COMPARED - 1].tolist()
    return sorted({*longest, len(lengths) - 1})


def _only(inputs: Mapping[str, Any], weights: frozenset[str], rows: slice, tokens: int) -> dict[str, Any]:
    """The inputs of one request out of those of the row; weights are left whole."""
    length = rows.stop - rows.start
    cut = {}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            cut[name] = length if value == tokens else value
        elif name in weights:
            cut[name] = value
        else:
            cut[name] = value[tuple(rows if size == tokens else slice(None) for size in value.shape)]
    return {**cut, **request_inputs((length,), _device(inputs))}


def _device(inputs: Mapping[str, Any]) -> torch.device:
    """Where the inputs are; what is on meta is computed on the CPU."""
    devices = [each.device for each in inputs.values() if isinstance(each, torch.Tensor) and not each.is_meta]
    return devices[0] if devices else torch.device("cpu")


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
    tables = _stand_ins(kind)
    results = [evaluate(kind.rule, [pair[i] for pair in operands], wanted, tables=tables) for i in range(2)]
    return all(_same(results[0][name], results[1][name]) for name in wanted)


def _stand_ins(kind: MaskKind) -> list[torch.Tensor]:
    """Tables with entries that differ, to see which are read."""
    made = [torch.rand(1, entries, generator=torch.Generator().manual_seed(0)) for entries, _ in kind.tables]
    return [each > 0.5 if dtype == torch.bool else each for each, (_, dtype) in zip(made, kind.tables, strict=True)]


def _cut(value: torch.Tensor, dim: int, size: int, rows: torch.Tensor) -> torch.Tensor:
    return value.index_select(dim, rows) if value.dim() >= -dim and value.shape[dim] == size else value


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    first, second = torch.broadcast_tensors(first, second)
    return bool(torch.allclose(first.double(), second.double(), rtol=1e-6))


def find_isolation(program: Program, device: torch.device | None = None) -> Isolation:
    """Analyse a program whose placements are known, in the global view."""
    masks, facts = read_masks(program, device), read_facts(program, device)
    tensors = [node for node in program.graph.find_nodes(op="placeholder") if is_tensor(node)]
    weights = frozenset(node.name for node in tensors if node.meta.get("weight"))
    changing = {node.name for node in tensors} - weights - {"position_ids", INDEX, START}
    lasting = changing.isdisjoint({*masks.inputs, *facts.inputs})
    mixers = _Mixers(program)
    return Isolation(masks, facts, mixers.find(), mixers.curable, weights, lasting)


class _Mixers:
    """Looks for ops outside attention through which a token reaches others, or its place in the row."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.from_tokens: set[fx.Node] = set()  # computed from the tokens, integers included
        self.activations: set[fx.Node] = set()
        self.crossed: set[fx.Node] = set()  # integers computed from the ids of several tokens
        self.curable = program.tokens is not None

    def find(self) -> str | None:
        """What mixes requests, if anything does."""
        if self.program.tokens is None:
            return "the model fixes the token length, and nothing tells its requests apart"
        for node in self.program.graph.nodes:
            reason = self._visit(node)
            if reason is not None:
                where = source_line(node)
                return f"{op_name(node)}{f' ({where})' if where else ''} {reason}"
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
            self.curable = reason is None
        elif inputs & self.from_tokens:
            self.from_tokens.add(node)
            if inputs & self.crossed or self._runs_over_tokens(node, inputs):
                self.crossed.add(node)
            if is_float(node):
                self.activations.add(node)
                reason = "computes from the ids of other tokens" if node in self.crossed else None
        return reason

    def _mixes(self, node: fx.Node, inputs: set[fx.Node]) -> str | None:
        if not is_float(node) or node.target is torch.ops.sp_compile.attention.default:
            return None
        if "fallback" in node.meta:
            routed = op_name(node) in ROW_MOVES and not all(is_float(each) for each in inputs & self.activations)
            return None if routed else f"computes over the tokens of the whole row: {node.meta['fallback']}"
        if isinstance(placement(node), Shard) and any(self._is_of_single_tokens(each) for each in inputs):
            return "brings single tokens to all others"
        return None

    def _runs_over_tokens(self, node: fx.Node, inputs: set[fx.Node]) -> bool:
        """Whether the op on token ids could not be computed row by row."""
        if op_name(node) in ("redistribute", "sp_compile.request_cumsum"):
            return False
        if op_name(node) in LOOKUPS and node.args[0] not in self.from_tokens:
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

    def _is_of_single_tokens(self, node: fx.Node) -> bool:
        one = node in self.activations and is_tensor(node) and is_float(node)
        return one and not token_dims(node, self.program.tokens)
