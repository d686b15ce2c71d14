"""transformers' Trainer and accelerate over ranks do what they do in one process."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, IterableDataset

import sp_compile
from sp_compile.errors import ConfigError, MeshError, RankMismatchError, UnsupportedModelError
from tests.training import built, told

pytest.importorskip("accelerate")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
GPT2 = {"n_embd": 32, "n_layer": 1, "resid_pdrop": 0.2, "embd_pdrop": 0.2}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "tie_word_embeddings": True}
LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_right", "eval_logit", "epoch", "train_loss")


class Rows(Dataset):
    """Requests of 6 to 12 tokens, a column that the model does not take, and labels of which some are ignored."""

    def __init__(self, count: int, seed: int, noise: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(6, 13, (count,), generator=generator).tolist()
        self.ids = [torch.randint(3, 60, (each,), generator=generator) for each in lengths]
        self.noise = noise

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> dict[str, Any]:
        ids = self.ids[place]
        shift = random.randrange(50) if self.noise else 0
        return {"input_ids": ids + shift, "labels": ids.masked_fill(torch.arange(len(ids)) < 2, -100), "name": place}


class Stream(IterableDataset):
    """The rows, to be had in their order only."""

    def __iter__(self) -> Any:
        rows = Rows(6, 1)
        return iter([rows[each] for each in range(len(rows))])


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    assert all("name" not in each for each in rows)
    ids = [each["input_ids"] for each in rows]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(each) for each in ids], batch_first=True),
        "labels": pad([each["labels"] for each in rows], batch_first=True, padding_value=-100),
    }


def metrics(predicted: Any) -> dict[str, float]:
    """How many next tokens are predicted, of all rows, and the mean of their logits."""
    logits, labels = predicted.predictions[:, :-1], predicted.label_ids[:, 1:]
    assert len(labels) == 4
    counted = labels != -100
    return {"right": float((logits.argmax(-1) == labels)[counted].sum()), "logit": float(logits[counted].mean())}


def trainer_of(folder: str, kind: type | None = None, model: Any = None, **options: Any) -> Any:
    """A Trainer: with ranks sp_compile's, else transformers'."""
    import transformers

    if model is None:
        model = built("Llama", **LLAMA)
    if dist.is_initialized():
        model, kind = sp_compile.parallelize(model, codegen="eager"), kind or sp_compile.Trainer
    chosen: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "weight_decay": 0.3, "adam_epsilon": 1e-3, "max_grad_norm": 0.5, "logging_steps": 1, "save_steps": 2,
        "per_device_eval_batch_size": 2,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(folder, **{**chosen, **options})
    return (kind or transformers.Trainer)(
        model=model, args=arguments, train_dataset=Rows(8, 1), eval_dataset=Rows(4, 2), data_collator=collate,
        compute_metrics=metrics,
    )  # fmt: skip


def logged(trainer: Any) -> list[dict[str, float]]:
    """What was logged and does not depend on the machine."""
    return [{name: each[name] for name in LOGGED if name in each} for each in trainer.state.log_history]


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Copies of a model's weights."""
    return {name.removeprefix("module."): each.detach().clone() for name, each in model.state_dict().items()}


def fitted(folder: str, resume: str | None = None, **options: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """What a run logs, and its last weights; each rank has a folder of its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    trainer = trainer_of(f"{folder}/{rank}", **options)
    trainer.train(resume_from_checkpoint=resume)
    return logged(trainer), weights(trainer.model)


def check_equal(found: Any, expected: Any) -> None:
    for each, other in zip(found[0], expected[0], strict=True):
        assert each == pytest.approx(other, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(found[1], expected[1], **CLOSE)


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}


def test_losses_metrics_and_weights_are_those_of_one_process(ranks, tmp_path: Path):
    """With the best model loaded at the end, which is the one of step 2; checkpoints then go on in one process."""
    import transformers

    expected = fitted(f"{tmp_path}/plain", **BEST)
    assert {"eval_loss", "eval_right"} <= expected[0][2].keys()
    for found in ranks(2).run(fitted, f"{tmp_path}/ranks", **BEST):
        check_equal(found, expected)
    assert sorted(each.name for each in Path(tmp_path, "ranks").iterdir()) == ["0"]  # only rank 0 writes
    for step in (2, 4):
        found, wanted = (
            transformers.AutoModelForCausalLM.from_pretrained(f"{tmp_path}/{which}/0/checkpoint-{step}")
            for which in ("ranks", "plain")
        )
        torch.testing.assert_close(weights(found), weights(wanted), **CLOSE)
        if step == 2:
            torch.testing.assert_close(weights(found), expected[1], **CLOSE)
    resumed = fitted(f"{tmp_path}/resumed", f"{tmp_path}/ranks/0/checkpoint-2")
    torch.testing.assert_close(resumed[1], weights(wanted), **CLOSE)


def dropping(folder: str, resume: str | None = None) -> Any:
    """A run with dropout that saves at step 2; with an epsilon, as gradients of the keys' biases are but rounding."""
    return fitted(folder, resume, model=built("GPT2", **GPT2), eval_strategy="no", adam_epsilon=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_on_more_ranks(ranks, tmp_path: Path):
    """Dropout too: it draws what it would have drawn."""
    whole = ranks(2).run(dropping, f"{tmp_path}/whole")[0]
    for found in ranks(3).run(dropping, f"{tmp_path}/resumed", f"{tmp_path}/whole/0/checkpoint-2"):
        assert len(found[0]) == len(whole[0])
        check_equal((found[0][:-1], found[1]), (whole[0][:-1], whole[1]))


def looped(folder: str, resume: bool = False) -> Any:
    """Losses and weights of a loop by accelerate, over a loader that shuffles, that saves after two steps of four."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration, set_seed

    AcceleratorState._reset_state(reset_partial_state=True)
    set_seed(3)
    model: Any = built("Llama", **LLAMA)
    seeded = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=seeded)
    if dist.is_initialized():
        model = sp_compile.parallelize(model, codegen="eager")
        accelerator = sp_compile.as_one_process(accelerator, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(Unnamed(8, 1), batch_size=1, shuffle=True, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if resume:
        accelerator.load_state(folder)
        loader = accelerator.skip_first_batches(loader, 4)
    losses, seen = [], []
    for number, batch in enumerate(loader, 4 * resume):
        with accelerator.accumulate(model):
            loss = model(**batch, use_cache=False).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seen += accelerator.gather_for_metrics(batch["input_ids"][:, 0]).tolist()
        if number == 3 and not resume:
            accelerator.save_state(folder)
            accelerator.wait_for_everyone()
    return losses, seen, weights(model), accelerator.get_state_dict(model)


class Unnamed(Rows):
    """Without the column that the model does not take."""

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {name: each for name, each in super().__getitem__(place).items() if name != "name"}


def test_a_loop_by_accelerate_is_that_of_one_process(ranks, tmp_path: Path):
    expected = looped(f"{tmp_path}/plain")
    for found in ranks(2).run(looped, f"{tmp_path}/ranks"):
        torch.testing.assert_close(found, expected, **CLOSE)
    for resumed in (looped(f"{tmp_path}/ranks", True), ranks(2).run(looped, f"{tmp_path}/plain", True)[1]):
        torch.testing.assert_close(resumed[0], expected[0][4:], **CLOSE)
        torch.testing.assert_close(resumed[2], expected[2], **CLOSE)


def as_one(folder: str) -> dict[str, Any]:
    """What ranks are to accelerate, batches of a stream and of workers that draw, and whether ranks are waited for."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    trainer = trainer_of(folder, dataloader_num_workers=1)
    trainer.train_dataset.noise = True
    drawn = next(iter(trainer.get_train_dataloader()))["input_ids"]
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = sp_compile.as_one_process(Accelerator(cpu=True), trainer.model)
    streamed = [each["input_ids"] for each in accelerator.prepare(DataLoader(Stream(), batch_size=None))]
    mark = Path(folder, "mark")
    if accelerator.is_main_process:
        time.sleep(0.3)
        mark.write_text("")
    accelerator.wait_for_everyone()
    found = {"marked": mark.exists(), "drawn": drawn, "streamed": streamed, "labels": trainer.label_names}
    found["columns"] = trainer.model.config.model_type, "labels" in _columns(trainer)
    found["state"] = [(each.num_processes, each.process_index) for each in (PartialState(), accelerator)]
    return found | {"unwrapped": type(accelerator.unwrap_model(trainer.model)).__name__}


def _columns(trainer: Any) -> list[str]:
    trainer._set_signature_columns_if_needed()
    return trainer._signature_columns


def test_ranks_are_one_process_to_accelerate(ranks, tmp_path: Path):
    rows = Rows(6, 1)
    first, second = ranks(2).run(as_one, str(tmp_path))
    for rank, found in enumerate((first, second)):
        assert found["marked"]
        assert found["state"] == [(1, rank)] * 2
        assert found["labels"] == ["labels"]
        assert found["columns"] == ("llama", True)
        assert found["unwrapped"] == "LlamaForCausalLM"
        torch.testing.assert_close(found["streamed"], [rows[each]["input_ids"] for each in range(6)])
    torch.testing.assert_close(first["drawn"], second["drawn"])


def halved(folder: str) -> list[dict[str, float]]:
    """Two steps under bf16 autocast."""
    return fitted(folder, bf16=True, max_steps=1, eval_strategy="no", save_strategy="no")[0]


@pytest.mark.slow
def test_autocast_is_applied(ranks, tmp_path: Path):
    expected, exact = halved(str(tmp_path)), fitted(str(tmp_path), max_steps=1, eval_strategy="no")[0]
    for found in ranks(2).run(halved, str(tmp_path)):
        for each, other, wide in zip(found[:1], expected, exact, strict=False):
            assert each["loss"] == pytest.approx(other["loss"], rel=5e-3)
            assert each["loss"] != pytest.approx(wide["loss"], rel=1e-6)


def refusals(folder: str) -> dict[str, str]:
    """What is said to what cannot work."""
    import transformers
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    parallel = sp_compile.parallelize(built("Llama", **LLAMA), codegen="eager")
    alone = sp_compile.parallelize(built("Llama", **LLAMA), sp=1)
    found = {
        "forgotten": told(lambda: trainer_of(folder, kind=transformers.Trainer).train()),
        "forgotten, no use_cpu": told(lambda: trainer_of(folder, kind=transformers.Trainer, use_cpu=False).train()),
        "forgotten, evaluating": told(lambda: trainer_of(folder, kind=transformers.Trainer).evaluate()),
        "compiled": told(lambda: trainer_of(folder, torch_compile=True)),
        "searching": told(lambda: trainer_of(folder).hyperparameter_search()),
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    found["plain"] = told(lambda: sp_compile.as_one_process(Accelerator(cpu=True), parallel.module))
    found["groups"] = told(lambda: sp_compile.as_one_process(Accelerator(cpu=True), alone))
    prepared = Accelerator(cpu=True)
    prepared.prepare(torch.optim.SGD(parallel.parameters(), lr=1e-3))
    found["prepared"] = told(lambda: sp_compile.as_one_process(prepared, parallel))
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


def test_what_cannot_work_says_what_to_do(ranks, tmp_path: Path):
    first, second = ranks(2).run(refusals, str(tmp_path))
    for found in (first, second):
        assert found["forgotten"].startswith(f"{ConfigError.__name__}: accelerate takes each rank for a process")
        assert "sp_compile.Trainer(...) in place of transformers.Trainer(...)" in found["forgotten"]
        assert found["forgotten, evaluating"].startswith(f"{RankMismatchError.__name__}: ranks disagree on")
        assert "sp_compile.Trainer(...) in place of" in found["forgotten, evaluating"]
        assert found["compiled"].startswith(f"{ConfigError.__name__}: leave out torch_compile")
        assert found["searching"].startswith(f"{ConfigError.__name__}: hyperparameter_search would try other values")
        assert found["plain"].startswith(f"{UnsupportedModelError.__name__}: expected sp_compile.parallelize(model)")
        assert found["groups"].startswith(f"{MeshError.__name__}: the model is spread over 1 of 2 ranks")
        assert "DistributedDataParallel(model, process_group=mesh['dp'].get_group())" in found["groups"]
        assert found["prepared"].startswith(f"{ConfigError.__name__}: the Accelerator has prepared something already")
    assert "sp_compile.Trainer" in second["forgotten, no use_cpu"]
    assert first["forgotten, no use_cpu"].startswith("RankFailedError: rank 1 raised ConfigError")


def differing() -> str:
    """What ranks with other batches are told where accelerate was told nothing."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    parallel = sp_compile.parallelize(built("Llama", **LLAMA), codegen="eager").eval()
    try:
        parallel(torch.arange(5)[None] + dist.get_rank())
    except RankMismatchError as error:
        return str(error)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return "nothing"


def test_other_batches_name_accelerate_as_the_cause(ranks):
    for found in ranks(2).run(differing):
        assert found.startswith("ranks disagree on the values of input_ids")
        assert "sp_compile.as_one_process(Accelerator(), model)" in found


def test_the_trainer_takes_parallel_models_only(tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match=r"expected sp_compile\.parallelize\(model\), got LlamaForCausalLM"):
        trainer_of(str(tmp_path), kind=sp_compile.Trainer)


def test_the_library_imports_without_accelerate_and_peft():
    import subprocess
    import sys

    code = "import sys; sys.modules.update(accelerate=None, peft=None, transformers=None); import sp_compile"
    found = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
