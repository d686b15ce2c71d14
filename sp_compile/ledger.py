"""Which rank holds which token of a cache, and where.

Tokens of a request are dealt to the ranks in turn. Where a rank stores them is organised in pages, which requests take
from the rank's free ones; two requests of 5 and 3 tokens over two ranks, with pages of two slots::

    tokens   a0 a1 a2 a3 a4   b0 b1 b2
    rank 0   [a0 a2] [b1 . ] [a4 . ]
    rank 1   [a1 a3] [b0 b2]

:meth:`Ledger.place` is the only function that says where a token is. It is asked when tokens are written, and what it
said is what readers see (``runs``). How many tokens of a request each rank holds is counted, not derived again.

Layers that attend to a window only have a :class:`Shelf` of their own, on which a request keeps the pages that its next
token can see; the ranks of tokens are the same on all shelves.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from sp_compile.errors import CacheError, CacheFullError

Window = int | None


@dataclass(frozen=True)
class Places:
    """Where tokens are: int64 arrays of one entry a token, in the order of requests and tokens.

    Attributes:
        position: number of the token within its request.
        rank: who holds it.
        ordinal: how many of its request the rank holds before it.
        request: index into the requests that were asked for.
    """

    position: np.ndarray
    rank: np.ndarray
    ordinal: np.ndarray
    request: np.ndarray


@dataclass
class _Pages:
    """Pages of one request on one rank, in the order of their tokens: runs of consecutive ones, ``[first, count]``."""

    low: int = 0  # number of the first that is kept; those before it fell out of the window
    high: int = 0  # number after the last
    runs: list[list[int]] = field(default_factory=list)

    def add(self, page: int) -> None:
        self.high += 1
        if self.runs and sum(self.runs[-1]) == page:
            self.runs[-1][1] += 1
        else:
            self.runs.append([page, 1])

    def drop_last(self) -> int:
        self.high -= 1
        last = self.runs[-1]
        last[1] -= 1
        page = sum(last)
        if not last[1]:
            self.runs.pop()
        return page

    def drop_first(self) -> int:
        first = self.runs[0]
        page = first[0]
        first[0], first[1], self.low = page + 1, first[1] - 1, self.low + 1
        if not first[1]:
            self.runs.pop(0)
        return page

    def table(self) -> np.ndarray:
        """The pages, from ``low`` on."""
        return np.concatenate([np.arange(start, start + count) for start, count in self.runs] or [np.zeros(0, int)])


class Shelf:
    """The slots of every rank for layers of one window.

    Args:
        sp: ranks.
        page: slots of a page.
        window: tokens that a query sees, itself included; None for all.
        pages: of each rank, where their number is fixed; None where they may become more.

    Attributes:
        slots: slots of each rank so far, int64 ``[sp]``, multiples of ``page``.
        released: pages became free since this was last set to False.
    """

    def __init__(self, sp: int, page: int, window: Window = None, pages: int | None = None) -> None:
        self.sp, self.page, self.window, self.released = sp, page, window, False
        self.slots = np.full(sp, 0 if pages is None else pages * page, dtype=np.int64)
        self.free = [list(range(pages or 0)) for _ in range(sp)]  # heaps
        self.floor: dict[int, int] = {}  # where the tokens of a request begin that were here at all
        self._pages: dict[int, list[_Pages]] = {}

    def wanted(self, requests: Sequence[int], shares: np.ndarray) -> np.ndarray:
        """Pages that requests need beyond those they have, int64 ``[requests, sp]``; ``shares`` are tokens there."""
        has = np.asarray([[each.high for each in self._of(request)] for request in requests], dtype=np.int64)
        more: np.ndarray = -(-shares // self.page) - has.reshape(shares.shape)
        return more

    def fit(self, request: int, shares: np.ndarray, unseen: np.ndarray) -> None:
        """Keep the pages of a request that hold tokens ``unseen[r]`` to ``shares[r]`` of each rank ``r``, no others."""
        for rank, pages in enumerate(self._of(request)):
            high, low = -(-int(shares[rank]) // self.page), int(unseen[rank]) // self.page
            while pages.runs and pages.low < low:
                self._release(rank, pages.drop_first())
            if not pages.runs:
                pages.low = pages.high = max(pages.low, low)
            while pages.high > high:
                self._release(rank, pages.drop_last())
            while pages.high < high:
                pages.add(self._new_page(rank))

    def slot(self, request: int, rank: int, ordinals: np.ndarray) -> np.ndarray:
        """Slots of a request's tokens on a rank; -1 for those that are not kept."""
        pages = self._of(request)[rank]
        number, within = np.divmod(ordinals, self.page)
        table = pages.table()
        number = number - pages.low
        kept = (number >= 0) & (number < len(table))
        found: np.ndarray = np.where(
            kept, table[np.where(kept, number, 0)] * self.page + within if len(table) else 0, -1
        )
        return found

    def last_slot(self, request: int, rank: int, ordinal: int) -> int:
        """The slot of a request's last token there; what :meth:`slot` says, for one token."""
        runs = self._of(request)[rank].runs
        return (sum(runs[-1]) - 1) * self.page + ordinal % self.page if runs else -1

    def runs(self, request: int, rank: int, share: int) -> Iterator[tuple[int, int]]:
        """Ranges of consecutive slots with a request's tokens on a rank, which has ``share`` of them."""
        pages = self._of(request)[rank]
        left = share - pages.low * self.page
        for start, count in pages.runs:
            size = min(left, count * self.page)
            yield start * self.page, start * self.page + size
            left -= size

    def forgotten(self, request: int, first: int) -> int:
        """Where the tokens of a request begin that are all on pages still; its first is on rank ``first``."""
        gone = [
            (each.low * self.page - 1) * self.sp + (rank - first) % self.sp + 1 if each.low else 0
            for rank, each in enumerate(self._of(request))
        ]
        return max(self.floor.get(request, 0), *gone)

    def drop(self, request: int) -> None:
        """Forget a request; its pages become free."""
        nothing = np.zeros(self.sp, dtype=np.int64)
        for pages in self._of(request):
            pages.high, pages.low = pages.high - pages.low, 0
        self.fit(request, nothing, nothing)
        del self._pages[request]
        self.floor.pop(request, None)

    def _of(self, request: int) -> list[_Pages]:
        if request not in self._pages:
            self._pages[request] = [_Pages() for _ in range(self.sp)]
        return self._pages[request]

    def _release(self, rank: int, page: int) -> None:
        heapq.heappush(self.free[rank], page)
        self.released = True

    def _new_page(self, rank: int) -> int:
        if self.free[rank]:
            return heapq.heappop(self.free[rank])
        self.slots[rank] += self.page
        return int(self.slots[rank]) // self.page - 1


class Ledger:
    """Requests, and the slots of every rank that hold their tokens.

    Args:
        sp: ranks.
        page: slots of a page.
        pages: of each rank, where their number is fixed; None where they may become more.

    Attributes:
        shelves: slots by window; the one of all tokens, ``shelves[None]``, is always there.
        held: tokens that each rank has, int64 ``[sp]``.
    """

    def __init__(self, sp: int, page: int, pages: int | None = None) -> None:
        self.sp, self.page, self.pages = sp, page, pages
        self.shelves: dict[Window, Shelf] = {None: Shelf(sp, page, None, pages)}
        self.held = np.zeros(sp, dtype=np.int64)
        self._row: dict[int, int] = {}
        self._spare: list[int] = []  # rows of the arrays below that no request has
        self._length, self._first = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self._held = np.zeros((0, sp), dtype=np.int64)

    def __contains__(self, request: int) -> bool:
        return request in self._row

    @property
    def requests(self) -> list[int]:
        """Numbers of the requests there are."""
        return [*self._row]

    def length(self, request: int) -> int:
        """Tokens of a request."""
        return int(self._length[self._rows([request])[0]])

    def lengths(self, requests: Sequence[int]) -> np.ndarray:
        """Tokens of requests, int64 ``[requests]``."""
        found: np.ndarray = self._length[self._rows(requests)]
        return found

    def first(self, request: int) -> int:
        """The rank of a request's first token."""
        return int(self._first[self._rows([request])[0]])

    def held_of(self, request: int) -> np.ndarray:
        """Tokens of a request on each rank, int64 ``[sp]``."""
        held: np.ndarray = self._held[self._rows([request])[0]].copy()
        return held

    def add(self, request: int, turn: int = 0) -> None:
        """A new request, without tokens yet; its first goes to the rank that holds the least but for ``turn`` others.

        Requests that come together take turns.
        """
        assert request not in self._row, request
        if not self._spare:
            old, more = len(self._length), max(8, len(self._length))
            self._length, self._first = (np.concatenate([each, np.zeros(more, dtype=np.int64)])
                                         for each in (self._length, self._first))  # fmt: skip
            self._held = np.concatenate([self._held, np.zeros((more, self.sp), dtype=np.int64)])
            self._spare = [*range(old + more - 1, old - 1, -1)]
        row = self._row[request] = self._spare.pop()
        self._length[row], self._held[row] = 0, 0
        self._first[row] = int(np.argsort(self.held, kind="stable")[turn % self.sp])

    def append(self, requests: Sequence[int], counts: Sequence[int]) -> Places:
        """Give slots among all tokens to further ones, ``counts[i]`` of ``requests[i]``; each request once.

        Shelves of a window follow by :meth:`settle`.

        Raises:
            CacheFullError: there are not as many free pages; nothing is changed then.
        """
        rows, shelf = self._rows(requests), self.shelves[None]
        starts = self._length[rows]
        lengths = starts + np.asarray(counts, dtype=np.int64)
        shares = self._shares(rows, lengths)
        wanted = shelf.wanted(requests, shares)
        self._check_room(wanted)
        for i in np.flatnonzero(wanted.any(axis=1)).tolist():
            shelf.fit(requests[i], shares[i], np.zeros(self.sp, dtype=np.int64))
        self._count(rows, lengths, shares)
        return self.place(requests, starts, counts)

    def place(self, requests: Sequence[int], starts: Sequence[int] | np.ndarray, counts: Sequence[int]) -> Places:
        """Who holds tokens, ``counts[i]`` of ``requests[i]`` from ``starts[i]`` on."""
        sizes = np.asarray(counts, dtype=np.int64)
        total, ends = int(sizes.sum()), np.cumsum(sizes)
        of = np.repeat(np.arange(len(sizes)), sizes)
        position = np.arange(total) - np.repeat(ends - sizes, sizes) + np.repeat(np.asarray(starts, np.int64), sizes)
        first = self._first[self._rows(requests)]
        return Places(position, (position + first[of]) % self.sp, position // self.sp, of)

    def slots(self, requests: Sequence[int], places: Places, rank: int, window: Window = None) -> np.ndarray:
        """Slots of a rank's tokens among ``places`` of ``requests``, in their order; -1 for those that are not kept."""
        shelf = self.shelves[window]
        own = np.flatnonzero(places.rank == rank)
        of, ordinal = places.request[own], places.ordinal[own]
        found = np.empty(len(own), dtype=np.int64)
        lasts = self.lengths(requests) - 1
        bounds = np.flatnonzero(np.diff(of)) + 1
        for start, end in zip([0, *bounds.tolist()], [*bounds.tolist(), len(own)], strict=True):
            if end - start == 1 and places.position[own[start]] == lasts[of[start]]:
                found[start] = shelf.last_slot(requests[of[start]], rank, int(ordinal[start]))
            elif end > start:
                found[start:end] = shelf.slot(requests[of[start]], rank, ordinal[start:end])
        return found

    def kept(self, rank: int, window: Window = None) -> tuple[list[int], Places, np.ndarray]:
        """Requests that have tokens, the tokens of them that a rank keeps, and the slots of these."""
        requests = [each for each in self.requests if self.length(each)]
        places = self.place(requests, [0] * len(requests), self.lengths(requests).tolist())
        slots = self.slots(requests, places, rank, window)
        at = np.flatnonzero(places.rank == rank)[slots >= 0]
        chosen = Places(*(each[at] for each in (places.position, places.rank, places.ordinal, places.request)))
        return requests, chosen, slots[slots >= 0]

    def settle(self, requests: Sequence[int]) -> None:
        """Let the shelves of a window keep what the next token of each request can see."""
        rows = self._rows(requests)
        lengths, shares = self._length[rows], self._held[rows]
        for window, shelf in self.shelves.items():
            if window is not None:
                unseen = self._shares(rows, np.maximum(lengths - window + 1, 0))
                for i, request in enumerate(requests):
                    shelf.fit(request, shares[i], unseen[i])

    def runs(self, requests: Sequence[int], rank: int, window: Window = None) -> np.ndarray:
        """Ranges of consecutive slots with a rank's tokens: int64 ``[runs, 3]`` of request index, start and end."""
        shelf, shares = self.shelves[window], self._held[self._rows(requests), rank].tolist()
        found = [
            (i, *run) for i, request in enumerate(requests) if shares[i] for run in shelf.runs(request, rank, shares[i])
        ]
        return np.asarray(found, dtype=np.int64).reshape(-1, 3)

    def forgotten(self, request: int, window: Window) -> int:
        """Where the tokens of a request begin of which layers of a window have all."""
        return self.shelves[window].forgotten(request, self.first(request))

    def crop(self, request: int, length: int) -> None:
        """Forget the tokens of a request from ``length`` on; pages without tokens become free.

        Raises:
            CacheError: layers of a window have already forgotten what the next token would see.
        """
        rows = self._rows([request])
        assert 0 <= length <= self._length[rows[0]], (length, self._length[rows[0]])
        for window in self.shelves:
            if length and window is not None and max(length - window + 1, 0) < self.forgotten(request, window):
                raise CacheError(
                    f"request {request} cannot go back to {length} tokens: layers with a window of {window} keep "
                    f"no more than that of its {int(self._length[rows[0]])}; keep the cache from before, or start anew"
                )
        lengths = np.asarray([length], dtype=np.int64)
        shares = self._shares(rows, lengths)
        self._count(rows, lengths, shares)
        for window, shelf in self.shelves.items():
            if window is None:
                shelf.fit(request, shares[0], np.zeros(self.sp, dtype=np.int64))
            elif not length:
                shelf.drop(request)
        if length:
            self.settle([request])

    def drop(self, request: int) -> None:
        """Forget a request; its pages become free."""
        self.crop(request, 0)
        self.shelves[None].drop(request)
        self._spare.append(self._row.pop(request))

    def _rows(self, requests: Sequence[int]) -> np.ndarray:
        try:
            return np.asarray([self._row[each] for each in requests], dtype=np.int64)
        except KeyError as missing:
            known = ", ".join(map(str, self._row)) or "none"
            raise CacheError(f"the cache holds no request {missing.args[0]}; it holds {known}") from None

    def _shares(self, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens of each rank when requests have so many, int64 ``[requests, sp]``: dealt from rank ``first`` on."""
        turn = (np.arange(self.sp) - self._first[rows, None]) % self.sp
        share: np.ndarray = lengths[:, None] // self.sp + (turn < lengths[:, None] % self.sp)
        return share

    def _count(self, rows: np.ndarray, lengths: np.ndarray, shares: np.ndarray) -> None:
        self.held += (shares - self._held[rows]).sum(axis=0)
        self._length[rows], self._held[rows] = lengths, shares

    def _check_room(self, wanted: np.ndarray) -> None:
        if self.pages is None:
            return
        free = self.shelves[None].free
        short = wanted.sum(axis=0) - np.asarray([len(each) for each in free])
        if short.max(initial=0) > 0:
            rank = int(short.argmax())
            room = self.pages * self.page * self.sp
            raise CacheFullError(
                f"the cache is full: rank {rank} has {len(free[rank])} free pages of {self.page} tokens, "
                f"{len(free[rank]) + int(short[rank])} are needed; it was made for {room} "
                "tokens, and requests take whole pages. Make it with more, with smaller pages, or without a size"
            )
