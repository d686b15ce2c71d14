"""Random numbers by place: what an element draws follows from a seed and the element's number, wherever it is computed.

The numbers are a hash of 32 bits, the finalizer of C. Wellons, "Prospecting for Hash Functions".
"""

from __future__ import annotations

import torch

BITS = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
STEPS = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None))  # shifts to the right, and factors


def mixed(value: torch.Tensor) -> torch.Tensor:
    """Bits mixed with one another.

    Args:
        value: int32, whose bits are taken as those of an unsigned number; overwritten.
    """
    for shift, factor in STEPS:
        value ^= (value >> shift).bitwise_and_(BITS >> shift)
        if factor is not None:
            value *= factor - (1 << 32) if factor >> 31 else factor
    return value


def drawn(query: torch.Tensor, key: torch.Tensor, chance: float | torch.Tensor) -> torch.Tensor:
    """Whether each pair of a query and a key is drawn, which it is with probability ``chance``.

    Args:
        query, key: integers of 32 mixed bits for each, which broadcast to the pairs.
    """
    bits = mixed(_signed(query) ^ _signed(key))
    return bits < min(round(float(chance) * 2**32), BITS) - 2**31


def _signed(bits: torch.Tensor) -> torch.Tensor:
    """Unsigned numbers of 32 bits as the int32 of the same bits."""
    return torch.where(bits > BITS >> 1, bits - BITS - 1, bits).to(torch.int32)
