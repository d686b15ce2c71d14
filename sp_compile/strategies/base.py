"""What a strategy sees, and what it has to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from sp_compile import ops
from sp_compile.needs import Reach
from sp_compile.placements import Placement, Shard
from sp_compile.program import Program, moved, placement
from sp_compile.rules.attention import is_vector
from sp_compile.windows import needed_by


@dataclass
class Made:
    """What strategies made for earlier attentions of a graph, which later ones share."""

    moved: dict[tuple[fx.Node, Placement], fx.Node] = field(default_factory=dict)
    whole: dict[fx.Node, fx.Node] = field(default_factory=dict)


@dataclass
class Site:
    """One attention that a strategy is for; its keys and values are placed as ``propagate_placements`` left them."""

    program: Program
    node: fx.Node
    made: Made

    @property
    def args(self) -> ops.AttentionArgs:
        """The attention's arguments."""
        return ops.AttentionArgs(*self.node.args)

    @property
    def reach(self) -> Reach:
        """How far the keys go that its queries need."""
        return needed_by(self.node, self.program.tokens, self.program.counted)

    def against_pairs(self) -> str:
        """Why what masks or changes scores cannot be had for other rows; empty where it is a rule over vectors."""
        for each in self.args.operands:
            if not is_vector(each, self.args):
                return (
                    f"%{each.name} has a value for every query and key, which ranks have of their own rows only: the "
                    "mask was not lifted"
                )
        return ""

    def moved(self, node: fx.Node, target: Placement) -> fx.Node:
        """A node under another placement, in front of the attention."""
        return moved(self.program, node, target, self.node, self.made.moved)


def _nothing(_: Site) -> str:
    return ""


class Strategy(NamedTuple):
    """A way to run attention over tokens that are spread.

    Attributes:
        apply: rewrites an attention: queries and outputs by the rank's rows as before, keys and values where they are
            needed, with the order they come in written into their placements and ``valid``.
        against: why it cannot run an attention; empty where it can.
    """

    apply: Callable[[Site], None]
    against: Callable[[Site], str] = _nothing


def unmoved(node: fx.Node) -> fx.Node:
    """The rank's rows of what ``propagate_placements`` wanted whole."""
    source = node.args[0] if node.target is ops.redistribute else None
    return source if isinstance(source, fx.Node) and isinstance(placement(source), Shard) else node
