"""The graphs that a rank runs on a GPU, kept as text to be read in review; no device is needed to make them.

``make golden`` writes the files anew.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import sp_compile
from sp_compile import testing
from sp_compile.graph_text import lines
from sp_compile.pipeline import registered_passes
from tests.passes.graphs import after
from tests.test_golden import HEAD_DIM, batch, for_a_gpu, needs_pinned_versions

FOLDER = Path(__file__).with_name("golden_gpu")
STEPS = ("first", "more", "decode", "mixed")
OPTIONS = {"kernel": "flex", "attention": "allgather_kv"}
CASES = ("prefill", "training", *STEPS)


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
QUERIES = 4 * HEAD_DIM
PARTIAL = 4 * (HEAD_DIM + 2)  # with log-sum-exp, which is as wide as two features
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
