"""Steps of decoding are replayed: a CUDA graph launches in one call what would be hundreds of small kernels.

A graph is a list of kernels with the addresses that they read and write. So it holds for one *key*: shapes, numbers,
and the addresses of weights and of the cache, which are read where they are. All other inputs are copied into memory
that stays, and results are copied out of it before anyone sees them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from sp_compile.compat import process_group
from sp_compile.host_part import Parts, obstacle, split
from sp_compile.lasting import lasting
from sp_compile.mesh import backend_of
from sp_compile.program import Fallback, Program

Run = Callable[[], Sequence[Any]]
GRAPHS = 8  # that are kept of a program, and one for each rank besides: what a rank keeps of new tokens goes in turns
SIGHTS = 64  # keys that are remembered before they are recorded
MOST_ROWS = 256  # that a rank keeps of a step which is recorded; the kernels of longer ones take longer than launches
CAPTURABLE = ("nccl",)  # backends whose collectives a graph can hold


class Graphs(Protocol):
    """What can be replayed on a device."""

    def warm_up(self, run: Run) -> Sequence[Any]:
        """Run where captures run, once before the first."""

    def capture(self, run: Run) -> tuple[Callable[[], None], Sequence[Any]]:
        """Note what runs, without running it; a function that does, and the results that it writes each time."""


class CudaGraphs:
    """CUDA graphs that share their memory, since no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Run) -> Sequence[Any]:
        """Run on the stream of captures.

        Results may be used on the caller's stream and forgotten there: all that takes their memory again runs on this
        stream, after the caller's.
        """
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = run()
        current.wait_stream(self._stream)
        return results

    def capture(self, run: Run) -> tuple[Callable[[], None], Sequence[Any]]:
        """Capture a graph; other threads, such as NCCL's, may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                results = run()
        except BaseException:
            self._pool = torch.cuda.graph_pool_handle()  # torch does not take one again that no graph holds
            raise
        return graph.replay, results


def graphs_for(device: torch.device) -> Callable[[], Graphs] | None:
    """What replays steps on a device; None where nothing does."""
    return partial(CudaGraphs, device) if device.type == "cuda" else None


def replayable(program: Program, graphs: Callable[[], Graphs] | None) -> Callable[[], Graphs] | None:
    """What replays steps of a program; where nothing can, the program's fallbacks say why."""
    if graphs is None or not program.steps:
        return None
    device = next(each.device for each in program.local_inputs or () if isinstance(each, torch.Tensor))
    for name in _groups(program):
        backend = backend_of(process_group(name), device)
        if backend not in CAPTURABLE:
            note(program, f"its collectives run on {backend}, which no CUDA graph can hold; use nccl")
            return None
    found = obstacle(split(program.gm))
    if found is not None:
        node, reason = found
        program.record(node, f"steps are not replayed by CUDA graphs: {reason}")
        return None
    return graphs


def _groups(program: Program) -> list[str]:
    """Names of the groups that collectives of a program may run in."""
    found = [program.group_name] if program.sp > 1 else []
    return [*found, *program.tensor_groups, *((program.nodes.inner, program.nodes.outer) if program.nodes else ())]


def note(program: Program, reason: str) -> None:
    """Say in a program's fallbacks why its steps are not replayed."""
    program.fallbacks.append(Fallback("the whole graph", 1, 0, "", f"steps are not replayed by CUDA graphs: {reason}"))


@dataclass(frozen=True)
class _Recorded:
    replay: Callable[[], None]
    targets: list[torch.Tensor]  # where inputs go
    results: Sequence[Any]
    used: list[StorageWeakRef]  # memory that is read where it is

    @property
    def usable(self) -> bool:
        return not any(each.expired() for each in self.used)


class Recorder:
    """Runs a function at the first two sights of a key, records it at the third, and replays it from then on.

    Every call is one run of the function on every rank, recording included, so that collectives meet each other
    whether ranks record at the same time or not.

    Args:
        run: takes tensors and numbers, and returns tensors and what does not change.
        static: numbers of the inputs that are read where they are.
        unread: numbers of those that are not read.
        graphs: what records.
        limit: graphs that are kept, those that ran last.
        note: told why nothing can be recorded, once that is found out.

    Attributes:
        replays: how many calls were replayed.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        static: frozenset[int],
        unread: frozenset[int],
        graphs: Graphs,
        limit: int,
        note: Callable[[str], None],
    ) -> None:
        self.run, self.replays = run, 0
        self._static, self._unread, self._graphs, self._limit, self._note = static, unread, graphs, limit, note
        self._sights: OrderedDict[Any, int] = OrderedDict()
        self._recorded: OrderedDict[Any, _Recorded] = OrderedDict()
        self._refused = False

    def __len__(self) -> int:
        return len(self._recorded)

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """What the function returns."""
        if self._refused:
            return self.run(*inputs)
        key = tuple(_described(each, i in self._static) for i, each in enumerate(inputs) if i not in self._unread)
        if key in self._recorded:
            self._recorded.move_to_end(key)
            return self._replayed(self._recorded[key], inputs)
        sights = self._sights[key] = self._sights.pop(key, 0) + 1
        if len(self._sights) > SIGHTS:
            self._sights.popitem(last=False)
        if sights < 3:
            return self._graphs.warm_up(lambda: self.run(*inputs)) if sights == 2 else self.run(*inputs)
        del self._sights[key]
        try:
            found = self._record(inputs)
        except RuntimeError as error:
            self._refused = True
            self._note(f"recording failed: {_first_of(error)}")
            return self.run(*inputs)
        self._keep(key, found)
        return self._replayed(found, inputs)

    def _record(self, inputs: Sequence[Any]) -> _Recorded:
        staying = [each if self._is_static(i, each) else _memory_like(each) for i, each in enumerate(inputs)]
        replay, results = self._graphs.capture(lambda: self.run(*staying))
        targets = [_distinct(each) for i, each in enumerate(staying) if not self._is_static(i, each)]
        read = [StorageWeakRef(inputs[i].untyped_storage()) for i in self._static]
        return _Recorded(replay, targets, results, read)

    def _keep(self, key: Any, found: _Recorded) -> None:
        """Keep a graph instead of those whose memory is gone and of what was not used for longest.

        Others go after it has come, since torch forgets the memory that graphs share when the last of them goes.
        """
        self._recorded[key] = found
        for other in [other for other, each in self._recorded.items() if not each.usable]:
            del self._recorded[other]
        while len(self._recorded) > self._limit:
            self._recorded.popitem(last=False)

    def _replayed(self, found: _Recorded, inputs: Sequence[Any]) -> Sequence[Any]:
        self.replays += 1
        _copy(found.targets, [_distinct(each) for i, each in enumerate(inputs) if not self._is_static(i, each)])
        found.replay()
        own = [torch.empty_like(each) if isinstance(each, torch.Tensor) else each for each in found.results]
        tensors = [i for i, each in enumerate(own) if isinstance(each, torch.Tensor)]
        _copy([own[i] for i in tensors], [found.results[i] for i in tensors])
        return own

    def _is_static(self, i: int, value: Any) -> bool:
        return i in self._static or i in self._unread or not isinstance(value, torch.Tensor)


class Replaying:
    """A step of a program: its host part afresh, and then its device part by a :class:`Recorder`.

    Args:
        program: whose step it is.
        parts: of its graph.
        run: the code of the device part.
        graphs: what records.
        note: as of :class:`Recorder`.
    """

    def __init__(
        self, program: Program, parts: Parts, run: Callable[..., Any], graphs: Graphs, note: Callable[[str], None]
    ) -> None:
        inputs = program.graph.find_nodes(op="placeholder")
        static = [i for i, each in enumerate(inputs) if "held" in each.meta or each.meta.get("weight")]
        tensors = frozenset(i for i in static if isinstance(inputs[i].meta["val"], torch.Tensor))
        unread = _unread(parts.device)
        self.recorder = Recorder(run, tensors - unread, unread, graphs, GRAPHS + program.sp, note)
        self._host = parts.host
        self._rows = next(i for i, each in enumerate(inputs) if each.meta.get("index_input") == "kept_rows")

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """Run on the inputs of the whole graph."""
        run = self.recorder if len(inputs[self._rows]) <= MOST_ROWS else self.recorder.run
        return run(*inputs, *self._host(*inputs))


def _unread(device: fx.GraphModule) -> frozenset[int]:
    """Numbers of the inputs that only the host's part reads; how many ranges are planned changes with every page."""
    inputs = device.graph.find_nodes(op="placeholder")
    return frozenset(i for i, each in enumerate(inputs) if not each.users)


def _first_of(error: BaseException) -> str:
    """What began it: the end of a capture that failed fails too."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _described(value: Any, static: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return type(value), value
    return value.shape, value.stride(), value.dtype, value.device, value.data_ptr() if static else 0


@lasting
def _memory_like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of a tensor's shape and strides, with its values."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.new_zeros(extent if tensor.numel() else 0).as_strided(tensor.shape, tensor.stride())
    _distinct(memory).copy_(_distinct(tensor))
    return memory


def _distinct(tensor: torch.Tensor) -> torch.Tensor:
    """The elements that an expanded tensor repeats, once each."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensors, those of one dtype in few launches."""
    for dtype in dict.fromkeys(each.dtype for each in targets):
        chosen = [i for i, each in enumerate(targets) if each.dtype == dtype]
        torch._foreach_copy_([targets[i] for i in chosen], [sources[i] for i in chosen])
