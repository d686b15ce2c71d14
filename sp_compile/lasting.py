"""Tensors that outlive the forward in which they are made."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Found = TypeVar("Found")


def lasting(make: Callable[Given, Found]) -> Callable[Given, Found]:
    """Decorates what makes or changes tensors that later forwards use: they know neither gradients nor inference mode.

    A tensor that is made under ``torch.inference_mode`` can be saved for no backward, nor be changed later on.
    """

    @wraps(make)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        with torch.inference_mode(False), torch.no_grad():  # the first alone would turn gradients on
            return make(*args, **kwargs)

    return run
