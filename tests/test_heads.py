"""Every query head is computed once, beside the key/value head that it reads."""

from __future__ import annotations

import doctest

import pytest

from sp_compile import heads as module
from sp_compile.heads import head_lists


@pytest.mark.parametrize("sp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 3), (5, 1), (4, 4), (32, 8), (7, 7), (2, 1)])
def test_ranks_have_what_their_queries_read(heads: int, kv_heads: int, sp: int):
    queries, keys = head_lists(heads, kv_heads, sp)
    assert [each for rank in queries for each in rank][:heads] == [*range(heads)]
    assert len({*map(len, queries)}) == len({*map(len, keys)}) == 1
    own, read = len(queries[0]), len(keys[0])
    assert own == -(-heads // sp)
    assert own % read == 0  # so that kernels see grouped heads
    for rank in range(sp):
        for i, head in enumerate(queries[rank]):
            assert keys[rank][i * read // own] == head // (heads // kv_heads)


def test_each_key_head_is_sent_once_where_as_many_queries_read_each():
    assert head_lists(8, 2, 2).keys == ((0,), (1,))
    assert head_lists(32, 8, 4).keys[3] == (6, 7)
    assert head_lists(6, 3, 2).keys == ((0, 0, 1), (1, 2, 2))  # two read the first, one the second


def test_the_docstring():
    assert doctest.testmod(module).failed == 0
