"""FlexAttention: block masks from the planned regions, and a rule as the graphs that torch evaluates per element."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from sp_compile.kernels.plan import mask_rows, plan_regions, with_valid
from sp_compile.kernels.regions import BLOCK, Region
from sp_compile.kernels.runs import plan_within
from sp_compile.score_rule import FUNCTIONS, call, needed

KEYS = 16  # code for CPUs is wrong for less than a block of keys, of which 8 are more than a multiple of this
OUTPUTS = {"mask": ("mask",), "score": ("score", "bias")}


def block_mask(
    operands: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rule: str,
    valid: torch.Tensor | None,
    queries: int,
    keys: int,
    runs: torch.Tensor | None = None,
) -> torch.Tensor:
    """The blocks of keys that each block of queries sees in part, and those that it sees in whole.

    Memory is that of the blocks; the mask's elements are looked at only where the plan does.

    Args:
        runs: int64 ``[runs, 4]``, ranges outside of which no query sees a key; see :func:`plan_within`.

    Returns:
        On the CPU, int32 ``[rows, query blocks, 2, 1 + key blocks]``: for the partial blocks and for the full ones, how
        many there are and which. ``rows`` is 1 where all rows of the batch share a mask.
    """
    rows = mask_rows(*with_valid(rule, operands, valid)) or 1
    kinds = np.zeros((rows, blocks(queries), blocks(keys)), dtype=np.int8)
    if runs is None:
        regions = plan_regions(operands, tables, rule, valid, queries, keys)
    else:
        regions = plan_within(runs.tolist(), operands, tables, rule, valid)
    for region in regions:
        for each in kinds[region.rows]:
            _mark(each, region, queries, keys)
    return torch.from_numpy(np.stack([_listed(kinds == 1), _listed(kinds == 2)], axis=2))


def of_keys(listed: np.ndarray) -> np.ndarray:
    """The blocks of queries that see each block of keys, for the backward, from :func:`block_mask`; listed alike."""
    return _listed(flagged(listed).transpose(0, 3, 2, 1))


def blocks(length: int) -> int:
    """Blocks of a length, and an empty one more: code is specialised for a single block."""
    return -(-length // BLOCK) + 1


def _mark(kinds: np.ndarray, region: Region, queries: int, keys: int) -> None:
    """Enter a region: 1 for blocks that it reaches, 2 for those that it fills."""
    spans = [slice(start // BLOCK, -(-end // BLOCK))
              for start, end in ((region.q_start, region.q_end), (region.k_start, region.k_end))]  # fmt: skip
    starts, ends, whole = [], [], []
    # behind the last key there may be others, which only the mask's elements hide
    for span, start, end, length in zip(
        spans, (region.q_start, region.k_start), (region.q_end, region.k_end), (queries, keys + BLOCK), strict=True
    ):
        edges = np.arange(span.start, span.stop) * BLOCK
        starts.append(np.maximum(edges, start) - start)
        ends.append(np.minimum(edges + BLOCK, end) - start)
        whole.append((edges >= start) & (np.minimum(edges + BLOCK, length) <= end))
    nearest = starts[1][None, :] - (ends[0][:, None] - 1)  # least and most of column - row in the block
    farthest = ends[1][None, :] - 1 - starts[0][:, None]
    reached = (farthest >= region.low) & (nearest <= region.high)
    filled = (nearest >= region.low) & (farthest <= region.high) & whole[0][:, None] & whole[1][None, :]
    part = kinds[spans[0], spans[1]]
    part[reached] = np.maximum(part[reached], 1)
    if not region.masked:
        part[filled] = 2


def flagged(listed: np.ndarray) -> np.ndarray:
    """Which blocks a list names; the inverse of :func:`_listed`."""
    counts, which = listed[..., :1], listed[..., 1:]
    found = np.zeros(which.shape, dtype=bool)
    np.put_along_axis(found, which, np.arange(which.shape[-1]) < counts, axis=-1)
    return found


def _listed(flags: np.ndarray) -> np.ndarray:
    order = np.argsort(~flags, axis=-1, kind="stable")
    return np.concatenate([flags.sum(axis=-1, keepdims=True), order], axis=-1).astype(np.int32)


def arguments_of(rule: str, output: str) -> set[str]:
    """Names of the operands and tables that a function of the rule reads."""
    return {item for each in needed(rule, OUTPUTS[output]) for item in each.arguments if isinstance(item, str)}


def rule_graph(
    owner: torch.nn.Module,
    rule: str,
    output: str,
    operands: Mapping[int, tuple[int, ...]],
    tables: Mapping[int, bool],
    sizes: int = 0,
    sharing: int = 1,
) -> fx.GraphModule:
    """A mask or score function of FlexAttention for a rule.

    Args:
        output: ``mask``, a function of (batch, head, query, key, *captured), or ``score``, of (score, batch, ...), to
            which the rule's bias is added.
        operands: by number, the dims of ``(batch, head, query, key)`` that the captured operand still has.
        tables: by number, whether the captured table has entries of its own for each head.
        sizes: how many numbers are captured besides, which are not read.
        sharing: heads that follow one another and share an operand's entry.

    Captured are the operands, then the tables, then the sizes.
    """
    graph = fx.Graph()
    values: dict[str, Any] = {"score": graph.placeholder("score")} if output == "score" else {}
    place = [graph.placeholder(name) for name in ("batch", "head", "query", "key")]
    captured = [graph.placeholder(f"x{i}") for i in operands]
    whole = {f"table{i}": graph.placeholder(f"table{i}") for i in tables}
    for i in range(sizes):
        graph.placeholder(f"size{i}")
    entry = list(place)
    if sharing > 1 and any(1 in dims for dims in operands.values()):
        entry[1] = graph.call_function(operator.floordiv, (place[1], sharing))
    for tensor, (i, dims) in zip(captured, operands.items(), strict=True):
        values[f"x{i}"] = graph.call_function(operator.getitem, (tensor, tuple(entry[dim] for dim in dims) or 0))
    for each in needed(rule, OUTPUTS[output]):
        inputs = [values.get(item, item) if isinstance(item, str) else item for item in each.arguments]
        if each.function == "lookup":
            per_head = tables[int(each.arguments[0].removeprefix("table"))]
            index = graph.call_method("to", (inputs[1], torch.int64))
            place_of = (place[1], index) if per_head else index
            values[each.name] = graph.call_function(operator.getitem, (whole[each.arguments[0]], place_of))
        else:
            values[each.name] = _call(graph, each.function, inputs)
    if output == "mask":
        result = _call(graph, "bool", [values["mask"] if "mask" in values else _call(graph, "ge", [place[2], 0])])
    else:
        result = values["score"]
        if "bias" in values:
            result = graph.call_function(torch.add, (result, values["bias"]))
    graph.output(result)
    return fx.GraphModule(owner, graph)


_METHODS = {"bool": torch.bool, "int": torch.int64, "float": torch.float32}


def _call(graph: fx.Graph, function: str, inputs: list[Any]) -> Any:
    if not any(isinstance(each, fx.Node) for each in inputs):
        return call(function, [torch.tensor(each) for each in inputs], torch.device("cpu")).item()
    if function == "copy":
        return inputs[0]
    if function in _METHODS:
        return graph.call_method("to", (inputs[0], _METHODS[function]))
    if function == "where":
        inputs = [inputs[0], *(_scalar(graph, each, inputs) for each in inputs[1:])]
    elif function in ("maximum", "minimum", "and", "or", "xor", "not", "floor_divide") or not isinstance(
        inputs[0], fx.Node
    ):
        inputs = [_scalar(graph, each, inputs) for each in inputs]
    return graph.call_function(FUNCTIONS[function], tuple(inputs))


def _scalar(graph: fx.Graph, value: Any, beside: list[Any]) -> Any:
    """A number as a 0-dim tensor, on the device of what it meets."""
    if isinstance(value, fx.Node):
        return value
    like = next(each for each in beside if isinstance(each, fx.Node))
    return graph.call_function(torch.full_like, (like, value), {"dtype": _dtype(value)})


def _dtype(value: Any) -> torch.dtype:
    return torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float32
