"""The figures of ``gpu.py``: measured part by part, written after each, and gone on with by a later run."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_table import markdown, printed, rows_of

Parts = Mapping[str, Callable[[], dict[str, Any]]]
RAISED = "raised"  # why a part has no figures
MUST_MATCH = ("machine", "versions", "settings")
MAY_DIFFER = "memory_bytes"  # of machines of a kind, whose firmware takes some


@dataclass
class Record:
    """What was measured.

    Attributes:
        results: the machine, versions and settings, the commands, and by the name of a part its figures.
        json, markdown: where they are written.
    """

    results: dict[str, Any]
    json: Path | None = None
    markdown: Path | None = None

    @property
    def parts(self) -> dict[str, Any]:
        """Figures by the name of a part."""
        found: dict[str, Any] = self.results["parts"]
        return found

    @property
    def raised(self) -> list[str]:
        """Parts that raised."""
        return [name for name, found in self.parts.items() if RAISED in found]

    def go_on(self, again: bool) -> None:
        """Take over the figures that the JSON file has.

        Args:
            again: parts that raised are forgotten, to be measured once more.

        Raises:
            ValueError: they were measured elsewhere, or otherwise; says what differs.
        """
        if self.json is None:
            raise ValueError("--resume goes on with a file; pass --json with its path")
        if not self.json.exists():
            return
        before = json.loads(self.json.read_text())
        now = json.loads(json.dumps(self.results))
        differing = [f"{what} {key}: {one!r} there, {other!r} here" for what in MUST_MATCH
                     for key, one, other in _differences(before.get(what, {}), now[what])]  # fmt: skip
        if differing:
            raise ValueError(
                f"{self.json} cannot be gone on with, for ratios are of one machine: {'; '.join(differing)}; "
                "pass another file to --json"
            )
        self.results["commands"] = [*before["commands"], *self.results["commands"]]
        self.results["parts"] = {name: found for name, found in before["parts"].items()
                                 if not (again and RAISED in found)}  # fmt: skip

    def measure(self, parts: Parts, minutes: float | None = None) -> None:
        """Measure the parts that are not there; one that raises leaves the others.

        Args:
            minutes: after which no part begins.
        """
        begin = time.perf_counter()
        missing = {name: part for name, part in parts.items() if name not in self.parts}
        print(f"{len(missing)} of {len(parts)} parts to measure", flush=True)
        for i, (name, part) in enumerate(missing.items(), start=1):
            spent = time.perf_counter() - begin
            if minutes is not None and spent > 60 * minutes:
                print(f"{len(missing) - i + 1} parts are left after {spent / 60:.1f} minutes; --resume goes on")
                return
            print(f"\n[{spent:6.1f} s] {i} of {len(missing)}: {name}", flush=True)
            start = time.perf_counter()
            self.parts[name] = _figures(part)
            self.parts[name]["elapsed_seconds"] = time.perf_counter() - start
            print(printed(rows_of(self.parts, name)), flush=True)
            self.write()
            if not _freed():
                print("the device does not answer any more, so that nothing else can be measured; --resume goes on")
                return

    def write(self) -> None:
        """Write what was found so far."""
        if self.json:
            self.json.write_text(json.dumps(self.results, indent=2) + "\n")
        if self.markdown:
            self.markdown.write_text(markdown(self.results))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = sorted({*before, *now} - {MAY_DIFFER})
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


def _figures(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Figures of a part, or why there are none; nothing that it held is referred to then."""
    torch.manual_seed(0)
    try:
        return part()
    except Exception as error:
        traceback.print_exception(error)
        traceback.clear_frames(error.__traceback__)
        return {RAISED: f"{type(error).__name__}: {error}"}


def _freed() -> bool:
    """Give back what a part held; whether the device still answers."""
    gc.collect()
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(error)
            return False
    return True
