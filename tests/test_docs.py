"""The code of the documentation runs, and its pages name what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sp_compile.config import compile_config
from sp_compile.pipeline import build_pipeline
from sp_compile.placements import describe
from sp_compile.program import placement
from sp_compile.rules import Call, NoRule
from sp_compile.sweep import load_sweep
from tests.passes.graphs import after, call, embeds

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["writing-a-pass.md", "adding-a-rule.md"])
def test_code_of_extensions_runs(page: str):
    names: dict[str, Any] = {"__name__": "documented"}
    for each in blocks(page, "python"):
        exec(compile(each, page, "exec"), names)
    assert names.keys() & {"DropCasts", "flipped"}


def test_the_rule_that_is_shown_says_where_rows_stay():
    names: dict[str, Any] = {}
    exec(blocks("adding-a-rule.md", "python")[0], names)
    assert describe(names["flipped"](flip(-1)).output) == "Shard(1)"
    with pytest.raises(NoRule, match="runs over the token dim"):
        names["flipped"](flip(1))


def flip(dim: int) -> Call:
    """A flip of rows that are cut over ranks."""

    def forward(self: Any, inputs_embeds: Any) -> Any:
        return (2 * inputs_embeds).flip(dim)

    program = after("propagate_placements", forward, embeds())
    node, rows = call(program, "aten.flip"), call(program, "aten.mul")
    node.args = (rows, *node.args[1:])
    assert program.tokens is not None
    return Call(node, program.tokens, {rows: placement(rows)})


def test_pages_of_the_navigation_exist_and_all_are_in_it():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = re.findall(r"[\w-]+\.md", str(site["nav"]))
    assert sorted(named) == sorted(each.name for each in DOCS.glob("*.md"))


def test_strategies_schemes_and_options_that_are_named_exist(tmp_path: Path):
    names = re.findall(r"^\| `(\w+)` \|", (DOCS / "strategies.md").read_text(), re.MULTILINE)
    for each in names[:7]:
        build_pipeline(attention=each)
    for each in names[7:]:
        assert compile_config(scheme=each).scheme == each
    assert len(names) == 11
    job, grid = blocks("experiments.md", "yaml")
    (tmp_path / "grid.yaml").write_text(grid)
    assert len(load_sweep(tmp_path / "grid.yaml").points) == 4
    assert yaml.safe_load(job)["defaults"][0] == "prefill"


def test_the_site_is_built_without_warnings(tmp_path: Path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "parallelize" in text
    assert re.findall(r":(?:class|func|meth|mod|attr):", text) == []
