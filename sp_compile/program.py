"""A captured model on its way through the pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from sp_compile.kernels.rates import Shape
from sp_compile.ledger import Window
from sp_compile.mesh import Nodes
from sp_compile.needs import Fetch
from sp_compile.placements import LOCAL_ROWS, NODE_ROWS, REPLICATE, Gathered, Heads, Placement
from sp_compile.symbols import computed, is_float, length_input, tensors_of, token_dims

INDEX_INPUTS = ("local_index", "local_valid", "gathered_index", "gathered_valid", "restore_index", "rank",
                "request_index", "request_start", "new_rows", "kept_rows", "node_index", "node_rank",
                "seed")  # fmt: skip
# the tensors of a cache, what is where on a shelf, and which queries and keys go to each other; what a reach fetches
NUMBERED = re.compile(
    r"(held|held_index|held_valid|held_runs|picked_queries|picked_past|queries_index|merged_rows"
    r"|seen_index|seen_valid|fetch_rows|fetch_counts|fetched_rows|reach_index|reach_valid|stage_index|stage_valid)_\d+"
)


@dataclass(frozen=True)
class Fallback:
    """Ops that could not be done as they should: on gathered inputs, not raised, not lifted, by a slower kernel.

    Attributes:
        op, source: the first one, and the model's line that it comes from.
        count: how many there are with this reason, in other layers too.
        bytes: what the gathers of one bring to one rank, for the length that the model was captured at.
        reason: why.
    """

    op: str
    count: int
    bytes: int
    source: str
    reason: str


@dataclass
class Program:
    """One FX graph and what the passes know about it.

    Attributes:
        gm: the graph module; placeholders are the model's parameters and inputs, then the index inputs in use.
        tokens: symbol of the token length in global shapes; None when the length is fixed or nothing is sharded.
        sp: number of ranks.
        group_name: process group of the collectives.
        token_inputs: placeholders whose rows are cut to the rank's, with their token dim.
        outputs: ``full``, ``sharded`` or ``loss``.
        isolated: made for packed batches that the model itself would mix.
        counted: requests are apart, and ``position_ids`` count the tokens of each.
        short: rows of a rank that follow one another are few, so that its scores are many small parts.
        strategies: those of each attention that suit the batch, where the pipeline says ``auto``.
        cached: keys and values are kept for later calls (``first``), and those of earlier calls seen too: where they
            are, by any number of new tokens (``more``) or by one of each request (``decode``), or of some requests
            where the new tokens are (``mixed``).
        cache_dtype: of kept keys and values; None for the model's own.
        kept: windows of the keys and values to keep, which are the outputs' end; None for all tokens.
        query_bytes: of one token's queries on their way to earlier keys and of what comes back, in all layers of a
            window.
        nodes: the ranks of each node and their groups, where the mesh has two dims.
        operations_per_byte: what a rank computes while a byte reaches it.
        ran_by: the strategy of each attention.
        fetches: what ranks fetch, for each kind of attention that does.
        isolation: what was done to keep their requests apart.
        device: the kind that code is for, where that is not the model's own.
        fused_is_faster: whether torch's fused kernels beat generated code, in agreement with the other ranks; never,
            where nobody said.
        compiled: whether code is generated for the graph, or it runs as it is.
        differentiable: whether torch records gradients of its inputs.
        fallbacks: what could not be done as it should.
        local_inputs: fake inputs of the local graph, once shapes are local.
        symbols: sizes of the local graph by name: ``tokens``, ``shard_length``.
        hints: example values for them, where code must fit certain sizes.
    """

    gm: fx.GraphModule
    tokens: sympy.Symbol | None
    sp: int
    group_name: str
    token_inputs: dict[str, int]
    outputs: str = "full"
    isolated: bool = False
    counted: bool = False
    short: bool = False
    strategies: tuple[str, ...] = ()
    cached: str = ""
    cache_dtype: torch.dtype | None = None
    kept: tuple[Window, ...] = ()
    query_bytes: dict[Window, int] = field(default_factory=dict)
    nodes: Nodes | None = None
    operations_per_byte: float = 0.0
    ran_by: list[str] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)
    isolation: str = ""
    device: str = ""
    fused_is_faster: Callable[[Shape], bool] = lambda shape: False
    compiled: bool = True
    differentiable: bool = False
    fallbacks: list[Fallback] = field(default_factory=list)
    local_inputs: list[Any] | None = None
    symbols: dict[str, torch.SymInt] = field(default_factory=dict)
    hints: Mapping[str, int] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph being rewritten."""
        return self.gm.graph

    @property
    def parallel(self) -> bool:
        """Whether anything is sharded at all."""
        return (self.sp > 1 or bool(self.cached)) and self.tokens is not None

    @property
    def steps(self) -> bool:
        """Whether all new queries see earlier keys where those are."""
        return self.cached in ("more", "decode")

    @property
    def splits_losses(self) -> bool:
        """Whether losses are computed row by row: for ranks to have their own, or for logits that are dropped."""
        return self.parallel or self.outputs == "loss"

    @property
    def tensor_groups(self) -> dict[str, int]:
        """Groups that weights are cut over by ``torch.distributed.tensor.parallel``, with how many ranks each has."""
        found = (each.meta.get("tensor_group") for each in self.graph.find_nodes(op="placeholder"))
        return dict(each for each in found if each is not None)

    def length_input(self) -> fx.Node | None:
        """The placeholder that is the global token length."""
        return length_input(self.graph, self.tokens)

    def device_kind(self, node: fx.Node) -> str:
        """The kind of device that code for a node is for."""
        return self.device or str(node.meta["val"].device.type)

    def remove_dead_code(self) -> None:
        """Remove what nobody reads, ops that draw random numbers included."""
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure(impure_random=False))

    def record(self, node: fx.Node, reason: str) -> None:
        """Note what could not be done as it should; layers with the same reason are one entry."""
        same = Fallback(op_name(node), 1, 0, source_line(node), reason)
        for i, each in enumerate(self.fallbacks):
            if replace(each, count=1) == same:
                self.fallbacks[i] = replace(each, count=each.count + 1)
                return
        self.fallbacks.append(same)

    def index_input(self, name: str) -> fx.Node:
        """The placeholder of one of :data:`INDEX_INPUTS` or :data:`NUMBERED`, added at its first use."""
        assert name in INDEX_INPUTS or NUMBERED.fullmatch(name), name
        last = None
        for node in self.graph.nodes:
            if node.op != "placeholder":
                break
            if node.meta.get("index_input") == name:
                return node
            last = node
        with self.graph.inserting_after(last) if last is not None else self.graph.inserting_before():
            node = self.graph.placeholder(name)
        node.meta.update(index_input=name, placement=REPLICATE)
        return node


def uncut_tokens(program: Program) -> list[tuple[fx.Node, int, list[fx.Node]]]:
    """Token inputs or integers computed from them, with their token dim and the users that make floats of them."""
    whole: dict[fx.Node, int | None] = {}
    found = []
    for node in program.graph.nodes:
        is_input = node.op == "placeholder" and node.name in program.token_inputs
        if is_input:
            whole[node] = program.token_inputs[node.name]
        elif node.op != "call_function" or not tensors_of(node) or whole.keys().isdisjoint(node.all_input_nodes):
            continue
        elif not is_float(node) and op_name(node) != "redistribute":
            dims = token_dims(node, program.tokens)
            whole[node] = next(iter(dims)) if list(dims.values()) == [1] else None
    for node, dim in whole.items():
        users = [user for user in node.users if tensors_of(user) and op_name(user) != "redistribute"]
        users = [user for user in users if (is_float(node) or is_float(user)) and "fallback" not in user.meta]
        if users and dim is not None:
            found.append((node, dim, users))
    return found


def placement(node: fx.Node) -> Any:
    """The node's placement; values without one are replicated."""
    return node.meta.get("placement", REPLICATE)


def gathered_index(gathered: Placement) -> str:
    """The index input that says which rows of the whole row are gathered; without ranks all are."""
    of = gathered.of if isinstance(gathered, Gathered | Heads) else ""
    if of in (LOCAL_ROWS, NODE_ROWS):
        return f"{of}_index"
    what, _, shelf = of.rpartition("_")
    return f"{what}_index_{shelf}" if of else "gathered_index"


def gathered_valid(gathered: Gathered) -> str:
    """The index input that says which of the gathered rows are tokens."""
    return gathered_index(gathered).replace("index", "valid")


def source_line(node: fx.Node) -> str:
    """``file:line`` in the model's own code that the node comes from, or an empty string."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if not lines:
        return ""
    path, _, rest = lines[-1].removeprefix('File "').partition('", line ')
    return f"{'/'.join(path.split('/')[-2:])}:{rest.split(',')[0]}"


def op_name(node: fx.Node) -> str:
    """Short name of what the node calls: ``aten.linear``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    return getattr(target, "__name__", str(target))


def add_call(graph: fx.Graph, target: Any, args: Sequence[Any], placed: Any, like: fx.Node | None = None) -> fx.Node:
    """A new call where the graph inserts, with its value and placement; from the source line of ``like``."""
    node = computed(graph, target, args)
    node.meta.update(placement=placed, stack_trace=None if like is None else like.meta.get("stack_trace"))
    return node


def insert_redistribute(program: Program, node: fx.Node, target: Placement, before: fx.Node) -> fx.Node:
    """Add a change of ``node`` to ``target`` in front of ``before``; the identity in the global view."""
    from sp_compile import ops

    with program.graph.inserting_before(before):
        new = program.graph.call_function(ops.redistribute, (node,))
    new.meta.update(val=node.meta["val"], placement=target, stack_trace=before.meta.get("stack_trace"))
    return new


def moved(
    program: Program, node: fx.Node, target: Placement, before: fx.Node, made: dict[tuple[fx.Node, Placement], fx.Node]
) -> fx.Node:
    """``node`` as ``target``: by a redistribute in front of ``before``, made once and noted in ``made``."""
    if placement(node) == target:
        return node
    if (node, target) not in made:
        made[node, target] = insert_redistribute(program, node, target, before)
    return made[node, target]
