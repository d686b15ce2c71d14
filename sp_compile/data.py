"""Batches of ranks that share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from sp_compile import fingerprint
from sp_compile import mesh as meshes
from sp_compile.mesh import Group

Batch = TypeVar("Batch")
LONGEST = 200  # characters of a value that errors show


def same_batch(mesh: Any = None) -> SameBatch:
    """What checks that the ranks that share a batch have got the same one.

    ::

        check = sp_compile.data.same_batch(mesh["sp"])
        for batch in check.over(loader):  # or batch = check(batch) for one
            ...

    ``parallelize`` compares what it is called with before every forward in any case; this also compares what never
    reaches the model, says so before the batch is used, and finds loaders of different lengths.

    Args:
        mesh: a 1-D ``DeviceMesh`` of the ranks that share a batch; by default all ranks there are.

    Raises:
        MeshError: the mesh has other axes besides.
    """
    return SameBatch(meshes.resolve(None, mesh))


class SameBatch:
    """Compares batches of ranks; see :func:`same_batch`. All ranks have to call it alike."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(self, batch: Batch) -> Batch:
        """The batch, if all ranks have the same.

        Args:
            batch: tensors of any shape and dtype, in any nesting of mappings, tuples and lists; other values are
                compared by their ``repr``.

        Raises:
            RankMismatchError: names the first field that differs, the ranks, and what they have.
            RankFailedError: another rank raised or died.
        """
        fingerprint.compare(self.group, fields_of(batch))
        return batch

    def over(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of a loader, each if all ranks have the same.

        Raises:
            RankMismatchError: as for one batch, and where one rank's loader ends before another's.
            RankFailedError: the loader raised on another rank, or that rank died.
        """
        iterator, more = iter(loader), True
        while True:
            with fingerprint.agreement(self.group) as fields:
                try:
                    batch = next(iterator)
                except StopIteration:
                    more = False
                fields["another batch"] = "one" if more else "none"
                if more:
                    fields.update(fields_of(batch))
            if not more:
                return
            yield batch


def fields_of(batch: Any) -> dict[str, str]:
    """Fields of a batch to be compared between ranks, by names like ``images[0].pixels``."""
    leaves = dict(_leaves(batch, ""))
    tensors = {name: each for name, each in leaves.items() if isinstance(each, torch.Tensor)}
    found = fingerprint.of_inputs(tensors, (), {})
    del found["the requests"]
    return found | {f"the value of {name}": _shown(each) for name, each in leaves.items() if name not in tensors}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({fingerprint.digest(text)})"


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], f"{name}.{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for i, each in enumerate(value):
            yield from _leaves(each, f"{name}[{i}]")
    else:
        yield name or "the batch", value
