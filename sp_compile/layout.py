"""Token layouts: which rank holds which rows of a ragged batch.

Three requests of 5, 3 and 1 tokens over two ranks, contiguous scheme (``a0`` is token 0 of request a)::

    normal       a0 a1 a2 a3 a4 b0 b1 b2 c0
    SP           a0 a1 a2 b0 b1 c0 | a3 a4 b2
    padded SP    a0 a1 a2 b0 b1 c0 | a3 a4 b2 .  .  .        shard_length = 6

Each rank is padded once, at its end, to the longest rank, so that collectives of equal shapes apply. The zigzag
scheme cuts every request into ``2 * sp`` blocks and gives rank r the blocks r and ``2 * sp - 1 - r``, which spreads
causal attention evenly; request of 8 tokens over two ranks::

    blocks       0     1     2     3
    rank 0       x0 x1             x6 x7
    rank 1             x2 x3 x4 x5

A scheme only says how a request is cut; everything downstream sees the index tensors of :class:`TokenLayout`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from sp_compile.errors import BatchError, ConfigError, nearest
from sp_compile.lasting import lasting


def _cut(lengths: np.ndarray, blocks: int, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and size of ``block`` of each request cut into ``blocks`` parts, the first parts carrying the remainder."""
    base, rest = np.divmod(lengths, blocks)
    block = block[:, :, None]  # requests last: numpy is slow along a short last dim
    starts, sizes = base * block + np.minimum(rest, block), base + (block < rest)
    return np.ascontiguousarray(starts.transpose(0, 2, 1)), np.ascontiguousarray(sizes.transpose(0, 2, 1))


def contiguous(lengths: np.ndarray, sp: int) -> tuple[np.ndarray, np.ndarray]:
    """Rank r holds one run of ``L // sp + (r < L % sp)`` tokens of every request.

    Returns starts (within the request) and sizes, ``[sp, requests, 1]`` in the dtype of ``lengths``.
    """
    return _cut(lengths, sp, np.arange(sp, dtype=lengths.dtype)[:, None])


def zigzag(lengths: np.ndarray, sp: int) -> tuple[np.ndarray, np.ndarray]:
    """Rank r holds blocks r and ``2 * sp - 1 - r`` of ``2 * sp``, as in zigzag ring attention.

    Returns starts (within the request) and sizes, ``[sp, requests, 2]`` in the dtype of ``lengths``.
    """
    rank = np.arange(sp, dtype=lengths.dtype)
    return _cut(lengths, 2 * sp, np.stack([rank, 2 * sp - 1 - rank], axis=1))


SHORT = 0.5  # a request with less than this share of a rank's work stays whole
CHUNKS = 64  # that each rank gets at least, where a batch is cut into chunks: fewer leave ranks uneven
LONGEST_CHUNK = 512  # tokens: longer ones only where there would be more than all ranks' CHUNKS


def areas(lengths: np.ndarray) -> np.ndarray:
    """Pairs of query and key that a causal mask leaves of requests, int64."""
    wide = lengths.astype(np.int64)
    area: np.ndarray = wide * (wide + 1) // 2
    return area


def whole(lengths: np.ndarray, sp: int) -> tuple[np.ndarray, np.ndarray]:
    """Short requests whole on one rank, longer ones as :func:`zigzag`.

    Short ones go, largest area first, to the rank with the least area so far (longest processing time first). Where
    all are short, nothing needs to be exchanged.

    Returns starts (within the request) and sizes, ``[sp, requests, 2]`` in the dtype of ``lengths``.
    """
    area = areas(lengths)
    (short,) = np.nonzero(area <= SHORT * area.sum() / sp)
    starts, sizes = zigzag(lengths, sp)
    starts[:, short], sizes[:, short] = 0, 0
    sizes[least_loaded(area[short], sp), short, 0] = lengths[short]
    return starts, sizes


def least_loaded(area: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each item, int64 ``[items]``: largest first, each to the one with the least area so far."""
    found, load = np.empty(len(area), dtype=np.int64), np.zeros(bins, dtype=np.int64)
    for item in _largest_first(area, len(area)):
        found[item] = load.argmin()
        load[found[item]] += area[item]
    return found


def chunked(lengths: np.ndarray, sp: int) -> tuple[np.ndarray, np.ndarray]:
    """Requests in chunks, which go, largest area first, to the rank with the least area and room for another.

    No rank gets more than its share of the chunks, rounded up. Source: the dispatch solver of MagiAttention.

    Returns starts (within the request) and sizes, ``[sp, requests, chunks]`` in the dtype of ``lengths``.
    """
    size = chunk_size(lengths, sp)
    counts = -(-lengths.astype(np.int64) // size)
    request = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = number * size
    tokens = np.minimum(size, lengths[request] - first)
    area = areas(first + tokens) - areas(first)
    rank = _dealt(area, sp, -(-len(area) // sp))
    order = np.lexsort((number, request, rank))
    rank, request, first, tokens = (each[order] for each in (rank, request, first, tokens))
    group = rank * len(lengths) + request
    begins = np.flatnonzero(np.append(True, np.diff(group) != 0))
    place = np.arange(len(group)) - np.repeat(begins, np.diff(np.append(begins, len(group))))
    shape = sp, len(lengths), int(place.max()) + 1
    starts, sizes = np.zeros(shape, dtype=lengths.dtype), np.zeros(shape, dtype=lengths.dtype)
    starts[rank, request, place], sizes[rank, request, place] = first, tokens
    return starts, sizes


def chunk_size(lengths: np.ndarray, sp: int) -> int:
    """Tokens of a chunk: so many that every rank gets enough chunks, in a power of two."""
    wanted = max(1, int(lengths.sum(dtype=np.int64)) // (sp * CHUNKS))
    return int(min(LONGEST_CHUNK, 1 << (wanted.bit_length() - 1)))


def _largest_first(area: np.ndarray, count: int) -> list[int]:
    return np.argsort(-area, kind="stable")[:count].tolist()  # type: ignore[no-any-return]


def _dealt(area: np.ndarray, sp: int, most: int) -> np.ndarray:
    """The rank of each chunk, at most so many for each."""
    rank = np.empty(len(area), dtype=np.int64)
    load = [(0, each, 0) for each in range(sp)]  # area, rank, chunks
    for chunk in _largest_first(area, len(area)):
        least, each, chunks = heapq.heappop(load)
        rank[chunk] = each
        if chunks + 1 < most:
            heapq.heappush(load, (least + int(area[chunk]), each, chunks + 1))
    return rank


Scheme = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
SCHEMES: dict[str, Scheme] = {"contiguous": contiguous, "zigzag": zigzag, "whole": whole, "chunked": chunked}
AUTO = ("whole", "zigzag", "chunked")  # the one that exchanges least first
PAIRS_PER_FEATURE = 6  # 24 D^2 operations a token and layer around attention, 4 D a pair of query and key
AS_GOOD = 1.02  # of the best makespan


def choose_scheme(lengths: Sequence[int], sp: int, pairs_per_token: float) -> str:
    """The scheme whose slowest rank is predicted to be fastest; of those that are as good the one that exchanges least.

    Args:
        lengths: tokens of each request.
        pairs_per_token: pairs of query and key whose attention takes as long as everything else for a token.

    >>> choose_scheme([100] * 64, 8, 4096.0), choose_scheme([5000, 4000, 300], 2, 4096.0)
    ('whole', 'zigzag')
    """
    spans = {each: makespan(token_layout(lengths, sp, each), pairs_per_token) for each in AUTO}
    best = min(spans.values())
    return next(each for each in AUTO if spans[each] <= AS_GOOD * best)


@lru_cache(maxsize=64)
def makespan(layout: TokenLayout, pairs_per_token: float) -> float:
    """What the slowest rank does, in pairs of query and key under a causal mask."""
    lengths = np.asarray(layout.lengths)
    seen = np.arange(1, layout.tokens + 1) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    area = (seen[layout.local_index.numpy()] * layout.valid.numpy()).sum(axis=1)
    return float((area + pairs_per_token * np.asarray(layout.tokens_per_rank)).max())


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Who holds which rows, as index tensors on the host.

    Attributes:
        lengths: tokens of each request, in batch order.
        sp: number of ranks.
        scheme: name of the scheme that made it.
        shard_length: rows of every rank, padding included.
        local_index: int64 ``[sp, shard_length]``, the normal-order row of each local row; 0 on padding.
        valid: bool ``[sp, shard_length]``, False on padding.
        restore_index: int64 ``[tokens]``, the padded-SP row of each normal-order row.
        tokens_per_rank: rows of each rank without padding.
    """

    lengths: tuple[int, ...]
    sp: int
    scheme: str
    shard_length: int
    local_index: torch.Tensor
    valid: torch.Tensor
    restore_index: torch.Tensor
    tokens_per_rank: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the whole batch."""
        return self.restore_index.numel()


def token_layout(lengths: Sequence[int], sp: int, scheme: str = "zigzag", min_shard_length: int = 1) -> TokenLayout:
    """Lay requests of the given lengths out over ``sp`` ranks; cached by its arguments.

    Args:
        lengths: tokens of each request, each at least 1.
        sp: number of ranks, at least 1.
        scheme: a key of :data:`SCHEMES`.
        min_shard_length: pad every rank to at least this many rows.

    Raises:
        BatchError: no request, or a request without tokens.
        ConfigError: an unknown scheme.

    >>> token_layout([5, 3, 1], sp=2, scheme="contiguous").local_index.tolist()
    [[0, 1, 2, 5, 6, 8], [3, 4, 7, 0, 0, 0]]
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"unknown layout scheme {scheme!r}{nearest(scheme, SCHEMES)}")
    if sp < 1:
        raise ConfigError(f"sp={sp} ranks cannot hold a layout; pass sp >= 1")
    if len(lengths) == 0:
        raise BatchError("the batch holds no request; pass at least one")
    empty = [i for i, length in enumerate(lengths) if length < 1]
    if empty:
        raise BatchError(f"request {empty[0]} has length {lengths[empty[0]]}; every request needs at least 1 token")
    return _build(tuple(int(length) for length in lengths), sp, scheme, min_shard_length)


@lru_cache(maxsize=64)
@lasting
def _build(lengths: tuple[int, ...], sp: int, scheme: str, min_shard_length: int) -> TokenLayout:
    total = sum(lengths)
    narrow: Any = np.int32 if total < 2**31 else np.int64  # there are up to 2 * sp * requests blocks
    sizes_of = np.asarray(lengths, dtype=narrow)
    starts, sizes = SCHEMES[scheme](sizes_of, sp)
    starts += (np.cumsum(sizes_of, dtype=narrow) - sizes_of)[None, :, None]
    per_rank = sizes.sum(axis=(1, 2), dtype=np.int64)
    shard_length = max(int(per_rank.max()), min_shard_length)

    held = sizes.reshape(-1) > 0
    block_sizes, block_starts = sizes.reshape(-1)[held], starts.reshape(-1)[held]
    shifts = block_starts - np.cumsum(block_sizes, dtype=narrow) + block_sizes
    rows = np.arange(total, dtype=narrow) + np.repeat(shifts, block_sizes)

    valid = np.arange(shard_length) < per_rank[:, None]
    local_index = np.zeros((sp, shard_length), dtype=np.int64)
    restore_index = np.empty(total, dtype=np.int64)
    local_index[valid] = rows
    restore_index[rows] = np.flatnonzero(valid)
    return TokenLayout(
        lengths=lengths,
        sp=sp,
        scheme=scheme,
        shard_length=shard_length,
        local_index=torch.from_numpy(local_index),
        valid=torch.from_numpy(valid),
        restore_index=torch.from_numpy(restore_index),
        tokens_per_rank=tuple(int(count) for count in per_rank),
    )
