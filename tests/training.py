"""Steps of training on ranks and without them, for tests to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import sp_compile
from tests.zoo.models import randomize

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
LATENTS = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
           "qk_nope_head_dim": 8, "v_head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 8,
           "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {**EXPERTS, "output_router_logits": True, "head_dim": 16},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "Mistral": {"sliding_window": 5},
    "DeepseekV3": LATENTS,
}


def built(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A causal language model of random weights, in training mode."""
    import transformers

    prefix = "GPT2" if name == "GPT2" else name
    sizes = {} if name == "GPT2" else SIZES
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, "vocab_size": 128, **MODELS[name], **changes})
    if dtype == torch.float64:
        config._experts_implementation = "batched_mm"  # grouped products take no fp64
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    return model.to(dtype).train()


def batch_of(shape: Sequence[int] = (1, 13), ignored: slice = slice(0, 5), seed: int = 1) -> dict[str, torch.Tensor]:
    """Tokens, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 120, tuple(shape), generator=generator)
    labels = ids.clone()
    labels[:, ignored] = -100
    return {"input_ids": ids, "labels": labels}


def told(run: Callable[[], object]) -> str:
    """What a call raises, or ``nothing``."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def stepped(model: nn.Module, batch: Mapping[str, Any], autocast: bool = False) -> dict[str, torch.Tensor]:
    """The loss of a step, under bf16 autocast if asked, and every gradient by the name of its parameter."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    named = {name.removeprefix("module."): each.grad for name, each in model.named_parameters()}
    return {"loss": loss.detach(), **{name: each for name, each in named.items() if each is not None}}


def on_ranks(
    name: str,
    batches: Sequence[Mapping[str, Any]],
    dtype: torch.dtype,
    changes: Mapping[str, Any],
    autocast: bool = False,
    **config: Any,
) -> list[dict[str, torch.Tensor]]:
    """Steps on the ranks of this group."""
    parallel = sp_compile.parallelize(built(name, dtype, **changes), **{"codegen": "eager", **config})
    return [stepped(parallel, batch, autocast) for batch in batches]


def apart(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest difference of a value over the largest of its elements."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - each).abs().max() / each.abs().max().clamp(min=1e-12)) for name, each in expected.items()
    )


class Plain(nn.Module):
    """A small decoder with grouped heads and a loss that casts nothing, so that fp64 is fp64 throughout."""

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.embed, self.place = nn.Embedding(128, width), nn.Embedding(64, width)
        size = width // heads
        self.qkv = nn.ModuleList(nn.Linear(width, (heads + 2 * kv_heads) * size) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(depth))
        self.head = nn.Linear(width, 128, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embed(input_ids) + self.place(places)
        for i in range(len(self.qkv)):
            x = self.layer(x, i)
        logits = self.head(x)
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return self.loss(logits.view(-1, 128), shifted.reshape(-1)), logits

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of rows."""
        return F.cross_entropy(logits, labels)

    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """What layer ``i`` makes of ``x``."""
        batch, length, width = x.shape
        size = width // self.heads
        sizes = [each * size for each in (self.heads, self.kv_heads, self.kv_heads)]
        parts = self.qkv[i](self.norms[i](x)).split(sizes, dim=-1)
        q, k, v = (each.view(batch, length, -1, size).transpose(1, 2) for each in parts)
        seen = self.attend(q, k, v, x)
        return x + self.out[i](seen.transpose(1, 2).reshape(batch, length, width))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Causal attention of a layer whose input is ``x``."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Biased(Plain):
    """Scores change by learned numbers of the distance, and by a gate of the query."""

    def __init__(self) -> None:
        super().__init__()
        self.distances, self.gate = nn.Embedding(16, self.heads), nn.Linear(32, self.heads)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """With both biases."""
        places = torch.arange(q.shape[2], device=q.device)
        distance = places[:, None] - places[None, :]
        learned = self.distances(distance.clamp(0, 15)).permute(2, 0, 1)[None]
        gated = self.gate(x).transpose(1, 2)[..., None] * distance
        bias = (learned + 0.1 * gated).masked_fill(distance < 0, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


class Smoothed(Plain):
    """Labels are smoothed, and logits kept small: a z-loss over the rows that have a label."""

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """With both."""
        labelled = (labels != -100).to(logits.dtype)
        squares = logits.logsumexp(dim=-1).square()
        z_loss = (squares * labelled).sum() / labelled.sum()
        return F.cross_entropy(logits, labels, label_smoothing=0.1) + 1e-2 * z_loss + 1e-3 * squares.mean()


def plain(dtype: torch.dtype = torch.float64) -> nn.Module:
    """:class:`Plain` with random weights."""
    return _random(Plain, dtype)


KINDS = {"biased": Biased, "smoothed": Smoothed}


def special(kind: str) -> nn.Module:
    """One of :data:`KINDS` with random weights, in fp64."""
    return _random(KINDS[kind], torch.float64)


def _random(kind: type[Plain], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    randomize(model)
    return model.to(dtype).train()


def plain_step(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """As :func:`stepped`, with a loss of its own on the logits besides."""
    model.zero_grad()
    loss, logits = model(**batch)
    (loss + 0.1 * logits.square().mean()).backward()
    named = {name.removeprefix("module."): each.grad for name, each in model.named_parameters()}
    return {"loss": loss.detach(), "logits": logits.detach(), **named}


def plain_on_ranks(batches: Sequence[Mapping[str, Any]], **config: Any) -> list[dict[str, torch.Tensor]]:
    """Steps on the ranks of this group."""
    parallel = sp_compile.parallelize(plain(), **{"codegen": "eager", **config})
    return [plain_step(parallel, batch) for batch in batches]


def special_on_ranks(kind: str, batches: Sequence[Mapping[str, Any]], strategy: str) -> list[dict[str, torch.Tensor]]:
    """Steps of one of :data:`KINDS` on the ranks of this group; a bias that is not lifted is an error."""
    strict = kind == "biased"  # sums over all rows are computed on gathered ones
    parallel = sp_compile.parallelize(special(kind), codegen="eager", attention=strategy, strict=strict)
    return [plain_step(parallel, batch) for batch in batches]


def on_a_mesh(wrap: str) -> tuple[dict[str, torch.Tensor], float]:
    """A step on (2, 2) ranks of dp and sp, each dp rank with a batch of its own; gradients and the loss."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model: Any = sp_compile.parallelize(plain(), mesh=mesh["sp"], codegen="eager")
    if wrap == "ddp":
        model = DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    else:
        fully_shard(model, mesh=mesh["dp", "sp"]._flatten("all"))
    batch = batch_of((1, 15), slice(0, 4), seed=mesh["dp"].get_local_rank())
    loss, _ = model(**batch)
    loss.backward()
    found = {}
    for name, each in model.named_parameters():
        grad = each.grad.full_tensor() if isinstance(each.grad, DTensor) else each.grad
        found[name.replace("module.", "")] = grad
    return found, float(loss)
