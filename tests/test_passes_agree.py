"""One pass, one file, one test file, one name."""

from __future__ import annotations

from pathlib import Path

from sp_compile.pipeline import registered_passes

ROOT = Path(__file__).parents[1]


def test_passes_files_and_tests_have_the_same_names():
    files = {each.stem for each in (ROOT / "passes").glob("*.py")} - {"__init__"}
    tests = {each.stem.removeprefix("test_") for each in (ROOT / "tests" / "passes").glob("test_*.py")}
    assert files == set(registered_passes()) == tests


def test_a_pass_is_defined_in_the_file_of_its_name():
    assert {name: kind.__module__ for name, kind in registered_passes().items()} == {
        name: f"sp_compile.passes.{name}" for name in registered_passes()
    }
