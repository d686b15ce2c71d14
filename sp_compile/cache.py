"""A cache of keys and values that stays spread over the ranks, in the form that transformers expects of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from sp_compile.compiled import Step, index_inputs
from sp_compile.errors import BatchError, CacheError
from sp_compile.layout import TokenLayout, token_layout
from sp_compile.ledger import Ledger, Places

if TYPE_CHECKING:
    from sp_compile.runtime import ParallelModule

ROW = 0  # the one request of a cache for [B, S] batches


@dataclass(frozen=True)
class _Pending:
    """What a running forward adds."""

    requests: Sequence[int]
    starts: Sequence[int]
    slots: torch.Tensor
    rows: torch.Tensor


class ShardedCache(Cache):
    """Keys and values of earlier tokens, each token's on one rank.

    Pass it as ``past_key_values`` to the parallel model, or let ``generate`` make one. It serves one batch of rows
    ``[B, S]``, padded on the left or not; the same tokens of all rows are on one rank.

    Args:
        model: what :func:`sp_compile.parallelize` returned.
        max_tokens: room for so many tokens of each row, taken at the first forward; None lets it grow by pages.
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
        self.tensors: list[torch.Tensor] = []
        self.history: dict[str, torch.Tensor] = {}
        self.held_index = torch.zeros(0, dtype=torch.int64)
        self.held_valid = torch.zeros(0, dtype=torch.bool)
        self._module = model.module
        self._pending: _Pending | None = None
        self._versions: list[int] = []

    # what transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of every row so far."""
        return self.ledger.length(ROW) if ROW in self.ledger else 0

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
        """Keep these rows of the batch, in this order."""
        rows = self.batch_size
        self.tensors = [each.index_select(0, indices.to(each.device)) for each in self.tensors]
        self.history = {
            name: each.index_select(0, indices.to(each.device)) if each.shape[0] == rows else each
            for name, each in self.history.items()
        }
        self._versions = [each._version for each in self.tensors]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of every row.

        Raises:
            CacheError: a positive number, or more tokens than there are.
        """
        length = self.get_seq_length()
        if not -length <= tokens_to_remove <= 0:
            raise CacheError(f"crop({tokens_to_remove}) of a cache of {length} tokens; pass -{length} to 0")
        if tokens_to_remove:
            self._forget([ROW], [length + tokens_to_remove])
            self.history = {name: each[..., : length + tokens_to_remove] for name, each in self.history.items()}

    def reset(self) -> None:
        """Forget everything; a cache with a fixed size keeps its memory."""
        for request in self.ledger.requests:
            self._forget([request], [0])
            self.ledger.drop(request)
        self.history = {}

    # what the parallel model does with it

    @property
    def batch_size(self) -> int:
        """Rows of the batch; 0 before the first forward."""
        return self.tensors[0].shape[0] if self.tensors else 0

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on this rank, free slots included."""
        return sum(each.nbytes for each in self.tensors)

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
        if self._versions != [each._version for each in self.tensors]:
            raise CacheError("the cache's tensors were changed since the last forward; take a copy to edit them")

    def begin(self, requests: Sequence[int], counts: Sequence[int], starts_of_rows: Sequence[int], scheme: str) -> Step:
        """Give places to new tokens, ``counts[i]`` of ``requests[i]``, and say how a forward over them runs.

        Args:
            starts_of_rows: number of each request's first token in the whole graph's row.
            scheme: of the new tokens' layout.

        Raises:
            CacheFullError: there is no room; nothing is changed then.
        """
        assert self._pending is None, "one forward at a time"
        for each in requests:
            if each not in self.ledger:
                self.ledger.add(each)
        starts = [self.ledger.length(each) for each in requests]
        runs = self.ledger.runs(requests, self.rank)
        places = self.ledger.append(requests, counts)
        layout = token_layout(counts, self.sp, scheme, min_shard_length=2)
        new_rows = torch.from_numpy(np.asarray(starts_of_rows, dtype=np.int64)[places.request] + places.position)
        own = torch.from_numpy(np.flatnonzero(places.rank == self.rank))
        device = self.held_index.device
        self._pending = _Pending(
            requests, starts, torch.from_numpy(places.slot)[own].to(device), new_rows[own].to(device)
        )
        indices = index_inputs(layout, self.rank, new_rows)
        indices |= {"new_rows": new_rows, "kept_rows": _at_least_two(layout.restore_index[own])}
        indices = {name: each.to(device) for name, each in indices.items()}
        if not any(starts):
            return Step(layout, indices, False, cached="first")
        indices |= {
            "held_index": self.held_index,
            "held_valid": self.held_valid,
            "held_runs": torch.from_numpy(_crossed(layout, places, runs)),
        }
        return Step(layout, indices, False, cached="more", held=tuple(self.tensors), cache_dtype=self.dtype)

    def commit(self, kept: Sequence[torch.Tensor]) -> None:
        """Store the keys and values of the forward that :meth:`begin` began."""
        pending = self._pending
        assert pending is not None
        self._grow(kept)
        for tensor, each in zip(self.tensors, kept, strict=True):
            new = each[:, :, : len(pending.slots)].to(tensor.dtype)
            if tensor.element_size() == 1:  # torch has no index_copy_ for fp8
                tensor, new = tensor.view(torch.uint8), new.view(torch.uint8)
            tensor.index_copy_(2, pending.slots, new)
        self.held_index[pending.slots] = pending.rows
        self.held_valid[pending.slots] = True
        self._versions = [each._version for each in self.tensors]
        self._pending = None

    def rollback(self) -> None:
        """Leave the cache as it was before :meth:`begin`."""
        if self._pending is not None:
            for request, start in zip(self._pending.requests, self._pending.starts, strict=True):
                self.ledger.crop(request, start)
            self._pending = None

    def whole_rows(self, named: Mapping[str, torch.Tensor], tokens: str) -> dict[str, torch.Tensor]:
        """The inputs of a ``[B, S]`` batch as if earlier tokens came with them, and what :meth:`remember` then stores.

        Args:
            named: the tensors of the call by name.
            tokens: the name of the one that holds the tokens.

        Raises:
            BatchError: inputs that do not fit those of earlier calls.
        """
        past = self.get_seq_length()
        new, rows = named[tokens].shape[1], named[tokens].shape[0]
        if past and rows != self.batch_size:
            raise BatchError(
                f"{tokens} has {rows} rows, the cache {self.batch_size}; pass the batch it was filled with"
            )
        whole = {}
        for name, each in named.items():
            if name == "attention_mask":
                if each.dim() != 2 or each.shape[1] != past + new:
                    raise BatchError(
                        f"attention_mask has shape {list(each.shape)}; with {past} tokens in the cache and {new} new "
                        f"ones pass [{rows}, {past + new}]"
                    )
                whole[name] = each
            elif name == tokens or (each.dim() in (2, 3) and each.shape[1] == new and name != "logits_to_keep"):
                whole[name] = torch.cat([self._earlier(name, each, past), each], dim=1)
        missing = [name for name in self.history if name not in whole and name not in ("input_ids", "inputs_embeds")]
        if missing:
            raise BatchError(f"{missing[0]} was passed in earlier calls; pass it for the new tokens too")
        return whole

    def remember(self, whole: Mapping[str, torch.Tensor]) -> None:
        """Keep the integers of all tokens for the next call."""
        self.history = {
            name: each for name, each in whole.items() if name != "attention_mask" and not each.is_floating_point()
        }

    def _earlier(self, name: str, new: torch.Tensor, past: int) -> torch.Tensor:
        """What came with the tokens of earlier calls; nothing reads the tokens themselves any more."""
        if name in self.history:
            return self.history[name]
        if past and name not in ("input_ids", "inputs_embeds"):
            raise BatchError(f"{name} was not passed in earlier calls; pass it in every call or in none")
        return new.new_zeros(new.shape[0], past, *new.shape[2:])

    def _forget(self, requests: Sequence[int], lengths: Sequence[int]) -> None:
        counts = [self.ledger.length(request) - length for request, length in zip(requests, lengths, strict=True)]
        gone = self.ledger.place(requests, lengths, counts)
        slots = torch.from_numpy(gone.slot[gone.rank == self.rank]).to(self.held_valid.device)
        self.held_valid[slots], self.held_index[slots] = False, 0  # a number of a row that there is
        for request, length in zip(requests, lengths, strict=True):
            self.ledger.crop(request, length)

    def _grow(self, kept: Sequence[torch.Tensor]) -> None:
        """Memory for all slots that the ledger has given out."""
        slots = max(int(self.ledger.slots[self.rank]), self.ledger.page)
        if not self.tensors:
            self.tensors = [
                each.new_zeros(*each.shape[:2], 0, each.shape[3], dtype=self.dtype or each.dtype) for each in kept
            ]
            device = kept[0].device
            self.held_index, self.held_valid = self.held_index.to(device), self.held_valid.to(device)
        if slots > len(self.held_index):
            self.tensors = [_extended(each, slots, 2) for each in self.tensors]
            self.held_index, self.held_valid = (
                _extended(each, slots, 0) for each in (self.held_index, self.held_valid)
            )


def _extended(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    longer = tensor.new_zeros(shape)
    longer.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return longer


def _at_least_two(rows: torch.Tensor) -> torch.Tensor:
    """Code is generated for any number of rows from 2 on; what is too much is not stored."""
    return torch.cat([rows, rows.new_zeros(2 - len(rows))]) if len(rows) < 2 else rows


def _crossed(layout: TokenLayout, places: Places, runs: np.ndarray) -> np.ndarray:
    """Ranges of gathered queries by ranges of held keys of the same request, int64 ``[ranges, 4]``, at least two.

    ``runs`` are those of :meth:`Ledger.runs`, ordered by request.
    """
    at = np.flatnonzero(layout.valid.numpy().reshape(-1))
    request = places.request[layout.local_index.numpy().reshape(-1)[at]]
    edges = np.flatnonzero((np.diff(at) != 1) | (np.diff(request) != 0)) + 1
    first, last = np.concatenate([[0], edges]), np.concatenate([edges, [len(at)]]) - 1
    queries = np.stack([at[first], at[last] + 1], axis=1)
    low, high = (np.searchsorted(runs[:, 0], request[first], side) for side in ("left", "right"))
    counts = high - low
    which = np.repeat(np.arange(len(queries)), counts)
    keys = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
    crossed = np.concatenate([queries[which], runs[keys, 1:]], axis=1)
    return np.concatenate([crossed, np.zeros((max(0, 2 - len(crossed)), 4), dtype=np.int64)])


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
