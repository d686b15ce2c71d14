"""Ranks agree on what they are about to run, or all of them say who differs, before any collective starts."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from sp_compile.compat import group_store
from sp_compile.errors import RankFailedError, RankMismatchError, SPCompileError
from sp_compile.graph_text import lines
from sp_compile.mesh import Group
from sp_compile.program import Program

PATIENCE = 5.0  # seconds that survivors of a failure wait for each other, to tell who is missing
RAISED, ALIVE = "raised", "alive"


@contextmanager
def agreement(group: Group) -> Iterator[dict[str, str]]:
    """Exchange what the block puts into the dictionary, or that it raised, and go on only if all ranks are alike.

    Raises:
        RankMismatchError: names the field, the ranks that differ from the most common value, and the values.
        RankFailedError: the block raised on another rank, or that rank died.
        Exception: what the block raised on this rank.
    """
    fields: dict[str, str] = {}
    try:
        yield fields
    except RankFailedError:  # which all ranks know of
        raise
    except Exception as problem:
        _exchange(group, {RAISED: f"{type(problem).__name__}: {problem}"})
        raise
    compare(group, fields)


def compare(group: Group, fields: Mapping[str, str]) -> None:
    """As :func:`agreement`, for fields that are known already."""
    gathered = _gathered(group, fields)
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


def all_of(group: Group, what: str, own: bool) -> bool:
    """Whether something holds on all ranks, each of which asks for the same within an :func:`agreement`.

    Raises:
        RankFailedError: another rank raised before it asked.
    """
    return all(each.get(what) == str(True) for each in _gathered(group, {what: str(own)}))


def _gathered(group: Group, fields: Mapping[str, str]) -> list[Any]:
    """What all ranks say, unless one raised."""
    gathered = _exchange(group, fields)
    failed = [(rank, each[RAISED]) for rank, each in enumerate(gathered) if RAISED in each]
    if failed:
        raise RankFailedError("; ".join(f"rank {rank} raised {problem}" for rank, problem in failed))
    return gathered


def _exchange(group: Group, fields: Mapping[str, str]) -> list[Any]:
    if group.size == 1 or group.process_group is None:
        return [dict(fields)]
    gathered: list[Any] = [dict(fields)] * group.size
    with naming_failed_ranks(group):
        if not _alike(group, fields):
            dist.all_gather_object(gathered, dict(fields), group=group.process_group)
    return gathered


def _alike(group: Group, fields: Mapping[str, str]) -> bool:
    """Whether all ranks have the same to say, by 8 bytes of each."""
    hashed = hashlib.sha256(repr(sorted(fields.items())).encode()).digest()
    on_cpu = "gloo" in dist.get_backend(group.process_group)
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    own = torch.frombuffer(bytearray(hashed[:8]), dtype=torch.int64).to(device)
    found = [torch.empty_like(own) for _ in range(group.size)]
    dist.all_gather(found, own, group=group.process_group)
    return len({int(each) for each in found}) == 1


@contextmanager
def naming_failed_ranks(group: Group) -> Iterator[None]:
    """Turn a collective's error into one that names the ranks that raised or died.

    Raises:
        RankFailedError: a collective of the block failed.
    """
    start = time.time()
    try:
        yield
    except SPCompileError:
        raise
    except Exception as error:
        if group.process_group is None:
            raise
        own = not _is_of_collective(error)
        missing, told = _roll_call(group, start, f"{type(error).__name__}: {error}" if own else "")
        if own:
            raise
        causes = [f"rank {rank} raised {text}" for rank, text in told] + [f"rank {rank} died" for rank in missing]
        named = "; ".join(causes) or "another rank closed its connection"
        raise RankFailedError(f"rank {group.rank} cannot go on: {named}") from error


def _is_of_collective(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "nccl", "connection", "collective")
    )


def _roll_call(group: Group, start: float, problem: str) -> tuple[list[int], list[tuple[int, str]]]:
    """Say that this rank is alive, or what it raised; ranks that do not answer in time, and what others raised."""
    missing, told = [], []
    try:
        store = group_store(group.process_group)
        store.set(f"sp_compile/failed/{group.rank}", f"{time.time()} {problem or ALIVE}")
        for rank in range(group.size) if not problem else ():
            answer = _answer(store, rank, start)
            if answer is None:
                missing.append(rank)
            elif answer != ALIVE:
                told.append((rank, answer.splitlines()[0]))
    except RuntimeError:  # the store was served by a rank that is gone
        return [], []
    return missing, told


def _answer(store: Any, rank: int, start: float) -> str | None:
    """What a rank says of itself; what it said at an earlier failure, well before ``start``, does not count."""
    key, deadline = f"sp_compile/failed/{rank}", time.time() + PATIENCE
    while time.time() < deadline:
        if store.check([key]):
            at, _, text = store.get(key).decode().partition(" ")
            if float(at) > start - PATIENCE:
                return str(text)
        time.sleep(0.05)
    return None


def of_inputs(named: Mapping[str, torch.Tensor], lengths: Sequence[int], options: Mapping[str, Any]) -> dict[str, str]:
    """Shapes, dtypes, requests and contents of the inputs, and all other arguments."""
    shapes = {
        f"the shape of {name}": f"{list(each.shape)} {each.dtype} of strides {list(each.stride())}"
        for name, each in sorted(named.items())
    }
    others = {f"the argument {name}": repr(value) for name, value in sorted(options.items())}
    shown = str(list(lengths)) if len(lengths) <= 8 else f"{len(lengths)} requests {digest(str(list(lengths)))}"
    contents = {f"the values of {name}": content(each) for name, each in named.items()}
    return {**shapes, **others, "the requests": shown, **contents}


def content(tensor: torch.Tensor) -> str:
    """A checksum that changes with any element; for floats, of their bits."""
    flat = tensor.detach().reshape(-1)
    if flat.is_floating_point():
        flat = flat.contiguous().view(
            {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        )
    total = 0
    for part in flat.split(1 << 20):  # the products are eight times as wide as a byte
        weights = torch.arange(1, part.numel() + 1, device=flat.device)
        total = (total * 31 + int((part.to(torch.int64) * weights).sum())) % 2**64
    return f"checksum {total:x}"


def of_graph(program: Program) -> dict[str, str]:
    """The rewritten graph, which is the same on every rank."""
    return {"the graph": digest("\n".join(lines(program)))} if program.sp > 1 else {}


def digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
