"""Masks evaluated on the host, and what is said of packed requests from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import sp_compile
from sp_compile.errors import RequestsMixedError
from sp_compile.masks import keys_per_query
from sp_compile.pipeline import registered_passes
from sp_compile.score_rule import evaluate
from tests.zoo.models import tokens

CAUSAL = "mask = le(x1, x0)"
WINDOW = "t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, 20); mask = and(t0, t2)"
PACKED = "t0 = le(x1, x0); t1 = eq(x2, x3); mask = and(t0, t1)"
PREFIX = "t0 = le(x1, x0); t1 = lt(x1, 7); mask = or(t0, t1)"


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([CAUSAL, WINDOW, PACKED, PREFIX]), st.lists(st.integers(1, 120), min_size=1, max_size=5))
def test_keys_are_counted_exactly(rule: str, lengths: list[int]):
    total = sum(lengths)
    rows, owner = torch.arange(total), torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    operands = [rows[:, None], rows[None, :], owner[:, None], owner[None, :]]
    expected = evaluate(rule, operands, ("mask",))["mask"].expand(total, total).sum(dim=1)
    assert keys_per_query(rule, operands, total).tolist() == expected.tolist()


def test_what_is_not_known_counts_as_seen():
    rows = torch.arange(100)
    rule = "t0 = le(x1, x0); mask = and(t0, x2)"
    found = keys_per_query(rule, [rows[:, None], rows[None, :], None], 100)
    assert found.tolist() == (rows + 1).tolist()
    assert (keys_per_query(rule, [rows[:, None], rows[None, :], None], 100, coarsest=64) >= found).all()


def test_no_mask_sees_all():
    assert keys_per_query("bias = copy(x0)", [torch.zeros(1, 9)], 9).tolist() == [9] * 9


def test_a_matrix_that_was_not_lifted_is_counted():
    matrix = torch.rand(70, 70, generator=torch.Generator().manual_seed(0)) > 0.4
    assert (keys_per_query("mask = copy(x0)", [matrix], 70) == matrix.sum(1).numpy()).all()


class Layer(torch.nn.Module):
    """One attention whose mask is chosen, positions by embedding, and one more op before the head."""

    def __init__(self, mask: str, positions: str = "ids", extra: str = "none") -> None:
        super().__init__()
        self.mask, self.positions, self.extra = mask, positions, extra
        self.embed, self.place = torch.nn.Embedding(128, 16), torch.nn.Embedding(256, 16)
        self.qkv, self.head = torch.nn.Linear(16, 48), torch.nn.Linear(16, 128)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(input_ids.shape[1], device=input_ids.device)
        places = {"ids": position_ids, "rows": rows, "from the end": rows.flip(0)}
        places["of the longest"] = position_ids * 0 + position_ids.max()
        x = self.embed(input_ids) + self.place(places[self.positions])
        q, k, v = (each[:, None] for each in self.qkv(x).split(16, dim=-1))
        owner = torch.cumsum(position_ids[0] == 0, 0)
        keep = rows[:, None] >= rows
        if self.mask != "causal":
            keep = keep & (owner[:, None] == owner)
        if self.mask == "chunks of the row":
            keep = keep & (rows[:, None] // 8 == rows // 8)
        if self.mask == "buckets":
            keep = keep & (torch.div(rows[:, None] - rows, 3, rounding_mode="floor") < 4)
        if self.mask == "inverted float":
            far = (rows[:, None] - rows > 9).to(torch.int64)
            keep = (1.0 - far.type_as(x)) * keep.type_as(x) > 0.5
        if self.mask == "-inf everywhere else":
            keep = torch.full(keep.shape, -torch.inf).masked_fill(keep, 0.0)
        if self.mask == "chunks of the request":
            keep = keep & (position_ids[0][:, None] // 8 == position_ids[0] // 8)
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=keep)[:, 0]
        if self.extra == "convolution":
            x = x + F.conv1d(F.pad(x.transpose(1, 2), (1, 0)), torch.ones(16, 16, 2)).transpose(1, 2)
        if self.extra == "mean":
            x = x + x.mean(dim=1, keepdim=True)
        if self.extra == "length":
            x = x * input_ids.shape[1]
        if self.extra == "first token":
            x = x + x[:, :1]
        return self.head(x)


def explain(model: torch.nn.Module, sp: int, isolate: str = "none") -> Any:
    torch._dynamo.reset()
    pipeline = [{each: {"batches": isolate}} if each == "isolate_requests" else each for each in registered_passes()]
    batch = sp_compile.pack(tokens(31).split((11, 13, 7)))
    return sp_compile.explain(model.eval(), batch, sp=sp, pipeline=pipeline)


@pytest.mark.parametrize("sp", [1, 2])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Layer("causal"), r"the attention at .*test_masks.py:\d+ lets a request see others"),
        (Layer("chunks of the row"), r"the mask of the attention at .*test_masks.py:\d+ depends on where in the row"),
        (Layer("packed", positions="rows"), r"aten.add .*test_masks.py:\d+\) takes the place of a token in the row"),
        (Layer("packed", positions="of the longest"), r"aten.add .*\) takes the place of a token in the row"),
        (Layer("packed", extra="length"), r"aten.mul .*test_masks.py:\d+\) takes the place of a token in the row"),
        (Layer("packed", extra="convolution"), r"aten.constant_pad_nd .* computes over the tokens of the whole row"),
        (Layer("packed", extra="mean"), r"aten.mean .*test_masks.py:\d+\) computes over the tokens of the whole row"),
        (Layer("packed", extra="first token"), r"aten.add .*test_masks.py:\d+\) brings single tokens to all others"),
    ],
    ids=lambda each: "-".join((each.mask, each.positions, each.extra)) if isinstance(each, Layer) else "",
)
def test_what_mixes_packed_requests_is_named(model: Layer, words: str, sp: int):
    with pytest.raises(RequestsMixedError, match=words):
        explain(model, sp)


@pytest.mark.parametrize("positions", ["of the longest", "from the end"])
def test_positions_that_do_not_restart_are_refused_though_requests_are_isolated(positions: str):
    with pytest.raises(RequestsMixedError, match="takes the place of a token in the row"):
        explain(Layer("causal", positions=positions), 2, isolate="packed")


@pytest.mark.parametrize("model", [Layer("causal"), Layer("chunks of the row"), Layer("packed", positions="rows")])
def test_what_can_be_isolated_is_not_refused(model: Layer):
    assert "1 attention masks joined" in explain(model, 2, isolate="packed").isolation


@pytest.mark.parametrize("mask", ["packed", "chunks of the request"])
def test_requests_that_are_kept_apart_are_taken(mask: str):
    report = explain(Layer(mask), 2)
    assert report.fallbacks == []
    sizes = (11, 13, 7)
    whole = [n * (n + 1) // 2 for n in sizes]
    chunked = [sum(c * (c + 1) // 2 for c in (8, n - 8) if c > 0) if n > 8 else n * (n + 1) // 2 for n in sizes]
    assert sum(report.attention_area_per_rank) == sum(whole if mask == "packed" else chunked)


def test_the_area_of_a_rank_is_that_of_its_rows():
    report = explain(Layer("packed"), 2)
    counts = np.concatenate([np.arange(1, n + 1) for n in (11, 13, 7)])
    layout = sp_compile.token_layout((11, 13, 7), 2, min_shard_length=2)
    expected = [int(counts[layout.local_index[r][layout.valid[r]].numpy()].sum()) for r in range(2)]
    assert report.attention_area_per_rank == expected


def error_on_ranks(mask: str) -> tuple[float, int]:
    model = Layer(mask).eval()
    inputs = {"input_ids": tokens(1, 31), "position_ids": torch.cat([torch.arange(n) for n in (11, 13, 7)])[None]}
    torch.manual_seed(0)
    for each in model.parameters():
        torch.nn.init.normal_(each)
    parallel = sp_compile.parallelize(model, codegen="eager")
    with torch.no_grad():
        found, expected = parallel(**inputs), model(**inputs)
    return ((found - expected).abs().max() / expected.abs().max()).item(), len(parallel.report().fallbacks)


@pytest.mark.parametrize("mask", ["packed", "buckets", "inverted float", "-inf everywhere else", "chunks of the row"])
def test_masks_that_are_lifted_are_right_on_ranks(ranks, mask: str):
    for error, fallbacks in ranks(3).run(error_on_ranks, mask):
        assert error <= 1e-5
        assert fallbacks == 0
