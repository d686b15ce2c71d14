"""YAML files that include others, and where each value of what they make comes from.

A file may begin with ``defaults: [prefill, models/small.yaml]``: those are read first, in order, and then the file
itself over them. Names are files beside the one that includes them, or of configurations that ship with sp_compile,
whose parts are in folders: ``model/llama_8b``, ``requests/texts``, ``layout/zigzag``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sp_compile.errors import ConfigError, nearest

INCLUDES = "defaults"
OF_MACHINES = "hardware/"  # no parts of jobs
HOME = "sp_compile/configs/"  # how files that ship are called, wherever they lie


class Part(NamedTuple):
    """What one file or override says, and its name for people."""

    origin: str
    content: dict[str, Any]


def read_parts(source: str | Path, kind: str = "") -> list[Part]:
    """A file behind those that it includes.

    Args:
        source: a path, or the name of a file that ships.
        kind: the folder of those that ship.

    Raises:
        ConfigError: no such file, no valid YAML, or files that include one another.
    """
    return list(_read(str(source), Path(), (), kind))


def _read(name: str, folder: Path | None, readers: tuple[str, ...], kind: str) -> Iterator[Part]:
    """As :func:`read_parts`; without a folder, of files that ship alone, which are what those include."""
    origin, text, folder = _find(name, folder, readers, kind)
    if origin in readers:
        raise ConfigError(f"{' includes '.join((*readers, origin))}: files include one another in a circle")
    content = _mapping(text, origin)
    includes = content.pop(INCLUDES, None) or []
    if not isinstance(includes, list) or not all(isinstance(each, str) for each in includes):
        raise ConfigError(f"{origin}: {INCLUDES} is {includes!r}; expected a list of files to read first")
    for each in includes:
        yield from _read(each, folder, (*readers, origin), kind)
    yield Part(origin, content)


def _find(name: str, folder: Path | None, readers: Sequence[str], kind: str) -> tuple[str, str, Path | None]:
    """What a file is called, its text, and its folder, where it is not one that ships."""
    for path in () if folder is None else (folder / name, folder / f"{name}.yaml"):
        try:
            if path.is_file():
                return os.path.normpath(path), path.read_text(encoding="utf-8"), path.parent
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} cannot be read: it is no text in UTF-8") from error
    before = f"{kind}/" if kind else ""
    shipped = {
        each.removeprefix(before): file for each, file in _shipped(resources.files("sp_compile.configs"), "")
        if (each.startswith(before) if kind else not each.startswith(OF_MACHINES))
    }  # fmt: skip
    file = (name if name.endswith(".yaml") else f"{name}.yaml").removeprefix("./").removeprefix("configs/")
    file = file.removeprefix(before)
    if file in shipped:
        return f"{HOME}{before}{file}", shipped[file].read_text(encoding="utf-8"), None
    reader = f", which {readers[-1]} includes" if readers else ""
    hint = nearest(file, shipped)
    raise ConfigError(f"there is no file {name!r}{reader}, and none of that name ships with sp_compile{hint}")


def _shipped(folder: Traversable, before: str) -> Iterator[tuple[str, Traversable]]:
    """Files of a folder and of those in it, by their names from the outermost on."""
    for each in folder.iterdir():
        if each.is_dir():
            yield from _shipped(each, f"{before}{each.name}/")
        elif each.name.endswith(".yaml"):
            yield f"{before}{each.name}", each


def _mapping(text: str, name: str) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{name} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{name} holds a {type(content).__name__}; expected sections of keys and values")
    return {str(key): value for key, value in content.items()}


def flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested mappings."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def annotated(content: Mapping[str, Any], parts: Sequence[Part]) -> str:
    """The merged content as YAML, behind each value where it comes from."""
    origins = {name: part.origin for part in parts for name, _ in flat(part.content)}
    lines = list(_annotated(content, "", origins))
    width = max(len(text) for text, _ in lines) + 2
    return "".join(f"{text:{width}}# {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def _annotated(content: Mapping[str, Any], before: str, origins: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Lines of YAML, each with the origin of the value on it, if there is one."""
    indent = "  " * before.count(".")
    for key, value in content.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:", ""
            yield from _annotated(value, f"{name}.", origins)
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20).removesuffix("\n...\n").strip()
            yield f"{indent}{key}: {text}", origins.get(name, "default")
