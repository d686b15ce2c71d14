"""The pipeline: what a pass is, which exist, and how a schedule of them is checked and run."""

from __future__ import annotations

import dataclasses
import difflib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sp_compile.errors import (
    ConfigError,
    PassCrashError,
    PipelineError,
    PostconditionError,
    PreconditionError,
    SPCompileError,
    nearest,
)
from sp_compile.graph_text import lines
from sp_compile.invariants import KERNELS_LOWERED, LOCAL, LOWERED, Invariant, Violation
from sp_compile.program import Program


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of the graph. Subclasses are frozen dataclasses; their fields are their options in YAML.

    Attributes:
        name: name of the pass in YAML, of its file and of its test.
        requires: invariants that must hold before.
        establishes: invariants that hold afterwards.
        breaks: invariants that may no longer hold afterwards.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[Invariant, ...]] = ()
    establishes: ClassVar[tuple[Invariant, ...]] = ()
    breaks: ClassVar[tuple[Invariant, ...]] = ()

    @abstractmethod
    def run(self, program: Program) -> None:
        """Rewrite the program's graph in place."""


@dataclass(frozen=True)
class PassStep:
    """What one pass did: the graph before and after as text, their diff, and the time it took."""

    name: str
    before: str
    after: str
    lines_changed: int | None
    seconds: float

    @property
    def changed(self) -> str:
        """Lines of the graph's text that changed, or ``-`` where no text was kept."""
        return "-" if self.lines_changed is None else str(self.lines_changed)

    @property
    def diff(self) -> str:
        """Unified diff of the graph text."""
        return "\n".join(
            difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), "before", self.name, lineterm="")
        )


def registered_passes() -> dict[str, type[Pass]]:
    """All passes by name, in the order of the default pipeline."""
    from sp_compile import passes

    return {each.name: each for each in passes.DEFAULT}


def build_pipeline(
    spec: Sequence[Any] | None = None,
    attention: str | None = None,
    kernel: str | None = None,
    keep_gathered: bool | None = None,
) -> tuple[Pass, ...]:
    """Passes from names and ``{name: options}`` maps; the default pipeline without a spec.

    Args:
        spec: the entries, in order.
        attention: strategy of ``shard_attention`` where the entry does not say.
        kernel: kernel of ``plan_attention`` where the entry does not say.
        keep_gathered: option of ``place_gradients`` where the entry does not say.

    Raises:
        ConfigError: an unknown pass or option; the message names the nearest known one.
        PipelineError: the order breaks an invariant that a pass requires.
    """
    known = registered_passes()
    defaults: dict[str, tuple[str, Any]] = {
        "shard_attention": ("strategy", attention),
        "plan_attention": ("kernel", kernel),
        "place_gradients": ("keep_gathered", keep_gathered),
    }
    entries = list(known) if spec is None else list(spec)
    schedule = []
    for entry in entries:
        name, options = _entry(entry)
        if name not in known:
            raise ConfigError(f"unknown pass {name!r}{nearest(name, known)}")
        option, value = defaults.get(name, ("", None))
        if value is not None:
            options.setdefault(option, value)
        schedule.append(_construct(known[name], options))
    check_schedule(schedule)
    return tuple(schedule)


def check_complete(schedule: Iterable[Pass]) -> None:
    """Check that a graph which went through all passes is one that ranks can run.

    Raises:
        PipelineError: names what is missing and the passes that establish it.
    """
    held = check_schedule(schedule)
    for each in (LOWERED, LOCAL, KERNELS_LOWERED):
        if each not in held:
            raise PipelineError(f"the pipeline ends without {each.name!r}; add {_makers(each)}")


def _entry(entry: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, options),) = entry.items()
        return str(name), dict(options or {})
    raise ConfigError(f"a pipeline entry is a pass name or one {{name: options}} map, not {entry!r}")


def _construct(kind: type[Pass], options: Mapping[str, Any]) -> Pass:
    fields = {each.name for each in dataclasses.fields(kind)}
    for option in options:
        if option not in fields:
            hint = nearest(option, fields) if fields else "; it has none"
            raise ConfigError(f"pass {kind.name!r} has no option {option!r}{hint}")
    return kind(**options)


def _makers(invariant: Invariant) -> str:
    makers = [name for name, kind in registered_passes().items() if invariant in kind.establishes]
    return " or ".join(makers) or "a pass that establishes it"


def check_schedule(schedule: Iterable[Pass]) -> set[Invariant]:
    """Check that every pass finds the invariants it requires, and return those that hold at the end.

    Raises:
        PipelineError: names the pass, the missing invariant and the passes that establish it.
    """
    held: set[Invariant] = set()
    for each in schedule:
        missing = [invariant for invariant in each.requires if invariant not in held]
        if missing:
            raise PipelineError(
                f"pass {each.name!r} requires {missing[0].name!r}, which no pass before it establishes; "
                f"put {_makers(missing[0])} before it"
            )
        held -= set(each.breaks)
        held |= set(each.establishes)
    return held


def run_pipeline(
    program: Program, schedule: Sequence[Pass], verify: bool = True, trace: bool = False
) -> list[PassStep]:
    """Run the passes in order; with ``verify``, check every held invariant after each.

    Raises:
        PreconditionError: a required invariant does not hold.
        PostconditionError: an invariant that a pass establishes, or had to keep, does not hold after it.
        PassCrashError: a pass raised.
    """
    held: dict[Invariant, None] = {}
    steps = []
    for each in schedule:
        before = "\n".join(lines(program)) if trace else ""
        if verify:
            _check(program, each.requires, PreconditionError, f"before pass {each.name!r}")
        start = time.perf_counter()
        try:
            with torch.no_grad():  # values are computed for their shapes
                each.run(program)
        except SPCompileError:
            raise
        except Exception as error:
            raise PassCrashError(f"pass {each.name!r} crashed: {type(error).__name__}: {error}") from error
        program.graph.lint()
        seconds = time.perf_counter() - start
        for invariant in each.breaks:
            held.pop(invariant, None)
        held.update(dict.fromkeys(each.establishes))
        if verify:
            _check(program, held, PostconditionError, f"after pass {each.name!r}")
        after = "\n".join(lines(program)) if trace else ""
        changed = set(before.splitlines()) ^ set(after.splitlines())
        steps.append(PassStep(each.name, before, after, len(changed) if trace else None, seconds))
    program.gm.recompile()
    return steps


def _check(program: Program, invariants: Iterable[Invariant], error: type[SPCompileError], where: str) -> None:
    for invariant in invariants:
        try:
            invariant.check(program)
        except Violation as violation:
            raise error(f"{where}: {invariant.name}: {violation}") from None
