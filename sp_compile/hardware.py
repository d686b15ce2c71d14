"""What machines do: rates of a rank and of its links, described in YAML, by which times are predicted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sp_compile.config_files import read_parts
from sp_compile.costs import Rates
from sp_compile.errors import ConfigError, nearest
from sp_compile.files import written_whole
from sp_compile.mesh import Nodes

NONNEGATIVE = ("latency", "hidden", "part", "layer")


@dataclass(frozen=True)
class Hardware:
    """A rank, its memory and its links; what is reached, not what is promised.

    Attributes:
        name: for people.
        dtype: that ``products`` and ``attention`` are for.
        products: floating-point operations per second in products with weights.
        attention: in attention.
        memory: bytes per second that a rank reads or writes.
        capacity: bytes of its memory.
        inside, between: bytes per second that reach a rank from others of its node, and from other nodes.
        latency: seconds of a collective that carries nothing.
        ranks_per_node: ranks that ``inside`` is for.
        hidden, part: as in :class:`~sp_compile.costs.Rates`.
        layer: seconds of a layer besides all that.
        cores: ranks that can compute at these rates at once, of those of a node; None for all.
    """

    name: str
    dtype: str
    products: float
    attention: float
    memory: float
    capacity: float
    inside: float
    between: float
    latency: float
    ranks_per_node: int
    hidden: float
    part: float
    layer: float
    cores: int | None = None

    def share(self, ranks: int) -> float:
        """Of its rates, what a rank gets when so many compute."""
        return 1.0 if self.cores is None else min(1.0, self.cores / min(ranks, self.ranks_per_node))

    def rates(self, ranks: int) -> Rates:
        """For choosing strategies, when so many ranks compute."""
        share = self.share(ranks)
        return Rates(self.inside, self.attention * share, self.latency, self.memory * share, self.hidden,
                     self.part / share, self.between)  # fmt: skip

    def nodes(self, sp: int) -> Nodes | None:
        """How ``sp`` adjacent ranks lie on nodes, as many on each as can be; None where they are on one."""
        if sp <= self.ranks_per_node:
            return None
        return Nodes(max(size for size in range(1, self.ranks_per_node + 1) if sp % size == 0), "", "")


def load_hardware(source: str) -> Hardware:
    """Read a description.

    Args:
        source: a YAML file, or the name of one that ships: ``h100``, ``h200``, ``b200``.

    Raises:
        ConfigError: no such file, or it lacks a rate, which is named, or has one that is no number.
    """
    parts = read_parts(source, "hardware")
    return _checked({name: each for part in parts for name, each in part.content.items()}, parts[-1].origin)


def write_hardware(hardware: Hardware, path: Path) -> None:
    """Write a description for :func:`load_hardware`.

    Raises:
        ConfigError: the directory does not take it.
    """
    with written_whole(path) as part:
        part.write_text(yaml.safe_dump(dataclasses.asdict(hardware), sort_keys=False), encoding="utf-8")


def _checked(content: Mapping[str, Any], origin: str) -> Hardware:
    fields = {each.name: each for each in dataclasses.fields(Hardware)}
    for key in content:
        if key not in fields:
            raise ConfigError(f"{origin}: unknown key {key!r}{nearest(str(key), fields)}")
    found: dict[str, Any] = {}
    for name, each in fields.items():
        value = content.get(name)
        if value is None:
            if each.default is dataclasses.MISSING:
                raise ConfigError(f"{origin} says nothing of {name!r}; see {Hardware.__name__} for what it is")
            continue
        found[name] = _value(name, value, str(each.type), origin)
    return Hardware(**found)


def _value(name: str, value: Any, kind: str, origin: str) -> Any:
    if kind == "str":
        return str(value)
    try:
        number = float(value)  # YAML takes 1e9 for text
    except (TypeError, ValueError):
        raise ConfigError(f"{origin}: {name} is {value!r}; expected a number") from None
    low = number < 0 if name in NONNEGATIVE else number <= 0
    if low or math.isnan(number) or (name == "hidden" and number > 1):
        raise ConfigError(f"{origin}: {name} is {value!r}, which no machine has")
    if not kind.startswith("int"):
        return number
    if not number.is_integer():
        raise ConfigError(f"{origin}: {name} is {value!r}; expected a whole number")
    return int(number)
