"""The terms of a score rule while it is built: which hide keys, add to the score, change it, or drop weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sp_compile.score_rule import Assignment, format_rule

_BOOLEAN = {"le", "lt", "ge", "gt", "eq", "ne", "and", "or", "xor", "not", "bool"}
_BLIND = 1e9


def blind_below(dtype: torch.dtype) -> float:
    """A score that gets this number added is never attended to: its weight is 0 next to any other.

    In fp64 the scores are not lost in a number such as -1e9, so a row of nothing else would still tell them apart.
    """
    blind = 1e30 if dtype == torch.float64 else _BLIND
    return max(-blind, torch.finfo(dtype).min) if dtype.is_floating_point else -blind


@dataclass
class Terms:
    """Assignments of a rule, each made once.

    Attributes:
        zero_one: names of values that are 0 or 1 (or False or True) everywhere.
        empty_mean: a row that sees no key gets the mean of the values, since what hides its keys is a finite number.
        dropout: with which probability a weight is dropped.
    """

    assignments: dict[str, Assignment] = field(default_factory=dict)
    zero_one: set[str] = field(default_factory=set)
    masks: list[Any] = field(default_factory=list)
    biases: list[Any] = field(default_factory=list)
    score: Any = None
    empty_mean: bool = False
    dropout: float = 0.0
    _names: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def call(self, function: str, *arguments: Any) -> Any:
        """Name of ``function(arguments)``."""
        if function in ("eq", "ne") and self._is_choice(*arguments):
            return self.call("bool" if (function == "eq") == bool(arguments[1]) else "not", arguments[0])
        if function in ("not", "bool", "and", "or", "where"):
            arguments = tuple(self._truth(each) if i == 0 or function in ("and", "or") else each
                              for i, each in enumerate(arguments))  # fmt: skip
            known = self._known_truth(function, arguments)
            if known is not None:
                return known
        # 1 and True are equal, and mean other dtypes
        key = (function, arguments, tuple(map(type, arguments)))
        if key not in self._names:
            name = self._names[key] = f"t{len(self._names)}"
            self.assignments[name] = Assignment(name, function, arguments)
            if function in _BOOLEAN or self._keeps_zero_one(function, arguments):
                self.zero_one.add(name)
        return self._names[key]

    def _is_choice(self, value: Any, number: Any) -> bool:
        return isinstance(value, str) and self.is_zero_one(value) and not isinstance(number, str) and number in (0, 1)

    def _known_truth(self, function: str, arguments: tuple[Any, ...]) -> Any:
        """A value that the call only repeats, if so."""
        made = self.assignments.get(arguments[0]) if isinstance(arguments[0], str) else None
        if function == "bool" and made is not None and made.function in _BOOLEAN:
            return arguments[0]
        if function == "not" and made is not None and made.function == "not" and self.is_zero_one(made.arguments[0]):
            return self.call("bool", made.arguments[0])
        if function == "and" and True in arguments:
            return arguments[1] if arguments[0] is True else arguments[0]
        if function == "or" and False in arguments:
            return arguments[1] if arguments[0] is False else arguments[0]
        return None

    def _truth(self, value: Any) -> Any:
        """A simpler value with the same truth: casts of bools and numbers made of them are their conditions."""
        made = self.assignments.get(value) if isinstance(value, str) else None
        if made is None:
            return value
        args = made.arguments
        if made.function in ("float", "int", "copy") and self.is_zero_one(args[0]):
            return self._truth(args[0])
        if made.function == "where" and not isinstance(args[1], str) and args[1:] in ((1, 0), (0, 1)):
            return self._truth(args[0]) if args[1] else self.call("not", args[0])
        if made.function == "sub" and _is_one(args[0]) and self.is_zero_one(args[1]):
            return self.call("not", args[1])
        if made.function == "mul" and all(self.is_zero_one(each) for each in args):
            return self.call("and", *args)
        return value

    def is_zero_one(self, value: Any) -> bool:
        """Whether a value is 0 or 1 everywhere."""
        return value in self.zero_one if isinstance(value, str) else value in (0, 1)

    def _keeps_zero_one(self, function: str, arguments: tuple[Any, ...]) -> bool:
        if function == "where":
            arguments = arguments[1:]
        elif function == "sub":
            return _is_one(arguments[0]) and self.is_zero_one(arguments[1])
        elif function not in ("mul", "minimum", "maximum", "float", "int", "copy"):
            return False
        return all(self.is_zero_one(each) for each in arguments)

    def hide(self, mask: Any, fill: float = -torch.inf) -> None:
        """Let only keys be seen where ``mask`` holds; the scores of others are ``fill``."""
        self.masks.append(mask)
        if fill != -torch.inf:
            self.empty_mean = True

    def add(self, value: Any, dtype: torch.dtype, factor: float = 1.0) -> None:
        """Add a term to the score: a mask where it hides keys, a bias where it does not."""
        biases = self._biases(value, blind_below(dtype) / min(factor, 1.0))
        for each in [value] if biases is None else biases:
            if each != 0:
                self.biases.append(each if factor == 1.0 else self.call("mul", each, factor))

    def _biases(self, value: Any, blind: float) -> list[Any] | None:
        """What is left of a term without the masks in it, which are noted; None if there is none in it."""
        made = self.assignments.get(value) if isinstance(value, str) else None
        if made is None:
            return None
        args = made.arguments
        if made.function == "where":
            return self._where(args, blind)
        if made.function == "add":
            parts = [self._biases(each, blind) for each in args]
            if any(each is not None for each in parts):
                return [
                    bias for part, each in zip(parts, args, strict=True) for bias in ([each] if part is None else part)
                ]
        if made.function in ("float", "copy") or (made.function == "maximum" and _is_number(args[1], blind)):
            return self._biases(args[0], blind)
        if made.function == "mul":
            return self._product(value, args, blind)
        return None

    def _where(self, arguments: tuple[Any, ...], blind: float) -> list[Any] | None:
        condition, kept, other = arguments
        if _is_number(other, blind):
            self.hide(condition, other)
        elif _is_number(kept, blind):
            self.hide(self.call("not", condition), kept)
            kept = other
        else:
            return None
        rest = self._biases(kept, blind)
        return [kept] if rest is None else rest

    def _product(self, value: Any, factors: tuple[Any, ...], blind: float) -> list[Any] | None:
        number, other = factors if not isinstance(factors[0], str) else factors[::-1]
        if isinstance(number, str) or number == -torch.inf or not _is_number(number, blind):
            return None
        if self.is_zero_one(other):
            self.hide(self.call("not", other), number)
            return []
        # whatever the factor is, a key is hidden where the product is low enough
        self.hide(self.call("gt", value, blind), number)
        return [value]

    def finish(self) -> list[Assignment]:
        """The assignments that the outputs need, in order, and then the outputs."""
        outputs = {"score": self.score, "mask": self._join("and", self.masks), "bias": self._join("add", self.biases)}
        if self.dropout:
            outputs["keep"] = self.call("bernoulli", "score", 1.0 - self.dropout)
        outputs = {name: value for name, value in outputs.items() if value is not None}
        needed = {value for value in outputs.values() if isinstance(value, str)}
        kept = []
        for each in reversed(self.assignments.values()):
            if each.name in needed:
                kept.append(each)
                needed.update(item for item in each.arguments if isinstance(item, str))
        return _named_outputs(list(reversed(kept)), outputs)

    def _join(self, function: str, values: list[Any]) -> Any:
        joined = None
        for each in dict.fromkeys(values) if function == "and" else values:
            joined = each if joined is None else self.call(function, joined, each)
        return joined

    @staticmethod
    def text(assignments: Iterable[Assignment], renamed: Mapping[str, str]) -> str:
        """The rule as text, intermediate values numbered anew."""
        names = dict(renamed)
        for each in assignments:
            if each.name.startswith("t"):
                names[each.name] = f"t{len(names) - len(renamed)}"
        return format_rule([Assignment(names.get(each.name, each.name), each.function, tuple(
            names.get(item, item) if isinstance(item, str) else item for item in each.arguments))
            for each in assignments])  # fmt: skip


def _named_outputs(assignments: list[Assignment], outputs: Mapping[str, Any]) -> list[Assignment]:
    """Give values that are only an output its name; the others are copied."""
    read = [item for each in assignments for item in each.arguments] + list(outputs.values())
    taken = {value: name for name, value in outputs.items() if isinstance(value, str) and read.count(value) == 1}
    named = [Assignment(taken.get(each.name, each.name), each.function, each.arguments) for each in assignments]
    held = {each.name for each in named}
    return named + [Assignment(name, "copy", (value,)) for name, value in outputs.items() if name not in held]


def _is_number(value: Any, at_most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value <= at_most


def _is_one(value: Any) -> bool:
    return not isinstance(value, str) and bool(value == 1)
