"""Ranks that are not alike, raise or die: every rank is told which and why, and none hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sp_compile
from sp_compile import builder, fingerprint
from sp_compile.errors import BatchError, RankFailedError, RankMismatchError
from sp_compile.kernels.rates import Shape
from tests.models import llama
from tests.zoo.models import tokens

pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent


def outcome_of(what: str) -> str:
    """What a rank of three is told when rank 1 is different."""
    odd = dist.get_rank() == 1
    try:
        if what == "configuration":
            sp_compile.parallelize(llama(rms_norm_eps=1e-3 if odd else 1e-6))
        elif what == "option":
            sp_compile.parallelize(llama(), scheme="contiguous" if odd else "zigzag")
        elif what == "graph":
            sp_compile.parallelize(_Scaled(1.5 if odd else 2.0).eval(), codegen="eager")(tokens(1, 9))
        else:
            sp_compile.parallelize(llama(), codegen="eager")(**_batch(what, odd), use_cache=False)
    except sp_compile.SPCompileError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _batch(what: str, odd: bool) -> dict[str, Any]:
    ids = tokens(1, 9)
    if what == "shapes" and odd:
        ids = tokens(1, 8)
    if what == "values" and odd:
        ids = tokens(1, 9, seed=1)
    if what == "requests":
        return dict(sp_compile.pack([ids[0, :4], ids[0, 4:]] if odd else [ids[0, :5], ids[0, 5:]]))
    if what == "one bad input" and odd:
        return {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 6, 7, 8, 9]])}
    return {"input_ids": ids}


class _Scaled(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.embed = torch.nn.Embedding(128, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed(input_ids) * self.factor


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("configuration", "ranks disagree on the model's configuration: rank 1 has"),
        ("option", "ranks disagree on the option scheme: rank 1 has contiguous, the others have zigzag"),
        ("graph", "ranks disagree on the graph: rank 1 has"),
        ("shapes", "ranks disagree on the requests: rank 1 has [8], the others have [9]"),
        ("values", "ranks disagree on the values of input_ids: rank 1 has checksum"),
        ("requests", "ranks disagree on the requests: rank 1 has [4, 5], the others have [5, 4]"),
    ],
)
def test_ranks_that_differ_are_named_with_the_field_on_every_rank(ranks, what: str, words: str):
    for told in ranks(3).run(outcome_of, what):
        assert told.startswith(f"{RankMismatchError.__name__}: {words}")


def test_a_bad_input_on_one_rank_is_told_on_all(ranks):
    first, second, third = ranks(3).run(outcome_of, "one bad input")
    assert second.startswith(f"{BatchError.__name__}: position_ids go from 4 to 6 at token 5")
    for told in (first, third):
        assert told.startswith(f"{RankFailedError.__name__}: rank 1 raised BatchError: position_ids go from 4 to 6")


def test_the_ranks_go_on_after_a_disagreement(ranks):
    ranks(3).run(outcome_of, "values")
    assert ranks(3).run(outcome_of, "nothing") == ["nothing was raised"] * 3


FAILING = """
import os, signal, sys
import torch, torch.distributed as dist
import sp_compile
from tests.models import llama
from tests.zoo.models import tokens

how, rank, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = sp_compile.parallelize(llama(), codegen="eager")
model(tokens(1, 9), use_cache=False)
if rank == 1 and how == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 1 and how == "raises":
    model._run_kept_apart = lambda *_: 1 / 0
try:
    model(tokens(1, 9, seed=1), use_cache=False)
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("how", "words"), [("dies", "rank 1 died"), ("raises", "rank 1 raised ZeroDivisionError: division by zero")]
)
def test_the_survivor_of_a_failure_names_the_rank_that_failed(tmp_path: Path, how: str, words: str):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING, how, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told, _ = processes[0].communicate(timeout=120)
    finally:
        for each in processes:
            each.kill()
            each.wait()
    assert told.strip() == f"RankFailedError: rank 0 cannot go on: {words}"


SHAPE = Shape(8, 2, 64, 64, "bfloat16", False)


def verdicts() -> tuple[list[bool], str]:
    """Whether fused kernels are faster, where ranks measured otherwise, and what is told of a rank that raised."""
    odd, parallel = dist.get_rank() == 1, sp_compile.parallelize(llama(), codegen="eager")
    found = []
    with pytest.MonkeyPatch.context() as patched:
        for alike in (False, True):
            parallel.builder._faster.clear()
            patched.setattr(builder, "measured_faster", lambda shape, alike=alike: alike or not odd)
            found.append(parallel.builder.fused_is_faster(SHAPE))
        patched.setattr(builder, "measured_faster", lambda shape: pytest.fail("it is known"))
        found.append(parallel.builder.fused_is_faster(SHAPE))
    try:
        with fingerprint.agreement(parallel.group):
            if odd:
                raise BatchError("not this")
            fingerprint.all_of(parallel.group, "it", True)
    except sp_compile.SPCompileError as error:
        return found, f"{type(error).__name__}: {error}"
    return found, ""


def test_what_is_measured_decides_on_all_ranks_alike(ranks):
    for rank, (found, told) in enumerate(ranks(3).run(verdicts)):
        assert found == [False, True, True]
        assert told == ("BatchError: not this" if rank == 1 else "RankFailedError: rank 1 raised BatchError: not this")
