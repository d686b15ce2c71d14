"""Give every value a placement by the rule table; every conflict becomes a redistribute.

Requires: ``canonical``, ``tokens_sharded``.
Establishes: ``placed``.

Values follow their inputs. A replicated value that is only read in parts is then computed in parts (rotary tables,
position embeddings). An op without a rule, or whose rule does not apply, is computed on gathered inputs and recorded.

Before::

    %add: f32[1, T, 64] = aten.add(%embedding, %positions)

After::

    %redistribute_1: f32[1, T, 64] Shard(1) = redistribute(%positions)
    %add: f32[1, T, 64] Shard(1) = aten.add(%embedding, %redistribute_1)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.invariants import CANONICAL, PLACED, TOKENS_SHARDED
from sp_compile.pipeline import Pass
from sp_compile.placements import REPLICATE, Partial, Placement, RankLocal, Replicate, Shard
from sp_compile.program import Fallback, Program, insert_redistribute, op_name, placement, source_line
from sp_compile.rules import Call, NoRule, Outcome, apply
from sp_compile.symbols import is_tensor, token_dims


@dataclass(frozen=True)
class PropagatePlacements(Pass):
    """Placements for all values, redistributes where they meet."""

    name = "propagate_placements"
    requires = (CANONICAL, TOKENS_SHARDED)
    establishes = (PLACED,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        banned: dict[str, str] = {}
        while True:
            plan = _Plan(program, banned)
            plan.follow_inputs()
            if plan.leak is None:
                break
            banned[plan.leak] = "its order of rows is not undone"
        plan.follow_consumers()
        plan.commit()


@dataclass
class _Plan:
    """Placements decided but not yet written into the graph."""

    program: Program
    banned: dict[str, str]
    placed: dict[fx.Node, Any] = field(default_factory=dict)
    needs: dict[fx.Node, dict[fx.Node, Placement]] = field(default_factory=dict)
    outcomes: dict[fx.Node, Outcome] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    leak: str | None = None

    def follow_inputs(self) -> None:
        """Forward: each op's placement from its inputs'."""
        for node in self.program.graph.nodes:
            if node.op == "placeholder" or node.op == "get_attr":
                self.placed[node] = REPLICATE
            elif node.target is ops.redistribute:
                self.placed[node] = placement(node)
            elif op_name(node) == "getitem":
                source = self.placed[node.args[0]]
                self.placed[node] = source[node.args[1]] if isinstance(source, tuple) else source
            elif node.op == "call_function":
                self._place(node)
            elif node.op == "output":
                for each in filter(is_tensor, node.all_input_nodes):
                    self._check_leak(self.placed[each], REPLICATE)
            if self.leak is not None:
                return

    def _place(self, node: fx.Node) -> None:
        inputs = {each: self.placed[each] for each in node.all_input_nodes if is_tensor(each)}
        summed: dict[fx.Node, Placement] = {
            each: REPLICATE for each, held in inputs.items() if isinstance(held, Partial)
        }
        inputs |= summed
        replicated = all(isinstance(each, Replicate) for each in inputs.values())
        seeds = self.program.parallel and node.target is torch.ops.sp_compile.attention.default
        if (replicated and not seeds) or self.program.tokens is None:
            self.placed[node], self.needs[node] = _like(node, REPLICATE), summed
            return
        try:
            if node.name in self.banned:
                raise NoRule(self.banned[node.name])
            outcome = apply(Call(node, self.program.tokens, inputs))
        except NoRule as reason:
            self.reasons[node] = str(reason)
            outcome = Outcome(_like(node, REPLICATE), dict.fromkeys(inputs, REPLICATE))
        for each, needed in outcome.inputs.items():
            self._check_leak(inputs[each], needed)
        self.outcomes[node] = outcome
        self.placed[node], self.needs[node] = outcome.output, {**summed, **outcome.inputs}

    def _check_leak(self, held: Placement, needed: Placement) -> None:
        """A rank's own order of rows cannot be gathered: whoever made it must run on gathered rows."""
        if held == needed:
            return
        if isinstance(held, RankLocal):
            self.leak = held.source
        elif isinstance(held, Shard) and (held.order or held.of):
            self.leak = held.order or held.of
        elif isinstance(needed, Shard) and needed.order:
            self.leak = needed.order

    def follow_consumers(self) -> None:
        """Backward: what is replicated but only read in parts is computed in parts."""
        for node in reversed(self.program.graph.nodes):
            if node.op != "call_function" or self.placed[node] != REPLICATE or node in self.outcomes:
                continue
            wanted = {self.needs.get(user, {}).get(node, REPLICATE) for user in node.users}
            (target,) = wanted if len(wanted) == 1 else (REPLICATE,)
            if isinstance(target, Shard) and is_tensor(node):
                self._compute_in_parts(node, target)

    def _compute_in_parts(self, node: fx.Node, target: Shard) -> None:
        assert self.program.tokens is not None
        inputs = {each: self.placed[each] for each in node.all_input_nodes if is_tensor(each)}
        attempts: list[dict[fx.Node, Placement]] = [{}]
        for each in inputs:
            for dim, times in token_dims(each, self.program.tokens).items():
                if times == target.outer * target.inner:
                    attempts.append({each: Shard(dim, target.outer, target.inner)})
        for attempt in attempts:
            try:
                outcome = apply(Call(node, self.program.tokens, {**inputs, **attempt}, target))
            except NoRule:
                continue
            if outcome.output == target and outcome.substitute is None:
                self.placed[node] = target
                self.needs[node] = {**attempt, **outcome.inputs}
                return

    def commit(self) -> None:
        """Write placements and redistributes into the graph."""
        made: dict[tuple[fx.Node, str], fx.Node] = {}
        for node in list(self.program.graph.nodes):
            if node.op != "output" and node in self.placed:
                node.meta["placement"] = self.placed[node]
            needs = {self.replaced.get(each, each): needed for each, needed in self.needs.get(node, {}).items()}
            moved = {each: self._moved(each, needed, node, made) for each, needed in needs.items()}
            node.args = fx.map_arg(node.args, lambda each, moved=moved: moved.get(each, each))
            node.kwargs = fx.map_arg(node.kwargs, lambda each, moved=moved: moved.get(each, each))
            outcome = self.outcomes.get(node)
            if outcome is not None and outcome.substitute is not None:
                self._substitute(node, outcome)
        self._record_fallbacks()
        self.program.remove_dead_code()

    def _moved(
        self, node: fx.Node, needed: Placement, user: fx.Node, made: dict[tuple[fx.Node, str], fx.Node]
    ) -> fx.Node:
        if self.placed[node] == needed:
            return node
        if node.target is ops.redistribute and self.placed[node.args[0]] == needed:
            return node.args[0]
        key = (node, repr(needed))
        if key not in made:
            made[key] = insert_redistribute(self.program, node, needed, user)
        return made[key]

    def _substitute(self, node: fx.Node, outcome: Outcome) -> None:
        assert outcome.substitute is not None
        graph = self.program.graph
        with graph.inserting_before(node):
            new = outcome.substitute(graph)
        new.meta.update(stack_trace=node.meta.get("stack_trace"), placement=self.placed[node])
        node.replace_all_uses_with(new)
        self.placed[new], self.replaced[node] = self.placed[node], new

    def _record_fallbacks(self) -> None:
        counts: Counter[tuple[str, str, str]] = Counter()
        moved: Counter[tuple[str, str, str]] = Counter()
        for node, found in self.reasons.items():
            reason = found.replace(str(self.program.tokens), "T")
            node.meta["fallback"] = reason
            key = (op_name(node), source_line(node), reason)
            counts[key] += 1
            moved[key] += sum(_bytes(each) for each in self.needs[node] if self.placed[each] != REPLICATE)
        share = (self.program.sp - 1) / self.program.sp
        for (op, source, reason), count in counts.items():
            size = int(moved[op, source, reason] * share)
            self.program.fallbacks.append(Fallback(op, count, size, source, reason))


def _like(node: fx.Node, each: Placement) -> Any:
    value = node.meta.get("val")
    return (each,) * len(value) if isinstance(value, (tuple, list)) else each


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    # a size that depends on data has no hint; its gathers are counted as if it were 1
    sizes = [size if isinstance(size, int) else size.node.hint or 1 for size in value.shape]
    total = value.element_size()
    for size in sizes:
        total *= size
    return int(total)
