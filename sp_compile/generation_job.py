"""The generating job: a model goes on with ragged requests over ranks, and is compared with transformers' generate."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from sp_compile.api import parallelize
from sp_compile.config import JobConfig
from sp_compile.errors import ConfigError
from sp_compile.job import Show, barrier, device_of, gathered, load, local_rank, on_ranks, silent, world_rank
from sp_compile.measure import machine, threads_of_all, versions


@dataclass(frozen=True)
class Whole:
    """The same requests through transformers' ``generate``, as rows padded on the left, on all threads of the job.

    Attributes:
        seconds: of the whole call.
        threads: that it ran on.
        same: new tokens that are those of the job.
        tokens: new tokens of the job.
    """

    seconds: float
    threads: int
    same: int
    tokens: int


@dataclass(frozen=True)
class GenerationResult:
    """All that a generating job found out.

    ``cache_bytes`` are those of each rank, ``bytes_sent`` what each rank sends in the last step of ``step_requests``
    requests.
    """

    model: str
    parameters: int
    device: str
    lengths: list[int]
    new_tokens: list[int]
    finish_reasons: list[str]
    threads_per_rank: int
    first_seconds: float
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: list[int]
    bytes_sent: int
    step_requests: int
    unsharded: Whole | None
    config: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether the tokens are right, as far as they can be told: those of lower precision may differ by chance."""
        exact = self.config["model"]["dtype"] in ("float32", "float64") and not self.config["generate"]["cache_dtype"]
        return self.unsharded is None or not exact or self.unsharded.same == self.unsharded.tokens


def run_generation(job: JobConfig, show: Show = silent) -> GenerationResult | None:
    """Run the job as :func:`sp_compile.job.run_job` does."""
    if job.run.trace:
        raise ConfigError("run.trace is for jobs that only prefill; leave it out, or set max_new_tokens=null")
    result: GenerationResult | None = on_ranks(run_rank, job, show)
    return result


def run_rank(job: JobConfig, show: Show = silent) -> GenerationResult | None:
    """What each rank runs; rank 0 of the world returns the result."""
    try:
        from sp_compile.cache import ShardedCache
        from sp_compile.generation import generate
    except ImportError as error:
        raise ConfigError("generation needs transformers; install it with `pip install 'sp_compile[hf]'`") from error
    show = show if world_rank() == 0 else silent
    device = device_of(job, local_rank())
    with show("building the model and reading the requests"):
        model, batch = load(job, device)
    parallel = parallelize(model, sp=job.run.sp, config=job.compile)
    requests = [each[0] for each in batch.split(batch["input_ids"])]
    told: list[float] = []
    options = _options(job)

    def run(tokens: int) -> tuple[Any, ShardedCache, float]:
        name = job.generate.cache_dtype
        dtype = None if name is None else getattr(torch, name)
        cache = ShardedCache(parallel, page_size=job.generate.page_size, dtype=dtype)
        told.clear()
        barrier()
        start = time.perf_counter()
        found = generate(parallel, requests, max_new_tokens=tokens, seed=job.generate.seed, cache=cache,
                         prefill_tokens=job.generate.prefill_tokens,
                         on_token=lambda *_: told.append(time.perf_counter() - start), **options)  # fmt: skip
        return found, cache, time.perf_counter() - start

    assert job.generate.max_new_tokens is not None
    with show("first tokens: capturing, rewriting, generating code"):
        *_, first = run(min(3, job.generate.max_new_tokens))
    with show(f"{job.generate.max_new_tokens} tokens of each request"):
        completions, cache, _ = run(job.generate.max_new_tokens)
    report = parallel.report()
    prefilled = told[len(requests) - 1]
    cache_bytes = gathered(cache.nbytes)[: job.run.sp]
    tokens = [each.tokens for each in completions]
    unsharded = None
    if job.run.compare and world_rank() == 0:
        with show("generate() of transformers, for comparison"):
            unsharded = compare(job, model, requests, tokens)
    barrier()
    if world_rank() != 0:
        return None
    return GenerationResult(
        model=type(model).__name__,
        parameters=sum(each.numel() for each in model.parameters()),
        device=device.type,
        lengths=list(batch.lengths),
        new_tokens=[len(each) for each in tokens],
        finish_reasons=[each.finish_reason for each in completions],
        threads_per_rank=torch.get_num_threads(),
        first_seconds=first,
        prefill_seconds=prefilled,
        decode_seconds=told[-1] - prefilled,
        cache_bytes=cache_bytes,
        bytes_sent=report.bytes_sent,
        step_requests=sum(report.tokens_per_rank),
        unsharded=unsharded,
        config=dataclasses.asdict(job),
        versions=versions(),
        machine=machine(),
    )


def compare(job: JobConfig, model: nn.Module, requests: list[torch.Tensor], tokens: list[list[int]]) -> Whole:
    """Generate without sharding, by transformers: at once where tokens are the most probable, else one by one."""
    limit = job.generate.max_new_tokens
    options = {**_options(job), "max_new_tokens": limit, "pad_token_id": 0}
    same = 0
    with threads_of_all(job.run.sp) as threads, torch.no_grad():
        start = time.perf_counter()
        if job.generate.do_sample:
            found = []
            for i, each in enumerate(requests):
                torch.manual_seed(job.generate.seed + i)
                mask = torch.ones_like(each)[None]
                found.append(model.generate(each[None], attention_mask=mask, **options)[0, len(each) :].tolist())  # type: ignore[operator]
        else:
            longest = max(map(len, requests))
            ids, mask = (
                pad_sequence(each, batch_first=True, padding_side="left")
                for each in (requests, [torch.ones_like(each) for each in requests])
            )
            rows = model.generate(ids, attention_mask=mask, **options)  # type: ignore[operator]
            found = rows[:, longest:].tolist()
        seconds = time.perf_counter() - start
    for ours, theirs in zip(tokens, found, strict=True):
        same += sum(a == b for a, b in zip(ours, theirs[: len(ours)], strict=False))
    return Whole(seconds, threads, same, sum(map(len, tokens)))


def _options(job: JobConfig) -> dict[str, Any]:
    chosen = {name: getattr(job.generate, name) for name in ("do_sample", "temperature", "top_k", "top_p")}
    return {name: each for name, each in chosen.items() if each is not None}
