"""The benchmark of one device runs in small and reports every part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_reports(tmp_path: Path) -> None:
    files = tmp_path / "found.json", tmp_path / "found.md"
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "--json", str(files[0]), "--markdown", str(files[1])]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    parts = json.loads(files[0].read_text())["parts"]
    for shape in ("Llama-3-8B", "Qwen3-30B-A3B"):
        attention = parts[f"{shape}, 256 tokens"]
        assert attention["error"] < 2e-2
        assert attention["sp=2, fetch"]["ranks"]
        assert set(parts[f"{shape}, layout"]) == {"pack", "reorder", "merge"}
        ranks = {"sp=1, rank 0", "sp=2, rank 0", "sp=2, rank 1"}
        assert set(parts[f"{shape}, decode"]) == ranks | {f"{each}, plan over layers" for each in ranks}
    figures = [each for name in parts for each in parts[name].values() if isinstance(each, dict) and "error" in each]
    assert {"Llama-3-8B, model", "Llama-3-8B, layers"} <= set(parts)
    assert all(each["error"] < 2e-2 and each["ratio"] >= 0 for each in figures)
    text = files[1].read_text()
    assert "Machine: " in text
    assert "python benchmarks/gpu.py --smoke" in text
