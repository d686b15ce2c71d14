"""Entries that are read out of tables by an index of queries and keys.

``bias[bucket(k - q), h]``, ``embedding(bucket, weight)``, ``stored_mask[:, :, :T, :T]``: the table is small, or is held
whole anyway, and its index is a rule over row vectors, so the bias of all queries by all keys need not be built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from sp_compile.raising.axes import Dims, held_dims, new_dims, resolved, shape_of
from sp_compile.symbols import is_tensor, product

if TYPE_CHECKING:
    from sp_compile.raising.lift import Lifter

aten = torch.ops.aten


class NotLifted(Exception):
    """Why an op cannot become part of a rule."""


def embedding(lifter: Lifter, node: fx.Node, dims: Dims) -> Any:
    """Rows of a table, one entry a head (or one in all)."""
    weight, index = node.args[:2]
    return _read(lifter, weight, [(index, dims[:-1]), dims[-1]], wraps=False)


def indexed(lifter: Lifter, node: fx.Node, dims: Dims) -> Any:
    """``base[i, :, j]``: index tensors broadcast together, and whole dims."""
    base, parts = _parts_of_index(node, dims)
    return _read(lifter, base, parts, wraps=True)


def read_in_order(node: fx.Node) -> tuple[fx.Node, Dims, Dims] | None:
    """A value that is indexed by all its row numbers in order, with its dims and those of the result; else None."""
    if node.target is not aten.index.Tensor or not is_tensor(node):
        return None
    dims = new_dims(shape_of(node))
    try:
        base, parts = _parts_of_index(node, dims)
    except NotLifted:
        return None
    own = tuple(_whole(part, size) for part, size in zip(parts, shape_of(base), strict=True))
    read = [atom for atoms in own if atoms is not None for atom in atoms]
    if None in own or len(set(read)) < len(read):
        return None
    return (base, own, dims) if set(read) == {atom for each in dims for atom in each} else None


def _parts_of_index(node: fx.Node, dims: Dims) -> tuple[fx.Node, list[Any]]:
    """What each dim of the indexed value is read by: an index with its dims, or all of it with its dims."""
    base: Any = node.args[0]
    indices: list[Any]
    if node.target is aten.index.Tensor:
        indices = list(node.args[1])
    else:
        at = node.args[1] % len(shape_of(base))
        indices = [None] * at + [node.args[2]]
    indices += [None] * (len(shape_of(base)) - len(indices))
    at = [i for i, each in enumerate(indices) if each is not None]
    if any(each.meta["val"].dtype == torch.bool for each in indices if each is not None):
        raise NotLifted("an index by a bool mask")
    width = max(len(shape_of(indices[i])) for i in at)
    adjacent = at == list(range(at[0], at[-1] + 1))
    start = at[0] if adjacent else 0
    shared, rest = dims[start : start + width], list(dims[:start] + dims[start + width :])
    return base, [rest.pop(0) if each is None else (each, shared) for each in indices]


def sliced(lifter: Lifter, node: fx.Node, dims: Dims) -> Any:
    """The corner of a stored matrix: slices and selections, one after the other."""
    base, own = node, list(dims)
    reads: list[Any] = [None] * len(dims)
    while base.target in (aten.slice.Tensor, aten.select.int):
        source: Any = base.args[0]
        dim, at = base.args[1] % len(shape_of(source)), (*base.args, 0, 0)[2]
        if base.target is aten.select.int:
            own.insert(dim, ())
            reads.insert(dim, at)
        else:
            step = base.args[4] if len(base.args) > 4 else 1
            if reads[dim] is not None or step != 1:
                raise NotLifted("slices of slices")
            reads[dim] = at or 0
        base = source
    if not all(isinstance(each, int) for each in reads if each is not None):
        raise NotLifted("a slice that starts at a symbolic row")
    parts = [_rows_from(lifter, atoms, at, size) for atoms, at, size in zip(own, reads, shape_of(base), strict=True)]
    return _read(lifter, base, parts, wraps=False)


def _rows_from(lifter: Lifter, atoms: Any, at: int | None, size: sympy.Expr) -> Any:
    """How a dim is read: by a rule for rows of queries or keys, or as a whole."""
    if at is not None and at < 0:
        if not size.is_Integer:
            raise NotLifted("a slice that is counted from a symbolic end")
        at += int(size)
    for of_keys, atom in ((False, lifter.frame.queries), (True, lifter.frame.keys)):
        if atoms == (atom,) and size != atom.size:
            rows = lifter.rows(of_keys)
            return lifter.call("add", rows, at) if at else rows
    if at and not atoms:
        return at
    if at or product([atom.size for atom in atoms]) != size:
        return atoms if atoms == () and size == 1 else (0 if atoms == () else _no_part())
    return atoms


def _no_part() -> Any:
    raise NotLifted("a slice of the heads or the batch")


def _read(lifter: Lifter, base: fx.Node, parts: Sequence[Any], wraps: bool) -> Any:
    """Entries of ``base``; each of its dims is read whole (dims), by a rule's value, or by an index node."""
    sizes = shape_of(base)
    whole = [_whole(part, size) for part, size in zip(parts, sizes, strict=True)]
    read = [atom for own in whole if own is not None for atom in own]
    if len(set(read)) < len(read):
        raise NotLifted(f"the diagonal of %{base.name}")
    if None not in whole:
        return lifter.lift(base, tuple(whole))
    if any(not size.is_Integer for size in sizes):
        raise NotLifted(f"a table %{base.name} that grows with the tokens, read by a computed index")
    values = [None if own is not None else _index(lifter, part, int(size), wraps)
              for own, part, size in zip(whole, parts, sizes, strict=True)]  # fmt: skip
    heads = resolved(lifter.frame.heads)
    if read and tuple(read) != heads:
        raise NotLifted(f"a table %{base.name} with other dims than the heads and what is looked up")
    order = [i for i, value in enumerate(values) if value is None] + [
        i for i, value in enumerate(values) if value is not None
    ]
    if order != sorted(order):
        base = lifter.insert.call(aten.permute.default, base, order)
    entries = product([size for size, value in zip(sizes, values, strict=True) if value is not None])
    table = lifter.insert.reshape(base, (product([atom.size for atom in read]), entries))
    flat: Any = None
    for size, value in zip(sizes, values, strict=True):
        if value is not None:
            flat = value if flat is None else _plus(lifter, _times(lifter, flat, int(size)), value)
    found = lifter.call("lookup", lifter.table(table), flat)
    if table.meta["val"].dtype == torch.bool:
        lifter.terms.zero_one.add(found)
    return found


def _times(lifter: Lifter, value: Any, size: int) -> Any:
    return lifter.call("mul", value, size) if isinstance(value, str) else value * size


def _plus(lifter: Lifter, left: Any, right: Any) -> Any:
    return left + right if not isinstance(left, str) and not isinstance(right, str) else lifter.call("add", left, right)


def _index(lifter: Lifter, part: Any, size: int, wraps: bool) -> Any:
    """The rule for one index; a negative one counts from the end."""
    if not isinstance(part, tuple):
        return part
    node, dims = part
    own = held_dims(node, dims)
    heads = set(resolved(lifter.frame.heads))
    if own is None or any(atom in heads for atoms in own for atom in atoms):
        raise NotLifted(f"an index %{node.name} that is another for each head")
    value = lifter.lift(node, dims)
    if isinstance(value, (int, float)):
        return int(value) % size
    if not wraps:
        return value
    return lifter.call("where", lifter.call("lt", value, 0), lifter.call("add", value, size), value)


def _whole(part: Any, size: sympy.Expr) -> Any:
    """The dims along which all rows are read in order, if so."""
    if not isinstance(part, tuple):
        return None
    if not part or not isinstance(part[0], fx.Node):
        return part
    node, dims = part
    own = held_dims(node, dims)
    atoms = () if own is None else tuple(atom for each in own for atom in each)
    if product([atom.size for atom in atoms]) != size:
        return None
    return atoms if _is_row_numbers(node, size) else None


def _is_row_numbers(node: fx.Node, size: sympy.Expr) -> bool:
    """Whether the node holds 0 .. size - 1 along its only dim."""
    while is_tensor(node):
        if node.target is aten.arange.default:
            return shape_of(node) == (size,)
        if node.target in (aten.arange.start, aten.arange.start_step):
            return node.args[0] == 0 and (*node.args, 1)[2:3] == (1,) and shape_of(node) == (size,)
        if node.target is aten.full.default and size == 1:
            return bool(node.args[1] == 0)
        is_copy = node.target is aten._to_copy.default and not node.meta["val"].dtype.is_floating_point
        is_same = node.target is aten.add.Tensor and node.args[1] == 0
        if not is_copy and not is_same and node.target not in _RESHAPES:
            return False
        node = node.args[0]
    return False


_RESHAPES = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.expand.default)
