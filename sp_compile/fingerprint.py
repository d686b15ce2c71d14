"""Ranks agree on what they are about to run, or all of them say who differs, before any collective starts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from sp_compile.errors import RankFailedError, RankMismatchError
from sp_compile.mesh import Group
from sp_compile.program import Program, lines


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compare(group: Group, fields: Mapping[str, str]) -> None:
    """Exchange the fields and compare them.

    Raises:
        RankMismatchError: names the field, the ranks that differ from the most common value, and the values.
        RankFailedError: another rank did not answer.
    """
    if group.size == 1 or group.process_group is None:
        return
    gathered: list[Any] = [None] * group.size
    try:
        dist.all_gather_object(gathered, dict(fields), group=group.process_group)
    except RuntimeError as error:
        raise RankFailedError(f"rank {group.rank} waited for the others before a forward: {error}") from error
    for name in sorted({name for each in gathered for name in each}):
        values = [each.get(name, "nothing") for each in gathered]
        if len(set(values)) == 1:
            continue
        common = Counter(values).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(values) if value != common]
        raise RankMismatchError(
            f"ranks disagree on {name}: "
            + ", ".join(f"rank {rank} has {values[rank]}" for rank in odd)
            + f", the others have {common}; every rank must pass the same"
        )


def check_inputs(group: Group, named: Mapping[str, torch.Tensor], lengths: Sequence[int]) -> None:
    """Compare shapes, dtypes, requests and contents of the inputs."""
    if group.size == 1 or group.process_group is None:
        return
    shapes = {name: f"{list(each.shape)} {each.dtype}" for name, each in sorted(named.items())}
    fields = {f"the shape of {name}": shape for name, shape in shapes.items()}
    shown = str(list(lengths)) if len(lengths) <= 8 else f"{len(lengths)} requests {_digest(str(list(lengths)))}"
    contents = {f"the values of {name}": _content(each) for name, each in named.items()}
    compare(group, {**fields, "the requests": shown, **contents})


def _content(tensor: torch.Tensor) -> str:
    """A checksum that changes with any element; for floats, of their bits."""
    flat = tensor.detach().reshape(-1)
    if flat.is_floating_point():
        flat = flat.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    weights = torch.arange(1, flat.numel() + 1, device=flat.device)
    return f"checksum {int((flat.to(torch.int64) * weights).sum()):x}"


def check_model(group: Group, fields: Mapping[str, str]) -> None:
    """Compare model configuration and pipeline."""
    compare(group, fields)


def check_graph(group: Group, program: Program) -> None:
    """Compare the rewritten graphs."""
    compare(group, {"the graph": _digest("\n".join(lines(program)))})
