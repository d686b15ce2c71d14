"""Ranks that share a GPU: their collectives go through the host's memory, by gloo.

NCCL refuses two ranks on one GPU, and gloo takes CUDA tensors for few of the collectives that graphs call. Here a
collective is done when its call returns.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sp_compile import launch
from tests.ranks import ONE_THREAD, ROOT, RankPool, serve

BACKEND = "staged_gloo"


class Staged(dist.ProcessGroup):
    """A process group whose collectives copy tensors to the host, run there, and copy results back."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        # which also keeps the group's name
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self._gloo)

    def getBackendName(self) -> str:
        return BACKEND

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> Any:
        hosts = [[_on_host(each) for each in parts] for parts in outputs]
        work = _done(self._gloo.allgather(hosts, [_on_host(each) for each in inputs]))
        for parts, found in zip(outputs, hosts, strict=True):
            _copy_back(parts, found)
        return work

    def all_gather_single(self, output: torch.Tensor, source: torch.Tensor, opts: Any = None) -> Any:
        return self.allgather([[*_by_rank(output, self.size())]], [source])

    def all_gather_single_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        return [self.all_gather_single(*each) for each in zip(outputs, inputs, strict=True)][-1]

    def allreduce(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        hosts = [_on_host(each) for each in tensors]
        for each in hosts:
            work = _done(self._gloo.allreduce([each], opts))
        _copy_back(tensors, hosts)
        return work

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        return self.allreduce(tensors, _reducing(opts))

    def reduce_scatter_single(self, output: torch.Tensor, source: torch.Tensor, opts: Any) -> Any:
        whole = _on_host(source)
        work = self.allreduce([whole], _reducing(opts))
        _copy_back([output], [_by_rank(whole, self.size())[self.rank()]])
        return work

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any
    ) -> Any:
        return [self.reduce_scatter_single(*each, opts) for each in zip(outputs, inputs, strict=True)][-1]

    def all_to_all_single(
        self, output: torch.Tensor, source: torch.Tensor, come: list[int], go: list[int], opts: Any = None
    ) -> Any:
        host = _on_host(output)
        work = _done(self._gloo.alltoall_base(host, _on_host(source), come, go))
        _copy_back([output], [host])
        return work

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        hosts = [_on_host(each) for each in tensors]
        work = _done(self._gloo.broadcast(hosts, opts))
        _copy_back(tensors, hosts)
        return work

    def barrier(self, opts: Any = None) -> Any:
        return _done(self._gloo.barrier())

    # what torch 2.11 and 2.12 call them
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, on a CPU too."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _copy_back(tensors: Sequence[torch.Tensor], hosts: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for tensor, host in zip(tensors, hosts, strict=True):
            tensor.copy_(host)


def _by_rank(tensor: torch.Tensor, size: int) -> Sequence[torch.Tensor]:
    """Equal parts along dim 0, empty ones too."""
    return tensor.unflatten(0, (size, tensor.shape[0] // size)).unbind()


def _reducing(opts: Any) -> Any:
    found = dist.AllreduceOptions()
    found.reduceOp = opts.reduceOp
    return found


def _done(work: Any) -> Any:
    work.wait()
    return work


def register() -> None:
    """Let ``init_process_group`` know the backend."""
    if not hasattr(dist.Backend, BACKEND.upper()):  # a script's module is imported twice
        dist.Backend.register_backend(BACKEND, Staged, devices=["cpu", "cuda"])


class StagedPool(RankPool):
    """Ranks of one group of this kind."""

    def _start(self) -> list[int]:
        command = [sys.executable, "-m", "tests.staged", str(self.sp), self._folder.name]
        return [subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ONE_THREAD}).pid]


register()

if __name__ == "__main__":
    launch(serve, int(sys.argv[1]), sys.argv[2], timeout=7200, backend=BACKEND)
