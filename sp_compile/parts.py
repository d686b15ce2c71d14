"""Queries for parts of the keys as rows of a batch, and what the parts give merged, as generated code computes it.

Which blocks of keys are in which part is planned by :mod:`sp_compile.kernels.split`.
"""

from __future__ import annotations

import torch

from sp_compile.ops import merge_partials

FEWEST = 16  # queries that a GPU multiplies


def as_parts(q: torch.Tensor, group: int, rows: int, splits: int) -> torch.Tensor:
    """Queries ``[1, H, Q, D]`` once for each part of the keys, ``[splits, H / group, rows, D]``.

    Args:
        rows: those of a group's heads one after another, and from the first again as far as a block is to be filled,
            which a GPU computes in whole.
    """
    _, heads, queries, dim = q.shape
    folded = q.reshape(1, heads // group, group * queries, dim)
    return repeated_rows(folded, rows).expand(splits, -1, -1, -1).contiguous()


def repeated_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """So many rows of dim -2, those of the tensor again and again."""
    return tensor.index_select(-2, torch.arange(rows, device=tensor.device) % tensor.shape[-2])


def merged_parts(out: torch.Tensor, lse: torch.Tensor, group: int, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts ``[splits, G, rows, E]`` and ``[splits, G, rows]`` as ``[1, H, Q, E]`` and ``[1, H, Q]``."""
    rows = torch.arange(group * queries, device=out.device)  # no slice, for which code would rest on how many there are
    out, lse = (each.index_select(2, rows) for each in (out, lse))
    whole, total = _merged(out.unsqueeze(1), lse.unsqueeze(1))
    return whole.reshape(1, -1, queries, out.shape[-1]), total.reshape(1, -1, queries)


def numbers_of_parts(listed: torch.Tensor) -> torch.Tensor:
    """Int64 ``[parts, 3]`` of what :func:`~sp_compile.kernels.split.query_blocks` says beside lists of blocks.

    Args:
        listed: what it planned, with a dim of heads behind the parts.
    """
    return listed[:, 0, 0, 2, :3].long()


def as_one_row(held: torch.Tensor) -> torch.Tensor:
    """Keys or values ``[B, G, K, D]`` with the rows of the batch as heads, ``[1, B * G, K, D]``."""
    return held.flatten(0, 1).unsqueeze(0)


def queries_of_parts(q: torch.Tensor, numbers: torch.Tensor, group: int) -> torch.Tensor:
    """Queries ``[B, H, Q, D]`` as those of parts, ``[parts, B * H / group, rows, D]``.

    Rows are the heads of a group, and from the first again up to :func:`filled_rows`.

    Args:
        numbers: from :func:`numbers_of_parts`.
    """
    batch, heads, queries, dim = q.shape
    folded = q.reshape(batch * heads // group, group, queries, dim).permute(2, 0, 1, 3)
    filled = repeated_rows(folded, filled_rows(group))
    return filled.index_select(0, numbers[:, 0])


def filled_rows(group: int) -> int:
    """How many rows a part of one query has, for so many heads of a group: a power of two."""
    return max(FEWEST, 1 << (group - 1).bit_length())


def operand_of_parts(operand: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """An operand ``[B, H, Q, K]``, or with fewer dims in front, as one of parts.

    It is ``[parts, H, 1, K]`` where it varies by query, ``[parts, B, 1, K]`` where it varies by row, and then by no
    head.
    """
    of_four = operand.reshape((1,) * (4 - operand.dim()) + tuple(operand.shape))
    if of_four.shape[0] > 1:
        of_four = of_four.transpose(0, 1)
    return of_four.index_select(2, numbers[:, 0]).transpose(0, 2) if of_four.shape[2] > 1 else of_four


def merged_queries(
    out: torch.Tensor, lse: torch.Tensor, numbers: torch.Tensor, batch: int, group: int, queries: int, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts ``[parts, B * G, rows, E]`` and ``[parts, B * G, rows]`` as ``[B, H, Q, E]`` and ``[B, H, Q]``.

    Args:
        numbers: from :func:`numbers_of_parts`.
        most: parts that a query has at most.
    """
    begins, counts = numbers.index_select(0, torch.arange(queries, device=out.device))[:, 1:].unbind(1)
    nth = torch.arange(most, device=out.device)[:, None]
    exists = nth < counts
    at = torch.where(exists, begins + nth, 0).reshape(-1)
    out, lse = (each[:, :, :group].flatten(1, 2).index_select(0, at) for each in (out, lse))  # [most * Q, B * H, ..]
    out, lse = (each.unflatten(0, (most, queries)).transpose(1, 2) for each in (out, lse))
    exists = exists[:, None]
    # parts of others, which a query does not have, may hold NaN
    out, lse = _merged(torch.where(exists[..., None], out, 0.0), torch.where(exists, lse, -torch.inf))
    return out.unflatten(0, (batch, -1)), lse.unflatten(0, (batch, -1))


def _merged(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial outputs ``[parts, ...]`` and their log-sum-exp as one."""
    return merge_partials(torch.zeros_like(out[0]), torch.full_like(lse[0], -torch.inf), out, lse)
