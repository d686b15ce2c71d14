"""Put what Inductor compiles itself in place of attention nodes that FlexAttention computes.

Requires: ``attention_planned``, ``local_shapes``.
Establishes: ``kernels_lowered``.

Per-token vectors are captured by the mask and score functions; the kernel skips blocks of keys by the block mask that
was planned. On a GPU keys of a cache are split into parts, which are merged; where each request has one new token, a
part is one query's. Other kernels stay behind ``attention``.

Before::

    %plan = sp_compile.block_mask([%rows, %columns], [], 'mask = le(x1, x0)', %valid, ...)
    %attention = sp_compile.attention(%q, %k, %v, ..., kernel='flex', plan=%plan, valid=%valid)

After::

    %flex = flex_attention(%q, %k, %v, %score, (%queries, %keys, %plan[0], ..., %mask), 0.25, ...)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.nn.attention.flex_attention import BlockMask

from sp_compile import ops
from sp_compile.invariants import KERNELS_LOWERED, LOCAL, PLANNED
from sp_compile.kernels.flex import arguments_of, rule_graph
from sp_compile.kernels.plan import joined_with_valid
from sp_compile.kernels.regions import BLOCK
from sp_compile.kernels.split import part_size, spare_parts, split_count
from sp_compile.parts import (
    as_one_row,
    as_parts,
    filled_rows,
    merged_parts,
    merged_queries,
    numbers_of_parts,
    operand_of_parts,
    queries_of_parts,
    repeated_rows,
)
from sp_compile.pipeline import Pass
from sp_compile.placements import Held
from sp_compile.program import Program, placement
from sp_compile.symbols import shape_of

aten = torch.ops.aten
OPTIONS = {
    "BACKEND": "TRITON",  # AUTO takes a kernel for fewer than 128 queries that gives wrong results with these sizes
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_MAX": False,
}
LARGE = 128  # head dims up to which torch's tiles fit into the shared memory of a GPU
FEW_TILES = {2: {"BLOCK_N": 64}, 4: {"BLOCK_N": 32}}  # for one query, by bytes of an element
LARGE_TILES = {2: {"BLOCK_M": 64, "BLOCK_N": 32}, 4: {"BLOCK_M": 32, "BLOCK_N": 16}}  # by bytes of an element


@dataclass(frozen=True)
class LowerAttention(Pass):
    """FlexAttention nodes for the attention it computes."""

    name = "lower_attention"
    requires = (PLANNED, LOCAL)
    establishes = (KERNELS_LOWERED,)

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        lowering = _Lowering(program)
        for node in ops.attention_nodes(program.graph):
            if ops.AttentionArgs(*node.args).kernel == "flex":
                with program.graph.inserting_before(node):
                    lowering.lower(node)
        program.remove_dead_code()


class _Lowering:
    """Lowers nodes one after another; what they capture is put into memory once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self.made: dict[Any, fx.Node] = {}

    def lower(self, node: fx.Node) -> None:
        """Replace one attention node; new nodes go in front of it."""
        args = ops.AttentionArgs(*node.args)
        if not self._splits(args):
            tiles = {} if self._on_cpu(args) else tile(*_sizes_of(args))
            results = self._flex(args, tiles, ops.attention_part(node, 1) is not None)
        else:
            results = self._split_each(args) if self._decodes(args) else self._split(args)
        for i, value in enumerate(results):
            part = ops.attention_part(node, i)
            if part is not None:
                part.replace_all_uses_with(value)

    def _splits(self, args: ops.AttentionArgs) -> bool:
        """Whether keys are split: those of a cache, whose queries are few in most steps and would leave a GPU idle.

        FlexAttention without generated code does not look at blocks, and would see all keys in every part.
        """
        one_row = args.q.meta["val"].shape[0] == 1
        of_rows = one_row or (self._decodes(args) and not args.per_head)
        on_card = self.program.compiled and not self._on_cpu(args)
        return isinstance(placement(args.k), Held) and of_rows and on_card and not args.empty_mean

    def _decodes(self, args: ops.AttentionArgs) -> bool:
        """Whether each query can have parts of its own, whose rows are one block."""
        return self.program.cached == "decode" and filled_rows(_grouped(args)[1]) <= BLOCK

    def _split(self, args: ops.AttentionArgs) -> tuple[fx.Node, fx.Node]:
        """Attention over parts of the keys, as rows of a batch, merged; rows of a part are those of a group's heads."""
        heads, group = _grouped(args)
        assert args.plan is not None
        count, keys = (self._once(aten.sym_size.int, each, 0) for each in args.plan.args[4:6])  # the same in all layers
        rows = self._once(torch.sym_max, self._once(operator.mul, count, group), BLOCK)
        splits = self._once(split_count, rows, keys, heads)
        q = self._once(as_parts, args.q, group, rows, splits)
        whole = args.q.meta["val"]
        q.meta["val"] = whole.new_empty(2, heads, BLOCK, whole.shape[-1])  # of any number of parts and rows
        plan = self._once(torch.ops.sp_compile.split_block_mask.default, args.plan, count, rows, splits)
        operands = [self._repeated(each, rows) for each in args.operands]
        split = args._replace(q=q, plan=plan, operands=operands, partial=True)
        parts = self._flex(split, tile(*_sizes_of(args)), True)
        return self._merged(args, self._once(merged_parts, *parts, group, count))

    def _split_each(self, args: ops.AttentionArgs) -> tuple[fx.Node, fx.Node]:
        """As :meth:`_split`, where each part is of the keys of one query, and rows are the heads of its group.

        Rows of a batch become heads, which read what any of them sees.
        """
        heads, group = _grouped(args)
        batch = int(args.q.meta["val"].shape[0])
        assert args.plan is not None
        count, keys, runs = (self._once(aten.sym_size.int, each, 0) for each in args.plan.args[4:7])
        spare = self._once(spare_parts, keys, batch * heads)
        parts, size = self._once(operator.add, count, spare), self._once(part_size, keys, runs, spare)
        plan = self._once(torch.ops.sp_compile.query_blocks.default, *args.plan.args, parts, size)
        numbers = self._once(numbers_of_parts, self._listed(args, plan))
        q = self._once(queries_of_parts, args.q, numbers, group)
        whole = args.q.meta["val"]
        q.meta["val"] = whole.new_empty(2, batch * heads, filled_rows(group), whole.shape[-1])  # of any number of parts
        k, v = (self._one_row(each) for each in (args.k, args.v))
        operands = [self._of_parts(each, numbers) for each in args.operands]
        each = args._replace(q=q, k=k, v=v, plan=plan, operands=operands, partial=True)
        found = self._flex(each, few_tile(filled_rows(group), *_sizes_of(args)), True, heads if batch > 1 else 1)
        most = self._once(operator.add, spare, 1)
        return self._merged(args, self._once(merged_queries, *found, numbers, batch, group, count, most))

    def _one_row(self, held: fx.Node) -> fx.Node:
        """Keys or values of a cache, whose rows of the batch are heads."""
        value = held.meta["val"]
        if value.shape[0] == 1:
            return held
        found = self._once(as_one_row, held)
        found.meta["val"] = value.flatten(0, 1).unsqueeze(0)
        return found

    def _merged(self, args: ops.AttentionArgs, merged: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Output and log-sum-exp of merged parts, as an attention node gives them."""
        out, lse = (self._once(getitem, merged, i) for i in range(2))
        return out if args.partial else self._once(aten.to.dtype, out, args.q.meta["val"].dtype), lse

    def _of_parts(self, operand: fx.Node, numbers: fx.Node) -> fx.Node:
        """An operand for parts, which are those of one query each; rows of the batch are where heads were."""
        varying = _varying(operand)
        if not {0, 2} & {*varying}:
            return operand
        found = self._once(operand_of_parts, operand, numbers)
        whole = operand.meta["val"]
        batch, heads, _, keys = (1,) * (4 - whole.dim()) + tuple(whole.shape)
        found.meta["val"] = whole.new_empty(2 if 2 in varying else 1, batch if 0 in varying else heads, 1, keys)
        return found

    def _repeated(self, operand: fx.Node, rows: fx.Node) -> fx.Node:
        """An operand for so many rows, which are its queries again and again."""
        if 2 not in _varying(operand):
            return operand
        found = self._once(repeated_rows, operand, rows)
        whole = operand.meta["val"]
        found.meta["val"] = whole.new_empty(*whole.shape[:-2], BLOCK, whole.shape[-1])
        return found

    def _flex(
        self, args: ops.AttentionArgs, tiles: dict[str, int], with_lse: bool, sharing: int = 1
    ) -> tuple[fx.Node, fx.Node]:
        """Output and log-sum-exp by FlexAttention; ``sharing`` is as of :func:`~sp_compile.kernels.flex.rule_graph`."""
        score, mask = (self._function(args, output, sharing) for output in ("score", "mask"))
        options = {**OPTIONS, **tiles, "OUTPUT_LOGSUMEXP": with_lse or self.program.differentiable}
        q, k, v = args.q, args.k, args.v
        if self._fills_up(args):
            k, v = (self._of_dtype(each, q.meta["val"].dtype) for each in (k, v))  # which code for GPUs does itself
            # inputs are taken for tensors of four dims in memory, which views of products or gathers are not
            q = self._captured(q, (0, 1, 2, 3))
            k, v = (self._captured(each, (0, 1, 2, 3), keys=2) for each in (k, v))
        flex = self.graph.call_function(
            torch.ops.higher_order.flex_attention,
            (q, k, v, score[0], self._blocks(args, (q, k), mask[0]), args.scale, options, score[1], mask[1]),
        )
        out, lse = (self.graph.call_function(getitem, (flex, i)) for i in range(2))
        lse = self.graph.call_function(aten.mul.Tensor, (lse, math.log(2)))  # of base 2
        if args.empty_mean:
            assert args.plan is not None
            seen = self._once(torch.ops.sp_compile.seen_rows.default, *args.plan.args[:6])  # planned from the same
            out = self.graph.call_function(torch.ops.sp_compile.fill_empty.default, (out, args.v, seen, args.valid))
        if args.partial:
            out = self.graph.call_function(aten.to.dtype, (out, torch.float32))
        return out, lse

    def _function(self, args: ops.AttentionArgs, output: str, sharing: int) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """The mask or score function of a node, and what it captures."""
        rule, operands = args.rule, list(args.operands)
        dims = {i: _varying(each) for i, each in enumerate(operands)}
        own = {i: _own_dims(each, dims[i]) for i, each in enumerate(operands)}
        fills_up, valid = self._fills_up(args), args.valid
        if fills_up and valid is None:
            valid = self._keys_that_exist(args.k)
        if valid is not None:
            rule = joined_with_valid(rule, len(operands))
            dims[len(operands)], own[len(operands)] = (3,), (0,)
            operands.append(valid)
        names = arguments_of(rule, output)
        kept = {i: each for i, each in dims.items() if f"x{i}" in names}
        tables = [i for i in range(len(args.tables)) if f"table{i}" in names]
        per_head = {i: shape_of(args.tables[i])[0] != 1 for i in tables}
        along_keys = {i: each.index(3) if fills_up and 3 in each else -1 for i, each in kept.items()}
        captured = [self._captured(operands[i], own[i], along_keys[i]) for i in kept]
        captured += [self._captured(args.tables[i], (0, 1) if per_head[i] else (1,)) for i in tables]
        sizes = self._sizes(operands[i] for i in kept)
        key = (rule, output, tuple(kept.items()), tuple(per_head.items()), len(sizes), sharing)
        if key not in self.made:
            name = f"flex_{output}_{len(self.made)}"
            function = rule_graph(self.program.gm, rule, output, kept, per_head, len(sizes), sharing)
            self.program.gm.add_submodule(name, function)
            self.made[key] = self.graph.get_attr(name)
        return self.made[key], (*captured, *sizes)

    def _sizes(self, operands: Iterable[fx.Node]) -> list[fx.Node]:
        """Nodes of the symbols in the operands' sizes: the kernel's code checks indices against sizes, and knows only
        symbols that are arguments.
        """
        symbols = {symbol for each in operands for size in each.meta["val"].shape for symbol in _symbols(size)}
        found = []
        for node in self.graph.find_nodes(op="placeholder"):
            value = node.meta["val"]
            for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else [value]):
                if isinstance(size, torch.SymInt) and size.node.expr in symbols:
                    symbols.remove(size.node.expr)
                    is_size = isinstance(value, torch.SymInt)
                    found.append(node if is_size else self._once(aten.sym_size.int, node, dim))
        assert not symbols, f"sizes come from inputs, not {symbols}"
        return found

    def _keys_that_exist(self, k: fx.Node) -> fx.Node:
        """All that there are, for keys that are filled up."""
        value = k.meta["val"]
        key = ("keys", str(value.shape[2]))
        if key not in self.made:
            self.made[key] = self._once(_ones, self._once(aten.sym_size.int, k, 2))
            self.made[key].meta["val"] = value[0, 0, :, 0]  # of that size
        return self.made[key]

    def _fills_up(self, args: ops.AttentionArgs) -> bool:
        """Whether keys are filled up to a number that the device's code computes right."""
        return self._on_cpu(args)

    def _on_cpu(self, args: ops.AttentionArgs) -> bool:
        return self.program.device_kind(args.q) == "cpu"

    def _captured(self, tensor: fx.Node, dims: tuple[int, ...], keys: int = -1) -> fx.Node:
        return self._once(torch.ops.sp_compile.captured.default, tensor, list(dims), keys)

    def _of_dtype(self, kept: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Keys or values of a cache that keeps them in another dtype, in that of the queries."""
        return kept if kept.meta["val"].dtype == dtype else self._once(aten.to.dtype, kept, dtype)

    def _blocks(
        self, args: ops.AttentionArgs, queries_and_keys: tuple[fx.Node, fx.Node], mask: fx.Node
    ) -> tuple[Any, ...]:
        """The block mask as the op takes it, in the order that this torch has."""
        assert args.plan is not None
        found = dict(self._lists(args, args.plan, "kv"))
        of_queries = dict.fromkeys(each.replace("kv", "q") for each in found)
        if self.program.differentiable:
            of_keys = self._once(torch.ops.sp_compile.block_mask_of_keys.default, args.plan)
            of_queries |= self._lists(args, of_keys, "q")
        found |= of_queries
        stand_ins: dict[str, Any] = {name: part and torch.zeros(1, 1, 1, 1) for name, part in found.items()}
        example = BlockMask((1, 1), **stand_ins, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=_everything)
        parts = {id(stand_ins[name]): part for name, part in found.items()}
        lengths = [self._once(aten.sym_size.int, each, 2) for each in queries_and_keys]
        return (*lengths, *(parts.get(id(each), each) for each in example.as_tuple(flatten=True)[2:-1]), mask)

    def _lists(self, args: ops.AttentionArgs, plan: fx.Node, of: str) -> Iterator[tuple[str, fx.Node]]:
        """Partial and full blocks of a plan, how many and which, in memory of their own on the attention's device."""
        listed, on_cpu = self._listed(args, plan), self._on_cpu(args)
        for i, kind in enumerate((of, f"full_{of}")):
            both = self._once(aten.select.int, listed, 3, i)
            count, which = self._once(aten.select.int, both, 3, 0), self._once(aten.slice.Tensor, both, 3, 1)
            for what, dims, part in (("num_blocks", (0, 1, 2), count), ("indices", (0, 1, 2, 3), which)):
                # code for GPUs takes the one head's stride for that of the rows, which it is not in a clone's layout
                own = self._once(aten.clone.default, part) if on_cpu else self._captured(part, dims)
                yield f"{kind}_{what}", own

    def _listed(self, args: ops.AttentionArgs, plan: fx.Node) -> fx.Node:
        """A plan on the attention's device, with a dim of heads."""
        listed = self._once(aten.unsqueeze.default, plan, 1)
        if self._on_cpu(args):
            return listed
        return self._once(aten.to.device, listed, args.q.meta["val"].device, torch.int32)

    def _once(self, target: Any, *args: Any) -> fx.Node:
        key = (target, repr(args))
        if key not in self.made:
            self.made[key] = self.graph.call_function(target, args)
        return self.made[key]


def _grouped(args: ops.AttentionArgs) -> tuple[int, int]:
    """Heads of the rows of parts, and how many heads are in the rows of one."""
    heads, kv_heads = (int(each.meta["val"].shape[1]) for each in (args.q, args.k))
    group = 1 if args.per_head else heads // kv_heads
    return heads // group, group


def tile(dim: int, itemsize: int) -> dict[str, int]:
    """Queries and keys that a GPU computes at a time, where torch has no choice of its own that fits.

    Args:
        dim: of a head.
        itemsize: bytes of an element.
    """
    return LARGE_TILES[itemsize] if dim > LARGE else {}


def few_tile(rows: int, dim: int, itemsize: int) -> dict[str, int]:
    """As :func:`tile`, of so many queries, which are few; such a program waits for its keys."""
    of_keys = tile(dim, itemsize) or FEW_TILES[itemsize]
    return {**of_keys, "BLOCK_M": min(rows, of_keys.get("BLOCK_M", BLOCK)), "num_warps": 4}


def _sizes_of(args: ops.AttentionArgs) -> tuple[int, int]:
    """Dim of a head, and bytes of an element."""
    q, v = args.q.meta["val"], args.v.meta["val"]
    return int(max(q.shape[-1], v.shape[-1])), q.element_size()


def _ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bool)


def _symbols(size: Any) -> Iterable[Any]:
    return size.node.expr.free_symbols if isinstance(size, torch.SymInt) else ()


def _varying(operand: fx.Node) -> tuple[int, ...]:
    """The dims of (batch, head, query, key) along which an operand varies."""
    sizes = shape_of(operand)
    return tuple(4 - len(sizes) + i for i, size in enumerate(sizes) if size != 1)


def _own_dims(operand: fx.Node, kept: Sequence[int]) -> tuple[int, ...]:
    """Those dims in the operand's own numbering."""
    return tuple(dim - 4 + len(shape_of(operand)) for dim in kept)


def _everything(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query >= 0
