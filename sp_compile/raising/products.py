"""Matrix products of attention: which dims of their operands are summed, and how operands come to ``[B, H, T, D]``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sp_compile.raising.axes import Atom, Dims, Frame, after_op, before_view, resolved
from sp_compile.raising.insertion import Inserter
from sp_compile.symbols import product, shape_of

aten = torch.ops.aten

PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.einsum.default)


class NearestMiss(Exception):
    """Why a candidate is not attention; names the node that did not fit."""


@dataclass
class Product:
    """A product of two values, with the dims of both and of the result.

    Attributes:
        summed: the atom that it sums over.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_dims: Dims
    right_dims: Dims
    dims: Dims
    summed: Atom

    def side(self, node: fx.Node) -> tuple[fx.Node, Dims]:
        """The other operand and its dims."""
        return (self.right, self.right_dims) if node is self.left else (self.left, self.left_dims)

    def dims_of(self, node: fx.Node) -> Dims:
        """The dims of an operand."""
        return self.left_dims if node is self.left else self.right_dims


def operands_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of a product of tensors."""
    args: Any = node.args
    if node.target is aten.einsum.default:
        parts = args[1]
        return (parts[0], parts[1]) if len(parts) == 2 and "." not in args[0] else None
    first = 1 if node.target is aten.baddbmm.default else 0
    return args[first], args[first + 1]


def read_product(node: fx.Node) -> Product:
    """Follow the dims of a product of two values.

    Raises:
        NearestMiss: it sums over more than one dim, or over none.
    """
    sides = operands_of(node)
    if sides is None:
        raise NearestMiss(f"%{node.name} is an einsum that is no product of two values")
    letters = _letters(node, *sides)
    atoms: dict[str, Atom] = {}
    dims = []
    for text, each in zip(letters, (*sides, node), strict=True):
        for letter, size in zip(text, shape_of(each), strict=True):
            if size != 1:
                atoms.setdefault(letter, Atom(size))
        own = tuple((atoms[letter],) if size != 1 else () for letter, size in zip(text, shape_of(each), strict=True))
        dims.append(own)
    summed = [letter for letter in letters[0] if letter in letters[1] and letter not in letters[2]]
    lost = (set(letters[0]) ^ set(letters[1])) - set(letters[2])
    if len(summed) != 1 or lost or summed[0] not in atoms:
        raise NearestMiss(f"%{node.name} does not sum over one dim of two values")
    return Product(node, *sides, dims[0], dims[1], dims[2], atoms[summed[0]])


def _letters(node: fx.Node, left: fx.Node, right: fx.Node) -> tuple[str, str, str]:
    """Its equation; of a matrix product, ``I``, ``S`` and ``J`` are the last dims and ``S`` is summed over."""
    if node.target is aten.einsum.default:
        inputs, _, output = str(node.args[0]).replace(" ", "").partition("->")
        first, second = inputs.split(",")
        if not output or any(len(set(each)) != len(each) for each in (first, second, output)):
            raise NearestMiss(f"%{node.name} is an einsum with repeated or implied dims")
        return first, second, output
    ranks = [len(shape_of(each)) for each in (left, right, node)]
    if min(ranks) < 2:
        raise NearestMiss(f"%{node.name} is a product with a vector")
    lead = "abcdefgh"[: ranks[2] - 2]
    first, second = (lead[len(lead) - rank + 2 :] for rank in ranks[:2])
    return f"{first}IS", f"{second}SJ", f"{lead}IJ"


def retie(found: Product, node: fx.Node, dims: Dims) -> Dims:
    """Read a product again with the dims of one operand known; the dims of the other operand.

    Raises:
        NearestMiss: the operands differ in a dim that they share.
    """
    known: dict[Atom, tuple[Atom, ...]] = {}
    for own, atoms in zip(found.dims_of(node), dims, strict=True):
        for atom in own:
            known[atom] = resolved(atoms)
    other, other_dims = found.side(node)
    found.dims = tuple(tuple(each for atom in own for each in known.get(atom, (atom,))) for own in found.dims)
    tied = tuple(tuple(each for atom in own for each in known.get(atom, (atom,))) for own in other_dims)
    if any(product([atom.size for atom in own]) != size for own, size in zip(tied, shape_of(other), strict=True)):
        raise NearestMiss(f"%{other.name} and %{node.name} differ in size where %{found.node.name} ties them")
    return tied


def to_heads(insert: Inserter, value: tuple[fx.Node, Dims], wanted: Dims, shares: bool) -> fx.Node:
    """Queries, keys or values as ``[B, heads, rows, features]``.

    Args:
        value: a node with its dims.
        wanted: the dims of the result for all heads.
        shares: keep only the heads that the value has, if those are the outer ones that groups of queries share.
    """
    own = (_own_heads(value[1], wanted) if shares else None) or wanted
    view: tuple[fx.Node, Dims] | None = value
    while view is not None:
        if len(view[1]) == 4 and all(resolved(a) == resolved(b) for a, b in zip(view[1], own, strict=True)):
            return view[0]
        view = before_view(*view)
    return insert.arrange(*value, own, expand=frozenset(range(4)))


def _own_heads(dims: Dims, wanted: Dims) -> Dims | None:
    held = {atom for each in dims for atom in resolved(each)}
    heads = resolved(wanted[1])
    own = tuple(atom for atom in heads if atom in held)
    return (wanted[0], own, *wanted[2:]) if heads[: len(own)] == own else None


def from_heads(insert: Inserter, out: fx.Node, frame: Frame, features: Any, like: fx.Node, dims: Dims) -> fx.Node:
    """An output ``[B, H, Q, E]`` in the dims, and with the shape, of the product that it replaces.

    Args:
        features: the atoms of the last dim.
    """
    flat = [atom for each in (frame.batch, frame.heads, (frame.queries,), features) for atom in resolved(each)]
    order = [atom for each in dims for atom in resolved(each)]
    if flat != order:
        out = insert.reshape(out, [atom.size for atom in flat])
        out = insert.call(aten.permute.default, out, [flat.index(atom) for atom in order])
    return insert.reshape(out, shape_of(like))


def follow(path: list[fx.Node], dims: Dims) -> list[Dims]:
    """The dims of each node of a path of pointwise ops, reshapes and permutations that starts with ``dims``.

    Raises:
        NearestMiss: a node of the path broadcasts or mixes dims.
    """
    found = [dims]
    for source, node in itertools.pairwise(path):
        own = after_op(node, source, found[-1])
        if own is None:
            raise NearestMiss(f"%{node.name} changes the dims {list(shape_of(source))} of %{source.name}")
        found.append(own)
    return [tuple(resolved(each) for each in own) for own in found]
