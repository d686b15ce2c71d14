"""Where on the way to keys and values the fewest bytes cross: themselves, or what they are computed from.

What is gathered earlier is computed from on every rank, for all rows that it gets. Each value on the way is gathered at
the price of its bytes, or computed anew at the price of its operations, or not needed on other ranks at all; the
cheapest choice is a minimum cut between the inputs of the graph and the keys and values::

    hidden state --> latent --> (norm) --> keys and values without rotation --> keys
        4,096 B       1,024 B               32,768 B                             ^
           \\--> rotary part, 128 B --> (rotation) -------------------------------/
                                          ^--- positions, known to every rank

Source of the cut: rematerialization in torch's min-cut partitioner, which trades memory in the same way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import networkx
from torch import fx

from sp_compile import ops
from sp_compile.capture import TOKEN_INPUTS
from sp_compile.collectives import is_product, is_start, is_wait, multiplications
from sp_compile.placements import Gathered, Replicate, Shard
from sp_compile.program import Program, insert_redistribute, placement
from sp_compile.rules import NoRule
from sp_compile.rules.gathered import through_dims
from sp_compile.symbols import is_tensor, known_size, tensors_of

OPERATIONS = 4  # that an element of any other op than a product is counted as
INPUTS, WANTED = "inputs", "keys and values"  # ends of the network
PRODUCTS_DEEP, NODES = 2, 200  # on the way back from keys and values


@dataclass
class Cuts:
    """Cuts of one graph; what they make for one attention serves the next.

    Attributes:
        program: whose graph is rewritten.
        operations_per_byte: of a rank, in the time in which a byte crosses.
    """

    program: Program
    operations_per_byte: float
    made: dict[tuple[fx.Node, str], fx.Node] = field(default_factory=dict)

    def move(self, gathers: list[fx.Node]) -> list[fx.Node]:
        """Gather what is cheapest in place of keys and values; what is gathered now.

        Args:
            gathers: redistributes of the rank's rows to one kind of ``Gathered``.
        """
        of = placement(gathers[0]).of
        sources: list[Any] = [each.args[0] for each in gathers]
        way = self._way(sources)
        cut, anew = self._cheapest(way, sources, of)
        if not anew:
            return gathers
        before, found = min(user for each in gathers for user in each.users), []
        for node in self.program.graph.nodes:
            if node in cut and (node, of) not in self.made:
                self.made[node, of] = self._gathered(node, of, before)
                found.append(self.made[node, of])
        for node in [*self.program.graph.nodes]:
            if node in anew and (node, of) not in self.made:
                self.made[node, of] = self._copied(node, of, before)
        for each, source in zip(gathers, sources, strict=True):
            if each is not self.made[source, of]:  # made for an attention before, which shares it
                each.replace_all_uses_with(self.made[source, of])
                self.program.graph.erase_node(each)
        return [each for each in found if isinstance(placement(each.args[0]), Shard)]

    def price(self, sources: list[fx.Node]) -> float:
        """Bytes of a token that it costs to have these on other ranks, what is computed anew counted as bytes too."""
        return float(networkx.minimum_cut_value(self._network(self._way(sources), sources, ""), INPUTS, WANTED))

    def _way(self, sources: Iterable[fx.Node]) -> dict[fx.Node, None]:
        """What keys and values are computed from, nearest first, as far back as may be worth it."""
        products = dict.fromkeys(sources, 0)  # on the way from each
        queue = deque(products)
        while queue and len(products) < NODES:
            node = queue.popleft()
            deep = products[node] + is_product(node)
            for each in node.all_input_nodes if deep <= PRODUCTS_DEEP and not _known(node) else ():
                if _spread(each) and each not in products:
                    products[each] = deep
                    queue.append(each)
        return dict.fromkeys(products)

    def _cheapest(
        self, way: dict[fx.Node, None], sources: Iterable[fx.Node], of: str
    ) -> tuple[set[fx.Node], set[fx.Node]]:
        """What to gather, and what to compute anew from it."""
        _, (_, needed) = networkx.minimum_cut(self._network(way, sources, of), INPUTS, WANTED)
        anew = {node for node in way if (node, "in") in needed}
        return {node for node in way if (node, "out") in needed} - anew, anew

    def _network(self, way: dict[fx.Node, None], sources: Iterable[fx.Node], of: str) -> Any:
        network = networkx.DiGraph()
        for node in way:
            network.add_edge((node, "in"), (node, "out"), **_capacity(self._bytes(node, of)))
            network.add_edge(INPUTS, (node, "in"), **_capacity(self._price(node, way)))
            for user in node.users:
                if user in way:
                    network.add_edge((node, "out"), (user, "in"))
        for each in sources:
            network.add_edge((each, "out"), WANTED)
        return network

    def _bytes(self, node: fx.Node, of: str) -> float:
        """Of one token, where the node's rows can be gathered."""
        if _is_text(node) or is_start(node):
            return math.inf
        if (node, of) in self.made or _known(node):
            return 0
        elements = self._per_token(node)
        if not is_tensor(node) or not _is_plain(placement(node)) or elements is None:
            return math.inf
        return elements * int(node.meta["val"].element_size())

    def _price(self, node: fx.Node, way: dict[fx.Node, None]) -> float:
        """Bytes that could cross in the time in which one token of the node is computed anew."""
        if node.target is getitem:
            return 0
        if is_start(node) or is_wait(node):  # between ranks of tensor parallelism
            return math.inf
        inputs = {each: placement(each) for each in node.all_input_nodes if is_tensor(each)}
        others = [each for each, held in inputs.items() if not isinstance(held, Replicate) and each not in way]
        elements = self._per_token(node)
        whole = all(isinstance(each, Replicate) for each in inputs.values())
        if node.op != "call_function" or node.target is ops.redistribute or others or whole or elements is None:
            return math.inf
        if not all(_is_plain(held) or isinstance(held, Replicate) for held in inputs.values()):
            return math.inf
        wanted = {each: Gathered(held.dim) if isinstance(held, Shard) else held for each, held in inputs.items()}
        try:
            if through_dims(node, self.program.tokens, wanted) != _placed_as(placement(node), ""):
                return math.inf
        except NoRule:
            return math.inf
        if is_product(node):
            return 2 * multiplications(node, lambda size: self._of_token(size) or 1) / self.operations_per_byte
        return OPERATIONS * elements / self.operations_per_byte

    def _per_token(self, node: fx.Node) -> int | None:
        """Elements of one token; None where that is no fixed number."""
        shapes = [[self._of_token(size) for size in each.shape] for each in tensors_of(node)]
        if any(None in sizes for sizes in shapes) or not all(
            isinstance(each, Shard) for each in _parts(placement(node))
        ):
            return None
        return sum(math.prod(size for size in sizes if size is not None) for sizes in shapes)

    def _of_token(self, size: Any) -> int | None:
        """A size for a batch of one token."""
        return known_size(size, {self.program.tokens: 1})

    def _gathered(self, node: fx.Node, of: str, before: fx.Node) -> fx.Node:
        source: Any = node.args[0] if _known(node) else node
        return insert_redistribute(self.program, source, Gathered(placement(node).dim, of), before)

    def _copied(self, node: fx.Node, of: str, before: fx.Node) -> fx.Node:
        with self.program.graph.inserting_before(before):
            new = self.program.graph.node_copy(node, lambda each: self.made.get((each, of), each))
        new.meta["placement"] = _placed_as(placement(node), of)
        return new


def _is_text(node: fx.Node) -> bool:
    """Whether it is the rank's rows of what the model reads: nothing is computed anew from there, through the model."""
    return _known(node) and getattr(node.args[0], "name", "") in TOKEN_INPUTS


def _known(node: fx.Node) -> bool:
    """Whether it is the rank's rows of what every rank has whole."""
    return node.target is ops.redistribute and isinstance(placement(node.args[0]), Replicate)


def _spread(node: fx.Node) -> bool:
    return bool(tensors_of(node)) and not all(isinstance(each, Replicate) for each in _parts(placement(node)))


def _parts(held: Any) -> tuple[Any, ...]:
    return held if isinstance(held, tuple) else (held,)


def _is_plain(held: Any) -> bool:
    """Whether it is the rank's rows and nothing else about them."""
    return isinstance(held, Shard) and held == Shard(held.dim)


def _placed_as(held: Any, of: str) -> Any:
    """The placement of what is computed from gathered rows, from that of what was computed from the rank's."""
    parts = tuple(Gathered(each.dim, of) for each in _parts(held))
    return parts if isinstance(held, tuple) else parts[0]


def _capacity(price: float) -> dict[str, float]:
    return {} if math.isinf(price) else {"capacity": price}
