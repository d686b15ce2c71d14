"""Every error a caller can meet, under one root.

Caller's mistakes derive from :class:`ValueError` or :class:`TypeError` as well, so plain ``except`` clauses work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SPCompileError(Exception):
    """Root of all errors raised by sp_compile."""


class ConfigError(SPCompileError, ValueError):
    """A configuration, a pass name or an option that does not exist or does not fit."""


class KernelError(ConfigError):
    """A kernel was asked for that cannot compute the model's attention."""


class StrategyError(ConfigError):
    """A strategy was asked for that cannot run the model's attention, or the batch's."""


class BatchError(SPCompileError, ValueError):
    """A batch that cannot be laid out: empty, wrong shape, inconsistent positions."""


class RequestsMixedError(SPCompileError, ValueError):
    """A batch from ``pack`` whose requests would see each other; ``curable`` where isolating them might help."""

    def __init__(self, message: str, curable: bool = True) -> None:
        super().__init__(message)
        self.curable = curable


class CacheError(SPCompileError, ValueError):
    """A cache that does not fit the model, the ranks or the call, or a model that cannot run with one."""


class CacheFullError(CacheError):
    """More tokens than a cache of fixed size holds; nothing was written."""


class MeshError(SPCompileError, ValueError):
    """Ranks, process groups and ``sp`` that do not fit together."""


class RankMismatchError(SPCompileError, RuntimeError):
    """Ranks of one group that disagree on what is about to run."""


class RankFailedError(SPCompileError, RuntimeError):
    """Another rank of the group raised or died."""


class CaptureError(SPCompileError, RuntimeError):
    """The model cannot be captured into one graph."""


class UnsupportedModelError(SPCompileError, TypeError):
    """A model, dtype or device mix that cannot be parallelized."""


class FallbackError(SPCompileError, RuntimeError):
    """``strict=True`` and an op fell back, to gathered inputs or to a slower kernel."""


class PipelineError(SPCompileError, ValueError):
    """A schedule of passes that breaks an invariant."""


class PassError(SPCompileError, RuntimeError):
    """A pass failed; the message names the pass, the node, what was expected and what was found."""


class PreconditionError(PassError):
    """The graph did not hold what the pass requires."""


class PostconditionError(PassError):
    """The graph does not hold what the pass establishes, or an invariant that it had to keep."""


class PassCrashError(PassError):
    """The pass itself raised."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or a list of the known ones."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(names)}"
