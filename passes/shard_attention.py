"""Run attention on the rank's queries and on the keys of others that they need, in the order in which these arrive.

Requires: ``attention_raised``, ``placed``.
Establishes: ``keys_in_padded_order``.

The strategies are in :mod:`sp_compile.strategies`, for all attentions or some of them; ``auto`` takes for each batch
and attention the one that :mod:`sp_compile.costs` predicts to be fastest. Keys stay in the order in which ranks stack;
what masks them is put in that order instead, which costs one index selection of a vector. Padding is masked by
``valid``. With a cache, new keys and values go to everyone, who share them out.

Before::

    %k_full: f32[1, 2, T, 16] Replicate = redistribute(%k)
    %attention = sp_compile.attention(%q, %k_full, %v_full, [%rows, %columns], ...)

After::

    %k_all: f32[1, 2, T, 16] Gathered(2) = redistribute(%k)
    %columns_all: i64[1, 1, 1, T] Gathered(3) = redistribute(%columns)
    %attention = sp_compile.attention(%q, %k_all, %v_all, [%rows, %columns_all], ..., valid=%gathered_valid)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sp_compile import ops
from sp_compile.errors import ConfigError, StrategyError, nearest
from sp_compile.invariants import KEYS_PADDED, PLACED, RAISED
from sp_compile.pipeline import Pass
from sp_compile.program import Program, source_line
from sp_compile.strategies import STRATEGIES, Site, applicable
from sp_compile.strategies.base import Made

KNOWN = (*STRATEGIES, "auto")


@dataclass(frozen=True)
class ShardAttention(Pass):
    """Queries local, keys and values where these need them.

    Attributes:
        strategy: for all attentions that ``layers`` does not name.
        layers: strategies by number of the attention, from 0, as ``"3"`` or ``"0-5"``.
    """

    name = "shard_attention"
    requires = (RAISED, PLACED)
    establishes = (KEYS_PADDED,)

    strategy: str = "allgather_kv"
    layers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in (self.strategy, *self.layers.values()):
            if each not in KNOWN:
                raise ConfigError(f"unknown attention strategy {each!r}{nearest(each, KNOWN)}")
        for each in self.layers:
            _numbers(each)

    def run(self, program: Program) -> None:
        """Rewrite in place.

        Raises:
            StrategyError: a strategy does not apply, or a layer is named that is not there.
        """
        if not program.parallel:
            return
        made, attentions = Made(), ops.attention_nodes(program.graph)
        best = program.strategies or ("allgather_kv",) * len(attentions)
        chosen = [best[i] if each == "auto" else each for i, each in enumerate(self.asked(len(attentions)))]
        program.ran_by = ["allgather_kv" if program.cached else each for each in chosen]
        for i, (node, name) in enumerate(zip(attentions, program.ran_by, strict=True)):
            site = Site(program, node, made)
            reason = STRATEGIES[name].against(site)
            if reason:
                raise StrategyError(
                    f"strategy {name} for attention {i} at {source_line(node) or 'no source line'}: {reason}; "
                    f"what applies is {', '.join(applicable(site))}"
                )
            STRATEGIES[name].apply(site)
        program.remove_dead_code()

    @property
    def reads_reach(self) -> bool:
        """Whether any strategy asks how far queries see."""
        return not {self.strategy, *self.layers.values()}.isdisjoint(("fetch", "window", "ring", "auto"))

    @property
    def chooses(self) -> bool:
        """Whether strategies depend on the batch."""
        return "auto" in (self.strategy, *self.layers.values())

    def asked(self, attentions: int) -> list[str]:
        """The strategy that is asked for each attention, ``auto`` among them.

        Raises:
            StrategyError: a layer is named that is not there.
        """
        chosen = [self.strategy] * attentions
        for numbers, strategy in self.layers.items():
            for i in _numbers(numbers):
                if i >= attentions:
                    raise StrategyError(f"layers name attention {i}, and the model has {attentions}, from 0 on")
                chosen[i] = strategy
        return chosen


def _numbers(text: str) -> range:
    first, _, last = str(text).partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or int(first) > int(last or first):
        raise ConfigError(f"layers={text!r} is no number of an attention; pass one as 3, or several as 0-5")
    return range(int(first), int(last or first) + 1)
