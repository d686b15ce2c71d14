"""The main job: a model prefills a ragged batch over ranks and is compared with itself unsharded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sp_compile.api import TOLERANCE, explain, parallelize
from sp_compile.batch import PackedBatch, pack
from sp_compile.config import JobConfig
from sp_compile.costs import Rates
from sp_compile.errors import ConfigError
from sp_compile.inputs import forward_options, requests_alone
from sp_compile.launch import launch
from sp_compile.loading import build_model, read_requests
from sp_compile.measure import (
    PeakMemory,
    machine,
    median_seconds,
    seconds,
    threads_of_all,
    versions,
    write_timeline,
)
from sp_compile.mesh import pretend
from sp_compile.report import Report
from sp_compile.runtime import ParallelModule
from sp_compile.work import Work

RANKS_OF_NODE = 2  # so that strategies for several nodes are among those that apply
Show = Callable[[str], AbstractContextManager[Any]]  # announces a step; entered while it runs


@dataclass(frozen=True)
class RankResult:
    """What one rank did: tokens and query-key pairs, bytes at the peak above the start, median seconds."""

    rank: int
    tokens: int
    attention_area: int
    peak_bytes: int
    forward_seconds: float


@dataclass(frozen=True)
class Unsharded:
    """The same batch through the unsharded model, on rank 0 with all threads of the job.

    ``max_abs_diff`` compares logits; they are right within ``limit``, the dtype's tolerance times ``logit_scale``.
    """

    forward_seconds: float
    threads: int
    peak_bytes: int
    max_abs_diff: float
    logit_scale: float
    limit: float
    ok: bool


@dataclass(frozen=True)
class JobResult:
    """All that a job found out; ``forward_seconds`` is the slowest rank's median."""

    model: str
    parameters: int
    device: str
    lengths: list[int]
    threads_per_rank: int
    first_forward_seconds: float
    forward_seconds: float
    bytes_sent: int
    bytes_by_formula: int | None
    collectives: list[dict[str, Any]]
    isolation: str
    fallbacks: list[dict[str, Any]]
    ranks: list[RankResult]
    unsharded: Unsharded | None
    config: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether the logits were right, as far as they were compared."""
        return self.unsharded is None or self.unsharded.ok


def silent(_: str) -> AbstractContextManager[Any]:
    return nullcontext()


def under_torchrun() -> bool:
    """Whether this process is a rank that torchrun started."""
    return dist.is_torchelastic_launched()


def world_rank() -> int:
    """The number of this process among all."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def run_job(job: JobConfig, show: Show = silent) -> JobResult | None:
    """Run the job on new local ranks or, under torchrun, as one of its ranks.

    Args:
        job: what to run.
        show: called on rank 0 with what happens next; a function at the top level of a module.

    Returns:
        The result; None on torchrun's ranks other than 0.

    Raises:
        ConfigError: the configuration does not fit this machine, or itself.
        RankFailedError: a rank raised, died, or did not finish in time.
    """
    if job.compile.outputs == "loss":
        raise ConfigError('compile.outputs="loss" is for training, for which requests have no labels; use "full"')
    if job.run.compare and job.compile.outputs != "full":
        raise ConfigError('compile.outputs="sharded" leaves nothing whole to compare; set run.compare=false')
    result: JobResult | None = on_ranks(run_rank, job, show)
    return result


def on_ranks(run: Callable[[JobConfig, Show], Any], job: JobConfig, show: Show) -> Any:
    """What rank 0 returns of a job that runs on new local ranks or, under torchrun, on those there are."""
    if under_torchrun():
        return run(job, show)
    device_of(job, 0)
    return launch(run, job.run.sp, job, show, timeout=job.run.timeout)[0]


def device_of(job: JobConfig, local_rank: int) -> torch.device:
    """The device of a rank.

    Raises:
        ConfigError: ``cuda`` is asked for and there is no GPU for each local rank.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", job.run.sp))
    gpus = torch.cuda.device_count()
    if job.run.device == "cuda" and gpus < ranks:
        raise ConfigError(
            f"run.device=cuda needs a GPU for each of {ranks} local ranks, there are {gpus}; set sp={gpus}"
        )
    if job.run.device == "cpu" or gpus < ranks:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def load(job: JobConfig, device: torch.device | str) -> tuple[nn.Module, PackedBatch]:
    """The job's model and its batch."""
    model = build_model(job.model, device)
    return model, pack(read_requests(job.requests, job.model, model.config), device=str(device).replace("meta", "cpu"))


def explain_job(job: JobConfig) -> Report:
    """What the pipeline makes of the job's model for its batch, without weights and ranks."""
    model, batch = load(job, "meta")
    device = torch.device("cuda") if job.run.device == "cuda" else device_of(job, 0)
    return explain(model, batch, sp=job.run.sp, config=job.compile, device=device)


def work_of_job(job: JobConfig, rates: Rates) -> tuple[Work, list[int]]:
    """What the job's model computes for a token, counted without weights and ranks; and its requests' lengths.

    Args:
        job: whose model and requests.
        rates: by which it pays to compute something anew on other ranks.
    """
    model, batch = load(job, "meta")
    parallel = ParallelModule(model, pretend(2 * RANKS_OF_NODE, RANKS_OF_NODE), job.compile)
    parallel.rates = rates
    return parallel.work(batch), list(batch.lengths)


def run_rank(job: JobConfig, show: Show = silent) -> JobResult | None:
    """What each rank runs; rank 0 of the world returns the result."""
    show = show if world_rank() == 0 else silent
    device = device_of(job, local_rank())
    with show("building the model and reading the requests"):
        model, batch = load(job, device)
    parallel = parallelize(model, sp=job.run.sp, config=job.compile)
    forward = _forward(parallel, batch)
    with show("first forward: capturing, rewriting, generating code"):
        first = seconds(forward, device, barrier)
    with show(f"{job.run.warmup + job.run.repeats} more forwards"):
        for _ in range(job.run.warmup):
            forward()
        median = median_seconds(forward, job.run.repeats, device, barrier)
        barrier()
        with PeakMemory(device) as peak:
            output = forward()
    if job.run.trace:
        with show("one more forward, for the timeline"):
            write_timeline(forward, rank_file(Path(job.run.trace), parallel.group.rank), device)
    report = parallel.report()
    own = RankResult(
        rank=parallel.group.rank,
        tokens=report.tokens_per_rank[parallel.group.rank],
        attention_area=report.attention_area_per_rank[parallel.group.rank],
        peak_bytes=peak.bytes,
        forward_seconds=median,
    )
    ranks: list[RankResult] = gathered(own)[: job.run.sp]
    unsharded = None
    if job.run.compare and world_rank() == 0:
        with show("the unsharded model, for comparison"):
            unsharded = compare(job, parallel.module, batch, output, alone=parallel.isolated)
    barrier()
    if world_rank() != 0:
        return None
    return JobResult(
        model=type(model).__name__,
        parameters=sum(each.numel() for each in model.parameters()),
        device=device.type,
        lengths=list(batch.lengths),
        threads_per_rank=torch.get_num_threads(),
        first_forward_seconds=first,
        forward_seconds=max(each.forward_seconds for each in ranks),
        bytes_sent=report.bytes_sent,
        bytes_by_formula=report.bytes_by_formula,
        collectives=[dataclasses.asdict(each) for each in report.collectives],
        isolation=report.isolation,
        fallbacks=[dataclasses.asdict(each) for each in report.fallbacks],
        ranks=ranks,
        unsharded=unsharded,
        config=dataclasses.asdict(job),
        versions=versions(),
        machine=machine(),
    )


def rank_file(path: Path, rank: int) -> Path:
    """The file of a rank: ``timeline.json`` of rank 1 is ``timeline-rank1.json``."""
    return path.with_name(f"{path.stem}-rank{rank}{path.suffix or '.json'}")


def _forward(model: nn.Module, batch: PackedBatch, alone: bool = False) -> Callable[[], torch.Tensor]:
    """Runs the batch, or each of its requests alone, for its logits."""
    calls = list(requests_alone(model, batch, batch.lengths)) if alone else [forward_options(model, batch)]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            logits = [model(**each).logits for each in calls]
        return torch.cat(logits, dim=1) if alone else logits[0]

    return forward


def compare(
    job: JobConfig, model: nn.Module, batch: PackedBatch, logits: torch.Tensor, alone: bool = False
) -> Unsharded:
    """Run the unsharded model with all threads of the job, and compare its logits ``[1, T, vocabulary]``.

    ``alone`` runs each request for itself, for a model that would mix them.
    """
    forward = _forward(model, batch, alone)
    with threads_of_all(job.run.sp) as threads:
        for _ in range(job.run.warmup):
            forward()
        median = median_seconds(forward, job.run.repeats, logits.device, lambda: None)
        with PeakMemory(logits.device) as peak:
            expected = forward()
    difference = float((logits.double() - expected.double()).abs().max())
    scale = float(expected.double().abs().max())
    limit = TOLERANCE[expected.dtype] * scale
    return Unsharded(median, threads, peak.bytes, difference, scale, limit, difference <= limit)


def barrier() -> None:
    """Wait for all ranks of the world."""
    if dist.is_initialized():
        dist.barrier()


def gathered(own: Any) -> list[Any]:
    """What each rank of the world has."""
    if not dist.is_initialized():
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found
