"""The public calls: parallelize a model, explain what that does, verify that it is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sp_compile import fingerprint
from sp_compile import mesh as meshes
from sp_compile.config import CompileConfig, compile_config
from sp_compile.dynamo.shards import local_value
from sp_compile.emulation import EmulatedModule, Emulation
from sp_compile.errors import CacheError, ConfigError, MeshError, UnsupportedModelError
from sp_compile.inputs import device_of, requests_alone
from sp_compile.pipeline import check_complete
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
        model: an unmodified decoder, in eval mode or to be trained, with the same weights on every rank.
        sp: ranks that share one batch; by default all of ``mesh`` or of the world.
        mesh: a ``DeviceMesh``, 1-D, or 2-D as (nodes, ranks of a node). Without it the world group is used, or split
            into groups of ``sp`` adjacent ranks.
        config: a YAML file, a mapping or a :class:`~sp_compile.config.CompileConfig`.
        **overrides: fields of ``CompileConfig``, such as ``scheme="contiguous"``, ``outputs="sharded"``,
            ``codegen="eager"`` or ``strict=True``.

    Raises:
        MeshError: ``sp`` does not fit the ranks there are, or their backend the model's device, or tensor parallelism
            has the same ranks.
        ConfigError: an unknown option, pass or strategy.
        PipelineError: the pipeline's order breaks an invariant, or it ends before ranks could run the graph.
        UnsupportedModelError: the model is already parallel, mixes devices, or is sharded by ``fully_shard`` already.
        RankMismatchError: ranks disagree on the model or the configuration.
    """
    group = meshes.resolve(sp, mesh)
    with fingerprint.agreement(group) as fields:
        chosen = compile_config(config, **overrides)
        _check_model(model)
        meshes.check_device(group, device_of(model))
        _check_shards(model, group)
        parallel = ParallelModule(model, group, chosen)
        check_complete(parallel.builder.schedule.passes)
        meshes.check_nodes(group, chosen.ranks_per_node)
        fields.update(_model_fields(model, chosen))
    parallel.group = meshes.with_nodes(group, chosen.ranks_per_node)
    if chosen.measure_rates:
        parallel.builder.measure_rates()
    return parallel


def explain(
    model: nn.Module,
    batch: Mapping[str, Any],
    sp: int,
    config: str | Path | Mapping[str, Any] | CompileConfig | None = None,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> Report:
    """Run the pipeline for ``sp`` ranks in one process, without ranks and without running the model.

    Args:
        model: the model; it may live on the meta device. In training mode, what is explained is a step of training.
        batch: the inputs as keyword arguments, such as a packed batch.
        sp: number of ranks to pretend.
        config, **overrides: as for :func:`parallelize`.
        device: the kind of device that the ranks would have, for which strategies and kernels are chosen, ``cuda`` also
            where there is none; the model's by default, with the rates of a GPU for the meta device.

    Raises:
        The errors that :func:`parallelize` and the first forward would raise.
    """
    _check_model(model)
    chosen = compile_config(config, **overrides)
    parallel = ParallelModule(model, meshes.pretend(sp, chosen.ranks_per_node), chosen)
    if device is not None:
        parallel.builder.pretend_device(torch.device(device))
    return parallel.explain(batch)


def emulate(
    model: nn.Module,
    batch: Mapping[str, Any],
    sp: int,
    config: str | Path | Mapping[str, Any] | CompileConfig | None = None,
    store: str = "device",
    **overrides: Any,
) -> Emulation:
    """Run a batch on ``sp`` ranks that all are in this process, so that each can be measured on one device.

    The ranks run together first, taking turns at every collective, which brings what it would bring between devices;
    all of them then hold their activations at the same time. After that any one can run alone.

    Args:
        model: an unmodified decoder in eval mode.
        batch: the inputs as keyword arguments, such as a packed batch.
        sp: number of ranks.
        config, **overrides: as for :func:`parallelize`.
        store: where what the collectives bring is kept meanwhile: on the ``device``, or on the ``host``.

    Raises:
        MeshError: ``sp`` is no number of ranks.
        CacheError: the batch has a cache.
        UnsupportedModelError: the model is in training mode, or its weights are sharded.
        ConfigError: an option that needs links or gradients, or another ``store``.
        SPCompileError: others that :func:`parallelize` and the first forward would raise.
    """
    if not isinstance(sp, int) or sp < 1:
        raise MeshError(f"sp={sp!r} is not a number of ranks; pass sp >= 1")
    if batch.get("past_key_values") is not None:
        raise CacheError("emulate runs a batch without a cache; pass no past_key_values")
    _check_model(model)
    if model.training:
        raise UnsupportedModelError("emulate runs forwards of inference; call model.eval() first")
    if any(isinstance(each, DTensor) for each in model.parameters()):
        raise UnsupportedModelError(
            "emulate has one process, and the weights are DTensors; pass a model with whole ones"
        )
    chosen = compile_config(config, **overrides)
    if chosen.measure_rates:
        raise ConfigError("measure_rates=True, but emulated ranks have no links; pass link_rate and compute_rate")
    if chosen.gradients == "always":
        raise ConfigError('gradients="always", but emulate runs forwards alone; pass gradients="training"')
    if store not in ("device", "host"):
        raise ConfigError(f'store={store!r} is no place; pass store="device" or store="host"')
    emulated = EmulatedModule(model, meshes.pretend(sp, chosen.ranks_per_node), chosen, store)
    check_complete(emulated.builder.schedule.passes)
    return Emulation(emulated, batch)


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


def verify(model: nn.Module, batch: Mapping[str, Any], **overrides: Any) -> Verification:
    """Compare the parallel model with the unsharded one on this batch, output by output.

    Args:
        model: what :func:`parallelize` returned; a plain model is parallelized over the ranks there are, or one.
        batch: the inputs as keyword arguments.
        **overrides: for a plain model, fields of ``CompileConfig``.

    An output is right when its largest absolute difference is within the dtype's tolerance times the output's largest
    magnitude (1e-5 for fp32). Every rank runs the unsharded model: on the same batch or, where requests were isolated
    that it would mix, on each request alone, whose outputs are then put together along the token dim.

    Raises:
        UnsupportedModelError: ``model`` leaves its outputs sharded.
    """
    if not isinstance(model, ParallelModule):
        model = parallelize(model, **overrides)
    if model.compile_config.outputs != "full":
        raise UnsupportedModelError('verify compares whole outputs; parallelize with outputs="full"')
    with torch.no_grad():
        found = _tensors(model(**batch))
        expected = _alone(model, batch, found) if model.isolated else _tensors(model.module(**model.options(batch)))
    names = [*expected, *(name for name in found if name not in expected)]
    return Verification([_check(name, found.get(name), expected.get(name)) for name in names])


def _alone(model: ParallelModule, batch: Mapping[str, Any], found: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The outputs of each request alone, put together as those that were found."""
    assert model.layout is not None, "there was a forward"
    lengths = model.layout.lengths
    parts = [_tensors(model.module(**each)) for each in requests_alone(model.module, batch, lengths)]
    whole = {}
    for name in parts[0]:
        pieces = [each[name] for each in parts]
        dims = [dim for dim in range(pieces[0].dim()) if [each.shape[dim] for each in pieces] == [*lengths]]
        same = name in found and found[name].dim() == pieces[0].dim()
        whole[name] = torch.cat(pieces, dim=dims[0]) if same and len(dims) == 1 else pieces[-1]
    return whole


def _check(name: str, found: torch.Tensor | None, expected: torch.Tensor | None) -> OutputCheck:
    if found is None or expected is None or found.shape != expected.shape:
        return OutputCheck(name, float("inf"), 0.0, False)
    if not expected.numel():
        return OutputCheck(name, 0.0, 0.0, True)
    difference = (found.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    limit = TOLERANCE.get(expected.dtype, 0.0) * max(scale, torch.finfo(torch.float32).tiny)
    return OutputCheck(name, difference, scale, difference <= limit)


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
    fsdp = any(isinstance(each, FSDPModule) for each in model.modules())
    for name, tensor in model.named_parameters():
        if isinstance(tensor, DTensor) and (fsdp or tensor.device_mesh.ndim > 1):
            raise UnsupportedModelError(
                f"{name} is spread over the mesh axes {tensor.device_mesh.mesh_dim_names}: fully_shard goes around "
                "what parallelize returns, and tensor parallelism takes one axis"
            )
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            raise UnsupportedModelError(f"{name} is {tensor.dtype}; supported are {', '.join(map(str, FLOATS))}")


def _check_shards(model: nn.Module, group: meshes.Group) -> None:
    sharing = set(meshes.ranks_of(group))
    for name, tensor in model.named_parameters():
        if not isinstance(tensor, DTensor):
            continue
        both = sharing & set(tensor.device_mesh.mesh.flatten().tolist())
        if len(both) > 1:
            raise MeshError(
                f"{name} is spread over the mesh axes {tensor.device_mesh.mesh_dim_names}, and so would be the tokens, "
                f"over ranks {sorted(both)} of them; make a mesh with an axis for each and pass mesh=mesh['sp']"
            )


def _first(parameter: torch.Tensor) -> list[float]:
    """A few elements, to tell weights apart that were drawn from other seeds."""
    return [] if parameter.is_meta else local_value(parameter.detach()).reshape(-1)[:4].float().tolist()


def _model_fields(model: nn.Module, config: CompileConfig) -> dict[str, str]:
    shapes = ";".join(f"{name}{list(each.shape)}{each.dtype}" for name, each in model.named_parameters())
    settings: Any = getattr(model, "config", None)
    return {
        "the model": type(model).__name__,
        "the model's configuration": fingerprint.digest(
            settings.to_json_string() if hasattr(settings, "to_json_string") else ""
        ),
        "the parameters": fingerprint.digest(repr([_first(each) for each in model.parameters()])),
        "the parameters' shapes": fingerprint.digest(shapes),
        "the pipeline": fingerprint.digest(repr(config.pipeline)),
        **{f"the option {name}": str(value) for name, value in asdict(config).items() if name != "pipeline"},
    }
