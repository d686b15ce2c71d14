"""What every pass changes in the graphs of three tiny models, kept as diffs to be read in review.

``make golden`` writes the files anew. They belong to the versions of torch and transformers in ``constraints.txt``,
whose names of nodes they show.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sp_compile
from sp_compile import testing
from sp_compile.pipeline import registered_passes
from sp_compile.testing import assert_graph_diff

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("golden")
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


def built(case: str) -> torch.nn.Module:
    torch._dynamo.reset()
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(MODELS[case](), attn_implementation="sdpa").eval()


def batch() -> dict[str, Any]:
    """Requests of 13, 17 and 1 tokens."""
    return {**sp_compile.pack([list(range(3, 16)), list(range(3, 20)), [5]]), "use_cache": False}


@needs_pinned_versions
@pytest.mark.parametrize("case", MODELS)
def test_golden_diffs_are_what_the_passes_change(case: str):
    assert_graph_diff(built(case), batch(), None, f"golden/{case}")


def test_golden_folders_are_those_of_the_models_and_have_every_pass():
    assert {each.name for each in GOLDEN.iterdir()} == set(MODELS)
    names = [f"{i:02}-{name}.diff" for i, name in enumerate(registered_passes(), 1)]
    for each in GOLDEN.iterdir():
        assert sorted(file.name for file in each.iterdir()) == names


@pytest.mark.parametrize("case", MODELS)
def test_golden_text_holds_nothing_that_changes_between_runs(case: str):
    unstable = re.compile(r"\b[su]\d+\b|0x[0-9a-f]{4}|/\w+/|\d\.\d+s\b")
    found = [f"{each.name}: {line}" for each in (GOLDEN / case).iterdir() for line in each.read_text().splitlines()
             if unstable.search(line)]  # fmt: skip
    assert found == []


def test_golden_files_of_a_user(tmp_path: Path, monkeypatch):
    """Written where they are asked for, compared, and told when a pipeline has changed."""
    model, chosen = built("llama_dense_gqa"), ["normalize", "shard_attention"]
    file, folder = tmp_path / "new" / "model.diff", tmp_path / "folder"
    with pytest.raises(AssertionError, match=r"model.diff is not there\nif .* --update-golden"):
        assert_graph_diff(model, batch(), None, file, passes=chosen)
    with monkeypatch.context() as patched:
        patched.setattr(testing._Run, "updates", True)
        for each in (file, folder):
            assert_graph_diff(model, batch(), None, each, passes=chosen)
    for each in (file, folder):
        assert_graph_diff(model, batch(), {"attention": "allgather_kv"}, each, passes=chosen)
        with pytest.raises(AssertionError, match="of now"):
            assert_graph_diff(model, batch(), {"attention": "ring"}, each, passes=chosen)
    assert re.findall(r"^# (\w+)$", file.read_text(), re.MULTILINE) == chosen
    assert {each.name for each in folder.iterdir()} == {"01-normalize.diff", "02-shard_attention.diff"}
    with pytest.raises(ValueError, match="the pipeline has no pass 'shard_attn'; it has normalize"):
        assert_graph_diff(model, batch(), None, file, passes=["shard_attn"])


def test_golden_mismatches_missing_and_stale_files_are_told(tmp_path: Path):
    testing.write(tmp_path, {"1-a.diff": "+one\n+two\n", "2-b.diff": "+same\n", "4-d.diff": "+old\n"}, [])
    known = ["1-a.diff", "2-b.diff", "4-d.diff"]
    with pytest.raises(AssertionError) as caught:
        testing.compare(tmp_path, {"1-a.diff": "+one\n+2\n", "2-b.diff": "+same\n", "3-c.diff": "+new\n"}, known)
    text = str(caught.value)
    assert "4-d.diff is stale: no pass writes it" in text
    assert "3-c.diff is not there" in text
    assert "-+two\n++2\n" in text
    assert "2-b" not in text
    testing.write(tmp_path, {"2-b.diff": "+same\n"}, known)
    testing.compare(tmp_path, {"2-b.diff": "+same\n"}, [each.name for each in tmp_path.iterdir()])


def test_a_model_that_trains_is_shown_as_it_trains():
    model = built("llama_dense_gqa").train()
    ids = torch.arange(3, 34)[None]
    labelled = {"input_ids": ids, "labels": ids, "use_cache": False}
    ((name, diff),) = testing.graph_diffs(model, labelled, None, 2, ["place_gradients"])
    assert name == "place_gradients"
    assert all(each in diff for each in ("share_gradient", "begin_sum", "end_sums"))
    ((_, diff),) = testing.graph_diffs(model.eval(), labelled, None, 2, ["place_gradients"])
    assert "share_gradient" not in diff
