"""Strategies that spread heads over ranks instead of tokens."""

from __future__ import annotations

from torch import fx

from sp_compile import ops
from sp_compile.heads import head_lists
from sp_compile.integers import of_all_rows
from sp_compile.placements import NODE_ROWS, REPLICATE, Gathered, Heads, Replicate, Shard
from sp_compile.program import moved, placement
from sp_compile.rules.attention import of_heads
from sp_compile.strategies.base import Site, unmoved
from sp_compile.symbols import shape_of


def against_nodes(site: Site) -> str:
    """Why heads cannot be spread in nodes."""
    if site.program.nodes is None:
        return "there is no 2-D mesh; pass one of (nodes, ranks of a node), or ranks_per_node"
    return site.against_pairs()


def spread(site: Site) -> None:
    """``ulysses``: all rows of a rank's heads."""
    _spread(site, site.program.sp, "")


def spread_in_nodes(site: Site) -> None:
    """``hybrid``: queries of a node's rows, and keys and values of all rows, of a rank's heads."""
    assert site.program.nodes is not None
    _spread(site, site.program.nodes.size, NODE_ROWS)


def _spread(site: Site, ranks: int, of: str) -> None:
    args, node, program = site.args, site.node, site.program
    lists = head_lists(int(shape_of(args.q)[1]), int(shape_of(args.k)[1]), ranks)
    queries, keys = Heads(1, lists.queries, of), Heads(1, lists.keys)

    def brought(each: fx.Node, heads: Heads) -> fx.Node:
        source = each.args[0] if each.target is ops.redistribute else each
        assert isinstance(source, fx.Node)
        if placement(source) != Shard(2):  # whole on every rank, or in an order of its own
            whole = source if isinstance(placement(source), Replicate) else site.moved(each, REPLICATE)
            source = site.moved(whole, Gathered(2, heads.of))
        return site.moved(source, heads)

    q, k, v = brought(args.q, queries), brought(args.k, keys), brought(args.v, keys)
    operands, tables = [], []
    for each in args.operands:
        whole = of_all_rows(program, each, node, site.made.whole) or unmoved(each)
        for placed in of_heads(each, args, queries):
            whole = site.moved(whole, placed)
        operands.append(whole)
    for each in args.tables:
        per_head = shape_of(each)[0] != 1
        tables.append(site.moved(each, Heads(0, lists.queries)) if per_head else each)
    valid = program.index_input("gathered_valid")
    node.args = tuple(args._replace(q=q, k=k, v=v, operands=operands, tables=tables, valid=valid))
    node.meta["placement"] = (queries, queries)
    for part in node.users:
        part.meta["placement"] = queries
        back = moved(program, part, Shard(2), part.next, site.made.moved)
        part.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
