"""A report as one HTML page that needs nothing else: the layout as a picture, tables, and searchable diffs."""

from __future__ import annotations

import colorsys
import inspect
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from sp_compile.layout import token_layout
from sp_compile.pipeline import PassStep, registered_passes
from sp_compile.report import Report, numbers_text, strategies_text

RANKS = 64  # that are drawn and listed; of more, these many spread evenly
WIDTH, LINE = 1200, 14  # of the picture, and of a rank in it
SMALLEST = 0.25  # width of a run of tokens below which it is drawn together with its neighbours

Row = tuple[str, str, str]  # kind, before, after


def page(report: Report, title: str) -> str:
    """The page of a report from :func:`sp_compile.explain`.

    Args:
        title: of the page, such as the model's name.
    """
    text = resources.files("sp_compile").joinpath("data", "explain.html.j2").read_text(encoding="utf-8")
    shown = _shown(report.sp)
    mean = max(sum(report.attention_area_per_rank) / report.sp, 1e-9)
    work = list(zip(report.tokens_per_rank, report.attention_area_per_rank, strict=True))
    ranks = [{"rank": i, "tokens": work[i][0], "area": work[i][1], "share": work[i][1] / mean} for i in shown]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)
    return template.render(
        title=title,
        report=report,
        tokens=sum(report.lengths),
        strategies=strategies_text(report.strategies),
        layout=_picture(report, shown),
        left_out=report.sp - len(shown),
        ranks=ranks,
        numbers=numbers_text,
        steps=[_step(each) for each in report.steps],
    )


def _shown(sp: int) -> list[int]:
    return sorted({int(each) for each in np.linspace(0, sp - 1, min(sp, RANKS)).round()})


def _step(step: PassStep) -> dict[str, Any]:
    known = registered_passes().get(step.name)
    module = inspect.getmodule(known) if known else None
    says = (inspect.getdoc(module) or "").partition("\n")[0].replace("`", "") if module else ""
    rows = list(side_by_side(step.diff.splitlines()))
    return {"name": step.name, "says": says, "changed": step.changed, "seconds": step.seconds, "rows": rows}


def side_by_side(diff: Sequence[str]) -> Iterator[Row]:
    """Rows of a unified diff: ``hunk``, ``same``, or ``changed`` with what went and what came instead."""
    went: list[str] = []
    came: list[str] = []
    for line in [*diff[2:], "@@"]:
        if line.startswith("-"):
            went.append(line[1:])
        elif line.startswith("+"):
            came.append(line[1:])
        else:
            for i in range(max(len(went), len(came))):
                yield "changed", went[i] if i < len(went) else "", came[i] if i < len(came) else ""
            went, came = [], []
            if line.startswith("@@ "):
                yield "hunk", line, ""
            elif line != "@@":
                yield "same", line[1:], line[1:]


def _picture(report: Report, shown: Sequence[int]) -> str:
    """The layout as SVG."""
    layout = token_layout(report.lengths, report.sp, report.scheme, min_shard_length=2)
    ends = np.cumsum(report.lengths)
    scale = WIDTH / max(int(ends[-1]), 1)
    height = LINE * len(shown)
    parts = [f'<svg viewBox="0 0 {WIDTH + 60} {height}" width="{WIDTH + 60}" height="{height}" role="img" '
             'aria-label="tokens of each rank">']  # fmt: skip
    for line, rank in enumerate(shown):
        top = line * LINE
        parts.append(f'<text x="50" y="{top + LINE - 4}" font-size="10" text-anchor="end">rank {rank}</text>')
        rows = np.sort(layout.local_index[rank][layout.valid[rank]].numpy())
        for start, end, request in _runs(rows, ends, 1 / scale * SMALLEST):
            parts.append(
                f'<rect x="{60 + start * scale:.2f}" y="{top + 1}" width="{max((end - start) * scale, SMALLEST):.2f}" '
                f'height="{LINE - 2}" fill="{_colour(request)}"><title>rank {rank}: request {request}, tokens '
                f"{start - (ends[request] - report.lengths[request])} to "
                f"{end - 1 - (ends[request] - report.lengths[request])}</title></rect>"
            )
    return "".join([*parts, "</svg>"])


def _runs(rows: np.ndarray, ends: np.ndarray, smallest: float) -> Iterator[tuple[int, int, int]]:
    """Start, end and request of each run of a rank's tokens; of those too small to be seen, one at a time."""
    if not len(rows):
        return
    requests = np.searchsorted(ends, rows, side="right")
    cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(requests) != 0)) + 1
    last = -smallest
    for start, end in zip(np.append(0, cuts), np.append(cuts, len(rows)), strict=True):
        first = int(rows[start])
        if end - start < smallest and first - last < smallest:
            continue
        last = first
        yield first, int(rows[end - 1]) + 1, int(requests[start])


def _colour(request: int) -> str:
    """Neighbours differ: a golden angle further round the circle of hues for each."""
    red, green, blue = colorsys.hls_to_rgb(request * 0.618034 % 1.0, (0.45, 0.62)[request % 2], 0.55)
    return f"#{int(255 * red):02x}{int(255 * green):02x}{int(255 * blue):02x}"
