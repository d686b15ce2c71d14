"""Where a rank keeps keys and values: tensors of slots, and which token is in which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sp_compile.lasting import lasting
from sp_compile.ledger import Window


class Storage:
    """Keys and values of the layers that share a window, on one rank.

    Args:
        window: tokens that a query sees; None for all.
        numbers: of these tensors among all that a forward keeps.
        kept: tensors ``[batch, kv_heads, tokens, dim]`` of the shapes and the device to store.
        dtype: of what is stored.

    Attributes:
        tensors: ``[batch, kv_heads, slots, dim]`` each.
        index: int64 ``[slots]``, the token's number in the whole graph's row; 0 in an empty slot.
        valid: bool ``[slots]``, slots that hold a token.
    """

    @lasting
    def __init__(
        self, window: Window, numbers: Sequence[int], kept: Sequence[torch.Tensor], dtype: torch.dtype | None
    ) -> None:
        self.window, self.numbers = window, tuple(numbers)
        self.tensors = [each.new_zeros(*each.shape[:2], 0, each.shape[3], dtype=dtype or each.dtype) for each in kept]
        device = kept[0].device
        self.index = torch.zeros(0, dtype=torch.int64, device=device)
        self.valid = torch.zeros(0, dtype=torch.bool, device=device)
        self._versions = [0] * len(self.tensors)
        self._seal()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, free slots included."""
        return sum(each.nbytes for each in self.tensors)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, in one row of the batch."""
        return sum(each.shape[1] * each.shape[3] * each.element_size() for each in self.tensors)

    @property
    def edited(self) -> bool:
        """Whether someone else wrote into the tensors."""
        return self._versions != [each._version for each in self.tensors]

    @lasting
    def reserve(self, slots: int, page: int) -> None:
        """Have at least so many slots, in whole pages, one of them at least.

        They grow by a quarter, to the next page, so that tokens are copied a bounded number of times on average, and
        steps that are replayed find them where they were.
        """
        slots = max(slots, page)
        if slots > len(self.index):
            slots = -(-max(slots, len(self.index) * 5 // 4) // page) * page
            self.tensors = [_extended(each, slots, 2) for each in self.tensors]
            self.index, self.valid = (_extended(each, slots, 0) for each in (self.index, self.valid))
            self._seal()

    @lasting
    def write(self, slots: torch.Tensor, rows: torch.Tensor, kept: Sequence[torch.Tensor]) -> None:
        """Store tokens.

        Args:
            slots, rows: int64 ``[tokens]``, where, and the tokens' numbers in the whole row.
            kept: ``[batch, kv_heads, tokens, dim]`` each, in any floating-point dtype.
        """
        for tensor, each in zip(self.tensors, kept, strict=True):
            indexable(tensor).index_copy_(2, slots, indexable(each.to(tensor.dtype)))
        self.index[slots], self.valid[slots] = rows, True
        self._seal()

    @lasting
    def number(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Say anew where in the whole row the tokens of all slots are; see :meth:`write`."""
        self.index = torch.zeros_like(self.index)
        self.index[slots.to(self.index.device)] = rows.to(self.index.device)

    @lasting
    def keep_only(self, runs: np.ndarray) -> None:
        """Empty all slots but those in these ranges, int64 ``[runs, 2]``."""
        valid = torch.zeros_like(self.valid)
        for start, end in runs.tolist():
            valid[start:end] = True
        self.valid, self.index = valid, self.index * valid

    @lasting
    def select_rows(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.tensors = [each.index_select(0, indices.to(each.device)) for each in self.tensors]
        self._seal()

    def _seal(self) -> None:
        self._versions = [each._version for each in self.tensors]


def indexable(tensor: torch.Tensor) -> torch.Tensor:
    """A view whose rows torch can select and copy, which it does not always do for fp8."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _extended(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    longer = tensor.new_zeros(shape)
    longer.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return longer
