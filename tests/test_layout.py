"""Token layouts: who holds which rows, for any lengths and any number of ranks."""

from __future__ import annotations

import doctest
import importlib
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sp_compile.errors import BatchError, ConfigError
from sp_compile.layout import SCHEMES, TokenLayout, choose_scheme, chunk_size, token_layout

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=20)
RANKS = st.integers(1, 17)
LAYOUTS = st.builds(token_layout, LENGTHS, RANKS, st.sampled_from(sorted(SCHEMES)))
properties = settings(max_examples=150, deadline=None)


def block(length: int, blocks: int, number: int) -> range:
    """Tokens of one block of a request, the first blocks carrying the remainder, said without array arithmetic."""
    sizes = [length // blocks + (each < length % blocks) for each in range(blocks)]
    return range(sum(sizes[:number]), sum(sizes[: number + 1]))


def runs(layout: TokenLayout, rank: int) -> list[list[int]]:
    """The normal-order rows of the rank, block after block; empty blocks are left out."""
    found, offset = [], 0
    for length in layout.lengths:
        if layout.scheme == "contiguous":
            blocks = [block(length, layout.sp, rank)]
        else:
            blocks = [block(length, 2 * layout.sp, each) for each in (rank, 2 * layout.sp - 1 - rank)]
        found += [[offset + token for token in each] for each in blocks if len(each)]
        offset += length
    return found


def held(layout: TokenLayout, rank: int) -> list[int]:
    return layout.local_index[rank][layout.valid[rank]].tolist()


def drawn(layout: TokenLayout) -> list[str]:
    """The ranks' rows as in the docstrings: request a, b, ... and the token's number."""
    names = [f"{chr(97 + i)}{token}" for i, length in enumerate(layout.lengths) for token in range(length)]
    return [
        " ".join(names[row] if valid else "." for row, valid in zip(rows.tolist(), flags.tolist(), strict=True))
        for rows, flags in zip(layout.local_index, layout.valid, strict=True)
    ]


@properties
@given(LAYOUTS)
def test_every_token_is_owned_by_exactly_one_rank(layout: TokenLayout):
    assert sorted(layout.local_index[layout.valid].tolist()) == list(range(sum(layout.lengths)))
    assert layout.tokens == sum(layout.lengths)


@properties
@given(LENGTHS, RANKS, st.sampled_from(["contiguous", "zigzag"]))
def test_a_rank_holds_its_blocks_of_every_request_in_batch_order(lengths: list[int], sp: int, scheme: str):
    layout = token_layout(lengths, sp, scheme)
    for rank in range(layout.sp):
        assert held(layout, rank) == list(chain(*runs(layout, rank)))
        assert layout.tokens_per_rank[rank] == len(held(layout, rank))


@properties
@given(LAYOUTS)
def test_restoring_what_the_ranks_gathered_gives_normal_order(layout: TokenLayout):
    tokens = torch.randn(layout.tokens)
    gathered = torch.cat([tokens[rows] for rows in layout.local_index])
    assert torch.equal(gathered[layout.restore_index], tokens)
    assert bool(layout.valid.reshape(-1)[layout.restore_index].all())


@properties
@given(LENGTHS, RANKS, st.sampled_from(sorted(SCHEMES)), st.integers(1, 400))
def test_ranks_are_padded_at_their_end_to_the_longest(lengths: list[int], sp: int, scheme: str, least: int):
    layout = token_layout(lengths, sp, scheme, min_shard_length=least)
    assert layout.shard_length == max(least, *layout.tokens_per_rank)
    assert layout.local_index.shape == layout.valid.shape == (sp, layout.shard_length)
    for rank, count in enumerate(layout.tokens_per_rank):
        assert layout.valid[rank].tolist() == [True] * count + [False] * (layout.shard_length - count)
        assert layout.local_index[rank, count:].tolist() == [0] * (layout.shard_length - count)


@properties
@given(st.integers(1, 300), RANKS)
def test_contiguous_ranks_hold_the_quotient_and_the_first_the_remainder(length: int, sp: int):
    layout = token_layout([length], sp, "contiguous")
    for rank in range(sp):
        start = (length // sp) * rank + min(length % sp, rank)
        count = length // sp + (rank < length % sp)
        assert held(layout, rank) == list(range(start, start + count))


@pytest.mark.parametrize("sp", [2, 3, 8])
@pytest.mark.parametrize("length", [4096, 6001])
def test_zigzag_spreads_causal_attention_evenly_and_contiguous_does_not(length: int, sp: int):
    def imbalance(scheme: str) -> float:
        layout = token_layout([length], sp, scheme)
        areas = [sum(row + 1 for row in held(layout, rank)) for rank in range(sp)]
        return max(areas) / (sum(areas) / sp)

    assert imbalance("zigzag") <= 1.01
    assert imbalance("contiguous") > 1.4


@properties
@given(LENGTHS, RANKS)
def test_short_requests_are_whole_on_a_rank_and_long_ones_in_zigzag(lengths: list[int], sp: int):
    layout, zigzag = token_layout(lengths, sp, "whole"), token_layout(lengths, sp, "zigzag")
    areas, start = [each * (each + 1) // 2 for each in lengths], 0
    for length, area in zip(lengths, areas, strict=True):
        rows = {*range(start, start + length)}
        parts = [rows & {*held(layout, rank)} for rank in range(sp)]
        if area <= 0.5 * sum(areas) / sp:
            assert [len(each) for each in parts if each] == [length]
        else:
            assert parts == [rows & {*held(zigzag, rank)} for rank in range(sp)]
        start += length


@properties
@given(LENGTHS, RANKS)
def test_chunks_are_spread_evenly_and_each_is_on_one_rank(lengths: list[int], sp: int):
    layout = token_layout(lengths, sp, "chunked")
    size = chunk_size(np.asarray(lengths), sp)
    chunks = [
        range(start + at, start + min(at + size, length))
        for start, length in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False)
        for at in range(0, length, size)
    ]
    owner = {row: rank for rank in range(sp) for row in held(layout, rank)}
    holders = [{owner[row] for row in chunk} for chunk in chunks]
    assert all(len(each) == 1 for each in holders)
    counts = Counter(rank for each in holders for rank in each)
    assert max(counts.values()) <= -(-len(chunks) // sp)
    assert all(held(layout, rank) == sorted(held(layout, rank)) for rank in range(sp))


def mixes() -> dict[str, list[int]]:
    """Requests like those that servers see: of all lengths, one long among short ones, and short ones."""
    generator = np.random.default_rng(0)
    return {
        "of all lengths": np.exp(generator.uniform(np.log(128), np.log(16384), 8)).astype(int).tolist(),
        "one long": [24576, *generator.integers(8, 260, 63).tolist()],
        "short": generator.integers(8, 513, 64).tolist(),
    }


@pytest.mark.parametrize("mix", mixes())
@pytest.mark.parametrize("pairs_per_token", [512.0, 4096.0, 24576.0])
def test_the_chosen_scheme_balances_attention_and_tokens(mix: str, pairs_per_token: float):
    lengths = mixes()[mix]
    layout = token_layout(lengths, 8, choose_scheme(lengths, 8, pairs_per_token))
    seen = np.concatenate([np.arange(1, length + 1) for length in lengths])
    areas = [int(seen[held(layout, rank)].sum()) for rank in range(8)]
    assert max(areas) <= 1.05 * np.mean(areas)
    assert max(layout.tokens_per_rank) <= 1.25 * np.mean(layout.tokens_per_rank)


def test_the_three_requests_of_the_docstring():
    layout = token_layout([5, 3, 1], sp=2, scheme="contiguous")
    assert drawn(layout) == ["a0 a1 a2 b0 b1 c0", "a3 a4 b2 . . ."]
    assert layout.restore_index.tolist() == [0, 1, 2, 6, 7, 3, 4, 8, 5]
    assert (layout.shard_length, layout.tokens_per_rank, layout.tokens) == (6, (6, 3), 9)


def test_the_zigzag_request_of_the_docstring():
    layout = token_layout([8], sp=2)
    assert drawn(layout) == ["a0 a1 a6 a7", "a2 a3 a4 a5"]


def test_requests_shorter_than_the_ranks_leave_some_without_a_token():
    contiguous = token_layout([1, 2, 5], sp=4, scheme="contiguous")
    assert drawn(contiguous) == ["a0 b0 c0 c1", "b1 c2 . .", "c3 . . .", "c4 . . ."]
    assert drawn(token_layout([1, 2], sp=3)) == ["a0 b0", "b1 .", ". ."]


def test_the_same_lengths_give_the_same_object():
    layout = token_layout([7, 9], 2)
    assert token_layout((7, 9), sp=2, scheme="zigzag") is layout
    assert token_layout(torch.tensor([7, 9]), 2) is layout
    others = [
        token_layout([9, 7], 2),
        token_layout([7, 9], 3),
        token_layout([7, 9], 2, "contiguous"),
        token_layout([7, 9], 2, min_shard_length=20),
    ]
    assert layout not in others
    assert layout.lengths == (7, 9)


@pytest.mark.parametrize(
    ("lengths", "sp", "scheme", "error", "message"),
    [
        ([], 2, "zigzag", BatchError, r"^the batch holds no request; pass at least one$"),
        ([4, 0, 3], 2, "zigzag", BatchError, r"^request 1 has length 0; every request needs at least 1 token$"),
        ([4, 3, -2], 2, "zigzag", BatchError, r"^request 2 has length -2;"),
        ([4], 0, "zigzag", ConfigError, r"^sp=0 ranks cannot hold a layout; pass sp >= 1$"),
        ([4], 2, "zigzack", ConfigError, r"^unknown layout scheme 'zigzack'; did you mean 'zigzag'\?$"),
        ([4], 2, "ring", ConfigError, r"^unknown layout scheme 'ring'; known: chunked, contiguous, whole, zigzag$"),
    ],
)
def test_mistakes_are_told(lengths: list[int], sp: int, scheme: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        token_layout(lengths, sp, scheme)


@pytest.mark.parametrize("module", ["layout", "batch", "capture", "score_rule"])
def test_the_examples_of_the_docstrings_run(module: str):
    result = doctest.testmod(importlib.import_module(f"sp_compile.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
