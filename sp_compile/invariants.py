"""What a graph can be checked for between passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sp_compile import gradients, ops
from sp_compile.collectives import depends, is_heavy, is_start, is_wait
from sp_compile.placements import (
    REPLICATE,
    Gathered,
    Heads,
    Held,
    Kept,
    Picked,
    Placement,
    Replicate,
    Shard,
    describe,
    gathers_all,
)
from sp_compile.program import Program, op_name, placement, uncut_tokens
from sp_compile.requests import keeps_apart
from sp_compile.rules import Call, NoRule, apply
from sp_compile.rules.gathered import through_dims
from sp_compile.rules.reductions import splittable
from sp_compile.score_rule import calls
from sp_compile.symbols import expr, is_tensor, shape_of


class Violation(Exception):
    """An invariant does not hold: which node, what was expected, what was found."""

    def __init__(self, node: fx.Node | None, expected: str, found: str) -> None:
        where = f"node %{node.name} ({op_name(node)})" if node is not None else "graph"
        super().__init__(f"{where}: expected {expected}, found {found}")


@dataclass(frozen=True)
class Invariant:
    """A property of the graph with a check that raises :class:`Violation`."""

    name: str
    check: Callable[[Program], None]


def _functional(program: Program) -> None:
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise Violation(node, "no op that writes in place", str(node.target))


def _canonical(program: Program) -> None:
    for node in program.graph.nodes:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            raise Violation(node, "aten.reshape for every change of shape", str(node.target))
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            raise Violation(node, "no metadata assertions", str(node.target))


def _raised(program: Program) -> None:
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default and not node.meta.get("not_raised"):
            raise Violation(node, "sp_compile.attention, or the reason it was not raised", str(node.target))


def _apart(program: Program) -> None:
    if not program.isolated:
        return
    for node in ops.attention_nodes(program.graph):
        args = ops.AttentionArgs(*node.args)
        if not keeps_apart(args.rule, args.operands):
            raise Violation(node, "a mask that hides other requests", repr(args.rule))


def _tokens_sharded(program: Program) -> None:
    if not program.parallel:
        return
    for node, dim, users in uncut_tokens(program):
        raise Violation(users[0], f"%{node.name} cut to the rank's rows along dim {dim}", "used whole")


def _placed(program: Program) -> None:
    if program.tokens is None or not program.parallel:
        return
    _by_the_rules(program)
    for node in program.graph.nodes:
        found = placement(node)
        if isinstance(found, Shard) and is_tensor(node):
            sizes, rows = shape_of(node), found.outer * found.inner
            if found.dim >= len(sizes) or sizes[found.dim] != rows * program.tokens:
                raise Violation(node, f"{rows} x tokens along dim {found.dim}", f"shape {list(sizes)}")


def _by_the_rules(program: Program) -> None:
    assert program.tokens is not None
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target in (ops.redistribute, ops.spread_heads):
            continue
        if op_name(node) == "getitem":
            source = placement(node.args[0])
            _same(node, placement(node), source[node.args[1]] if isinstance(source, tuple) else source)
            continue
        inputs = {each: placement(each) for each in node.all_input_nodes if is_tensor(each)}
        found = placement(node)
        if all(isinstance(each, Replicate) for each in inputs.values()):
            # a consumer's wish decides for constants and expansions
            if found != REPLICATE and not (isinstance(found, tuple) and all(each == REPLICATE for each in found)):
                _same(node, found, _outcome(Call(node, program.tokens, inputs, found)).output)
            continue
        if any(isinstance(each, Gathered | Picked) for each in inputs.values()) and node.target not in _BY_THEIR_RULES:
            try:
                _same(node, found, through_dims(node, program.tokens, inputs))
            except NoRule as reason:
                raise Violation(node, "a rule for gathered inputs", str(reason)) from None
            continue
        outcome = _outcome(Call(node, program.tokens, inputs, found if isinstance(found, Shard) else None))
        _same(node, found, outcome.output)
        for each, needed in outcome.inputs.items():
            if inputs.get(each, REPLICATE) != needed:
                raise Violation(node, f"input %{each.name} as {describe(needed)}", describe(inputs[each]))


_BY_THEIR_RULES = (
    torch.ops.sp_compile.attention.default,
    torch.ops.sp_compile.tile_plan.default,
    torch.ops.sp_compile.block_mask.default,
    ops.exchange_partials,
    ops.joined_keys,
    ops.merge_partials,
    ops.put_back,
)


def _outcome(call: Call) -> Any:
    try:
        return apply(call)
    except NoRule as reason:
        raise Violation(call.node, "a rule for its inputs' placements", str(reason)) from None


def _same(node: fx.Node, found: Any, expected: Any) -> None:
    if found != expected and describe(found) != describe(expected):
        raise Violation(node, describe(expected), describe(found))


def _keys_in_padded_order(program: Program) -> None:
    if not program.parallel:
        return
    for node in ops.attention_nodes(program.graph):
        for key in node.args[1:3]:
            if not isinstance(placement(key), Gathered | Heads | Held):
                raise Violation(node, f"%{key.name} as Gathered(2)", describe(placement(key)))


def _cache_seen(program: Program) -> None:
    """Every attention over new keys is followed by one over those that are held, and its keys and values are kept."""
    if not program.cached:
        return
    if program.tokens is None:
        raise Violation(None, "a symbolic token length, so that tokens are spread", "a fixed one")
    for node in ops.attention_nodes(program.graph) if program.cached != "first" else ():
        part = ops.attention_part(node, 0)
        readers = [*part.users] if part is not None else []
        readers += [user for each in readers for user in each.users]  # of the rows that are picked
        merged = any(user.target is ops.merge_partials for user in readers)
        if not isinstance(placement(node.args[1]), Held) and not merged:
            raise Violation(node, "a merge with attention over held keys", "none")
    kept = [node for node in program.graph.output_node().all_input_nodes if placement(node) == Kept(2)]
    if len(kept) != len(program.kept) or not kept:
        raise Violation(None, f"{len(program.kept)} outputs to keep, and some", str(len(kept)))


def _planned(program: Program) -> None:
    if program.tokens is None:
        return
    for node in ops.attention_nodes(program.graph):
        args = ops.AttentionArgs(*node.args)
        if args.plan is None and not args.kernel.startswith("dense"):
            raise Violation(node, "a plan", "none")


def _kernels_lowered(program: Program) -> None:
    for node in ops.attention_nodes(program.graph):
        if ops.AttentionArgs(*node.args).kernel == "flex":
            raise Violation(node, "no attention that FlexAttention computes", "kernel='flex'")


def _outputs_restored(program: Program) -> None:
    if program.outputs != "full":
        return
    for node in program.graph.output_node().all_input_nodes:
        if is_tensor(node) and placement(node) not in (REPLICATE, Kept(2)):
            raise Violation(node, "outputs in normal order on every rank", describe(placement(node)))


def _gathered_once(program: Program) -> None:
    seen: dict[fx.Node, fx.Node] = {}
    for node in program.graph.find_nodes(op="call_function", target=ops.redistribute):
        source: Placement = placement(node.args[0])
        if isinstance(source, Shard) and gathers_all(placement(node)):
            first = seen.setdefault(node.args[0], node)
            if first is not node:
                raise Violation(node, f"%{node.args[0].name} gathered once, by %{first.name}", "gathered again")


_NOT_LOWERED = (ops.redistribute, ops.spread_heads, ops.select_rows, ops.row_numbers, ops.exchange_partials)


def _lowered(program: Program) -> None:
    for node in program.graph.nodes:
        if node.target in _NOT_LOWERED:
            raise Violation(node, "index selections, functional collectives and exchanges of rows only", op_name(node))


def _local(program: Program) -> None:
    if not program.parallel or program.tokens is None:
        return
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            stale = [size for size in value.shape if program.tokens in getattr(expr(size), "free_symbols", ())]
            if stale:
                raise Violation(node, "shapes of the local view", f"global size {stale[0]}")


def _overlapped(program: Program) -> None:
    before = following = None  # the work, collective or wait that is nearest
    for node in program.graph.nodes:
        if is_start(node) and before is not None and is_heavy(before) and not depends(node, before):
            raise Violation(node, "a collective before all work that it does not need", f"%{before.name} before it")
        before = node if is_heavy(node) or is_start(node) or is_wait(node) else before
    for node in reversed(program.graph.nodes):
        if is_wait(node) and following is not None and is_heavy(following) and not depends(following, node):
            raise Violation(node, "a wait behind all work that does not need it", f"%{following.name} after it")
        following = node if is_heavy(node) or is_start(node) else following


def _losses_split(program: Program) -> None:
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.cross_entropy_loss.default):
        if program.splits_losses and splittable(node):
            raise Violation(node, "a loss for each row, summed after it", "one that is reduced at once")


def _logits_dropped(program: Program) -> None:
    if program.outputs != "loss":
        return
    for node in program.graph.output_node().all_input_nodes:
        if shape_of(node):
            raise Violation(node, "outputs that are single values", f"shape {list(shape_of(node))}")


def _drawn(program: Program) -> None:
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
        if program.parallel:
            raise Violation(node, "a mask drawn by the seed and the place", "one drawn by what ran before")
    for node in ops.attention_nodes(program.graph):
        if calls(ops.AttentionArgs(*node.args).rule, "bernoulli"):
            raise Violation(node, "weights dropped by the seed and the place", "by what ran before")


def _gradients_placed(program: Program) -> None:
    if not program.differentiable or program.sp == 1:
        return
    for node in program.graph.find_nodes(op="placeholder"):
        direct = [user for user in node.users if user.target is not gradients.end_sums]
        if node.meta.get("requires_grad") and direct:
            raise Violation(node, "a weight whose gradient is summed over ranks", f"used by %{direct[0].name}")


FUNCTIONAL = Invariant("functional", _functional)
CANONICAL = Invariant("canonical", _canonical)
RAISED = Invariant("attention_raised", _raised)
APART = Invariant("requests_apart", _apart)
LOSSES_SPLIT = Invariant("losses_by_rows", _losses_split)
LOGITS_DROPPED = Invariant("logits_dropped", _logits_dropped)
DRAWN = Invariant("drawn_by_position", _drawn)
TOKENS_SHARDED = Invariant("tokens_sharded", _tokens_sharded)
PLACED = Invariant("placed", _placed)
KEYS_PADDED = Invariant("keys_in_padded_order", _keys_in_padded_order)
CACHE_SEEN = Invariant("cache_seen", _cache_seen)
PLANNED = Invariant("attention_planned", _planned)
KERNELS_LOWERED = Invariant("kernels_lowered", _kernels_lowered)
RESTORED = Invariant("outputs_restored", _outputs_restored)
GATHERED_ONCE = Invariant("gathered_once", _gathered_once)
LOWERED = Invariant("lowered", _lowered)
GRADIENTS_PLACED = Invariant("gradients_placed", _gradients_placed)
LOCAL = Invariant("local_shapes", _local)
OVERLAPPED = Invariant("overlapped", _overlapped)
