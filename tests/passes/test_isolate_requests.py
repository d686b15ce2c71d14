"""Masks are joined with the same-request rule, and what counts rows restarts with every request."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import sp_compile
from sp_compile import ops
from sp_compile.errors import BatchError, ConfigError, RequestsMixedError
from sp_compile.graph_text import lines
from sp_compile.invariants import APART, Violation
from sp_compile.layout import token_layout
from sp_compile.pipeline import build_pipeline, registered_passes
from sp_compile.requests import joined
from tests.models import gpt, llama
from tests.passes.graphs import LENGTHS, Ranks, after, calls, embeds, packed, qkv, repeated, small
from tests.zoo.models import tokens

POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])
SIZES = (23, 1, 43)


def causal_twice(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv(inputs_embeds)
    k, v = repeated(k), repeated(v)
    return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v, is_causal=True)


def bidirectional(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv(inputs_embeds)
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v))


def isolated(forward: Any, inputs: Any = None, **options: Any) -> Any:
    return after("isolate_requests", forward, inputs, isolated=True, **options)


def values(program: Any, inputs: Any) -> Any:
    """What the program computes for requests of :data:`LENGTHS`."""
    return Ranks(program, inputs, token_layout(LENGTHS, 1)).outputs()[0]


def test_masks_are_joined_and_share_their_operands():
    program = isolated(causal_twice, embeds(32))
    first, second = (ops.AttentionArgs(*each.args) for each in calls(program, "sp_compile.attention"))
    assert first.rule == second.rule == "own = le(x0, x1); pair = eq(x2, x3); mask = and(own, pair)"
    assert list(first.operands) == list(second.operands)
    assert [each.args[0].name for each in first.operands[2:]] == ["request_index"] * 2
    assert program.isolation == "2 attention masks joined, 1 counts of rows restarted"


def test_attention_without_a_mask_sees_its_own_request():
    program = isolated(bidirectional, embeds(32))
    (node,) = calls(program, "sp_compile.attention")
    assert ops.AttentionArgs(*node.args).rule == "mask = eq(x0, x1)"
    whole = values(program, embeds(32))[0]
    for part, found in zip(embeds(32)["inputs_embeds"].split(LENGTHS, 1), whole.split(LENGTHS, 2), strict=True):
        torch.testing.assert_close(found, bidirectional(None, part))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("", "mask = eq(x2, x3)"),
        ("bias = copy(x0)", "bias = copy(x0); mask = eq(x2, x3)"),
        ("mask = le(x0, x1); bias = mul(mask, x0)", "own = le(x0, x1); bias = mul(own, x0); pair = eq(x2, x3); "
         "mask = and(own, pair)"),
        ("own = le(x0, x1); mask = not(own)", "own = le(x0, x1); own_ = not(own); pair = eq(x2, x3); "
         "mask = and(own_, pair)"),
    ],
)  # fmt: skip
def test_a_rule_is_joined_whatever_its_names(rule: str, expected: str):
    assert joined(rule, "eq", 2) == expected


def test_row_numbers_restart_but_still_pick_rows_of_the_batch():
    def forward(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> Any:
        rows = torch.arange(inputs_embeds.shape[1]) + 0
        return inputs_embeds + rows[:, None], position_ids[:, 10 - rows], rows, inputs_embeds + position_ids[..., None]

    inputs = {**packed(), "position_ids": 7 + torch.arange(11)[None]}
    moved, picked, rows, _ = values(isolated(forward, inputs), inputs)
    torch.testing.assert_close(moved, inputs["inputs_embeds"] + POSITIONS[:, None])
    assert picked.tolist() == inputs["position_ids"].flip(1).tolist()
    assert rows.tolist() == POSITIONS.tolist()


@pytest.mark.parametrize("start", [0, 3])
def test_counts_that_begin_elsewhere_restart_there(start: int):
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return inputs_embeds + torch.arange(start, start + inputs_embeds.shape[1])[:, None]

    found = values(isolated(forward), embeds())[0]
    torch.testing.assert_close(found, embeds()["inputs_embeds"] + (start + POSITIONS)[:, None])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_running_sums_restart(dtype: torch.dtype):
    def forward(self: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return torch.cumsum((position_ids != 2).to(dtype), 1), inputs_embeds + position_ids[..., None]

    program = isolated(forward, packed())
    parts = (POSITIONS != 2).to(dtype).split(LENGTHS)
    assert values(program, packed())[0][0].tolist() == torch.cat([torch.cumsum(each, 0) for each in parts]).tolist()


def test_running_sums_of_activations_are_left():
    assert calls(isolated(lambda self, inputs_embeds: torch.cumsum(inputs_embeds, 1)), "aten.cumsum")


def test_tables_that_are_cut_to_the_length_are_read_by_position():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return inputs_embeds + self.table[: inputs_embeds.shape[1]]

    table = torch.randn(40, 8)
    found = values(isolated(small(forward, table=table)), embeds())[0]
    torch.testing.assert_close(found, embeds()["inputs_embeds"] + table[POSITIONS])


def test_other_programs_are_left_alone():
    before, program = (after(name, causal_twice, embeds(32)) for name in ("raise_attention", "isolate_requests"))
    assert list(lines(program)) == list(lines(before))
    assert program.isolation == ""


def test_the_mask_stays_joined_up_to_the_local_graph():
    program = after("localize_shapes", causal_twice, embeds(32), isolated=True)  # checked after every pass
    APART.check(program)
    for node in calls(program, "sp_compile.attention"):
        node.args = tuple(ops.AttentionArgs(*node.args)._replace(rule="mask = le(x0, x1)"))
    with pytest.raises(Violation, match="expected a mask that hides other requests, found 'mask = le"):
        APART.check(program)


def test_an_unknown_choice_of_batches_is_refused():
    with pytest.raises(ConfigError, match=r"batches='some' is not known; pass one of packed, all, none"):
        build_pipeline(["normalize", "raise_attention", {"isolate_requests": {"batches": "some"}}])


# on ranks


def pipeline(batches: str) -> list[Any]:
    return [{name: {"batches": batches}} if name == "isolate_requests" else name for name in registered_passes()]


def errors_of_gpt(lengths: tuple[int, ...] = SIZES) -> dict[str, Any]:
    model = gpt()
    parallel = sp_compile.parallelize(model, codegen="eager")
    found = {}
    for name, sizes in {"ragged": lengths, "other lengths": (2, 9, 1, 1, 31), "one": (17,)}.items():
        ids = tokens(sum(sizes)).split(sizes)
        with torch.no_grad():
            out = parallel(sp_compile.pack(ids)["input_ids"])
            alone = torch.cat([model(each[None]) for each in ids], dim=1)
        found[name] = ((out - alone).abs().max() / alone.abs().max()).item()
    found["compiles"] = parallel.compiles
    found["isolation"] = parallel.report().isolation
    found["plain"] = float((parallel(tokens(1, 40)) - model(tokens(1, 40))).abs().max().detach())
    return found


@pytest.mark.parametrize("sp", [1, 2])
def test_a_model_that_counts_its_tokens_itself_is_given_its_requests_apart(ranks, sp: int):
    for found in ranks(sp).run(errors_of_gpt) if sp > 1 else [errors_of_gpt()]:
        assert max(found[name] for name in ("ragged", "other lengths", "one")) <= 1e-5
        assert found["plain"] <= 1e-4
        assert found["compiles"] == 2  # the same graph with its requests isolated, and as it is for one request
        assert found["isolation"] == ""


def test_batches_of_other_tools_are_isolated_where_asked():
    model, ids = llama(num_hidden_layers=1), tokens(67).split(SIZES)
    batch = {name: each.clone() for name, each in sp_compile.pack(ids).items()}
    with torch.no_grad():
        alone = torch.cat([model(each[None]).logits for each in ids], dim=1)
        for batches, right in (("packed", False), ("all", True)):
            parallel = sp_compile.parallelize(model, sp=1, codegen="eager", pipeline=pipeline(batches))
            found = parallel(**batch, use_cache=True).logits  # with a cache the model does not look for requests
            assert bool(((found - alone).abs().max() / alone.abs().max()) <= 1e-5) == right
            assert parallel.isolated == right


def test_none_refuses_what_the_model_would_mix():
    parallel = sp_compile.parallelize(gpt(), sp=1, codegen="eager", pipeline=pipeline("none"))
    with pytest.raises(RequestsMixedError, match=r"models.py:\d+ lets a request see others"):
        parallel(sp_compile.pack([[1, 2], [3]])["input_ids"])


def test_verify_and_report_tell_of_isolated_requests():
    parallel = sp_compile.parallelize(llama(num_hidden_layers=1), sp=1, codegen="eager")
    batch = sp_compile.pack(tokens(67).split(SIZES))
    assert sp_compile.verify(parallel, {**batch, "use_cache": True})
    assert parallel.isolated
    report = parallel.report()
    assert re.search(r"requests isolated: 1 attention masks joined, \d counts of rows restarted", str(report))
    assert report.attention_area_per_rank == [sum(n * (n + 1) // 2 for n in SIZES)]
    assert sp_compile.verify(parallel, batch)
    assert not parallel.isolated


def test_explain_tells_of_isolated_requests():
    batch = sp_compile.pack(tokens(67).split(SIZES))
    report = sp_compile.explain(llama(), {**batch, "use_cache": True}, sp=4)
    assert report.isolation.startswith("2 attention masks joined")
    assert sum(report.attention_area_per_rank) == 2 * sum(n * (n + 1) // 2 for n in SIZES)


def test_tensors_of_different_packed_batches_are_refused():
    first, second = sp_compile.pack([[1, 2], [3]]), sp_compile.pack([[1], [2, 3]])
    parallel = sp_compile.parallelize(llama(), sp=1)
    with pytest.raises(BatchError, match=r"input_ids of \[2, 1\] tokens, position_ids of \[1, 2\] tokens"):
        parallel(input_ids=first["input_ids"], position_ids=second["position_ids"])
