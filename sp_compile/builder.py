"""Making programs of captured graphs: for which ranks, which device and which kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from sp_compile import fingerprint
from sp_compile.capture import Captured
from sp_compile.config import CompileConfig
from sp_compile.costs import Attention, Predicted, measured_rates, predicted, rates_of
from sp_compile.errors import CacheError, FallbackError
from sp_compile.inputs import device_of
from sp_compile.kernels.choice import measured_faster
from sp_compile.kernels.rates import Shape
from sp_compile.layout import TokenLayout
from sp_compile.mesh import Group
from sp_compile.needs import short_runs
from sp_compile.pipeline import PassStep, build_pipeline, run_pipeline
from sp_compile.program import Program
from sp_compile.schedule import Schedule
from sp_compile.steps import Kind, Step


class Builder:
    """Makes the programs of a model, and knows by what kernels and strategies are chosen for them.

    Attributes:
        group: the ranks that programs are for.
        rates: of a rank and its links, by which strategies are chosen.
        schedule: the passes that make a program.
    """

    def __init__(self, module: nn.Module, group: Group, config: CompileConfig) -> None:
        self.group = group
        self.rates = rates_of(device_of(module), config.link_rate, config.compute_rate)
        self.schedule = Schedule(build_pipeline(config.pipeline, config.attention, config.kernel, config.keep_gathered))
        self._module, self._config = module, config
        self._code_for = ""
        self._faster: dict[Shape, bool] = {}

    def build(
        self,
        captured: Captured,
        kind: Kind,
        trace: bool = False,
        hints: Mapping[str, int] | None = None,
    ) -> tuple[Program, list[PassStep]]:
        """Run the pipeline on a program of a captured graph.

        Raises:
            CacheError: the program is for a cache, which the pipeline does not serve.
        """
        if kind.cached and not self.schedule.serves_caches:
            raise CacheError("the pipeline has no shard_cache; add it behind shard_attention to run with a cache")
        program = replace(
            self._captured(captured, self.group.size, self.group.name, kind.outputs),
            **vars(kind),
            hints=hints or {},
            device=self._code_for,
            fused_is_faster=self.fused_is_faster,
            compiled=self._config.codegen == "inductor",
        )
        steps = run_pipeline(program, self.schedule.passes, self._config.verify_passes, trace)
        return program, steps

    def checked(self, captured: Captured, kind: Kind, trace: bool) -> tuple[Program, list[PassStep]]:
        """As :meth:`build`, in agreement with the other ranks.

        Raises:
            FallbackError: an op fell back, and the configuration is strict.
            RankMismatchError: ranks made other programs.
        """
        with fingerprint.agreement(self.group) as fields:
            program, steps = self.build(captured, kind, trace)
            if self._config.strict:
                _refuse_fallbacks(program)
            fields.update(fingerprint.of_graph(program))
        return program, steps

    def analysed(self, captured: Captured, sp: int) -> Program:
        """A program for a number of ranks, on which no pass ran yet."""
        return self._captured(captured, sp, "analysed", "full")

    def _captured(self, captured: Captured, sp: int, group: str, outputs: str) -> Program:
        """The program of a graph, told of the ranks that it is for."""
        program, price = captured.program(sp, group, outputs), self.schedule.operations_per_byte
        program.nodes = self.group.nodes
        program.operations_per_byte = self.rates.operations_per_byte if price is None else price
        return program

    def predict(self, layout: TokenLayout, attention: Attention, apart: bool) -> dict[str, Predicted]:
        """What an attention takes by each strategy, by the rates of now."""
        return predicted(layout, attention, apart, self.rates, self.group.nodes)

    def fused_is_faster(self, shape: Shape) -> bool:
        """Whether that was measured on every rank, found out when the first program that asks is agreed on."""
        if shape not in self._faster:
            what = f"whether fused kernels are faster for {shape}"
            self._faster[shape] = fingerprint.all_of(self.group, what, measured_faster(shape))
        return self._faster[shape]

    def suited(self, step: Step) -> Step:
        """The step, told of what has programs of its own on a GPU.

        These are batches of short runs, which may be computed by another kernel than others, and decoding.
        """
        if not self.compiles_for_gpu:
            return step
        if step.cached == "more" and max(step.layout.lengths) == 1 and self.schedule.takes_flex:
            return replace(step, cached="decode")
        chooses = self.schedule.chooses_kernels and step.cached in ("", "first")
        return replace(step, short=chooses and short_runs(step.layout))

    @property
    def compiles_for_gpu(self) -> bool:
        """Whether code is generated for a GPU."""
        return (self._code_for or device_of(self._module).type) == "cuda" and self._config.codegen == "inductor"

    def pretend_device(self, device: torch.device) -> None:
        """Have rates and kernels be those of another kind of device than the model's."""
        self.rates = rates_of(device, self._config.link_rate, self._config.compute_rate)
        self._code_for = device.type

    def measure_rates(self) -> None:
        """Measure :attr:`rates`, but for those that the configuration names; on every rank at the same time."""
        tensors = [each for each in self._module.parameters() if each.is_floating_point()]
        dtype = tensors[0].dtype if tensors else torch.float32
        found = measured_rates(self.group, device_of(self._module), dtype)
        self.rates = found.but(self._config.link_rate, self._config.compute_rate)


def _refuse_fallbacks(program: Program) -> None:
    if not program.fallbacks:
        return
    first, total = program.fallbacks[0], sum(each.count for each in program.fallbacks)
    raise FallbackError(
        f"strict=True, but {first.op} ({first.source or 'no source line'}) falls back: {first.reason}; "
        + (f"in all, {total} ops do" if total > 1 else "nothing else does")
    )
