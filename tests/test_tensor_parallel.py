"""Models that tensor parallelism has cut over tp run over sp besides, as one rank runs them whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cut import (
    cut,
    cut_step,
    dropped_step,
    llama_step,
    padded_batch,
    sums_over_tp,
    twice_summed,
    what_is_refused,
)
from tests.test_training import EXACT, ROUNDED
from tests.training import apart, batch_of, built, plain_step, stepped


@pytest.mark.parametrize(
    ("dp", "sp", "fsdp", "config"),
    [
        (1, 1, False, {}),
        (1, 2, False, {"attention": "ulysses"}),
        (1, 2, True, {}),
        pytest.param(2, 2, True, {"attention": "fetch"}, marks=pytest.mark.slow),
        pytest.param(1, 2, False, {"attention": "ring", "keep_gathered": False}, marks=pytest.mark.slow),
        pytest.param(1, 2, False, {"codegen": "inductor"}, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_the_whole_model(ranks, dp: int, sp: int, fsdp: bool, config: dict[str, Any]):
    """And the mean over ranks of dp, each of which knows the loss of its own batch."""
    steps = [plain_step(cut(), padded_batch(seed)) for seed in range(dp)]
    expected = {name: sum(each[name] for each in steps) / dp for name in steps[0]}
    for i, found in enumerate(ranks(2 * dp * sp).run(cut_step, dp, sp, fsdp, timeout=900, **config)):
        of_batch = steps[i // (2 * sp)]
        own = {name: of_batch[name] for name in ("loss", "logits")}
        assert apart(found, expected | own) <= EXACT


def test_dropout_is_that_of_the_whole_model_or_refused(ranks):
    expected = dropped_step("embeddings", 0, 7)
    for sp in (1, 2):
        for found in ranks(2 * sp).run(dropped_step, "embeddings", sp, 7):
            assert apart(found, expected) <= EXACT
    for found in ranks(2).run(dropped_step, "queries", 1, 7):
        assert found.startswith("CaptureError: dropout at tests/cut.py:")


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("Qwen3", "whole"),
        pytest.param("Llama", "whole", marks=pytest.mark.slow),
        pytest.param("Llama", "attention only", marks=pytest.mark.slow),
    ],
)
def test_models_of_transformers_train_and_generate(ranks, name: str, plan: str):
    model: Any = built(name, torch.float64)
    expected = stepped(model, batch_of())
    tokens = model.eval().generate(batch_of()["input_ids"], max_new_tokens=4, do_sample=False)
    for found, generated, report in ranks(4).run(llama_step, name, plan, timeout=300):
        assert apart(found, expected) <= ROUNDED
        assert generated == tokens[0].tolist()
        assert "0 fallbacks" in report
        assert report.count("  all_reduce ") == {"whole": 5, "attention only": 2}[plan]


WIDTH, EIGHT_BYTES, SUMS = 32, 8, 3  # of looked-up rows, and of two attentions


def test_reports_count_what_crosses_between_ranks_of_tp(ranks):
    for found in ranks(2).run(sums_over_tp, 1):
        assert found == [2 * 15 * WIDTH * EIGHT_BYTES] * SUMS


def test_nothing_is_summed_over_tp_again_to_bring_fewer_bytes_to_ranks_of_sp(ranks):
    """Where computing is as good as free, so that it would pay to gather ids in place of keys and values."""
    for found in ranks(4).run(sums_over_tp, 2, link_rate=1e3, compute_rate=1e12):
        assert found == [2 * 8 * WIDTH * EIGHT_BYTES] * SUMS


def test_what_has_no_local_form_is_refused_by_name(ranks):
    for norms, inside, logits, returned, spread in ranks(4).run(what_is_refused):
        assert logits.startswith("CaptureError: the loss is computed from a part of the logits")
        assert norms.startswith("CaptureError: ")
        assert "local tensors of all tokens" in norms
        assert inside.startswith("CaptureError: ")
        assert "let modules return local tensors" in inside
        assert "the model returns a value that is spread over ranks" in returned
        assert "fully_shard goes around what parallelize returns" in spread


def test_gradients_are_not_summed_twice(ranks):
    for found in ranks(4).run(twice_summed):
        assert "take replicated_with_grad_allreduce out" in found
