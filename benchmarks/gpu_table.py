"""The table of ``gpu.py``: what reaches its target and what misses it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gpu_timing import figure


class Row(NamedTuple):
    """A ratio of the table.

    Attributes:
        ratio: None where the part raised, which ``target`` tells then.
        milliseconds: of ours, where they were measured.
    """

    what: str
    ratio: float | None
    target: str
    met: bool
    milliseconds: float | None = None


def rows_of(parts: Mapping[str, Any], name: str) -> list[Row]:
    """The rows of a part; those of attention and of layers are also over sp=1, where that was measured."""
    found = parts[name]
    if "raised" in found:
        return [Row(name, None, found["raised"], False)]
    figures = {key: each for key, each in found.items() if isinstance(each, dict) and "ratio" in each}
    single = parts.get(f"{name.rpartition(', sp=')[0]}, sp=1", {})
    if "lengths" in found:
        figures = _of_attention(found, single)
    if "held_bytes" in found and found["sp"] > 1 and "peak_bytes" in single:
        share = single["peak_bytes"] / found["sp"] + found["held_bytes"]
        figures["peak over share and buffers"] = figure(found["peak_bytes"] / share, "memory", found["error"])
    return [
        Row(f"{name}, {key}", each["ratio"], each["target"], each["met"], _milliseconds(each))
        for key, each in figures.items()
    ]


def _of_attention(found: Mapping[str, Any], single: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Ratios of all strategies of one size.

    Args:
        single: the figures of sp=1; those of torch's kernels over each request are there.
    """
    rows: dict[str, dict[str, Any]] = {}
    for strategy, each in found.items():
        if not isinstance(each, dict) or "ranks" not in each:
            continue
        slowest = max(rank["seconds"] for rank in each["ranks"])
        best, error = min(1 / rank["ratio"] for rank in each["ranks"]), found["error"]
        rows[f"{strategy}, best over ours"] = figure(best, "best", error, seconds=slowest)
        rows[f"{strategy}, plan over layers"] = figure(each["plan_over_layers"], "plan", error)
        if len(each["ranks"]) > 1:
            rows[f"{strategy}, slowest over mean"] = figure(each["slowest_over_mean"], "even", error)
        if "unsharded_seconds" not in single:
            continue
        alone = min(single["unsharded_seconds"].values())
        rows[f"{strategy}, sum over best unsharded"] = figure(each["sum_seconds"] / alone, "even", error)
        if found["sp"] > 1:
            ratio = each["sum_seconds"] / single["allgather_kv"]["sum_seconds"]
            rows[f"{strategy}, sum over sp=1"] = figure(ratio, "even", error)
    return rows


def _milliseconds(each: Mapping[str, Any]) -> float | None:
    return each["seconds"] * 1e3 if "seconds" in each else None


def printed(rows: Sequence[Row]) -> str:
    """Rows for a terminal."""
    return "\n".join(
        f"  {each.what}: {_ratio(each)} ({each.target}, {_verdict(each)}) {_time(each)}".rstrip() for each in rows
    )


def markdown(results: Mapping[str, Any]) -> str:
    """The table, with the machine and the commands."""
    commands = ", then ".join(f"`{each}`" for each in results["commands"])
    rows = [row for name in results["parts"] for row in rows_of(results["parts"], name)]
    lines = [
        "# One device",
        "",
        f"Machine: {json.dumps(results['machine'])}",
        "",
        f"Versions: {json.dumps(results['versions'])}",
        "",
        f"Settings: {json.dumps(results['settings'])}",
        "",
        f"Commands: {commands}",
        "",
        f"{sum(each.met for each in rows)} of {len(rows)} targets are met.",
        "",
        "| what | ratio | target | | ours |",
        "|---|---|---|---|---|",
        *(
            f"| {each.what} | {_ratio(each)} | {_cell(each.target)} | {_verdict(each)} | {_time(each)} |"
            for each in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def _ratio(row: Row) -> str:
    return "raised" if row.ratio is None else f"{row.ratio:.3g}"


def _verdict(row: Row) -> str:
    return "met" if row.met else "missed"


def _time(row: Row) -> str:
    return "" if row.milliseconds is None else f"{row.milliseconds:.3g} ms"


def _cell(text: str) -> str:
    """One line, without what ends a cell."""
    first = text.partition("\n")[0][:200]
    return first.replace("|", "\\|")
