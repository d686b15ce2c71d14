"""Sequence parallelism for unmodified models, by compiling them."""

from typing import Any

from sp_compile.api import Verification, explain, parallelize, verify
from sp_compile.batch import PackedBatch, pack
from sp_compile.errors import SPCompileError
from sp_compile.launch import launch
from sp_compile.layout import TokenLayout, token_layout
from sp_compile.report import Report
from sp_compile.runtime import ParallelModule

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What needs transformers is imported when it is first used."""
    if name == "ShardedCache":
        from sp_compile.cache import ShardedCache

        return ShardedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "PackedBatch",
    "ParallelModule",
    "Report",
    "SPCompileError",
    "ShardedCache",
    "TokenLayout",
    "Verification",
    "explain",
    "launch",
    "pack",
    "parallelize",
    "token_layout",
    "verify",
]
