"""Pinning what the passes make of a model: its graph diffs in a file, which a test compares with those of now.

In a test::

    from sp_compile.testing import assert_graph_diff

    def test_the_rewrite_of_our_model():
        assert_graph_diff(model, sp_compile.pack([[5, 6, 7], [8]]), None, "our_model.diff")

``pytest -p sp_compile.testing --update-golden`` writes the files, to be read in review; ``addopts = "-p
sp_compile.testing"`` in pytest's configuration makes the option known for good. The names of nodes in them are those of
the versions of torch and transformers that wrote them. A model in training mode is pinned as it trains.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

OPTION = "--update-golden"


class _Run:
    """What the run of pytest was asked for."""

    updates = False


def assert_graph_diff(
    model: nn.Module,
    batch: Mapping[str, Any],
    config: Any,
    file: str | Path,
    sp: int = 2,
    passes: Sequence[str] | None = None,
) -> None:
    """Compare what each pass changes in the graph of a model with a file.

    Args:
        model: the model, of any weights; on the meta device it needs none.
        batch: its inputs as keyword arguments, such as a packed batch.
        config: as of :func:`sp_compile.parallelize`; None for the defaults.
        file: ``NAME.diff`` for all diffs in one, or a folder with a file for each pass; a relative path begins at the
            folder of the calling file.
        sp: ranks to pretend.
        passes: names of the passes whose diffs are kept; None for all.

    Raises:
        AssertionError: a file is not there or has other diffs, or no pass writes it; the message shows what differs.
        ValueError: the pipeline has no such pass.
        The errors of :func:`sp_compile.explain`.
    """
    path = Path(sys._getframe(1).f_globals.get("__file__", ".")).parent / file
    found = graph_diffs(model, batch, config, sp, passes)
    if path.suffix == ".diff":
        folder, files = path.parent, {path.name: "".join(f"# {name}\n{text}" for name, text in found)}
        known = [path.name]
    else:
        folder, files = path, {f"{i:02}-{name}.diff": text for i, (name, text) in enumerate(found, 1)}
        known = [each.name for each in sorted(folder.glob("[0-9][0-9]-*.diff"))]
    if _Run.updates:
        write(folder, files, known)
    else:
        compare(folder, files, known)


def graph_diffs(
    model: nn.Module, batch: Mapping[str, Any], config: Any, sp: int, passes: Sequence[str] | None = None
) -> list[tuple[str, str]]:
    """Name and diff of each pass; arguments of :func:`assert_graph_diff`."""
    from sp_compile.api import explain

    steps = explain(model, batch, sp, config).steps
    names = [each.name for each in steps]
    unknown = [each for each in passes or () if each not in names]
    if unknown:
        raise ValueError(f"the pipeline has no pass {unknown[0]!r}; it has {', '.join(names)}")
    return [(each.name, f"{each.diff}\n") for each in steps if passes is None or each.name in passes]


def write(folder: Path, found: Mapping[str, str], known: Sequence[str]) -> None:
    """Write files of a folder; of those that are known, the others go."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in set(known) - found.keys():
        (folder / name).unlink()
    for name, text in found.items():
        (folder / name).write_text(text, encoding="utf-8")


def compare(folder: Path, found: Mapping[str, str], known: Sequence[str]) -> None:
    """Compare files of a folder with what they would be now.

    Raises:
        AssertionError: they differ.
    """
    __tracebackhide__ = True
    problems = [f"{folder / name} is stale: no pass writes it" for name in known if name not in found]
    for name, text in found.items():
        if not (folder / name).is_file():
            problems.append(f"{folder / name} is not there")
            continue
        texts = (folder / name).read_text(encoding="utf-8").splitlines(), text.splitlines()
        problems += difflib.unified_diff(*texts, str(folder / name), f"{name} of now", n=1, lineterm="")
    if problems:
        how = f"if this is meant, run pytest -p sp_compile.testing {OPTION} and review the files"
        raise AssertionError("\n".join([*problems, how]))


def pytest_addoption(parser: Any) -> None:
    """Add ``--update-golden``."""
    parser.addoption(OPTION, action="store_true", help="write files of graph diffs anew")


def pytest_configure(config: Any) -> None:
    """Note whether files are written."""
    _Run.updates = bool(config.getoption(OPTION))
