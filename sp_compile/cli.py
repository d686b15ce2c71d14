"""Entry point of ``sp-compile`` and ``python -m sp_compile``: runs a command and shows errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sp_compile.errors import SPCompileError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 where the result is not right; 2 for an error, which is shown in one line, or whole with ``--debug``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [each for each in arguments if each != "--debug"]
    try:
        from sp_compile.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print("sp-compile needs typer and rich; install them with `pip install 'sp_compile[cli]'`", file=sys.stderr)
        return 2
    try:
        app(arguments, prog_name="sp-compile")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except SPCompileError as error:
        if debug:
            raise
        print(_one_line(error), file=sys.stderr)
        return 2
    return 0


def _one_line(error: SPCompileError) -> str:
    rank = os.environ.get("RANK")
    where = f" (rank {rank})" if rank is not None else ""
    first, *more = str(error).splitlines()
    return f"error{where}: {first}" + (" (--debug shows the rest)" if more else "")
