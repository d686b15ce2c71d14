"""The inputs of the one row, or batch of rows, that a graph sees when a forward goes on from a cache.

The graph is that of a forward over all tokens. What came with earlier ones is kept here, integers only: of activations
nothing but keys and values is needed. A batch ``[B, S]`` is whole as it is. Requests that grow at their own pace have
room of their own in one packed row, so that its length changes seldom::

    row        a0 a1 a2 .  .  .  .  .  | b0 b1 b2 b3 b4 .  .  .  | c0 .  .  .
    segments   0: 8 rows                 1: 8 rows                 2: 4 rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from sp_compile.batch import marked, packed_lengths, packed_numbers
from sp_compile.errors import BatchError, CacheError
from sp_compile.inputs import from_pack, length_of, with_spare_row

ROW = 0  # the one request of a cache for [B, S] batches
ROOM = 64  # rows of a request are multiples of it


class Asked(NamedTuple):
    """What a call asks for: new tokens, ``counts[i]`` of ``requests[i]``."""

    requests: Sequence[int]
    counts: Sequence[int]


class BatchRows:
    """Rows ``[B, S]``, padded on the left or not."""

    packed = False

    def __init__(self) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self._whole: dict[str, torch.Tensor] = {}

    def asked(self, named: Mapping[str, torch.Tensor], tokens: str, past: int, batch: int) -> Asked:
        """The tokens of a call.

        Raises:
            BatchError: inputs that do not fit those of earlier calls.
        """
        rows, new = named[tokens].shape[0], length_of(named[tokens])
        if past and rows != batch:
            raise BatchError(f"{tokens} has {rows} rows, the cache {batch}; pass the batch it was filled with")
        mask = named.get("attention_mask")
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != past + new):
            raise BatchError(
                f"attention_mask has shape {list(mask.shape)}; with {past} tokens in the cache and {new} new "
                f"ones pass [{rows}, {past + new}]"
            )
        self._whole = {
            name: torch.cat([self._earlier(name, each, past), each], dim=1)
            for name, each in named.items()
            if name == tokens or _is_per_token(name, each, new)
        }
        missing = [name for name in self.inputs if name not in (*self._whole, "input_ids", "inputs_embeds")]
        if missing:
            raise BatchError(f"{missing[0]} was passed in earlier calls; pass it for the new tokens too")
        return Asked([ROW], [new])

    def fit(self, requests: Sequence[int], lengths: Sequence[int]) -> bool:
        """Room for requests of these lengths; rows never get other numbers."""
        return False

    def starts(self, requests: Sequence[int]) -> np.ndarray:
        """Numbers of the requests' first tokens in the row, int64 ``[requests]``."""
        return np.zeros(len(requests), dtype=np.int64)

    def lengths(self, longest: int) -> tuple[int, ...]:
        """Rows of each request in the graph's view, where that has so many tokens; code is generated for two."""
        return (max(longest, 2),)

    def whole(self, named: Mapping[str, torch.Tensor], tokens: str, past: int, rows: torch.Tensor) -> dict[str, Any]:
        """The tensors of a call as if earlier tokens came with them."""
        return with_spare_row({**named, **self._whole}, tokens, past)

    def remember(self) -> None:
        """Keep what came with the tokens of the last call."""
        self.inputs = {name: each for name, each in self._whole.items() if not each.is_floating_point()}

    def saved(self, requests: Sequence[int], lengths: Sequence[int]) -> dict[str, torch.Tensor]:
        """What is to be kept on disk."""
        return self.inputs

    def restore(self, inputs: dict[str, torch.Tensor], requests: Sequence[int], lengths: Sequence[int]) -> None:
        """Go on from what :meth:`saved` gave."""
        self.inputs = inputs

    def crop(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        self.inputs = {name: each[:, :length] for name, each in self.inputs.items()}

    def select_rows(self, indices: torch.Tensor, batch: int) -> None:
        """Keep these rows of the batch, in this order."""
        self.inputs = {
            name: each.index_select(0, indices.to(each.device)) if each.shape[0] == batch else each
            for name, each in self.inputs.items()
        }

    def _earlier(self, name: str, new: torch.Tensor, past: int) -> torch.Tensor:
        """What came with the tokens of earlier calls; those themselves are not read where they were embeddings.

        Positions that were not passed are those that a model then takes: every row's from 0 on.
        """
        if name in self.inputs:
            return self.inputs[name]
        if name == "position_ids" and new.dim() == 2:
            return torch.arange(past, dtype=new.dtype, device=new.device).expand(new.shape[0], past)
        if past and name not in ("input_ids", "inputs_embeds"):
            raise BatchError(f"{name} was not passed in earlier calls; pass it in every call or in none")
        return new.new_zeros(new.shape[0], past, *new.shape[2:])


@dataclass
class _Segment:
    size: int
    start: int = 0
    taken: bool = True


class PackedRows:
    """Requests in one packed row, each with room to grow."""

    packed = True

    def __init__(self) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self._segments: list[_Segment] = []
        self._of: dict[int, _Segment] = {}
        self._total = 0

    def asked(self, named: Mapping[str, torch.Tensor], tokens: str, past: int, batch: int) -> Asked:
        """The tokens of a call.

        Raises:
            BatchError: other inputs than a batch from ``pack`` has.
        """
        if not from_pack([named[tokens]]) or tokens != "input_ids":
            raise BatchError("the cache holds packed requests; pass a batch from sp_compile.pack")
        others = [name for name in named if name not in ("input_ids", "position_ids", "logits_to_keep")]
        if others:
            raise BatchError(f"{others[0]} cannot come with packed requests and a cache; pass what pack made")
        lengths = packed_lengths(named[tokens])
        assert lengths is not None
        return Asked(packed_numbers(named[tokens]), lengths)

    def fit(self, requests: Sequence[int], lengths: Sequence[int]) -> bool:
        """Room for requests of these lengths; whether rows have other numbers now."""
        short = [(each, size) for each, size in zip(requests, lengths, strict=True) if self._room(each) < size]
        if not short:
            return False
        before = {request: slice(each.start, each.start + each.size) for request, each in self._of.items()}
        grown = [(request, size) for request, size in short if request in self._of]
        for request, size in grown:
            segment = self._of[request]
            segment.size = max(_rounded(size), 2 * segment.size)
        if grown:
            self._segments = [*self._of.values()]
        while self._segments and not self._segments[-1].taken:
            self._segments.pop()
        for request, size in short:
            if request not in self._of:
                self._of[request] = self._free_segment(_rounded(size))
        self._total = 0
        for segment in self._segments:
            segment.start = self._total
            self._total += segment.size
        self._resize(before)
        return bool(grown)

    @property
    def requests(self) -> list[int]:
        """Numbers of the requests that have room."""
        return [*self._of]

    def starts(self, requests: Sequence[int]) -> np.ndarray:
        """Numbers of the requests' first tokens in the row, int64 ``[requests]``."""
        return np.asarray([self._of[each].start for each in requests], dtype=np.int64)

    def lengths(self, longest: int) -> tuple[int, ...]:
        """Rows of each segment in the graph's view."""
        return tuple(each.size for each in self._segments)

    def whole(self, named: Mapping[str, torch.Tensor], tokens: str, past: int, rows: torch.Tensor) -> dict[str, Any]:
        """The tensors of a call as if earlier tokens came with them; ``rows`` are numbers of the new ones."""
        ids = named[tokens]
        if self.inputs["input_ids"].device != ids.device:
            self.inputs = {name: each.to(ids.device) for name, each in self.inputs.items()}
        rows = rows.to(ids.device)
        self.inputs["input_ids"][0, rows] = ids[0]
        found: dict[str, Any] = {name: self._marked(name) for name in ("input_ids", "position_ids") if name in named}
        keep = named.get("logits_to_keep")
        if keep is not None:
            if keep.dim() != 1 or keep.is_floating_point():
                raise BatchError(f"logits_to_keep has shape {list(keep.shape)}; pass numbers of new tokens [rows]")
            found["logits_to_keep"] = rows[keep]
        return found

    def remember(self) -> None:
        """Keep what came with the tokens of the last call; it is kept already."""

    def saved(self, requests: Sequence[int], lengths: Sequence[int]) -> dict[str, torch.Tensor]:
        """What is to be kept on disk: the tokens of requests one after another."""
        ids, starts = self.inputs["input_ids"][0], self.starts(requests).tolist()
        parts = [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        return {"input_ids": torch.cat(parts)[None]}

    def restore(self, inputs: dict[str, torch.Tensor], requests: Sequence[int], lengths: Sequence[int]) -> None:
        """Go on from what :meth:`saved` gave."""
        self.fit(requests, lengths)
        rows = [torch.arange(length) + start for length, start in zip(lengths, self.starts(requests), strict=True)]
        self.inputs["input_ids"][0, torch.cat(rows)] = inputs["input_ids"][0].cpu()

    def finish(self, request: int) -> None:
        """Give a request's room to others."""
        if request in self._of:
            self._of.pop(request).taken = False

    def _room(self, request: int) -> int:
        return self._of[request].size if request in self._of else 0

    def _free_segment(self, size: int) -> _Segment:
        for each in self._segments:
            if not each.taken and each.size >= size:
                each.taken = True
                return each
        self._segments.append(_Segment(size))
        return self._segments[-1]

    def _resize(self, before: Mapping[int, slice]) -> None:
        """Inputs for the segments of now, with what those of before held."""
        positions = torch.cat([torch.arange(each.size) for each in self._segments])
        ids = torch.zeros(self._total, dtype=torch.int64)
        if self.inputs:
            held = self.inputs["input_ids"][0]
            ids, positions = ids.to(held.device), positions.to(held.device)
            for request, rows in before.items():
                start = self._of[request].start
                ids[start : start + rows.stop - rows.start] = held[rows]
        self.inputs = {"input_ids": ids[None], "position_ids": positions[None]}

    def _marked(self, name: str) -> torch.Tensor:
        return marked(self.inputs[name], self.lengths(0))


def rows_for(named: Mapping[str, torch.Tensor]) -> BatchRows | PackedRows:
    """What a cache that begins with this call keeps of inputs."""
    return PackedRows() if from_pack(named.values()) else BatchRows()


def check_kind(rows: BatchRows | PackedRows, packed: bool) -> None:
    """Check that a cache was filled with packed requests, or with rows, as it is to go on.

    Raises:
        CacheError: rows after packed requests, or the other way round.
    """
    if rows.packed != packed:
        held, given = ("packed requests", "rows [B, S]") if rows.packed else ("rows [B, S]", "packed requests")
        raise CacheError(f"the cache holds {held} and cannot go on with {given}; make another ShardedCache")


def _is_per_token(name: str, each: torch.Tensor, new: int) -> bool:
    """Whether an input has a value for every new token; a 2-D ``attention_mask`` is whole as it comes."""
    return name not in ("attention_mask", "logits_to_keep") and each.dim() in (2, 3) and each.shape[1] == new


def _rounded(size: int) -> int:
    return -(-size // ROOM) * ROOM
