"""The built wheel works without the repository, and passes/ is nothing but sp_compile.passes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sp_compile.pipeline import registered_passes

ROOT = Path(__file__).parent.parent
SOURCES = ("sp_compile", "passes", "configs", "pyproject.toml", "README.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build leftovers of the checkout get in."""
    copy = tmp_path_factory.mktemp("copy")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    pip(copy, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", "out", ".")
    (built,) = (copy / "out").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip(folder, "install", "--no-deps", "--no-index", "--target", "site", str(wheel))
    return folder / "site"


def pip(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def python(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder`` with the wheel before everything else, an editable installation too."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_the_wheel_holds_every_module_and_the_files_that_go_with_them(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sp_compile").rglob("*.py")}
    expected |= {f"sp_compile/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "passes").rglob("*.py")}
    expected |= {f"sp_compile/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    expected |= {"sp_compile/py.typed", "sp_compile/data/passages.txt"}
    assert expected <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"sp_compile"}


def test_the_installed_wheel_imports_its_passes_from_another_directory(installed: Path, tmp_path: Path):
    code = "import sp_compile.pipeline as p, sp_compile.passes as q; print(*p.registered_passes()); print(q.__file__)"
    found = python(installed, tmp_path, "-c", code)
    assert found.returncode == 0, found.stderr
    names, place = found.stdout.splitlines()
    assert names.split() == list(registered_passes())
    assert Path(place) == installed / "sp_compile" / "passes" / "__init__.py"


def test_the_installed_wheel_runs_the_default_job_from_another_directory(installed: Path, tmp_path: Path):
    options = ["codegen=eager", "max_tokens=20", "max_requests=3", "model.config.num_hidden_layers=1", "repeats=1"]
    found = python(installed, tmp_path, "-m", "sp_compile", "run", "configs/prefill.yaml", "sp=2", *options)
    assert found.returncode == 0, found.stderr
    assert "right" in found.stdout


@pytest.mark.parametrize("folder", [ROOT, None])
def test_passes_is_refused_as_a_package_of_its_own(installed: Path, folder: Path | None):
    found = python(installed, folder or installed / "sp_compile", "-c", "import passes")
    assert found.returncode == 1
    assert "ImportError: import sp_compile.passes" in found.stderr
