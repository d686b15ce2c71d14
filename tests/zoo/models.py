"""The zoo: decoder architectures of transformers as tiny models with weights that show mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

ENTRIES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("zoo.json").read_text())
VOCABULARY = 100
STATE_SPACE = ("A_log", "D", "dt_bias", "a_param", "time_decay", "time_first", "A", "decay")


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of one entry in eval mode, its weights the same in every process."""
    import transformers

    entry = ENTRIES[name]
    config = getattr(transformers, entry["config_class"])(**entry["config"])
    torch.manual_seed(0)
    kind = getattr(transformers, entry["model_class"])
    model = kind._from_config(config, attn_implementation=entry["attn_implementation"])
    randomize(model)
    return model.to(dtype).eval()


def randomize(model: nn.Module) -> None:
    """Weights N(0, 0.2), gains and biases jittered by N(0, 0.1): default weights hide wrong positions and masks."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in STATE_SPACE or not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Fresh random token ids; 0 to 2 are special in the zoo's configurations."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=generator)
