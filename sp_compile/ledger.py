"""Which rank holds which token of a cache, and where.

Tokens of a request are dealt to the ranks in turn. Where a rank stores them is organised in pages, which requests take
from the rank's free ones; two requests of 5 and 3 tokens over two ranks, with pages of two slots::

    tokens   a0 a1 a2 a3 a4   b0 b1 b2
    rank 0   [a0 a2] [b1 . ] [a4 . ]
    rank 1   [a1 a3] [b0 b2]

:meth:`Ledger.place` is the only function that says where a token is. It is asked when tokens are written, and what it
said is what readers see (``runs``). How many tokens of a request each rank holds is counted, not derived again.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sp_compile.errors import CacheError, CacheFullError


@dataclass(frozen=True)
class Places:
    """Where tokens are: three int64 arrays of one entry a token, in the order of requests and tokens.

    Attributes:
        position: number of the token within its request.
        rank: who holds it.
        slot: where the rank holds it.
        request: index into the requests that were asked for.
    """

    position: np.ndarray
    rank: np.ndarray
    slot: np.ndarray
    request: np.ndarray


@dataclass
class _Request:
    length: int
    first: int  # rank of the first token
    held: np.ndarray  # int64 [sp], tokens on each rank
    pages: list[list[int]] = field(default_factory=list)  # of each rank, in the order of their tokens


class Ledger:
    """Requests, and the slots of every rank that hold their tokens.

    Args:
        sp: ranks.
        page: slots of a page.
        pages: of each rank, where their number is fixed; None where they may become more.

    Attributes:
        slots: slots of each rank so far, int64 ``[sp]``, multiples of ``page``.
        held: tokens that each rank holds, int64 ``[sp]``.
    """

    def __init__(self, sp: int, page: int, pages: int | None = None) -> None:
        self.sp, self.page, self.pages = sp, page, pages
        self.slots = np.full(sp, 0 if pages is None else pages * page, dtype=np.int64)
        self.held = np.zeros(sp, dtype=np.int64)
        self._requests: dict[int, _Request] = {}
        self._free = [list(range(pages or 0)) for _ in range(sp)]  # heaps

    def __contains__(self, request: int) -> bool:
        return request in self._requests

    @property
    def requests(self) -> list[int]:
        """Numbers of the requests there are."""
        return [*self._requests]

    def length(self, request: int) -> int:
        """Tokens of a request."""
        return self._known(request).length

    def held_of(self, request: int) -> np.ndarray:
        """Tokens of a request on each rank, int64 ``[sp]``."""
        return self._known(request).held.copy()

    def add(self, request: int) -> None:
        """A new request, without tokens yet; its first goes to the rank that holds the least."""
        assert request not in self._requests, request
        first = int(self.held.argmin())
        self._requests[request] = _Request(0, first, np.zeros(self.sp, dtype=np.int64), [[] for _ in range(self.sp)])

    def append(self, requests: Sequence[int], counts: Sequence[int]) -> Places:
        """Give slots to further tokens, ``counts[i]`` of ``requests[i]``.

        Raises:
            CacheFullError: there are not as many free pages; nothing is changed then.
        """
        wanted = [self._pages_wanted(self._known(each), count) for each, count in zip(requests, counts, strict=True)]
        self._check_room(wanted)
        starts = [self._requests[each].length for each in requests]
        for request, count, more in zip(requests, counts, wanted, strict=True):
            known = self._requests[request]
            for rank in np.flatnonzero(more).tolist():
                known.pages[rank] += [self._new_page(rank) for _ in range(int(more[rank]))]
            added = self._shares(known, known.length + count) - known.held
            known.length += count
            known.held += added
            self.held += added
        return self.place(requests, starts, counts)

    def place(self, requests: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> Places:
        """Where tokens are, ``counts[i]`` of ``requests[i]`` from ``starts[i]`` on."""
        sizes = np.asarray(counts, dtype=np.int64)
        total, ends = int(sizes.sum()), np.cumsum(sizes)
        of = np.repeat(np.arange(len(sizes)), sizes)
        position = np.arange(total) - np.repeat(ends - sizes, sizes) + np.repeat(np.asarray(starts, np.int64), sizes)
        first = np.asarray([self._requests[each].first for each in requests], dtype=np.int64)
        rank, ordinal = (position + first[of]) % self.sp, position // self.sp
        slot = np.empty(total, dtype=np.int64)
        for i, request in enumerate(requests):
            rows = slice(int(ends[i] - sizes[i]), int(ends[i]))
            tables = self._requests[request].pages
            if sizes[i] == 1:
                row = rows.start
                pages = tables[int(rank[row])]
                slot[row] = pages[int(ordinal[row]) // self.page] * self.page + int(ordinal[row]) % self.page
                continue
            for r in range(self.sp):
                mine = np.flatnonzero(rank[rows] == r) + rows.start
                pages_of_rank = np.asarray(tables[r], dtype=np.int64)
                slot[mine] = pages_of_rank[ordinal[mine] // self.page] * self.page + ordinal[mine] % self.page
        return Places(position, rank, slot, of)

    def runs(self, requests: Sequence[int], rank: int) -> np.ndarray:
        """Ranges of consecutive slots with a rank's tokens: int64 ``[runs, 3]`` of request index, start and end."""
        found: list[tuple[int, int, int]] = []
        for i, request in enumerate(requests):
            known = self._known(request)
            left = int(known.held[rank])
            pages = known.pages[rank][: -(-left // self.page)]
            at = 0
            while at < len(pages):
                upto = at + 1
                while upto < len(pages) and pages[upto] == pages[upto - 1] + 1:
                    upto += 1
                size = min(left, (upto - at) * self.page)
                found.append((i, pages[at] * self.page, pages[at] * self.page + size))
                left, at = left - size, upto
        return np.asarray(found, dtype=np.int64).reshape(-1, 3)

    def crop(self, request: int, length: int) -> None:
        """Forget the tokens of a request from ``length`` on; pages without tokens become free."""
        known = self._known(request)
        assert 0 <= length <= known.length, (length, known.length)
        left = self._shares(known, length)
        self.held += left - known.held
        known.held, known.length = left, length
        for rank, pages in enumerate(known.pages):
            keep = -(-int(left[rank]) // self.page)
            for page in pages[keep:]:
                heapq.heappush(self._free[rank], page)
            del pages[keep:]

    def drop(self, request: int) -> None:
        """Forget a request; its pages become free."""
        self.crop(request, 0)
        del self._requests[request]

    def _known(self, request: int) -> _Request:
        if request not in self._requests:
            known = ", ".join(map(str, self._requests)) or "none"
            raise CacheError(f"the cache holds no request {request}; it holds {known}")
        return self._requests[request]

    def _shares(self, known: _Request, length: int) -> np.ndarray:
        """Tokens of each rank when the request has so many: it is dealt from rank ``first`` on."""
        turn = (np.arange(self.sp) - known.first) % self.sp
        share: np.ndarray = length // self.sp + (turn < length % self.sp).astype(np.int64)
        return share

    def _pages_wanted(self, known: _Request, count: int) -> np.ndarray:
        needed = -(-self._shares(known, known.length + count) // self.page)
        more: np.ndarray = needed - np.asarray([len(each) for each in known.pages])
        return more

    def _check_room(self, wanted: Sequence[np.ndarray]) -> None:
        if self.pages is None:
            return
        short = np.sum(wanted, axis=0) - np.asarray([len(each) for each in self._free])
        if short.max(initial=0) > 0:
            rank = int(short.argmax())
            room = self.pages * self.page * self.sp
            raise CacheFullError(
                f"the cache is full: rank {rank} has {len(self._free[rank])} free pages of {self.page} tokens, "
                f"{len(self._free[rank]) + int(short[rank])} are needed; it was made for {room} "
                "tokens. Make it with more, or without a size"
            )

    def _new_page(self, rank: int) -> int:
        if self._free[rank]:
            return heapq.heappop(self._free[rank])
        self.slots[rank] += self.page
        return int(self.slots[rank]) // self.page - 1
