"""Local ranks without torchrun, for scripts, notebooks and tests."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sp_compile.errors import ConfigError, MeshError, RankFailedError

GRACE = 2.0  # seconds in which other ranks may still report, so that the first failure is named and not its echoes


@dataclass(frozen=True)
class Place:
    """Where one rank runs."""

    rank: int
    size: int
    port: int
    backend: str
    threads: int
    timeout: float
    folder: str

    @property
    def result(self) -> Path:
        return Path(self.folder, f"result-{self.rank}")

    @property
    def stacks(self) -> Path:
        return Path(self.folder, f"stacks-{self.rank}")


@dataclass(frozen=True)
class Failure:
    """How one rank failed; ``at`` orders the failures in time, and a rank that died comes before those that raised."""

    at: float
    rank: int
    text: str


def launch(
    fn: Callable[..., Any],
    sp: int,
    *args: Any,
    timeout: float = 600.0,
    backend: str | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Run ``fn(*args, **kwargs)`` on ``sp`` new local processes that form one process group.

    In each of them the process group is initialised and ``RANK``, ``WORLD_SIZE`` and so on are set, as torchrun does.

    Args:
        fn: a function at the top level of an importable module; processes are spawned, not forked.
        sp: number of ranks.
        timeout: seconds for the whole call, and the timeout of the ranks' process group.
        backend: by default NCCL where there is a GPU for each rank, else gloo.

    Returns:
        What each rank returned, by rank; tensors arrive on the CPU.

    Raises:
        MeshError: ``sp`` is no number of ranks, or this process is a rank of torchrun already.
        ConfigError: ``fn`` or an argument cannot be sent to another process.
        RankFailedError: a rank raised (its traceback is in the message), died, or did not finish in time. No process
            is left behind.
    """
    if not isinstance(sp, int) or sp < 1:
        raise MeshError(f"sp={sp!r} is not a number of ranks; pass sp >= 1")
    if dist.is_torchelastic_launched():
        raise MeshError("torchrun started this process as a rank already; call the function itself instead of launch")
    work = _serialize(fn, args, kwargs)
    backend = backend or _backend(sp)
    threads = _threads(sp)
    deadline = time.monotonic() + timeout
    # The store lives here: no rank has to outlive the others, and the port is free because it is bound already.
    store = _store(0, timeout)
    with tempfile.TemporaryDirectory(prefix="sp_compile-") as folder:
        Path(folder, "work").write_bytes(work)
        places = [Place(rank, sp, store.port, backend, threads, timeout, folder) for rank in range(sp)]
        with _ranks(places) as ranks:
            failures = _watch(ranks, places, deadline)
            if failures:
                raise _error(failures, places)
        return [torch.load(place.result, map_location="cpu", weights_only=False) for place in places]


def _serialize(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    name = getattr(fn, "__qualname__", repr(fn))
    advice = "put it at the top level of a module (a .py file next to the notebook) and import it"
    if getattr(fn, "__module__", None) == "__main__" and not hasattr(__import__("__main__"), "__file__"):
        raise ConfigError(f"{name} is defined in an interactive session, where new processes cannot find it; {advice}")
    buffer = io.BytesIO()
    try:
        torch.save((fn, args, kwargs), buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if "<lambda>" in name or "<locals>" in name:
            raise ConfigError(f"{name} cannot be sent to another process; {advice}") from error
        raise ConfigError(f"an argument of {name} cannot be sent to another process: {error}") from error
    return buffer.getvalue()


def _store(port: int, timeout: float) -> Any:
    """The ranks' meeting point: served here for port 0, on a free port, else the one at the port."""
    limit = timedelta(seconds=timeout)
    return dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=port == 0, wait_for_workers=False, timeout=limit
    )


def _threads(sp: int) -> int:
    chosen = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(chosen) if chosen.isdigit() else max(1, len(os.sched_getaffinity(0)) // sp)


def _backend(sp: int) -> str:
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= sp
    return "cpu:gloo,cuda:nccl" if enough else "gloo"


@contextlib.contextmanager
def _ranks(places: Sequence[Place]) -> Iterator[list[tuple[BaseProcess, Connection]]]:
    """Start the ranks; end and join all of them, and what they started, however the block ends."""
    context = mp.get_context("spawn")
    ranks: list[tuple[BaseProcess, Connection]] = []
    try:
        with _environment(
            OMP_NUM_THREADS=str(places[0].threads),
            OMP_WAIT_POLICY="PASSIVE",
            # What killed ranks leave is cleaned up by multiprocessing's tracker, which would warn of it.
            PYTHONWARNINGS="ignore:resource_tracker:UserWarning",
        ):
            for place in places:
                ours, theirs = context.Pipe(duplex=False)
                started = context.Process(target=_main, args=(place, theirs), name=f"rank {place.rank}")
                started.start()
                theirs.close()
                ranks.append((started, ours))
        yield ranks
        for process, _ in ranks:
            process.join(GRACE)
    finally:
        for process, _ in ranks:
            _kill(process)
        for process, connection in ranks:
            process.join()
            process.close()
            connection.close()


@contextlib.contextmanager
def _environment(**defaults: str) -> Iterator[None]:
    """Variables that must be set before a process starts; values that the user has set stay."""
    added = [name for name in defaults if name not in os.environ]
    os.environ.update({name: defaults[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _kill(process: BaseProcess) -> None:
    """End a rank and the processes it started, which are in its process group."""
    assert process.pid is not None, "it was started"
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it is gone, or has not made its process group yet
        process.kill()


def _watch(ranks: Sequence[tuple[BaseProcess, Connection]], places: Sequence[Place], deadline: float) -> list[Failure]:
    """Wait until every rank is done; after a first failure only as long as its echoes may take to arrive."""
    open_ranks = dict(enumerate(ranks))
    failures: list[Failure] = []
    while open_ranks and (left := deadline - time.monotonic()) > 0:
        wait([handle for process, connection in open_ranks.values() for handle in (connection, process.sentinel)], left)
        for rank, (process, connection) in list(open_ranks.items()):
            done, failure = _report(rank, process, connection)
            if not done:
                continue
            del open_ranks[rank]
            if failure is not None:
                failures.append(failure)
                deadline = min(deadline, time.monotonic() + GRACE)
    if open_ranks and not failures:
        stacks = _stacks([process for process, _ in open_ranks.values()], [places[rank] for rank in open_ranks])
        late = f"did not finish within {places[0].timeout:g} s"
        failures = [Failure(0.0, rank, late + stacks[rank]) for rank in open_ranks]
    return failures


def _report(rank: int, process: BaseProcess, connection: Connection) -> tuple[bool, Failure | None]:
    """Whether the rank is done, and how it failed."""
    code = process.exitcode  # read first: a rank that reports and ends in between has reported
    with contextlib.suppress(EOFError):
        if connection.poll():
            return True, connection.recv()
    return (False, None) if code is None else (True, Failure(0.0, rank, _death(code)))


def _death(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    hint = "; in a script, call launch under `if __name__ == '__main__':`" if code == 1 else ""
    return f"ended with exit code {code} before it returned a result{hint}"


def _stacks(processes: Sequence[BaseProcess], places: Sequence[Place]) -> dict[int, str]:
    """Ask ranks that hang where they are."""
    for process, place in zip(processes, places, strict=True):
        if process.pid is not None and place.stacks.exists():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    texts = {place.rank: place.stacks.read_text() if place.stacks.exists() else "" for place in places}
    return {rank: f"; it was at\n{text}" if text else "" for rank, text in texts.items()}


def _error(failures: Sequence[Failure], places: Sequence[Place]) -> RankFailedError:
    first, *echoes = sorted(failures, key=lambda each: (each.at, each.rank))
    text = f"rank {first.rank} of {len(places)} {first.text}"
    if echoes:
        text += f"\n(after it: {', '.join(f'rank {each.rank} {each.text.splitlines()[0]}' for each in echoes)})"
    return RankFailedError(text)


def _main(place: Place, connection: Connection) -> None:
    """What a rank runs: report ``None``, or the failure."""
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, args=(place.folder,), daemon=True).start()
    failure: Failure | None = None
    with place.stacks.open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        try:
            _run(place)
        except BaseException as error:
            summary = f"raised {type(error).__name__}: {error}\n\n{traceback.format_exc()}"
            failure = Failure(time.monotonic(), place.rank, summary)
        connection.send(failure)
        if dist.is_initialized() and failure is None:
            dist.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR1)
    if failure is not None:
        os._exit(1)


def _end_with_parent(folder: str) -> None:
    """When the launching process is killed, do what it no longer can."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _run(place: Place) -> None:
    where = {"RANK": place.rank, "LOCAL_RANK": place.rank, "WORLD_SIZE": place.size, "LOCAL_WORLD_SIZE": place.size}
    os.environ.update({name: str(value) for name, value in where.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(place.port))
    torch.set_num_threads(place.threads)
    if "nccl" in place.backend:
        torch.cuda.set_device(place.rank)
    dist.init_process_group(
        place.backend,
        store=_store(place.port, place.timeout),
        rank=place.rank,
        world_size=place.size,
        timeout=timedelta(seconds=place.timeout),
    )
    fn, args, kwargs = torch.load(Path(place.folder, "work"), weights_only=False)
    torch.save(fn(*args, **kwargs), place.result)
