"""Adapters of PEFT train over ranks as they do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sp_compile
from sp_compile.errors import RankMismatchError, UnsupportedModelError
from tests.test_training import ROUNDED
from tests.training import apart, batch_of, built, stepped

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(model: Any, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Any:
    """Low-rank adapters whose products are not zero, as they are at first."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM", use_rslora=True
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(5)
    for name, each in model.named_parameters():
        if "lora_B" in name:
            each.data = torch.randn(each.shape, generator=generator, dtype=dtype) * 0.1
    return model.train()


def step(folder: str, dropout: float) -> dict[str, Any]:
    """A step on the ranks of this group; rank 0 saves the adapters."""
    parallel = sp_compile.parallelize(adapted(built("Llama", torch.float64), dropout), codegen="eager")
    torch.manual_seed(7)
    found = stepped(parallel, batch_of())
    if folder and parallel.group.rank == 0:
        parallel.save_pretrained(folder)
    return found


def test_loss_and_gradients_of_adapters_are_those_of_one_rank(ranks, tmp_path: Path):
    """Also of those that were saved, which load into the model without ranks. Frozen weights get no gradient."""
    expected = stepped(adapted(built("Llama", torch.float64)), batch_of())
    assert len(expected) == 1 + 2 * len(TARGETS) * 2
    for found in ranks(2).run(step, str(tmp_path), 0.0):
        assert apart(found, expected) <= ROUNDED
    loaded = peft.PeftModel.from_pretrained(built("Llama", torch.float64), tmp_path, is_trainable=True)
    assert apart(stepped(loaded.double().train(), batch_of()), expected) <= ROUNDED


def test_dropout_of_adapters_does_not_depend_on_the_number_of_ranks(ranks):
    without = stepped(adapted(built("Llama", torch.float64)), batch_of())
    by_two, by_three = (ranks(sp).run(step, "", 0.3) for sp in (2, 3))
    for found in (*by_two, *by_three):
        assert apart(found, by_two[0]) <= ROUNDED
    assert apart(by_two[0], without) > 0.01


def test_adapters_around_a_parallel_model_are_refused():
    parallel = sp_compile.parallelize(built("Llama"), sp=1)
    with pytest.raises(UnsupportedModelError, match=r"parallelize\(get_peft_model\(model, config\)\)"):
        peft.get_peft_model(parallel, peft.LoraConfig(target_modules=["q_proj"]))


def added_later() -> str:
    """What ranks are told that add adapters of different seeds to a model which has trained already."""
    parallel = sp_compile.parallelize(built("Llama"), codegen="eager")
    stepped(parallel, batch_of())
    torch.manual_seed(parallel.group.rank)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), parallel.module)
    try:
        stepped(parallel, batch_of())
    except RankMismatchError as error:
        return str(error)
    return "nothing"


def test_adapters_of_different_seeds_are_named(ranks):
    for found in ranks(2).run(added_later):
        assert found.startswith("ranks disagree on the parameter model.layers.0.self_attn.q_proj.lora_A")


def trained(folder: str) -> Any:
    """Losses and adapters of a Trainer, which resumes from its own checkpoint."""
    import torch.distributed as dist

    from tests.test_trainer import LLAMA, fitted

    rank = dist.get_rank() if dist.is_initialized() else 0
    options = {"max_steps": 2, "save_steps": 1, "eval_strategy": "no"}
    whole = fitted(folder, model=adapted(built("Llama", **LLAMA), dtype=torch.float32), **options)
    if dist.is_initialized():
        dist.barrier()
    model = adapted(built("Llama", **LLAMA), dtype=torch.float32)
    resumed = fitted(f"{folder}/resumed", f"{folder}/0/checkpoint-1", model=model, **options)
    return whole, resumed, sorted(each.name for each in Path(folder, str(rank), "checkpoint-2").glob("*.safetensors"))


def test_the_trainer_saves_adapters_only_and_goes_on_from_them(ranks, tmp_path: Path):
    from tests.test_trainer import CLOSE, check_equal

    expected, _, saved = trained(f"{tmp_path}/plain")
    assert saved == ["adapter_model.safetensors"]
    for rank, (whole, resumed, files) in enumerate(ranks(2).run(trained, f"{tmp_path}/ranks")):
        check_equal(whole, expected)
        torch.testing.assert_close(resumed[1], expected[1], **CLOSE)
        assert files == ([] if rank else saved)
