"""Ops that rename, merge, split or reorder dims without computing."""

from __future__ import annotations

from dataclasses import replace

import sympy
from torch import fx

from sp_compile.placements import REPLICATE, Partial, Placement, Shard
from sp_compile.rules.base import Call, NoRule, Outcome, only_input, output_shape, rank_of
from sp_compile.rules.select import select_rows
from sp_compile.symbols import coefficient, product, shape_of


def view(call: Call) -> Outcome:
    """Find the output dim that holds the token rows, by the sizes to their left and right."""
    source = call.node.args[0]
    placement = only_input(call, source)
    return Outcome(reshaped(placement, shape_of(source), output_shape(call.node), call.tokens))


def reshaped(
    placement: Shard, before: tuple[sympy.Expr, ...], after: tuple[sympy.Expr, ...], tokens: sympy.Symbol
) -> Shard:
    """Where rows sharded in shape ``before`` lie in shape ``after`` of the same elements."""
    left = product(before[: placement.dim]) * placement.outer
    right = product(before[placement.dim + 1 :]) * placement.inner
    for dim, size in enumerate(after):
        times = coefficient(size, tokens)
        outer = left / product(after[:dim])
        inner = right / product(after[dim + 1 :])
        if times and outer.is_Integer and inner.is_Integer and outer * inner == times:
            found = Shard(dim, int(outer), int(inner), placement.order)
            same = (found.outer, found.inner) == (placement.outer, placement.inner)
            if not same and (placement.order or placement.rows):
                raise NoRule("rows in a rank's own order cannot be regrouped")
            return replace(found, rows=placement.rows, of=placement.of) if same else found
    raise NoRule(f"no dim of {list(after)} holds the token rows of {list(before)}")


def expand(call: Call) -> Outcome:
    """New dims come in front; a size-1 dim may be expanded to the token length."""
    source = call.node.args[0]
    assert isinstance(source, fx.Node)
    placement, added = call.shard(source), len(output_shape(call.node)) - rank_of(source)
    if placement is not None:
        return Outcome(placement.at(placement.dim + added))
    wanted = _wanted(call, call.desired)
    dim = wanted.dim - added
    if dim >= 0 and shape_of(source)[dim] != 1:
        return Outcome(wanted, {source: wanted.at(dim)})
    return Outcome(wanted, {source: REPLICATE})


def creation(call: Call) -> Outcome:
    """A constant fill has the same rows everywhere: cut to the rank's rows when a consumer wants them."""
    if call.desired is None:
        return Outcome(REPLICATE)
    _wanted(call, replace(call.desired, order=""))
    return Outcome(call.desired)


def _wanted(call: Call, shard: Shard | None) -> Shard:
    if shard is None:
        raise NoRule("no input is sharded")
    if shard.order or coefficient(output_shape(call.node)[shard.dim], call.tokens) != shard.outer * shard.inner:
        raise NoRule("the output does not have the wanted rows")
    return shard


def permute(call: Call) -> Outcome:
    """Dims are renamed (``permute``, ``transpose``, ``t``, ``movedim``)."""
    source = call.node.args[0]
    placement = only_input(call, source)
    order = _dim_order(call, rank_of(source))
    return Outcome(placement.at(order.index(placement.dim)))


def _dim_order(call: Call, rank: int) -> list[int]:
    name = call.node.target._schema.name
    arguments, order = call.arguments(), list(range(rank))
    if name == "aten::permute":
        return [dim % rank for dim in arguments["dims"]]
    if name in ("aten::transpose", "aten::swapaxes"):
        first, second = (arguments[each] for each in arguments if each not in ("self",))
        order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
        return order
    return order[::-1]


def unsqueeze(call: Call) -> Outcome:
    """A new dim of size 1."""
    source, dim = call.node.args[0], int(call.node.args[1])
    placement = only_input(call, source)
    dim %= rank_of(source) + 1
    return Outcome(replace(placement, dim=placement.dim + (dim <= placement.dim)))


def squeeze(call: Call) -> Outcome:
    """Dims of size 1 go; the token dim never does."""
    source = call.node.args[0]
    if isinstance(call.placed[source], Partial):
        return Outcome(call.placed[source])
    placement = only_input(call, source)
    sizes = shape_of(source)
    dims = call.arguments().get("dim")
    dims = range(len(sizes)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % len(sizes) for dim in dims if sizes[dim % len(sizes)] == 1}
    return Outcome(replace(placement, dim=placement.dim - sum(dim < placement.dim for dim in gone)))


def select(call: Call) -> Outcome:
    """One index of a dim; of the token dim, the row is brought from its rank."""
    source, dim, index = call.node.args[:3]
    placement = only_input(call, source)
    dim = int(dim) % rank_of(source)
    if dim == placement.dim:
        return select_rows(call, source, dim, index, squeeze=True)
    return Outcome(placement.at(placement.dim - (dim < placement.dim)))


def slice_(call: Call) -> Outcome:
    """A range of a dim; of the token dim, a fixed number of rows is brought from their ranks."""
    values = call.arguments()
    source, dim = values["self"], values["dim"] % rank_of(values["self"])
    placement = only_input(call, source)
    if dim == placement.dim:
        return select_rows(call, source, dim, slice(values["start"], values["end"], values["step"]))
    return Outcome(placement.at(placement.dim))


def size(call: Call) -> Outcome:
    """The size of another dim than the tokens', which is the same on every rank."""
    source, dim = call.node.args[:2]
    if int(dim) % rank_of(source) == only_input(call, source).dim:
        raise NoRule("reads the size of a merged token dim")
    return Outcome(REPLICATE)


def complex_pairs(call: Call) -> Outcome:
    """The last dim of size 2 becomes complex, or the other way round."""
    source = call.node.args[0]
    placement = only_input(call, source)
    if placement.dim >= min(rank_of(source), len(output_shape(call.node))):
        raise NoRule("the token dim holds real and imaginary parts")
    return Outcome(placement.at(placement.dim))


def split(call: Call) -> Outcome:
    """Parts along another dim than the tokens' (``split``, ``chunk``, ``split_with_sizes``)."""
    values = call.arguments()
    source = values["self"]
    placement = only_input(call, source)
    if values["dim"] % rank_of(source) == placement.dim:
        raise NoRule("splits the token dim")
    return Outcome((placement.at(placement.dim),) * len(call.node.meta["val"]))


def unbind(call: Call) -> Outcome:
    """One tensor per index of another dim than the tokens'."""
    values = call.arguments()
    source = values["self"]
    placement = only_input(call, source)
    dim = values["dim"] % rank_of(source)
    if dim == placement.dim:
        raise NoRule("takes the token dim apart")
    return Outcome((placement.at(placement.dim - (dim < placement.dim)),) * len(call.node.meta["val"]))


def cat(call: Call) -> Outcome:
    """Tensors side by side along another dim than the tokens'."""
    values = call.arguments()
    return _together(call, values["tensors"], values["dim"], new_dim=False)


def stack(call: Call) -> Outcome:
    """Tensors along a new dim."""
    values = call.arguments()
    return _together(call, values["tensors"], values["dim"], new_dim=True)


def _together(call: Call, tensors: list[fx.Node], dim: int, new_dim: bool) -> Outcome:
    dim %= len(output_shape(call.node))
    model = call.first_shard()
    if not new_dim and dim == model.dim:
        raise NoRule("concatenates along the token dim")
    needs: dict[fx.Node, Placement] = {node: model.at(model.dim) for node in tensors}
    return Outcome(model.at(model.dim + (new_dim and dim <= model.dim)), needs)


def repeat(call: Call) -> Outcome:
    """Whole copies along dims; copies along the token dim lie outside of it."""
    source, times = call.node.args[0], list(call.node.args[1])
    placement = only_input(call, source)
    dim = placement.dim + len(times) - rank_of(source)
    if not isinstance(times[dim], int):
        raise NoRule("repeats the token dim a symbolic number of times")
    return Outcome(Shard(dim, placement.outer * times[dim], placement.inner, placement.order))


def repeat_interleave(call: Call) -> Outcome:
    """Copies element by element; copies along the token dim lie inside of it."""
    values = call.arguments()
    source, dim = values.get("self"), values.get("dim")
    placement = only_input(call, source)
    if dim is None:
        raise NoRule("flattens the token dim")
    if not isinstance(values["repeats"], int):
        raise NoRule("repeats a number of times that is not a constant")
    if dim % rank_of(source) != placement.dim:
        return Outcome(placement.at(placement.dim))
    return Outcome(Shard(placement.dim, placement.outer, placement.inner * values["repeats"], placement.order))


def pad(call: Call) -> Outcome:
    """Padding of other dims than the tokens'."""
    source, widths = call.node.args[0], list(call.node.args[1])
    placement = only_input(call, source)
    from_right = rank_of(source) - 1 - placement.dim
    if any(width != 0 for width in widths[2 * from_right : 2 * from_right + 2]):
        raise NoRule("pads the token dim")
    return Outcome(placement.at(placement.dim))


def slice_scatter(call: Call) -> Outcome:
    """Another tensor written over a range or an index of another dim than the tokens'."""
    values = call.arguments()
    into, source, dim = values["self"], values["src"], values["dim"] % rank_of(values["self"])
    dropped = rank_of(into) - rank_of(source)
    for node in (into, source):
        placement = call.shard(node)
        if placement is None:
            continue
        at = placement.dim + (node is source and dropped and dim <= placement.dim)
        if at == dim:
            raise NoRule("writes over part of the token dim")
        target = placement.at(at)
        return Outcome(target, {into: target, source: target.at(at - (1 if dropped and dim < at else 0))})
    raise NoRule("no input is sharded")
