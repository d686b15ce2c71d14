"""Where a value lives: the placement words of torch.distributed.tensor, extended for token layouts.

``Replicate`` and ``Partial`` are torch's own. ``Shard`` is torch's word with what a token layout needs besides the
dim: a token dim may be merged with others (``[B, S, H, D] -> [B * S * H, D]``), and rows that a rank has sorted among
themselves (expert routing) are its own rows in another order. ``Gathered`` is what an all-gather alone yields: every
rank holds all rows, in padded SP order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.distributed.tensor.placement_types import Partial as Partial
from torch.distributed.tensor.placement_types import Replicate as Replicate


@dataclass(frozen=True)
class Shard:
    """The rank's rows of the token layout along ``dim``.

    The dim has ``outer * tokens * inner`` elements in row-major order. ``order`` names the node whose sort put the
    rank's rows into an order of its own, or is empty for the layout's order.

    Integers that number rows, such as the indices that a sort returns, mean the rank's own rows: ``rows`` is how many
    rows per token they count (0 for any other content) and ``of`` the order in which they count.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    order: str = ""
    rows: int = 0
    of: str = ""

    def __str__(self) -> str:
        merged = f" of {self.outer}x tokens x{self.inner}" if (self.outer, self.inner) != (1, 1) else ""
        order = f" by {self.order}" if self.order else ""
        return f"Shard({self.dim}{merged}{order})"

    def at(self, dim: int) -> Shard:
        """The same rows along another dim, holding ordinary content."""
        return Shard(dim, self.outer, self.inner, self.order)


@dataclass(frozen=True)
class Gathered:
    """All rows on every rank along ``dim``, in padded SP order (``sp * shard_length`` of them).

    With ``of``, other rows than all: those that every rank picked (see :class:`Picked`), rank after rank; for
    ``seen_<shelf>`` all new rows and behind them earlier ones that were picked; for ``reach_<i>`` the rank's own and
    behind them those of others that its queries can see, for ``stage_<i>`` those of some others; for ``local`` only its
    own, for ``node`` those of the ranks of its node.
    """

    dim: int
    of: str = ""

    def __str__(self) -> str:
        return f"Gathered({self.dim}{f', {self.of}' if self.of else ''})"


@dataclass(frozen=True)
class Picked:
    """Some of what the rank has along ``dim``, as much on every rank.

    ``of`` says what: ``queries_<shelf>`` are new rows whose queries go to earlier keys, ``past_<shelf>`` are slots of a
    cache whose keys go to new queries.
    """

    dim: int
    of: str

    def __str__(self) -> str:
        return f"Picked({self.dim}, {self.of})"


@dataclass(frozen=True)
class Heads:
    """The rank's own heads along ``dim``, and all rows in padded SP order along what dim they have.

    ``lists`` are the heads of every rank, or of every rank of a node, as many for each. ``of`` is ``node`` where the
    rows are those of the ranks of its node.
    """

    dim: int
    lists: tuple[tuple[int, ...], ...]
    of: str = ""

    def __str__(self) -> str:
        return f"Heads({self.dim}, {len(self.lists[0])} a rank{f', {self.of}' if self.of else ''})"


@dataclass(frozen=True)
class Held:
    """What the rank holds of a cache along ``dim``, slot by slot; for a value of the batch's rows, those rows of it.

    ``shelf`` counts the windows of layers: layers of one window hold the same tokens.
    """

    dim: int
    shelf: int = 0

    def __str__(self) -> str:
        return f"Held({self.dim}{f', shelf {self.shelf}' if self.shelf else ''})"


@dataclass(frozen=True)
class Kept:
    """The new rows along ``dim`` that the rank adds to what it holds of a cache."""

    dim: int

    def __str__(self) -> str:
        return f"Kept({self.dim})"


@dataclass(frozen=True)
class QueriesByKeys:
    """A mask that could not be lifted: the rank's rows along ``queries``, gathered rows along ``keys``.

    ``of`` as in :class:`Gathered`.
    """

    queries: int
    keys: int
    of: str = ""

    def __str__(self) -> str:
        return f"QueriesByKeys({self.queries}, {self.keys}{f', {self.of}' if self.of else ''})"


@dataclass(frozen=True)
class RankLocal:
    """A value each rank computes from its own rows, padding included, that only means something beside them.

    Rows per expert are the case: right as the group sizes of the rank's own sorted rows, and wrong for all else.
    ``source`` names the node that counted.
    """

    source: str

    def __str__(self) -> str:
        return f"RankLocal(by {self.source})"


Placement = Replicate | Shard | Gathered | Picked | Heads | Held | Kept | QueriesByKeys | RankLocal | Partial
REPLICATE = Replicate()
LOCAL_ROWS = "local"
NODE_ROWS = "node"


def gathers_all(placement: Any) -> bool:
    """Whether all rows are on every rank, in either order."""
    return isinstance(placement, Replicate) or (isinstance(placement, Gathered) and not placement.of)


def describe(placement: Placement | tuple[Placement, ...] | None) -> str:
    """Short text for graph diffs: ``Replicate``, ``Shard(1)``, ``(Shard(0), Shard(0))``."""
    if placement is None:
        return "?"
    if isinstance(placement, tuple):
        return "(" + ", ".join(describe(each) for each in placement) + ")"
    if isinstance(placement, Partial):
        return f"Partial({placement.reduce_op})"
    return "Replicate" if isinstance(placement, Replicate) else str(placement)
