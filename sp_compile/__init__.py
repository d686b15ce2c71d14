"""Sequence parallelism for unmodified models, by compiling them."""

import importlib
from typing import Any

from sp_compile import data, loss
from sp_compile.api import Verification, emulate, explain, parallelize, verify
from sp_compile.batch import PackedBatch, pack
from sp_compile.emulation import Emulation
from sp_compile.errors import SPCompileError
from sp_compile.launch import launch
from sp_compile.layout import TokenLayout, token_layout
from sp_compile.processes import as_one_process
from sp_compile.report import Report
from sp_compile.runtime import ParallelModule

__version__ = "0.1.0"
WITH_TRANSFORMERS = {
    "Completion": "generation",
    "ShardedCache": "cache",
    "Trainer": "trainer",
    "generate": "generation",
}


def __getattr__(name: str) -> Any:
    """What needs transformers is imported when it is first used."""
    if name in WITH_TRANSFORMERS:
        return getattr(importlib.import_module(f"sp_compile.{WITH_TRANSFORMERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Completion",
    "Emulation",
    "PackedBatch",
    "ParallelModule",
    "Report",
    "SPCompileError",
    "ShardedCache",
    "TokenLayout",
    "Trainer",
    "Verification",
    "as_one_process",
    "data",
    "emulate",
    "explain",
    "generate",
    "launch",
    "loss",
    "pack",
    "parallelize",
    "token_layout",
    "verify",
]
