"""Generation for ragged requests: packed prefill in chunks, then batched decoding, without padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import GenerationConfig

from sp_compile import fingerprint
from sp_compile.batch import PackedBatch, pack
from sp_compile.cache import ShardedCache
from sp_compile.errors import BatchError, ConfigError
from sp_compile.inputs import device_of
from sp_compile.layout import TokenLayout
from sp_compile.mesh import Group
from sp_compile.runtime import ParallelModule
from sp_compile.sampling import Sampler, configured

PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Completion:
    """What was generated for a request.

    Attributes:
        tokens: the new tokens, the one that ended the request included.
        finish_reason: ``stop`` after an end token, ``length`` after as many as were asked for.
        logprobs: natural logarithm of each new token's probability under the model, before any processor; None unless
            asked for.
        prompt_logprobs: the same for the prompt's tokens from the second on; None unless asked for.
    """

    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None = None
    prompt_logprobs: list[float] | None = None


@dataclass
class _Request:
    index: int
    number: int  # in the cache
    prompt: torch.Tensor
    limit: int
    done: int = 0  # tokens of the prompt that are in the cache
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    reason: str = ""


def generate(
    model: ParallelModule,
    requests: Sequence[torch.Tensor | Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    generation_config: GenerationConfig | None = None,
    seed: int | None = None,
    logprobs: bool = False,
    prompt_logprobs: bool = False,
    prefill_tokens: int = PREFILL_TOKENS,
    cache: ShardedCache | None = None,
    on_token: Callable[[int, int], None] | None = None,
    **options: Any,
) -> list[Completion]:
    """Generate for requests of any lengths, each as if it were alone.

    Call it on every rank with the same arguments; every rank returns the same.

    Args:
        model: what :func:`sp_compile.parallelize` returned, of a model with a language head.
        requests: 1-D integer tensors or lists of token ids, each of at least one token.
        max_new_tokens: for all, or of each request; 0 generates nothing, which with ``prompt_logprobs`` scores prompts.
            By default what the generation configuration says.
        generation_config: transformers' ``GenerationConfig``; the model's own by default.
        seed: request i samples from random numbers of its own, seeded with ``seed + i``; drawn where it is None.
        logprobs, prompt_logprobs: return log-probabilities. Those of prompts are computed where their logits are.
        prefill_tokens: prompts are prefilled so many tokens at a time, which bounds the memory that activations need.
        cache: where keys and values are kept, to choose its size and dtype; it may hold other packed requests.
        on_token: called on every rank with a request's index and its next token, as they come.
        options: fields of ``GenerationConfig`` to change: ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
            ``min_p``, ``eos_token_id``, ``repetition_penalty``, and so on.

    Returns:
        One completion a request, in their order.

    Raises:
        BatchError: no request, one without tokens, a ``max_new_tokens`` that fits no request.
        ConfigError: an option that is unknown or not served.
        CacheFullError: the cache is too small for all requests; it holds none of them then.
        RankMismatchError: ranks were given other requests, or went on with other tokens.

    >>> generate(model, [[5, 6, 7], [8]], max_new_tokens=16, do_sample=True, seed=0)  # doctest: +SKIP
    """
    config = configured(getattr(model.module, "generation_config", None), generation_config, options)
    batch = pack(requests, device=device_of(model.module))
    limits = _limits(max_new_tokens, config, len(batch.lengths))
    if prefill_tokens < 1:
        raise ConfigError(f"prefill_tokens={prefill_tokens} is too small; pass at least 1")
    cache = ShardedCache(model) if cache is None else cache
    prompts = batch.split(batch["input_ids"])
    first = max([-1, *cache.numbers]) + 1
    running = [
        _Request(i, first + i, prompt[0], limit) for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    seeds = [_shared_seed(seed, model.group, prompts[0].device) + i for i in range(len(running))]
    sampler = Sampler(config, [each.prompt for each in running], seeds)
    keeps_logits = "logits_to_keep" in inspect.signature(model.module.forward).parameters
    run = _Run(model, cache, sampler, logprobs, prompt_logprobs, on_token, keeps_logits)
    cache.reserve({each.number: len(each.prompt) + each.limit for each in running})
    try:
        for chunks in _prefill(running, prefill_tokens):
            run.prefill(chunks)
        while left := [each for each in running if not each.reason]:
            run.decode(left)
    finally:
        for each in running:
            if not each.reason and each.number in cache.numbers:
                cache.finish(each.number)
    found = [each.tokens for each in running]
    fingerprint.compare(model.group, {"the generated tokens": fingerprint.digest(str(found))})
    return [
        Completion(each.tokens, each.reason, each.logprobs if logprobs else None,
                   each.prompt_logprobs if prompt_logprobs else None)
        for each in running
    ]  # fmt: skip


def _limits(asked: int | Sequence[int] | None, config: GenerationConfig, requests: int) -> list[int]:
    asked = config.max_new_tokens if asked is None else asked
    if asked is None:
        raise BatchError("max_new_tokens is not set; pass how many tokens to generate at most")
    limits = [asked] * requests if isinstance(asked, int) else list(asked)
    if len(limits) != requests or min(limits) < 0:
        raise BatchError(f"max_new_tokens={asked!r} for {requests} requests; pass one number of 0 or more, or one each")
    return limits


def _shared_seed(seed: int | None, group: Group, device: torch.device) -> int:
    """The seed, or one that rank 0 draws."""
    if seed is not None:
        return seed
    drawn = torch.randint(2**62, (), device=device)
    if group.size > 1:
        dist.broadcast(drawn, group=group.process_group, group_src=0)
    return int(drawn)


def _prefill(requests: Sequence[_Request], budget: int) -> Iterator[list[tuple[_Request, int]]]:
    """Requests with how many of their next tokens run together, until all are prefilled."""
    chunks: list[tuple[_Request, int]] = []
    room = budget
    for each in requests:
        left = len(each.prompt)
        while left:
            size = min(left, room)
            chunks.append((each, size))
            left, room = left - size, room - size
            if not room:
                yield chunks
                chunks, room = [], budget
    if chunks:
        yield chunks


@dataclass
class _Run:
    model: ParallelModule
    cache: ShardedCache
    sampler: Sampler
    logprobs: bool
    prompt_logprobs: bool
    on_token: Callable[[int, int], None] | None
    keeps_logits: bool  # the model's forward can be told which it is to return

    def prefill(self, chunks: Sequence[tuple[_Request, int]]) -> None:
        """Run the next tokens of prompts, and sample for those that are complete."""
        cut = [each.prompt[each.done : each.done + size] for each, size in chunks]
        batch = pack(cut, numbers=[each.number for each, _ in chunks])
        ends = torch.tensor(batch.lengths).cumsum(0) - 1
        for each, size in chunks:
            each.done += size
        complete = [i for i, (each, _) in enumerate(chunks) if each.done == len(each.prompt)]
        last = ends[complete]
        if self.prompt_logprobs:
            logits = self._scored(chunks, batch, last)
        else:
            logits = self._last_logits(batch, last if len(last) else ends[-1:])
        ready = [chunks[i][0] for i in complete]
        for each in ready:
            if not each.limit:
                self._end(each, "length")
        self._sample([(i, each) for i, each in enumerate(ready) if each.limit], logits)

    def decode(self, requests: Sequence[_Request]) -> None:
        """Run the last token of each request, and sample the next."""
        ids = requests[0].prompt.new_tensor([[each.tokens[-1] for each in requests]])
        tensors = {"input_ids": ids, "position_ids": torch.zeros_like(ids)}
        batch = PackedBatch(tensors, [1] * len(requests), [each.number for each in requests])
        logits = self._last_logits(batch, torch.arange(len(requests)))
        self._sample(list(enumerate(requests)), logits)

    def _last_logits(self, batch: PackedBatch, rows: torch.Tensor) -> torch.Tensor:
        """Logits ``[rows, vocabulary]`` of these new tokens, on every rank."""
        device = batch["input_ids"].device
        rows = rows.to(device)
        options: dict[str, Any] = {}
        if self.keeps_logits:
            options["logits_to_keep"] = rows.repeat(2) if len(rows) == 1 else rows  # code for one would be other code
        logits = self._forward(batch, "full", **options)
        return logits[: len(rows)] if options else logits[rows]

    def _forward(self, batch: PackedBatch, outputs: str, **options: Any) -> torch.Tensor:
        """Logits ``[rows, vocabulary]`` of new tokens."""
        inputs = {**batch, **options, "past_key_values": self.cache}
        with torch.no_grad():
            logits: torch.Tensor = self.model.forward_with_cache((), inputs, outputs).logits[0]
        return logits

    def _scored(self, chunks: Sequence[tuple[_Request, int]], batch: PackedBatch, rows: torch.Tensor) -> torch.Tensor:
        """As :meth:`_last_logits`, and each rank scores the prompt's tokens whose logits it has."""
        device = batch["input_ids"].device
        local = self._forward(batch, "sharded")
        layout, group = self.model.layout, self.model.group
        assert layout is not None
        following = [each.prompt[each.done - size + 1 : each.done + 1] for each, size in chunks]
        targets = torch.cat(
            [F.pad(each, (0, size - len(each))) for each, (_, size) in zip(following, chunks, strict=True)]
        )
        own = layout.local_index[group.rank].to(device)
        found = local.float().log_softmax(dim=-1).gather(-1, targets[own][:, None])[:, 0]
        scores = _in_normal_order(found, layout, group)
        parts = scores.split(list(batch.lengths))
        for (each, _), next_tokens, part in zip(chunks, following, parts, strict=True):
            each.prompt_logprobs += part[: len(next_tokens)].tolist()
        return _chosen_rows(local, rows.to(device), layout, group)

    def _sample(self, requests: Sequence[tuple[int, _Request]], logits: torch.Tensor) -> None:
        """The next token of requests, whose logits are in these rows."""
        if not requests:
            return
        own = logits[[i for i, _ in requests]]
        chosen = self.sampler.next([each.index for _, each in requests], own, [each.tokens for _, each in requests])
        if self.logprobs:
            picked = own.float().log_softmax(dim=-1)[torch.arange(len(chosen)), torch.tensor(chosen)].tolist()
        for i, (_, each) in enumerate(requests):
            each.tokens.append(chosen[i])
            if self.logprobs:
                each.logprobs.append(picked[i])
            if self.on_token is not None:
                self.on_token(each.index, chosen[i])
            if chosen[i] in self.sampler.ends:
                self._end(each, "stop")
            elif len(each.tokens) == each.limit:
                self._end(each, "length")

    def _end(self, request: _Request, reason: str) -> None:
        request.reason = reason
        self.cache.finish(request.number)


def _in_normal_order(local: torch.Tensor, layout: TokenLayout, group: Group) -> torch.Tensor:
    """One number of each of the rank's rows, of all ranks' in normal order."""
    parts = [torch.empty_like(local) for _ in range(group.size)]
    if group.size > 1:
        dist.all_gather(parts, local.contiguous(), group=group.process_group)
    else:
        parts = [local]
    return torch.cat(parts)[layout.restore_index.to(local.device)]


def _chosen_rows(local: torch.Tensor, rows: torch.Tensor, layout: TokenLayout, group: Group) -> torch.Tensor:
    """These tokens' rows of a tensor ``[shard_length, ...]``, on every rank."""
    at = layout.restore_index.to(local.device)[rows] - group.rank * layout.shard_length
    own = (at >= 0) & (at < layout.shard_length)
    chosen = torch.where(own[:, None], local[torch.where(own, at, 0)], 0)
    if group.size > 1:
        dist.all_reduce(chosen, group=group.process_group)
    return chosen
