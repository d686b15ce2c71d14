"""Ranks for the tests that need them, shared by all that need as many."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict[int, RankPool]]:
    pools: dict[int, RankPool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def ranks(_pools: dict[int, RankPool]) -> Callable[[int], RankPool]:
    """``ranks(sp)`` is a pool of ``sp`` ranks."""

    def pool(sp: int) -> RankPool:
        for other, each in _pools.items():
            if other != sp and min(sp, other) > 2:
                each.close()  # many ranks take much memory
        return _pools.setdefault(sp, RankPool(sp))

    return pool
