"""Which kernel computes an attention: what each refuses and why, and what a device prefers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from sp_compile.errors import KernelError
from sp_compile.kernels import choice
from sp_compile.kernels.choice import KERNELS, Need, choose, preferred
from sp_compile.kernels.rates import Shape

CPU = Need(device="cpu", dtype=torch.float32, head_dim=64, value_dim=64, lse=False)
GPU = replace(CPU, device="cuda", dtype=torch.bfloat16)

REFUSED = {
    "another device": (CPU, {"device": "mps"}, "it does not run on mps"),
    "doubles": (CPU, {"dtype": torch.float64}, "it does not take torch.float64"),
    "doubles on a GPU": (GPU, {"dtype": torch.float64}, "it does not take torch.float64"),
    "means for masks of heads": (
        CPU, {"empty_mean": True, "mask_per_head": True},
        "it does not tell for each head which queries see no key, which get the mean of the values in this model"),
    "means for masks of heads on a GPU": (
        GPU, {"empty_mean": True, "mask_per_head": True},
        "it does not tell for each head which queries see no key, which get the mean of the values in this model"),
    "small heads": (GPU, {"head_dim": 8}, "it takes head dims of at least 16 on a GPU, not 8"),
    "small values": (GPU, {"value_dim": 4}, "it takes head dims of at least 16 on a GPU, not 4"),
    "large heads": (GPU, {"value_dim": 512}, "it takes head dims of at most 256 on a GPU, not 512"),
    "a log-sum-exp": (CPU, {"lse": True}, "its generated code returns no log-sum-exp on a CPU, which the model uses"),
    "gradients": (CPU, {"differentiable": True}, "its generated code has no gradients on a CPU"),
    "a bias that is learned": (
        GPU, {"differentiable": True, "learns_rule": True}, "it is not used where a bias is learned"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _capable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine like any other: with vectors, and without a GPU on which kernels are measured."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("need", "change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_flex_attention_cannot_serve_is_refused_with_those_that_can(need: Need, change: Any, reason: str):
    assert choose("flex", need) == ("flex", None)
    asked = replace(need, **change)
    able = "'tiles' or 'fused'" if KERNELS["fused"](asked) is None else "'tiles'"
    message = f"^kernel 'flex' cannot serve: {re.escape(reason)}; pass kernel={able} or 'dense' or 'dense_fp64'$"
    with pytest.raises(KernelError, match=message):
        choose("flex", asked)


FUSED_REFUSES = {
    "torch has no such kernel on cpu": {"device": "cpu"},
    "they take float16 or bfloat16, not torch.float32": {"dtype": torch.float32},
    "they take head dims of at most 256, not 257": {"value_dim": 257},
    "it does not change scores, add a bias or drop weights": {"changes_scores": True},
    "it has no gradients of the log-sum-exp, which the model uses": {"differentiable": True, "lse": True},
    "it takes queries, keys and values of one dtype": {"kept_dtype": torch.float8_e5m2},
}


@pytest.mark.parametrize(("reason", "change"), FUSED_REFUSES.items())
def test_what_fused_kernels_cannot_serve(reason: str, change: Any):
    for each in (GPU, replace(GPU, differentiable=True), replace(GPU, lse=True), replace(GPU, mask_per_head=True)):
        assert choose("fused", each) == ("fused", None)
    with pytest.raises(KernelError, match=f"^kernel 'fused' cannot serve: {re.escape(reason)}; pass kernel='tiles'"):
        choose("fused", replace(GPU, **change))


def test_a_cpu_without_vectors_is_refused(monkeypatch: pytest.MonkeyPatch):
    for capability, refused in (("DEFAULT", True), ("AVX2", False), ("AVX512", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert KERNELS["flex"](CPU) == ("it needs a CPU with AVX2" if refused else None)
        assert KERNELS["flex"](GPU) is None
        assert choose("auto", replace(CPU, changes_scores=True)) == ("tiles" if refused else "flex", None)


@pytest.mark.parametrize(
    "need",
    [replace(CPU, head_dim=8, value_dim=4), replace(GPU, lse=True), replace(GPU, head_dim=16, value_dim=16),
     replace(CPU, empty_mean=True), replace(GPU, mask_per_head=True), replace(CPU, dtype=torch.float16),
     replace(CPU, compiled=False), replace(GPU, dtype=torch.float32)],
    ids=str,
)  # fmt: skip
def test_what_flex_attention_serves(need: Need):
    assert choose("flex", need) == ("flex", None)


@pytest.mark.parametrize("kernel", ["tiles", "dense", "dense_fp64"])
def test_the_other_kernels_serve_all(kernel: str):
    for need, change, _ in REFUSED.values():
        assert choose(kernel, replace(need, **change)) == (kernel, None)


@pytest.mark.parametrize(
    ("need", "names"),
    [
        (CPU, ("tiles",)),
        (replace(CPU, changes_scores=True), ("flex", "tiles")),
        (replace(CPU, changes_scores=True, compiled=False), ("tiles",)),
        (GPU, ("flex", "fused", "tiles")),
        (replace(GPU, changes_scores=True), ("flex", "fused", "tiles")),
        (replace(GPU, compiled=False), ("fused", "tiles")),
        (replace(GPU, differentiable=True), ("fused", "flex", "tiles")),
        (replace(CPU, device="mps", changes_scores=True), ("tiles",)),
    ],
    ids=str,
)
def test_auto_takes_what_the_device_prefers(need: Need, names: tuple[str, ...]):
    assert preferred(need) == names
    assert choose("auto", need) == (names[0], None)


@pytest.mark.parametrize(("need", "change", "reason"), REFUSED.values(), ids=REFUSED)
def test_auto_passes_over_what_cannot_serve_and_says_so_on_a_gpu(need: Need, change: Any, reason: str):
    asked = replace(need, changes_scores=True, **change)
    name, told = choose("auto", asked)
    assert name == "tiles"
    if need.device == "cuda":
        assert told is not None
        assert {*told.split("; ")} == {f"kernel flex: {reason}", f"kernel fused: {KERNELS['fused'](asked)}"}
    else:
        assert told is None


def test_gradients_on_a_gpu_are_those_of_fused_kernels_else_of_flex_attention():
    need = replace(GPU, differentiable=True)
    assert choose("auto", need) == ("fused", None)
    for change in ({"dtype": torch.float32}, {"changes_scores": True}, {"lse": True}):
        assert choose("auto", replace(need, **change)) == ("flex", None)
    name, told = choose("auto", replace(need, compiled=False, dtype=torch.float32))
    assert (name, told) == ("tiles", "kernel fused: they take float16 or bfloat16, not torch.float32")


def test_fused_kernels_that_do_not_run_on_a_device_are_passed_over(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def refusing(shape: Shape, device: torch.device) -> str:
        asked.append((shape, device))
        return "no kernel image"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(choice, "refused", refusing)
    need = replace(GPU, differentiable=True, heads=8, kv_heads=2)
    told = "kernel fused: no kernel image"  # which others of the kind may have
    assert choose("auto", need) == ("flex", told)
    assert choose("auto", replace(need, compiled=False)) == ("tiles", told)
    assert {*asked} == {(Shape(8, 2, 64, 64, "bfloat16", True), torch.device("cuda", 1))}
    with pytest.raises(KernelError, match="kernel 'fused' cannot serve: no kernel image"):
        choose("fused", need)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """A GPU on which fused kernels were measured to be the faster ones; the shapes that were asked for."""
    asked: list[Shape] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(choice, "refused", lambda *_: None)
    monkeypatch.setattr(choice, "beats_flex", lambda shape, device: bool(asked.append(shape)) or True)
    return asked


def test_generated_inference_takes_fused_kernels_where_they_were_measured_to_be_faster(faster, monkeypatch):
    need = replace(GPU, heads=8, kv_heads=2)
    assert choose("auto", need) == ("fused", None)
    assert choose("auto", replace(need, lse=True)) == ("fused", None)
    assert {*faster} == {Shape(8, 2, 64, 64, "bfloat16", False)}
    monkeypatch.setattr(choice, "beats_flex", lambda *_: False)
    assert choose("auto", need) == ("flex", None)


@pytest.mark.parametrize(
    "change",
    [{"steps": True}, {"short": True}, {"irregular": True}, {"mask_per_head": True}, {"changes_scores": True},
     {"dtype": torch.float32}, {"kept_dtype": torch.float8_e5m2}],
    ids=str,
)  # fmt: skip
def test_generated_inference_keeps_generated_code_where_masks_are_no_large_bands(change: Any, faster: list[Shape]):
    assert choose("auto", replace(GPU, **change)) == ("flex", None)
    assert faster == [], "nothing is measured in vain"


def test_short_parts_train_by_generated_code():
    assert choose("auto", replace(GPU, differentiable=True, short=True)) == ("flex", None)
    assert choose("auto", replace(GPU, compiled=False, short=True)) == ("fused", None)


def test_the_last_that_a_device_prefers_serves_all():
    for need in (CPU, GPU, replace(CPU, device="mps"), replace(CPU, changes_scores=True), replace(GPU, compiled=False)):
        last = KERNELS[preferred(need)[-1]]
        assert all(last(replace(need, **change)) is None for _, change, _ in REFUSED.values())
