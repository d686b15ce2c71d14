"""What runs on a GPU: attention by every kernel, and two ranks that share one card; ``make test-gpu`` runs these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import sp_compile
from sp_compile.kernels import fused
from sp_compile.kernels.choice import E4M3_SINCE
from sp_compile.kernels.rates import PACKED, Shape, measured
from sp_compile.needs import short_runs
from tests import training
from tests.local_graphs import kernels_of
from tests.models import gpt, llama
from tests.on_device import (
    COMPILES,
    PADDED,
    SINGLE,
    UNSCORED,
    assert_right,
    check_kernel,
    decode_in,
    flex_step,
    generate,
    of_lower_precision,
)
from tests.staged import StagedPool
from tests.test_generation import prompts
from tests.test_staged import check_collectives, collectives

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]
DEVICE = "cuda"
RAGGED = ([5, 12], [300, 1, 33, 130], [1])  # the last is less than two ranks can share


@pytest.fixture(scope="module")
def staged() -> Iterator[StagedPool]:
    """Two ranks on one card."""
    pool = StagedPool(2)
    yield pool
    pool.close()


# Kernels


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        (SINGLE, torch.float32),
        (PADDED, torch.float32),
        (SINGLE[::2], torch.bfloat16),
        (SINGLE[1::2], torch.float16),
    ],
)
def test_tiles_are_right_for_every_kind_of_rule(kinds: list[str], dtype: torch.dtype):
    assert check_kernel(DEVICE, kinds, dtype, "tiles") == {"tiles"}


@pytest.mark.parametrize(
    ("kinds", "dtype"), [(UNSCORED[::2], torch.bfloat16), (UNSCORED[1::2], torch.float16), (PADDED, torch.bfloat16)]
)
def test_fused_kernels_are_right_for_every_kind_of_mask(kinds: list[str], dtype: torch.dtype):
    assert check_kernel(DEVICE, kinds, dtype, "fused") == {"fused"}


@pytest.mark.parametrize("name", [*fused.KERNELS, PACKED])
@pytest.mark.parametrize("backward", [False, True])
def test_fused_kernels_run_on_this_card_and_give_what_attention_is(name: str, backward: bool):
    for shape in (Shape(32, 8, 128, 128, "bfloat16", backward), Shape(6, 2, 40, 24, "float16", backward)):
        rate = measured(shape, torch.device(DEVICE, torch.cuda.current_device()))[name]
        assert not rate.refused or name == "cudnn", rate.refused  # which older cards do not have
        assert rate.refused or rate.pair > 0


@pytest.mark.parametrize("kinds", [SINGLE[::2], PADDED])
def test_the_definition_is_right(kinds: list[str]):
    assert check_kernel(DEVICE, kinds, torch.float32, "dense") == {"dense"}


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [(SINGLE[::2], torch.float32), (SINGLE[1::2], torch.bfloat16), (PADDED, torch.float16)],
)
def test_flex_attention_is_right_for_every_kind_of_rule(kinds: list[str], dtype: torch.dtype):
    assert check_kernel(DEVICE, kinds, dtype, "flex") == {"flex"}


def test_ranks_without_tokens_of_their_own(staged: StagedPool):
    for used in staged.run(check_kernel, DEVICE, ["sinks"], torch.float32, "flex", None):
        assert used == {"flex"}


def test_fp64_and_small_heads_go_to_the_tiles():
    ids = torch.randint(3, 120, (1, 200), device=DEVICE)
    for dtype in (torch.float64, torch.float32):
        parallel = sp_compile.parallelize(gpt().to(DEVICE, dtype), sp=1)
        assert sp_compile.verify(parallel, {"idx": ids})
        assert kernels_of(parallel) == {"tiles"}


# Two ranks on one card


def test_collectives_through_the_host(staged: StagedPool):
    check_collectives(staged.run(collectives, DEVICE))


def prefill(sp: int | None, dtype: torch.dtype, codegen: str, **options: Any) -> set[str]:
    """Compare the logits of ragged packed requests with each alone in fp64; the kernels that ran."""
    sizes = {"num_attention_heads": 4}  # of 16 dims
    exact, model = llama(torch.float64, **sizes), llama(dtype, **sizes).to(DEVICE)
    exact.load_state_dict(model.state_dict())
    parallel = sp_compile.parallelize(model, sp=sp, codegen=codegen, **options)
    kinds = set[bool]()
    for lengths in RAGGED:
        requests = [torch.randint(3, 120, (length,), generator=torch.Generator().manual_seed(3)) for length in lengths]
        packed = sp_compile.pack(requests, device=DEVICE)
        with torch.no_grad():
            found = packed.split(parallel(**packed, use_cache=False).logits)
            kinds.add(codegen == "inductor" and short_runs(parallel.layout))  # of which each has its programs
            for request, logits in zip(requests, found, strict=True):
                own, right = (each(request[None].to(each.device), use_cache=False).logits for each in (model, exact))
                assert_right(logits.cpu(), own.cpu(), right, dtype, f"{len(request)} of {lengths}")
    used = kernels_of(parallel)
    assert parallel.compiles <= 1 + len(kinds) * (max(COMPILES[each] for each in used) - 1), "1 for a single token"
    return used


@pytest.mark.parametrize(("codegen", "kernel"), [("eager", "fused"), ("inductor", "flex")])
def test_prefill_on_one_rank(codegen: str, kernel: str):
    assert prefill(1, torch.bfloat16, codegen) <= {kernel, "fused"}  # which may be faster on this card


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [*((each, torch.float32) for each in ("allgather_kv", "fetch", "ring", "ulysses")), ("ring", torch.bfloat16)],
)
def test_prefill_on_two_ranks(staged: StagedPool, attention: str, dtype: torch.dtype):
    for used in staged.run(prefill, None, dtype, "eager", attention=attention):
        assert used == {"tiles" if dtype == torch.float32 else "fused"}


@pytest.mark.parametrize(("attention", "dtype"), [("allgather_kv", torch.bfloat16), ("ring", torch.float32)])
def test_generated_code_on_two_ranks(staged: StagedPool, attention: str, dtype: torch.dtype):
    for used in staged.run(prefill, None, dtype, "inductor", attention=attention):
        assert used <= {"flex", "fused"}


@pytest.mark.parametrize(("codegen", "new"), [("eager", 24), ("inductor", 6)])
def test_greedy_generation_with_a_sharded_cache(staged: StagedPool, codegen: str, new: int):
    for worst, _ in staged.run(generate, DEVICE, codegen, new):
        assert worst <= 1e-5


def test_a_cache_of_another_dtype_than_the_model():
    half, eighth, used = of_lower_precision(DEVICE, sp=1)
    reads_fp8 = torch.cuda.get_device_capability() >= E4M3_SINCE
    assert used == ({"flex"} if reads_fp8 else {"flex", "tiles"})
    assert 1e-6 < half < 2e-2
    assert half < eighth < 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_single_tokens_in_half_precision(dtype: torch.dtype):
    assert "flex" in decode_in(dtype, DEVICE, sp=1)


@pytest.mark.parametrize("attention", ["allgather_kv", "ring"])
def test_emulated_ranks(attention: str):
    model = llama(hidden_size=128).to(DEVICE)
    requests = [each.to(DEVICE) for each in prompts((300, 1, 33))]
    emulation = sp_compile.emulate(model, sp_compile.pack(requests), 4, attention=attention)
    with torch.no_grad():
        expected = torch.cat([model(each[None], use_cache=False).logits for each in requests], dim=1)
    assert (emulation.outputs.logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(each.peak_bytes > 0 for each in emulation.figures().ranks)


def test_steps_of_decoding_are_replayed():
    tokens, requests = [], [each.to(DEVICE) for each in prompts((1, 17, 200))]
    for asked in ("auto", "never"):
        parallel = sp_compile.parallelize(llama(hidden_size=128).to(DEVICE), sp=1, cuda_graphs=asked)
        cache = sp_compile.ShardedCache(parallel, page_size=32)
        options: dict[str, Any] = {"max_new_tokens": [60, 20, 40], "eos_token_id": -1, "cache": cache}
        tokens.append([each.tokens for each in sp_compile.generate(parallel, requests, **options)])
        report = parallel.report()
        assert not report.fallbacks
        if asked == "never":
            assert report.replayed is None
        else:
            graphs, replays = report.replayed
            assert graphs
            assert replays >= 30
    assert tokens[0] == tokens[1]


def told(codegen: str) -> list[str]:
    parallel = sp_compile.parallelize(llama(hidden_size=128).to(DEVICE), codegen=codegen)
    sp_compile.generate(parallel, [each.to(DEVICE) for each in prompts((3, 9))], max_new_tokens=3, eos_token_id=-1)
    return [each.reason for each in parallel.report().fallbacks]


def test_why_steps_on_two_ranks_of_one_card_are_not_replayed(staged: StagedPool):
    for found in staged.run(told, "inductor"):
        assert any("its collectives run on staged_gloo" in each for each in found)


def train(codegen: str, **options: Any) -> tuple[float, float]:
    """How far loss and gradients are from those of the unsharded step, in fp32 and in fp64."""
    apart = []
    for dtype in (torch.float32, torch.float64):
        step = {name: each.to(DEVICE) for name, each in training.batch_of((1, 57)).items()}
        own, other = (
            (training.built("Llama", dtype) if dtype == torch.float32 else training.plain(dtype)).to(DEVICE)
            for _ in range(2)
        )
        run = training.stepped if dtype == torch.float32 else training.plain_step
        parallel = sp_compile.parallelize(own, codegen=codegen, **options)
        apart.append(training.apart(run(parallel, step), run(other, step)))
    return apart[0], apart[1]


@pytest.mark.parametrize(
    ("codegen", "attention"), [("eager", "allgather_kv"), ("eager", "ring"), ("inductor", "allgather_kv")]
)
def test_a_training_step(staged: StagedPool, codegen: str, attention: str):
    for single, double in staged.run(train, codegen, attention=attention):
        assert single <= 1e-4
        assert double <= 1e-10


def half_step(name: str, codegen: str, **options: Any) -> tuple[float, set[str], set[str]]:
    """How much farther from the step in fp64 the loss and gradients in bf16 are than the unsharded step's.

    Also the kernels that ran, and those that are to: generated code for short runs of rows.
    """
    heads = {"head_dim": 16}
    own, other = (training.built(name, torch.bfloat16, **heads).to(DEVICE) for _ in range(2))
    exact = training.built(name, torch.bfloat16, **heads).double()
    parallel = sp_compile.parallelize(own, codegen=codegen, **options)
    worst, wanted = 0.0, set[str]()
    for shape in ((1, 57), (2, 300)):
        step = training.batch_of(shape)
        on_card = {key: each.to(DEVICE) for key, each in step.items()}
        right = training.stepped(exact, step)
        ours, theirs = (
            {key: (each.double().cpu() - right[key]).norm() for key, each in training.stepped(model, on_card).items()}
            for model in (parallel, other)
        )
        worst = max(worst, *(float(ours[key] / theirs[key]) for key in right if theirs[key] > 0))
        wanted.add("flex" if codegen == "inductor" and short_runs(parallel.layout) else "fused")
    return worst, kernels_of(parallel), wanted


@pytest.mark.parametrize(("name", "codegen"), [("Llama", "inductor"), ("Mistral", "eager")])
def test_half_precision_trains_by_fused_kernels(staged: StagedPool, name: str, codegen: str):
    for worst, used, wanted in staged.run(half_step, name, codegen, attention="allgather_kv"):
        assert worst <= 3
        assert used == wanted
        assert "fused" in wanted


@pytest.mark.parametrize(("name", "attention"), [("Llama", "allgather_kv"), ("Gemma2", "ulysses"), ("Mistral", "ring")])
def test_gradients_through_flex_attention(staged: StagedPool, name: str, attention: str):
    for apart, used in staged.run(flex_step, DEVICE, name, attention=attention):
        assert apart <= 1e-4
        assert used == {"flex"}
