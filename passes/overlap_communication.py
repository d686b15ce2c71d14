"""Begin every collective as early, and wait for it as late, as the data flow lets it; compute in between.

Requires: ``lowered``, ``local_shapes``.
Establishes: ``overlapped``.

What a collective needs is computed before what it does not need, and a wait stands right before the first product or
attention that needs what came. No more than ``in_flight`` collectives travel at a time, so that memory holds as
many blocks of a ring and the first is not held up by the others.

Before::

    %q = aten.linear(%x, %w_q); %kv = aten.linear(%x, %w_kv)
    %all = c10d.all_gather_into_tensor(%kv, 2, 'sp'); %wait = c10d.wait_tensor(%all)
    %rotated = aten.mul(%q, %cos); %attention = sp_compile.attention(%rotated, %wait, ...)

After::

    %kv = aten.linear(%x, %w_kv)
    %all = c10d.all_gather_into_tensor(%kv, 2, 'sp')
    %q = aten.linear(%x, %w_q); %rotated = aten.mul(%q, %cos)
    %wait = c10d.wait_tensor(%all); %attention = sp_compile.attention(%rotated, %wait, ...)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sp_compile.collectives import EXCHANGE, depends, is_start, is_wait, reading_order
from sp_compile.errors import ConfigError
from sp_compile.invariants import LOCAL, LOWERED, OVERLAPPED
from sp_compile.pipeline import Pass
from sp_compile.program import Program


@dataclass(frozen=True)
class OverlapCommunication(Pass):
    """Collectives early, waits late.

    Attributes:
        in_flight: collectives that travel at a time, at least 1.
    """

    name = "overlap_communication"
    requires = (LOWERED, LOCAL)
    establishes = (OVERLAPPED,)

    in_flight: int = 2

    def __post_init__(self) -> None:
        if self.in_flight < 1:
            raise ConfigError(f"in_flight={self.in_flight} collectives at a time are too few; pass at least 1")

    def run(self, program: Program) -> None:
        """Rewrite in place."""
        if not any(map(is_start, program.graph.nodes)):
            return
        last = started = None
        for node in _ordered(program.graph, self.in_flight):
            if last is not None:
                last.append(node)
            last = node
            if is_start(node):
                # what it depends on anyway need not be named, and would be held until then
                if node.target is EXCHANGE and started is not None and not depends(node, started):
                    node.args = (*node.args, started)
                started = node


def _ordered(graph: fx.Graph, in_flight: int) -> list[fx.Node]:
    """All nodes but the inputs: those that a collective needs before it, then the next."""
    order = reading_order(graph)
    by_reader = sorted(graph.nodes, key=order.__getitem__)
    done: dict[fx.Node, None] = dict.fromkeys(graph.find_nodes(op="placeholder"))
    inputs = len(done)
    travelling: list[fx.Node] = []

    def needed(target: fx.Node) -> set[fx.Node]:
        found, stack = {target}, [target]
        while stack:
            for each in stack.pop().all_input_nodes:
                if each not in found and each not in done:
                    found.add(each)
                    stack.append(each)
        return found - done.keys()

    def emit(nodes: set[fx.Node]) -> None:
        done.update(dict.fromkeys(sorted(nodes, key=order.__getitem__)))

    starts = [node for node in graph.nodes if is_start(node)]
    for node in sorted(starts, key=lambda node: min(order[wait] for wait in node.users)):
        emit(needed(node) - {node})
        travelling = [wait for wait in travelling if wait not in done]
        while len(travelling) >= in_flight:
            wait = min(travelling, key=order.__getitem__)
            travelling.remove(wait)
            for each in by_reader[: by_reader.index(wait)]:  # what can be done meanwhile
                before = needed(each)
                if not any(is_start(need) or is_wait(need) for need in before):
                    emit(before)
            emit(needed(wait))
        emit({node})
        travelling += filter(is_wait, node.users)
    emit({*graph.nodes} - done.keys())
    return [*done][inputs:]
