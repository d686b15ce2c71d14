"""What the README shows runs as it is shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sp_compile.config import load_config
from sp_compile.sweep import load_sweep

transformers = pytest.importorskip("transformers")

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs(tmp_path: Path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    config = transformers.Qwen3Config(**sizes, num_key_value_heads=2, vocab_size=14000)
    model = transformers.Qwen3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    script = tmp_path / "example.py"
    script.write_text(
        example.replace("Qwen/Qwen3-0.6B", str(tmp_path / "model")).replace(
            "parallelize(model)", 'parallelize(model, codegen="eager")'
        )
    )
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stderr
    requests = [[9707], [785, 3974, 13876], list(range(1000))]
    with torch.no_grad():
        expected = [model(torch.tensor([each])).logits[0, -1].argmax().item() for each in requests]
    assert found.stdout.strip() == str(expected)


def test_the_configurations_of_the_commands_exist():
    names = set(re.findall(r"configs/\w+\.yaml", README))
    assert names
    for name in names:
        load_sweep(name) if "sweep" in name else load_config(name)
