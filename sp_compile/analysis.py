"""What is known of a captured graph without its code: what its attentions are like, and whether requests are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from sp_compile import costs, ops
from sp_compile.cuts import Cuts
from sp_compile.isolation import Isolation, find_isolation
from sp_compile.pipeline import build_pipeline, run_pipeline
from sp_compile.placements import Shard
from sp_compile.program import Program, placement
from sp_compile.report import Choice
from sp_compile.strategies import Site, applicable, refused
from sp_compile.strategies.base import Made, unmoved

ANALYSED = ("normalize", "raise_attention", "isolate_requests", "shard_tokens", "propagate_placements")


@dataclass
class Analysis:
    """What is known of a graph, with its requests isolated or not, and the mixes of lengths that were checked."""

    isolation: Isolation
    names: list[str]
    program: Program
    checked: set[tuple[tuple[int, ...], bool]] = field(default_factory=set)
    _refused: dict[bool, list[dict[str, str]]] = field(default_factory=dict)
    _attentions: dict[bool, list[costs.Attention]] = field(default_factory=dict)

    def attentions(self, counted: bool) -> list[costs.Attention]:
        """What decides by which strategies the attentions run, read once.

        Args:
            counted: as in :class:`~sp_compile.program.Program`.
        """
        if counted not in self._attentions:
            self.program.counted = counted
            cuts, made = Cuts(self.program, self.program.operations_per_byte), Made()
            sites = [Site(self.program, each, made) for each in ops.attention_nodes(self.program.graph)]
            self._attentions[counted] = [_described(each, cuts) for each in sites]
            self._refused[counted] = [refused(each) for each in sites]
        return self._attentions[counted]

    def refused(self, counted: bool) -> list[dict[str, str]]:
        """The strategies that each attention cannot run by, and why."""
        self.attentions(counted)
        return self._refused[counted]


def _described(site: Site, cuts: Cuts) -> costs.Attention:
    q, k, v = (each.meta["val"] for each in site.args[:3])
    sources = [unmoved(each) for each in (site.args.k, site.args.v)]
    spread = [*dict.fromkeys(each for each in sources if placement(each) == Shard(2))]
    return costs.Attention(
        reach=site.reach,
        heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        dims=int(k.shape[3] + v.shape[3]),
        itemsize=k.element_size(),
        crossing=cuts.price(spread) if spread else 0.0,
        applicable=tuple(applicable(site)),
    )


def analyse(program: Program, isolated: bool) -> Analysis:
    """Run what tells about a program, on which no pass ran yet, as it is or with its requests isolated."""
    program.isolated = isolated
    names = [node.name for node in program.graph.find_nodes(op="placeholder")]
    run_pipeline(program, build_pipeline(ANALYSED), verify=False)
    on_meta = any(_is_meta(node) for node in program.graph.find_nodes(op="placeholder"))
    isolation = find_isolation(program, torch.device("cpu") if on_meta else None)
    return Analysis(isolation, names, program)


def choices_of(
    attentions: Sequence[costs.Attention],
    ran_by: Sequence[str],
    reasons: Sequence[dict[str, str]],
    found: Mapping[costs.Attention, Mapping[str, costs.Predicted]],
) -> Iterator[Choice]:
    """What each strategy would take, and why others cannot run, attentions of a kind together."""
    kinds: dict[tuple[costs.Attention, str], list[int]] = {}
    for i, kind in enumerate(zip(attentions, ran_by, strict=True)):
        kinds.setdefault(kind, []).append(i)
    for (attention, name), numbers in kinds.items():
        by_time = sorted(found[attention].items(), key=lambda each: each[1].seconds)
        yield Choice(numbers, name, {each: taken.seconds for each, taken in by_time}, reasons[numbers[0]])


def _is_meta(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_meta
