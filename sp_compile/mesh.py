"""Ranks and process groups: which group of ranks shares one batch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sp_compile.errors import MeshError


class Nodes(NamedTuple):
    """How the ranks that share a batch lie on nodes, those of one node next to each other.

    Attributes:
        size: ranks of a node.
        inner, outer: names of the group of a rank's node, and of the group of its peers, one on each node.
    """

    size: int
    inner: str
    outer: str


@dataclass(frozen=True)
class Group:
    """The ranks that share one batch: how many, which of them this is, and the group of their collectives.

    ``nodes`` are theirs, where they are known.
    """

    size: int
    rank: int
    name: str
    process_group: Any = None
    nodes: Nodes | None = None


def single() -> Group:
    """One rank, no process group."""
    return Group(1, 0, "")


def pretend(sp: int, ranks_per_node: int | None = None) -> Group:
    """``sp`` ranks that do not exist, for looking at graphs in one process."""
    group = Group(sp, 0, "pretend")
    check_nodes(group, ranks_per_node)
    if ranks_per_node is None:
        return group
    return replace(group, nodes=Nodes(ranks_per_node, "pretend_node", "pretend_peers"))


def resolve(sp: int | None, mesh: Any = None) -> Group:
    """The group of this rank.

    Args:
        sp: ranks per batch; by default all of the mesh or of the world.
        mesh: a ``DeviceMesh`` whose ranks share a batch: 1-D, or 2-D as (nodes, ranks of a node).

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


def ranks_of(group: Group) -> list[int]:
    """The ranks in the world that share a batch; none where there are no processes for them."""
    return [] if group.process_group is None else dist.get_process_group_ranks(group.process_group)


def backend_of(process_group: Any, device: torch.device) -> str:
    """What connects ranks on a kind of device: ``gloo``, ``nccl``, or another's name; empty where nothing does."""
    pairs = (each.partition(":") for each in dist.get_backend_config(process_group).split(","))
    return next((backend for kind, _, backend in pairs if kind == device.type), "")


def check_device(group: Group, device: torch.device) -> None:
    """Check that the group can exchange what lies on a device.

    Raises:
        MeshError: gloo is to exchange tensors on a GPU, in which torch crashes.
    """
    if group.process_group is not None and device.type == "cuda" and dist.get_backend(group.process_group) == "gloo":
        raise MeshError(
            "the model is on a GPU and the ranks are connected by gloo, which cannot exchange what lies there; give "
            'each rank a GPU of its own and connect them by init_process_group("cpu:gloo,cuda:nccl")'
        )


def check_nodes(group: Group, ranks_per_node: int | None) -> None:
    """Check that a group can be cut into nodes of so many adjacent ranks.

    Raises:
        MeshError: it cannot, or its mesh has said otherwise.
    """
    if ranks_per_node is None or (group.nodes is not None and group.nodes.size == ranks_per_node):
        return
    if group.nodes is not None:
        raise MeshError(f"ranks_per_node={ranks_per_node} and a mesh with {group.nodes.size}; pass one of them")
    if group.size % ranks_per_node or not 1 < ranks_per_node < group.size:
        fitting = [str(each) for each in range(2, group.size) if group.size % each == 0]
        what = f"pass {' or '.join(fitting)}, or leave it out" if fitting else "leave it out"
        raise MeshError(f"ranks_per_node={ranks_per_node} makes no nodes of sp={group.size} ranks; {what}")


def with_nodes(group: Group, ranks_per_node: int | None) -> Group:
    """The group with its nodes, as :func:`check_nodes` found them right; called on each of its ranks."""
    if ranks_per_node is None or group.nodes is not None:
        return group
    ranks = tuple(ranks_of(group))
    return replace(group, nodes=_nodes(dist.group.WORLD, ranks, ranks_per_node))


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
    if mesh.ndim > 2:
        raise MeshError(
            f"the mesh has {mesh.ndim} axes {mesh.mesh_dim_names}; pass its one axis for sequences, mesh['sp'], or "
            "two, as (nodes, ranks of a node)"
        )
    if sp is not None and sp != mesh.size():
        raise MeshError(f"sp={sp} and a mesh of {mesh.size()} ranks; pass one of them")
    if mesh.ndim == 1:
        group = mesh.get_group()
        return Group(mesh.size(), mesh.get_local_rank(), group.group_name, group)
    if mesh.mesh_dim_names is None:
        raise MeshError("the mesh has 2 axes without names; make it with mesh_dim_names=('nodes', 'ranks')")
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise MeshError(f"the mesh has the ranks {mesh.mesh.tolist()}; those of a node have to follow each other")
    whole = mesh._flatten()
    group = whole.get_group()
    outer, inner = (mesh.get_group(dim).group_name for dim in range(2))
    nodes = Nodes(mesh.size(1), inner, outer) if min(mesh.shape) > 1 else None
    return Group(whole.size(), whole.get_local_rank(), group.group_name, group, nodes)


@lru_cache(maxsize=16)
def _nodes(world: Any, ranks: tuple[int, ...], ranks_per_node: int) -> Nodes:
    """The nodes of a group of ranks, made by these once per world."""
    node, place = divmod(ranks.index(dist.get_rank()), ranks_per_node)
    inner, outer = ranks[node * ranks_per_node :][:ranks_per_node], ranks[place::ranks_per_node]
    made = [dist.new_group([*each], use_local_synchronization=True) for each in (inner, outer)]
    return Nodes(ranks_per_node, *(each.group_name for each in made))


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
