"""Ranks and process groups: which group of ranks shares one batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from sp_compile.errors import MeshError


@dataclass(frozen=True)
class Group:
    """The ranks that share one batch: how many, which of them this is, and the group of their collectives."""

    size: int
    rank: int
    name: str
    process_group: Any = None


def single() -> Group:
    """One rank, no process group."""
    return Group(1, 0, "")


def pretend(sp: int) -> Group:
    """``sp`` ranks that do not exist, for looking at graphs in one process."""
    return Group(sp, 0, "pretend")


def resolve(sp: int | None, mesh: Any = None) -> Group:
    """The group of this rank.

    Args:
        sp: ranks per batch; by default all of the mesh or of the world.
        mesh: a 1-D ``DeviceMesh``; its ranks share a batch.

    Raises:
        MeshError: no process group, or ``sp`` does not fit the ranks there are.
    """
    if sp is not None and (not isinstance(sp, int) or sp < 1):
        raise MeshError(f"sp={sp!r} is not a number of ranks; pass sp >= 1")
    if mesh is not None:
        return _of_mesh(sp, mesh)
    if sp == 1:
        return single()
    _initialise()
    if not dist.is_initialized():
        if sp is None:
            return single()
        raise MeshError(
            f"sp={sp} needs {sp} ranks, and there is no process group; start them with torchrun --nproc-per-node {sp} "
            f"YOUR_SCRIPT.py, or call sp_compile.launch(fn, sp={sp})"
        )
    world = dist.get_world_size()
    sp = world if sp is None else sp
    if sp == 1:
        return single()
    if sp > world or world % sp:
        fitting = [str(each) for each in range(1, world + 1) if world % each == 0]
        raise MeshError(
            f"sp={sp} does not divide the world size {world}; pass sp={' or sp='.join(fitting)}, "
            f"or start {sp} processes"
        )
    return _group_of_world(sp, world)


def _initialise() -> None:
    """Under torchrun: join the world, with NCCL where every local rank has a GPU."""
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        return
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available() and torch.cuda.device_count() >= local_world:
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")


def _of_mesh(sp: int | None, mesh: Any) -> Group:
    if mesh.ndim != 1:
        raise MeshError(
            f"the mesh has {mesh.ndim} axes {mesh.mesh_dim_names}; pass its one axis for sequences, mesh['sp']"
        )
    if sp is not None and sp != mesh.size():
        raise MeshError(f"sp={sp} and a mesh of {mesh.size()} ranks; pass one of them")
    group = mesh.get_group()
    return Group(mesh.size(), mesh.get_local_rank(), group.group_name, group)


def _group_of_world(sp: int, world: int) -> Group:
    if sp == world:
        group = dist.group.WORLD
        assert group is not None
        return Group(sp, dist.get_rank(), group.group_name, group)
    own = _subgroup(dist.group.WORLD, sp)
    return Group(sp, dist.get_rank(own), own.group_name, own)


@lru_cache(maxsize=16)
def _subgroup(world: Any, sp: int) -> Any:
    """This rank's group of ``sp`` adjacent ranks; made once per world, since groups are never given back."""
    own, _ = dist.new_subgroups(group_size=sp)
    return own
