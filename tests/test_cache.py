"""Forwards that go on from a cache, and ``generate``: the same as the unsharded model's, on any number of ranks."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import sp_compile
from sp_compile.errors import BatchError, CacheError, CacheFullError, RankMismatchError, RequestsMixedError
from sp_compile.steps import Kept
from tests.models import llama
from tests.on_device import of_lower_precision
from tests.zoo.models import build, tokens

pytest.importorskip("transformers")

# grouped heads, windows shorter than the prompt, local and global layers, learned positions, sinks, MLA, experts
MODELS = ["llama", "qwen3", "mistral", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3", "mixtral"]
SOME = ("llama", "gemma3_text", "gpt_oss", "deepseek_v3")  # the others take long


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def in_chunks(name: str, codegen: str, chunks: list[list[int]], padded: bool = False) -> list[float]:
    """The largest error of the logits of prefills in these chunks, against one forward of the unsharded model."""
    model = build(name)
    parallel = sp_compile.parallelize(model, codegen=codegen)
    length = sum(chunks[0])
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.int64)
    mask[0, : 5 if padded else 0] = 0
    found = []
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for sizes in chunks:
            cache, at, errors = sp_compile.ShardedCache(parallel, page_size=4), 0, []
            for size in sizes:
                end = at + size
                out = parallel(input_ids=ids[:, at:end], attention_mask=mask[:, :end], past_key_values=cache)
                assert out.past_key_values is cache
                rows = mask[:, at:end].bool()
                if rows.any():
                    errors.append(error(out.logits[rows], expected[:, at:end][rows]))
                at = end
            assert cache.get_seq_length() == length
            found.append(max(errors))
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in SOME else pytest.mark.slow) for each in MODELS]
)
def test_a_prefill_in_chunks_gives_the_logits_of_one_in_a_piece(ranks, name: str):
    chunks = [[41], [1] * 3 + [7, 13, 1, 1, 16], [20, 20, 1]]
    for found in ranks(2).run(in_chunks, name, "eager", chunks, padded=True):
        assert max(found) <= 1e-5, found


@pytest.mark.parametrize("sp", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_more_ranks_than_new_tokens(ranks, sp: int):
    for found in ranks(sp).run(in_chunks, "llama", "eager", [[1] * 12, [2, 1, 9]]):
        assert max(found) <= 1e-5, found


def test_one_rank():
    assert max(in_chunks("llama", "eager", [[1] * 12, [3, 9]])) <= 1e-5


class Numbers:
    """A tokenizer for which text is the numbers of tokens."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"{each} " for each in ids)


def generated(name: str, codegen: str) -> dict[str, bool]:
    model = build(name)
    from transformers import TextIteratorStreamer

    parallel = sp_compile.parallelize(model, codegen=codegen)
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4], mask[2, :1] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 2}
    found = {}
    streamer = TextIteratorStreamer(Numbers(), skip_prompt=True)  # type: ignore[arg-type]
    parallel.generate(ids[1:2], max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0, streamer=streamer)
    whole = model.generate(ids[1:2], max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found["streamed"] = "".join(streamer) == Numbers().decode(whole[0, 9:].tolist())
    for kind, more in {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
        "beams": {"num_beams": 3, "do_sample": False},
        "prefill in chunks": {"prefill_chunk_size": 4, "do_sample": False},
    }.items():
        results = []
        for each in (model, parallel):
            torch.manual_seed(5)
            results.append(each.generate(ids, **options, **more))
        found[kind] = torch.equal(*results)
    return found


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(each, marks=pytest.mark.slow) for each in ("mistral", "gpt2"))]
)
def test_generate_gives_the_tokens_of_the_unsharded_model(ranks, name: str):
    for found in ranks(2).run(generated, name, "eager"):
        assert all(found.values()), found


def counted() -> tuple[int, int, float]:
    model = llama()
    parallel = sp_compile.parallelize(model)
    ids, cache, worst = tokens(1, 100), sp_compile.ShardedCache(parallel, page_size=8), 0.0
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        parallel(input_ids=ids[:, :20], past_key_values=cache)
        first = parallel.compiles
        for at, end in [*((at, at + 1) for at in range(20, 40)), (40, 48), (48, 75), (75, 100)]:
            out = parallel(input_ids=ids[:, at:end], past_key_values=cache).logits
            worst = max(worst, error(out, expected[:, at:end]))
    return parallel.compiles - first, cache.nbytes, worst


def test_one_compilation_serves_decode_and_extension_while_the_cache_grows(ranks):
    for compiles, held, worst in ranks(2).run(counted):
        assert compiles == 2  # queries go to earlier keys, and some go while earlier keys come
        assert held == 2 * 2 * 2 * 8 * 56 * 4  # layers, K and V, kv heads, head dim, slots in pages of 8
        assert worst <= 1e-5


def moved(past: int, new: int) -> tuple[list[tuple[str, int]], float]:
    """What crosses for the attention of both layers when ``new`` tokens follow, and the error."""
    model = llama()
    parallel, ids = sp_compile.parallelize(model, codegen="eager"), tokens(2, past + new)
    cache = sp_compile.ShardedCache(parallel, page_size=4)
    with torch.no_grad():
        parallel(input_ids=ids[:, :past], past_key_values=cache)
        out = parallel(input_ids=ids[:, past:], past_key_values=cache).logits
        expected = model(input_ids=ids, use_cache=False).logits[:, past:]
    crossing = [(each.kind, each.bytes_sent) for each in parallel.report().collectives]
    return crossing[:-1], error(out, expected)  # the last are the logits


ROW = 2 * 4  # of the batch, and bytes of a number


@pytest.mark.parametrize(
    ("past", "new", "crossing"),
    [
        # new keys and values with the queries, and partial outputs with an exponent each
        (80, 16, [("all_gather", 8 * (2 * 2 + 8) * 8 * ROW), ("all_to_all", 8 * 8 * (8 + 1) * ROW)]),
        # new and earlier keys and values; no query, of which two rows are moved all the same
        (40, 16, [("all_gather", 8 * 2 * 2 * 8 * ROW), ("all_gather", 20 * 2 * 2 * 8 * ROW),
                  ("all_gather", 2 * 8 * 8 * ROW), ("all_to_all", 2 * 8 * (8 + 1) * ROW)]),
    ],
)  # fmt: skip
def test_what_is_fewer_bytes_goes_to_the_other(ranks, past: int, new: int, crossing: list[tuple[str, int]]):
    for found, worst in ranks(2).run(moved, past, new):
        assert sorted(found) == sorted(2 * crossing)
        assert worst <= 1e-5


@pytest.mark.parametrize("kernel", ["tiles", "flex"])
def test_a_cache_may_have_another_dtype_than_the_model(ranks, kernel: str):
    for half, eighth, used in ranks(2).run(of_lower_precision, "cpu", kernel=kernel, codegen="eager"):
        assert used == {kernel}
        assert 1e-6 < half < 2e-2
        assert half < eighth < 0.3


def refused() -> dict[str, str]:
    model = llama()
    parallel, other = (sp_compile.parallelize(each, codegen="eager") for each in (model, llama()))
    ids, found = tokens(2, 12), {}

    def note(name: str, kind: type[Exception], **inputs: Any) -> None:
        with torch.no_grad(), pytest.raises(kind) as caught:
            (other if name == "model" else parallel)(**inputs)
        found[name] = str(caught.value)

    cache = sp_compile.ShardedCache(parallel, max_tokens=8, page_size=2)
    with torch.no_grad():
        before = parallel(input_ids=ids[:, :5], past_key_values=cache).logits
    note("room", CacheFullError, input_ids=ids[:, 5:], past_key_values=cache)
    note("rows", BatchError, input_ids=ids[:1, 5:6], past_key_values=cache)
    note("mask", BatchError, input_ids=ids[:, 5:6], attention_mask=torch.ones(2, 5), past_key_values=cache)
    note("model", CacheError, input_ids=ids[:, 5:6], past_key_values=cache)
    own = ids + parallel.group.rank
    note("ranks", RankMismatchError, input_ids=own[:, 5:6], past_key_values=cache)
    with torch.no_grad():
        expected = model(input_ids=ids[:, :7], use_cache=False).logits
        assert error(parallel(input_ids=ids[:, 5:7], past_key_values=cache).logits, expected[:, 5:]) <= 1e-5
    assert error(before, expected[:, :5]) <= 1e-5
    cache.tensors[0].zero_()
    note("edited", CacheError, input_ids=ids[:, 5:6], past_key_values=cache)
    return found


def test_what_does_not_fit_is_refused_and_the_cache_stays_as_it_was(ranks):
    for found in ranks(2).run(refused):
        assert "it was made for 8 tokens" in found["room"]
        assert "has 1 rows, the cache 2" in found["rows"]
        assert "pass [2, 6]" in found["mask"]
        assert "made for another model" in found["model"]
        assert "the values of input_ids" in found["ranks"]
        assert "changed since the last forward" in found["edited"]


def test_a_cache_may_be_passed_by_its_place():
    model = llama()
    parallel = sp_compile.parallelize(model, sp=1, codegen="eager")
    ids, cache = tokens(1, 9), sp_compile.ShardedCache(parallel)
    with torch.no_grad():
        parallel(ids[:, :6], None, None, cache)
        found = parallel(ids[:, 6:], None, None, cache).logits
        assert error(found, model(ids, use_cache=False).logits[:, 6:]) <= 1e-5


def test_what_earlier_tokens_came_without_is_refused_later_but_for_positions():
    parallel = sp_compile.parallelize(build("gpt2"), sp=1, codegen="eager")
    ids, cache = tokens(1, 9), sp_compile.ShardedCache(parallel)
    with torch.no_grad():
        parallel(input_ids=ids[:, :6], past_key_values=cache)
        with pytest.raises(BatchError, match="token_type_ids was not passed in earlier calls"):
            parallel(input_ids=ids[:, 6:], token_type_ids=ids[:, 6:], past_key_values=cache)
        found = parallel(input_ids=ids[:, 6:], position_ids=torch.tensor([[6, 7, 8]]), past_key_values=cache).logits
        assert error(found, parallel.module(ids, use_cache=False).logits[:, 6:]) <= 1e-5
        with pytest.raises(BatchError, match="position_ids was passed in earlier calls"):
            parallel(input_ids=ids[:, :1], past_key_values=cache)


def filled_before_generate(name: str) -> tuple[list[int], list[int]]:
    model, ids = build(name), tokens(2, 13)
    parallel = sp_compile.parallelize(model, codegen="eager")
    cache = sp_compile.ShardedCache(parallel, page_size=2)
    with torch.no_grad():
        for at, end in ((0, 5), (5, 12)):
            parallel(input_ids=ids[:, at:end], past_key_values=cache)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    return parallel.generate(ids, past_key_values=cache, **options).tolist(), expected.tolist()


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_generate_goes_on_from_a_cache_that_plain_forwards_filled(ranks, name: str):
    for found, expected in ranks(2).run(filled_before_generate, name):
        assert found == expected


def test_hidden_states_come_for_the_new_tokens_of_a_model_that_never_recorded_them():
    model = llama()
    parallel = sp_compile.parallelize(model, sp=1, codegen="eager")
    ids, cache = tokens(1, 9), sp_compile.ShardedCache(parallel)
    with torch.no_grad():
        parallel(input_ids=ids[:, :6], past_key_values=cache, output_hidden_states=True)
        found = parallel(input_ids=ids[:, 6:], past_key_values=cache, output_hidden_states=True).hidden_states
        expected = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    assert max(error(a, b[:, 6:]) for a, b in zip(found, expected, strict=True)) <= 1e-5


class Foreseeing(torch.nn.Module):
    """Sees the last rows of all there are from nowhere but themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, 32)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        rows = torch.arange(x.shape[1])
        seen = (rows[None] <= rows[:, None]) & ((rows[None] < x.shape[1] - 3) | (rows[None] == rows[:, None]))
        heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=seen[None, None])
        return {"logits": out.transpose(1, 2).flatten(2)}


def test_a_mask_that_rests_on_tokens_to_come_is_refused_for_requests_that_grow():
    parallel = sp_compile.parallelize(Foreseeing().eval(), sp=1, codegen="eager")
    cache = sp_compile.ShardedCache(parallel)
    with torch.no_grad(), pytest.raises(RequestsMixedError, match="depends on how many tokens will follow"):
        parallel(**sp_compile.pack([[5] * 9]), past_key_values=cache)
    assert cache.get_seq_length() == 0


def cropped_and_reset() -> list[float]:
    model = llama()
    parallel = sp_compile.parallelize(model, codegen="eager")
    ids, cache = tokens(2, 20), sp_compile.ShardedCache(parallel, page_size=2)
    found = []
    with torch.no_grad():
        parallel(input_ids=ids.flip(1), past_key_values=cache)
        cache.reset()
        parallel(input_ids=torch.cat([ids[:, :9], ids[:, :8]], dim=1), past_key_values=cache)
        cache.crop(-8)
        out = parallel(input_ids=ids[:, 9:12], past_key_values=cache).logits
        expected = model(input_ids=ids, use_cache=False).logits
        found.append(error(out, expected[:, 9:12]))
        cache.reorder_cache(torch.tensor([1, 1]))
        out = parallel(input_ids=ids[[1, 1], 12:], past_key_values=cache).logits
        found.append(error(out, expected[[1, 1], 12:]))
    return found


def test_a_cache_is_cropped_reordered_and_reset(ranks):
    for found in ranks(3).run(cropped_and_reset):
        assert max(found) <= 1e-5


SAVED = {True: "gemma3_text", False: "mistral"}  # local and global layers, and local ones


def saved(folder: str, packed: bool, dtype: torch.dtype | None) -> None:
    parallel = sp_compile.parallelize(build(SAVED[packed]), codegen="eager")
    cache, ids = sp_compile.ShardedCache(parallel, page_size=4, dtype=dtype), tokens(2, 60)
    batch = sp_compile.pack([ids[0, :50], ids[1, :3]], numbers=[3, 8]) if packed else {"input_ids": ids[:, :50]}
    with torch.no_grad():
        parallel(**batch, past_key_values=cache)
    cache.save(folder)


def loaded(folder: str, packed: bool) -> float:
    model = build(SAVED[packed])
    parallel = sp_compile.parallelize(model, codegen="eager")
    cache, ids = sp_compile.ShardedCache.load(folder, parallel, page_size=2), tokens(2, 60)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        if not packed:
            return error(parallel(input_ids=ids[:, 50:], past_key_values=cache).logits, expected[:, 50:])
        batch = sp_compile.pack([ids[1, 3:], ids[0, 50:]], numbers=[8, 3])
        b, a = batch.split(parallel(**batch, past_key_values=cache).logits)
    return max(error(a, expected[:1, 50:]), error(b, expected[1:, 3:]))


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_saved_cache_goes_on_with_another_number_of_ranks(ranks, tmp_path, packed: bool):
    ranks(3).run(saved, str(tmp_path), packed, None)
    assert {each.name for each in tmp_path.iterdir()} == {"layout.json", "inputs.safetensors", *(
        f"rank-{rank}.safetensors" for rank in range(3))}  # fmt: skip
    for worst in ranks(2).run(loaded, str(tmp_path), packed):
        assert worst <= 1e-5
    assert loaded(str(tmp_path), packed) <= 1e-5
    with pytest.raises(CacheError, match=r"holds the cache of a \w+; this is a LlamaForCausalLM"):
        sp_compile.ShardedCache.load(tmp_path, sp_compile.parallelize(llama(), sp=1))
    (tmp_path / "rank-1.safetensors").unlink()
    with pytest.raises(CacheError, match=r"rank-1\.safetensors cannot be read"):
        loaded(str(tmp_path), packed)
    with pytest.raises(CacheError, match="holds no saved cache"):
        sp_compile.ShardedCache.load(tmp_path / "nowhere", sp_compile.parallelize(llama(), sp=1))


def test_a_loaded_cache_knows_what_it_does_not_have(tmp_path):
    saved(str(tmp_path), False, None)
    parallel = sp_compile.parallelize(build("mistral"), sp=1)
    cache = sp_compile.ShardedCache.load(tmp_path, parallel, page_size=64)
    with pytest.raises(CacheError, match="cannot go back to 40 tokens"):
        cache.crop(-10)
    before = (tmp_path / "layout.json").read_text()
    cache.reset()
    with pytest.raises(CacheError, match="nothing to save"):
        cache.save(tmp_path)
    assert (tmp_path / "layout.json").read_text() == before


def test_a_model_keeps_nothing_of_a_cache_alive(monkeypatch: pytest.MonkeyPatch):
    given, fails = [], False

    def noting(cache: sp_compile.ShardedCache, kept: Kept) -> None:
        given.extend(map(weakref.ref, kept.tensors))
        if fails:
            raise CacheError("not now")
        commit(cache, kept)

    commit = sp_compile.ShardedCache.commit
    monkeypatch.setattr(sp_compile.ShardedCache, "commit", noting)
    parallel = sp_compile.parallelize(llama(), sp=1, codegen="eager")
    cache, ids = sp_compile.ShardedCache(parallel), tokens(1, 12)
    with torch.no_grad():
        for at, end in ((0, 9), (9, 11), (11, 12)):
            fails = end == 12
            try:
                parallel(input_ids=ids[:, at:end], past_key_values=cache)
            except CacheError:
                assert fails
    gc.collect()
    assert len(given) == 12
    assert all(each() is None for each in given)
    held = [weakref.ref(each) for each in cache.tensors]
    del cache
    gc.collect()
    assert all(each() is None for each in held)
    assert "attention" in str(parallel.report()), "what the last forward ran is known all the same"


def test_a_cache_goes_on_whether_under_inference_mode_or_not():
    parallel = sp_compile.parallelize(llama(), sp=1, codegen="eager")
    cache, ids = sp_compile.ShardedCache(parallel, page_size=4), tokens(2, 12)
    with torch.no_grad():
        expected = parallel.module(ids.flip(0), use_cache=False).logits
    for at, end, mode in ((0, 5, torch.inference_mode), (5, 6, torch.no_grad), (6, 12, torch.inference_mode)):
        with mode():
            logits = parallel(ids[:, at:end], past_key_values=cache).logits
            cache.reorder_cache(torch.tensor([1, 0]))
            ids = ids.flip(0)
    assert error(logits.clone().flip(0), expected[:, 6:]) <= 1e-5


def test_a_saved_fp8_cache_is_one_again(tmp_path):
    saved(str(tmp_path), False, torch.float8_e4m3fn)
    parallel = sp_compile.parallelize(build(SAVED[False]), sp=1)
    cache = sp_compile.ShardedCache.load(tmp_path, parallel)
    assert {each.dtype for each in cache.tensors} == {torch.float8_e4m3fn}
    assert 1e-6 < loaded(str(tmp_path), False) < 0.3
