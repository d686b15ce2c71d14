"""All ranks of a batch in one process: run together with exact data, then one by one to be measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from sp_compile.compiled import Compiled, Ready
from sp_compile.config import CompileConfig
from sp_compile.delivery import Lockstep, Replay, seated, stand_in
from sp_compile.inputs import device_of, forward_options
from sp_compile.measure import PeakMemory, median_seconds, synchronize
from sp_compile.mesh import Group
from sp_compile.report import Report
from sp_compile.runtime import ParallelModule
from sp_compile.steps import Kept, Step, rank_inputs


@dataclass(frozen=True)
class RankFigures:
    """What one rank took, alone on the device.

    Attributes:
        seconds: median wall-clock time of its local graph, without waiting for others.
        peak_bytes: in use at the peak, above weights, inputs and what is to be delivered.
        delivered_bytes: that came from other ranks.
    """

    seconds: float
    peak_bytes: int
    delivered_bytes: int


@dataclass(frozen=True)
class Figures:
    """What every rank took."""

    ranks: list[RankFigures]

    @property
    def imbalance(self) -> float:
        """Seconds of the slowest rank over the mean."""
        seconds = [each.seconds for each in self.ranks]
        return max(seconds) / statistics.mean(seconds)


class EmulatedModule(ParallelModule):
    """A parallel model all of whose ranks run in this process.

    Attributes:
        ready: the local graph with its inputs, for each rank of the last batch.
        lockstep: how they ran together.
        values: outputs of the local graphs; of the first rank only where all have the same.
    """

    def __init__(self, module: nn.Module, group: Group, config: CompileConfig, store: str) -> None:
        super().__init__(module, group, config)
        self._store = store
        self.ready: list[Ready] = []
        self.values: list[list[Any]] = []
        self.lockstep: Lockstep | None = None

    def run_all(self, batch: Mapping[str, Any]) -> Any:
        """The outputs of a batch, as the first rank has them."""
        with torch.no_grad():
            batch = forward_options(self.module, batch, gradients=False)
            named, self.layout = self._lay_out((), batch)
            return self._run_kept_apart((), batch, self._prepare(named, self.layout))

    def _finish(self, gm: fx.GraphModule) -> fx.GraphModule:
        return stand_in(gm)

    def _execute(self, compiled: Compiled, inputs: Sequence[Any], step: Step) -> tuple[list[Any], Kept]:
        device = step.index_inputs["rank"].device
        steps = [
            replace(step, index_inputs={**step.index_inputs, **rank_inputs(step.layout, group, device)})
            for group in (replace(self.group, rank=rank) for rank in range(self.group.size))
        ]
        self.ready = [compiled.ready(inputs, each) for each in steps]
        self.lockstep = Lockstep(self.group, device, self._keep)
        whole = self.compile_config.outputs == "full"
        first, *others = self.lockstep.run([_task(each, whole and i > 0) for i, each in enumerate(self.ready)])
        self.values = [first] if whole else [first, *others]
        return first, Kept()

    def _keep(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.cpu() if self._store == "host" else buffer


def _task(ready: Ready, forget: bool) -> Callable[[], list[Any]]:
    def run() -> list[Any]:
        found = ready()
        return [] if forget else found

    return run


class Emulation:
    """A batch that every rank ran in this process, and any one rank of it to run again alone.

    Attributes:
        outputs: the model's, in normal order; where the configuration leaves them sharded, those of the first rank.
        sp: how many ranks.
    """

    def __init__(self, model: EmulatedModule, batch: Mapping[str, Any]) -> None:
        self._model = model
        self.sp = model.group.size
        self.outputs = model.run_all(batch)

    @property
    def compiles(self) -> int:
        """How many times code was generated for all ranks."""
        return self._model.compiles

    def report(self) -> Report:
        """What each rank ran, as of :meth:`sp_compile.ParallelModule.report`."""
        return self._model.report()

    def values(self, rank: int) -> list[Any]:
        """What the local graph of a rank gave when all ran together."""
        values = self._model.values
        return values[rank if len(values) > 1 else 0]

    def delivered_bytes(self, rank: int) -> int:
        """Bytes that came to a rank from others."""
        return sum(each.bytes for each in self._delivered(rank).values())

    def rank(self, rank: int) -> Callable[[], list[Any]]:
        """A call that runs the local graph of one rank alone and gives its outputs, as :meth:`values`.

        What others sent is delivered as it came when all ran together, as a fresh copy of what lies on the device
        from now on; rows for others are packed, but not sent.
        """
        ready, device = self._model.ready[rank], self._device
        seat = Replay({site: each.buffer.to(device) for site, each in self._delivered(rank).items()})

        def run() -> list[Any]:
            with torch.no_grad(), seated(seat):
                return ready()

        return run

    def figures(self, repeats: int = 3) -> Figures:
        """Measure each rank alone, after a run that is not measured."""
        return Figures([self._figures(rank, repeats) for rank in range(self.sp)])

    def _figures(self, rank: int, repeats: int) -> RankFigures:
        run, device = self.rank(rank), self._device
        run()
        seconds = median_seconds(run, repeats, device, lambda: synchronize(device))
        with PeakMemory(device) as peak:
            run()
            synchronize(device)
        return RankFigures(seconds, peak.bytes, self.delivered_bytes(rank))

    def _delivered(self, rank: int) -> Mapping[int, Any]:
        assert self._model.lockstep is not None, "all ranks ran"
        return self._model.lockstep.delivered[rank]

    @property
    def _device(self) -> torch.device:
        return device_of(self._model.module)
