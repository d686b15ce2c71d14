"""One layer of attention of many kinds, written in three forms, and the same by its definition in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

HEADS, GROUPS, WIDTH = 4, 2, 24
WINDOW, CHUNK, BUCKETS, CAP = 7, 8, 16, 2.0
Vectors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """What the attention of one kind does.

    Attributes:
        sees: whether query q sees key k, from row numbers and per-token vectors; the same code for all forms.
        forms: those that can say it.
        head_dims: of queries and keys, and of values.
        score: ``alibi``, ``relative``, ``softcap`` or ``sinks``.
        rows: rows of the batch.
    """

    sees: Callable[[Callable[[str, Any], Any], Any, Any], Any]
    forms: tuple[str, ...] = ("sdpa", "eager", "flex")
    head_dims: tuple[int, int] = (8, 8)
    score: str = ""
    rows: int = 1


def causal(at: Any, q: Any, k: Any) -> Any:
    return k <= q


def window(at: Any, q: Any, k: Any) -> Any:
    return (k <= q) & (q - k < WINDOW)


def chunked(at: Any, q: Any, k: Any) -> Any:
    return (k <= q) & (q // CHUNK == k // CHUNK)


def packed(at: Any, q: Any, k: Any) -> Any:
    return (k <= q) & (at("request", q) == at("request", k))


def padded(at: Any, q: Any, k: Any) -> Any:
    return (k <= q) & (at("held", k) != 0)


def prefix(at: Any, q: Any, k: Any) -> Any:
    return (k <= q) | (at("place", k) < 9)


def blocks(at: Any, q: Any, k: Any) -> Any:
    """Causal text with images whose tokens all see each other, as vision-language models have."""
    return (k <= q) | ((at("image", q) == at("image", k)) & (at("image", q) >= 0))


def window_of_requests(at: Any, q: Any, k: Any) -> Any:
    """Sliding windows or the first two tokens, within requests."""
    return packed(at, q, k) & ((q - k < WINDOW) | (at("place", k) < 2))


KINDS = {
    "causal": Kind(causal),
    "window": Kind(window),
    "chunked": Kind(chunked),
    "packed": Kind(packed),
    "padded left": Kind(padded, rows=2),
    "padded right": Kind(padded, rows=2),
    "ALiBi": Kind(causal, score="alibi"),
    "softcap": Kind(causal, ("eager", "flex"), score="softcap"),
    "sinks": Kind(causal, ("eager", "flex"), score="sinks"),
    "relative bias per head": Kind(causal, score="relative"),
    "MLA": Kind(causal, head_dims=(12, 6)),
    "prefix-LM": Kind(prefix),
    "bidirectional blocks": Kind(blocks),
    "window, first tokens, packed": Kind(window_of_requests),
}


class Attention(nn.Module):
    """Projections, attention in one form, and a projection back; returns ``[B, T, WIDTH]``."""

    def __init__(self, kind: str, form: str) -> None:
        super().__init__()
        self.kind, self.form = KINDS[kind], form
        own, value = self.kind.head_dims
        self.q, self.k = nn.Linear(WIDTH, HEADS * own), nn.Linear(WIDTH, GROUPS * own)
        self.v, self.o = nn.Linear(WIDTH, GROUPS * value), nn.Linear(HEADS * value, WIDTH)
        self.sinks = nn.Parameter(torch.randn(HEADS), requires_grad=False)
        self.table = nn.Parameter(torch.randn(BUCKETS, HEADS), requires_grad=False)
        self.register_buffer("slopes", torch.exp2(-torch.arange(1.0, HEADS + 1)))

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, **vectors: torch.Tensor) -> torch.Tensor:
        rows, length, _ = inputs_embeds.shape
        vectors = {**vectors, "place": position_ids}
        q, k, v = (
            each(inputs_embeds).view(rows, length, heads, -1).transpose(1, 2)
            for each, heads in ((self.q, HEADS), (self.k, GROUPS), (self.v, GROUPS))
        )
        out = getattr(self, f"_{self.form}")(q, k, v, vectors)
        return self.o(out.transpose(1, 2).reshape(rows, length, -1))

    def _mask(self, vectors: Vectors, length: int) -> torch.Tensor:
        """``[B or 1, 1, T, T]``"""
        rows = torch.arange(length)
        q, k = rows[:, None], rows[None, :]

        def at(name: str, index: Any) -> torch.Tensor:
            vector = vectors[name][:, None, :]
            return vector[..., None] if index is q else vector[..., None, :]

        mask = self.kind.sees(at, q, k)
        return mask if mask.dim() == 4 else mask[None, None]

    def _bias(self, length: int) -> torch.Tensor | None:
        """``[1, H, T, T]``"""
        rows = torch.arange(length)
        distance = rows[:, None] - rows[None, :]
        if self.kind.score == "alibi":
            return (-self.slopes[:, None, None] * distance)[None]
        if self.kind.score == "relative":
            return F.embedding(distance.clamp(0, BUCKETS - 1), self.table).permute(2, 0, 1)[None]
        return None

    def _sdpa(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, vectors: Vectors) -> torch.Tensor:
        mask, bias = self._mask(vectors, q.shape[2]), self._bias(q.shape[2])
        if bias is not None:
            mask = bias.to(q.dtype).masked_fill(~mask, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def _eager(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, vectors: Vectors) -> torch.Tensor:
        rows, groups, length, own = k.shape
        k = k[:, :, None].expand(-1, -1, HEADS // groups, -1, -1).reshape(rows, HEADS, length, own)
        v = v[:, :, None].expand(-1, -1, HEADS // groups, -1, -1).reshape(rows, HEADS, length, -1)
        scores = torch.matmul(q, k.transpose(2, 3)) * own**-0.5
        if self.kind.score == "softcap":
            scores = torch.tanh(scores / CAP) * CAP
        bias = self._bias(length)
        if bias is not None:
            scores = scores + bias
        scores = scores.masked_fill(~self._mask(vectors, length), float("-inf"))
        if self.kind.score == "sinks":
            scores = torch.cat([scores, self.sinks.reshape(1, -1, 1, 1).expand(rows, -1, length, -1)], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        weights = weights[..., :-1] if self.kind.score == "sinks" else weights
        return F.dropout(weights, 0.1, training=self.training) @ v

    def _flex(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, vectors: Vectors) -> torch.Tensor:
        rows, length = q.shape[0], q.shape[2]

        def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
            return self.kind.sees(lambda name, index: vectors[name][b, index], i, j)

        def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            if self.kind.score == "softcap":
                return CAP * torch.tanh(score / CAP)
            if self.kind.score == "alibi":
                return score - self.slopes[h] * (i - j)
            if self.kind.score == "relative":
                return score + self.table[torch.clamp(i - j, 0, BUCKETS - 1), h]
            return score

        blocks = create_block_mask(mask_mod, rows, None, length, length, device="cpu")
        changed = score_mod if self.kind.score in ("softcap", "alibi", "relative") else None
        out, lse = flex_attention(q, k, v, changed, blocks, enable_gqa=True, return_lse=True)
        if self.kind.score == "sinks":
            out = out * torch.sigmoid(lse - self.sinks[:, None])[..., None].to(out.dtype)
        return out


def model(kind: str, form: str, dtype: torch.dtype) -> Attention:
    """With the same weights for all forms."""
    torch.manual_seed(7)
    made = Attention(kind, form)
    return made.to(dtype).eval()


def batch(kind: str, length: int, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Fresh inputs of any length; requests, padding and images where the kind has them."""
    torch.manual_seed(seed)
    rows = KINDS[kind].rows
    found: dict[str, torch.Tensor] = {"inputs_embeds": torch.randn(rows, length, WIDTH).to(dtype)}
    found["position_ids"] = torch.arange(length).expand(rows, -1).contiguous()
    row = torch.arange(length)
    if "packed" in kind:
        starts = torch.tensor([0, length // 3, length // 3 + 1, length - length // 4])
        request = (row[:, None] >= starts).sum(dim=1) - 1
        found |= {"request": request[None], "position_ids": (row - starts[request])[None]}
    if "padded" in kind:
        held = torch.ones(rows, length, dtype=torch.int64)
        held[0, : length // 2] = 0
        found["held"] = held if kind == "padded left" else held.flip(1)
    if kind == "bidirectional blocks":
        image = torch.full((rows, length), -1)
        image[:, length // 5 : length // 2] = 0
        image[:, length // 2 : length // 2 + 3] = 1
        found["image"] = image
    return found


def definition(kind: str, given: Attention, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The layer in fp64, element by element of the scores; a query that sees nothing adds 0."""
    made = given if given.q.weight.dtype == torch.float64 else copy.deepcopy(given).double()
    x = inputs["inputs_embeds"].double()
    rows, length, _ = x.shape
    vectors = {**inputs, "place": inputs["position_ids"]}
    own = made.kind.head_dims[0]
    q = made.q(x).view(rows, length, HEADS, own)
    k = made.k(x).view(rows, length, GROUPS, own).repeat_interleave(HEADS // GROUPS, dim=2)
    v = made.v(x).view(rows, length, GROUPS, -1).repeat_interleave(HEADS // GROUPS, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / own**0.5
    places = torch.arange(length)
    distance = (places[:, None] - places).double()
    if made.kind.score == "softcap":
        scores = CAP * torch.tanh(scores / CAP)
    elif made.kind.score == "alibi":
        scores = scores - made.slopes.view(-1, 1, 1) * distance
    elif made.kind.score == "relative":
        scores = scores + made.table[distance.clamp(0, BUCKETS - 1).long()].permute(2, 0, 1)
    seen = torch.stack([
        torch.as_tensor(made.kind.sees(lambda name, index, row=row: vectors[name][row][index], *_pairs(length)))
        for row in range(rows)
    ])[:, None]  # fmt: skip
    weights = torch.where(seen, torch.exp(scores), 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    if made.kind.score == "sinks":
        total = total + torch.exp(made.sinks).view(-1, 1, 1)
    out = torch.einsum("bhqk,bkhe->bqhe", weights / torch.where(total == 0, 1.0, total), v)
    return made.o(out.reshape(rows, length, -1))


def _pairs(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(length)
    return rows[:, None].expand(-1, length), rows[None, :].expand(length, -1)
