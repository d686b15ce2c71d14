"""What a pipeline asks of what runs it, read from its passes by their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sp_compile.pipeline import Pass


class Schedule:
    """A pipeline's passes, and what they ask.

    Attributes:
        passes: in their order.
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = tuple(passes)

    def _named(self, name: str) -> list[Any]:
        return [each for each in self.passes if each.name == name]

    @property
    def isolates(self) -> str:
        """Which batches the pass ``isolate_requests`` is for."""
        return next((str(each.batches) for each in self._named("isolate_requests")), "none")

    @property
    def serves_caches(self) -> bool:
        """Whether programs with a cache can be made."""
        return bool(self._named("shard_cache"))

    @property
    def operations_per_byte(self) -> float | None:
        """What a byte that crosses is weighed against; None for what the rates say."""
        return next((each.operations_per_byte for each in self._named("minimize_communication")), None)

    @property
    def chooses_kernels(self) -> bool:
        """Whether a kernel is chosen for what suits the device."""
        return any(each.kernel == "auto" for each in self._named("plan_attention"))

    @property
    def takes_flex(self) -> bool:
        """Whether attention may be computed by FlexAttention."""
        return any(each.kernel in ("auto", "flex") for each in self._named("plan_attention"))

    @property
    def reads_reach(self) -> bool:
        """Whether strategies of attention ask how far queries see."""
        return any(each.reads_reach for each in self._named("shard_attention"))

    @property
    def asked_strategies(self) -> Callable[[int], Sequence[str]] | None:
        """Gives the strategies that are asked for so many attentions; None where none is ``auto``."""
        return next((each.asked for each in self._named("shard_attention") if each.chooses), None)
