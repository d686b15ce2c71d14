"""A cache on disk: one safetensors file a rank, and what tells whose tokens are in them.

A folder holds ``layout.json``, ``inputs.safetensors`` (what came with the tokens) and ``rank-<r>.safetensors``. Each
row of a rank's tensors is a token, and beside the tensors stands of which request and which of its tokens, so that any
number of ranks can read what it is to hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sp_compile.errors import CacheError
from sp_compile.ledger import Shelf
from sp_compile.mesh import Group
from sp_compile.rows import BatchRows, PackedRows
from sp_compile.storage import Storage, indexable

if TYPE_CHECKING:
    from sp_compile.cache import ShardedCache

LAYOUT, INPUTS = "layout.json", "inputs.safetensors"
SAMPLED = 1024  # elements of each weight that tell models apart


def save(cache: ShardedCache, folder: Path, module: nn.Module, group: Group) -> None:
    """Write a cache; every rank writes what it holds. See :meth:`ShardedCache.save`."""
    requests = [each for each in cache.ledger.requests if cache.ledger.length(each)]
    if not requests or cache.rows is None:
        raise CacheError("the cache is empty; there is nothing to save")
    folder.mkdir(parents=True, exist_ok=True)
    if group.rank == 0:
        (folder / LAYOUT).unlink(missing_ok=True)
    _barrier(group)
    lengths = cache.ledger.lengths(requests).tolist()
    tensors: dict[str, torch.Tensor] = {}
    for shelf, held in enumerate(cache.storages):
        _, places, slots = cache.ledger.kept(group.rank, held.window)
        tensors[f"request_{shelf}"] = torch.from_numpy(places.request)
        tensors[f"position_{shelf}"] = torch.from_numpy(places.position)
        rows = torch.from_numpy(slots).to(held.index.device)
        for number, each in zip(held.numbers, held.tensors, strict=True):
            tensors[str(number)] = indexable(each).index_select(2, rows).view(each.dtype).cpu().contiguous()
    _write(tensors, folder / f"rank-{group.rank}.safetensors")
    inputs = cache.rows.saved(requests, lengths)
    if group.rank == 0:
        _write({name: each.cpu().contiguous() for name, each in inputs.items()}, folder / INPUTS)
    _barrier(group)
    if group.rank == 0:
        layout = {
            "sp": group.size,
            "model": type(module).__name__,
            "weights": weights_digest(module),
            "dtype": None if cache.dtype is None else str(cache.dtype).removeprefix("torch."),
            "packed": cache.rows.packed,
            "requests": [[number, length] for number, length in zip(requests, lengths, strict=True)],
            "finished": sorted(cache.finished),
            "inputs": [*inputs],
            "shelves": [
                {
                    "window": each.window,
                    "tensors": each.numbers,
                    "whole_from": [cache.ledger.forgotten(request, each.window) for request in requests],
                }
                for each in cache.storages
            ],
        }
        part = folder / f".{LAYOUT}"
        part.write_text(json.dumps(layout, indent=1) + "\n", encoding="utf-8")
        part.replace(folder / LAYOUT)
    _barrier(group)


def read_layout(folder: Path, module: nn.Module) -> dict[str, Any]:
    """The layout of a saved cache.

    Raises:
        CacheError: there is none, or it is another model's.
    """
    try:
        layout: dict[str, Any] = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{folder} holds no saved cache: {error}") from error
    if (layout["model"], layout["weights"]) != (type(module).__name__, weights_digest(module)):
        same = layout["model"] == type(module).__name__
        raise CacheError(
            f"{folder} holds the cache of a {layout['model']}{' with other weights' if same else ''}; "
            f"this is a {type(module).__name__}. Load it for the model that filled it"
        )
    return layout


def load(cache: ShardedCache, folder: Path, layout: dict[str, Any], device: torch.device) -> None:
    """Fill an empty cache with what this rank is to hold of a saved one. See :meth:`ShardedCache.load`."""
    ledger = cache.ledger
    numbers, lengths = [each[0] for each in layout["requests"]], [each[1] for each in layout["requests"]]
    for i, number in enumerate(numbers):
        ledger.add(number, i)
    ledger.append(numbers, lengths)
    with _opened(folder / INPUTS) as file:
        inputs = {name: file.get_tensor(name).to(device) for name in layout["inputs"]}
    row: BatchRows | PackedRows = PackedRows() if layout["packed"] else BatchRows()
    row.restore(inputs, numbers, lengths)
    cache.rows, cache.finished = row, {*layout["finished"]}
    starts = row.starts(numbers)
    for shelf, described in enumerate(layout["shelves"]):
        window = described["window"]
        kept = ledger.shelves.setdefault(window, Shelf(cache.sp, ledger.page, window))
        kept.floor = dict(zip(numbers, described["whole_from"], strict=True))
        ledger.settle(numbers)
        storage: Storage | None = None
        for file in _files(folder, layout["sp"]):
            request, position = (file.get_tensor(f"{each}_{shelf}").numpy() for each in ("request", "position"))
            where = np.full(len(request), -1, dtype=np.int64)
            for i in np.unique(request).tolist():
                of = np.flatnonzero(request == i)
                where[of] = _slots(cache, numbers[i], position[of], window)
            at = np.flatnonzero(where >= 0)
            chosen = torch.from_numpy(at)
            parts = []
            for number in described["tensors"]:
                whole = file.get_tensor(str(number))
                parts.append(indexable(whole).index_select(2, chosen).view(whole.dtype).to(device))
            if storage is None:
                storage = Storage(window, described["tensors"], parts, parts[0].dtype)
                storage.reserve(int(ledger.shelves[window].slots[cache.rank]), ledger.page)
                cache.storages.append(storage)
            rows = torch.from_numpy(starts[request[at]] + position[at])
            storage.write(torch.from_numpy(where[at]).to(device), rows.to(device), parts)


def weights_digest(module: nn.Module) -> str:
    """A short hash of names, shapes and some elements of all weights."""
    found = hashlib.sha256()
    for name, each in module.named_parameters():
        some = each.detach().reshape(-1)[:SAMPLED].to(torch.float64).cpu().numpy()
        found.update(f"{name} {list(each.shape)}".encode() + some.tobytes())
    return found.hexdigest()[:16]


def _slots(cache: ShardedCache, request: int, positions: np.ndarray, window: int | None) -> np.ndarray:
    """Where this rank keeps these tokens of a request; -1 where it does not."""
    found = np.full(cache.ledger.length(request), -1, dtype=np.int64)
    places = cache.ledger.place([request], [0], [len(found)])
    found[places.rank == cache.rank] = cache.ledger.slots([request], places, cache.rank, window)
    mine: np.ndarray = found[positions]
    return mine


def _files(folder: Path, sp: int) -> Iterator[Any]:
    for rank in range(sp):
        with _opened(folder / f"rank-{rank}.safetensors") as file:
            yield file


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path} cannot be read, the saved cache is not whole: {error}") from error


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    part = path.with_name(f".{path.name}")
    save_file(tensors, part)
    part.replace(path)


def _barrier(group: Group) -> None:
    if group.size > 1:
        dist.barrier(group=group.process_group)
