"""How long an attention takes by each strategy: bytes that cross, pairs that are computed, and what hides what.

Times are those of the rank that is busiest. What all strategies have in common is left out; :mod:`sp_compile.planning`
adds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from sp_compile import needs
from sp_compile.heads import HeadLists, head_lists
from sp_compile.layout import TokenLayout
from sp_compile.measure import least_seconds
from sp_compile.mesh import Group, Nodes
from sp_compile.needs import Reach

COPIES = 3  # of what arrives: it is written, taken apart into keys and values, and these are laid out for the kernel
WIDE = 4  # bytes of an element of a partial output
IN_FLIGHT = 2  # stages of a ring that travel at a time, see the pass overlap_communication
PARTS = 3  # partial outputs that exist at a time: two that are merged, and what they become
SPREAD = 2  # times the heads that a rank exchanges are there: what it sends, and what it gets


@dataclass(frozen=True)
class Rates:
    """What a rank and its links do.

    Attributes:
        link: bytes per second that reach a rank.
        compute: floating-point operations per second in attention.
        latency: seconds that a collective takes with nothing to carry.
        memory: bytes per second that a rank reads or writes.
        hidden: share of a transfer that computation can hide; processors that also carry the bytes hide nothing.
        part: seconds that a part of the scores takes besides its pairs, where each is a call of a kernel.
        between: bytes per second that reach a rank from other nodes, where there are any; None for ``link``.
    """

    link: float
    compute: float
    latency: float
    memory: float
    hidden: float
    part: float
    between: float | None = None

    @property
    def operations_per_byte(self) -> float:
        """What a rank computes while a byte reaches it."""
        return self.compute / self.link

    def but(self, link: float | None, compute: float | None) -> Rates:
        """These rates, but for those that are given."""
        return replace(self, link=link or self.link, compute=compute or self.compute)


RATES = {"cpu": Rates(2e9, 50e9, 1e-4, 2e9, 0.0, 1e-3), "cuda": Rates(4e11, 4e14, 2e-5, 3e12, 0.9, 0.0)}
SAMPLE = 1 << 20  # elements of fp32 that are gathered to measure a link


def rates_of(device: torch.device, link: float | None = None, compute: float | None = None) -> Rates:
    """The rates of a kind of device, for a GPU those of an H100 with NVLink, but for those that are given."""
    return RATES["cpu" if device.type == "cpu" else "cuda"].but(link, compute)


def measured_rates(group: Group, device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a group's links and of rank 0's device, the same on every rank; call it on every rank."""
    known = rates_of(device)
    a = torch.full((1024, 1024), 0.5, device=device, dtype=dtype)
    found = torch.tensor(
        [known.link, 2 * 1024**3 / least_seconds(lambda: a @ a, device), known.latency], dtype=torch.float64
    )
    if group.size > 1:
        part = torch.zeros(SAMPLE, device=device)
        whole = part.new_empty(group.size * SAMPLE)
        bytes_in = (group.size - 1) * SAMPLE * part.element_size()
        long = least_seconds(lambda: dist.all_gather_into_tensor(whole, part, group=group.process_group), device)
        few, short = part[:8], whole[: 8 * group.size]
        found[2] = least_seconds(lambda: dist.all_gather_into_tensor(short, few, group=group.process_group), device)
        found[0] = bytes_in / max(long - float(found[2]), 1e-9)
        found = found.to(device)
        dist.broadcast(found, group=group.process_group, group_src=0)
    link, compute, latency = found.tolist()
    return replace(known, link=link, compute=compute, latency=latency)


class Attention(NamedTuple):
    """What decides by which strategy an attention runs.

    Attributes:
        reach: how far queries see.
        heads, kv_heads: how many there are.
        dims: of a key and a value together.
        itemsize: bytes of an element.
        crossing: bytes of a token that keys and values cost to bring to another rank, what is computed anew there
            counted as bytes too, see :mod:`sp_compile.cuts`.
        applicable: the strategies that it can run by, whatever the batch.
    """

    reach: Reach
    heads: int
    kv_heads: int
    dims: int
    itemsize: int
    crossing: float
    applicable: tuple[str, ...]


@dataclass(frozen=True)
class _Case:
    layout: TokenLayout
    attention: Attention
    apart: bool
    rates: Rates
    nodes: Nodes | None

    def alone(self) -> float:
        return self._computed()

    def all_gathered(self) -> float:
        return self._computed() + self._sent(self.bytes_gathered(), self._link(shared=True))

    def fetched(self) -> float:
        return self._computed() + self._sent(self.bytes_fetched(), self._link())

    def ringed(self) -> float:
        stages = len(needs.ring_stages(self.layout.sp))
        bytes_in, computed = self.bytes_fetched(), self._computed()
        travels, copied = bytes_in / self._link(), COPIES * bytes_in / self.rates.memory
        exposed = travels - min(self.rates.hidden * travels, computed * stages / (stages + 1))
        outputs = self.layout.shard_length * self.attention.heads * self.attention.dims / 2 * WIDE
        merged = stages * 4 * outputs / self.rates.memory  # both read, one written, each a little
        return computed + copied + exposed + merged + stages * self.rates.latency

    def spread(self) -> float:
        everyone = range(self.layout.sp)
        sent = self._sent(self.bytes_spread(), self._link()) + self.rates.latency  # there and back
        return self._by_heads(everyone, self._lists(self.layout.sp)) + sent

    def spread_in_nodes(self) -> float:
        assert self.nodes is not None
        lists, size = self._lists(self.nodes.size), self.nodes.size
        of_node = (range(first, first + size) for first in range(0, self.layout.sp, size))
        busiest = max(self._by_heads(each, lists) for each in of_node)
        there_and_back = self._sent(self._exchanged(lists, size), self.rates.link) + self.rates.latency
        return busiest + there_and_back + self._sent(self._keys_of_peers(), self.rates.between or self.rates.link)

    def bytes_alone(self) -> float:
        return 0.0

    def bytes_gathered(self) -> float:
        return self._others(self.layout.sp) * self.attention.crossing

    def bytes_fetched(self) -> float:
        return needs.received(self.layout, self.attention.reach, self.apart) * self.attention.crossing

    def bytes_spread(self) -> float:
        return self._exchanged(self._lists(self.layout.sp), self.layout.sp)

    def bytes_spread_in_nodes(self) -> float:
        assert self.nodes is not None
        return self._exchanged(self._lists(self.nodes.size), self.nodes.size) + self._keys_of_peers()

    def held_alone(self) -> float:
        return 0.0

    def held_gathered(self) -> float:
        return self._keys((self.layout.sp + 1) * self.layout.shard_length)  # what is sent, and what all have sent

    def held_fetched(self) -> float:
        rows = self.layout.shard_length
        sent, come = needs.exchanged(self.layout, needs.Fetch(self.attention.reach), self.apart)
        return self._keys(max(rows + sent + come, 2 * (rows + come)))  # on the way, and when it is put behind its own

    def held_in_ring(self) -> float:
        stages = [needs.Fetch(self.attention.reach, each) for each in needs.ring_stages(self.layout.sp)]
        sent, come = (max(each) for each in zip(*(needs.exchanged(self.layout, each, self.apart) for each in stages),
                                                strict=True))  # fmt: skip
        on_the_way = min(IN_FLIGHT, len(stages) - 1)
        keys = self.layout.shard_length + on_the_way * sent + (on_the_way + 1) * come
        outputs = self.layout.shard_length * self.attention.heads * (self.attention.dims / 2 + 1) * WIDE
        return self._keys(keys) + PARTS * outputs

    def held_spread(self) -> float:
        return SPREAD * self._spread_heads(self._lists(self.layout.sp), self.layout.sp)

    def held_spread_in_nodes(self) -> float:
        assert self.nodes is not None
        lists = self._lists(self.nodes.size)
        across = (self.layout.sp + self.nodes.size) * self.layout.shard_length * len(lists.keys[0])
        keys = across * self.attention.dims * self.attention.itemsize
        return SPREAD * self._spread_heads(lists, self.nodes.size) + keys

    def _keys(self, rows: float) -> float:
        """Bytes of keys and values of so many rows."""
        return float(rows * self.attention.kv_heads * self.attention.dims * self.attention.itemsize)

    def _spread_heads(self, lists: HeadLists, ranks: int) -> float:
        """Queries, keys and values of one rank's heads and the rows of so many ranks."""
        heads = len(lists.queries[0]) / 2 + len(lists.keys[0])
        return ranks * self.layout.shard_length * heads * self.attention.dims * self.attention.itemsize

    def _keys_of_peers(self) -> float:
        """Keys and values of other nodes, for the heads of one rank."""
        assert self.nodes is not None
        size = self.nodes.size
        rows = (self.layout.sp // size - 1) * size * self.layout.shard_length
        return rows * len(self._lists(size).keys[0]) * self.attention.dims * self.attention.itemsize

    def _lists(self, ranks: int) -> HeadLists:
        return head_lists(self.attention.heads, self.attention.kv_heads, ranks)

    def _exchanged(self, lists: HeadLists, ranks: int) -> float:
        """Heads there, outputs back."""
        heads = len(lists.queries[0]) + len(lists.keys[0])
        return float(self._others(ranks) * heads * self.attention.dims * self.attention.itemsize)

    def _computed(self) -> float:
        """By the rank that is busiest, for all heads."""
        return max(self._seconds_of_queries())

    def _by_heads(self, ranks: Iterable[int], lists: HeadLists) -> float:
        """The queries of these ranks, for the heads of one."""
        seconds = self._seconds_of_queries(len(lists.queries[0]))
        return sum(seconds[rank] for rank in ranks)

    def _seconds_of_queries(self, heads: int | None = None) -> list[float]:
        """Of each rank's, for so many heads, or all."""
        batch = self.layout, self.attention.reach, self.apart
        of_pair = 2.0 * (heads or self.attention.heads) * self.attention.dims / self.rates.compute
        seconds = [pairs * of_pair for pairs in needs.seen_pairs(*batch)]
        if not self.rates.part:
            return seconds
        parts = needs.seen_parts(*batch)
        return [each + count * self.rates.part for each, count in zip(seconds, parts, strict=True)]

    def _others(self, ranks: int) -> int:
        return (ranks - 1) * self.layout.shard_length

    def _link(self, shared: bool = False) -> float:
        """Bytes per second that reach a rank from all others; ``shared`` comes once to each node, by all its links."""
        inside, between, sp = self.rates.link, self.rates.between, self.layout.sp
        if between is None or between == inside or self.nodes is None or sp <= self.nodes.size:
            return inside
        if shared:
            return min(inside, between * self.nodes.size)
        abroad = (sp - self.nodes.size) / (sp - 1)
        return 1 / (abroad / between + (1 - abroad) / inside)

    def _sent(self, bytes_in: float, link: float) -> float:
        return bytes_in / link + COPIES * bytes_in / self.rates.memory + self.rates.latency


PREDICTED: dict[str, tuple[Callable[[_Case], float], Callable[[_Case], float]]] = {
    "local": (_Case.alone, _Case.bytes_alone),
    "allgather_kv": (_Case.all_gathered, _Case.bytes_gathered),
    "fetch": (_Case.fetched, _Case.bytes_fetched),
    "window": (_Case.fetched, _Case.bytes_fetched),
    "ring": (_Case.ringed, _Case.bytes_fetched),
    "ulysses": (_Case.spread, _Case.bytes_spread),
    "hybrid": (_Case.spread_in_nodes, _Case.bytes_spread_in_nodes),
}


HELD: dict[str, Callable[[_Case], float]] = {
    "local": _Case.held_alone,
    "allgather_kv": _Case.held_gathered,
    "fetch": _Case.held_fetched,
    "window": _Case.held_fetched,
    "ring": _Case.held_in_ring,
    "ulysses": _Case.held_spread,
    "hybrid": _Case.held_spread_in_nodes,
}


class Predicted(NamedTuple):
    """Seconds of an attention, and bytes that reach the rank which gets most."""

    seconds: float
    bytes_in: float


def held(strategy: str, layout: TokenLayout, attention: Attention, apart: bool, nodes: Nodes | None = None) -> float:
    """Bytes that a rank holds at most for one attention besides its share of what one rank would hold without others.

    Keys and values are taken to cross as they are; what they are computed from crosses where it is smaller.

    Args:
        strategy: a key of :data:`HELD`.
        apart, nodes: as of :func:`predicted`.
    """
    if layout.sp == 1:
        return 0.0
    return HELD[strategy](_Case(layout, attention, apart, RATES["cuda"], nodes))


def predicted(
    layout: TokenLayout, attention: Attention, apart: bool, rates: Rates, nodes: Nodes | None = None
) -> dict[str, Predicted]:
    """What an attention takes by each strategy that it can run by: ``local`` where every request lies on one rank.

    Args:
        apart: no query sees another request.
        nodes: of the ranks, where they are known.
    """
    case = _Case(layout, attention, apart, rates, nodes)
    able = [name for name in PREDICTED if name in attention.applicable and (nodes or name != "hybrid")]
    if apart and needs.whole_on_ranks(layout):
        able = ["local", *able]
    if layout.sp == 1:
        able = ["local"]
    return {name: Predicted(*(each(case) for each in PREDICTED[name])) for name in able}


def fastest(
    layout: TokenLayout,
    attentions: Sequence[Attention],
    apart: bool,
    predict: Callable[[TokenLayout, Attention, bool], Mapping[str, Predicted]],
) -> tuple[str, ...]:
    """The strategy of ``shard_attention`` for each attention that is predicted to be fastest, of equals the first.

    Args:
        apart: no query sees another request.
        predict: what an attention takes by each strategy, as :func:`predicted` tells for some rates.
    """
    found = {each: predict(layout, each, apart) for each in {*attentions}}
    return tuple(min(found[each], key=lambda name: found[each][name].seconds) for each in attentions)
