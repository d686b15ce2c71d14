"""All ranks in one process: right, repeatable one by one, and refused where that says nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sp_compile import emulate, pack
from sp_compile.errors import CacheError, ConfigError, MeshError, UnsupportedModelError
from tests.models import llama
from tests.zoo.models import randomize

LENGTHS = (37, 5, 19)


def batch() -> Any:
    generator = torch.Generator().manual_seed(1)
    return pack([torch.randint(128, (length,), generator=generator) for length in LENGTHS])


def of_transformers(name: str, **changes: Any) -> nn.Module:
    import transformers

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, **changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="sdpa")
    randomize(model)
    return model.eval()


def check(model: nn.Module, sp: int, **options: Any) -> Any:
    """An emulation whose logits are the model's, and whose ranks give alone what they gave together."""
    emulation = emulate(model, batch(), sp, **options)
    with torch.no_grad():
        expected = model(**batch(), use_cache=False).logits
    difference = (emulation.outputs.logits - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()
    for rank in range(sp):
        for found, once in zip(emulation.rank(rank)(), emulation.values(rank), strict=True):
            assert torch.equal(found, once)
    return emulation


@pytest.mark.parametrize(
    ("sp", "attention"),
    [(1, "allgather_kv"), (2, "ulysses"), (3, "fetch"), (3, "ring"), (3, "ulysses"), (8, "allgather_kv")],
)
def test_llama_is_right_on_emulated_ranks(sp: int, attention: str) -> None:
    emulation = check(llama(), sp, attention=attention, codegen="eager")
    assert emulation.compiles == 1
    report, delivered = emulation.report(), [emulation.delivered_bytes(rank) for rank in range(sp)]
    if attention == "allgather_kv":
        assert delivered == [report.bytes_sent] * sp
    if report.bytes_by_formula is not None and attention != "ulysses":
        assert max(delivered) == report.bytes_by_formula


def test_sliding_windows_and_experts_are_right_on_emulated_ranks() -> None:
    check(of_transformers("Mistral", sliding_window=8), 3, attention="fetch", codegen="eager", store="host")
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    check(of_transformers("Mixtral", **experts), 2, codegen="eager")


def test_code_is_generated_once_for_all_ranks() -> None:
    emulation = check(llama(num_hidden_layers=1), 3, attention="fetch")
    assert emulation.compiles == 1
    figures = emulation.figures(repeats=1)
    assert len(figures.ranks) == 3
    assert figures.imbalance >= 1
    assert all(each.seconds > 0 for each in figures.ranks)


def test_what_emulation_cannot_tell_is_refused() -> None:
    model = llama()
    with pytest.raises(MeshError, match="sp=0"):
        emulate(model, batch(), 0)
    with pytest.raises(CacheError, match="past_key_values"):
        emulate(model, {**batch(), "past_key_values": object()}, 2)
    with pytest.raises(ConfigError, match="measure_rates"):
        emulate(model, batch(), 2, measure_rates=True)
    with pytest.raises(ConfigError, match="gradients"):
        emulate(model, batch(), 2, gradients="always")
    with pytest.raises(ConfigError, match="store"):
        emulate(model, batch(), 2, store="disk")
    with pytest.raises(UnsupportedModelError, match="eval"):
        emulate(model.train(), batch(), 2)
