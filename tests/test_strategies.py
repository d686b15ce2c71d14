"""Every strategy gives what the unsharded model gives, and moves as many bytes as it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sp_compile
from sp_compile.errors import StrategyError
from sp_compile.needs import Fetch, Reach, fetched_rows, ring_stages
from tests.attention_kinds import KINDS
from tests.models import llama
from tests.test_attention import check
from tests.test_attention import run as run_kind
from tests.test_cache import error
from tests.zoo.models import build

MIXES = [[40], [30, 1, 1, 50], [9, 9, 8, 8, 7, 7], [5, 17]]
ROW = 2 * 2 * 8 * 4  # keys and values, kv heads, head dim, bytes of fp32


def requests(lengths: list[int]) -> sp_compile.PackedBatch:
    generator = torch.Generator().manual_seed(sum(lengths))
    return sp_compile.pack([torch.randint(3, 100, (each,), generator=generator) for each in lengths])


def ran(name: str, mixes: list[list[int]], **options: Any) -> list[tuple[float, list[tuple[str, int]], int, Any]]:
    """For each mix: error, what crosses for attention, compilations so far, and the layout."""
    model, found = llama() if name == "llama" else build(name), []
    parallel = sp_compile.parallelize(model, **{"codegen": "eager", **options})
    for lengths in mixes:
        batch = requests(lengths)
        with torch.no_grad():
            logits = batch.split(parallel(**batch, use_cache=False).logits)
            alone = [model(each, use_cache=False).logits for each in batch.split(batch["input_ids"])]
        worst = max(error(*pair) for pair in zip(logits, alone, strict=True))
        crossing = [(each.kind, each.bytes_sent) for each in parallel.report().collectives][:-1]  # but the logits
        found.append((worst, crossing, parallel.compiles, parallel.layout))
    return found


@pytest.mark.parametrize(
    ("sp", "scheme"), [(2, "zigzag"), (3, "whole"), pytest.param(4, "chunked", marks=pytest.mark.slow)]
)
def test_a_rank_fetches_what_its_queries_see(ranks, sp: int, scheme: str):
    for rank, each in enumerate(ranks(sp).run(ran, "llama", MIXES, attention="fetch", scheme=scheme)):
        for worst, crossing, compiles, layout in each:
            assert worst <= 1e-5
            sent = len(fetched_rows(layout, rank, Fetch(Reach(None, 0)), True)[0])
            assert crossing == [("exchange", sent * ROW)] * 2
            assert compiles == 1


@pytest.mark.parametrize("strategy", ["fetch", "ring"])
def test_generated_code_serves_all_mixes(ranks, strategy: str):
    for each in ranks(2).run(ran, "llama", MIXES, attention=strategy, timeout=900):
        assert max(worst for worst, *_ in each) <= 1e-5
        assert {compiles for _, _, compiles, _ in each} == {1}


def test_the_best_for_each_batch_and_layer(ranks):
    """Local and global layers: which moves what depends on the batch."""
    slow = {"link_rate": 1e5, "compute_rate": 2.5e6}
    first, _ = ranks(2).run(ran, "gemma3_text", MIXES, attention="auto", scheme="auto", **slow)
    assert max(worst for worst, *_ in first) <= 1e-5
    kinds = [[kind for kind, _ in crossing] for _, crossing, _, _ in first]
    assert kinds[2] == []  # short requests, each whole on a rank
    halo, whole = kinds[1]
    assert halo == "exchange"
    assert whole in ("exchange", "all_gather")  # the rank that needs most needs almost all
    assert [layout.scheme for *_, layout in first][2] == "whole"


def padded(strategy: str) -> float:
    """Rows that see no key get the mean of all values from an eager softmax, whoever holds these."""
    model, ids, mask = llama(attn_implementation="eager"), requests([23])["input_ids"].repeat(2, 1), torch.ones(2, 23)
    mask[0, :7] = 0
    parallel = sp_compile.parallelize(model, codegen="eager", attention=strategy)
    with torch.no_grad():
        found, expected = (each(input_ids=ids, attention_mask=mask).logits for each in (parallel, model))
    return error(found, expected)


@pytest.mark.parametrize(("sp", "scheme"), [(3, "zigzag"), pytest.param(4, "contiguous", marks=pytest.mark.slow)])
def test_a_ring_moves_what_a_fetch_does_a_rank_at_a_time(ranks, sp: int, scheme: str):
    for rank, each in enumerate(ranks(sp).run(ran, "llama", MIXES, attention="ring", scheme=scheme)):
        for worst, crossing, compiles, layout in each:
            assert worst <= 1e-5
            stages = [fetched_rows(layout, rank, Fetch(Reach(None, 0), stage), True)[0] for stage in ring_stages(sp)]
            assert crossing == [("exchange", len(sent) * ROW) for sent in stages] * 2
            assert compiles == 1


def test_heads_within_nodes_and_keys_and_values_across(ranks):
    """8 query and 2 key/value heads over 2 nodes of 2 ranks."""
    for each in ranks(4).run(ran, "llama", MIXES, attention="hybrid", ranks_per_node=2):
        for worst, crossing, compiles, layout in each:
            assert worst <= 1e-5
            row = layout.shard_length * 8 * 4
            within = ("all_to_all", row * (8 + 2 * 2) // 2)  # queries, keys and values to the other rank of the node
            across = ("all_gather", 2 * row * 2)  # of both ranks' rows, keys and values of one head
            back = ("all_to_all", row * 8 // 2)
            assert crossing == [within, across, back] * 2
            assert compiles == 1


LATENTS = {"link_rate": 5e7, "compute_rate": 5e10}  # a byte is worth 1,000 operations
FORMULAS = {  # bytes of a token that cross in each layer, in fp32
    "llama 8:2": ("llama", {}, 2 * 2 * 8 * 4),
    "MLA": ("deepseek_v3", LATENTS, (32 + 8) * 4),  # the latent, and the rotary part of all heads
    "MLA, where computing is dear": ("deepseek_v3", {"link_rate": 5e12, "compute_rate": 5e10}, 4 * (16 + 8 + 16) * 4),
    "hidden state": ("gpt2", LATENTS, 64 * 4),  # of 2 * 64
}


@pytest.mark.parametrize("case", FORMULAS)
def test_bytes_of_a_layer_are_those_of_the_formula(case: str):
    name, options, bytes_of_token = FORMULAS[case]
    model = llama() if name == "llama" else build(name)
    report = sp_compile.explain(model, {**requests([37, 8]), "use_cache": False}, sp=5, **options)
    *layers, _ = [each.bytes_sent for each in report.collectives]  # the last are the logits
    assert layers == [4 * report.shard_length * bytes_of_token] * 2


@pytest.mark.parametrize("strategy", ["allgather_kv", "ulysses", "hybrid", "fetch"])
def test_reports_tell_bytes_by_the_formulas(strategy: str):
    options = {"attention": strategy, "ranks_per_node": 2 if strategy == "hybrid" else None}
    report = sp_compile.explain(llama(), {**requests([37, 8]), "use_cache": False}, sp=4, **options)
    assert report.bytes_by_formula is not None
    if strategy == "fetch":  # the formula tells what the rank receives that gets most, the report what rank 0 sends
        assert 0.5 < report.bytes_sent / report.bytes_by_formula < 2
    else:
        assert report.bytes_by_formula == report.bytes_sent


@pytest.mark.parametrize("strategy", [pytest.param("allgather_kv", marks=pytest.mark.slow), "ring"])
def test_keys_expanded_from_latents_that_crossed_are_right(ranks, strategy: str):
    found = ranks(3).run(ran, "deepseek_v3", MIXES[:2], attention=strategy, **LATENTS)
    for each in found:
        assert max(worst for worst, *_ in each) <= 1e-5


def test_bytes_of_a_window_are_its_halo():
    """Each rank's first rows see 7 rows of the one before."""
    model = build("mistral")
    window = model.config.sliding_window
    options = {"attention": "window", "scheme": "contiguous"}
    report = sp_compile.explain(model, {**requests([90]), "use_cache": False}, sp=3, **options)
    *layers, _ = [each.bytes_sent for each in report.collectives]
    kv = 2 * model.config.num_key_value_heads * model.config.head_dim * 4
    assert layers == [(window - 1) * kv] * len(layers)
    assert report.strategies == ["window"] * len(layers)


@pytest.mark.parametrize("strategy", ["fetch", "ulysses"])
def test_rows_that_see_nothing_are_as_in_the_model(ranks, strategy: str):
    for worst in ranks(2).run(padded, strategy):
        assert worst <= 1e-5


class Summed(nn.Module):
    """Causal attention of which some inputs are running sums over tokens, which are computed on gathered tokens."""

    def __init__(self, summed: str) -> None:
        super().__init__()
        self.summed = summed

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        parts = dict(zip("qkv", inputs_embeds.unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4), strict=True))
        for name in self.summed:
            parts[name] = parts[name].cumsum(2) / 10
        return F.scaled_dot_product_attention(*parts.values(), is_causal=True)


def of_sums(strategy: str) -> list[float]:
    found = []
    for summed in ("q", "k", "kv", "qkv"):
        model = Summed(summed).eval()
        parallel = sp_compile.parallelize(model, codegen="eager", attention=strategy)
        for length in (64, 37):
            x = torch.randn(1, length, 96, generator=torch.Generator().manual_seed(length))
            found.append(error(parallel(inputs_embeds=x), model(inputs_embeds=x)))
    return found


@pytest.mark.parametrize("strategy", ["allgather_kv", pytest.param("fetch", marks=pytest.mark.slow), "ulysses"])
def test_queries_and_keys_that_every_rank_has_whole(ranks, strategy: str):
    for found in ranks(2).run(of_sums, strategy):
        assert max(found) <= 1e-5


def refused() -> dict[str, str]:
    found = {}
    for name, options in {"window": {"attention": "window"}, "local": {"attention": "local"}}.items():
        parallel = sp_compile.parallelize(llama(num_hidden_layers=1), codegen="eager", **options)
        with torch.no_grad(), pytest.raises(StrategyError) as caught:
            parallel(**requests([30, 20]), use_cache=False)
        found[name] = str(caught.value)
    return found


def test_what_does_not_apply_is_refused_with_what_would(ranks):
    for found in ranks(2).run(refused):
        assert "sets no bound on how far back a query sees; what applies is allgather_kv, fetch," in found["window"]
        assert "use scheme='whole' and short requests from pack, or attention='fetch'" in found["local"]


def test_a_cache_shares_new_keys_out_whatever_the_strategy(ranks):
    for worst in ranks(2).run(with_cache):
        assert worst <= 1e-5


def with_cache() -> float:
    model = llama(num_hidden_layers=1)
    parallel = sp_compile.parallelize(model, codegen="eager", attention="auto", scheme="auto")
    cache, ids, worst = sp_compile.ShardedCache(parallel), requests([40])["input_ids"], 0.0
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for start, end in ((0, 30), (30, 31), (31, 40)):
            found = parallel(input_ids=ids[:, start:end], past_key_values=cache).logits
            worst = max(worst, error(found, expected[:, start:end]))
    return worst


FAST = {  # at sp=3 in fp32
    "fetch": ["window", "packed", "MLA"],
    "ring": ["window", "packed", "sinks", "padded left"],
    "ulysses": ["ALiBi", "sinks", "relative bias per head", "MLA"],
    "hybrid": [],
}
CASES = [
    pytest.param(sp, strategy, kind, dtype, marks=[] if (sp, dtype) == (3, torch.float32) and kind in FAST[strategy]
                 else pytest.mark.slow)
    for sp in (2, 3, 4) for strategy in FAST for kind in KINDS for dtype in (torch.float32, torch.bfloat16)
    if strategy != "hybrid" or sp == 4
]  # fmt: skip


@pytest.mark.parametrize(("sp", "strategy", "kind", "dtype"), CASES)
def test_every_kind_of_attention(ranks, sp: int, strategy: str, kind: str, dtype: torch.dtype):
    forms = KINDS[kind].forms[:1]
    options = {"attention": strategy, "ranks_per_node": 2 if strategy == "hybrid" else None}
    for errors, fallbacks, wide in ranks(sp).run(run_kind, kind, dtype, forms, **options):
        check(errors, dtype)
        assert not fallbacks
        assert not wide


def of_heads(sizes: list[tuple[int, int]], **options: Any) -> list[tuple[float, list[int]]]:
    """Error, and bytes of collectives but the last, for models of so many query and key/value heads."""
    found = []
    for heads, kv_heads in sizes:
        sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 8 * heads}
        model = llama(num_hidden_layers=1, **sizes)
        parallel = sp_compile.parallelize(model, codegen="eager", **options)
        batch = requests([30, 1, 1, 50])
        with torch.no_grad():
            worst = error(parallel(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits)
        found.append((worst, [each.bytes_sent for each in parallel.report().collectives][:-1]))
    return found


HEADS = {(8, 2): 2 * (3 + 3), (6, 3): 2 * (2 + 1), (5, 1): 2 * (2 + 1)}  # queries and outputs, keys and values, at sp=3


def test_any_number_of_heads_is_spread(ranks):
    for found in ranks(3).run(of_heads, [*HEADS], attention="ulysses"):
        for (worst, moved), each in zip(found, HEADS.values(), strict=True):
            assert worst <= 1e-5
            assert len(moved) == 2  # queries, keys and values together, and outputs
            assert sum(moved) == each * 2 * 29 * 8 * 4  # to two others, of each 29 rows, head dim, bytes of fp32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sp", "options"),
    [
        (3, {"attention": "fetch"}),
        (3, {"attention": "ring"}),
        (4, {"attention": "hybrid", "ranks_per_node": 2}),
        (4, {"attention": "ulysses"}),
    ],
    ids=lambda each: str(each.get("attention")) if isinstance(each, dict) else str(each),
)
def test_any_number_of_heads_by_any_strategy(ranks, sp: int, options: dict[str, Any]):
    for found in ranks(sp).run(of_heads, [*HEADS], **options):
        assert max(worst for worst, _ in found) <= 1e-5


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_generated_code_spreads_heads(ranks, name: str):
    for each in ranks(2).run(ran, name, MIXES, attention="ulysses", codegen="inductor", timeout=900):
        assert max(worst for worst, *_ in each) <= 1e-5
