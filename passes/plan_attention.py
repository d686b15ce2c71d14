"""Choose the kernel of every attention, and decide once per kind of mask which parts of the scores it computes.

Requires: ``attention_raised``, ``keys_in_padded_order``.
Establishes: ``attention_planned``.

Layers that share a mask share its plan: local and global layers make two plans, however many layers there are.

Before::

    %attention = sp_compile.attention(%q, %k, %v, [%rows, %columns], [], 'mask = le(x1, x0)', 0.25, ...)

After::

    %plan = sp_compile.tile_plan([%rows, %columns], [], 'mask = le(x1, x0)', %valid, %local_index, %gathered_index)
    %attention = sp_compile.attention(%q, %k, %v, ..., kernel='tiles', plan=%plan, valid=%valid)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sp_compile import ops
from sp_compile.errors import ConfigError, KernelError, UnsupportedModelError, nearest
from sp_compile.invariants import KEYS_PADDED, PLANNED, RAISED
from sp_compile.kernels.choice import KERNELS, Need, choose
from sp_compile.pipeline import Pass
from sp_compile.placements import REPLICATE, Gathered, Heads, Held, RankLocal
from sp_compile.program import Program, gathered_index, placement, source_line
from sp_compile.rule_derivatives import underivable
from sp_compile.score_rule import assigns
from sp_compile.symbols import is_float, shape_of

TILES = torch.ops.sp_compile.tile_plan.default
PLANS = {"tiles": TILES, "fused": TILES, "flex": torch.ops.sp_compile.block_mask.default}


@dataclass(frozen=True)
class PlanAttention(Pass):
    """A kernel for every attention and one plan per kind of mask.

    Attributes:
        kernel: a key of :data:`sp_compile.kernels.choice.KERNELS`, or ``auto`` for what suits the device.
    """

    name = "plan_attention"
    requires = (RAISED, KEYS_PADDED)
    establishes = (PLANNED,)

    kernel: str = "auto"

    def __post_init__(self) -> None:
        known = ("auto", *KERNELS)
        if self.kernel not in known:
            raise ConfigError(f"unknown kernel {self.kernel!r}{nearest(self.kernel, known)}")

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        plans: dict[Any, fx.Node] = {}
        for node in ops.attention_nodes(program.graph):
            if program.differentiable:
                _check_derivatives(node)
            kernel = self._choose(program, node)
            args = ops.AttentionArgs(*node.args)._replace(kernel=kernel)
            if kernel in PLANS:
                key = (
                    kernel,
                    tuple(args.operands),
                    tuple(args.tables),
                    args.rule,
                    placement(args.q),
                    placement(args.k),
                )
                if key not in plans:
                    plans[key] = _plan(program, node, args)
                args = args._replace(plan=plans[key])
            node.args = tuple(args)

    def _choose(self, program: Program, node: fx.Node) -> str:
        try:
            kernel, passed_over = choose(self.kernel, _need(program, node), program.fused_is_faster)
        except KernelError as error:
            raise KernelError(f"attention at {source_line(node) or 'no source line'}: {error}") from None
        if passed_over is not None:
            program.record(node, f"{passed_over}; computed by {kernel}")
        return kernel


def _need(program: Program, node: fx.Node) -> Need:
    args = ops.AttentionArgs(*node.args)
    q, v = (each.meta["val"] for each in (args.q, args.v))
    of_mask = args.read_by("mask")
    return Need(
        device=program.device_kind(args.q),
        dtype=q.dtype,
        head_dim=int(q.shape[-1]),
        value_dim=int(v.shape[-1]),
        lse=ops.attention_part(node, 1) is not None,
        heads=_heads(args.q),
        kv_heads=_heads(args.k),
        empty_mean=args.empty_mean,
        mask_per_head=of_mask.per_head,
        changes_scores=assigns(args.rule, "score") or assigns(args.rule, "bias"),
        drops_weights=assigns(args.rule, "keep"),
        compiled=program.compiled,
        differentiable=program.differentiable,
        learns_rule=program.differentiable and any(map(_learned, (*args.operands, *args.tables))),
        kept_dtype=v.dtype if v.dtype != q.dtype else None,
        steps=program.steps,
        short=program.short,
        irregular=bool(of_mask.tables) or any(map(_of_pairs, of_mask.operands)),
    )


def _heads(node: fx.Node) -> int:
    """Heads that a rank computes."""
    found = placement(node)
    return len(found.lists[0]) if isinstance(found, Heads) else int(node.meta["val"].shape[1])


def _of_pairs(operand: fx.Node) -> bool:
    """Whether an operand has a value for each pair of query and key, and is no vector of either."""
    sizes = shape_of(operand)
    return len(sizes) >= 2 and sizes[-1] != 1 and sizes[-2] != 1


def _check_derivatives(node: fx.Node) -> None:
    """Whatever a rule makes of weights must have a gradient."""
    args = ops.AttentionArgs(*node.args)
    named = {f"x{i}": each for i, each in enumerate(args.operands)}
    named |= {f"table{i}": each for i, each in enumerate(args.tables)}
    function = underivable(args.rule, [name for name, each in named.items() if _learned(each)])
    if function is not None:
        raise UnsupportedModelError(
            f"the attention at {source_line(node) or 'an unknown line'} has a bias that goes from weights through "
            f"{function}, of which no gradient is known; freeze them with requires_grad_(False)"
        )


def _learned(node: fx.Node) -> bool:
    """Whether a value is computed from weights that train, or from what is."""
    seen: set[fx.Node] = set()
    stack = [node] if is_float(node) else []
    while stack:
        each = stack.pop()
        if each.meta.get("requires_grad"):
            return True
        if each not in seen and each.target is not torch.ops.aten.detach.default:
            seen.add(each)
            stack += [source for source in each.all_input_nodes if is_float(source)]
    return False


def _rows(program: Program, args: ops.AttentionArgs) -> list[str]:
    """Index inputs of as many rows as there are queries and keys, and of where a cache's keys are."""
    if not program.parallel:
        return ["restore_index"] * 2  # of all tokens, so that no other size than theirs is in the graph
    queries, keys = placement(args.q), placement(args.k)
    names = [gathered_index(queries) if isinstance(queries, Gathered | Heads) else "local_index"]
    names.append(f"held_index_{keys.shelf}" if isinstance(keys, Held) else gathered_index(keys))
    if isinstance(keys, Held):
        names.append(f"held_runs_{keys.shelf}")
    return names


def _plan(program: Program, node: fx.Node, args: ops.AttentionArgs) -> fx.Node:
    rows = [program.index_input(name) for name in _rows(program, args)]
    with program.graph.inserting_before(node):
        plan = program.graph.call_function(
            PLANS[args.kernel],
            (args.operands, args.tables, args.rule, args.valid, *rows),
            {"boxes": False} if args.kernel == "fused" else {},  # whose calls hold many small regions
        )
    plan.meta["placement"] = RankLocal(plan.name) if program.parallel else REPLICATE
    return plan
