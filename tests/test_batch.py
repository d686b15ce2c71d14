"""Batches: requests go into one row and come back out of it, and position ids tell where each begins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sp_compile.batch import pack, request_lengths
from sp_compile.errors import BatchError

REQUESTS = st.lists(st.lists(st.integers(0, 50_000), min_size=1, max_size=12), min_size=1, max_size=8)
properties = settings(max_examples=100, deadline=None)


def test_requests_are_packed_into_one_row():
    batch = pack([[5, 6, 7], torch.tensor([8], dtype=torch.int32), [9, 10]])
    assert set(batch) == {"input_ids", "position_ids"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert {each.dtype for each in batch.values()} == {torch.int64}
    assert batch.lengths == (3, 1, 2)


def test_ids_of_any_integer_type_become_int64():
    for dtype in (torch.uint8, torch.int32):
        assert pack([torch.tensor([1, 2], dtype=dtype)])["input_ids"].dtype == torch.int64


def test_a_batch_is_what_a_model_is_called_with():
    def forward(input_ids, position_ids):
        return input_ids * 100 + position_ids

    assert forward(**pack([[1, 2], [3]])).tolist() == [[100, 201, 300]]
    assert len(pack([[1]])) == 2


def test_packed_tensors_live_where_the_first_request_does_or_where_asked():
    near, far = torch.tensor([1, 2]), torch.tensor([3], device="meta")
    assert {each.device.type for each in pack([far, near]).values()} == {"meta"}
    assert {each.device.type for each in pack([near, near], device="meta").values()} == {"meta"}
    assert {each.device.type for each in pack([near, [3]]).values()} == {"cpu"}


@properties
@given(REQUESTS)
def test_splitting_gives_the_requests_back(requests: list[list[int]]):
    batch = pack(requests)
    assert [each.tolist() for each in batch.split(batch["input_ids"][0], dim=0)] == requests
    assert request_lengths(batch["position_ids"]) == batch.lengths == tuple(map(len, requests))
    logits = torch.randn(1, sum(batch.lengths), 3)
    parts = batch.split(logits)
    assert [part.shape[1] for part in parts] == list(batch.lengths)
    assert torch.equal(torch.cat(parts, dim=1), logits)


def test_an_output_of_other_rows_cannot_be_split():
    batch = pack([[1, 2], [3]])
    with pytest.raises(BatchError, match=r"^dim 1 of a tensor of shape \[1, 2, 3\] has 2 rows, the batch has 3 tokens"):
        batch.split(torch.zeros(1, 2, 3))
    assert [each.shape[2] for each in batch.split(torch.zeros(1, 2, 3), dim=2)] == [2, 1]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], r"^the batch holds no request; pass at least one$"),
        ([[1], []], r"^request 1 has length 0; every request needs at least 1 token$"),
        (
            [[1], [[2, 3]]],
            r"^request 1 has shape \[1, 2\] and dtype torch.int64; expected a 1-D row of integer token ids",
        ),
        ([[1.5, 2.0]], r"^request 0 has shape \[2\] and dtype torch.float32; expected"),
        ([[True, False]], r"^request 0 has shape \[2\] and dtype torch.bool; expected"),
        ([torch.tensor(3)], r"^request 0 has shape \[\] and dtype torch.int64; expected"),
    ],
)
def test_requests_that_are_no_rows_of_integers_are_refused(requests: list, message: str):
    with pytest.raises(BatchError, match=message):
        pack(requests)


@pytest.mark.parametrize("request_1", ["not tokenised", [1, [2, 3]], [None]])
def test_requests_that_are_no_tensors_at_all_are_refused(request_1: object):
    with pytest.raises(BatchError, match=r"request 1 .*expected a 1-D row of integer token ids"):
        pack([[1], request_1])


@pytest.mark.parametrize(
    ("positions", "lengths"),
    [
        ([0], (1,)),
        ([0, 1, 2, 3], (4,)),
        ([0, 1, 0, 0, 1, 2], (2, 1, 3)),
        ([0, 0, 0], (1, 1, 1)),
        ([7, 8, 9], (3,)),
        ([7, 8, 7, 7, 8, 9], (2, 1, 3)),
        ([7, 8, 0, 1, 7], (2, 2, 1)),
    ],
)
def test_requests_restart_at_zero_or_at_the_first_position(positions: list[int], lengths: tuple[int, ...]):
    assert request_lengths(torch.tensor([positions])) == lengths
    assert request_lengths(torch.tensor(positions, dtype=torch.int32)) == lengths


@properties
@given(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_lengths_are_read_wherever_the_positions_begin(first: int, lengths: list[int]):
    positions = torch.cat([torch.arange(first, first + length) for length in lengths])
    assert request_lengths(positions[None]) == tuple(lengths)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([0, 1, 3, 4], r"^position_ids go from 1 to 3 at token 2: neither the next position nor a restart at 0 or 0;"),
        ([4, 5, 6, 5], r"^position_ids go from 6 to 5 at token 3: neither .* a restart at 0 or 4;"),
        ([0, 1, 0, 1, 1], r"^position_ids go from 1 to 1 at token 4:"),
        ([0, 1, 2, 0, 5, 9], r"^position_ids go from 0 to 5 at token 4:"),
        ([0, 1, -1], r"^position_ids go from 1 to -1 at token 2:"),
    ],
)
def test_positions_that_jump_are_refused_with_the_place(positions: list[int], message: str):
    with pytest.raises(BatchError, match=message):
        request_lengths(torch.tensor([positions]))


def test_empty_positions_are_refused():
    with pytest.raises(BatchError, match="position_ids are empty"):
        request_lengths(torch.zeros(1, 0, dtype=torch.int64))
