"""Pictures of a sweep's results: speed against ranks, bytes, balance, memory against tokens."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sp_compile.config_files import flat
from sp_compile.errors import ConfigError
from sp_compile.sweep import DONE, flat_rows

Row = Mapping[str, Any]
KINDS = ("png", "svg")
MARKS = "os^vDP*X"


def draw(results: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw every picture that the results have figures for.

    Args:
        results: of a sweep, from :meth:`sp_compile.sweep.Results.read`; points that failed are left out.
        folder: made where it is not there.

    Returns:
        The files, a PNG and an SVG of each picture.

    Raises:
        ConfigError: matplotlib is not installed, no point has figures, or the folder cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed, which pictures need; pip install 'sp_compile[experiments]'"
        ) from error
    last = {each["key"]: each for each in results}
    done = [each for each in last.values() if each["status"] == DONE and "forward_seconds" in (each["result"] or {})]
    if not done:
        raise ConfigError("no point of the results has figures to draw")
    rows = flat_rows(done)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (title, of_x, of_y) in PICTURES.items():
            lines = _lines(rows, done, name)
            if not lines:
                continue
            with matplotlib.rc_context({"svg.hashsalt": name}):
                figure = Figure(figsize=(8, 4.8), layout="constrained")
                axes: Any = figure.subplots()
                for mark, (label, points) in zip(itertools.cycle(MARKS), sorted(lines.items()), strict=False):
                    axes.plot(*zip(*sorted(points), strict=True), marker=mark, label=label or None)
                if name in DIAGONALS:
                    along = sorted({x for points in lines.values() for x, _ in points})
                    axes.plot(along, along, color="grey", linestyle=":", label=DIAGONALS[name])
                axes.set(title=title, xlabel=of_x, ylabel=of_y)
                axes.xaxis.get_major_locator().set_params(integer=True)
                axes.grid(alpha=0.3)
                axes.set_ylim(bottom=0)
                if axes.get_legend_handles_labels()[0]:
                    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
                for kind in KINDS:
                    written.append(folder / f"{name}.{kind}")
                    figure.savefig(written[-1], dpi=120)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    return written


DIAGONALS = {"speed_up": "as many times as ranks", "formula": "as the formula says"}
PICTURES = {
    "speed_up": ("Speed-up", "ranks", "times the speed of one rank"),
    "bytes": ("Bytes that a rank sends in a forward", "ranks", "MB"),
    "formula": ("Bytes that a rank sends, against its strategy's formula", "MB by the formula", "MB"),
    "balance": ("Balance of attention", "ranks", "query-key pairs of the busiest rank over the mean"),
    "memory": ("Peak memory of a rank above the weights", "tokens of the batch", "MB"),
}


def _lines(rows: Sequence[Row], results: Sequence[Row], name: str) -> dict[str, list[tuple[float, float]]]:
    """Points of each line of a picture, by what the line stands for."""
    configs = [dict(flat(each["config"])) for each in results]
    names = dict.fromkeys(key for each in configs for key in each)
    varied = [key for key in names if len({str(each.get(key)) for each in configs}) > 1]
    by_ranks = [key for key in varied if key != "run.sp"]
    both = list(zip(rows, configs, strict=True))
    alone = {_label(config, by_ranks): row["seconds"] for row, config in both if row["sp"] == 1}
    lines: dict[str, list[tuple[float, float]]] = {}
    for row, config in both:
        label = _label(config, by_ranks)
        if name == "speed_up" and label in alone:
            lines.setdefault(label, []).append((row["sp"], alone[label] / row["seconds"]))
        elif name == "bytes":
            lines.setdefault(label, []).append((row["sp"], row["bytes_sent"] / 1e6))
        elif name == "formula" and row["sp"] > 1 and row["bytes_by_formula"] is not None:
            others = [key for key in varied if not key.startswith(("requests.", "run."))]
            point = (row["bytes_by_formula"] / 1e6, row["bytes_sent"] / 1e6)
            lines.setdefault(_label(config, others), []).append(point)
        elif name == "balance":
            lines.setdefault(label, []).append((row["sp"], row["area_most_over_mean"]))
        elif name == "memory":
            others = [key for key in varied if not key.startswith("requests.")]
            lines.setdefault(_label(config, others), []).append((row["tokens"], row["peak_bytes"] / 1e6))
    return lines


def _label(row: Row, keys: Sequence[str]) -> str:
    return ", ".join(f"{key.split('.')[-1]}={row.get(key)}" for key in keys)
