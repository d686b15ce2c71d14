"""The ranks that share a batch, as accelerate and transformers see them: as one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from sp_compile.errors import ConfigError, MeshError, RankMismatchError, UnsupportedModelError
from sp_compile.mesh import Group

OWN_LOOP = (
    "train in a loop of your own, with DistributedDataParallel(model, process_group=mesh['dp'].get_group()) or "
    "fully_shard(model, mesh=mesh['dp', 'sp']._flatten()), and a DistributedSampler over mesh['dp']"
)
ONE_PROCESS = (
    "accelerate takes each rank for a process with batches of its own; make the Trainer by sp_compile.Trainer(...) in "
    "place of transformers.Trainer(...), and an Accelerator by sp_compile.as_one_process(Accelerator(), model)"
)


def as_one_process(accelerator: Any, model: Any) -> Any:
    """Let accelerate take the ranks that share every batch for one process.

    Every rank then gets the batches that a single process would get. The model is not wrapped, since its gradients are
    complete; nothing is gathered twice. Rank 0 is the main process, which writes checkpoints with the names of the
    model that was parallelized, and ``wait_for_everyone`` waits for all ranks. ``unwrap_model`` gives that model.
    A loader that shuffles needs the same seed on every rank. Each rank saves its own random state, so that a run which
    goes on with more ranks needs a new seed.

    Args:
        accelerator: an ``accelerate.Accelerator`` that has prepared nothing yet.
        model: what :func:`~sp_compile.parallelize` returned, spread over all ranks there are.

    Returns:
        The accelerator.

    Raises:
        UnsupportedModelError: the model is not from ``parallelize``.
        MeshError: it is spread over a part of the ranks only.
        ConfigError: the accelerator has prepared something, or has ways of its own to distribute or compile a model.
    """
    check_spread(model)
    return tell(accelerator)


def check_spread(model: Any) -> None:
    """Check that all ranks share the batches of a model.

    Raises:
        UnsupportedModelError: the model is not from ``parallelize``.
        MeshError: ranks have batches of their own.
    """
    from sp_compile.runtime import ParallelModule

    if not isinstance(model, ParallelModule):
        raise UnsupportedModelError(f"expected sp_compile.parallelize(model), got {type(model).__name__}")
    size, world = model.group.size, _world_size()
    if size != world:
        raise MeshError(
            f"the model is spread over {size} of {world} ranks, and accelerate cannot tell groups of ranks that have "
            f"batches of their own; parallelize over all {world} ranks, or {OWN_LOOP}"
        )


def tell(accelerator: Any) -> Any:
    """Tell an accelerator that all ranks are one process; see :func:`as_one_process`."""
    from accelerate import DistributedType, PartialState

    _check_new(accelerator)
    rank = dist.get_rank() if dist.is_initialized() else 0
    shared: Any = PartialState()
    for state in (shared, accelerator.state):
        state.distributed_type, state.num_processes = DistributedType.NO, 1
        state.process_index, state.local_process_index = rank, int(os.environ.get("LOCAL_RANK", rank))
    if dist.is_initialized():
        shared.wait_for_everyone = dist.barrier
    accelerator.dataloader_config.dispatch_batches = False  # else process 0 would read for all, and send nothing
    unwrap = accelerator.unwrap_model
    accelerator.unwrap_model = lambda model, *args, **kwargs: unwrap(_plain(model), *args, **kwargs)
    accelerator.register_save_state_pre_hook(_save_plain)
    accelerator.register_load_state_pre_hook(_load_plain)
    return accelerator


def _plain(model: Any) -> Any:
    """The model that was parallelized; any other as it is."""
    from sp_compile.runtime import ParallelModule

    return model.module if isinstance(model, ParallelModule) else model


def _save_plain(models: list[Any], weights: list[Any], folder: str) -> None:
    weights[:] = [_plain(each).state_dict() for each in models]


def _load_plain(models: list[Any], folder: str) -> None:
    models[:] = [_plain(each) for each in models]


def _check_new(accelerator: Any) -> None:
    if accelerator._models or accelerator._optimizers or accelerator._dataloaders:
        raise ConfigError("the Accelerator has prepared something already; call as_one_process before prepare")
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"):
        raise ConfigError(f"accelerate distributes by {kind}, which as_one_process cannot take over; {OWN_LOOP}")
    if accelerator.parallelism_config is not None and accelerator.parallelism_config.total_size > 1:
        raise ConfigError(f"leave out parallelism_config: all ranks share each batch; for other layouts {OWN_LOOP}")
    if accelerator.state.dynamo_plugin.backend.value != "NO":
        raise ConfigError("leave out torch_compile: parallelize compiles the model; choose by its option codegen")


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def advice(group: Group) -> str:
    """What to change where accelerate is in use and does not know that ranks share a batch; empty if it does."""
    module = sys.modules.get("accelerate.state")
    state: Mapping[str, Any] = {} if module is None else module.PartialState._shared_state
    if not state or group.process_group is None:
        return ""
    if state.get("num_processes") == 1 and state.get("process_index") == dist.get_rank():
        return ""
    return ONE_PROCESS if group.size == _world_size() else f"accelerate gives each rank batches of its own; {OWN_LOOP}"


@contextmanager
def advising(group: Group) -> Iterator[None]:
    """Add to the error of ranks with different batches what to change, where accelerate is in use.

    Raises:
        RankMismatchError: the block raised it.
    """
    try:
        yield
    except RankMismatchError as error:
        told = advice(group)
        if not told:
            raise
        raise RankMismatchError(f"{error}; {told}") from None


def check_caller(kwargs: Mapping[str, Any], group: Group) -> None:
    """Check that a Trainer that calls the model knows of the ranks; else each of them might write its checkpoints.

    Raises:
        ConfigError: it does not.
    """
    if "num_items_in_batch" in kwargs and "transformers.trainer" in sys.modules and advice(group):
        raise ConfigError(advice(group))
