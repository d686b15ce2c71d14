"""Which attention heads each rank computes when heads are spread over the ranks instead of tokens.

Query heads are cut into equal runs, one a rank; where their number does not divide, the last ones are repeated and what
is computed for the copies is dropped. Of the key/value heads a rank gets those that its query heads read: each once
where the same number of query heads reads each, else one for every query head. Fewer key/value heads than ranks are
thus replicated. Source: DeepSpeed Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

from typing import NamedTuple

Lists = tuple[tuple[int, ...], ...]


class HeadLists(NamedTuple):
    """Heads of each rank, as many for each.

    Attributes:
        queries, keys: numbers of query heads, and of key/value heads, in the order in which a rank has them.
    """

    queries: Lists
    keys: Lists


def head_lists(heads: int, kv_heads: int, sp: int) -> HeadLists:
    """The heads of every rank.

    >>> head_lists(8, 2, 4).keys
    ((0,), (0,), (1,), (1,))
    >>> head_lists(5, 1, 2).queries
    ((0, 1, 2), (3, 4, 4))
    """
    group, own = heads // kv_heads, -(-heads // sp)
    queries = tuple(tuple(min(rank * own + i, heads - 1) for i in range(own)) for rank in range(sp))
    read = [[head // group for head in each] for each in queries]
    distinct = [[*dict.fromkeys(each)] for each in read]
    size = len(distinct[0])
    even = own % size == 0 and all(
        len(each) == size and wanted == [each[i * size // own] for i in range(own)]
        for each, wanted in zip(distinct, read, strict=True)
    )
    return HeadLists(queries, tuple(map(tuple, distinct if even else read)))
