"""Run attention on the rank's queries and on the keys of others that they need, in the order in which these arrive.

Requires: ``attention_raised``, ``placed``.
Establishes: ``keys_in_padded_order``.

Strategies, for all attentions or some of them:

* ``allgather_kv``: everyone gets all keys and values. Keys stay in padded SP order; what masks them is put in that
  order instead, which costs one index selection of a vector. Source: Llama 3 (arXiv:2407.21783, section 3.3).
* ``fetch``: a rank gets the keys and values that its queries can see, by the mask's rule and by which requests are
  apart. Source: the group-cast of MagiAttention.
* ``window``: the same, for layers with a sliding window only; what is fetched is the halo.
* ``local``: nothing is exchanged, since every request lies whole on one rank.
* ``ulysses``: heads are spread over the ranks instead of tokens, by all-to-all, and outputs come back. Any number of
  heads will do, see :mod:`sp_compile.heads`. Source: DeepSpeed Ulysses (arXiv:2309.14509).
* ``auto``: for each batch and attention that of the others which brings the fewest heads of rows to the rank that
  needs most; other than ``allgather_kv`` only where that saves a tenth.

Padding is masked by ``valid``. With a cache, new keys and values go to everyone, who share them out.

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

from torch import fx

from sp_compile import ops
from sp_compile.errors import ConfigError, StrategyError, nearest
from sp_compile.heads import head_lists
from sp_compile.integers import of_all_rows
from sp_compile.invariants import KEYS_PADDED, PLACED, RAISED
from sp_compile.pipeline import Pass
from sp_compile.placements import (
    LOCAL_ROWS,
    REPLICATE,
    Gathered,
    Heads,
    Placement,
    QueriesByKeys,
    Replicate,
    Shard,
)
from sp_compile.program import Program, gathered_valid, moved, placement, source_line
from sp_compile.rules.attention import is_vector, of_heads
from sp_compile.symbols import shape_of
from sp_compile.windows import needed_by, reach_of

STRATEGIES = ("allgather_kv", "fetch", "window", "local", "ulysses", "auto")


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
            if each not in STRATEGIES:
                raise ConfigError(f"unknown attention strategy {each!r}{nearest(each, STRATEGIES)}")
        for each in self.layers:
            _numbers(each)

    def run(self, program: Program) -> None:
        """Rewrite in place.

        Raises:
            StrategyError: a strategy does not apply, or a layer is named that is not there.
        """
        if not program.parallel:
            return
        made: dict[tuple[fx.Node, Placement], fx.Node] = {}
        known: dict[fx.Node, fx.Node] = {}
        attentions = ops.attention_nodes(program.graph)
        best = program.strategies or ("allgather_kv",) * len(attentions)
        for i, (node, asked) in enumerate(zip(attentions, self.asked(len(attentions)), strict=True)):
            strategy = best[i] if asked == "auto" else asked
            if strategy == "ulysses" and not program.cached:
                _spread_heads(program, node, made, known)
            else:
                _shard(program, node, _keys(program, node, "allgather_kv" if program.cached else strategy), made)
        program.remove_dead_code()

    @property
    def reads_reach(self) -> bool:
        """Whether any strategy asks how far queries see."""
        return not {self.strategy, *self.layers.values()}.isdisjoint(("fetch", "window", "auto"))

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


def _keys(program: Program, node: fx.Node, strategy: str) -> Gathered:
    """How keys and values of an attention are placed along dim 2."""
    if strategy == "allgather_kv":
        return Gathered(2)
    if strategy == "local":
        return Gathered(2, LOCAL_ROWS)
    reach = needed_by(node, program.tokens, program.counted)
    if strategy == "window" and reach.back is None:
        seen = reach_of(node, program.tokens, program.counted).back
        reason = (
            "the mask's rule sets no bound on how far back a query sees"
            if seen is None
            else f"a row that sees nothing of its window of {seen} gets the mean of all values"
        )
        raise StrategyError(
            f"strategy window at {source_line(node) or 'no source line'}: {reason}; fetch and allgather_kv apply"
        )
    if reach not in program.reaches:
        program.reaches.append(reach)
    return Gathered(2, f"reach_{program.reaches.index(reach)}")


def _shard(program: Program, node: fx.Node, keys: Gathered, made: dict[tuple[fx.Node, Placement], fx.Node]) -> None:
    args = ops.AttentionArgs(*node.args)
    tokens = shape_of(args.k)[2]

    def ordered(each: fx.Node) -> fx.Node:
        rank = len(shape_of(each))
        if rank < 1 or shape_of(each)[-1] != tokens:
            return each
        both = isinstance(placement(each), Shard)
        target = QueriesByKeys(rank - 2, rank - 1, keys.of) if both else Gathered(rank - 1, keys.of)
        return moved(program, each, target, node, made)

    k, v = (moved(program, _unmoved(each), keys, node, made) for each in (args.k, args.v))
    operands = [ordered(each) for each in args.operands]
    valid = program.index_input(gathered_valid(keys))
    node.args = tuple(args._replace(k=k, v=v, operands=operands, valid=valid))


def _spread_heads(
    program: Program,
    node: fx.Node,
    made: dict[tuple[fx.Node, Placement], fx.Node],
    known: dict[fx.Node, fx.Node],
) -> None:
    args = ops.AttentionArgs(*node.args)
    lists = head_lists(int(shape_of(args.q)[1]), int(shape_of(args.k)[1]), program.sp)
    queries = Heads(1, lists.queries)

    def spread(each: fx.Node, heads: Heads) -> fx.Node:
        source = each.args[0] if each.target is ops.redistribute else each
        assert isinstance(source, fx.Node)
        if placement(source) != Shard(2):  # whole on every rank, or in an order of its own
            whole = source if isinstance(placement(source), Replicate) else moved(program, each, REPLICATE, node, made)
            source = moved(program, whole, Gathered(2), node, made)
        return moved(program, source, heads, node, made)

    q = spread(args.q, queries)
    k, v = (spread(each, Heads(1, lists.keys)) for each in (args.k, args.v))
    operands, tables = [], []
    for each in args.operands:
        if not is_vector(each, args):
            raise StrategyError(
                f"strategy ulysses at {source_line(node) or 'no source line'}: %{each.name} has a value for every "
                "query and key, which ranks have of their own rows only; fetch and allgather_kv apply"
            )
        whole = of_all_rows(program, each, node, known) or _unmoved(each)
        for placed in of_heads(each, args, queries):
            whole = moved(program, whole, placed, node, made)
        operands.append(whole)
    for each in args.tables:
        per_head = shape_of(each)[0] != 1
        tables.append(moved(program, each, Heads(0, lists.queries), node, made) if per_head else each)
    valid = program.index_input("gathered_valid")
    node.args = tuple(args._replace(q=q, k=k, v=v, operands=operands, tables=tables, valid=valid))
    node.meta["placement"] = (queries, queries)
    for part in node.users:
        part.meta["placement"] = queries
        back = moved(program, part, Shard(2), part.next, made)
        part.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)


def _unmoved(node: fx.Node) -> fx.Node:
    source = node.args[0] if node.target is ops.redistribute else None
    return source if isinstance(source, fx.Node) and isinstance(placement(source), Shard) else node
