"""Models that tensor parallelism has cut, on a mesh of sp and tp, for tests to compare with whole ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional as F

import sp_compile
from tests.training import Plain, batch_of, built, plain_step, stepped, told
from tests.zoo.models import randomize

WHOLE = ColwiseParallel(output_layouts=Replicate())
ATTENTION = {f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
PLAN = {
    **ATTENTION,
    **{f"model.layers.*.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
    **{f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")},
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
    "lm_head": WHOLE,
}
PLANS: dict[str, Mapping[str, Any]] = {
    "whole": PLAN,
    "attention only": {**ATTENTION, "model.layers.*.self_attn.o_proj": RowwiseParallel()},
    "norms by tokens": {"model.norm": SequenceParallel()},
    "DTensors inside": {
        **{f"model.layers.*.mlp.{name}_proj": ColwiseParallel(use_local_output=False) for name in ("gate", "up")},
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
    },
}


class Cut(Plain):
    """With biases everywhere, a vocabulary that is odd, a padding token, and norms of what a rank has of the heads."""

    VOCABULARY, PADDING = 131, 100

    def __init__(self, dropped: str = "") -> None:
        super().__init__()
        self.dropped = dropped
        width = self.embed.embedding_dim
        self.embed = nn.Embedding(self.VOCABULARY, width, padding_idx=self.PADDING)
        self.place = nn.Embedding(64, width)
        sizes = [each * width // self.heads for each in (self.heads, self.kv_heads, self.kv_heads)]
        self.q, self.k, self.v = (nn.ModuleList(nn.Linear(width, size) for _ in self.qkv) for size in sizes)
        self.of_heads = nn.RMSNorm(width // self.heads)
        self.head = nn.Linear(width, self.VOCABULARY)
        del self.qkv
        self.qkv = range(len(self.q))

    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """What layer ``i`` makes of ``x``."""
        batch, length, width = x.shape
        y, shape = self.norms[i](x), (batch, length, -1, width // self.heads)
        q, k, v = (each[i](y).view(shape).transpose(1, 2) for each in (self.q, self.k, self.v))
        if self.dropped == "queries":
            q = F.dropout(q, 0.3)
        seen = F.scaled_dot_product_attention(self.of_heads(q), self.of_heads(k), v, is_causal=True, enable_gqa=True)
        return x + self.out[i](seen.transpose(1, 2).reshape(batch, length, -1))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        """Loss and logits."""
        x = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1], device=input_ids.device))
        if self.dropped == "embeddings":
            x = F.dropout(x, 0.3)
        for i in self.qkv:
            x = self.layer(x, i)
        logits = self.head(x)
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), shifted.reshape(-1)), logits


CUT_PLAN = {
    **{f"{name}.*": ColwiseParallel() for name in "qkv"},
    "out.*": RowwiseParallel(),
    "embed": RowwiseParallel(input_layouts=Replicate()),
    "place": ColwiseParallel(output_layouts=Replicate()),
    "head": WHOLE,
}


def cut(dropped: str = "") -> Cut:
    """A whole one, of random weights in fp64."""
    torch.manual_seed(0)
    model = Cut(dropped)
    randomize(model)
    return model.double()


def padded_batch(seed: int = 1) -> dict[str, torch.Tensor]:
    """Tokens of both halves of the vocabulary, padding, and the last token."""
    batch = batch_of((2, 15), seed=seed)
    batch["input_ids"][0, 3:5], batch["input_ids"][1, 2] = Cut.PADDING, Cut.VOCABULARY - 1
    return batch


def whole(step: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values of a step with all shards of gradients put together."""
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in step.items()}


def cut_step(dp: int, sp: int, fsdp: bool, **config: Any) -> dict[str, torch.Tensor]:
    """A step of :class:`Cut` on (dp, sp, 2) ranks of dp, sp and tp, with weights spread over dp and sp if asked.

    Each rank of dp has a batch of its own.
    """
    mesh = dist.init_device_mesh("cpu", (dp, sp, 2), mesh_dim_names=("dp", "sp", "tp"))
    model = parallelize_module(cut(), mesh["tp"], CUT_PLAN)
    parallel: Any = sp_compile.parallelize(model, mesh=mesh["sp"], **{"codegen": "eager", **config})
    if fsdp:
        fully_shard(parallel, mesh=mesh["dp", "sp"]._flatten("all"))
    return whole(plain_step(parallel, padded_batch(seed=mesh["dp"].get_local_rank())))


def dropped_step(dropped: str, sp: int, seed: int) -> dict[str, torch.Tensor] | str:
    """A step with dropout on (sp, 2) ranks, or without ranks for sp=0; generators of all ranks but the first differ."""
    model: Any = cut(dropped)
    mesh = dist.init_device_mesh("cpu", (sp, 2), mesh_dim_names=("sp", "tp")) if sp else None
    if mesh is not None:
        parallelize_module(model, mesh["tp"], CUT_PLAN)
    parallel = sp_compile.parallelize(model, 1 if mesh is None else None, mesh=mesh and mesh["sp"], codegen="eager")
    torch.manual_seed(seed + (dist.get_rank() if mesh is not None else 0))
    found: dict[str, torch.Tensor] = {}
    raised = told(lambda: found.update(plain_step(parallel, padded_batch())))
    return whole(found) if raised == "nothing" else raised


def sums_over_tp(sp: int, **config: Any) -> list[int]:
    """Bytes of the sums of values, not of the loss, in a step on (sp, 2) ranks of sp and tp."""
    mesh = dist.init_device_mesh("cpu", (sp, 2), mesh_dim_names=("sp", "tp"))
    model = parallelize_module(cut(), mesh["tp"], CUT_PLAN)
    parallel = sp_compile.parallelize(model, mesh=mesh["sp"], codegen="eager", **config)
    parallel(**padded_batch())
    return [
        each.bytes_sent for each in parallel.report().collectives if each.kind == "all_reduce" and each.shape != "[]"
    ]


def llama_step(name: str, plan: str) -> tuple[dict[str, torch.Tensor], list[int], str]:
    """A step on (2, 2) ranks of sp and tp, tokens that are generated, and the report."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "tp"))
    model = parallelize_module(built(name, torch.float64), mesh["tp"], PLANS[plan])
    parallel = sp_compile.parallelize(model, mesh=mesh["sp"], codegen="eager")
    found = whole(stepped(parallel, batch_of()))
    parallel.eval()
    batch = batch_of()
    tokens = parallel.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)
    assert sp_compile.verify(parallel, {"input_ids": batch["input_ids"]})
    return found, tokens[0].tolist(), str(parallel.report())


def what_is_refused() -> list[str]:
    """What plans without a local form raise, a loss or outputs of a part of the logits, and weights spread twice."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "tp"))

    def raised(model: nn.Module, plan: Mapping[str, Any], step: Callable[..., object]) -> str:
        parallel = sp_compile.parallelize(parallelize_module(model, mesh["tp"], plan), mesh=mesh["sp"], codegen="eager")
        return told(lambda: step(parallel, batch_of()))

    spread: Any = fully_shard(built("Llama"), mesh=mesh["sp"])
    return [
        *(raised(built("Llama"), PLANS[plan], stepped) for plan in ("norms by tokens", "DTensors inside")),
        raised(cut(), {**CUT_PLAN, "head": ColwiseParallel()}, plain_step),
        raised(
            built("Llama").eval(),
            {"lm_head": ColwiseParallel(use_local_output=False)},
            lambda model, batch: model(input_ids=batch["input_ids"]),
        ),
        told(lambda: sp_compile.parallelize(spread, mesh=mesh["sp"])),
    ]


def twice_summed() -> str:
    """What a norm raises whose gradients transformers sums over tp itself."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "tp"))
    model = built("Llama")
    apply_tensor_parallelism(model, mesh["tp"], {"model.norm": "replicated_with_grad_allreduce"})
    parallel = sp_compile.parallelize(model, mesh=mesh["sp"], codegen="eager")
    return told(lambda: stepped(parallel, batch_of()))
