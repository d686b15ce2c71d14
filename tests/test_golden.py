"""What every pass changes in the graphs of three tiny models, kept as diffs to be read in review.

``make golden`` writes the files anew. They belong to the versions of torch and transformers in ``constraints.txt``,
whose names of nodes they show.
"""

from __future__ import annotations

import math
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


HEAD_DIM = 16  # a GPU's FlexAttention takes no smaller


def for_a_gpu(train: bool, layers: int = 2) -> Any:
    """A model without memory, in bf16."""
    torch._dynamo.reset()
    sizes = {**SIZES, "hidden_size": 6 * HEAD_DIM, "head_dim": HEAD_DIM, "num_attention_heads": 6}
    with torch.device("meta"):
        config = transformers.LlamaConfig(num_hidden_layers=layers, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.train(train).bfloat16()


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
            rows = [each for each in dims if re.search(r"T|2\*n|s\d", each)]
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
