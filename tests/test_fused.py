"""torch's fused kernels for GPUs, behind stand-ins on a CPU that compute what torch documents of them.

What the calls are given is checked by torch's own shapes; that a GPU computes it right is
tested in ``test_cuda.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sp_compile
from sp_compile.errors import KernelError
from sp_compile.kernels import Saved, attend, fused, gradients, rates
from sp_compile.kernels.fused import CAUSAL, EVERYTHING, Window, windowed
from sp_compile.kernels.rates import Rate, Shape
from sp_compile.kernels.regions import UNBOUNDED, Region
from sp_compile.score_rule import evaluate
from tests import training
from tests.local_graphs import kernels_of
from tests.ranks import RankPool
from tests.test_kernels import dense, inputs, masks

CPU = torch.device("cpu")


def seen_by(window: Window, queries: int, keys: int) -> torch.Tensor:
    ahead = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - (keys - queries)
    left, right = (keys + queries if each < 0 else each for each in window)
    return (ahead >= -left) & (ahead <= right)


def flash_forward(q: Any, k: Any, v: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int, drop: float, causal: bool,
                  debug: bool, *, scale: float, window_size_left: int, window_size_right: int) -> Any:  # fmt: skip
    assert (cum_q, cum_k, drop, debug) == (None, None, 0.0, False)
    assert (q.shape[1], k.shape[1]) == (max_q, max_k)
    assert q.shape[-1] % 8 == 0
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    window = Window(window_size_left, 0 if causal else window_size_right)
    seen = seen_by(window, max_q, max_k)
    assert seen.any(dim=1).all(), "no row is without a key, for which flash has a value of its own"
    out, lse = dense(*(each.transpose(1, 2) for each in (q, k, v)), seen, scale=scale)
    return out.transpose(1, 2).to(q.dtype), lse.float(), None, None, None


def from_lse(q: Any, k: Any, v: Any, out: Any, lse: Any, grad: Any, scale: float, seen: torch.Tensor) -> Any:
    """Gradients where ``out`` and ``lse`` are those of all keys, ``[B, H, rows, D]``."""
    group = q.shape[1] // k.shape[1]
    q, k, v, out, grad = (each.double() for each in (q, k, v, out, grad))
    wide_k, wide_v = (each.repeat_interleave(group, dim=1) for each in (k, v))
    score = (q @ wide_k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    weights = torch.exp(score - lse.double().unsqueeze(-1))
    change = weights * (grad @ wide_v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
    dk, dv = (each.transpose(-1, -2) @ other for each, other in ((change, q), (weights, grad)))
    return change @ wide_k, *(each.unflatten(1, (-1, group)).sum(2) for each in (dk, dv))


def flash_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cum_q: Any, cum_k: Any, max_q: int,
                   max_k: int, drop: float, causal: bool, state: Any, unused: Any, *, scale: float,
                   window_size_left: int, window_size_right: int) -> Any:  # fmt: skip
    seen = seen_by(Window(window_size_left, 0 if causal else window_size_right), max_q, max_k)
    rows = (each.transpose(1, 2) for each in (q, k, v, out))
    found = from_lse(*rows, lse, grad.transpose(1, 2), scale, seen)
    return tuple(each.transpose(1, 2).to(q.dtype) for each in found)


def cudnn_forward(q: Any, k: Any, v: Any, bias: Any, with_lse: bool, drop: float, causal: bool, *, scale: float) -> Any:
    assert (bias, with_lse, drop) == (None, True, 0.0)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    out, lse = dense(q, k, v, seen.tril() if causal else seen, scale=scale)  # from the first corner
    return out.to(q.dtype), lse.float().unsqueeze(-1), None


def cudnn_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, seed: Any, offset: Any, bias: Any, cum_q: Any,
                   cum_k: Any, max_q: int, max_k: int, drop: float, causal: bool, *, scale: float) -> Any:  # fmt: skip
    assert lse.shape == (*q.shape[:3], 1)
    seen = torch.ones(max_q, max_k, dtype=torch.bool)
    found = from_lse(q, k, v, out, lse.squeeze(-1), grad, scale, seen.tril() if causal else seen)
    return tuple(each.to(q.dtype) for each in found)


STAND_INS = SimpleNamespace(
    _flash_attention_forward=flash_forward,
    _flash_attention_backward=flash_backward,
    _scaled_dot_product_cudnn_attention=cudnn_forward,
    _scaled_dot_product_cudnn_attention_backward=cudnn_backward,
)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Kernels by stand-ins, measured for short sequences, and rates in a folder of the test."""
    monkeypatch.setattr(fused, "aten", STAND_INS)
    monkeypatch.setenv(rates.FOLDER, str(tmp_path))
    monkeypatch.setattr(rates, "SHORT", 8)
    monkeypatch.setattr(rates, "LONG", 64)
    monkeypatch.setattr(rates, "PLANNED", 0)
    rates.measured.cache_clear()
    yield tmp_path
    rates.measured.cache_clear()


def preferring(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have one kernel be the fastest wherever it can be used."""
    known = {each: Rate(call=float(each != name)) for each in fused.KERNELS}
    monkeypatch.setattr(rates, "measured", lru_cache(lambda shape, device: known))


# windows


@pytest.mark.parametrize("seed", range(200))
def test_a_band_is_a_window_of_its_corner(seed: int):
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    rows, columns = number(1, 12), number(1, 12)
    low = number(-14, 14) if number(0, 4) else -UNBOUNDED
    high = max(low, -14) + number(0, 14) if number(0, 4) else UNBOUNDED
    region = Region(-1, 3, 3 + rows, 5, 5 + columns, low, high)
    ahead = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
    right = (ahead >= low) & (ahead <= high)
    found, cut = torch.zeros(rows, columns, dtype=torch.bool), windowed(region)
    if cut is not None:
        box, window = cut
        part = seen_by(window, box.q_end - box.q_start, box.k_end - box.k_start)
        assert part.any(dim=1).all()
        assert part.any(dim=0).all()
        found[box.q_start - 3 : box.q_end - 3, box.k_start - 5 : box.k_end - 5] = part
    assert torch.equal(found, right)


# against the definition


@pytest.mark.parametrize("kernel", fused.KERNELS)
@pytest.mark.parametrize("queries", [37, 300])
@pytest.mark.parametrize("mask", masks(3))
def test_masks(on_gpu: Path, monkeypatch: pytest.MonkeyPatch, mask: str, queries: int, kernel: str):
    preferring(monkeypatch, kernel)
    rule, operands = masks(queries)[mask]
    q, k, v = inputs(heads=2, queries=queries, widths=(12, 5))
    allowed = evaluate(rule, operands, ("mask",)).get("mask")
    found = attend("fused", q, k, v, operands, [], rule, 0.3, None, None)
    for each, right in zip(found, dense(q, k, v, allowed), strict=True):
        torch.testing.assert_close(each.double(), right, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("kernel", fused.KERNELS)
@pytest.mark.parametrize("mask", ["everything", "causal", "window", "sinks", "documents", "short documents", "matrix"])
def test_gradients(on_gpu: Path, monkeypatch: pytest.MonkeyPatch, mask: str, kernel: str):
    preferring(monkeypatch, kernel)
    rule, operands = masks(150)[mask]
    q, k, v = (each.requires_grad_() for each in inputs(heads=4, groups=2, queries=150, widths=(12, 5), batch=2))
    allowed = evaluate(rule, operands, ("mask",)).get("mask")
    right, _ = dense(q, k, v, allowed)
    grad = torch.randn_like(right)
    expected = torch.autograd.grad(right, (q, k, v), grad)
    with torch.no_grad():
        out, lse = attend("fused", q, k, v, operands, [], rule, 0.3, None, None)
        saved = Saved(q, k, v, out, lse, grad.float(), None)
        found, _ = gradients("fused", saved, operands, [], rule, 0.3, None, None, ())
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-5)


def test_rows_of_a_batch_with_masks_of_their_own_and_keys_that_do_not_exist(on_gpu: Path, monkeypatch):
    preferring(monkeypatch, "flash")
    q, k, v = inputs(heads=4, groups=2, queries=90, batch=3)
    rows, limits = torch.arange(90), torch.tensor([90, 41, 0])[:, None, None, None]
    operands = [rows[None, None, :, None], rows[None, None, None, :], limits]
    rule = "t0 = le(x1, x0); t1 = lt(x1, x2); mask = and(t0, t1)"
    valid = rows != 7
    found = attend("fused", q, k, v, operands, [], rule, 0.3, None, valid)
    mask = (rows[None, :] <= rows[:, None]) & (rows < limits) & valid
    for each, right in zip(found, dense(q, k, v, mask), strict=True):
        torch.testing.assert_close(each.double(), right, rtol=5e-6, atol=5e-6)


# rates


SHAPE = Shape(4, 2, 16, 16, "bfloat16", True)


def test_rates_are_measured_once_and_kept_on_disk(on_gpu: Path, monkeypatch: pytest.MonkeyPatch):
    found = rates.measured(SHAPE, CPU)
    assert {*found} == {"flash", "cudnn"}
    assert all(each.pair > 0 and not each.refused for each in found.values())
    (file,) = on_gpu.rglob("*.json")
    assert json.loads(file.read_text())["flash"]["pair"] == found["flash"].pair
    rates.measured.cache_clear()
    monkeypatch.setattr(rates, "_measure", lambda *_: pytest.fail("it was measured before"))
    assert rates.measured(SHAPE, CPU) == found


def test_a_kernel_that_is_wrong_or_missing_is_passed_over(on_gpu: Path, monkeypatch: pytest.MonkeyPatch):
    def from_the_wrong_corner(*args: Any, **more: Any) -> Any:
        return cudnn_forward(*args[:6], False, **more)

    def missing(*args: Any, **more: Any) -> Any:
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(fused, "aten", SimpleNamespace(**{**vars(STAND_INS), "_scaled_dot_product_cudnn_attention":
                                                          from_the_wrong_corner}))  # fmt: skip
    assert "off by" in rates.measured(SHAPE, CPU)["cudnn"].refused
    assert rates.fastest(SHAPE, EVERYTHING, 9000, 9000, CPU) == "flash"
    assert rates.refused(SHAPE, CPU) is None
    rates.measured.cache_clear()
    for each in on_gpu.rglob("*.json"):
        each.unlink()
    monkeypatch.setattr(fused, "aten", SimpleNamespace(**{**vars(STAND_INS), "_flash_attention_forward": missing}))
    assert rates.refused(SHAPE, CPU) == "torch's flash attention does not run here: no kernel image"
    with pytest.raises(KernelError, match=r"no fused kernel .* \(flash: no kernel image\); pass kernel='flex' or"):
        rates.fastest(SHAPE, Window(3, 0), 100, 100, CPU)


def test_the_faster_kernel_is_taken_where_it_can_be(on_gpu: Path, monkeypatch: pytest.MonkeyPatch):
    known = {"cudnn": Rate(1.0, 1e-3), "flash": Rate(0.1, 2e-3)}
    monkeypatch.setattr(rates, "measured", lru_cache(lambda *_: known))
    monkeypatch.setattr(rates, "PLANNED", 10)
    cases = {(EVERYTHING, 100, 100): "cudnn", (EVERYTHING, 2, 4): "flash", (EVERYTHING, 20, 20): "flash",
             (CAUSAL, 100, 100): "cudnn", (CAUSAL, 100, 101): "flash", (Window(5, 0), 100, 100): "flash"}  # fmt: skip
    for (window, queries, keys), name in cases.items():
        assert rates.fastest(SHAPE, window, queries, keys, CPU) == name


# the calls, by torch's own shapes


@pytest.mark.parametrize("kernel", fused.KERNELS)
def test_torch_takes_the_calls_for_a_gpu(kernel: str):
    with torch.device("meta"):
        q, grad = (torch.empty(2, 8, 70, dim, dtype=torch.bfloat16, device="meta") for dim in (20, 12))
        k, v = (torch.empty(2, 2, 90, dim, dtype=torch.bfloat16, device="meta") for dim in (20, 12))
        out, lse = fused.attend(kernel, q, k, v, 0.3, EVERYTHING)
        assert (out.shape, lse.shape, lse.dtype) == ((2, 8, 70, 12), (2, 8, 70), torch.float32)
        found = fused.attend_backward(kernel, (q, k, v), out, lse, grad, 0.3, EVERYTHING)
        assert [each.shape for each in found] == [q.shape, k.shape, v.shape]


# whole models


def trained_by_fused_kernels(folder: str, **options: Any) -> tuple[float, set[str]]:
    """How far loss and gradients of ragged steps are from those of the unsharded model, and the kernels that ran."""
    worst = 0.0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fused, "aten", STAND_INS)
        patched.setattr(fused, "serves", lambda *_: None)
        patched.setenv(rates.FOLDER, folder)
        for name, value in (("SHORT", 8), ("LONG", 64), ("PLANNED", 0)):
            patched.setattr(rates, name, value)
        own, other = (training.built("Mistral", sliding_window=20) for _ in range(2))
        parallel = sp_compile.parallelize(own, kernel="fused", codegen="eager", **options)
        for shape in ((1, 57), (2, 33), (1, 2)):
            step = training.batch_of(shape, slice(0, 1))
            worst = max(worst, training.apart(training.stepped(parallel, step), training.stepped(other, step)))
        return worst, kernels_of(parallel)


@pytest.mark.parametrize("attention", ["allgather_kv", "fetch", "ulysses"])
def test_a_model_trains_by_fused_kernels_on_two_ranks(ranks: Callable[[int], RankPool], tmp_path: Path, attention: str):
    for apart, used in ranks(2).run(trained_by_fused_kernels, str(tmp_path), attention=attention):
        assert apart <= 1e-4
        assert used == {"fused"}
