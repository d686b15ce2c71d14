"""What every pass changes in the graphs of three tiny models, kept as diffs to be read in review.

``make golden`` writes the files anew. They belong to the versions of torch and transformers in ``constraints.txt``,
whose names of nodes they show.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import sp_compile
from sp_compile.pipeline import registered_passes

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("golden")
WRITE = os.environ.get("SP_COMPILE_GOLDEN") == "write"
HOW = "read the difference; if it is meant, run `make golden` and review the files with `git diff tests/golden`"
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama_dense_gqa": lambda: transformers.LlamaConfig(num_hidden_layers=2, **SIZES),
    "mistral_sliding_window": lambda: transformers.MistralConfig(num_hidden_layers=1, sliding_window=8, **SIZES),
    "mixtral_experts": lambda: transformers.MixtralConfig(num_hidden_layers=1, num_local_experts=4, **SIZES),
}


def pinned() -> bool:
    """Whether the versions are those that CI uses."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    return torch.__version__.startswith(pins["torch"]) and transformers.__version__ == pins["transformers"]


needs_pinned_versions = pytest.mark.skipif(not pinned(), reason="golden files are of the versions in constraints.txt")


@functools.cache
def diffs(case: str) -> dict[str, str]:
    """File name and text of each pass's diff, for requests of 13, 17 and 1 tokens on 2 ranks."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(MODELS[case](), attn_implementation="sdpa").eval()
    torch._dynamo.reset()
    batch = sp_compile.pack([list(range(3, 16)), list(range(3, 20)), [5]])
    report = sp_compile.explain(model, {**batch, "use_cache": False}, sp=2)
    assert [step.name for step in report.steps] == list(registered_passes())
    return {f"{i:02}-{step.name}.diff": f"{step.diff}\n" for i, step in enumerate(report.steps, start=1)}


def stored(folder: Path) -> dict[str, str]:
    return {each.name: each.read_text() for each in sorted(folder.glob("*"))}


def write(folder: Path, found: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for each in folder.glob("*"):
        each.unlink()
    for name, text in found.items():
        (folder / name).write_text(text)


def compare(case: str, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Fail with what differs between the files and what the passes do now."""
    problems = [f"{case}/{name} is missing" for name in found if name not in expected]
    problems += [f"{case}/{name} is stale: no pass writes it" for name in expected if name not in found]
    for name in found:
        if name in expected and expected[name] != found[name]:
            lines = (each[name].splitlines() for each in (expected, found))
            problems += difflib.unified_diff(*lines, f"{case}/{name}", f"{case}/{name} now", n=1, lineterm="")
    if problems:
        pytest.fail("\n".join([*problems, HOW]), pytrace=False)


@needs_pinned_versions
@pytest.mark.parametrize("case", MODELS)
def test_golden_diffs_are_what_the_passes_change(case: str):
    if WRITE:
        write(GOLDEN / case, diffs(case))
    compare(case, stored(GOLDEN / case), diffs(case))


def test_golden_folders_are_those_of_the_models():
    for each in GOLDEN.iterdir():
        if WRITE and each.name not in MODELS:
            shutil.rmtree(each)
    assert {each.name for each in GOLDEN.iterdir()} == set(MODELS)


@pytest.mark.parametrize("case", MODELS)
def test_golden_text_holds_nothing_that_changes_between_runs(case: str):
    unstable = re.compile(r"\b[su]\d+\b|0x[0-9a-f]{4}|/\w+/|\d\.\d+s\b")
    found = [f"{name}: {line}" for name, text in stored(GOLDEN / case).items() for line in text.splitlines()
             if unstable.search(line)]  # fmt: skip
    assert found == []


def test_golden_mismatches_missing_and_stale_files_are_told(tmp_path: Path):
    write(tmp_path, {"1-a.diff": "+one\n+two\n", "2-b.diff": "+same\n", "4-d.diff": "+old\n"})
    with pytest.raises(pytest.fail.Exception) as caught:
        compare("case", stored(tmp_path), {"1-a.diff": "+one\n+2\n", "2-b.diff": "+same\n", "3-c.diff": "+new\n"})
    text = str(caught.value)
    assert text.splitlines()[:2] == ["case/3-c.diff is missing", "case/4-d.diff is stale: no pass writes it"]
    assert "-+two\n++2\n" in text
    assert "make golden" in text
    assert "2-b" not in text
    write(tmp_path, {"2-b.diff": "+same\n"})
    compare("case", stored(tmp_path), {"2-b.diff": "+same\n"})
