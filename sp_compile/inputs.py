"""A model's inputs: which of them hold the tokens, whether they can be laid out, and which dims may vary."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sp_compile.batch import packed_lengths, request_lengths
from sp_compile.capture import TOKEN_INPUTS
from sp_compile.errors import BatchError, UnsupportedModelError


def device_of(module: nn.Module, *others: torch.Tensor) -> torch.device:
    """Where a model is, or what it gets."""
    tensors = itertools.chain(module.parameters(), module.buffers(), others)
    return next((each.device for each in tensors), torch.device("cpu"))


def named_tensors(
    module: nn.Module, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors of a call by the names that the model's forward gives them.

    Raises:
        BatchError: the model's forward does not take these arguments, or there are no tokens among them.
    """
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise BatchError(f"{type(module).__name__}.forward: {error}") from None
    flat: dict[str, Any] = {}
    for name, value in bound.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    named = {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}
    wanted = [name for name in TOKEN_INPUTS if name in signature.parameters]
    if wanted and not any(name in named for name in wanted):
        raise BatchError(
            f"{type(module).__name__}.forward needs {' or '.join(wanted)}, got {', '.join(named) or 'no tensor'}"
        )
    return named


def token_input(named: Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """Name and tensor of the input that holds the tokens."""
    for name in (*TOKEN_INPUTS, *named):
        if name in named and named[name].dim() >= 1:
            return name, named[name]
    raise BatchError("no tensor among the inputs; pass input_ids or inputs_embeds")


def length_of(tokens: torch.Tensor) -> int:
    """Token length of ``[T]``, ``[B, T]`` or ``[B, T, hidden]``."""
    return tokens.shape[1] if tokens.dim() > 1 else tokens.shape[0]


def check_inputs(named: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Check what can be told without the model.

    Raises:
        BatchError: no tokens, or inputs of different lengths.
        UnsupportedModelError: inputs that are not on the model's device.
    """
    name, tokens = token_input(named)
    if tokens.numel() == 0:
        raise BatchError(f"{name} has shape {list(tokens.shape)}; a batch needs at least 1 token")
    elsewhere = [f"{key} on {each.device}" for key, each in named.items() if each.device != device]
    if elsewhere and device.type != "meta":
        raise UnsupportedModelError(f"the model is on {device}, but {', '.join(elsewhere)}; move them to {device}")
    length = length_of(tokens)
    positions, mask = named.get("position_ids"), named.get("attention_mask")
    if positions is not None and tokens.dim() > 1 and positions.shape[-1] != length:
        raise BatchError(
            f"position_ids have {positions.shape[-1]} positions, {name} has {length} tokens; pass one each"
        )
    if mask is not None and mask.dim() == 2 and tokens.dim() > 1 and mask.shape != tokens.shape[:2]:
        raise BatchError(f"attention_mask has shape {list(mask.shape)}, {name} has {list(tokens.shape[:2])}")


def request_lengths_of(named: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Requests of the batch: as ``pack`` packed them, or as position ids pack them into one row, else one per row.

    Raises:
        BatchError: position ids that neither count up nor restart, or tensors of different packed batches.
    """
    marks = {name: lengths for name, each in named.items() if (lengths := packed_lengths(each)) is not None}
    if len(set(marks.values())) > 1:
        told = ", ".join(f"{name} of {list(lengths)} tokens" for name, lengths in marks.items())
        raise BatchError(f"the inputs come from batches of different requests: {told}; pass those of one batch")
    if marks:
        return next(iter(marks.values()))
    positions = named.get("position_ids")
    packs = "attention_mask" not in named
    if packs and positions is not None and positions.dim() == 2 and positions.shape[0] == 1:
        return request_lengths(positions)
    return (length_of(token_input(named)[1]),)


def positions_count(named: Mapping[str, torch.Tensor]) -> bool:
    """Whether ``position_ids``, if there are any, are known to count the tokens of each request.

    Those from ``pack`` do; those of one row without a mask were looked at by :func:`request_lengths_of`.
    """
    positions = named.get("position_ids")
    if positions is None or packed_lengths(positions) is not None:
        return True
    marked = any(packed_lengths(each) is not None for each in named.values())
    return not marked and "attention_mask" not in named and positions.dim() == 2 and positions.shape[0] == 1


def from_pack(values: Iterable[Any]) -> bool:
    """Whether ``pack`` made the batch, which promises that its requests are kept apart."""
    return any(isinstance(each, torch.Tensor) and packed_lengths(each) is not None for each in values)


def forward_options(
    module: nn.Module, kwargs: Mapping[str, Any], args: Sequence[Any] = (), gradients: bool = False
) -> dict[str, Any]:
    """The keyword arguments of a forward; for a batch from ``pack``, or with ``gradients``, as it can be run.

    ``use_cache=False`` where it does not say: nothing could be decoded from a cache of several requests, and none is
    filled in training. And no ``position_ids`` of ``pack`` that the forward does not take.
    """
    packed = from_pack([*args, *kwargs.values()])
    if not packed and not gradients:
        return dict(kwargs)
    parameters = inspect.signature(module.forward).parameters
    passes_on = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    configured = hasattr(getattr(module, "config", None), "use_cache")
    takes_cache = "use_cache" in parameters or (passes_on and configured)
    if packed and "position_ids" not in parameters and not passes_on:
        kwargs = without_packed_positions(module, kwargs)
    return {"use_cache": False, **kwargs} if takes_cache else dict(kwargs)


def install_output_hooks(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Let transformers install the hooks that record hidden states, attentions or routers, where they are asked for.

    It does so at the first forward that asks, under a lock that Dynamo cannot trace.
    """
    config = getattr(module, "config", None)
    names = ("output_hidden_states", "output_attentions", "output_router_logits")
    if hasattr(config, "model_type") and any(kwargs.get(name, getattr(config, name, False)) for name in names):
        from transformers.utils.output_capturing import maybe_install_capturing_hooks

        maybe_install_capturing_hooks(module)


def without_packed_positions(module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without the positions that ``pack`` wrote, where the model's forward can count itself."""
    positions = kwargs.get("position_ids")
    parameter = inspect.signature(module.forward).parameters.get("position_ids")
    needed = parameter is not None and parameter.default is parameter.empty
    if needed or not from_pack([positions]):
        return dict(kwargs)
    return {name: each for name, each in kwargs.items() if name != "position_ids"}


def with_spare_row(kwargs: Mapping[str, Any], tokens: str, past: int) -> dict[str, Any]:
    """The arguments for a forward over all tokens, of which ``past`` are earlier ones, and over two rows at least.

    A size of 1 would be compiled in; the second row is never computed, and nothing sees it.
    """
    found = dict(kwargs)
    keep = found.get("logits_to_keep")
    if isinstance(keep, torch.Tensor):
        found["logits_to_keep"] = torch.where(keep < 0, keep, keep + past)
    if length_of(found[tokens]) == 1:
        for name, each in kwargs.items():
            if isinstance(each, torch.Tensor) and each.dim() > 1 and each.shape[1] == 1:
                found[name] = torch.cat([each, each.new_zeros(each.shape)], dim=1)
        if not isinstance(keep, torch.Tensor):
            found.pop("logits_to_keep", None)
    return found


def with_cache(result: Any, cache: Any) -> Any:
    """A model's outputs with the cache in the place where transformers puts it."""
    if isinstance(result, tuple):
        return (*result[:1], cache, *result[1:])
    result["past_key_values"] = cache
    return result


def requests_alone(module: nn.Module, kwargs: Mapping[str, Any], lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The arguments with which the model runs each request of a packed row alone."""
    kwargs = without_packed_positions(module, forward_options(module, kwargs))
    tokens, end = sum(lengths), 0
    for length in lengths:
        start, end = end, end + length
        cut = {}
        for name, value in kwargs.items():
            cut[name] = value
            for dim in token_dims_of(value, tokens, name) if isinstance(value, torch.Tensor) else ():
                cut[name] = cut[name].narrow(dim, start, length)
        yield cut


def mark_token_dims(value: Any, length: int, name: str = "") -> Any:
    """An alias of a tensor whose token dims are marked dynamic; the caller's tensor is not touched.

    A part of a larger tensor is copied: how far apart its rows are would be compiled in.
    """
    if not isinstance(value, torch.Tensor) or length == 0:
        return value
    alias = (value if value.requires_grad and torch.is_grad_enabled() else value.detach()).contiguous()
    alias = alias.view(alias.shape)
    for dim in token_dims_of(value, length, name):
        torch._dynamo.mark_dynamic(alias, dim)
    if name == "logits_to_keep" and alias.dim() == 1 and alias.shape[0] > 1:
        torch._dynamo.mark_dynamic(alias, 0)
    return alias


def token_dims_of(value: torch.Tensor, length: int, name: str = "") -> list[int]:
    """Dims of an input that are the tokens."""
    first = 0 if value.dim() == 1 else value.dim() - 1 if name == "position_ids" else 1
    dims = [dim for dim in range(first, value.dim()) if value.shape[dim] == length]
    return dims[:1] if value.dim() == 3 and name != "attention_mask" else dims
