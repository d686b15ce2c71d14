"""The strategy ``ring``: attention to one rank's keys while the next rank's travel."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from operator import getitem

import torch
from torch import fx

from sp_compile import ops
from sp_compile.needs import Fetch, Reach, ring_stages
from sp_compile.placements import LOCAL_ROWS, Gathered, Shard
from sp_compile.program import add_call
from sp_compile.strategies.base import Site
from sp_compile.strategies.keys import bring, fetched_keys

aten = torch.ops.aten


def against(site: Site) -> str:
    """Why keys cannot come in stages."""
    if site.args.empty_mean and site.reach == Reach(None, None):
        return "a row that may see nothing gets the mean of all values"
    return site.against_pairs()


def ringed(site: Site) -> None:
    """The rank's own keys first, then stage by stage those of the others, merged as they come."""
    program, own = site.program, site.node
    fetches = [Fetch(site.reach, stage) for stage in ring_stages(program.sp)]
    before, dtype = own.next, own.meta["val"][0].dtype
    readers = {i: [user for user in own.users if user.args[1] == i] for i in range(2)}
    stages = [own]
    for _ in fetches:
        with program.graph.inserting_before(before):
            stages.append(program.graph.node_copy(own))
    for stage, keys in zip(
        stages, [Gathered(2, LOCAL_ROWS), *(fetched_keys(site, each) for each in fetches)], strict=True
    ):
        bring(replace(site, node=stage), keys)
        stage.args = tuple(ops.AttentionArgs(*stage.args)._replace(empty_mean=False, partial=True))
        out, lse = stage.meta["val"]
        stage.meta["val"] = out.to(lse.dtype), lse

    def add(target: object, *args: object, placed: object = Shard(2), before: fx.Node = before) -> fx.Node:
        with program.graph.inserting_before(before):
            return add_call(program.graph, target, args, placed, like=own)

    merged = [add(getitem, own, i, before=stages[1]) for i in range(2)]
    for stage, following in zip(stages[1:], [*stages[2:], before], strict=True):  # a part is gone before the next comes
        add_here = partial(add, before=following)
        parts = [add_here(aten.unsqueeze.default, add_here(getitem, stage, i), 0, placed=Shard(3)) for i in range(2)]
        both = add_here(ops.merge_partials, *merged, *parts, placed=(Shard(2), Shard(2)))
        merged = [add_here(getitem, both, i) for i in range(2)]
    whole = [add(aten.to.dtype, merged[0], dtype), merged[1]]
    for i, users in readers.items():
        for user in users:
            user.replace_all_uses_with(whole[i])
