"""The graphs that a rank runs on a GPU, kept as text to be read in review; no device is needed to make them.

``make golden`` writes the files anew.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sp_compile
from sp_compile import testing
from sp_compile.graph_text import lines
from sp_compile.pipeline import registered_passes
from tests.passes.graphs import after
from tests.test_golden import SIZES, batch, needs_pinned_versions

transformers = pytest.importorskip("transformers")

HEAD_DIM = 16  # a GPU's FlexAttention takes no smaller
FOLDER = Path(__file__).with_name("golden_gpu")
STEPS = ("first", "more", "decode", "mixed")
OPTIONS = {"kernel": "flex", "attention": "allgather_kv"}
CASES = ("prefill", "training", *STEPS)


def for_a_gpu(train: bool, layers: int = 2) -> Any:
    """A model without memory, in bf16."""
    torch._dynamo.reset()
    sizes = {**SIZES, "hidden_size": 6 * HEAD_DIM, "head_dim": HEAD_DIM, "num_attention_heads": 6}
    with torch.device("meta"):
        config = transformers.LlamaConfig(num_hidden_layers=layers, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.train(train).bfloat16()


def text_of(case: str) -> str:
    """The last graph of one layer on one of two ranks."""
    model = for_a_gpu(case == "training", layers=1)
    if case in STEPS:
        program = after([*registered_passes()][-1], model, batch(), cached=case, device="cuda", **OPTIONS)
        return "\n".join(lines(program)) + "\n"
    ids = torch.arange(3, 34)[None]
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False} if case == "training" else batch()
    outputs = "loss" if case == "training" else "full"
    return sp_compile.explain(model, inputs, 2, device="cuda", outputs=outputs, **OPTIONS).steps[-1].after + "\n"


@needs_pinned_versions
@pytest.mark.parametrize("case", CASES)
def test_golden_graphs_for_a_gpu(case: str):
    file = f"{case}.txt"
    update = testing.write if testing._Run.updates else testing.compare
    update(FOLDER, {file: text_of(case)}, [file] if (FOLDER / file).exists() else [])


def test_golden_graphs_are_those_of_the_cases():
    assert sorted(each.name for each in FOLDER.iterdir()) == sorted(f"{case}.txt" for case in CASES)


KEYS_AND_VALUES = 2 * 2 * HEAD_DIM
QUERIES = 6 * HEAD_DIM
PARTIAL = 6 * (HEAD_DIM + 2)  # with log-sum-exp, which is as wide as two features
LOGITS = 64
OWN = {"n", "kept", "past_0", "queries_0", "runs_0"}  # rows that are the rank's, of any width


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_the_whole_sequence_is_as_wide_as_the_hidden_state(case: str):
    """Nor is anything of queries by keys: of all tokens there are vectors, keys and values, and of new ones logits.

    In a step, everyone's queries are gathered with them, and what comes back for queries is sent.
    """
    text = (FOLDER / f"{case}.txt").read_text()
    assert not re.search(r"\b[su]\d+\b|0x[0-9a-f]{4}", text)
    gathered = KEYS_AND_VALUES if case in ("prefill", "training", "first") else KEYS_AND_VALUES + QUERIES
    widest = {
        "T": LOGITS if case == "prefill" else 1,
        "T + 1": 1,
        "new_tokens": LOGITS,
        "slots_0": KEYS_AND_VALUES // 2,
        "2*n": gathered,
        "2*past_0": KEYS_AND_VALUES,
        "2*past_0 + 2*n": KEYS_AND_VALUES // 2,
        "2*queries_0": PARTIAL,
    }
    seen = set()
    for name, sizes in re.findall(r"^%(\w+): \w+\[([^\]]*)\]", text, re.MULTILINE):
        if name.startswith("block_mask"):
            continue  # of blocks by blocks
        known = [int(size) for size in sizes.split(", ") if size.isdigit()]
        symbols = [size for size in sizes.split(", ") if size and not size.isdigit()]
        assert len(symbols) <= 1, (name, sizes)
        for each in {*symbols} - OWN:
            assert math.prod(known) <= widest[each], (name, sizes)
        seen.update(symbols)
    assert "n" in seen


@pytest.mark.parametrize(
    ("strategy", "train", "kernel"),
    [("allgather_kv", False, "flex"), ("fetch", False, "flex"), ("ulysses", False, "flex"),
     ("allgather_kv", True, "flex"), ("allgather_kv", False, "fused"), ("fetch", True, "fused")],
)  # fmt: skip
def test_the_graph_for_a_gpu_has_plans_and_nothing_of_the_whole_sequence_but_keys(
    strategy: str, train: bool, kernel: str
):
    """No device is needed: shapes are those of the local graph on the meta device."""
    model = for_a_gpu(train)
    ids = torch.arange(3, 34)[None]
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False} if train else batch()
    options = {"outputs": "loss" if train else "sharded", "kernel": kernel}
    report = sp_compile.explain(model, inputs, 2, device="cuda", attention=strategy, **options)
    graph = report.steps[-1].after
    flex = kernel == "flex"
    assert ("block_mask_of_keys(" in graph) == (train and flex)
    assert graph.count(" = flex_attention(") == 2 * flex
    assert graph.count("sp_compile.attention(") == 2 * (not flex)
    assert ("block_mask(" if flex else "tile_plan(") in graph
    keys = 2 * 2 * HEAD_DIM  # and values, of both heads; or half of the heads, and the keys and values that they read
    assert widest_of_all_rows(graph) == (5 * HEAD_DIM if strategy == "ulysses" else keys) < 6 * HEAD_DIM
    repeated = f"%keys: bf16[1, 6, 2*n, {HEAD_DIM}] Gathered(2) = aten.expand(%k)"
    assert widest_of_all_rows(f"{graph}\n{repeated}") == 6 * HEAD_DIM


def widest_of_all_rows(graph: str) -> int:
    """Elements for a row of the values that have rows of all ranks, or those that a rank fetches."""
    widths = []
    for line in graph.splitlines():
        for sizes in re.findall(r"\w\d+\[([^\]]*)\]", line.partition(" = ")[0]):
            dims = [each for each in sizes.split(", ") if "//" not in each]  # which are blocks
            rows = [each for each in dims if re.search(r"T|2\*n|fetched", each)]
            assert len(rows) <= 1, line  # never queries by keys
            widths.append(math.prod(int(each) for each in dims if each.isdigit()) if rows else 0)
    return max(widths)


def test_short_runs_train_by_another_kernel_than_long_ones():
    found = []
    for tokens in (1300, 30):
        ids = torch.randint(3, 60, (1, tokens))
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        graph = sp_compile.explain(for_a_gpu(train=True), inputs, 2, device="cuda", outputs="loss").steps[-1].after
        found.append((graph.count(" = flex_attention("), graph.count("sp_compile.attention(")))
    assert found == [(0, 2), (2, 0)]
