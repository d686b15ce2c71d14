"""Attention over parts of a batch by the kernels of compiled models and by torch's, for ``gpu.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from attention import SHARES
from gpu_timing import Run, Shape
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sp_compile import needs
from sp_compile.kernels import flex
from sp_compile.kernels.choice import KERNELS, Need, choose
from sp_compile.kernels.plan import joined_with_valid, plan_regions
from sp_compile.kernels.regions import as_tensor
from sp_compile.layout import TokenLayout, token_layout
from sp_compile.passes.lower_attention import OPTIONS

STRATEGIES = ("allgather_kv", "fetch")
FLEX, FUSED = "FlexAttention, any length", "fused"
RULE = "t0 = eq(x0, x1); t1 = le(x2, x3); mask = and(t0, t1)"  # of transformers' mask for packed requests
SDPA = {"flash SDPA": SDPBackend.FLASH_ATTENTION, "cuDNN SDPA": SDPBackend.CUDNN_ATTENTION}
SEES = flex.rule_graph(
    torch.nn.Module(), joined_with_valid(RULE, 4), "mask", dict(enumerate(((2,), (3,), (3,), (2,), (3,)))), {}
)


@torch.compile(fullgraph=True)
def of_any_length(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockMask) -> Any:
    options = {"BACKEND": OPTIONS["BACKEND"]}
    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=True, kernel_options=options)


@torch.compile(fullgraph=True, dynamic=False)
def of_one_length(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockMask) -> Any:
    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockMask) -> Any:
    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)


@dataclass(frozen=True)
class Part:
    """Queries of a rank and the keys that it gets, as rows of the batch.

    Attributes:
        queries, keys: int64, normal-order rows; 0 on padding.
        real: bool, keys that are no padding.
        area: pairs of a query and a key that it sees.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    real: torch.Tensor
    area: int

    @property
    def sizes(self) -> tuple[int, int]:
        """How many queries and keys there are."""
        return len(self.queries), len(self.keys)


@dataclass(frozen=True)
class Given:
    """What attention over a part takes.

    Attributes:
        read: operands of :data:`RULE`.
        real: as of the part, on the device.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    read: list[torch.Tensor]
    real: torch.Tensor

    @property
    def operands(self) -> list[torch.Tensor]:
        """Of :data:`RULE`, and the keys that exist."""
        return [*self.read, self.real]

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.q.shape[-1]) ** -0.5


def batches(tokens: int) -> dict[str, tuple[int, ...]]:
    """Lengths of the requests, by the name of the batch."""
    counts = [max(1, int(share * tokens)) for share in SHARES]
    return {f"{tokens} tokens": (tokens,), f"{tokens} tokens, 8 requests": (*counts, tokens - sum(counts))}


def part_of(layout: TokenLayout, rank: int, strategy: str) -> Part:
    """What a rank computes."""
    reach = needs.Reach(None, 0)
    area = needs.seen_pairs(layout, reach, True)[rank]
    if strategy == "allgather_kv":
        return Part(layout.local_index[rank], layout.local_index.reshape(-1), layout.valid.reshape(-1), area)
    found = needs.index_inputs(layout, rank, [needs.Fetch(reach)], True)
    return Part(layout.local_index[rank], found["reach_index_0"], found["reach_valid_0"], area)


def whole_part(tokens: int) -> Part:
    """All of one causal sequence."""
    return part_of(token_layout((tokens,), 1), 0, "allgather_kv")


class Batch:
    """Queries, keys and values of a whole batch, and what parts of it take."""

    def __init__(self, lengths: tuple[int, ...], shape: Shape) -> None:
        self.shape, self.device = shape, shape.device
        self.lengths = lengths
        tokens = sum(lengths)
        self.q, self.k, self.v = (
            shape.random(heads, tokens) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        self.request = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(self.device)

    def given(self, part: Part) -> Given:
        """What attention over the part takes."""
        queries, keys, real = (each.to(self.device) for each in (part.queries, part.keys, part.real))
        of_queries, of_keys = self.request[queries][:, None], self.request[keys][None, :]
        read = [of_queries, of_keys, keys[None, :], queries[:, None]]
        q, k, v = self._rows(self.q, queries), self._rows(self.k, keys), self._rows(self.v, keys)
        return Given(q, k, v, read, real)

    def _rows(self, whole: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        all_rows = torch.arange(whole.shape[2], device=self.device)
        return whole if torch.equal(rows, all_rows) else whole[:, :, rows]

    def each_request(self, backends: Mapping[str, SDPBackend]) -> dict[str, Run]:
        """``is_causal`` SDPA over every request on its own, by torch's kernels."""
        parts = zip(*(each.split(self.lengths, dim=2) for each in (self.q, self.k, self.v)), strict=True)
        each_by_name = [causal(*(part.contiguous() for part in each), backends) for each in parts]
        return {name: _together([each[name] for each in each_by_name]) for name in backends}


def _together(runs: list[Run]) -> Run:
    """The outputs of all, as those of one batch."""
    return lambda: torch.cat([run() for run in runs], dim=2)


def block_mask_plan(given: Given) -> torch.Tensor:
    """The block mask, made on the host and sent to the GPU, as before a forward."""
    made = flex.block_mask(given.read, [], RULE, given.real, given.q.shape[2], given.k.shape[2])
    return made.to(given.q.device)


def block_mask_of(plan: torch.Tensor, operands: list[torch.Tensor], backward: bool = False) -> BlockMask:
    """What :func:`sp_compile.kernels.flex.block_mask` planned, with the rule as a function of the element.

    Args:
        backward: with the blocks of queries of each block of keys, as models list them for gradients.
    """
    captured = [each.reshape(-1).contiguous() for each in operands]
    given: dict[str, Any] = {
        "seq_lengths": (len(captured[0]), len(captured[1])),
        "mask_mod": lambda *place: SEES(*place, *captured),
    }
    if not backward:
        return BlockMask.from_kv_blocks(*_lists(plan), flex.BLOCK, **given, compute_q_blocks=False)
    of_keys = torch.from_numpy(flex.of_keys(plan.cpu().numpy())).to(plan.device)
    for side, listed in (("kv", plan), ("q", of_keys)):
        names = (f"{side}_num_blocks", f"{side}_indices", f"full_{side}_num_blocks", f"full_{side}_indices")
        given |= dict(zip(names, _lists(listed), strict=True))
    return BlockMask(**given, BLOCK_SIZE=(flex.BLOCK, flex.BLOCK))


def _lists(plan: torch.Tensor) -> list[torch.Tensor]:
    """Partial and full blocks, how many and which."""
    listed = [plan[:, None, :, i] for i in range(2)]
    return [part.contiguous() for each in listed for part in (each[..., 0], each[..., 1:])]


def by_flex(given: Given, code: Callable[..., Any], backward: bool = False) -> Run:
    """FlexAttention, planned before."""
    blocks = block_mask_of(block_mask_plan(given), given.operands, backward)
    return lambda: code(given.q, given.k, given.v, blocks)


def plan_of(given: Given, kernel: str) -> torch.Tensor:
    """Regions for ``fused`` or ``tiles``, on the host."""
    sizes = given.q.shape[2], given.k.shape[2]
    return as_tensor(plan_regions(given.read, [], RULE, given.real, *sizes, boxes=kernel != FUSED))


def by_regions(given: Given, kernel: str) -> Run:
    """The op of compiled models by ``fused`` or ``tiles``, planned before."""
    plan = plan_of(given, kernel)
    run = torch.ops.sp_compile.attention
    return lambda: run(given.q, given.k, given.v, given.read, [], RULE, given.scale, False, kernel, plan, given.real)[0]


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backends: Mapping[str, SDPBackend]) -> dict[str, Run]:
    """``is_causal`` SDPA by torch's kernels, keys and values repeated for grouped heads before."""
    if k.shape[1] != q.shape[1]:
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))

    def run_by(backend: SDPBackend) -> Run:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return run

    return {name: run_by(backend) for name, backend in backends.items()}


def kernels_on(shape: Shape) -> dict[str, SDPBackend]:
    """Torch's kernels that the device has."""
    return SDPA if shape.device.type == "cuda" else {"flash SDPA": SDPBackend.FLASH_ATTENTION}


def code_on(shape: Shape, compiled: Any) -> Any:
    """Compiled FlexAttention on a GPU, eager on a CPU."""
    return compiled if shape.device.type == "cuda" else eager


def need_of(shape: Shape, short: bool) -> Need:
    """What a kernel must serve in a model with these heads."""
    width = shape.width
    heads = {"heads": shape.heads, "kv_heads": shape.kv_heads}
    return Need(shape.device.type, torch.bfloat16, width, width, False, **heads, short=short)


def runs_of(given: Given, shape: Shape) -> dict[str, Run]:
    """A part by each kernel that compiled models may take, on a CPU by FlexAttention alone."""
    found = {FLEX: by_flex(given, code_on(shape, of_any_length))}
    if shape.device.type == "cuda" and KERNELS["fused"](need_of(shape, False)) is None:
        found[FUSED] = by_regions(given, FUSED)
    return found


def chosen(layout: TokenLayout, shape: Shape) -> str:
    """The kernel that compiled models take for a batch on a GPU."""
    if shape.device.type != "cuda":
        return FLEX
    return {"fused": FUSED, "flex": FLEX}[choose("auto", need_of(shape, needs.short_runs(layout)))[0]]


@lru_cache
def generalize(shape: Shape) -> None:
    """Let the code that is for any length be made before what is measured, once for a shape."""
    if shape.device.type != "cuda":
        return
    for tokens in (1000, 1700, 2600):
        batch = Batch((tokens,), shape)
        for sp in (1, 2, 4):
            for strategy in STRATEGIES:
                by_flex(batch.given(part_of(token_layout((tokens,), sp), 0, strategy)), of_any_length)()
