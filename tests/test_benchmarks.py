"""The benchmark of one device runs in small and reports every part; parts that raise and later runs lose no figures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
MET = {"ratio": 1.0, "target": "<= 1.05", "met": True, "error": 0.0, "seconds": 0.002}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``benchmarks/gpu.py``, which imports those beside it by their names, as a script does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def raises() -> dict[str, object]:
    raise RuntimeError("out of memory | here\nand more")


def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, parts: dict[str, object], *arguments: object) -> object:
    """The exit status of the benchmark with these parts."""
    monkeypatch.setattr(gpu, "parts_of", lambda asked, shapes: parts)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    try:
        gpu.main(["--device", "cpu", *map(str, arguments)])
    except SystemExit as end:
        return end.code
    return 0


def test_a_part_that_raises_leaves_the_others(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = tmp_path / "found.json", tmp_path / "found.md"
    parts = {"before": lambda: {"a": MET}, "bad": raises, "behind": lambda: {"b": MET | {"met": False}}}
    status = run(gpu, monkeypatch, parts, "--json", files[0], "--markdown", files[1])
    assert status == "1 parts raised: bad"  # which exits with 1
    assert [*json.loads(files[0].read_text())["parts"]] == ["before", "bad", "behind"]
    table = files[1].read_text()
    assert "| before, a | 1 | <= 1.05 | met | 2 ms |" in table
    assert "| bad | raised | RuntimeError: out of memory \\| here | missed |  |" in table
    assert "| behind, b | 1 | <= 1.05 | missed | 2 ms |" in table
    assert "1 of 3 targets are met" in table


def test_resume_measures_what_is_missing(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, measured = tmp_path / "found.json", list[str]()

    def counted(name: str) -> object:
        return lambda: measured.append(name) or {"a": MET}

    options = "--json", file, "--resume"
    assert run(gpu, monkeypatch, {"one": counted("one"), "bad": raises}, *options) == "1 parts raised: bad"
    assert run(gpu, monkeypatch, {"one": counted("one"), "two": counted("two")}, *options, "--minutes", 1) != 0
    assert measured == ["one", "two"]
    found = json.loads(file.read_text())
    assert [*found["parts"]] == ["one", "bad", "two"]
    assert len(found["commands"]) == 2
    assert run(gpu, monkeypatch, {"bad": counted("bad")}, *options, "--again") == 0
    assert run(gpu, monkeypatch, {"late": counted("late")}, *options, "--minutes", 0) == 0
    assert measured == ["one", "two", "bad"]


def test_resume_refuses_figures_of_another_machine(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    parts = {"one": lambda: {"a": MET}}
    assert run(gpu, monkeypatch, parts, "--json", file) == 0
    before = json.loads(file.read_text())
    before["machine"]["gpus"], before["machine"]["memory_bytes"] = ["another"], 1
    file.write_text(json.dumps(before))
    assert run(gpu, monkeypatch, parts, "--json", file, "--resume", "--rounds", 7) == 2
    told = capsys.readouterr().err
    assert "machine gpus: ['another'] there" in told
    assert "settings rounds: 5 there, 7 here" in told
    assert "memory_bytes" not in told
    assert json.loads(file.read_text()) == before


def test_attention_is_compared_with_one_rank(gpu: ModuleType) -> None:
    import gpu_table

    def ranks(*seconds: float) -> dict[str, object]:
        each = [{"seconds": spent, "ratio": 1.2} for spent in seconds]
        return {"sum_seconds": sum(seconds), "slowest_over_mean": 1.0, "plan_over_layers": 0.2, "ranks": each}

    one = {"lengths": [8], "sp": 1, "error": 0.0, "unsharded_seconds": {"x": 2.0, "y": 4.0}, "allgather_kv": ranks(2.0)}
    two = {"lengths": [8], "sp": 2, "error": 0.0, "fetch": ranks(1.0, 1.5)}
    rows = {row.what: row for row in gpu_table.rows_of({"L, 8, sp=1": one, "L, 8, sp=2": two}, "L, 8, sp=2")}
    assert rows["L, 8, sp=2, fetch, sum over sp=1"][1:4] == (1.25, "<= 1.05", False)
    assert rows["L, 8, sp=2, fetch, sum over best unsharded"].ratio == 1.25
    assert rows["L, 8, sp=2, fetch, slowest over mean"].met
    assert not rows["L, 8, sp=2, fetch, best over ours"].met
    assert not rows["L, 8, sp=2, fetch, plan over layers"].met
    assert len(gpu_table.rows_of({"L, 8, sp=2": two}, "L, 8, sp=2")) == 3  # where one rank was not measured


def test_long_runs_have_fewer_rounds_and_areas_few_lengths(gpu: ModuleType) -> None:
    import gpu_attention
    import gpu_timing

    calls = list[str]()
    spent = {"short": 0.1, "long": 0.6}
    found = gpu_timing.medians(
        {name: (lambda name=name: calls.append(name)) for name in spent},
        5,
        lambda run: (run(), spent[calls[-1]])[1],
        warm=["long"],
    )
    assert found == spent
    assert (calls.count("short"), calls.count("long")) == (6, 3)
    lengths = {gpu_attention.sequence_of(tokens * tokens // 2) for tokens in range(30000, 60001, 100)}
    assert len(lengths) <= 26
    assert all(length % 128 == 0 for length in lengths)
    assert abs(gpu_attention.sequence_of(32768**2 // 2) - 32768) <= 128


def test_memory_is_held_against_the_share_of_one_rank(gpu: ModuleType) -> None:
    import gpu_table

    one = {"sp": 1, "peak_bytes": 1000, "held_bytes": 0.0, "error": 0.0}
    parts = {"layers, sp=1": one, "layers, sp=4": one | {"sp": 4, "peak_bytes": 330, "held_bytes": 50.0}}
    assert gpu_table.rows_of(parts, "layers, sp=1") == []
    (row,) = gpu_table.rows_of(parts, "layers, sp=4")
    assert (row.what, row.ratio, row.met) == ("layers, sp=4, peak over share and buffers", 1.1, True)
    parts["layers, sp=4"]["peak_bytes"] = 331
    assert not gpu_table.rows_of(parts, "layers, sp=4")[0].met


def test_what_does_not_run_here_is_told(gpu: ModuleType) -> None:
    import gpu_timing

    found, refused = gpu_timing.able({"good": lambda: 1, "bad": raises})
    assert [*found] == ["good"]
    assert refused == {"bad": "RuntimeError: out of memory | here"}
    with pytest.raises(RuntimeError, match="none of torch's own runs here"):
        gpu_timing.able({"bad": raises})


def test_differences_are_found_part_by_part(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_timing

    monkeypatch.setattr(gpu_timing, "AT_ONCE", 7)
    expected = gpu.torch.ones(2, 5, 3)
    found = expected.clone()
    found[0, 2] += 0.4
    found[1, 4] += 0.3
    assert gpu_timing.apart(found, expected) == pytest.approx(0.5 * (3 / 30) ** 0.5)
    with pytest.raises(ValueError, match=r"off its reference by 1.6e-01 of its norm; less than 2.0e-02"):
        gpu_timing.difference(found, expected)
    with pytest.raises(ValueError, match=r"\[2, 5, 2\]; \[2, 5, 3\] was expected"):
        gpu_timing.difference(expected[..., :2], expected)


ON_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=[pytest.mark.slow, pytest.mark.skipif(ON_GPU, reason="the GPU is measured")]),
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not ON_GPU, reason="there is no GPU")]),
])  # fmt: skip
def test_every_part_of_the_gpu_benchmark_reports(device: str, tmp_path: Path) -> None:
    files = tmp_path / "found.json", tmp_path / "found.md"
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "--device", device, "--json", str(files[0]),
               "--markdown", str(files[1])]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, timeout=800, env={**os.environ, "OMP_NUM_THREADS": "1"})
    parts = json.loads(files[0].read_text())["parts"]
    for shape in ("Llama-3-8B", "Qwen3-30B-A3B"):
        for batch in ("256 tokens", "256 tokens, 8 requests"):
            attention = parts[f"{shape}, {batch}, sp=2"]
            assert attention["error"] < 2e-2
            assert [len(attention[each]["ranks"]) for each in ("allgather_kv", "fetch")] == [2, 2]
        assert {"pack", "reorder", "restore", "merge"} < set(parts[f"{shape}, layout"])
        ranks = {"sp=1, rank 0", "sp=2, rank 0", "sp=2, rank 1"}
        assert ranks | {f"{each}, plan over layers" for each in ranks} < set(parts[f"{shape}, decode"])
    figures = [each for name in parts for each in parts[name].values() if isinstance(each, dict) and "ratio" in each]
    in_fp32 = {"Qwen3-30B-A3B, small model", "Llama-3-8B, layers, 256 tokens, sp=2", "Llama-3-8B, model, 256 tokens",
               "Llama-3-8B, model, 256 tokens, 8 requests"}  # fmt: skip
    assert in_fp32 | {"Llama-3-8B, steps, 256 tokens a request", "Llama-3-8B, training, 256 tokens"} <= set(parts)
    assert all(each["error"] < 2e-2 and each["ratio"] >= 0 for each in figures)
    assert all(each["error"] < 1e-4 for name in in_fp32 for each in parts[name].values() if isinstance(each, dict))
    text = files[1].read_text()
    assert "Machine: " in text
    assert "python benchmarks/gpu.py --smoke" in text
    assert "raised" not in text
