"""Pinning what the passes make of a model: its graph diffs in a file, which a test compares with those of now.

In a test::

    from sp_compile.testing import assert_graph_diff

    def test_the_rewrite_of_our_model():
        assert_graph_diff(model, sp_compile.pack([[5, 6, 7], [8]]), None, "our_model.diff")

``pytest -p sp_compile.testing --update-golden`` writes the files, to be read in review; ``addopts = "-p
sp_compile.testing"`` in pytest's configuration makes the option known for good. The names of nodes in them are those of
the versions of torch and transformers that wrote them.
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
        file: where the diffs are; a relative path begins at the folder of the calling file.
        sp: ranks to pretend.
        passes: names of the passes whose diffs are kept; None for all.

    Raises:
        AssertionError: the file is not there, or its diffs are others; the message shows what differs.
        ValueError: the pipeline has no such pass.
        The errors of :func:`sp_compile.explain`.
    """
    path = Path(sys._getframe(1).f_globals.get("__file__", ".")).parent / file
    found = graph_diffs(model, batch, config, sp, passes)
    if _Run.updates:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found, encoding="utf-8")
    compare(path, found)


def graph_diffs(
    model: nn.Module, batch: Mapping[str, Any], config: Any, sp: int, passes: Sequence[str] | None = None
) -> str:
    """The diffs of the passes one after another, each under its name; arguments of :func:`assert_graph_diff`."""
    from sp_compile.api import explain

    steps = explain(model, batch, sp, config).steps
    names = [each.name for each in steps]
    unknown = [each for each in passes or () if each not in names]
    if unknown:
        raise ValueError(f"the pipeline has no pass {unknown[0]!r}; it has {', '.join(names)}")
    return "".join(f"# {each.name}\n{each.diff}\n" for each in steps if passes is None or each.name in passes)


def compare(path: Path, found: str) -> None:
    """Compare the text of a file with what it would be now.

    Raises:
        AssertionError: they differ.
    """
    __tracebackhide__ = True
    if not path.is_file():
        raise AssertionError(f"{path} is not there; write it with pytest -p sp_compile.testing {OPTION}")
    expected = path.read_text(encoding="utf-8")
    if expected == found:
        return
    texts = expected.splitlines(), found.splitlines()
    lines = difflib.unified_diff(*texts, str(path), f"{path.name} of now", n=1, lineterm="")
    how = f"if this is meant, run pytest with {OPTION} and review the file"
    raise AssertionError("\n".join([f"{path} has other diffs:", *lines, how]))


def pytest_addoption(parser: Any) -> None:
    """Add ``--update-golden``."""
    parser.addoption(OPTION, action="store_true", help="write files of graph diffs anew")


def pytest_configure(config: Any) -> None:
    """Note whether files are written."""
    _Run.updates = bool(config.getoption(OPTION))
