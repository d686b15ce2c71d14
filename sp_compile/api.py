"""The public calls: parallelize a model, explain what that does, verify that it is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sp_compile import fingerprint
from sp_compile import mesh as meshes
from sp_compile.config import CompileConfig, compile_config
from sp_compile.errors import UnsupportedModelError
from sp_compile.report import Report
from sp_compile.runtime import ParallelModule

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def parallelize(
    model: nn.Module,
    sp: int | None = None,
    *,
    mesh: Any = None,
    config: str | Path | Mapping[str, Any] | CompileConfig | None = None,
    **overrides: Any,
) -> ParallelModule:
    """Spread a model's tokens over ``sp`` ranks; the result is called like the model.

    Args:
        model: an unmodified decoder in eval mode, with the same weights on every rank.
        sp: ranks that share one batch; by default all of ``mesh`` or of the world.
        mesh: a 1-D ``DeviceMesh``. Without it the world group is used, or split into groups of ``sp`` adjacent ranks.
        config: a YAML file, a mapping or a :class:`~sp_compile.config.CompileConfig`.
        **overrides: fields of ``CompileConfig``, such as ``scheme="contiguous"``, ``outputs="sharded"``,
            ``codegen="eager"`` or ``strict=True``.

    Raises:
        MeshError: ``sp`` does not fit the ranks there are.
        ConfigError: an unknown option, pass or strategy.
        UnsupportedModelError: the model is already parallel, or mixes devices.
        RankMismatchError: ranks disagree on the model or the configuration.
    """
    chosen = compile_config(config, **overrides)
    _check_model(model)
    group = meshes.resolve(sp, mesh)
    parallel = ParallelModule(model, group, chosen)
    fingerprint.compare(group, _model_fields(model, chosen))
    return parallel


def explain(
    model: nn.Module,
    batch: Mapping[str, Any],
    sp: int,
    config: str | Path | Mapping[str, Any] | CompileConfig | None = None,
    **overrides: Any,
) -> Report:
    """Run the pipeline for ``sp`` ranks in one process, without ranks and without running the model.

    Args:
        model: the model; it may live on the meta device.
        batch: the inputs as keyword arguments, such as a packed batch.
        sp: number of ranks to pretend.

    Raises:
        The errors that :func:`parallelize` and the first forward would raise.
    """
    _check_model(model)
    return ParallelModule(model, meshes.pretend(sp), compile_config(config, **overrides)).explain(batch)


@dataclass(frozen=True)
class OutputCheck:
    """One output compared with the unsharded model's."""

    name: str
    max_abs_diff: float
    scale: float
    ok: bool


@dataclass(frozen=True)
class Verification:
    """All outputs compared; truthy when every one is right."""

    outputs: list[OutputCheck]

    def __bool__(self) -> bool:
        return all(each.ok for each in self.outputs)


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def verify(model: ParallelModule, batch: Mapping[str, Any]) -> Verification:
    """Compare the parallel model with the unsharded one on this batch, output by output.

    An output is right when its largest absolute difference is within the dtype's tolerance times the output's largest
    magnitude (1e-5 for fp32). Every rank runs the unsharded model.

    Raises:
        UnsupportedModelError: ``model`` does not come from :func:`parallelize`, or leaves its outputs sharded.
    """
    if not isinstance(model, ParallelModule):
        raise UnsupportedModelError(f"verify needs a model from parallelize, not {type(model).__name__}")
    if model.compile_config.outputs != "full":
        raise UnsupportedModelError('verify compares whole outputs; parallelize with outputs="full"')
    with torch.no_grad():
        found, expected = _tensors(model(**batch)), _tensors(model.module(**batch))
    checks = []
    for name, reference in expected.items():
        difference = (found[name].double() - reference.double()).abs().max().item() if reference.numel() else 0.0
        scale = reference.double().abs().max().item() if reference.numel() else 0.0
        limit = TOLERANCE.get(reference.dtype, 0.0) * max(scale, torch.finfo(torch.float32).tiny)
        checks.append(OutputCheck(name, difference, scale, difference <= limit))
    return Verification(checks)


def _tensors(output: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return {prefix or "output": output}
    if isinstance(output, Mapping):
        items: Any = output.items()
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    else:
        return {}
    found: dict[str, torch.Tensor] = {}
    for key, value in items:
        found.update(_tensors(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


def _check_model(model: nn.Module) -> None:
    if isinstance(model, ParallelModule):
        raise UnsupportedModelError("the model is parallel already; pass its .module")
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected an nn.Module, got {type(model).__name__}")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    devices = {tensor.device for _, tensor in tensors}
    if len(devices) > 1:
        examples = ", ".join(next(f"{name} on {each}" for name, t in tensors if t.device == each) for each in devices)
        raise UnsupportedModelError(f"the model lies on several devices ({examples}); move it to one")
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            raise UnsupportedModelError(f"{name} is {tensor.dtype}; supported are {', '.join(map(str, FLOATS))}")


def _model_fields(model: nn.Module, config: CompileConfig) -> dict[str, str]:
    shapes = ";".join(f"{name}{list(each.shape)}{each.dtype}" for name, each in model.named_parameters())
    settings: Any = getattr(model, "config", None)
    return {
        "the model": type(model).__name__,
        "the model's configuration": fingerprint.digest(
            settings.to_json_string() if hasattr(settings, "to_json_string") else ""
        ),
        "the parameters' shapes": fingerprint.digest(shapes),
        "the pipeline": fingerprint.digest(repr(config.pipeline)),
        **{f"the option {name}": str(value) for name, value in asdict(config).items() if name != "pipeline"},
    }
