"""What a run does: passes, collectives with bytes, rows and attention area per rank, fallbacks."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from sp_compile.collectives import STARTS, is_product, multiplications, shadows
from sp_compile.files import written_whole
from sp_compile.layout import TokenLayout
from sp_compile.memory import peak
from sp_compile.pipeline import PassStep
from sp_compile.program import Fallback, Program, op_name, source_line
from sp_compile.symbols import known_size


@dataclass(frozen=True)
class Collective:
    """One collective of the local graph.

    ``bytes_sent`` are the bytes that one rank sends: ``(n - 1)`` times its part for an all-gather among n ranks
    (ring or direct), ``2 (n - 1) / n`` times the tensor for an all-reduce, half of that for an all-to-all; for an
    exchange of rows what the others need of this rank's. ``shadow`` is the work between its beginning and its wait, by
    name and how often, and ``shadow_operations`` the floating-point operations of the products with weights among it.
    """

    name: str
    kind: str
    bytes_sent: int
    shape: str
    source: str
    shadow: str
    shadow_operations: int


@dataclass(frozen=True)
class Choice:
    """Attentions of one kind: the strategy that they ran by, and how others would have done.

    Attributes:
        attentions: their numbers.
        ran_by: the strategy.
        seconds: of one of them by each strategy that can run, predicted, the fastest first.
        refused: why others cannot run.
    """

    attentions: list[int]
    ran_by: str
    seconds: dict[str, float]
    refused: dict[str, str]


@dataclass(frozen=True)
class Report:
    """What a forward does. ``str()`` is plain text, :meth:`render` prints with rich where it is installed.

    Attributes:
        sp, scheme, lengths: ranks, layout scheme, and tokens of each request.
        shard_length: rows of each rank, padding included.
        tokens_per_rank: rows of each rank without padding.
        attention_area_per_rank: query-key pairs that the masks leave, over all layers and sequences; an upper bound
            where a mask depends on activations.
        strategies: by which each attention ran, in order.
        collectives: those of the local graph, in order.
        isolation: what the pass ``isolate_requests`` did to keep the requests apart; empty where the model does itself.
        fallbacks: ops on gathered inputs, attention that was not raised or is computed by a slower kernel, masks that
            were not lifted, and steps that are not replayed; all but these ``strict`` refuses.
        steps: what each pass did; with text of the graph only from ``explain``.
        bytes_by_formula: that reach the rank which gets most, for attention by its strategies and for outputs, but not
            between ranks of tensor parallelism; None on one rank, beside a cache, and where tokens are not spread.
        choices: which strategies could have run attention; none where there are no ``bytes_by_formula``.
        peak_bytes: the most that this rank holds at a time, weights and other inputs apart, see
            :mod:`sp_compile.memory`; None in training, where the pipeline ends before shapes are local, and where
            there are no sizes without data.
        replayed: CUDA graphs of steps of decoding that there are, and how many steps were replayed; None where none
            are, which ``fallbacks`` explain where they were to be.
    """

    sp: int
    scheme: str
    lengths: tuple[int, ...]
    shard_length: int
    tokens_per_rank: list[int]
    attention_area_per_rank: list[int]
    strategies: list[str]
    collectives: list[Collective]
    isolation: str
    fallbacks: list[Fallback]
    steps: list[PassStep]
    bytes_by_formula: int | None = None
    choices: list[Choice] = field(default_factory=list)
    replayed: tuple[int, int] | None = None
    peak_bytes: int | None = None

    @property
    def bytes_sent(self) -> int:
        """Bytes that one rank sends in a forward."""
        return sum(each.bytes_sent for each in self.collectives)

    def __str__(self) -> str:
        return "\n".join(_text(self))

    def write_html(self, path: str | Path, title: str = "What sp_compile makes of the model") -> None:
        """Write the report as one page that needs no network: the layout as a picture, tables, and searchable diffs.

        Diffs are there where the report is one of :func:`sp_compile.explain`.

        Raises:
            ConfigError: the file cannot be written.
        """
        from sp_compile.page import page

        with written_whole(Path(path)) as part:
            part.write_text(page(self, title), encoding="utf-8")

    def render(self, console: Any = None) -> None:
        """Print to a rich console, or to standard output as plain text."""
        try:
            from rich.console import Console
        except ImportError:
            print(self)
            return
        (console or Console()).print(str(self), markup=False, highlight=False)


def attention_area(layout: TokenLayout, rows: np.ndarray) -> list[int]:
    """Query-key pairs of each rank, from those of each token."""
    area = torch.from_numpy(rows)[layout.local_index] * layout.valid
    return [int(each) for each in area.sum(dim=1)]


def make_report(
    program: Program,
    steps: Sequence[PassStep],
    layout: TokenLayout,
    rows: np.ndarray,
    sizes: Mapping[str, int],
    replayed: tuple[int, int] | None = None,
) -> Report:
    """Collect a report for one layout, whose tokens see ``rows`` keys each, over all layers; ``sizes`` of symbols."""
    return Report(
        sp=program.sp,
        scheme=layout.scheme,
        lengths=layout.lengths,
        shard_length=layout.shard_length,
        tokens_per_rank=list(layout.tokens_per_rank),
        attention_area_per_rank=attention_area(layout, rows),
        strategies=list(program.ran_by),
        collectives=list(_collectives(program, sizes)),
        isolation=program.isolation,
        fallbacks=list(program.fallbacks),
        steps=list(steps),
        replayed=replayed,
        peak_bytes=_held_at_most(program, sizes),
    )


def _held_at_most(program: Program, sizes: Mapping[str, int]) -> int | None:
    """As :attr:`Report.peak_bytes`."""
    if program.local_inputs is None or program.differentiable:
        return None
    try:
        return peak(program, sizes).bytes
    except RuntimeError:  # of ops whose results have no size before there are data
        return None


def _collectives(program: Program, sizes: Mapping[str, int]) -> Iterator[Collective]:
    values = {size.node.expr: sizes.get(name) for name, size in program.symbols.items()}
    for node, work in shadows(program.graph).items():
        kind, part = STARTS[node.target], _numel(node.args[0], values)
        if kind == "exchange":
            rows = sizes[f"sent_rows_{node.args[2].name.rpartition('_')[2]}"]
            elements = rows * _numel(node.args[0], values, 1)
        elif kind == "all_gather":
            elements = part * (node.args[1] - 1)
        elif kind == "all_to_all":
            elements = part - part // len(node.args[1])
        else:
            ranks = program.tensor_groups.get(node.args[2], program.sp)
            elements = 2 * (ranks - 1) * part // ranks
        yield _collective(node, kind, elements, work, values)


def _collective(
    node: fx.Node, kind: str, elements: int, work: Sequence[fx.Node], values: Mapping[Any, Any]
) -> Collective:
    value = node.meta["val"]
    shape = ", ".join(_size_text(size, values) for size in value.shape)
    names = Counter(op_name(each).rpartition(".")[2] for each in work)
    shadow = ", ".join(f"{count} {name}" for name, count in names.items())
    products = [each for each in work if is_product(each)]
    operations = sum(2 * multiplications(each, lambda size: known_size(size, values) or 1) for each in products)
    return Collective(
        node.name, kind, elements * value.element_size(), f"[{shape}]", source_line(node), shadow, operations
    )


def _numel(node: Any, values: Mapping[Any, Any], first: int = 0) -> int:
    """Elements for this layout, of the dims from ``first`` on; those that depend on data are counted as 1."""
    return math.prod(known_size(size, values) or 1 for size in node.meta["val"].shape[first:])


def _size_text(size: Any, values: Mapping[Any, Any]) -> str:
    number = known_size(size, values)
    return "?" if number is None else str(number)


def _text(report: Report) -> list[str]:
    total = sum(report.tokens_per_rank)
    text = [
        f"{len(report.lengths)} requests, {total} tokens over {report.sp} ranks, {report.scheme} layout, "
        f"{report.shard_length} rows per rank with padding",
        "",
        "rank  tokens  attention area",
    ]
    for rank, (tokens, area) in enumerate(zip(report.tokens_per_rank, report.attention_area_per_rank, strict=True)):
        text.append(f"{rank:4}  {tokens:6}  {area:14}")
    if report.isolation:
        text += ["", f"requests isolated: {report.isolation}"]
    text += ["", "pass                     lines changed  seconds"]
    text += [f"{step.name:24} {step.changed:>13}  {step.seconds:7.3f}" for step in report.steps]
    if report.strategies:
        text += ["", f"attention by {strategies_text(report.strategies)}"]
        text += [f"  predicted, {numbers_text(each.attentions)}: {_seconds_text(each)}" for each in report.choices]
    formula = "" if report.bytes_by_formula is None else f"; {report.bytes_by_formula} by the strategies' formulas"
    text += ["", f"{len(report.collectives)} collectives, {report.bytes_sent} bytes sent by each rank{formula}"]
    text += [
        f"  {each.kind:10} {each.bytes_sent:12} bytes  {each.shape:24} {each.source:32} {_shadow(each)}"
        for each in report.collectives
    ]
    if report.peak_bytes is not None:
        text += ["", f"{report.peak_bytes} bytes held at most by a rank, besides weights and inputs"]
    if report.replayed is not None:
        text += ["", "{} CUDA graphs, {} steps replayed".format(*report.replayed)]
    text += ["", f"{len(report.fallbacks)} fallbacks"]
    text += [
        f"  {each.op} x{each.count}, {each.bytes} bytes, {each.source or 'no source line'}: {each.reason}"
        for each in report.fallbacks
    ]
    return text


def _seconds_text(choice: Choice) -> str:
    return ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in choice.seconds.items())


def strategies_text(names: Sequence[str]) -> str:
    """Strategies with the numbers of the attentions that ran by them: ``0-3: window, 4: fetch``."""
    runs = itertools.groupby(range(len(names)), key=names.__getitem__)
    return ", ".join(f"{numbers_text([*run])}: {name}" for name, run in runs)


def numbers_text(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs of them by their ends: ``0-3, 7``."""
    runs = np.split(np.asarray(numbers), np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ", ".join(f"{each[0]}-{each[-1]}" if len(each) > 1 else f"{each[0]}" for each in runs)


def _shadow(each: Collective) -> str:
    if not each.shadow:
        return "nothing meanwhile"
    operations = f", {each.shadow_operations:.2g} operations in products" if each.shadow_operations else ""
    return f"meanwhile {each.shadow}{operations}"
