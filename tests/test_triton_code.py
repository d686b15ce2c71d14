"""The Triton code that Inductor makes for GPUs, interpreted on a CPU: what models run there, without one at hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.card import CardPool, absent
from tests.on_device import PADDED, SINGLE, check_kernel, flex_step, generate, of_lower_precision

pytestmark = pytest.mark.skipif(absent() is not None, reason=str(absent()))
LENGTHS = (21, 150, 3)


@pytest.fixture(scope="module")
def card() -> Iterator[CardPool]:
    """One rank."""
    pool = CardPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def cards() -> Iterator[CardPool]:
    """Two ranks."""
    pool = CardPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize(("kinds", "dtype"), [(SINGLE, torch.float32), (PADDED, torch.float16)])
def test_attention_of_every_kind(card: CardPool, kinds: list[str], dtype: torch.dtype):
    assert card.run(check_kernel, "cpu", kinds, dtype, "flex", lengths=LENGTHS) == [{"flex"}]


def test_ranks_without_tokens_of_their_own(cards: CardPool):
    for used in cards.run(check_kernel, "cpu", ["sinks"], torch.float32, "flex", None, lengths=(130,)):
        assert used == {"flex"}


def test_greedy_generation_with_a_cache_whose_keys_are_split(card: CardPool):
    ((worst, used),) = card.run(generate, "cpu", "inductor", 2, (3, 160))
    assert worst <= 1e-5
    assert used == {"flex"}


def test_a_cache_of_another_dtype_than_the_model(card: CardPool):
    ((half, eighth, used),) = card.run(of_lower_precision, "cpu", sp=1)
    assert used == {"flex"}
    assert 1e-6 < half < 2e-2
    assert half < eighth < 0.3


@pytest.mark.parametrize(("name", "attention"), [("Llama", "allgather_kv"), ("Gemma2", "ulysses"), ("Mistral", "ring")])
def test_gradients(cards: CardPool, name: str, attention: str):
    for apart, used in cards.run(flex_step, "cpu", name, [(1, 57)], attention=attention):
        assert apart <= 1e-4
        assert used == {"flex"}


def test_gradients_of_one_rank(card: CardPool):
    ((apart, used),) = card.run(flex_step, "cpu", "Llama", [(1, 57)], sp=1)
    assert apart <= 1e-4
    assert used == {"flex"}
