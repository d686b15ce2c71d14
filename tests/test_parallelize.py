"""``parallelize`` on real ranks: sizes, inputs, outputs, and that nothing but the speed changes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import sp_compile
from sp_compile.errors import BatchError, CaptureError, FallbackError, UnsupportedModelError
from tests.models import gpt, llama
from tests.zoo.models import tokens

pytest.importorskip("transformers")

SIZES = [
    (2, "zigzag"),
    pytest.param(2, "contiguous", marks=pytest.mark.slow),
    (3, "zigzag"),
    pytest.param(4, "contiguous", marks=pytest.mark.slow),
    pytest.param(8, "zigzag", marks=pytest.mark.slow),
]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def padded(length: int, side: str) -> dict[str, torch.Tensor]:
    mask = torch.ones(3, length, dtype=torch.int64)
    mask[0, slice(0, 4) if side == "left" else slice(length - 4, length)] = 0
    return {"input_ids": tokens(3, length), "attention_mask": mask}


def packed(*lengths: int) -> dict[str, torch.Tensor]:
    return dict(sp_compile.pack(tokens(sum(lengths)).split(list(lengths))))


BATCHES: dict[str, dict[str, Any]] = {
    "one token": {"input_ids": tokens(1, 1)},
    "two tokens": {"input_ids": tokens(1, 2)},
    "odd length": {"input_ids": tokens(1, 67)},
    "requests of one token": packed(1, 1, 1),
    "requests shorter than sp": packed(2, 1, 5, 1, 3),
    "ragged": packed(23, 1, 43, 7),
    "packed by another tool": {
        "input_ids": tokens(1, 12),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]]),
    },
    "two rows": {"input_ids": tokens(2, 19)},
    "left padding": padded(13, "left"),
    "right padding": padded(13, "right"),
    "embeddings": {"inputs_embeds": torch.randn(1, 21, 64, generator=torch.Generator().manual_seed(1))},
}


def compare_all(scheme: str) -> dict[str, float]:
    """The logits of all batches against the unsharded model's, by one parallel model."""
    model = llama(num_hidden_layers=1)
    parallel = sp_compile.parallelize(model, codegen="eager", scheme=scheme)
    found = {}
    for name, batch in BATCHES.items():
        with torch.no_grad():
            expected, result = model(**batch, use_cache=False), parallel(**batch, use_cache=False)
        assert type(result) is type(expected)
        held = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
        found[name] = error(result.logits[held], expected.logits[held])
    return found


@pytest.mark.parametrize(("sp", "scheme"), SIZES)
def test_any_sizes_are_right(ranks, sp: int, scheme: str):
    for found in ranks(sp).run(compare_all, scheme):
        assert found.keys() == BATCHES.keys()
        assert max(found.values()) <= 1e-5, found


def compare_outputs() -> dict[str, Any]:
    model = llama()
    parallel = sp_compile.parallelize(model, codegen="eager")
    batch, found = packed(23, 1, 43), {}
    for name, options in {
        "last": {"logits_to_keep": 1},
        "last five": {"logits_to_keep": 5},
        "chosen": {"logits_to_keep": torch.tensor([22, 23, 66])},
        "from the end": {"logits_to_keep": torch.tensor([-1, 0, -67])},
        "all": {},
        "hidden states": {"output_hidden_states": True},
        "tuple": {"return_dict": False},
    }.items():
        with torch.no_grad():
            result = parallel(**batch, use_cache=False, **options)
            expected = model(**batch, use_cache=False, **options)
        assert type(result) is type(expected)
        values = {"logits": result[0]} if name == "tuple" else dict(result)
        references = {"logits": expected[0]} if name == "tuple" else dict(expected)
        assert values.keys() == references.keys()
        errors = [error(values["logits"], references["logits"])]
        if name == "hidden states":
            errors += [error(a, b) for a, b in zip(values["hidden_states"], references["hidden_states"], strict=True)]
        found[name] = {"error": max(errors), "bytes": parallel.report().bytes_sent}
    ids = {"input_ids": batch["input_ids"].clone()}  # one request: not what pack made
    with torch.no_grad():
        caches = [each(**ids, use_cache=True).past_key_values for each in (model, parallel)]
    pairs = zip(caches[0].layers, caches[1].layers, strict=True)
    found["cache"] = {"error": max(error(b.keys, a.keys) + error(b.values, a.values) for a, b in pairs), "bytes": 0}
    return found


def test_outputs_are_the_models_own_and_only_kept_tokens_move(ranks):
    for found in ranks(2).run(compare_outputs):
        assert max(each["error"] for each in found.values()) <= 1e-5, found
        keys_and_values = 2 * 34 * 2 * 2 * 8 * 4  # layers, rows, K and V, kv heads, head dim, bytes of fp32
        assert found["last"]["bytes"] == keys_and_values + 1 * 64 * 4
        assert found["chosen"]["bytes"] == keys_and_values + 3 * 64 * 4
        assert found["all"]["bytes"] == keys_and_values + 34 * 128 * 4


def keep_sharded() -> dict[str, Any]:
    model, batch = llama(), packed(23, 1, 43)
    parallel = sp_compile.parallelize(model, codegen="eager", outputs="sharded")
    with torch.no_grad():
        local, whole = parallel(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits
    layout, rank = parallel.layout, parallel.group.rank
    rows = layout.local_index[rank][layout.valid[rank]]
    own = local[0, layout.valid[rank]]
    kinds = [each.kind for each in parallel.report().collectives]
    return {"error": error(own, whole[0, rows]), "rows": rows, "length": local.shape[1], "collectives": kinds}


def test_outputs_may_stay_on_the_ranks_with_their_layout(ranks):
    found = ranks(3).run(keep_sharded)
    assert max(each["error"] for each in found) <= 1e-5
    assert torch.cat([each["rows"] for each in found]).sort().values.tolist() == list(range(67))
    assert {each["length"] for each in found} == {max(len(each["rows"]) for each in found)}
    assert found[0]["collectives"] == ["all_gather"] * 2  # keys and values of two layers, and no logits


def compare_plain_module() -> float:
    model = gpt()
    parallel = sp_compile.parallelize(model, codegen="eager", strict=True)
    ids = tokens(2, 33)
    with torch.no_grad():
        return error(parallel(ids), model(ids))


def test_a_module_without_transformers(ranks):
    assert max(ranks(3).run(compare_plain_module)) <= 1e-5


def errors_in_low_precision(dtype: torch.dtype) -> tuple[float, float]:
    """Against fp64: of the sharded and of the unsharded model."""
    exact, low, batch = llama(torch.float64), llama(dtype), packed(100, 3, 64, 200)
    for reference, rounded in zip(exact.parameters(), low.parameters(), strict=True):
        reference.data.copy_(rounded.data.double())  # the same weights
    parallel = sp_compile.parallelize(low, codegen="eager")
    with torch.no_grad():
        expected, own, found = (each(**batch, use_cache=False).logits.double() for each in (exact, low, parallel))
    norm = expected.norm()
    return ((found - expected).norm() / norm).item(), ((own - expected).norm() / norm).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_at_most_twice_as_far_from_fp64(ranks, dtype: torch.dtype):
    for sharded, unsharded in ranks(2).run(errors_in_low_precision, dtype):
        assert sharded <= 2 * unsharded


def many_batches_compiled() -> tuple[int, float]:
    model = llama(num_hidden_layers=1)
    parallel = sp_compile.parallelize(model)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for _ in range(20):
        lengths = torch.randint(1, 60, (int(torch.randint(1, 6, (1,), generator=generator)),), generator=generator)
        batch = packed(*lengths.tolist(), 2)
        with torch.no_grad():
            worst = max(worst, error(*(each(**batch, use_cache=False).logits for each in (parallel, model))))
    return parallel.compiles, worst


def test_new_mixes_of_lengths_do_not_compile_again(ranks):
    for compiles, worst in ranks(2).run(many_batches_compiled, timeout=900):
        assert compiles <= 2
        assert worst <= 1e-5


def test_one_rank_needs_no_process_group_and_leaves_the_model_as_it_is():
    torch._dynamo.reset()
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parallel = sp_compile.parallelize(model, sp=1)
    batch = packed(23, 1, 43)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        assert error(parallel(**batch, use_cache=False).logits, expected) <= 1e-5
        torch.testing.assert_close(model(**batch, use_cache=False).logits, expected, rtol=0, atol=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert parallel.module is model
    assert parallel.config is model.config
    assert parallel.device == model.device
    assert parallel.generation_config is model.generation_config
    assert inspect.signature(parallel.forward) == inspect.signature(model.forward)
    assert parallel.state_dict().keys() == {f"module.{name}" for name in model.state_dict()}
    assert dict(parallel.named_parameters()).keys() == {f"module.{name}" for name, _ in model.named_parameters()}
    with pytest.raises(AttributeError, match=r"Gpt has no generate\(\)"):
        sp_compile.parallelize(gpt(), sp=1).generate()


def test_a_model_keeps_what_is_on_the_device_for_lengths_and_shares_it_with_none():
    found = []
    for _ in range(2):
        parallel = sp_compile.parallelize(gpt(), sp=1, codegen="eager")
        for _ in range(2):
            parallel(tokens(1, 9))
            found.append(parallel._last[1].index_inputs["rank"])
    first, again, others, _ = found
    assert first is again
    assert first is not others


def test_verify_tells_right_from_wrong():
    torch._dynamo.reset()
    model = llama()
    parallel = sp_compile.parallelize(model, sp=1, codegen="eager")
    batch = {**packed(9, 4), "use_cache": False}
    found = sp_compile.verify(parallel, batch)
    assert found
    assert [each.name for each in found.outputs] == ["logits"]
    with torch.no_grad():  # the unsharded model changes, the compiled one reads a copy
        parallel.module = llama(rms_norm_eps=1e-2)
    assert not sp_compile.verify(parallel, batch)
    assert sp_compile.verify(model, batch, codegen="eager")  # a plain model, on one rank
    with pytest.raises(UnsupportedModelError, match="verify compares whole outputs"):
        sp_compile.verify(sp_compile.parallelize(model, sp=1, outputs="sharded"), batch)


@pytest.mark.parametrize(
    ("batch", "kind", "words"),
    [
        ({}, BatchError, "LlamaForCausalLM.forward needs input_ids or inputs_embeds, got no tensor"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, BatchError, "a batch needs at least 1 token"),
        (
            {"input_ids": tokens(1, 5), "position_ids": torch.tensor([[0, 1, 3, 4, 5]])},
            BatchError,
            "from 1 to 3 at token 2",
        ),
        (
            {"input_ids": tokens(1, 5), "position_ids": torch.arange(4)[None]},
            BatchError,
            "4 positions, input_ids has 5",
        ),
        (
            {"input_ids": tokens(2, 5), "attention_mask": torch.ones(2, 4)},
            BatchError,
            r"attention_mask has shape \[2, 4\]",
        ),
        ({"input_ids": tokens(1, 5).to("meta")}, UnsupportedModelError, "the model is on cpu, but input_ids on meta"),
        ({"input_id": tokens(1, 5)}, BatchError, "needs input_ids or inputs_embeds, got input_id"),
    ],
)
def test_inputs_that_cannot_be_laid_out_are_told(batch: Mapping[str, Any], kind: type[Exception], words: str):
    parallel = sp_compile.parallelize(llama(), sp=1, codegen="eager")
    with pytest.raises(kind, match=words):
        parallel(**batch)


def test_models_that_cannot_be_parallel_are_told():
    model = llama()
    with pytest.raises(UnsupportedModelError, match="the model is parallel already"):
        sp_compile.parallelize(sp_compile.parallelize(model, sp=1), sp=1)
    with pytest.raises(UnsupportedModelError, match=r"expected an nn.Module, got str"):
        sp_compile.parallelize("llama", sp=1)  # type: ignore[arg-type]
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"several devices .*lm_head.weight on meta"):
        sp_compile.parallelize(model, sp=1)
    odd = torch.nn.Linear(2, 2).to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedModelError, match=r"weight is torch\.float8_e4m3fn"):
        sp_compile.parallelize(odd, sp=1)
    training = sp_compile.parallelize(llama().train(), sp=1)
    with pytest.raises(UnsupportedModelError, match="a cache is for inference"):
        training(input_ids=tokens(1, 4), past_key_values=sp_compile.ShardedCache(training))


class Sorts(torch.nn.Module):
    """An op over the token dim that no rule shards."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = False
        self.embed, self.head = torch.nn.Embedding(128, 8), torch.nn.Linear(8, 128)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        return self.head(sum(torch.cumsum(x * scale, dim=1) for scale in range(1, 2 + self.twice)))


def test_strict_refuses_what_would_fall_back_with_its_line():
    model = Sorts().eval()
    found = sp_compile.explain(model, {"input_ids": tokens(1, 9)}, sp=2).fallbacks
    assert [(each.op, each.count, each.bytes) for each in found] == [("aten.cumsum", 1, 9 * 8 * 4 // 2)]
    assert found[0].source.startswith("tests/test_parallelize.py:")
    for many, words in ((False, "nothing else does"), (True, "in all, 2 ops do")):
        model.twice = many
        told = rf"strict=True, but aten.cumsum \(tests/test_parallelize.py:\d+\) falls back: .*; {words}$"
        with pytest.raises(FallbackError, match=told):
            sp_compile.explain(model, {"input_ids": tokens(1, 9)}, sp=2, strict=True)


def test_packed_requests_are_kept_apart_where_a_cache_or_a_mask_makes_the_model_mix_them():
    parallel = sp_compile.parallelize(llama(), sp=1, codegen="eager")
    mask = {"attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    with torch.no_grad():
        alone = torch.cat([parallel.module(each[None]).logits for each in tokens(8).split((5, 3))], dim=1)
        for options, isolated in (({"use_cache": True}, True), (mask, True), ({}, False)):
            assert error(parallel(**packed(5, 3), **options).logits, alone) <= 1e-5
            assert parallel.isolated == isolated
    by_hand = {name: value.clone() for name, value in packed(5, 3).items()}
    parallel(**by_hand, use_cache=True)  # the user's own batch gives what the model makes of it


class Breaks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(128, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        return x * 2 if x.sum().item() > 0 else x


def test_a_graph_break_is_told_with_the_users_line():
    parallel = sp_compile.parallelize(Breaks(), sp=1)
    with pytest.raises(CaptureError, match=r"Breaks does not .* at File .*test_parallelize.py\", line"):
        parallel.eval()(tokens(1, 5))
