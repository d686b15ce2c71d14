"""Which dims of a value are the batch, the heads, the queries and the keys of an attention.

Models write scores as ``[B, H, Q, K]``, ``[B * H, Q, K]``, ``[B, H_kv, G, Q, K]``, ``[Q, K, H]`` and so on. Each dim is
described by its *atoms*, the indivisible factors that reshapes move around; a dim of size 1 has none. Following atoms
through reshapes and permutations tells what every dim of a mask or of a value stands for, in whatever form it is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from sp_compile.symbols import is_tensor, product
from sp_compile.symbols import shape_of as _shape_of

aten = torch.ops.aten


def shape_of(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The node's shape, with divisions done that have no remainder, such as ``(4 * T * T) // (T * T)``."""
    return tuple(size.replace(FloorDiv, _exact) if size.has(FloorDiv) else size for size in _shape_of(node))


def _exact(size: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    quotient = sympy.cancel(size / divisor)
    return quotient if sympy.denom(quotient) == 1 else FloorDiv(size, divisor)


class Atom:
    """A factor of a dim; once split, it stands for its parts."""

    def __init__(self, size: sympy.Expr) -> None:
        self.size = size
        self.parts: tuple[Atom, ...] = ()

    def resolve(self) -> tuple[Atom, ...]:
        """The factors that it was split into, or itself."""
        return resolved(self.parts) if self.parts else (self,)

    def split(self, outer: sympy.Expr) -> bool:
        """Split into ``outer`` times the rest, if that divides."""
        inner = sympy.cancel(self.size / outer)
        if not (inner.is_Integer or (outer.is_Integer and sympy.denom(inner) == 1)):
            return False
        self.parts = Atom(outer), Atom(inner)
        return True


Dims = tuple[tuple[Atom, ...], ...]


def resolved(atoms: Iterable[Atom]) -> tuple[Atom, ...]:
    """Atoms with those that were split replaced by their parts."""
    return tuple(part for atom in atoms for part in atom.resolve())


def new_dims(sizes: Iterable[sympy.Expr]) -> Dims:
    """One fresh atom for each dim that is not of size 1."""
    return tuple(() if size == 1 else (Atom(size),) for size in sizes)


def held_dims(node: fx.Node, dims: Dims) -> Dims | None:
    """The last of ``dims`` as the node has them: none where its size is 1; None where its sizes are others."""
    sizes = shape_of(node)
    own = tuple(resolved(each) for each in dims[len(dims) - len(sizes) :]) if sizes else ()
    if len(own) < len(sizes):
        own = ((),) * (len(sizes) - len(own)) + own
    own = tuple(() if size == 1 else atoms for size, atoms in zip(sizes, own, strict=True))
    fits = all(product([atom.size for atom in atoms]) == size for size, atoms in zip(sizes, own, strict=True))
    return own if fits else None


def regroup(dims: Dims, sizes: Sequence[sympy.Expr]) -> Dims | None:
    """The dims after a reshape to ``sizes``, splitting atoms where it has to; None where it cuts a token dim."""
    rest = [atom for each in dims for atom in resolved(each)]
    found = []
    for size in sizes:
        atoms: list[Atom] = []
        missing = size
        while missing != 1:
            if not rest:
                return None
            if sympy.cancel(missing / rest[0].size) != 1 and _exceeds(rest[0].size, missing):
                if not rest[0].split(missing):
                    return None
                rest = [*rest[0].resolve(), *rest[1:]]
            missing = sympy.cancel(missing / rest[0].size)
            if sympy.denom(missing) != 1:
                return None
            atoms.append(rest.pop(0))
        found.append(tuple(atoms))
    return None if rest else tuple(found)


def _exceeds(size: sympy.Expr, wanted: sympy.Expr) -> bool:
    return bool(sympy.denom(sympy.cancel(wanted / size)) != 1)


def _is_view(node: fx.Node, *targets: Any) -> bool:
    return node.op == "call_function" and node.target in targets


def before_view(node: fx.Node, dims: Dims) -> tuple[fx.Node, Dims] | None:
    """The value that the node is a view or a copy of, with that value's dims; None if it is neither."""
    source: Any = node.args[0] if node.op == "call_function" and node.args else None
    if not is_tensor(source) or not isinstance(node.target, torch._ops.OpOverload):
        return None
    own = held_dims(node, dims)
    if own is None:
        return None
    found = _dims_before(node, source, own)
    return None if found is None else (source, found)


def _dims_before(node: fx.Node, source: fx.Node, own: Dims) -> Dims | None:
    rank, args = len(own), [*node.args[1:]]
    match node.target._schema.name.removeprefix("aten::"):
        case "clone" | "contiguous" | "alias" | "detach":
            return own
        case "expand" | "expand_as" | "broadcast_to":
            return held_dims(source, own)
        case "unsqueeze":
            at: Any = args[0]
            return own[: at % rank] + own[at % rank + 1 :]
        case "permute":
            order: Any = args[0]
            return tuple(own[[each % rank for each in order].index(i)] for i in range(rank))
        case "transpose" | "swapaxes":
            return _swapped(own, *args)
        case "t" | "numpy_T" | "mT":
            return own[::-1] if rank == 2 else None
        case "squeeze" | "reshape" | "flatten":
            return regroup(own, shape_of(source))
        case "select" if shape_of(source)[args[0]] == 1:
            at = args[0] % (rank + 1)
            return (*own[:at], (), *own[at:])
    return None


def _swapped(dims: Dims, first: Any, second: Any) -> Dims:
    swapped = list(dims)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    return tuple(swapped)


def after_op(node: fx.Node, source: fx.Node, dims: Dims) -> Dims | None:
    """The dims of a node that changes ``source`` pointwise, reshapes or permutes it; None where dims grow."""
    rank, args = len(dims), [*node.args[1:]]
    name = node.target._schema.name.removeprefix("aten::") if isinstance(node.target, torch._ops.OpOverload) else ""
    match name:
        case "permute":
            return tuple(dims[each] for each in args[0])
        case "transpose" | "swapaxes":
            return _swapped(dims, *args)
        case "unsqueeze":
            at: Any = args[0] % (rank + 1)
            return (*dims[:at], (), *dims[at:])
        case "squeeze" | "reshape" | "flatten":
            return regroup(dims, shape_of(node))
    return held_dims(node, dims)


@dataclass
class Frame:
    """The atoms of the scores, by what they stand for."""

    batch: tuple[Atom, ...]
    heads: tuple[Atom, ...]
    queries: Atom
    keys: Atom

    @property
    def scores(self) -> Dims:
        """The dims of scores ``[B, H, Q, K]``."""
        return resolved(self.batch), resolved(self.heads), (self.queries,), (self.keys,)

    def is_matrix(self, dims: Dims) -> bool:
        """Whether a value with these dims has both queries and keys."""
        atoms = {atom for each in dims for atom in resolved(each)}
        return self.queries in atoms and self.keys in atoms


def frame_of(lead: Sequence[Atom], queries: Atom, keys: Atom, batch: int) -> Frame:
    """Tell the batch from the heads: the first leading atom is the batch if it has the batch's size."""
    atoms = resolved(lead)
    at = 1 if batch > 1 and atoms and atoms[0].size == batch else 0
    return Frame(atoms[:at], atoms[at:], queries, keys)
