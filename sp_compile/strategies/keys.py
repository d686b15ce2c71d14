"""Strategies that bring keys and values to the queries."""

from __future__ import annotations

from torch import fx

from sp_compile.needs import Fetch
from sp_compile.placements import LOCAL_ROWS, Gathered, QueriesByKeys, Shard
from sp_compile.program import gathered_valid, placement
from sp_compile.strategies.base import Site, unmoved
from sp_compile.symbols import shape_of
from sp_compile.windows import reach_of


def all_gathered(site: Site) -> None:
    """``allgather_kv``."""
    bring(site, Gathered(2))


def local(site: Site) -> None:
    """``local``."""
    bring(site, Gathered(2, LOCAL_ROWS))


def fetched(site: Site) -> None:
    """``fetch`` and ``window``."""
    bring(site, fetched_keys(site, Fetch(site.reach)))


def against_window(site: Site) -> str:
    """Why there is no halo to fetch."""
    if site.reach.back is not None:
        return ""
    seen = reach_of(site.node, site.program.tokens, site.program.counted).back
    if seen is None:
        return "the mask's rule sets no bound on how far back a query sees"
    return f"a row that sees nothing of its window of {seen} gets the mean of all values"


def fetched_keys(site: Site, fetch: Fetch) -> Gathered:
    """The placement of what is fetched, counted among the program's fetches."""
    fetches = site.program.fetches
    if fetch not in fetches:
        fetches.append(fetch)
    return Gathered(2, f"{fetch.kind}_{fetches.index(fetch)}")


def bring(site: Site, keys: Gathered) -> None:
    """Let the attention run over keys and values that are placed so, and what masks them."""
    args = site.args
    tokens = shape_of(args.k)[2]

    def ordered(each: fx.Node) -> fx.Node:
        rank = len(shape_of(each))
        if rank < 1 or shape_of(each)[-1] != tokens:
            return each
        both = isinstance(placement(each), Shard)
        target = QueriesByKeys(rank - 2, rank - 1, keys.of) if both else Gathered(rank - 1, keys.of)
        return site.moved(each, target)

    k, v = (site.moved(unmoved(each), keys) for each in (args.k, args.v))
    operands = [ordered(each) for each in args.operands]
    valid = site.program.index_input(gathered_valid(keys))
    site.node.args = tuple(args._replace(k=k, v=v, operands=operands, valid=valid))
