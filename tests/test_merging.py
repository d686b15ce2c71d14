"""Partial softmaxes over disjoint keys join in any order, empty ones among them."""

from __future__ import annotations

import itertools

import pytest
import torch

from sp_compile.kernels.dense import dense_partial
from sp_compile.kernels.flash import merge
from sp_compile.ops import merge_partials

Part = tuple[torch.Tensor, torch.Tensor]


def parts(sizes: list[int], dtype: torch.dtype, seed: int = 0) -> tuple[list[Part], Part]:
    """Attention of 3 queries over each of several runs of keys, and over all at once in fp64."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, 3, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, sum(sizes), 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, sum(sizes), generator=generator) < 0.6
    mask[1] = False  # a row that sees nothing anywhere

    def attend(at: slice, to: torch.dtype) -> Part:
        seen_k, seen_v = k[:, :, at].to(to), v[:, :, at].to(to)
        if not seen_k.shape[2]:
            return q.new_zeros(2, 4, 3, 8, dtype=to), q.new_full((2, 4, 3), -torch.inf, dtype=to)
        return dense_partial(q.to(to), seen_k, seen_v, [], [], "", 0.35, mask[:, at], None)

    ends = list(itertools.accumulate(sizes, initial=0))
    return [attend(slice(*at), dtype) for at in itertools.pairwise(ends)], attend(slice(None), torch.float64)


def joined(order: list[Part], fold: bool) -> Part:
    """By one merge of all, or one after another."""
    out, lse = order[0]
    rest = [[each] for each in order[1:]] if fold else [order[1:]]
    for some in rest:
        out, lse = merge_partials(out, lse, *(torch.stack(each) for each in zip(*some, strict=True)))
    return out, lse


@pytest.mark.parametrize("fold", [False, True], ids=["at once", "one after another"])
@pytest.mark.parametrize("sizes", [[5, 9, 1], [0, 7, 0, 4], [16, 0, 1, 3]])
def test_any_order_gives_the_whole(sizes: list[int], fold: bool):
    found, (out, lse) = parts(sizes, torch.float32)
    for order in itertools.permutations(found):
        ours, ours_lse = joined([*order], fold)
        torch.testing.assert_close(ours.double(), out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours_lse.double(), lse, rtol=1e-5, atol=1e-6)
        assert (ours[:, :, 1] == 0).all()
        assert (ours_lse[:, :, 1] == -torch.inf).all()


def test_an_empty_part_changes_nothing():
    (first, empty), _ = parts([6, 0], torch.float32)
    for order in ([first, empty], [empty, first]):
        assert all(map(torch.equal, joined(order, False), first))


def test_the_kernel_merges_alike_in_place():
    found, (out, lse) = parts([5, 0, 9], torch.float32)
    into = tuple(each.clone() for each in found[0])
    for part in found[1:]:
        merge(into, part)
    torch.testing.assert_close(into[0].double(), out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(into[1].double(), lse, rtol=1e-5, atol=1e-6)
