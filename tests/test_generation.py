"""``sp_compile.generate`` for ragged requests gives each request what the unsharded model gives it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sp_compile
from sp_compile.errors import BatchError, CacheError, CacheFullError, ConfigError, RankMismatchError
from tests.models import llama
from tests.zoo.models import build

pytest.importorskip("transformers")

# grouped heads, windows shorter than the prompt, local and global layers, learned positions, sinks, MLA, experts
MODELS = ["llama", "qwen3", "mistral", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3", "mixtral"]
LENGTHS = (1, 2, 5, 17, 63, 200)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (length,), generator=generator) for length in lengths]


def check_greedy(model: torch.nn.Module, requests: list[torch.Tensor], found: list[sp_compile.Completion]) -> float:
    """Every token is the most probable one to the unsharded model; the largest error of log-probabilities."""
    worst = 0.0
    for prompt, each in zip(requests, found, strict=True):
        tokens = torch.cat([prompt, torch.tensor(each.tokens)])
        with torch.no_grad():
            logits = model(tokens[None], use_cache=False).logits[0].double()
        assert logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == each.tokens
        expected = logits.log_softmax(dim=-1)[:-1].gather(-1, tokens[1:, None])[:, 0]
        assert each.logprobs is not None
        assert each.prompt_logprobs is not None
        told = torch.tensor(each.prompt_logprobs + each.logprobs, dtype=torch.float64)
        worst = max(worst, float((told - expected).abs().max() / logits.abs().max()))
    return worst


def greedy(name: str, lengths: tuple[int, ...], new: int, budgets: tuple[int, ...]) -> list[float]:
    model, requests, worst = build(name), prompts(lengths), []
    parallel = sp_compile.parallelize(model, codegen="eager")
    for budget in budgets:
        cache = sp_compile.ShardedCache(parallel, page_size=8)
        options: dict[str, Any] = {"max_new_tokens": new, "prefill_tokens": budget, "cache": cache, "eos_token_id": -1}
        found = sp_compile.generate(parallel, requests, logprobs=True, prompt_logprobs=True, **options)
        assert {len(each.tokens) for each in found} == {new}
        worst.append(check_greedy(model, requests, found))
        assert cache.ledger.requests == []
    return worst


FAST = ["gemma3_text"]
SLOW = [pytest.param(each, marks=pytest.mark.slow) for each in MODELS if each not in FAST]


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_greedy_tokens_and_log_probabilities_are_those_of_each_request_alone(ranks, name: str):
    for worst in ranks(2).run(greedy, name, LENGTHS, 64, (150,)):
        assert max(worst) <= 1e-5, worst


@pytest.mark.parametrize("sp", [3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["mistral", *(pytest.param(each, marks=pytest.mark.slow) for each in MODELS if each != "mistral")]
)
def test_more_ranks(ranks, name: str, sp: int):
    for worst in ranks(sp).run(greedy, name, LENGTHS, 16 if sp == 3 and name == "mistral" else 64, (150,)):
        assert max(worst) <= 1e-5, worst


def test_prefill_token_by_token_and_in_chunks_of_7_and_64(ranks):
    for worst in ranks(2).run(greedy, "mistral", (1, 40, 19, 70), 4, (1, 7, 64)):
        assert max(worst) <= 1e-5, worst


def sampled() -> list[tuple[list[int], list[int]]]:
    from transformers import GenerationConfig

    model, requests = llama(), prompts((3, 30, 11))
    parallel = sp_compile.parallelize(model, codegen="eager")
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3,
                               "max_new_tokens": 12, "eos_token_id": 2, "min_new_tokens": 2}  # fmt: skip
    found = sp_compile.generate(parallel, requests, seed=7, **options)
    pairs = []
    for i, prompt in enumerate(requests):
        torch.manual_seed(7 + i)
        mask = torch.ones_like(prompt)[None]
        whole = model.generate(prompt[None], attention_mask=mask, pad_token_id=0, **options)[0]
        pairs.append((found[i].tokens, whole[len(prompt) :].tolist()))
    sp_compile.generate(parallel, requests[:1], **options)  # a seed is drawn, the same on all ranks
    model.generation_config.eos_token_id = pairs[0][0][1]
    config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.3)
    ended = sp_compile.generate(parallel, requests[:1], seed=7, generation_config=config)[0]
    assert (ended.tokens[-1], ended.finish_reason) == (pairs[0][0][1], "stop")
    return pairs


def test_sampled_tokens_are_those_of_transformers_with_the_request_s_seed(ranks):
    for pairs in ranks(2).run(sampled):
        for found, expected in pairs:
            assert found == expected


def ended() -> dict[str, Any]:
    model, requests, told = llama(), prompts((4, 9, 2)), []
    parallel = sp_compile.parallelize(model, codegen="eager", outputs="sharded")  # which generate does not mind
    free = sp_compile.generate(parallel, requests, max_new_tokens=[6, 0, 3], eos_token_id=-1)
    end = free[0].tokens[2]
    found = sp_compile.generate(parallel, requests, max_new_tokens=[6, 0, 3], eos_token_id=[end, 70000],
                                on_token=lambda i, token: told.append((i, token)))  # fmt: skip
    return {"free": free, "found": found, "told": told}


def test_requests_end_at_different_times_and_tokens_are_told_as_they_come(ranks):
    for each in ranks(2).run(ended):
        free, found, told = each["free"], each["found"], each["told"]
        assert [len(one.tokens) for one in free] == [6, 0, 3]
        assert {one.finish_reason for one in free} == {"length"}
        first = free[0].tokens.index(free[0].tokens[2])
        assert found[0].tokens == free[0].tokens[: first + 1]
        assert found[0].finish_reason == "stop"
        for i, one in enumerate(found):
            assert [token for index, token in told if index == i] == one.tokens


def compiled() -> tuple[int, int]:
    model = llama()
    parallel = sp_compile.parallelize(model)
    first = sp_compile.generate(parallel, prompts((3, 30, 11)), max_new_tokens=6, logprobs=True, prompt_logprobs=True)
    assert check_greedy(model, prompts((3, 30, 11)), first) <= 1e-5
    before = parallel.compiles
    cache = sp_compile.ShardedCache(parallel)
    for lengths in ((40,), (10, 190), (190, 10, 3)):  # which leave the rows of the first to the last in another order
        found = sp_compile.generate(parallel, prompts(lengths), max_new_tokens=70, eos_token_id=-1, logprobs=True,
                                    prompt_logprobs=True, cache=cache)  # fmt: skip
        assert check_greedy(model, prompts(lengths), found) <= 1e-5
    return before, parallel.compiles


def test_other_requests_compile_nothing_anew(ranks):
    for before, after in ranks(2).run(compiled):
        assert (before, after) == (2, 2)  # prompts that are scored, and tokens that go on


def turns() -> list[float]:
    """Two conversations that go on by turns, one of which ends; a third takes its place."""
    model, (a, b, c) = llama(), prompts((90, 200, 30))
    parallel = sp_compile.parallelize(model, codegen="eager")
    cache, worst = sp_compile.ShardedCache(parallel, page_size=4), []

    def run(parts: dict[int, tuple[torch.Tensor, int, int]]) -> None:
        batch = sp_compile.pack([ids[start:end] for ids, start, end in parts.values()], numbers=[*parts])
        with torch.no_grad():
            out = batch.split(parallel(**batch, past_key_values=cache).logits)
            for (ids, start, end), logits in zip(parts.values(), out, strict=True):
                expected = model(ids[None, :end], use_cache=False).logits[0, start:]
                worst.append(float((logits[0] - expected).abs().max() / expected.abs().max()))

    run({4: (a, 0, 20)})
    run({9: (b, 0, 3), 4: (a, 20, 21)})
    run({4: (a, 21, 50), 9: (b, 3, 130)})  # beyond the room that the second had
    run({9: (b, 130, 131), 4: (a, 50, 90)})  # the queries of one, and the earlier keys of the other
    cache.finish(4)
    with torch.no_grad(), pytest.raises(CacheError, match="request 4 is finished"):
        parallel(**sp_compile.pack([a[:1]], numbers=[4]), past_key_values=cache)
    run({5: (c, 0, 30), 9: (b, 131, 200)})
    assert int(cache.ledger.held.sum()) == 230
    batch = sp_compile.pack([b[:1], c[:2]], numbers=[9, 5])  # not in the order of the row
    with torch.no_grad():
        with pytest.raises(BatchError, match="logits_to_keep counts rows"):
            parallel(**batch, past_key_values=cache, logits_to_keep=1)
        found = parallel(**batch, past_key_values=cache, logits_to_keep=torch.tensor([0, 2, -1])).logits[0]
        expected = [model(torch.cat(each)[None], use_cache=False).logits[0, -1] for each in ((b, b[:1]), (c, c[:2]))]
    worst += [float((found[i] - expected[i > 0]).abs().max() / expected[0].abs().max()) for i in range(3)]
    return worst


def test_packed_requests_go_on_from_what_the_cache_holds_of_them(ranks):
    for worst in ranks(2).run(turns):
        assert max(worst) <= 1e-5, worst


def by_ids_alone() -> list[float]:
    """Without positions the model does not tell requests apart itself, from the second on."""
    model, (a, b) = build("gemma3_text"), prompts((60, 9))
    parallel = sp_compile.parallelize(model, codegen="eager")
    cache, worst = sp_compile.ShardedCache(parallel, page_size=2), []
    for parts in ({0: a[:50]}, {1: b[:8]}, {1: b[8:], 0: a[50:]}):
        batch = sp_compile.pack([*parts.values()], numbers=[*parts])
        with torch.no_grad():
            out = batch.split(parallel(batch["input_ids"], past_key_values=cache).logits)
            for number, logits in zip(parts, out, strict=True):
                length = cache.ledger.length(number)
                expected = model((a, b)[number][None, :length], use_cache=False).logits[0, length - logits.shape[1] :]
                worst.append(float((logits[0] - expected).abs().max() / expected.abs().max()))
    assert [each.window for each in cache.storages] == [20, None]
    return worst


def test_windows_are_the_same_for_requests_that_a_pass_isolates(ranks):
    for worst in ranks(2).run(by_ids_alone):
        assert max(worst) <= 1e-5, worst


def windowed() -> tuple[int, int]:
    model = build("mistral")  # a window of 20
    parallel = sp_compile.parallelize(model, codegen="eager")
    cache = sp_compile.ShardedCache(parallel, page_size=4)
    ids = prompts((120,))[0][None]
    with torch.no_grad():
        parallel(input_ids=ids[:, :60], past_key_values=cache)
        for at in range(60, 120):
            out = parallel(input_ids=ids[:, at : at + 1], past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits[:, -1:]
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    return cache.storages[0].window, cache.tensors[0].shape[2]


def test_layers_of_a_window_keep_no_more_than_that_and_a_page_at_either_end(ranks):
    for window, slots in ranks(2).run(windowed):
        assert window == 20
        assert slots <= 10 + 2 * 4


def refused() -> dict[str, str]:
    model, requests, found = llama(), prompts((5, 9)), {}
    parallel = sp_compile.parallelize(model, codegen="eager")

    def note(name: str, kind: type[Exception], requests: Any = requests, **options: Any) -> None:
        with pytest.raises(kind) as caught:
            sp_compile.generate(parallel, requests, **{"max_new_tokens": 4, **options})
        found[name] = str(caught.value)

    note("typo", ConfigError, temprature=0.5)
    note("beams", ConfigError, num_beams=4)
    note("limit", BatchError, max_new_tokens=None)
    note("limits", BatchError, max_new_tokens=[1])
    note("budget", ConfigError, prefill_tokens=0)
    note("empty", BatchError, requests=[[1], []])
    small = sp_compile.ShardedCache(parallel, max_tokens=8, page_size=2)
    note("room", CacheFullError, cache=small)
    assert small.ledger.requests == []
    sp_compile.generate(parallel, prompts((3,)), max_new_tokens=2, cache=small)
    note("ranks", RankMismatchError, requests=[[3 + parallel.group.rank]])
    rows = sp_compile.ShardedCache(parallel)
    with torch.no_grad():
        parallel(input_ids=requests[0][None], past_key_values=rows)
    note("rows", CacheError, cache=rows)
    return found


def test_what_cannot_be_generated_is_refused_and_leaves_the_cache_empty(ranks):
    for found in ranks(2).run(refused):
        assert "did you mean 'temperature'" in found["typo"]
        assert "num_beams=4 is not served" in found["beams"]
        assert "max_new_tokens is not set" in found["limit"]
        assert "for 2 requests" in found["limits"]
        assert "at least 1" in found["budget"]
        assert "request 1 has length 0" in found["empty"]
        assert "it was made for 8 tokens" in found["room"]
        assert "the values of input_ids" in found["ranks"]
        assert "holds rows [B, S]" in found["rows"]
