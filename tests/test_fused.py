"""torch's fused kernels for GPUs, behind stand-ins on a CPU that compute what torch documents of them.

What the calls are given is checked by torch's own shapes; that a GPU computes it right is
tested in ``test_cuda.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sp_compile
from sp_compile.errors import KernelError
from sp_compile.kernels import Saved, attend, calls, fused, gradients, rates
from sp_compile.kernels.fused import CAUSAL, EVERYTHING, Lengths, Window
from sp_compile.kernels.plan import plan_regions
from sp_compile.kernels.rates import PACKED, Rate, Shape
from sp_compile.kernels.regions import as_tensor
from sp_compile.layout import token_layout
from sp_compile.score_rule import evaluate
from tests import training
from tests.local_graphs import kernels_of
from tests.ranks import RankPool
from tests.test_kernels import DOCUMENTS, WINDOW, dense, documents, inputs, masks

WINDOWED = f"{WINDOW}; t3 = eq(x3, x2); t4 = copy(mask); mask = and(t4, t3)"
CPU = torch.device("cpu")


def seen_by(window: Window, queries: int, keys: int) -> torch.Tensor:
    ahead = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - (keys - queries)
    left, right = (keys + queries if each < 0 else each for each in window)
    return (ahead >= -left) & (ahead <= right)


def rectangles(lengths: tuple[Any, ...], *of_queries_and_keys: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Packed rows ``[rows, ...]`` of queries, and of keys, cut into their rectangles, as rows of a batch of one."""
    cum_q, cum_k, max_q, max_k = lengths
    assert cum_q.dtype == cum_k.dtype == torch.int32
    sizes = cum_q.diff().tolist(), cum_k.diff().tolist()
    assert (max(sizes[0]), max(sizes[1])) == (max_q, max_k)
    cut = [[part[None] for part in each.split(size)]
           for tensors, size in zip(of_queries_and_keys, sizes, strict=True) for each in tensors]  # fmt: skip
    return [list(each) for each in zip(*cut, strict=True)]


def as_flash_takes_it(left: int, right: int, causal: bool, most_keys: int) -> Window:
    """The window that torch's flash computes: none is as many keys as there are, beside another bound."""
    left, right = (-1 if each >= most_keys else each for each in (left, 0 if causal else right))
    return Window(most_keys if left < 0 <= right else left, most_keys if right < 0 <= left else right)


def flash_forward(q: Any, k: Any, v: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int, drop: float, causal: bool,
                  debug: bool, *, scale: float, window_size_left: int, window_size_right: int) -> Any:  # fmt: skip
    assert (drop, debug) == (0.0, False)
    assert q.shape[-1] % 8 == 0
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    window = as_flash_takes_it(window_size_left, window_size_right, causal, max_k)
    if cum_q is None:
        assert cum_k is None
        assert (q.shape[1], k.shape[1]) == (max_q, max_k)
        return *_flash(q, k, v, window, scale), None, None, None
    parts = [_flash(*each, window, scale) for each in rectangles((cum_q, cum_k, max_q, max_k), [q], [k, v])]
    out, lse = torch.cat([each[0][0] for each in parts]), torch.cat([each[1][0] for each in parts], dim=1)
    return out, lse, None, None, None


def _flash(q: Any, k: Any, v: Any, window: Window, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    seen = seen_by(window, q.shape[1], k.shape[1])
    assert seen.any(dim=1).all(), "no row is without a key, for which flash has a value of its own"
    out, lse = dense(*(each.transpose(1, 2) for each in (q, k, v)), seen, scale=scale)
    return out.transpose(1, 2).to(q.dtype), lse.float()


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
    window = as_flash_takes_it(window_size_left, window_size_right, causal, max_k)
    if cum_q is None:
        return _flash_backward(grad, q, k, v, out, lse, window, scale)
    parts = []
    for of_grad, own, of_out, of_lse, *kv in rectangles((cum_q, cum_k, max_q, max_k), [grad, q, out, lse.T], [k, v]):
        parts.append(_flash_backward(of_grad, own, *kv, of_out, of_lse.transpose(1, 2), window, scale))
    return tuple(torch.cat([each[i][0] for each in parts]) for i in range(3))


def _flash_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, window: Window, scale: float) -> Any:
    rows = (each.transpose(1, 2) for each in (q, k, v, out))
    found = from_lse(*rows, lse, grad.transpose(1, 2), scale, seen_by(window, q.shape[1], k.shape[1]))
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


def forget() -> None:
    """What was measured, and the calls that were made."""
    rates._tried.cache_clear()
    rates._known.cache_clear()
    calls._calls_of.cache_clear()


def pretend(patched: pytest.MonkeyPatch, folder: str, planned: int) -> None:
    """Kernels by stand-ins, measured for short sequences; regions of so many pairs are calls of their own."""
    patched.setattr(fused, "aten", STAND_INS)
    patched.setattr(fused, "PLANNED", planned)
    patched.setenv(rates.FOLDER, folder)
    for name, value in (("SHORT", 8), ("LONG", 64)):
        patched.setattr(rates, name, value)
    forget()


@pytest.fixture(params=[0, 500, 1 << 24], ids="calls of {} pairs".format)
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest):
    """Kernels by stand-ins, rates in a folder of the test; all, some or no regions are calls of their own."""
    pretend(monkeypatch, str(tmp_path), request.param)
    yield tmp_path
    forget()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As :func:`on_gpu`, with every region a call of its own."""
    pretend(monkeypatch, str(tmp_path), 0)
    yield tmp_path
    forget()


def preferring(monkeypatch: pytest.MonkeyPatch, name: str, packing: bool = True) -> None:
    """Have one kernel be the fastest wherever it can be used."""
    known = {each: Rate(call=float(each != name)) for each in fused.KERNELS}
    known[PACKED] = Rate(refused="" if packing else "not here")
    monkeypatch.setattr(rates, "measured", lambda shape, device: known)


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


LAYOUTS = [((700,), 1), ((700,), 4), ((130, 41, 260, 3, 64), 1), ((130, 41, 260, 3, 64), 2), ((30,) * 20, 4), ((5,), 3)]


@pytest.mark.parametrize("packing", [True, False], ids="packing {}".format)
@pytest.mark.parametrize("rule", [DOCUMENTS, WINDOWED], ids=["causal", "window"])
@pytest.mark.parametrize(("lengths", "sp"), LAYOUTS, ids=str)
def test_ranks_of_a_layout(
    on_gpu: Path, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], sp: int, rule: str, packing: bool
):
    preferring(monkeypatch, "flash", packing)
    q, k, v = inputs(heads=4, groups=2, queries=sum(lengths), widths=(8, 8))
    operands = documents([*lengths])
    right = dense(q, k, v, evaluate(rule, operands, ("mask",))["mask"])
    layout = token_layout(lengths, sp)
    keys, valid, wanted = layout.local_index.reshape(-1), layout.valid.reshape(-1), torch.randn_like(q)
    grads = [torch.zeros_like(each, dtype=torch.float32) for each in (q, k, v)]
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    expected = torch.autograd.grad(dense(q, k, v, evaluate(rule, operands, ("mask",))["mask"])[0], (q, k, v), wanted)
    with torch.no_grad():
        for rank in range(sp):
            rows = layout.local_index[rank]
            own = [operands[0][rows], operands[1][:, keys], operands[2][rows], operands[3][:, keys]]
            plan = as_tensor(plan_regions(own, [], rule, valid, len(rows), len(keys), boxes=False))
            parts = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            out, lse = attend("fused", *parts, own, [], rule, 0.3, plan, valid)
            real = layout.valid[rank]
            for each, other in zip((out, lse), right, strict=True):
                torch.testing.assert_close(each[:, :, real].double(), other[:, :, rows[real]], rtol=5e-6, atol=5e-6)
            grad = torch.where(real[:, None], wanted[:, :, rows].float(), 0.0)
            saved = Saved(*parts, out, lse, grad, None)
            found, _ = gradients("fused", saved, own, [], rule, 0.3, plan, valid, ())
            for whole, each, at, there in zip(grads, found, (rows, keys, keys), (real, valid, valid), strict=True):
                whole.index_add_(2, at[there], each[:, :, there].float())
    for each, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=2e-5)


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


def test_rates_are_measured_once_and_kept_on_disk(alone: Path, monkeypatch: pytest.MonkeyPatch):
    found = rates.measured(SHAPE, CPU)
    assert {*found} == {"flash", "cudnn", PACKED}
    assert all(each.pair > 0 and not each.refused for each in found.values())
    kept = {each.stem: json.loads(each.read_text()) for each in alone.rglob("*.json")}
    assert {name: each["pair"] for name, each in kept.items()} == {name: each.pair for name, each in found.items()}
    forget()
    with monkeypatch.context() as patched:
        patched.setattr(rates, "_measure", lambda *_: pytest.fail("it was measured before"))
        assert rates.measured(SHAPE, CPU) == found
    for place, name, other in ((torch.backends.cudnn, "version", lambda: 1), (rates, "sources", lambda: "of others")):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, other)
            patched.setattr(rates, "_measure", lambda *_: Rate(pair=7.0))
            forget()
            assert rates.measured(SHAPE, CPU)["flash"] == Rate(pair=7.0), "it was measured with another library"


def test_what_a_kernel_raises_is_not_kept_on_disk(alone: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def failing(name: str, shape: Shape, device: torch.device) -> Rate:
        asked.append(name)
        raise RuntimeError("Failed to find C compiler\nmore")

    monkeypatch.setattr(rates, "_measure", failing)
    for _ in range(3):
        assert rates.measured(SHAPE, CPU)["flash"].refused == "Failed to find C compiler"
    assert sorted(asked) == ["cudnn", "flash", PACKED], "it is asked once in a process"
    assert not [*alone.rglob("*.json")]


def test_what_memory_did_not_suffice_for_is_tried_again(alone: Path, monkeypatch: pytest.MonkeyPatch):
    now, asked = [1000.0], []

    def scarce(name: str, shape: Shape, device: torch.device) -> Rate:
        asked.append(name)
        if len(asked) <= 3:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return Rate(pair=2.0)

    monkeypatch.setattr(rates, "_measure", scarce)
    monkeypatch.setattr(rates.time, "monotonic", lambda: now[0])
    for _ in range(3):
        assert rates.measured(SHAPE, CPU)["flash"].refused == "CUDA out of memory."
    assert len(asked) == 3, "not at every call"
    assert not [*alone.rglob("*.json")]
    now[0] += rates.AGAIN
    assert rates.measured(SHAPE, CPU)["flash"] == Rate(pair=2.0)
    assert {each.stem for each in alone.rglob("*.json")} == {"cudnn", "flash", PACKED}


def test_a_kernel_that_is_wrong_or_missing_is_passed_over(alone: Path, monkeypatch: pytest.MonkeyPatch):
    def from_the_wrong_corner(*args: Any, **more: Any) -> Any:
        return cudnn_forward(*args[:6], False, **more)

    def missing(*args: Any, **more: Any) -> Any:
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(fused, "aten", SimpleNamespace(**{**vars(STAND_INS), "_scaled_dot_product_cudnn_attention":
                                                          from_the_wrong_corner}))  # fmt: skip
    assert "off by" in rates.measured(SHAPE, CPU)["cudnn"].refused
    assert rates.fastest(SHAPE, EVERYTHING, 9000, 9000, CPU) == "flash"
    assert rates.refused(SHAPE, CPU) is None
    forget()
    for each in alone.rglob("*.json"):
        each.unlink()
    monkeypatch.setattr(fused, "aten", SimpleNamespace(**{**vars(STAND_INS), "_flash_attention_forward": missing}))
    assert rates.refused(SHAPE, CPU) == "torch's flash attention does not run here: no kernel image"
    with pytest.raises(KernelError, match=r"no fused kernel .* \(flash: no kernel image\); pass kernel='flex' or"):
        rates.fastest(SHAPE, Window(3, 0), 100, 100, CPU)


def test_packing_that_is_wrong_is_passed_over(alone: Path, monkeypatch: pytest.MonkeyPatch):
    def only_the_first(*args: Any, **more: Any) -> Any:
        out, lse, *rest = flash_forward(*args, **more)
        if args[3] is not None:
            out[args[3][1] :] = 0.0
        return out, lse, *rest

    assert rates.packs(SHAPE, CPU)
    forget()
    for each in alone.rglob("*.json"):
        each.unlink()
    monkeypatch.setattr(fused, "aten", SimpleNamespace(**{**vars(STAND_INS), "_flash_attention_forward":
                                                          only_the_first}))  # fmt: skip
    assert not rates.packs(SHAPE, CPU)
    assert rates.refused(SHAPE, CPU) is None


# a square of 64 by 64: 9.2 by cuDNN, 16.5 by flash
@pytest.mark.parametrize(
    ("planned", "flex", "faster"),
    [(0, Rate(0.0, 3e-3), True), (0, Rate(0.0, 1e-3), False), (0, Rate(refused="no code"), True),
     (0, Rate(0.0, 2.1e-3), False), (0, Rate(9.0, 1e-3), True),  # calls cost something
     (64**2, Rate(0.0, 3e-3), True), (64**2 + 1, Rate(0.0, 3e-3), False)],  # cuDNN is not called for so little
    ids=str,
)  # fmt: skip
def test_fused_kernels_beat_generated_code_by_what_is_measured(
    alone: Path, monkeypatch: pytest.MonkeyPatch, planned: int, flex: Rate, faster: bool
):
    known = {"cudnn": Rate(1.0, 2e-3), "flash": Rate(0.1, 4e-3), PACKED: Rate(0.0, 0.0, "not here")}
    monkeypatch.setattr(rates, "measured", lambda *_: known)
    monkeypatch.setattr(rates, "_measure_flex", lambda *_: flex)
    monkeypatch.setattr(fused, "PLANNED", planned)
    assert rates.beats_flex(SHAPE, CPU) == faster


def test_generated_code_is_timed_for_any_length(alone: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rates, "flex_attention", lambda q, k, v, **_: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, enable_gqa=True))  # fmt: skip
    found = rates._rate(rates.FLEX, Shape(4, 2, 16, 16, "float32", False), CPU)
    assert not found.refused
    assert found.call + found.pair > 0
    assert [each.stem for each in alone.rglob("*.json")] == ["FlexAttention"]


def test_the_faster_kernel_is_taken_where_it_can_be(alone: Path, monkeypatch: pytest.MonkeyPatch):
    known = {"cudnn": Rate(1.0, 1e-3), "flash": Rate(0.1, 2e-3), PACKED: Rate(0.0, 0.0)}
    monkeypatch.setattr(rates, "measured", lambda *_: known)
    monkeypatch.setattr(fused, "PLANNED", 10)
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


def test_torch_takes_packed_calls_for_a_gpu():
    with torch.device("meta"):
        q, grad = (torch.empty(300, 8, dim, dtype=torch.bfloat16) for dim in (20, 12))
        k, v = (torch.empty(500, 2, dim, dtype=torch.bfloat16) for dim in (20, 12))
        lengths = Lengths(*(torch.empty(4, dtype=torch.int32) for _ in range(2)), 130, 200)
        out, lse = fused.attend_packed(q, k, v, lengths, 0.3, CAUSAL)
        assert (out.shape, lse.shape, lse.dtype) == ((300, 8, 12), (8, 300), torch.float32)
        found = fused.attend_packed_backward((q, k, v), out, lse, grad, lengths, 0.3, CAUSAL)
        assert [each.shape for each in found] == [q.shape, k.shape, v.shape]


# whole models


def trained_by_fused_kernels(folder: str, planned: int, **options: Any) -> tuple[float, set[str]]:
    """How far loss and gradients of ragged steps are from those of the unsharded model, and the kernels that ran."""
    worst = 0.0
    with pytest.MonkeyPatch.context() as patched:
        pretend(patched, folder, planned)
        patched.setattr(fused, "serves", lambda *_: None)
        own, other = (training.built("Mistral", sliding_window=20) for _ in range(2))
        parallel = sp_compile.parallelize(own, kernel="fused", codegen="eager", **options)
        for shape in ((1, 57), (2, 33), (1, 2)):
            step = training.batch_of(shape, slice(0, 1))
            worst = max(worst, training.apart(training.stepped(parallel, step), training.stepped(other, step)))
        return worst, kernels_of(parallel)


@pytest.mark.parametrize(("attention", "planned"), [("allgather_kv", 1 << 24), ("fetch", 1 << 24), ("ulysses", 0)])
def test_a_model_trains_by_fused_kernels_on_two_ranks(
    ranks: Callable[[int], RankPool], tmp_path: Path, attention: str, planned: int
):
    for apart, used in ranks(2).run(trained_by_fused_kernels, str(tmp_path), planned, attention=attention):
        assert apart <= 1e-4
        assert used == {"fused"}
