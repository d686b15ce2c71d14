"""What a running forward knows of its batch, what programs are told apart by, and the index inputs of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch

from sp_compile.lasting import lasting
from sp_compile.layout import TokenLayout
from sp_compile.ledger import Window
from sp_compile.mesh import Group


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What sets the programs of one captured graph apart.

    Attributes:
        isolated, cached, cache_dtype, outputs, counted, short, strategies: as in
            :class:`~sp_compile.program.Program`.
    """

    isolated: bool = False
    cached: str = ""
    cache_dtype: torch.dtype | None = None
    outputs: str = "full"
    counted: bool = False
    short: bool = False
    strategies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step(Kind):
    """What a running forward knows, besides what program it runs.

    Attributes:
        layout: who holds which rows; of the new tokens only, where there is a cache.
        index_inputs: those of this rank.
        promised: the requests must be kept apart.
        rows: tokens of each request, those of earlier calls included; None for the layout's.
        held, windows: the tensors of the cache on this rank, and how far back each is seen.
        asked: gives the strategies that are asked for so many attentions, where some are ``auto``.
    """

    layout: TokenLayout
    index_inputs: Mapping[str, torch.Tensor]
    promised: bool
    rows: tuple[int, ...] | None = None
    held: Sequence[torch.Tensor] = ()
    windows: Sequence[Window] = ()
    asked: Callable[[int], Sequence[str]] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each request in the whole graph's view."""
        return self.layout.lengths if self.rows is None else self.rows

    @property
    def apart(self) -> bool:
        """Whether no request of the layout sees another."""
        return self.promised or len(self.layout.lengths) == 1

    @property
    def kind(self) -> Kind:
        """What program of a graph the step runs."""
        return Kind(**{each.name: getattr(self, each.name) for each in fields(Kind)})

    def sizes(self) -> dict[str, int]:
        """True values of the sizes that are symbols."""
        found = {"tokens": sum(self.lengths), "shard_length": self.layout.shard_length}
        if self.cached:
            found |= {"new_tokens": self.layout.tokens, "kept": self.index_inputs["kept_rows"].numel()}
        sizes = {"held_index": "slots", "held_runs": "runs", "picked_queries": "queries", "picked_past": "past",
                 "fetch_rows": "sent", "fetched_rows": "fetched"}  # fmt: skip
        for name, each in self.index_inputs.items():
            what, _, number = name.rpartition("_")
            if what in sizes:
                found[f"{sizes[what]}_{number}"] = len(each)
            elif what == "fetch_counts":
                found[f"sent_rows_{number}"] = int(each[0].sum())
        return found


@dataclass(frozen=True)
class Kept:
    """What a forward gives back for its cache.

    Attributes:
        tensors: keys and values to keep.
        windows, query_bytes: as :attr:`~sp_compile.program.Program.kept` and ``query_bytes``.
    """

    tensors: Sequence[torch.Tensor] = ()
    windows: Sequence[Window] = ()
    query_bytes: Mapping[Window, int] = field(default_factory=dict)


def index_inputs(layout: TokenLayout, rank: int, rows: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The index inputs of a rank, on the host.

    Args:
        rows: int64 ``[tokens]``, numbers of the layout's tokens in the whole graph's row, where that has more.
    """
    local, gathered = layout.local_index[rank], layout.local_index.reshape(-1)
    return {
        "local_index": local if rows is None else rows[local],
        "local_valid": layout.valid[rank],
        "gathered_index": gathered if rows is None else rows[gathered],
        "gathered_valid": layout.valid.reshape(-1),
        "restore_index": layout.restore_index,
        "rank": torch.tensor(rank),
    }


@lasting
def rank_inputs(layout: TokenLayout, group: Group, device: torch.device) -> dict[str, torch.Tensor]:
    """The index inputs of a group's rank, on a device."""
    found = index_inputs(layout, group.rank)
    if group.nodes is not None:
        node, rank = divmod(group.rank, group.nodes.size)
        of_node = layout.local_index[node * group.nodes.size :][: group.nodes.size]
        found |= {"node_index": of_node.reshape(-1), "node_rank": torch.tensor(rank)}
    return {name: each.to(device) for name, each in found.items()}
