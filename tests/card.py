"""A GPU that is not there: Inductor makes code as for an H100, and Triton's interpreter runs it on tensors of a CPU.

The graphs are those for a GPU, and so is the Triton code, FlexAttention's included. Not seen are races, shared memory,
registers and times. ``python -m tests.card`` is a rank with such a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from sp_compile.host_part import PLANS
from tests.ranks import LIMIT, ONE_THREAD, ROOT, RankPool, serve

INTERPRETED = {"TRITON_INTERPRET": "1"}  # which Triton reads when it is imported
CARD = torch.device("cuda:0")
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    max_threads_per_block=1024, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    gcnArchName="", shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20,
)  # fmt: skip
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
"""
Compiler = Callable[..., Any]


def absent() -> str | None:
    """Why there can be no such GPU."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed; make installs it"


class CardPool(RankPool):
    """``sp`` ranks of one gloo group, each with a GPU of its own that is interpreted."""

    def _start(self) -> list[int]:
        started = []
        for rank in range(self.sp):
            of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.sp, "LOCAL_WORLD_SIZE": self.sp}
            own = {key: str(each) for key, each in of_rank.items()}
            environment = {**os.environ, **ONE_THREAD, **INTERPRETED, **own}
            command = [sys.executable, "-m", "tests.card", self._folder.name]
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment))
        return [each.pid for each in started]


def pretend() -> None:
    """From here on programs of this process are for the GPU that is not there."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import compile_fx, scheduler
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from triton.backends.compiler import GPUTarget
    from triton.runtime.interpreter import InterpreterBuilder

    from sp_compile.builder import Builder
    from sp_compile.program import Program

    _guard()
    Program.device_kind = lambda self, node: "cuda"  # type: ignore[method-assign]
    Builder.compiles_for_gpu = True  # type: ignore[assignment,method-assign]
    compile_fx.compile_fx = _with_inner(compile_fx.compile_fx, _for_card(compile_fx.compile_fx_inner))
    add = InterpreterBuilder.create_atomic_rmw
    InterpreterBuilder.create_atomic_rmw = lambda self, op, at, value, mask, *more: add(
        self, op, at, value, _broadcast(mask, at), *more
    )
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda *_: 0
        )
    )
    CudaInterface.is_bf16_supported = staticmethod(lambda **_: True)  # type: ignore[method-assign]
    scheduler.has_triton = lambda *_: True
    torch.utils._triton.triton_hash_with_backend = lambda: "interpreted"
    triton_helpers.libdevice = _Elementwise()
    triton_heuristics.cached_autotune = _largest(triton_heuristics.cached_autotune)
    own: dict[str, Any] = {  # each a function of its own, by which Dynamo knows them
        "get_device_properties": lambda *_: H100, "_get_device_properties": lambda *_: H100,
        "get_device_capability": lambda *_: (9, 0), "current_device": lambda: 0, "device_count": lambda: 1,
        "_exchange_device": lambda _: 0, "_maybe_exchange_device": lambda _: 0, "synchronize": lambda *_: None,
        "set_device": lambda _: None, "_lazy_init": lambda: None,
    }  # fmt: skip
    for name, each in own.items():
        setattr(torch.cuda, name, each)
    torch._C._cuda_getCurrentRawStream = lambda _: 0  # type: ignore[attr-defined]
    allocate: Any = torch._C._dynamo.guards
    allocate._empty_strided_cuda = allocate._empty_strided_cpu
    write = PyCodeCache.write
    PyCodeCache.write = lambda source, extra="": write(_on_cpu(source), extra)  # type: ignore[method-assign]


def _guard() -> None:
    """What torch's build for CPUs has no part of: how to change to a CUDA device, for tensors without data."""
    base = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{base / 'include'}", f"-L{base / 'lib'}", "-lc10"]
        subprocess.run(["g++", str(source), "-o", str(library), *options], check=True)
        ctypes.CDLL(str(library))


def _with_inner(compile_fx: Compiler, inner: Compiler) -> Compiler:
    """Graphs are traced and differentiated for a CPU, where torch can, and only compiled for the GPU."""
    return lambda gm, inputs, **options: compile_fx(gm, inputs, inner_compile=inner, **options)


def _for_card(compile_inner: Compiler) -> Compiler:
    from torch._inductor import config
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    def compiled(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        moved = [_moved(each) for each in inputs]
        mode = next(each.fake_mode for each in moved if isinstance(each, FakeTensor))
        for node in gm.graph.nodes:
            node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _device)
        _send_plans(gm.graph)
        gm.recompile()
        functions = [each for each in gm.modules() if isinstance(each, fx.GraphModule) and each is not gm]
        for node in (node for each in functions for node in each.graph.nodes):  # of scores and masks
            node.meta["val"] = fx.node.map_aggregate(node.meta.get("val"), _moved)
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*moved)
        with config.patch(force_disable_caches=True, compile_threads=1):
            return compile_inner(gm, moved, **options)

    return compiled


def _send_plans(graph: fx.Graph) -> None:
    """Copy plans to the GPU, for which copies from a CPU to itself stood that are not in the graph."""
    for node in [each for each in graph.nodes if each.target in PLANS]:
        users = [each for each in node.users if each.target not in PLANS]
        if users:
            with graph.inserting_after(node):
                sent = graph.call_function(torch.ops.prims.device_put.default, (node, CARD))
            for each in users:
                each.replace_input_with(node, sent)


def _largest(choose: Compiler) -> Compiler:
    """Blocks as large as may be, where times would choose: each costs the interpreter about as much."""
    return lambda size_hints, configs, *more, **options: choose(
        size_hints, [max(configs, key=lambda each: each.kwargs.get("XBLOCK", 0))], *more, **options
    )


def _broadcast(mask: Any, at: Any) -> Any:
    """A mask for all addresses, which the interpreter does not fill up for atomic ops."""
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(np.broadcast_to(mask.data, at.data.shape).copy(), mask.dtype)


def _device(value: Any) -> Any:
    return CARD if isinstance(value, torch.device) else value


def _moved(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CARD)


def _on_cpu(source: str) -> str:
    """Generated code that allocates on the CPU."""
    return source.replace("device(type='cuda', index=0)", "device(type='cpu')").replace(
        "triton_helpers.set_driver_to_gpu()", ""
    )


class _Elementwise:
    """CUDA's functions of elements, which the interpreter has none of, by those of torch of the same name."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        def run(*values: Any) -> Any:
            like = next(each for each in values if isinstance(each, tl.tensor))
            arrays = [np.asarray(each.handle.data if isinstance(each, tl.tensor) else each) for each in values]
            found = getattr(torch, name)(*(torch.from_numpy(np.atleast_1d(each)) for each in arrays)).numpy()
            dtype = tl.int1 if found.dtype == np.bool_ else like.dtype
            shaped = found.reshape(np.broadcast_shapes(*(each.shape for each in arrays)))
            return tl.tensor(TensorHandle(shaped, dtype), like.type.with_element_ty(dtype) if shaped.ndim else dtype)

        return run


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(f"{sys.argv[1]}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=LIMIT)
    pretend()
    serve(sys.argv[1])


if __name__ == "__main__":
    main()
