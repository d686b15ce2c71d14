"""Rows that were gathered or picked move through an op as the rank's own rows would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
from torch import fx

from sp_compile.placements import Gathered, Picked, Placement, Shard, describe
from sp_compile.rules import apply
from sp_compile.rules.base import Call, NoRule


def through_dims(node: fx.Node, tokens: sympy.Symbol, inputs: Mapping[fx.Node, Placement]) -> Any:
    """The placement of an op's output from its inputs', of which some are gathered or picked, of one kind.

    Raises:
        NoRule: inputs of several kinds, or an op that has no rule for them.
    """
    one, *others = {replace(each, dim=0) for each in inputs.values() if isinstance(each, Gathered | Picked)}
    if others:
        raise NoRule(f"inputs as {describe(one)} and as {describe(others[0])}")
    cut = {each: Shard(held.dim) if isinstance(held, Gathered | Picked) else held for each, held in inputs.items()}
    output = apply(Call(node, tokens, cut)).output
    parts = output if isinstance(output, tuple) else (output,)
    whole = tuple(replace(one, dim=each.dim) if isinstance(each, Shard) else each for each in parts)
    return whole if isinstance(output, tuple) else whole[0]
