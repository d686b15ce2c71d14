"""Ranks that share a batch get the same one, and only data-parallel ranks get others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sp_compile.data import same_batch
from sp_compile.errors import MeshError, RankFailedError, RankMismatchError


def batch_of() -> dict[str, Any]:
    return {
        "input_ids": torch.arange(12).view(2, 6),
        "labels": torch.arange(12).view(2, 6),
        "images": ({"pixels": torch.full((2, 3), 0.5), "seen": torch.ones(3, dtype=torch.bool)}, [1, 2.5]),
        "names": ["a", "b"],
        "empty": torch.empty(0),
    }


def changed(what: str) -> dict[str, Any]:
    """A batch of which one value is another."""
    batch = batch_of()
    if what == "labels":
        batch["labels"] = batch["labels"].clone()
        batch["labels"][1, 4] += 1
    elif what == "pixels":
        batch["images"][0]["pixels"] = batch["images"][0]["pixels"].nextafter(torch.tensor(1.0))
    elif what == "dtype":
        batch["images"][0]["seen"] = torch.ones(3, dtype=torch.int64)
    elif what == "shape":
        batch["input_ids"] = batch["input_ids"][:, :5]
    elif what == "number":
        batch["images"][1][1] = 2.25
    elif what == "name":
        batch["names"] = ["a", "c"]
    elif what == "missing":
        del batch["labels"]
    return batch


WRONG = {
    "labels": "the values of labels: rank 2 has checksum",
    "pixels": "the values of images[0].pixels: rank 2 has checksum",
    "dtype": "the shape of images[0].seen: rank 2 has [3] torch.int64",
    "shape": "the shape of input_ids: rank 2 has [2, 5] torch.int64",
    "number": "the value of images[1][1]: rank 2 has 2.25, the others have 2.5",
    "name": "the value of names[1]: rank 2 has 'c', the others have 'b'",
    "missing": "the shape of labels: rank 2 has nothing",
}


def told() -> dict[str, str]:
    """What ranks are told of batches of which rank 2 has another, and of loaders that differ."""
    check, odd = same_batch(), dist.get_rank() == 2
    found = {}
    for what in WRONG:
        try:
            check(changed(what if odd else ""))
            found[what] = "nothing"
        except RankMismatchError as error:
            found[what] = str(error)
    same = [*check.over([batch_of(), (torch.ones(2),), torch.zeros(1)])]
    found["same"] = f"{len(same)} {torch.equal(check(batch_of())['labels'], same[0]['labels'])}"
    try:
        found["shorter"] = str(len([*check.over([torch.ones(1)] * (2 if odd else 3))]))
    except RankMismatchError as error:
        found["shorter"] = str(error)
    try:
        found["raising"] = str([*check.over(map(len, [[], 3] if odd else [[], []]))])
    except (RankFailedError, TypeError) as error:
        found["raising"] = f"{type(error).__name__}: {error}"
    return found


def test_the_rank_and_the_field_that_differ_are_named(ranks):
    for rank, found in enumerate(ranks(3).run(told)):
        for what, expected in WRONG.items():
            assert expected in found[what], what
        assert found["same"] == "3 True"
        assert "another batch: rank 2 has none, the others have one" in found["shorter"]
        assert found["raising"].startswith("TypeError" if rank == 2 else "RankFailedError: rank 2 raised TypeError")


def test_one_rank_has_nothing_to_compare():
    batch = batch_of()
    assert same_batch()(batch) is batch
    assert [*same_batch().over([batch])] == [batch]


def sampled() -> tuple[list[list[int]], str]:
    """Two epochs of numbers that a rank of (dp, sp) = (2, 2) gets, and what three axes are told."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    numbers = TensorDataset(torch.arange(10))
    sampler = DistributedSampler(
        numbers, num_replicas=mesh["dp"].size(), rank=mesh["dp"].get_local_rank(), shuffle=True, seed=3
    )
    loader = DataLoader(numbers, batch_size=2, sampler=sampler)
    check, epochs = same_batch(mesh["sp"]), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([int(each) for (batch,) in check.over(loader) for each in batch])
    try:
        same_batch(dist.init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("pp", "dp", "sp")))
    except MeshError as error:
        return epochs, str(error)
    return epochs, "nothing"


def test_a_sampler_over_dp_gives_groups_other_batches_and_their_ranks_the_same(ranks):
    found = ranks(4).run(sampled)
    (first, _), (again, _), (other, _), (other_again, _) = found
    assert first == again
    assert other == other_again
    for epoch in range(2):
        assert sorted(first[epoch] + other[epoch]) == list(range(10))
    assert first[0] != first[1]
    assert all("pass its one axis for sequences" in error for _, error in found)


def loads_the_default_order() -> list[int]:
    """What a sampler over all ranks gives, which is what must not be used, as the check says."""
    numbers = TensorDataset(torch.arange(6))
    loader = DataLoader(numbers, batch_size=3, sampler=DistributedSampler(numbers))
    return [int(each) for (batch,) in same_batch().over(loader) for each in batch]


def test_a_sampler_over_all_ranks_is_found_out(ranks):
    for ok, error in ranks(2).outcomes(loads_the_default_order):
        assert not ok
        assert "ranks disagree on the values of [0]" in error


@pytest.mark.parametrize("value", [torch.ones(2), [torch.ones(2)], {"a": {"b": (torch.ones(2),)}}], ids=str)
def test_batches_come_back_as_they_are(value: Any):
    assert same_batch()(value) is value
