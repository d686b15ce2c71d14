"""Ranks and groups: which ranks share a batch, and what a number of ranks that does not fit is told."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sp_compile.errors import MeshError
from sp_compile.launch import launch
from sp_compile.mesh import Group, check_device, check_nodes, pretend, resolve, single, with_nodes

WORLD = 4
C10D = torch.ops._c10d_functional


def summed(group: Group) -> tuple[int, int, list[float]]:
    """Size, rank, and who is in the group: by its name, as compiled graphs address it, and by the group itself."""
    by_name, by_group = (torch.nn.functional.one_hot(torch.tensor(dist.get_rank()), WORLD) for _ in range(2))
    by_name = C10D.wait_tensor(C10D.all_reduce(by_name, "sum", group.name))
    dist.all_reduce(by_group, group=group.process_group)
    assert torch.equal(by_name, by_group)
    return group.size, group.rank, by_name.nonzero().flatten().tolist()


def of_nodes(group: Group) -> tuple[int, int, list[list[int]]]:
    """Size, rank, and who is on a rank's node and among its peers."""
    assert group.nodes is not None
    found = []
    for name in (group.nodes.inner, group.nodes.outer):
        who = torch.nn.functional.one_hot(torch.tensor(dist.get_rank()), WORLD)
        found.append(C10D.wait_tensor(C10D.all_reduce(who, "sum", name)).nonzero().flatten().tolist())
    return group.size, group.rank, found


def refusal(*args: object) -> str:
    try:
        resolve(*args)  # type: ignore[arg-type]
    except MeshError as error:
        return str(error)
    return "no error"


def groups_of_four() -> dict[str, object]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    unnamed = init_device_mesh("cpu", (2, 2))
    return {
        "whole": summed(resolve(None)),
        "asked": summed(resolve(WORLD)),
        "halves": summed(resolve(2)),
        "alone": resolve(1),
        "rows of the mesh": summed(resolve(None, mesh["sp"])),
        "columns of the mesh": summed(resolve(2, mesh["dp"])),
        "two axes": of_nodes(resolve(None, mesh)),
        "two unnamed axes": refusal(4, unnamed),
        "nodes of two": of_nodes(with_nodes(resolve(4), 2)),
        "nodes among each other": refusal(None, DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("nodes", "ranks"))),
        "three axes": refusal(None, init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "nodes", "sp"))),
        "another size than the mesh": refusal(2, unnamed),
        "another size": refusal(4, mesh["sp"]),
        "not a divisor": refusal(3),
        "too many": refusal(8),
    }


def one_rank() -> tuple[Group, Group, str, int]:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("sp",))
    return resolve(None), resolve(1), refusal(2), resolve(None, mesh).size


@pytest.fixture(scope="module")
def found() -> list[dict[str, object]]:
    return launch(groups_of_four, WORLD, timeout=300)


def test_all_ranks_share_a_batch_unless_told_otherwise(found: list[dict[str, object]]):
    expected = [(4, rank, [0, 1, 2, 3]) for rank in range(WORLD)]
    assert [each["whole"] for each in found] == expected
    assert [each["asked"] for each in found] == expected


def test_the_world_is_split_into_groups_of_neighbours(found: list[dict[str, object]]):
    assert [each["halves"] for each in found] == [(2, 0, [0, 1]), (2, 1, [0, 1]), (2, 0, [2, 3]), (2, 1, [2, 3])]


def test_one_rank_needs_no_group_even_where_there_is_one(found: list[dict[str, object]]):
    assert [each["alone"] for each in found] == [single()] * WORLD


def test_an_axis_of_a_mesh_is_a_group(found: list[dict[str, object]]):
    rows = [(2, 0, [0, 1]), (2, 1, [0, 1]), (2, 0, [2, 3]), (2, 1, [2, 3])]
    columns = [(2, 0, [0, 2]), (2, 0, [1, 3]), (2, 1, [0, 2]), (2, 1, [1, 3])]
    assert [each["rows of the mesh"] for each in found] == rows
    assert [each["columns of the mesh"] for each in found] == columns


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "three axes",
            "the mesh has 3 axes ('dp', 'nodes', 'sp'); pass its one axis for sequences, mesh['sp'], or two, "
            "as (nodes, ranks of a node)",
        ),
        (
            "nodes among each other",
            "the mesh has the ranks [[0, 2], [1, 3]]; those of a node have to follow each other",
        ),
        ("two unnamed axes", "the mesh has 2 axes without names; make it with mesh_dim_names=('nodes', 'ranks')"),
        ("another size than the mesh", "sp=2 and a mesh of 4 ranks; pass one of them"),
        ("another size", "sp=4 and a mesh of 2 ranks; pass one of them"),
        ("not a divisor", "sp=3 does not divide the world size 4; pass sp=1 or sp=2 or sp=4, or start 3 processes"),
        ("too many", "sp=8 does not divide the world size 4; pass sp=1 or sp=2 or sp=4, or start 8 processes"),
    ],
)
def test_what_does_not_fit_the_ranks_is_refused_on_each(found: list[dict[str, object]], case: str, message: str):
    assert [each[case] for each in found] == [message] * WORLD


def test_a_world_of_one_rank_is_one_rank():
    [(default, asked, two, of_mesh)] = launch(one_rank, 1, timeout=300)
    assert default == asked == single()
    assert two == "sp=2 does not divide the world size 1; pass sp=1, or start 2 processes"
    assert of_mesh == 1


def test_without_a_process_group_there_is_one_rank():
    assert not dist.is_initialized()
    assert resolve(None) == resolve(1) == single() == Group(size=1, rank=0, name="")
    assert not dist.is_initialized()


def test_more_ranks_without_a_process_group_are_told_how_to_start():
    assert refusal(4) == (
        "sp=4 needs 4 ranks, and there is no process group; start them with torchrun --nproc-per-node 4 "
        "YOUR_SCRIPT.py, or call sp_compile.launch(fn, sp=4)"
    )


@pytest.mark.parametrize("sp", [0, -2, "2", 2.0])
def test_what_is_no_number_of_ranks_is_refused(sp: object):
    assert refusal(sp) == f"sp={sp!r} is not a number of ranks; pass sp >= 1"


@pytest.mark.parametrize("case", ["two axes", "nodes of two"])
def test_ranks_lie_on_nodes(found: list[dict[str, object]], case: str):
    for rank, each in enumerate(found):
        node, place = divmod(rank, 2)
        assert each[case] == (4, rank, [[2 * node, 2 * node + 1], [place, place + 2]])


@pytest.mark.parametrize(
    ("sp", "size", "message"),
    [
        (4, 3, "ranks_per_node=3 makes no nodes of sp=4 ranks; pass 2, or leave it out"),
        (12, 12, "ranks_per_node=12 makes no nodes of sp=12 ranks; pass 2 or 3 or 4 or 6, or leave it out"),
        (3, 2, "ranks_per_node=2 makes no nodes of sp=3 ranks; leave it out"),
    ],
)
def test_nodes_that_do_not_fit_are_refused(sp: int, size: int, message: str):
    with pytest.raises(MeshError, match=message):
        pretend(sp, size)


def test_nodes_of_a_mesh_are_not_named_twice():
    group = pretend(8, 4)
    check_nodes(group, 4)
    with pytest.raises(MeshError, match="ranks_per_node=2 and a mesh with 4; pass one of them"):
        check_nodes(group, 2)


def test_pretended_ranks_need_no_processes():
    group = pretend(64)
    assert (group.size, group.rank, group.process_group) == (64, 0, None)


def test_under_torchrun_the_world_is_joined(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in {**places, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}.items():
        monkeypatch.setitem(os.environ, name, str(value))
    try:
        assert resolve(1) == single()
        assert not dist.is_initialized()
        assert resolve(None) == single()
        assert dist.get_backend() == ("nccl" if torch.cuda.is_available() else "gloo")
        assert refusal(2).startswith("sp=2 does not divide the world size 1;")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_gloo_is_not_asked_to_exchange_what_lies_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    group = Group(2, 0, "ranks", object())
    for backend, refused in (("gloo", True), ("nccl", False), ("cpu:gloo,cuda:nccl", False)):
        monkeypatch.setattr(dist, "get_backend", lambda _, backend=backend: backend)
        check_device(group, torch.device("cpu"))
        check_device(single(), torch.device("cuda"))
        if refused:
            with pytest.raises(MeshError, match="connected by gloo"):
                check_device(group, torch.device("cuda"))
        else:
            check_device(group, torch.device("cuda"))
