"""What ranks exchange when all of them run in one process: in lockstep, or one alone with what came then."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx

from sp_compile.collectives import EXCHANGE, STARTS, is_start
from sp_compile.mesh import Group

REDUCED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda parts: parts.sum(0, dtype=parts.dtype),
    "avg": lambda parts: parts.mean(0),
    "max": lambda parts: parts.amax(0),
    "min": lambda parts: parts.amin(0),
    "product": lambda parts: parts.prod(0, dtype=parts.dtype),
}


class Call(NamedTuple):
    """What a rank hands to a collective.

    Attributes:
        kind: as in :data:`sp_compile.collectives.STARTS`.
        site: which collective of the graph.
        group: name of the ranks among which it is.
        rows: what the rank gives; for an exchange, packed in the order of the ranks they go to.
        counts: of an exchange, rows that go to each rank and that come from each.
        length: rows of the result.
        reduce: of a reduction, which.
    """

    kind: str
    site: int
    group: str
    rows: torch.Tensor
    counts: tuple[list[int], list[int]]
    length: int
    reduce: str


class Seat(Protocol):
    """Where a rank sits that runs in this process."""

    def exchange(self, call: Call) -> torch.Tensor:
        """A buffer of the rank's own with what the collective brings."""


_SEAT: contextvars.ContextVar[Seat] = contextvars.ContextVar("seat")


@contextmanager
def seated(seat: Seat) -> Iterator[None]:
    """Run a local graph as the rank that sits there."""
    token = _SEAT.set(seat)
    try:
        yield
    finally:
        _SEAT.reset(token)


@torch.library.custom_op("sp_compile::deliver", mutates_args=())
def deliver(
    kind: str,
    site: int,
    group: str,
    ranks: int,
    rows: torch.Tensor,
    sent: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    received: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
    reduce: str = "sum",
) -> torch.Tensor:
    """What a collective brings to the rank that runs now, among ranks of this process.

    Args:
        kind, site, group, reduce: as in :class:`Call`.
        ranks: how many take part in an all-gather.
        rows: ``[rows, ...]``, what this rank has.
        sent, counts, received, after: of an exchange, as of :func:`sp_compile.ops.exchange_rows`.

    Returns:
        ``[length, ...]``: all parts of an all-gather, as many as came of an exchange, else as many as were given.
    """
    length = _length(kind, ranks, rows, received)
    sizes: tuple[list[int], list[int]] = ([], [])
    if sent is not None and counts is not None:
        go, come = counts.tolist()
        rows, sizes = rows.index_select(0, sent[: sum(go)]), (go, come)
    return _SEAT.get().exchange(Call(kind, site, group, rows, sizes, length, reduce))


@deliver.register_fake
def _(*args: Any) -> torch.Tensor:
    kind, _, _, ranks, rows, *exchanged = args
    received = exchanged[2] if len(exchanged) > 2 else None
    delivered: torch.Tensor = rows.new_empty(_shape(rows, _length(kind, ranks, rows, received)))
    return delivered


def _length(kind: str, ranks: int, rows: torch.Tensor, received: torch.Tensor | None) -> Any:
    if received is not None:
        return received.shape[0]
    if kind == "all_gather":
        return rows.shape[0] * ranks
    return rows.shape[0] if rows.dim() else 1


def _shape(rows: torch.Tensor, length: Any) -> list[Any]:
    return [length, *rows.shape[1:]] if rows.dim() else []


def stand_in(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph, with collectives that are delivered in this process; sites are numbered in the graph's order."""
    graph = fx.Graph()
    own: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, own))
    for site, node in enumerate([*filter(is_start, graph.nodes)]):
        kind, (rows, *rest) = STARTS[node.target], node.args
        if node.target is EXCHANGE:
            sent, counts, received, group, *after = rest
            args: tuple[Any, ...] = (kind, site, group, 1, rows, sent, counts, received, *after)
        elif kind == "all_gather":
            args = (kind, site, rest[1], rest[0], rows)
        elif kind == "all_reduce":
            args = (kind, site, rest[1], 1, rows, None, None, None, None, rest[0])
        else:
            args = (kind, site, rest[2], 1, rows)
        node.target, node.args = deliver._opoverload, args
    return fx.GraphModule(gm, graph)


def members(group: Group, name: str) -> list[list[int]]:
    """The ranks of a group that take part in a collective with each other, for each such set."""
    if group.nodes is None or name == group.name:
        return [[*range(group.size)]]
    size = group.nodes.size
    if name == group.nodes.inner:
        return [[*range(first, first + size)] for first in range(0, group.size, size)]
    return [[*range(place, group.size, size)] for place in range(size)]


def results(calls: Sequence[Call]) -> list[torch.Tensor]:
    """What a collective brings to each of the ranks that made these calls; an all-gather or a sum the same to all."""
    kind, parts = calls[0].kind, [each.rows for each in calls]
    if kind == "all_gather":
        return [torch.cat(parts)] * len(calls)
    if kind == "all_reduce":
        return [REDUCED[calls[0].reduce](torch.stack(parts))] * len(calls)
    if kind == "all_to_all":
        cut = [each.chunk(len(calls)) for each in parts]
    else:
        cut = [each.rows.split(each.counts[0]) for each in calls]
    found = []
    for i, call in enumerate(calls):
        out = call.rows.new_zeros(_shape(call.rows, call.length))
        came = torch.cat([each[i] for each in cut])
        out[: came.shape[0]] = came
        found.append(out)
    return found


@dataclass
class Delivered:
    """What one collective brought to a rank, and the bytes of it that came from others."""

    buffer: torch.Tensor
    bytes: int


def _bytes(call: Call, ranks: int) -> int:
    """Bytes that come from other ranks, as :class:`~sp_compile.report.Collective` counts those that are sent."""
    row = call.rows.element_size() * (call.rows[:1].numel() if call.rows.dim() and call.rows.shape[0] else 1)
    if call.kind == "exchange":
        return row * sum(call.counts[1])
    whole = call.rows.numel() * call.rows.element_size()
    shares = {"all_gather": ranks - 1, "all_to_all": (ranks - 1) / ranks, "all_reduce": 2 * (ranks - 1) / ranks}
    return round(whole * shares[call.kind])


class Released(Exception):
    """Ends a rank that waits for one that raised."""


class Lockstep:
    """Runs all ranks in this process, one at a time: each until a collective, then the next.

    Args:
        group: the ranks.
        keep: what is kept of a buffer, to be delivered again.
        device: where the ranks run.

    Attributes:
        delivered: for each rank what each collective brought, by site.
    """

    def __init__(self, group: Group, device: torch.device, keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._group, self._device, self._keep = group, device, keep
        self._turns = [threading.Semaphore(0) for _ in range(group.size)]
        self._calls: list[Call] = []
        self._results: dict[int, torch.Tensor] = {}
        self._error: BaseException | None = None
        self.delivered: list[dict[int, Delivered]] = [{} for _ in range(group.size)]

    def run(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of a task for each rank; that of the first runs on this thread.

        Raises:
            BaseException: the first that a task raised.
        """
        found: list[Any] = [None] * len(tasks)
        cuda = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if cuda else None

        def work(rank: int) -> None:
            on_device: AbstractContextManager[Any] = torch.cuda.stream(stream) if cuda and rank else nullcontext()
            try:
                self._await(rank)
                with torch.no_grad(), on_device, seated(_Place(self, rank)):
                    found[rank] = tasks[rank]()
                self._pass(rank)
            except Released:
                pass
            except BaseException as error:
                self._error = self._error or error
                for each in self._turns:
                    each.release()

        contexts = [contextvars.copy_context() for _ in tasks[1:]]
        threads = [
            threading.Thread(target=context.run, args=(work, rank), daemon=True)
            for rank, context in enumerate(contexts, start=1)
        ]
        for each in threads:
            each.start()
        self._turns[0].release()
        work(0)
        for each in threads:
            each.join()
        if self._error is not None:
            raise self._error
        return found

    def exchange(self, rank: int, call: Call) -> torch.Tensor:
        """What the collective brings to a rank, once all have come to it."""
        assert all(each[:3] == call[:3] for each in self._calls), "ranks come to the same collectives in the same order"
        self._calls.append(call)
        if len(self._calls) == self._group.size:
            self._complete()
        self._pass(rank)
        self._await(rank)
        return self._results.pop(rank).clone()

    def _complete(self) -> None:
        calls, self._calls = self._calls, []
        for ranks in members(self._group, calls[0].group):
            found = results([calls[rank] for rank in ranks])
            kept: dict[int, torch.Tensor] = {}
            for rank, buffer in zip(ranks, found, strict=True):
                self._results[rank] = buffer
                if id(buffer) not in kept:
                    kept[id(buffer)] = self._keep(buffer)
                bytes_in = _bytes(calls[rank], len(ranks))
                self.delivered[rank][calls[rank].site] = Delivered(kept[id(buffer)], bytes_in)

    def _pass(self, rank: int) -> None:
        self._turns[(rank + 1) % len(self._turns)].release()

    def _await(self, rank: int) -> None:
        self._turns[rank].acquire()
        if self._error is not None:
            raise Released


@dataclass(frozen=True)
class _Place:
    """A rank's seat among all of them."""

    ranks: Lockstep
    rank: int

    def exchange(self, call: Call) -> torch.Tensor:
        return self.ranks.exchange(self.rank, call)


@dataclass(frozen=True)
class Replay:
    """The seat of a rank that runs alone: what came once comes again."""

    buffers: dict[int, torch.Tensor]

    def exchange(self, call: Call) -> torch.Tensor:
        """A fresh copy of what the collective brought."""
        return self.buffers[call.site].clone()
