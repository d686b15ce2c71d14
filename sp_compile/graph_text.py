"""The graph of a program as text, which goldens, explanations and fingerprints compare."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from sp_compile.placements import describe
from sp_compile.program import Program, op_name
from sp_compile.symbols import is_tensor

LETTERS = {"tokens": "T", "shard_length": "n"}
_DTYPES = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16", "int64": "i64", "int32": "i32",
           "bool": "b8", "int8": "i8", "uint8": "u8"}  # fmt: skip


def lines(program: Program) -> Iterator[str]:
    """The graph as text, one node a line: name, type, placement, call. It is the same on all ranks.

    ``T`` is the token length, ``n`` the rows per rank; types that are not known yet are ``?``. Inputs that nobody reads
    are left out, and the placement of weights, which is always ``Replicate``.
    """
    letters, groups = _letters(program), _group_names(program)
    for node in program.graph.nodes:
        if node.op == "output":
            yield f"return {_argument_text(node.args[0])}"
            continue
        kind = _type_text(node.meta.get("val"), letters)
        placed = f" {describe(node.meta['placement'])}" if "placement" in node.meta and _placeable(node) else ""
        if node.op == "placeholder":
            if node.users:
                yield f"%{node.name}: {kind}{'' if node.meta.get('weight') else placed} = input"
            continue
        arguments = [groups.get(repr(each)) or _argument_text(each) for each in node.args]
        arguments += [f"{key}={_argument_text(each)}" for key, each in node.kwargs.items()]
        call = op_name(node) if node.op == "call_function" else f"{node.op}:{node.target}"
        yield f"%{node.name}: {kind}{placed} = {call}({', '.join(arguments)})"


def _placeable(node: fx.Node) -> bool:
    return is_tensor(node) or isinstance(node.meta.get("val"), (tuple, list))


def _type_text(value: Any, letters: Mapping[str, str]) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        sizes = ", ".join(_size_text(size, letters) for size in value.shape)
        return f"{_DTYPES.get(dtype, dtype)}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_type_text(each, letters) for each in value) + ")"
    if value is None:
        return "?"
    return f"Sym({_size_text(value, letters)})" if isinstance(value, torch.SymInt) else type(value).__name__


def _size_text(size: Any, letters: Mapping[str, str]) -> str:
    known = re.sub(r"\bs\d+\b", lambda found: letters.get(found[0], found[0]), str(size))
    return re.sub(r"\bu\d+\b", "?", known)  # depends on data


def _letters(program: Program) -> dict[str, str]:
    """Short names of symbols: ``T`` tokens, ``n`` rows per rank, and so on."""
    named = {str(size.node.expr): LETTERS.get(name, name) for name, size in program.symbols.items()}
    return named if program.tokens is None else {str(program.tokens): "T", **named}


def _argument_text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_argument_text(each) for each in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)


def _group_names(program: Program) -> dict[str, str]:
    """What the process groups are to a rank: their names may differ from rank to rank."""
    nodes = program.nodes
    found = {} if nodes is None else {repr(nodes.inner): "the node", repr(nodes.outer): "its peers"}
    return found | {repr(each): "tensor parallel" for each in program.tensor_groups}
