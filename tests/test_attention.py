"""Attention of every kind and form, over any number of ranks, against its definition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sp_compile
from tests.attention_kinds import KINDS, batch, definition, model
from tests.local_graphs import kernels_of, wide_values
from tests.models import llama

LENGTHS = (53, 3)  # the second has fewer tokens than four ranks, and fully masked rows where it is padded
Errors = dict[str, tuple[float, float, float]]


def run(
    kind: str, dtype: torch.dtype, forms: tuple[str, ...] = (), **options: Any
) -> tuple[Errors, list[Any], list[str]]:
    """For each form and length: error against fp64, that of the unsharded model, and the largest over the scale.

    Besides the fallbacks, and the values of the local graphs that have both a query and a key dim.
    """
    errors: Errors = {}
    fallbacks, wide = [], []
    for form in forms or KINDS[kind].forms:
        plain = model(kind, form, dtype)
        parallel = sp_compile.parallelize(plain, **{"codegen": "eager", **options})
        for length in LENGTHS:
            inputs = batch(kind, length, dtype, seed=length)
            with torch.no_grad():
                found, own, right = parallel(**inputs), plain(**inputs), definition(kind, plain, inputs)
            assert found.dtype == dtype
            largest = (found.double() - right).abs().max() / right.abs().max()
            seen = ~own.isnan()  # eager softmax makes NaN of a row that sees nothing; ours is exact
            found, own, right = (each.double()[seen] for each in (found, own, right))
            errors[f"{form}, {length} tokens"] = (_norm(found - right), _norm(own - right), largest.item())
        fallbacks += parallel.report().fallbacks
        wide += wide_values(parallel)
    return errors, fallbacks, wide


def _norm(values: torch.Tensor) -> float:
    return values.norm().item()


def check(errors: Errors, dtype: torch.dtype) -> None:
    assert errors
    for case, (ours, theirs, largest) in errors.items():
        if dtype == torch.float32:
            assert largest <= 1e-5, case  # NaN fails
        else:
            assert ours <= 2 * theirs, case


slow = pytest.mark.slow
# every kind on one rank in fp32, a sixth of them on two in bf16 and a quarter on three in fp32; all else takes long
FAST = {
    (1, torch.float32): [*KINDS],
    (2, torch.bfloat16): [*KINDS][::6],
    (3, torch.float32): [*KINDS][1::4],
}
CASES = [
    pytest.param(sp, dtype, kind, marks=[] if kind in FAST.get((sp, dtype), []) else slow)
    for sp in (1, 2, 3, 4)  # slowest, since ranks are started anew when their number changes
    for dtype in (torch.float32, torch.bfloat16)
    for kind in KINDS
]


@pytest.mark.parametrize(("sp", "dtype", "kind"), CASES)
def test_right_against_the_definition(ranks, sp: int, dtype: torch.dtype, kind: str):
    for errors, fallbacks, wide in ranks(sp).run(run, kind, dtype) if sp > 1 else [run(kind, dtype)]:
        check(errors, dtype)
        assert not fallbacks
        assert not wide


@pytest.mark.parametrize("kernel", ["dense", pytest.param("dense_fp64", marks=slow)])
@pytest.mark.parametrize(
    "kind",
    ["padded left", "sinks", *(pytest.param(each, marks=slow) for each in ("packed", "relative bias per head", "MLA"))],
)
def test_dense_kernels_serve_all(ranks, kind: str, kernel: str):
    for errors, _, _ in ranks(2).run(run, kind, torch.float32, kernel=kernel):
        check(errors, torch.float32)


# Generated code: FlexAttention serves what it can, the tiles what it cannot.
@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        ("padded left", "flex"),
        ("softcap", "auto"),
        pytest.param("causal", "flex", marks=slow),
        pytest.param("window, first tokens, packed", "flex", marks=slow),
        pytest.param("relative bias per head", "auto", marks=slow),
        ("MLA", "tiles"),
    ],
)
def test_generated_code_is_right(ranks, kind: str, kernel: str):
    ran = ranks(2).run(run, kind, torch.float32, ("eager",), kernel=kernel, codegen="inductor", timeout=900)
    for errors, fallbacks, wide in ran:
        check(errors, torch.float32)
        assert not fallbacks
        assert not wide


def many_batches(kernel: str) -> tuple[int, set[str], set[int]]:
    """Compilations over 20 ragged batches, the kernels and the lengths."""
    parallel = sp_compile.parallelize(llama(), kernel=kernel)
    generator, lengths = torch.Generator().manual_seed(1), set()
    for _ in range(20):
        sizes = torch.randint(1, 90, (int(torch.randint(1, 6, (1,), generator=generator)),), generator=generator)
        inputs = sp_compile.pack([torch.randint(3, 100, (int(size),), generator=generator) for size in sizes] + [[5]])
        lengths.add(inputs["input_ids"].shape[1])
        assert sp_compile.verify(parallel, inputs)
    return parallel.compiles, kernels_of(parallel), lengths


@pytest.mark.parametrize("kernel", ["tiles", "flex"])
def test_one_compilation_serves_all_lengths(ranks, kernel: str):
    for compiles, used, lengths in ranks(2).run(many_batches, kernel, timeout=900):
        assert (compiles, used) == (1, {kernel})
        assert len(lengths) > 15


def test_flex_attention_is_right_for_any_number_of_keys():
    """torch's code for CPUs is not, where less than a block of keys are eight more than a multiple of sixteen."""
    parallel = sp_compile.parallelize(llama(num_hidden_layers=1), kernel="flex", sp=1)
    for length in (90, *range(6, 34), 40, 120, 136):
        assert sp_compile.verify(parallel, sp_compile.pack([[3 + i % 90 for i in range(length - 2)], [5, 6]])), length
    assert parallel.compiles == 1


def test_code_that_inductor_compiles_has_no_queries_by_keys():
    graphs: list[torch.fx.Graph] = []
    with torch._inductor.config.patch(force_disable_caches=True, post_grad_custom_post_pass=graphs.append):
        sp_compile.parallelize(llama(), sp=1)(**sp_compile.pack([[3] * 40, [4] * 30]))
    assert graphs
    for graph in graphs:
        values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
        assert len(values) > 20
        for value in values:
            symbols = [size for size in value.shape if isinstance(size, torch.SymInt) and size.node.expr.free_symbols]
            assert len(symbols) < 2, value.shape


# What cannot be lifted, and kernels that cannot serve


class Shuffled(nn.Module):
    """A mask that no rule gives: it sorts the tokens' scores."""

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        x = inputs_embeds[:, None]
        order = torch.matmul(x, x.transpose(-1, -2)).argsort(dim=-1)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=order <= 20)[:, 0]


def shuffled(strict: bool) -> tuple[float, list[str]]:
    x = torch.randn(1, 37, 8, generator=torch.Generator().manual_seed(3))
    parallel = sp_compile.parallelize(Shuffled().eval(), codegen="eager", strict=strict)
    with torch.no_grad():
        error = (parallel(inputs_embeds=x) - Shuffled()(x)).abs().max().item()
    return error, [f"{each.op} {each.source} {each.reason}" for each in parallel.report().fallbacks]


def test_a_mask_that_cannot_be_lifted_is_right_and_named(ranks):
    for error, reasons in ranks(2).run(shuffled, False):
        assert error <= 1e-6
        assert any("not lifted" in each and "test_attention.py" in each for each in reasons)


def test_a_mask_that_cannot_be_lifted_is_refused_under_strict(ranks):
    for done, text in ranks(2).outcomes(shuffled, True):
        assert not done
        assert "FallbackError: strict=True, but " in text


def test_a_kernel_that_cannot_serve_is_refused_with_those_that_can():
    inputs = sp_compile.pack([[3, 4, 5], [6]])
    with pytest.raises(sp_compile.errors.KernelError, match=r"attention at .*\.py:\d+: kernel 'flex' cannot serve: it "
                       r"does not take torch.float64; pass kernel='tiles' or 'dense' or 'dense_fp64'"):  # fmt: skip
        sp_compile.parallelize(llama(torch.float64), sp=1, kernel="flex")(**inputs)


def test_flex_cannot_return_a_log_sum_exp_on_a_cpu():
    parallel = sp_compile.parallelize(model("sinks", "eager", torch.float32), sp=1, kernel="flex")
    with pytest.raises(sp_compile.errors.KernelError, match="no log-sum-exp on a CPU, which the model uses"):
        parallel(**batch("sinks", 9, torch.float32, 0))


def test_unknown_kernels_are_refused_at_once():
    with pytest.raises(sp_compile.errors.ConfigError, match="unknown kernel 'tilse'; did you mean 'tiles'"):
        sp_compile.parallelize(llama(), sp=1, kernel="tilse")
