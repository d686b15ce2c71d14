"""A cache of keys and values that stays spread over the ranks, in the form that transformers expects of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from sp_compile.cache_files import load, read_layout, save
from sp_compile.errors import CacheError
from sp_compile.fetching import Extension
from sp_compile.fingerprint import digest
from sp_compile.inputs import from_pack, token_input
from sp_compile.layout import token_layout
from sp_compile.ledger import Ledger, Places, Shelf, Window
from sp_compile.needs import padded
from sp_compile.rows import ROW, BatchRows, PackedRows, check_kind, rows_for
from sp_compile.steps import Kept, Step, index_inputs
from sp_compile.storage import Storage

if TYPE_CHECKING:
    from sp_compile.runtime import ParallelModule


@dataclass(frozen=True)
class _Pending:
    """What a running forward adds."""

    requests: Sequence[int]
    starts: Sequence[int]
    places: Places
    rows: torch.Tensor  # of this rank's tokens
    fresh: Sequence[int]  # requests that are new


class ShardedCache(Cache):
    """Keys and values of earlier tokens, each token's on one rank.

    Pass it as ``past_key_values`` to the parallel model, or let ``generate`` make one. It serves one batch of rows
    ``[B, S]``, padded on the left or not, or requests from :func:`sp_compile.pack`, known by their numbers. The same
    tokens of all rows are on one rank. Layers whose mask is a sliding window keep what the next token sees, in whole
    pages.

    Args:
        model: what :func:`sp_compile.parallelize` returned.
        max_tokens: room for so many tokens of each row, or of all packed requests, taken at the first forward; None
            lets it grow with its pages, to at most a quarter more.
        page_size: tokens of a request that a rank stores together, at least 2.
        dtype: of what is stored, such as ``torch.bfloat16`` or ``torch.float8_e4m3fn``; None for the model's.

    Raises:
        CacheError: sizes below 1, or a dtype that holds no floating-point numbers.
    """

    is_compileable = False

    def __init__(
        self,
        model: ParallelModule,
        max_tokens: int | None = None,
        page_size: int = 256,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layers=[])
        if page_size < 2 or (max_tokens is not None and max_tokens < 1):
            raise CacheError(f"page_size={page_size} and max_tokens={max_tokens}; pass a page of 2 or more tokens")
        if dtype is not None and not dtype.is_floating_point:
            raise CacheError(f"dtype={dtype} holds no floating-point numbers")
        group = model.group
        pages = None if max_tokens is None else -(-max_tokens // (group.size * page_size))
        self.sp, self.rank, self.dtype = group.size, group.rank, dtype
        self.ledger = Ledger(group.size, page_size, pages)
        self.storages: list[Storage] = []
        self.rows: BatchRows | PackedRows | None = None
        self._module, self._group = model.module, model.group
        self.finished: set[int] = set()
        self._pending: _Pending | None = None
        self._query_bytes: Mapping[Window, int] = {}
        self._broken = False  # a forward failed while it was stored

    # what transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of every row so far; of the longest packed request."""
        requests = self.ledger.requests
        return int(self.ledger.lengths(requests).max()) if requests else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens for which there is room; -1 where there is no limit."""
        return -1 if self.ledger.pages is None else self.ledger.pages * self.ledger.page * self.sp

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that ``query_length`` new tokens see."""
        return self.get_seq_length() + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Not for models: the parallel model's forward stores keys and values itself.

        Raises:
            CacheError: always.
        """
        raise CacheError("a ShardedCache belongs to the parallel model; call that, not model.module")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take rows of the batch in another order, or more than once (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order.

        Raises:
            CacheError: the cache holds packed requests.
        """
        if isinstance(self.rows, PackedRows):
            raise CacheError("packed requests have no rows to choose; call finish() for those that are not wanted")
        if self.rows is not None:
            self.rows.select_rows(indices, self.batch_size)
        for each in self.storages:
            each.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of every row.

        Raises:
            CacheError: a positive number, more tokens than there are, packed requests, or layers of a window that
                have already forgotten what the next token would see.
        """
        length = self.get_seq_length()
        if isinstance(self.rows, PackedRows) or not -length <= tokens_to_remove <= 0:
            what = "packed requests" if isinstance(self.rows, PackedRows) else f"{length} tokens"
            raise CacheError(f"crop({tokens_to_remove}) of a cache of {what}; pass -length to 0 for rows [B, S]")
        if tokens_to_remove == -length:
            self.reset()
        elif tokens_to_remove and self.rows is not None:
            self.ledger.crop(ROW, length + tokens_to_remove)
            self.rows.crop(length + tokens_to_remove)
            self._forget(self.storages)

    @property
    def numbers(self) -> set[int]:
        """Numbers of packed requests that are or were here, or are expected."""
        expected = self.rows.requests if isinstance(self.rows, PackedRows) else []
        return {*self.ledger.requests, *expected, *self.finished}

    def finish(self, request: int) -> None:
        """Forget a packed request; its pages serve others.

        Raises:
            CacheError: the cache holds no such request.
        """
        if not isinstance(self.rows, PackedRows):
            raise CacheError("the cache holds no packed requests; reset() forgets its rows")
        if request in self.ledger or request not in self.rows.requests:
            self.ledger.drop(request)
        self.rows.finish(request)
        self.finished.add(request)
        self._forget(self.storages)

    def reset(self) -> None:
        """Forget everything; a cache with a fixed size keeps its memory."""
        if self._broken:
            self.ledger, self.storages = Ledger(self.sp, self.ledger.page, self.ledger.pages), []
        for request in self.ledger.requests:
            self.ledger.drop(request)
        self._forget(self.storages)
        self.finished, self.rows, self._pending, self._broken = set(), None, None, False

    def save(self, folder: str | Path) -> None:
        """Write the cache into a folder, as safetensors of each rank and the layout; call it on every rank.

        Raises:
            CacheError: the cache is empty.
        """
        save(self, Path(folder), self._module, self._group)

    @classmethod
    def load(
        cls, folder: str | Path, model: ParallelModule, max_tokens: int | None = None, page_size: int = 256
    ) -> ShardedCache:
        """Read a saved cache, for any number of ranks; call it on every rank.

        Args:
            folder: where :meth:`save` wrote it; every rank reads it.
            model: the model that filled it, parallel over as many ranks as it is now.
            max_tokens, page_size: as for a new cache.

        Raises:
            CacheError: there is no whole cache, or it is another model's.
            CacheFullError: it holds more than ``max_tokens``.
        """
        layout = read_layout(Path(folder), model.module)
        dtype = None if layout["dtype"] is None else getattr(torch, layout["dtype"])
        cache = cls(model, max_tokens, page_size, dtype)
        load(cache, Path(folder), layout, next(model.module.parameters()).device)
        return cache

    # what the parallel model does with it

    @property
    def batch_size(self) -> int:
        """Rows of the batch; 0 before the first forward."""
        return self.storages[0].tensors[0].shape[0] if self.storages else 0

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Keys and values of this rank in the order of the layers, ``[batch, kv_heads, slots, dim]`` each."""
        numbered = {i: each for held in self.storages for i, each in zip(held.numbers, held.tensors, strict=True)}
        return [numbered[i] for i in sorted(numbered)]

    @property
    def windows(self) -> tuple[Window, ...]:
        """How far back each of :attr:`tensors` is seen; None for all tokens."""
        numbered = {i: held.window for held in self.storages for i in held.numbers}
        return tuple(numbered[i] for i in sorted(numbered))

    @property
    def contents(self) -> str:
        """The requests and their lengths, for ranks to compare."""
        requests = self.ledger.requests
        return digest(str([requests, self.ledger.lengths(requests).tolist()]))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on this rank, free slots included."""
        return sum(each.nbytes for each in self.storages)

    def check(self, model: ParallelModule) -> None:
        """Check that a forward of ``model`` may go on from here.

        Raises:
            CacheError: the cache is another model's or for other ranks, or its tensors were changed in between.
        """
        if self._module is not model.module:
            raise CacheError(
                f"the cache was made for another model ({type(self._module).__name__}) than this "
                f"{type(model.module).__name__}; make one with ShardedCache(model)"
            )
        if (self.sp, self.rank) != (model.group.size, model.group.rank):
            raise CacheError(
                f"the cache is that of rank {self.rank} of {self.sp}, the model runs as rank {model.group.rank} of "
                f"{model.group.size}; save it and load it for these"
            )
        if self._broken:
            raise CacheError("an earlier forward failed while its keys and values were stored; call reset()")
        if any(each.edited for each in self.storages):
            raise CacheError("the cache's tensors were changed since the last forward; take a copy to edit them")

    def reserve(self, lengths: Mapping[int, int]) -> None:
        """Say how long packed requests will become, so that their rows keep their numbers until then.

        Raises:
            CacheError: the cache holds rows ``[B, S]``.
        """
        self.rows = self.rows or PackedRows()
        check_kind(self.rows, packed=True)
        if self.rows.fit([*lengths], [*lengths.values()]):
            self._renumber(self.rows)

    def begin(self, named: Mapping[str, torch.Tensor], scheme: str) -> tuple[Step, dict[str, Any]]:
        """Give places to the new tokens of a call, and say how a forward over them runs, and on which inputs.

        Args:
            named: the tensors of the call by name.
            scheme: of the new tokens' layout.

        Raises:
            CacheFullError: there is no room; nothing is changed then.
            CacheError: a request that is finished, or rows where there were packed requests.
            BatchError: inputs that do not fit those of earlier calls.
        """
        assert self._pending is None, "one forward at a time"
        rows = self.rows or rows_for(named)
        check_kind(rows, from_pack(named.values()))
        tokens, _ = token_input(named)
        requests, counts = rows.asked(named, tokens, self.get_seq_length(), self.batch_size)
        finished = [each for each in requests if each in self.finished]
        if finished:
            raise CacheError(f"request {finished[0]} is finished; pack its tokens under a new number")
        fresh = [each for each in requests if each not in self.ledger]
        try:
            for i, each in enumerate(fresh):
                self.ledger.add(each, i)
            starts = self.ledger.lengths(requests)
            if rows.fit(requests, (starts + np.asarray(counts)).tolist()):
                self._renumber(rows)
            runs = [self.ledger.runs(requests, self.rank, each.window) for each in self.storages]
            places = self.ledger.append(requests, counts)
        except BaseException:
            self._withdraw(rows, fresh)
            raise
        self.rows = rows
        new_rows = torch.from_numpy(rows.starts(requests)[places.request] + places.position)
        own = np.flatnonzero(places.rank == self.rank)
        self._pending = _Pending(requests, starts.tolist(), places, new_rows[own], fresh)
        layout = token_layout(counts, self.sp, scheme, min_shard_length=2)
        indices = index_inputs(layout, self.rank, new_rows)
        indices |= {"new_rows": new_rows, "kept_rows": torch.from_numpy(padded(layout.restore_index.numpy()[own]))}
        new = Extension(self.ledger, self.rank, layout, requests, starts, rows.starts(requests), places.request,
                        new_rows.numpy())  # fmt: skip
        cached, found = new.meet(self.storages, runs, self._query_bytes)
        indices |= {name: torch.from_numpy(each) for name, each in found.items()}
        device = named[tokens].device
        indices = {name: each if "runs" in name else each.to(device) for name, each in indices.items()}
        past = cached != "first"
        for i, held in enumerate(self.storages if past else ()):
            indices |= {f"held_index_{i}": held.index, f"held_valid_{i}": held.valid}
        length = int(starts.max())
        step = Step(
            layout,
            indices,
            promised=rows.packed,
            cached=cached,
            rows=rows.lengths(length + counts[0]),
            held=tuple(self.tensors) if past else (),
            windows=self.windows,
            cache_dtype=self.dtype,
        )
        return step, rows.whole(named, tokens, length, new_rows)

    def commit(self, kept: Kept) -> None:
        """Store the keys and values of the forward that :meth:`begin` began.

        Raises:
            CacheError: layers of it keep other windows than those that the cache has.
        """
        assert self._pending is not None
        pending, others = self._pending, {*self.ledger.requests} - {*self._pending.requests}
        empty = not any(pending.starts) and not any(self.ledger.length(each) for each in others)
        if not empty and self.windows != tuple(kept.windows):
            raise CacheError("layers of this forward keep other windows than those of the cache; make another for it")
        self._pending, self._broken = None, True
        self._query_bytes = kept.query_bytes
        self._store(pending, kept, empty)
        self._broken = False

    def _store(self, pending: _Pending, kept: Kept, empty: bool) -> None:
        assert self.rows is not None
        if empty and (self.batch_size, self.windows) != (kept.tensors[0].shape[0], tuple(kept.windows)):
            self.storages = []
            for window in dict.fromkeys(kept.windows):
                numbers = [i for i, each in enumerate(kept.windows) if each == window]
                self.storages.append(Storage(window, numbers, [kept.tensors[i] for i in numbers], self.dtype))
                self.ledger.shelves.setdefault(window, Shelf(self.sp, self.ledger.page, window))
        self.ledger.settle(pending.requests)
        self._forget([each for each in self.storages if self.ledger.shelves[each.window].released])
        for each in self.storages:
            slots = self.ledger.slots(pending.requests, pending.places, self.rank, each.window)
            each.reserve(int(self.ledger.shelves[each.window].slots[self.rank]), self.ledger.page)
            at = torch.from_numpy(np.flatnonzero(slots >= 0))
            rows, new = pending.rows[at], (at, torch.from_numpy(slots)[at])
            device = each.index.device
            own, where = (part.to(device) for part in new)
            each.write(where, rows.to(device), [kept.tensors[i].index_select(2, own) for i in each.numbers])
        self.rows.remember()

    def rollback(self) -> None:
        """Leave the cache as it was before :meth:`begin`."""
        if self._pending is not None:
            for request, start in zip(self._pending.requests, self._pending.starts, strict=True):
                self.ledger.crop(request, start)
            fresh, self._pending = self._pending.fresh, None
            assert self.rows is not None
            self._withdraw(self.rows, fresh)

    def _withdraw(self, rows: BatchRows | PackedRows, requests: Sequence[int]) -> None:
        """Forget requests that did not come to have a token."""
        for each in requests:
            self.ledger.drop(each)
            if isinstance(rows, PackedRows):
                rows.finish(each)
        if not self.ledger.requests and not (isinstance(rows, PackedRows) and rows.requests):
            self.rows = None

    def _forget(self, storages: Sequence[Storage]) -> None:
        """Empty the slots of tokens that are not there any more."""
        requests = self.ledger.requests
        for each in storages:
            each.keep_only(self.ledger.runs(requests, self.rank, each.window)[:, 1:])
            self.ledger.shelves[each.window].released = False

    def _renumber(self, row: BatchRows | PackedRows) -> None:
        """Say for all tokens that are held anew where in the row they are."""
        for each in self.storages:
            requests, places, slots = self.ledger.kept(self.rank, each.window)
            rows = row.starts(requests)[places.request] + places.position
            each.number(torch.from_numpy(slots), torch.from_numpy(rows))


def sharded(cache: Any) -> ShardedCache:
    """What was passed as ``past_key_values``, which must be one of ours.

    Raises:
        CacheError: another cache.
    """
    if not isinstance(cache, ShardedCache):
        raise CacheError(
            f"past_key_values is a {type(cache).__name__}, whole on every rank; pass sp_compile.ShardedCache(model)"
        )
    return cache
