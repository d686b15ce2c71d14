"""A model's forward through Dynamo, whose graphs go to a back end of ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sp_compile.capture import graph_break, is_specialised
from sp_compile.compat import hashable_dtensors
from sp_compile.errors import CaptureError, SPCompileError
from sp_compile.inputs import mark_token_dims

# only the token length varies: floats and other sizes are compiled in
DYNAMO: dict[str, Any] = {
    "recompile_limit": 4096,  # models that fix the length are captured anew for each
    "accumulated_recompile_limit": 65536,
    "automatic_dynamic_shapes": False,
    "assume_static_by_default": True,
}


def _ignored() -> set[Any]:
    """Calls that a graph does without: transformers warns of masks that it makes and of losses it does not know."""
    methods = ("warning", "warning_once")  # the latter is of transformers
    return {warnings.warn, *(getattr(logging.Logger, each) for each in methods if hasattr(logging.Logger, each))}


class Traced:
    """Calls a model; its graph is captured once for all token lengths, or for each where the model fixes them.

    Args:
        module: the model.
        backend: as of ``torch.compile``.
    """

    def __init__(self, module: nn.Module, backend: Callable[..., Any]) -> None:
        self._module = module
        self._run = torch.compile(module, backend=backend, fullgraph=True)
        self._static: set[Any] = set()  # how calls look whose length is fixed
        self._in_shards = any(isinstance(each, DTensor) for each in module.parameters())

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any], length: int, gradients: bool) -> Any:
        """The model's outputs for inputs of so many tokens; with ``gradients``, torch records what is computed.

        Raises:
            CaptureError: the model does not capture into one graph.
        """
        key = (tuple(sorted(kwargs)), len(args))
        dynamic = length > 1 and key not in self._static
        try:
            return self._call(args, kwargs, length if dynamic else 0, gradients)
        except torch._dynamo.exc.UserError as error:
            raise CaptureError(graph_break(self._module, error)) from error
        except Exception as error:
            if dynamic and is_specialised(error):
                self._static.add(key)
                return self._call(args, kwargs, 0, gradients)
            raise

    def _call(self, args: Sequence[Any], kwargs: Mapping[str, Any], length: int, gradients: bool) -> Any:
        args = [mark_token_dims(value, length) for value in args]
        kwargs = {name: mark_token_dims(value, length, name) for name, value in kwargs.items()}
        try:
            with (
                torch.set_grad_enabled(gradients),
                torch._dynamo.config.patch(DYNAMO | {"ignore_logging_functions": _ignored()}),
                hashable_dtensors() if self._in_shards else nullcontext(),
            ):
                return self._run(*args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, SPCompileError):
                raise error.inner_exception from None
            raise
        except torch._dynamo.exc.Unsupported as error:
            raise CaptureError(graph_break(self._module, error)) from error
        except torch._dynamo.exc.TorchRuntimeError as error:
            if not self._in_shards:
                raise
            hint = "torch cannot run it on DTensors; modules are to take and return local tensors of all tokens"
            raise CaptureError(f"{graph_break(self._module, error)}; {hint}") from error
