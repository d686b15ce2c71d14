"""Gradients through FlexAttention: by its definition as torch runs it without generated code, and as it is traced."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import aot_module_simplified, make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn.attention.flex_attention import create_block_mask

import sp_compile
from sp_compile import codegen, flex_ops
from sp_compile.kernels import choice
from sp_compile.kernels.flex import block_mask, blocks, of_keys
from tests import training
from tests.attention_kinds import KINDS, batch, definition, model
from tests.local_graphs import kernels_of
from tests.test_block_mask import Drawn, flagged
from tests.test_plan import DOCUMENTS, documents

FP32 = 1e-4  # relative
LENGTHS = (53, 3)
LEARNED = "relative bias per head"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks_of_keys_are_those_of_queries_turned(data: st.DataObject):
    case = Drawn(data.draw)
    plan = block_mask(case.operands, [], case.rule, case.valid, *case.sizes)
    turned = flex_ops.block_mask_of_keys(plan)
    assert turned.shape == (len(plan), blocks(case.sizes[1]), 2, 1 + blocks(case.sizes[0]))
    for kind in range(2):
        assert torch.equal(flagged(turned[:, :, kind]), flagged(plan[:, :, kind]).transpose(1, 2))


def test_blocks_of_keys_are_where_torch_has_them():
    lengths = [300, 77, 500]
    place, _, number, _ = (each.flatten() for each in documents(lengths))
    turned = of_keys(block_mask(documents(lengths), [], DOCUMENTS, None, 877, 877).numpy())
    right = create_block_mask(
        lambda b, h, q, k: (place[k] <= place[q]) & (number[k] == number[q]), 1, 1, 877, 877, device="cpu"
    )
    listed = ((right.q_num_blocks, right.q_indices), (right.full_q_num_blocks, right.full_q_indices))
    named = [[{*which[0, 0, row, :count].tolist()} for row, count in enumerate(counts[0, 0].tolist())]
             for counts, which in listed]  # fmt: skip
    found = [[{*turned[0, row, kind, 1 : 1 + turned[0, row, kind, 0]].tolist()} for row in range(len(named[0]))]
             for kind in range(2)]  # fmt: skip
    # torch calls no block full that reaches behind the last row
    assert [a | b for a, b in zip(*found, strict=True)] == [a | b for a, b in zip(*named, strict=True)]
    assert any(found[1])
    assert all(full <= own for full, own in zip(named[1], found[1], strict=True))


def gradients(given: Any, output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the parameters, by a fixed weighting of the output."""
    given.zero_grad()
    generator = torch.Generator().manual_seed(5)
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    return {name: each.grad for name, each in given.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention_has_the_gradients_of_its_definition(kind: str):
    form = KINDS[kind].forms[0]
    own, exact = model(kind, form, torch.float32), model(kind, form, torch.float64)
    parallel = sp_compile.parallelize(own, sp=1, kernel="flex", codegen="eager", gradients="always")
    for length in LENGTHS:
        inputs = batch(kind, length, torch.float32, seed=length)
        right = gradients(exact, definition(kind, exact, inputs))
        found = gradients(own, parallel(**inputs))
        rounding = 1e-6 * max(float(each.abs().max()) for each in right.values())  # all there is of a key's bias
        for name, each in right.items():
            torch.testing.assert_close(found[name].double(), each, rtol=FP32, atol=rounding)
    assert kernels_of(parallel) == {"flex"}


@pytest.mark.parametrize(
    ("sp", "name", "attention"),
    [(2, "Llama", "allgather_kv"), (2, "Gemma2", "ulysses"), (2, "Mistral", "ring"),
     pytest.param(3, "DeepseekV3", "fetch", marks=pytest.mark.slow)],
)  # fmt: skip
def test_steps_of_training_on_ranks(ranks, sp: int, name: str, attention: str):
    batches = [training.batch_of((1, 25), slice(0, 8)), training.batch_of((2, 9), slice(0, 3), 3)]
    expected = [training.stepped(training.built(name), each) for each in batches]
    options = {"kernel": "flex", "attention": attention}
    for steps in ranks(sp).run(training.on_ranks, name, batches, torch.float32, {}, timeout=300, **options):
        for found, wanted in zip(steps, expected, strict=True):
            assert training.apart(found, wanted) <= FP32


def test_graphs_of_forward_and_backward_are_traced_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch):
    traced: list[list[str]] = []

    def compiled(gm: Any, inputs: Any, tracing: Any, differentiable: bool) -> Any:
        def keep(part: Any, _: Any) -> Any:
            traced.append([str(node.target) for node in part.graph.nodes if "flex_attention" in str(node.target)])
            return make_boxed_func(part.forward)

        with tracing, torch.set_grad_enabled(differentiable):
            return aot_module_simplified(gm, list(inputs), fw_compiler=keep, bw_compiler=keep)

    monkeypatch.setattr(codegen, "compile_graph", compiled)
    monkeypatch.setitem(choice.KERNELS, "flex", lambda need: None)  # a CPU has no generated code for it
    own, other = training.built("Gemma2"), training.built("Gemma2")
    parallel = sp_compile.parallelize(own, sp=1, kernel="flex")
    for length in (57, 200):
        step = training.batch_of((1, length))
        assert training.apart(training.stepped(parallel, step), training.stepped(other, step)) <= FP32
    assert parallel.compiles == 1
    assert traced == [["flex_attention"] * 2, ["flex_attention_backward"] * 2]


def test_a_bias_that_is_learned_is_left_to_another_kernel():
    own = model(LEARNED, "sdpa", torch.float32)
    own.table.requires_grad_(True)
    inputs = batch(LEARNED, 20, torch.float32, seed=1)
    parallel = sp_compile.parallelize(own, sp=1, kernel="flex", codegen="eager", gradients="always")
    with pytest.raises(sp_compile.errors.KernelError, match="it is not used where a bias is learned"):
        parallel(**inputs)
    own.table.requires_grad_(False)
    assert "q.weight" in gradients(own, parallel(**inputs))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def test_gradients_of_what_is_captured_and_of_means():
    assert gradcheck(lambda value: flex_ops.captured(value, [0, 1, 2, 3], 2), random(2, 1, 5, 3))
    assert gradcheck(lambda value: flex_ops.captured(value, [3]), random(1, 1, 1, 6))
    seen, valid = torch.tensor([[True, False, True], [False, False, True]]), torch.tensor([True, False, True, True])
    for held in (None, valid):
        means = partial(flex_ops.fill_empty, seen=seen, valid=held)
        assert gradcheck(means, (random(2, 4, 3, 5), random(2, 2, 4, 5)))
