"""Checks of what runs on a device: attention of every kind, generation and training steps; for GPUs, real or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sp_compile
from tests import training
from tests.attention_kinds import BUCKETS, GROUPS, HEADS, KINDS, WIDTH, Attention, batch, definition
from tests.local_graphs import kernels_of
from tests.models import llama
from tests.test_generation import check_greedy, prompts

HEAD_DIMS = {
    "causal": (16, 16),
    "window": (64, 64),
    "chunked": (128, 128),
    "packed": (256, 256),
    "padded left": (256, 256),
    "padded right": (40, 40),
    "ALiBi": (24, 24),
    "softcap": (80, 80),
    "sinks": (96, 96),
    "relative bias per head": (192, 192),
    "MLA": (192, 128),
    "prefix-LM": (112, 112),
    "bidirectional blocks": (72, 72),
    "window, first tokens, packed": (160, 160),
}
SINGLE = [name for name, each in KINDS.items() if each.rows == 1]  # one row a batch
UNSCORED = [name for name in SINGLE if not KINDS[name].score]
PADDED = [name for name, each in KINDS.items() if each.rows == 2]
LENGTHS = (21, 301, 53, 3)  # code is generated for the first
# one for a single token, one for fewer than 128 queries a rank; where kernels are chosen, short batches have their own
COMPILES = {
    "tiles": 2,
    "fused": 2,
    "dense": 2,
    "flex": 3,
}


class Layer(Attention):
    """An :class:`Attention` with head dims of its own, whose masks are made where it runs."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind, "sdpa" if "sdpa" in KINDS[kind].forms else "eager")
        own, value = HEAD_DIMS[kind]
        self.kind = replace(self.kind, head_dims=(own, value))
        self.q, self.k = nn.Linear(WIDTH, HEADS * own), nn.Linear(WIDTH, GROUPS * own)
        self.v, self.o = nn.Linear(WIDTH, GROUPS * value), nn.Linear(HEADS * value, WIDTH)

    def _mask(self, vectors: dict[str, torch.Tensor], length: int) -> torch.Tensor:
        rows = torch.arange(length, device=self.slopes.device)
        q, k = rows[:, None], rows[None, :]

        def at(name: str, index: torch.Tensor) -> torch.Tensor:
            vector = vectors[name][:, None, :]
            return vector[..., None] if index is q else vector[..., None, :]

        mask = self.kind.sees(at, q, k)
        return mask if mask.dim() == 4 else mask[None, None]

    def _bias(self, length: int) -> torch.Tensor | None:
        rows = torch.arange(length, device=self.slopes.device)
        distance = rows[:, None] - rows[None, :]
        if self.kind.score == "alibi":
            return (-self.slopes[:, None, None] * distance)[None]
        if self.kind.score == "relative":
            return nn.functional.embedding(distance.clamp(0, BUCKETS - 1), self.table).permute(2, 0, 1)[None]
        return None


class Layers(nn.Module):
    """Layers of many kinds side by side, so that one compilation serves them all."""

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.ModuleList(Layer(each) for each in kinds)

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, **vectors: torch.Tensor) -> Any:
        return tuple(each(inputs_embeds, position_ids, **vectors) for each in self.layers)


def inputs_of(kinds: Sequence[str], length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Fresh inputs that all of these kinds can take."""
    seed = int(torch.randint(1 << 30, ()))
    found: dict[str, torch.Tensor] = {}
    for kind in ("padded left",) if kinds == PADDED else ("packed", "bidirectional blocks"):
        found = {**batch(kind, length, dtype, seed), **found}
    return found


def check_kernel(
    device: str,
    kinds: Sequence[str],
    dtype: torch.dtype,
    kernel: str,
    sp: int | None = 1,
    lengths: Sequence[int] = LENGTHS,
) -> set[str]:
    """Compare with the definition in fp64; the kernels that ran."""
    plain, exact = (Layers(kinds).to(place, dtype).eval() for place in (device, "cpu"))
    codegen = "inductor" if kernel == "flex" else "eager"
    parallel = sp_compile.parallelize(plain, sp=sp, kernel=kernel, codegen=codegen)
    for length in lengths if sp == 1 else (*lengths, 1):
        inputs = inputs_of(kinds, length, dtype)
        on_card = {name: each.to(device) for name, each in inputs.items()}
        with torch.no_grad():
            outputs = parallel(**on_card)
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):  # cuDNN fills rows that see nothing
                own_outputs = plain(**on_card)
            for layer, found, own in zip(exact.layers, outputs, own_outputs, strict=True):
                right = definition("", layer, inputs)
                case = f"{layer.kind.sees.__name__} {layer.kind.score} {layer.kind.head_dims}, {length} tokens"
                assert_right(found.cpu(), own.cpu(), right, dtype, case)
    assert parallel.compiles <= COMPILES[kernel]
    assert not parallel.report().fallbacks
    return kernels_of(parallel)


def assert_right(found: torch.Tensor, own: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, case: str) -> None:
    """fp32 to 1e-5 of the scale, lower precision as exactly as the unsharded model itself, within a factor of two."""
    assert found.dtype == dtype
    if dtype == torch.float32:
        assert (found.double() - right).abs().max() <= 1e-5 * right.abs().max(), case  # NaN fails
        return
    seen = ~own.isnan()  # a softmax makes NaN of a row that sees nothing
    ours, theirs = ((each.double() - right)[seen].norm() for each in (found, own))
    assert ours <= 2 * theirs, f"{case}: {ours} against {theirs}"


def generate(device: str, codegen: str, new: int, lengths: Sequence[int] = (1, 2, 17, 200)) -> tuple[float, set[str]]:
    """The largest error of log-probabilities, with tokens those of each request alone, and the kernels that ran."""
    model, requests = llama(hidden_size=128), prompts(lengths)
    parallel = sp_compile.parallelize(llama(hidden_size=128).to(device), codegen=codegen)
    cache = sp_compile.ShardedCache(parallel, page_size=8)
    options: dict[str, Any] = {"max_new_tokens": new, "prefill_tokens": 150, "cache": cache, "eos_token_id": -1}
    asked = [each.to(device) for each in requests]
    found = sp_compile.generate(parallel, asked, logprobs=True, prompt_logprobs=True, **options)
    assert {len(each.tokens) for each in found} == {new}
    return check_greedy(model, requests, found), kernels_of(parallel)


def flex_step(
    device: str, name: str, shapes: Sequence[tuple[int, int]] = ((1, 57), (2, 300)), **options: Any
) -> tuple[float, set[str]]:
    """How far loss and gradients in fp32 are from those of the unsharded step, and the kernels that ran."""
    heads = {"head_dim": 16, "sliding_window": 40} if name == "Mistral" else {}
    own, other = (training.built(name, **heads).to(device) for _ in range(2))
    parallel = sp_compile.parallelize(own, kernel="flex", **options)
    apart = []
    for shape in shapes:
        step = {key: each.to(device) for key, each in training.batch_of(shape).items()}
        apart.append(training.apart(training.stepped(parallel, step), training.stepped(other, step)))
    return max(apart), kernels_of(parallel)


def of_lower_precision(device: str, **options: Any) -> tuple[float, float, set[str]]:
    """Errors of logits, of their scale, with earlier keys and values in bf16 and in fp8, and the kernels that ran.

    Ten tokens go on together, and one alone.
    """
    model, found = llama(hidden_size=128).to(device), []
    parallel = sp_compile.parallelize(model, **options)
    ids = torch.randint(3, 120, (1, 31), generator=torch.Generator().manual_seed(3)).to(device)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            cache = sp_compile.ShardedCache(parallel, dtype=dtype)
            parallel(input_ids=ids[:, :20], past_key_values=cache)
            assert {each.dtype for each in cache.tensors} == {dtype}
            steps = [parallel(input_ids=part, past_key_values=cache).logits for part in (ids[:, 20:30], ids[:, 30:])]
            found.append(float((torch.cat(steps, dim=1) - expected[:, 20:]).abs().max() / expected.abs().max()))
    half, eighth = found
    return half, eighth, kernels_of(parallel)


def decode_in(dtype: torch.dtype, device: str, **options: Any) -> set[str]:
    """Check logits of single tokens behind prompts in that precision; the kernels that ran."""
    model, requests = llama(hidden_size=128).to(device, dtype), [each.to(device) for each in prompts((140, 9))]
    exact, parallel = llama(hidden_size=128).to(torch.float64), sp_compile.parallelize(model, **options)
    exact.load_state_dict(model.state_dict())
    cache, starts = sp_compile.ShardedCache(parallel), [0] * len(requests)
    with torch.no_grad():
        for left in (2, 1, 0):
            ends = [len(each) - left for each in requests]
            parts = [each[start:end] for each, start, end in zip(requests, starts, ends, strict=True)]
            packed = sp_compile.pack(parts, device=device)
            found = packed.split(parallel(**packed, past_key_values=cache).logits)
            for request, end, logits in zip(requests, ends, found, strict=True):
                ids = request[None, :end]
                own, right = (each(ids.to(each.device), use_cache=False).logits[:, -1:] for each in (model, exact))
                assert_right(logits[:, -1:].cpu(), own.cpu(), right, dtype, f"{end} tokens")
            starts = ends
    return kernels_of(parallel)
