"""What a captured model computes and moves for each token, counted in its graph before it is spread over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sp_compile.collectives import is_heavy, is_product, multiplications
from sp_compile.costs import Attention
from sp_compile.errors import CaptureError
from sp_compile.placements import Shard
from sp_compile.program import Program, placement
from sp_compile.symbols import is_tensor, known_size, token_dims


@dataclass(frozen=True)
class Work:
    """Per token of a batch with one row, in floating-point operations and bytes.

    Attributes:
        operations: of products with weights; a multiplication and an addition are two.
        head: those of them that only the outputs come from.
        repeated: those of products that every rank computes for all tokens.
        traffic: bytes of tokens that products and attention read and write.
        widest: of those the most at one product that not only the outputs come from.
        saved: bytes that a backward needs, of each value of tokens that a product or attention reads.
        outputs: bytes of the model's outputs.
        keys: bytes of keys and values in all attentions together.
        weights: bytes of parameters and buffers, whatever the tokens are.
        parameters: how many elements they have.
        attentions: what decides by which strategy each runs.
        apart: no request of the batch sees another.
    """

    operations: float
    head: float
    repeated: float
    traffic: float
    widest: float
    saved: float
    outputs: float
    keys: float
    weights: float
    parameters: int
    attentions: tuple[Attention, ...]
    apart: bool


def work_of(program: Program, attentions: Sequence[Attention], apart: bool) -> Work:
    """Count the work of a graph whose values are placed.

    Args:
        program: after ``propagate_placements``.
        attentions: described from it.
        apart: as in :class:`Work`.

    Raises:
        CaptureError: the model fixes the token length, so that nothing can be told of one token.
    """
    if program.tokens is None:
        raise CaptureError("the model fixes the token length, so that what a token takes cannot be counted")

    def of_token(size: Any) -> int:
        return known_size(size, {program.tokens: 1}) or 1

    def size(node: Any) -> float:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        tensors = value if isinstance(value, (tuple, list)) else [value]
        found = [each for each in tensors if isinstance(each, torch.Tensor)]
        return float(sum(math.prod(of_token(dim) for dim in each.shape) * each.element_size() for each in found))

    def of_tokens(node: fx.Node) -> bool:
        return bool(token_dims(node, program.tokens))

    operations = {"spread": 0.0, "head": 0.0, "repeated": 0.0}
    heads = _heads(program)
    traffic, widest, read = 0.0, 0.0, set()
    for node in program.graph.nodes:
        if not is_heavy(node) or (is_product(node) and not of_tokens(node)):
            continue
        values = [each for each in node.all_input_nodes if is_tensor(each) and of_tokens(each)]
        moved = size(node) + sum(map(size, values))
        traffic += moved
        widest = max(widest, moved) if node not in heads else widest
        read.update(values)
        if is_product(node):
            spread = isinstance(placement(node), Shard)
            of_node = 2.0 * multiplications(node, of_token)
            operations["spread" if spread else "repeated"] += of_node
            operations["head"] += of_node if spread and node in heads else 0.0
    weights = [each.meta["val"] for each in program.graph.find_nodes(op="placeholder") if _is_weight(each)]
    return Work(
        operations=operations["spread"],
        head=operations["head"],
        repeated=operations["repeated"],
        traffic=traffic,
        widest=widest,
        saved=sum(map(size, read)),
        outputs=sum(size(each) for each in program.graph.output_node().all_input_nodes if of_tokens(each)),
        keys=float(sum(each.kv_heads * each.dims * each.itemsize for each in attentions)),
        weights=float(sum(each.numel() * each.element_size() for each in weights)),
        parameters=sum(each.numel() for each in weights),
        attentions=tuple(attentions),
        apart=apart,
    )


def _heads(program: Program) -> set[fx.Node]:
    """Products that outputs are computed from by ops of one value."""
    found = set()
    for node in program.graph.output_node().all_input_nodes:
        values = [node]
        while len(values) == 1 and not is_product(values[0]):
            values = [each for each in values[0].all_input_nodes if not _is_weight(each) and is_tensor(each)]
        found.update(values if len(values) == 1 else [])
    return found


def _is_weight(node: fx.Node) -> bool:
    return bool(node.meta.get("weight"))
