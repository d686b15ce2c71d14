"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sp_compile.errors import ConfigError


def check_target(path: Path) -> None:
    """Check that a file can be written there, before there is anything to write.

    Raises:
        ConfigError: there is no such folder, or the path is one.
    """
    if path.is_dir() or not path.name:
        raise ConfigError(f"{path} cannot be written: it is a directory; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no directory {str(path.parent)!r}")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when the block ends without an error.

    Raises:
        ConfigError: the folder does not take it; what was there is kept.
    """
    check_target(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
