"""What a model will take on ranks and machines that are not at hand: seconds, bytes and memory, and the best mesh.

What the model computes is counted in its captured graph, see :mod:`sp_compile.work`; attention is predicted as where
strategies are chosen, see :mod:`sp_compile.costs`; everything else is amounts over the rates of
:class:`~sp_compile.hardware.Hardware`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sp_compile import costs
from sp_compile.errors import ConfigError
from sp_compile.hardware import Hardware
from sp_compile.layout import PAIRS_PER_FEATURE, TokenLayout, areas, choose_scheme, least_loaded, token_layout
from sp_compile.work import Work

AUTO = "auto"
KINDS = ("prefill", "decode", "training")
BACKWARD = 2.0  # products of a backward over those of a forward
BACKWARD_ATTENTION = 2.5  # two products of the forward, and five, arXiv:2307.08691
STATES = 4  # weights, gradients and the two moments of AdamW
STEPS = 3  # collectives of a layer in a step of decoding: queries there, outputs and log-sum-exps back


@dataclass(frozen=True)
class Prediction:
    """A mesh for one kind of work; of several groups of sp ranks the slowest.

    Attributes:
        kind: ``prefill``, ``decode`` (one token of every request) or ``training`` (a step).
        ranks, dp, sp: all ranks, groups of them, and ranks that share a batch.
        scheme, strategy: of the layout and of attention; ``auto`` is the best for each layer.
        seconds: of the whole batch.
        bytes_in: that reach a rank, those of attention and outputs and, in training, of gradients.
        memory: bytes that a rank needs at most.
        fits: in the memory that it has.
        sharded: weights and what belongs to them spread over all ranks by ``fully_shard``.
    """

    kind: str
    ranks: int
    dp: int
    sp: int
    scheme: str
    strategy: str
    seconds: float
    bytes_in: float
    memory: float
    fits: bool
    sharded: bool = False


class _Attention(NamedTuple):
    """Of all layers: seconds, bytes that reach a rank, and the most of these in one layer."""

    seconds: float
    bytes_in: float
    largest: float

    @classmethod
    def of(cls, layers: Sequence[tuple[costs.Predicted, int]]) -> _Attention:
        """Layers of a kind with how many there are."""
        seconds, bytes_in = (sum(each[i] * count for each, count in layers) for i in range(2))
        return cls(seconds, bytes_in, max((each.bytes_in for each, _ in layers), default=0.0))


@dataclass(frozen=True)
class Planner:
    """Predicts for one model.

    Attributes:
        work: of the model.
        hardware: of the ranks.
        scheme: of the layout, or ``auto``.
        whole_outputs: every rank gets the outputs of all tokens; else those of each request's last token are computed,
            and a loss without them, see ``outputs="loss"``.
        keep_gathered: as in the configuration.
    """

    work: Work
    hardware: Hardware
    scheme: str = AUTO
    whole_outputs: bool = False
    keep_gathered: bool = True

    def plans(self, lengths: Sequence[int], ranks: int) -> list[Prediction]:
        """All meshes and strategies for these requests, the fastest that fits first, of each kind.

        Args:
            lengths: tokens of each request; of a step of decoding those that it has already.
            ranks: of all groups together.
        """
        sizes = [sp for sp in range(1, ranks + 1) if ranks % sp == 0 and ranks // sp <= len(lengths)]
        found = [each for sp in sizes for each in self._on(lengths, ranks, sp)]
        return sorted(found, key=lambda each: (each.kind, not each.fits, each.seconds, each.memory))

    def prefill(self, layout: TokenLayout, ranks: int) -> dict[str, tuple[float, float]]:
        """Seconds and bytes of a forward by each strategy, and by the best for each layer.

        Args:
            layout: of the batch.
            ranks: that compute at once, those of other batches too.
        """
        operations = self.work.operations - (0 if self.whole_outputs else self.work.head)
        attention = self._attention(layout, ranks)
        seconds, outputs = self._rest(layout, ranks, operations, 1.0)
        return {name: (seconds + each.seconds, outputs + each.bytes_in) for name, each in attention.items()}

    def _on(self, lengths: Sequence[int], ranks: int, sp: int) -> Iterator[Prediction]:
        dp = ranks // sp
        groups = _balanced(lengths, dp)
        layouts = [token_layout(tuple(each), sp, self._scheme(each, sp), min_shard_length=2) for each in groups]
        for kind, sharded in (("prefill", False), ("training", False), ("training", True)):
            by_group = [
                self._training(each, ranks, sharded) if kind == "training" else self.prefill(each, ranks)
                for each in layouts
            ]
            for strategy in by_group[0]:
                seconds, bytes_in = (max(each[strategy][i] for each in by_group) for i in range(2))
                needed = max(self._memory(kind, each, ranks, strategy, sharded) for each in layouts)
                yield Prediction(kind, ranks, dp, sp, layouts[0].scheme, strategy, seconds, bytes_in, needed,
                                 needed <= self.hardware.capacity, sharded)  # fmt: skip
        seconds, bytes_in = (max(each) for each in zip(*(self._decode(each, ranks) for each in layouts), strict=True))
        held = max(self.work.weights + self._held(each) for each in layouts)
        yield Prediction("decode", ranks, dp, sp, layouts[0].scheme, "as the cache", seconds, bytes_in, held,
                         held <= self.hardware.capacity)  # fmt: skip

    def _scheme(self, lengths: Sequence[int], sp: int) -> str:
        if self.scheme != AUTO:
            return self.scheme
        width = max((each.heads * each.dims // 2 for each in self.work.attentions), default=1)
        return choose_scheme(lengths, sp, PAIRS_PER_FEATURE * width)

    def _rest(self, layout: TokenLayout, ranks: int, operations: float, traffic: float) -> tuple[float, float]:
        """Seconds and bytes of all but attention, for so many operations a token and so many times the traffic."""
        hardware, work, rows = self.hardware, self.work, layout.shard_length
        products = (rows * operations + layout.tokens * work.repeated) / hardware.products
        weights = work.weights / hardware.memory  # are read whole, however few the tokens
        outputs = (layout.sp - 1) * rows * work.outputs if self.whole_outputs else 0.0
        moved = (traffic * rows * work.traffic + costs.COPIES * outputs) / hardware.memory
        layers = len(work.attentions) * hardware.layer
        sent = outputs / self._link(layout.sp) + hardware.latency if outputs else 0.0
        return (max(products, weights) + moved + layers) / hardware.share(ranks) + sent, outputs

    def _link(self, sp: int) -> float:
        nodes = self.hardware.nodes(sp)
        return self.hardware.inside if nodes is None else min(self.hardware.inside, self.hardware.between * nodes.size)

    def _attention(self, layout: TokenLayout, ranks: int, rates: costs.Rates | None = None) -> dict[str, _Attention]:
        """All attentions by each strategy that is one for all of them, and by the best for each.

        Args:
            rates: to be used once strategies are chosen; by default those that they are chosen by.
        """
        own, nodes, apart = self.hardware.rates(ranks), self.hardware.nodes(layout.sp), self.work.apart
        found = []
        for attention, count in Counter(self.work.attentions).items():
            by_strategy = costs.predicted(layout, attention, apart, own, nodes)
            least = min(by_strategy, key=lambda name: by_strategy[name].seconds)
            if rates is not None:
                by_strategy = costs.predicted(layout, attention, apart, rates, nodes)
            found.append((by_strategy | {AUTO: by_strategy[least]}, count))
        names = [name for name in (AUTO, *costs.PREDICTED) if all(name in by_strategy for by_strategy, _ in found)]
        return {name: _Attention.of([(by_strategy[name], count) for by_strategy, count in found]) for name in names}

    def _training(self, layout: TokenLayout, ranks: int, sharded: bool) -> dict[str, tuple[float, float]]:
        hardware = self.hardware
        seconds, outputs = self._rest(layout, ranks, (1 + BACKWARD) * self.work.operations, 1 + BACKWARD)
        free = dataclasses.replace(hardware.rates(ranks), link=math.inf, between=None, memory=math.inf, latency=0.0)
        computed, whole = self._attention(layout, ranks, free), self._attention(layout, ranks)
        times = 3 if sharded else 2  # weights there twice and gradients once, or both ways of a sum
        gradients = times * (ranks - 1) / ranks * self.work.weights
        behind = hardware.hidden * seconds * BACKWARD / (1 + BACKWARD)  # the backward that sums can hide behind
        summed = max(gradients / self._link(ranks) - behind, 0.0)
        crossings = 2 if self.keep_gathered else 3  # keys and values there, their gradients back
        found = {}
        for name, each in whole.items():
            attention = (1 + BACKWARD_ATTENTION) * computed[name].seconds
            crossed = crossings * max(each.seconds - computed[name].seconds, 0.0)
            bytes_in = 2 * outputs + crossings * each.bytes_in + gradients
            found[name] = (seconds + attention + crossed + summed, bytes_in)
        return found

    def _decode(self, layout: TokenLayout, ranks: int) -> tuple[float, float]:
        """Seconds and bytes of a token of every request, whose earlier tokens lie as in the layout."""
        hardware, work, share = self.hardware, self.work, self.hardware.share(ranks)
        sp, requests = layout.sp, len(layout.lengths)
        rows = -(-requests // sp)
        products = rows * work.operations / hardware.products
        read = (self._held(layout) + work.weights) / hardware.memory
        layers = len(work.attentions) * hardware.layer
        queries = sum(each.heads * each.dims * costs.WIDE for each in work.attentions)
        bytes_in = (sp - 1) * rows * (queries + work.outputs)
        sent = bytes_in / self._link(sp) + STEPS * len(work.attentions) * hardware.latency if sp > 1 else 0.0
        return (max(products, read) + layers) / share + sent, float(bytes_in)

    def _held(self, layout: TokenLayout) -> float:
        """Bytes of the cache on a rank, of layers with a window no more than that."""
        found = 0.0
        for each in self.work.attentions:
            seen = [length if each.reach.back is None else min(length, each.reach.back) for length in layout.lengths]
            found += sum(seen) * each.kv_heads * each.dims * each.itemsize
        return found / layout.sp

    def _memory(self, kind: str, layout: TokenLayout, ranks: int, strategy: str, sharded: bool) -> float:
        work, rows = self.work, layout.shard_length
        gathered = self._attention(layout, ranks)[strategy]
        outputs = work.outputs * (layout.tokens if self.whole_outputs else len(layout.lengths))
        passing = 2 * rows * work.widest + outputs
        if kind == "prefill":
            return work.weights + passing + gathered.largest
        kept = gathered.bytes_in if self.keep_gathered else gathered.largest
        states = STATES * work.weights / (ranks if sharded else 1)
        whole = work.weights / max(len(work.attentions), 1) if sharded else 0.0  # of the layer that computes
        return states + whole + rows * work.saved + passing + kept


def best(plans: Mapping[int, Sequence[Prediction]]) -> list[Prediction]:
    """The first of each kind for each number of ranks, by kind."""
    found: dict[tuple[str, int], Prediction] = {}
    for each in (each for of_ranks in plans.values() for each in of_ranks):
        found.setdefault((each.kind, each.ranks), each)
    return sorted(found.values(), key=lambda each: (KINDS.index(each.kind), each.ranks))


def rank_counts(text: str) -> list[int]:
    """Numbers out of ``8,64,1024``.

    Raises:
        ConfigError: something else, or less than 1.
    """
    try:
        found = [int(each) for each in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"--ranks={text!r}: expected numbers of ranks, such as 8,64,1024")
    return found


def check_dtype(dtype: str, hardware: Hardware) -> None:
    """Check that rates are those of the model's dtype.

    Raises:
        ConfigError: they are not.
    """
    if dtype != hardware.dtype:
        raise ConfigError(
            f"the rates of {hardware.name} are for {hardware.dtype}, and model.dtype={dtype}; "
            f"pass model.dtype={hardware.dtype}, or a file with rates for {dtype}"
        )


def _balanced(lengths: Sequence[int], groups: int) -> list[list[int]]:
    """Requests in so many groups, the longest first to the one with the least area."""
    group = least_loaded(areas(np.asarray(lengths)), groups)
    return [[length for length, of in zip(lengths, group, strict=True) if of == each] for each in range(groups)]
