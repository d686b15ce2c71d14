"""The process group of ranks that share a GPU, on a CPU: every collective that graphs and the runtime call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

import sp_compile
from sp_compile import ops
from tests import training
from tests.models import llama
from tests.staged import BACKEND, StagedPool

c10d = torch.ops._c10d_functional


@pytest.fixture(scope="module")
def staged() -> Iterator[StagedPool]:
    pool = StagedPool(2)
    yield pool
    pool.close()


def collectives(device: str) -> dict[str, Any]:
    """What each returns on a rank, as lists."""
    rank, name = dist.get_rank(), dist.group.WORLD.group_name
    rows = torch.arange(6.0, device=device).reshape(2, 3) + 10 * rank
    uneven = torch.arange(3.0, device=device) + 10 * rank
    go, come = ([1, 2], [1, 0]) if rank == 0 else ([0, 3], [2, 3])
    started = {
        "all_gather": c10d.all_gather_into_tensor(rows, 2, name),
        "all_gather_coalesced": c10d.all_gather_into_tensor_coalesced([uneven, rows], 2, name)[1],
        "reduce_scatter": c10d.reduce_scatter_tensor(rows, "sum", 2, name),
        "all_reduce": c10d.all_reduce(rows, "sum", name),
        "all_reduce_coalesced": c10d.all_reduce_coalesced([uneven, rows], "max", name)[1],
        "all_to_all": c10d.all_to_all_single(uneven, come, go, name),
        "broadcast": c10d.broadcast(rows, 1, name),
        "exchange_rows": ops.exchange_rows(
            rows, torch.tensor([1 - rank], device=device), torch.tensor([[0, 1], [0, 1]] if rank == 0 else
            [[1, 0], [1, 0]]), torch.zeros(2, device=device), name
        ),
    }  # fmt: skip
    found: dict[str, Any] = {key: functional.wait_tensor(each).tolist() for key, each in started.items()}
    whole, parts, told = rows.new_empty(4, 3), [torch.empty_like(rows) for _ in range(2)], [None, None]
    dist.all_gather_into_tensor(whole, rows)
    dist.all_gather(parts, rows.T.contiguous().T)
    dist.all_gather_object(told, {"rank": rank})
    dist.barrier()
    return {**found, "into": whole.tolist(), "list": torch.cat(parts).tolist(), "objects": told}


def check_collectives(by_rank: list[dict[str, Any]]) -> None:
    a, b = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], [[10.0, 11.0, 12.0], [13.0, 14.0, 15.0]]
    summed = [[10.0, 12.0, 14.0], [16.0, 18.0, 20.0]]
    sent = {"all_to_all": [[0.0], [1.0, 2.0, 10.0, 11.0, 12.0]], "reduce_scatter": [summed[:1], summed[1:]],
            "exchange_rows": [[b[0], [0.0] * 3], [a[1], [0.0] * 3]]}  # fmt: skip
    for rank, found in enumerate(by_rank):
        for name in ("all_gather", "all_gather_coalesced", "into", "list"):
            assert found[name] == a + b, name
        assert found["all_reduce"] == summed
        assert found["all_reduce_coalesced"] == found["broadcast"] == b
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]
        for name, expected in sent.items():
            assert found[name] == expected[rank], name


def test_collectives_do_what_they_do_by_gloo(staged: StagedPool):
    check_collectives(staged.run(collectives, "cpu"))


def prefill_and_train() -> tuple[str, float, list[float]]:
    model, errors = llama(), []
    batch = sp_compile.pack([[3, 4, 5, 6, 7], [8], [9] * 30])
    for attention in ("ring", "ulysses"):
        parallel = sp_compile.parallelize(model, codegen="eager", attention=attention)
        with torch.no_grad():
            found, expected = parallel(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits
        errors.append(float((found - expected).abs().max() / expected.abs().max()))
    step = training.batch_of((1, 13))
    found, expected = training.plain_on_ranks([step])[0], training.plain_step(training.plain(), step)
    return dist.get_backend(), training.apart(found, expected), errors


def test_models_run_over_it(staged: StagedPool):
    for backend, apart, errors in staged.run(prefill_and_train):
        assert backend == BACKEND
        assert max(errors) <= 1e-5
        assert apart <= 1e-10
