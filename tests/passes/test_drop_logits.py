"""With outputs="loss" no logits are left in the graph, and the loss is what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sp_compile.errors import ConfigError
from sp_compile.layout import token_layout
from sp_compile.symbols import is_tensor, shape_of
from tests.passes.graphs import Ranks, after, calls, embeds, ops_of, outputs, run_whole

LENGTH, CLASSES = 11, 23


class Head(nn.Module):
    """Logits of a linear layer, scaled, capped and cast, and their loss."""

    def __init__(self, cap: float, bias: bool, read: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cap, self.read = cap, read
        self.weight = nn.Parameter(torch.randn(CLASSES, 8))
        self.bias = nn.Parameter(torch.randn(CLASSES)) if bias else None

    def forward(self, inputs_embeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = F.linear(inputs_embeds, self.weight, self.bias)
        if self.cap:
            logits = torch.tanh(logits / self.cap) * self.cap * 0.5
        labels = (torch.arange(inputs_embeds.shape[1]) * 3) % CLASSES
        labels = torch.where(labels == 6, -100, labels)
        loss = F.cross_entropy(logits.float().view(-1, CLASSES), labels, label_smoothing=0.1)
        return loss + logits.square().mean() if self.read else loss, logits


@pytest.mark.parametrize("sp", [1, 2])
@pytest.mark.parametrize(("cap", "bias"), [(0.0, False), (3.0, True)])
def test_no_value_has_all_classes_of_all_rows(sp: int, cap: float, bias: bool):
    inputs, module = embeds(8, (LENGTH,)), Head(cap, bias)
    program = after("drop_logits", module, inputs, sp=sp, outputs="loss")
    assert not program.fallbacks
    assert not [node for node in program.graph.nodes if is_tensor(node) and shape_of(node)[-1:] == (CLASSES,)
                and node.op == "call_function"]  # fmt: skip
    loss, logits = outputs(program, run_whole(program, inputs))
    torch.testing.assert_close(loss, module(**inputs)[0])
    assert logits is None


def test_each_rank_computes_the_losses_of_its_own_rows():
    inputs, module = embeds(8, (LENGTH,)), Head(2.0, True)
    program = after("localize_shapes", module, inputs, outputs="loss")
    assert [each for each in ops_of(program) if "c10d" in each] == [
        "_c10d_functional.all_reduce", "_c10d_functional.wait_tensor"]  # fmt: skip
    for loss, _ in Ranks(program, inputs, token_layout((LENGTH,), 2, min_shard_length=2)).outputs():
        torch.testing.assert_close(loss, module(**inputs)[0])


def test_logits_that_others_read_stay_and_are_reported():
    program = after("drop_logits", Head(0.0, False, read=True), embeds(8, (LENGTH,)), outputs="loss")
    assert len(calls(program, "aten.cross_entropy_loss")) == 1
    (told,) = program.fallbacks
    assert "its logits are held whole" in told.reason
    assert "is read by others" in told.reason


def test_a_forward_without_a_loss_is_refused():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return inputs_embeds * 2

    with pytest.raises(ConfigError, match="pass labels"):
        after("drop_logits", forward, outputs="loss")
