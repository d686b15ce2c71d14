"""Ragged batches: packing requests into one row, and reading requests back from position ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from sp_compile.errors import BatchError


class PackedBatch(Mapping[str, torch.Tensor]):
    """Requests packed into one row; ``model(**batch)`` runs them, :meth:`split` takes a result apart.

    Holds ``input_ids`` ``[1, T]`` int64 and ``position_ids`` ``[1, T]`` int64, which restart at 0 with every request,
    the form in which transformers recognises a packed batch. ``lengths`` are the tokens of each request; the tensors
    carry them, so one alone will do: ``model(batch["input_ids"])``.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], lengths: Sequence[int], numbers: Sequence[int] | None = None
    ) -> None:
        self.lengths = tuple(lengths)
        self.numbers = tuple(range(len(lengths))) if numbers is None else tuple(numbers)
        self._tensors = {name: marked(tensor, self.lengths, self.numbers) for name, tensor in tensors.items()}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return PackedBatch(tensors, self.lengths, self.numbers)

    def split(self, output: torch.Tensor, dim: int = 1) -> list[torch.Tensor]:
        """Cut ``output`` (``T`` rows along ``dim``) into one tensor per request.

        Raises:
            BatchError: ``output`` does not have the batch's number of tokens along ``dim``.
        """
        total = sum(self.lengths)
        if output.shape[dim] != total:
            raise BatchError(
                f"dim {dim} of a tensor of shape {list(output.shape)} has {output.shape[dim]} rows, "
                f"the batch has {total} tokens; pass an output in normal order with all tokens"
            )
        return list(torch.split(output, list(self.lengths), dim=dim))


def marked(tensor: torch.Tensor, lengths: tuple[int, ...], numbers: tuple[int, ...] = ()) -> torch.Tensor:
    """An alias of a tensor ``[1, T]`` that says which requests it packs."""
    alias = tensor.view(tensor.shape)
    alias._sp_compile_lengths, alias._sp_compile_numbers = lengths, numbers  # type: ignore[attr-defined]
    return alias


def packed_numbers(tensor: torch.Tensor) -> tuple[int, ...]:
    """Numbers of the requests of a tensor from :func:`pack`, by which a cache knows them."""
    numbers: tuple[int, ...] = tensor._sp_compile_numbers  # type: ignore[attr-defined]
    return numbers


def packed_lengths(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Tokens of each request, if the tensor is part of a batch that :func:`pack` made."""
    return getattr(tensor, "_sp_compile_lengths", None)


def pack(
    requests: Sequence[torch.Tensor | Sequence[int]],
    device: torch.device | str | None = None,
    numbers: Sequence[int] | None = None,
) -> PackedBatch:
    """Pack requests of token ids into one row.

    Args:
        requests: 1-D integer tensors or lists of token ids, each of at least one token.
        device: where the packed tensors live; by default that of the first request.
        numbers: by which a :class:`~sp_compile.cache.ShardedCache` knows the requests, so that these tokens go on from
            those that it holds; 0, 1, ... by default.

    Raises:
        BatchError: no request, an empty one, or one that is not a row of integers; numbers that are not one a request,
            all different.

    >>> pack([[5, 6, 7], [8]])["position_ids"].tolist()
    [[0, 1, 2, 0]]
    """
    if len(requests) == 0:
        raise BatchError("the batch holds no request; pass at least one")
    rows: list[torch.Tensor] = []
    for i, request in enumerate(requests):
        row = _row(i, request)
        if row.numel() == 0:
            raise BatchError(f"request {i} has length 0; every request needs at least 1 token")
        if row.dim() != 1 or row.is_floating_point() or row.dtype == torch.bool:
            raise BatchError(
                f"request {i} has shape {list(row.shape)} and dtype {row.dtype}; "
                "expected a 1-D row of integer token ids"
            )
        rows.append(row.to(device=device or (rows[0] if rows else row).device, dtype=torch.int64))
    lengths = [len(row) for row in rows]
    if numbers is not None and (len(numbers) != len(rows) or len({*numbers}) != len(rows)):
        raise BatchError(f"numbers are {list(numbers)} for {len(rows)} requests; pass one each, all different")
    positions = torch.cat([torch.arange(length, device=rows[0].device) for length in lengths])
    return PackedBatch({"input_ids": torch.cat(rows)[None], "position_ids": positions[None]}, lengths, numbers)


def _row(i: int, request: torch.Tensor | Sequence[int]) -> torch.Tensor:
    try:
        return torch.as_tensor(request)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(
            f"request {i} is a {type(request).__name__} ({error}); expected a 1-D row of integer token ids, so pass "
            "text through a tokenizer first"
        ) from error


def request_lengths(position_ids: torch.Tensor) -> tuple[int, ...]:
    """Read the requests of a packed row from its position ids.

    Args:
        position_ids: integers ``[1, T]``; each request counts up by one and the next restarts.

    Raises:
        BatchError: the positions neither count up nor restart somewhere; the message names the place.
    """
    row = position_ids.detach().reshape(-1).cpu()
    if row.numel() == 0:
        raise BatchError("position_ids are empty; a batch needs at least 1 token")
    breaks = torch.nonzero(torch.diff(row) != 1).flatten() + 1
    wrong = breaks[(row[breaks] != 0) & (row[breaks] != row[0])]
    if wrong.numel():
        at = int(wrong[0])
        raise BatchError(
            f"position_ids go from {int(row[at - 1])} to {int(row[at])} at token {at}: neither the next position nor "
            f"a restart at 0 or {int(row[0])}; pass positions that count up within a request and restart with the next"
        )
    bounds = torch.cat([torch.tensor([0]), breaks, torch.tensor([row.numel()])])
    return tuple(torch.diff(bounds).tolist())
