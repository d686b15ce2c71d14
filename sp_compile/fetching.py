"""Which requests' earlier keys and values go to their new queries, and which queries to the earlier keys.

New tokens and earlier ones of a request are both spread over the ranks. Either the queries go to everyone, and partial
outputs come back, or the earlier keys and values go to everyone. Many tokens behind few are the case for the latter::

    queries * heads * ((head_dim + value_dim) * bytes + 4)  <  earlier * kv_heads * (head_dim + value_dim) * bytes

Each side is summed over the layers of a window, of which only so many earlier tokens count as the next token sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sp_compile.kernels.runs import crossed
from sp_compile.layout import TokenLayout
from sp_compile.ledger import Ledger, Window
from sp_compile.needs import FEWEST
from sp_compile.storage import Storage


def fetches(counts: np.ndarray, pasts: np.ndarray, query_bytes: int, key_bytes: int, window: Window) -> np.ndarray:
    """Whether earlier keys go to the queries, bool ``[requests]``.

    Args:
        counts, pasts: new and earlier tokens of each request, int64 ``[requests]``.
        query_bytes: of one token's queries and what comes back for them.
        key_bytes: of one token's keys and values.
        window: of the layers; None where all earlier tokens are seen.
    """
    seen = pasts - _unseen(pasts, window)
    cheaper: np.ndarray = (seen > 0) & (seen * key_bytes < counts * query_bytes)
    return cheaper


@dataclass(frozen=True)
class Extension:
    """New tokens of requests that may have earlier ones.

    Attributes:
        ledger: where earlier tokens are.
        rank: whose index inputs are made.
        layout: of the new tokens.
        requests: whose tokens they are.
        pasts: earlier tokens of each, int64 ``[requests]``.
        starts: number of its first token in the whole row, int64 ``[requests]``.
        request: of each new token the index of its request, int64 ``[tokens]``.
        rows: numbers of the new tokens in the whole row, int64 ``[tokens]``.
    """

    ledger: Ledger
    rank: int
    layout: TokenLayout
    requests: Sequence[int]
    pasts: np.ndarray
    starts: np.ndarray
    request: np.ndarray
    rows: np.ndarray

    def meet(
        self, storages: Sequence[Storage], runs: Sequence[np.ndarray], query_bytes: Mapping[Window, int]
    ) -> tuple[str, dict[str, np.ndarray]]:
        """How new tokens meet earlier ones: ``cached`` of the program, and index inputs of it.

        Args:
            storages: of each window.
            runs: where the rank holds earlier tokens in each, from :meth:`~sp_compile.ledger.Ledger.runs`.
            query_bytes: of one token's queries and what comes back for them, by window, as far as known.
        """
        if not self.pasts.any():
            return "first", {}
        fetched = self._fetched(storages, query_bytes)
        if fetched is None:
            queries = self.layout.valid.numpy(), self.request[self.layout.local_index.numpy()]
            return "more", {f"held_runs_{i}": crossed(*queries, run) for i, run in enumerate(runs)}
        found: dict[str, np.ndarray] = {}
        for i, held in enumerate(storages):
            found |= self.index_inputs(i, held.window, fetched[i], runs[i])
        return "mixed", found

    def _fetched(self, storages: Sequence[Storage], query_bytes: Mapping[Window, int]) -> list[np.ndarray] | None:
        """From :func:`fetches`, of each window; None where no earlier keys go, or too few to be worth it."""
        counts = np.bincount(self.request, minlength=len(self.requests))
        if self.ledger.sp == 1 or not query_bytes or counts.max() == 1:
            return None
        found, saved = [], 0
        for held in storages:
            query, key = query_bytes[held.window], held.token_bytes
            found.append(fetches(counts, self.pasts, query, key, held.window))
            seen = self.pasts - _unseen(self.pasts, held.window)
            saved += int((counts * query - seen * key)[found[-1]].sum()) - self.ledger.sp * FEWEST * (query + key)
        return found if saved > 0 else None

    def index_inputs(self, shelf: int, window: Window, fetched: np.ndarray, runs: np.ndarray) -> dict[str, np.ndarray]:
        """What a ``mixed`` program needs to know for the layers of a window.

        Args:
            shelf: number of the window.
            fetched: from :func:`fetches`.
            runs: where the rank holds earlier tokens.
        """
        local, valid = self.layout.local_index.numpy(), self.layout.valid.numpy()
        slots, past, is_past = self._past(np.flatnonzero(fetched), window)
        picked, is_query = _picked(valid & (~fetched & (self.pasts > 0))[self.request[local]])
        normal = np.take_along_axis(local, picked, axis=1)
        own = picked[self.rank][is_query[self.rank]]
        merged = np.arange(self.layout.shard_length)
        merged[own] = self.layout.shard_length + np.arange(len(own))
        return {
            f"picked_past_{shelf}": slots,
            f"seen_index_{shelf}": np.concatenate([self.rows[local.reshape(-1)], past.reshape(-1)]),
            f"seen_valid_{shelf}": np.concatenate([valid.reshape(-1), is_past.reshape(-1)]),
            f"picked_queries_{shelf}": picked[self.rank],
            f"queries_index_{shelf}": self.rows[normal.reshape(-1)],
            f"merged_rows_{shelf}": merged,
            f"held_runs_{shelf}": crossed(is_query, self.request[normal], runs),
        }

    def _past(self, chosen: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Earlier tokens of chosen requests, as many of each rank.

        Returns:
            The slots of this rank's, and of all ranks' ``[sp, picked]`` the numbers in the whole row and which of them
            are tokens.
        """
        requests, pasts = [self.requests[i] for i in chosen], self.pasts[chosen]
        first = _unseen(pasts, window)
        places = self.ledger.place(requests, first, (pasts - first).tolist())
        at, is_token = _picked(places.rank == np.arange(self.ledger.sp)[:, None])
        rows = np.append(self.starts[chosen][places.request] + places.position, 0)
        slots = self.ledger.slots(requests, places, self.rank, window)
        assert (slots >= 0).all(), "what the next token sees is kept"
        return np.pad(slots, (0, at.shape[1] - len(slots))), rows[np.where(is_token, at, -1)], is_token


def _unseen(pasts: np.ndarray, window: Window) -> np.ndarray:
    """Earlier tokens that the next one does not see."""
    unseen: np.ndarray = np.zeros_like(pasts) if window is None else np.maximum(pasts - window + 1, 0)
    return unseen


def _picked(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the chosen columns of each row, 0 behind them so that all rows have as many, and which are real."""
    counts = chosen.sum(axis=1)
    size = max(FEWEST, int(counts.max(initial=0)))
    real: np.ndarray = np.arange(size) < counts[:, None]
    found = np.zeros(real.shape, dtype=np.int64)
    found[real] = np.nonzero(chosen)[1]
    return found, real
