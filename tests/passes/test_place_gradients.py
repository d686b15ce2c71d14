"""Where gradients enter and leave the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

from sp_compile import gradients, ops
from sp_compile.capture import Captured
from sp_compile.passes.place_gradients import ALL_GATHER, PlaceGradients, _bring_again
from sp_compile.pipeline import build_pipeline, run_pipeline
from sp_compile.program import Program
from tests.passes.graphs import after, embeds, small
from tests.training import batch_of, plain


def placed(bucket_bytes: int, frozen: tuple[str, ...] = ()) -> Program:
    """The local graph of a step of training."""
    found: list[Program] = []

    def backend(gm, _):
        program = Captured(gm).program(2, "pretend", "full")
        options = [{each.name: {"bucket_bytes": bucket_bytes}} if isinstance(each, PlaceGradients) else each.name
                   for each in build_pipeline()]  # fmt: skip
        run_pipeline(program, build_pipeline(options))
        found.append(program)
        return gm.forward

    model = plain()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    batch = batch_of()
    for each in batch.values():
        torch._dynamo.mark_dynamic(each, 1)
    torch.compile(model, backend=backend, fullgraph=True)(**batch)
    return found[0]


def calls(program: Program, target: object) -> list[torch.fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=target))


def test_outputs_share_what_comes_to_all_ranks_and_gathers_keep_their_rows():
    program = placed(1 << 20)
    (shared,) = calls(program, gradients.share_gradient)
    loss, logits = program.graph.output_node().args[0]
    assert shared is loss
    assert len(calls(program, gradients.restored_rows)) == 1
    assert logits.meta["val"].shape[-1] == 128


def test_gradients_of_all_weights_are_summed_once_in_the_order_they_are_known():
    program = placed(5000)
    (ended,) = calls(program, gradients.end_sums)
    begun = calls(program, gradients.begin_sum)
    weights = [each for each in program.graph.find_nodes(op="placeholder") if each.meta.get("requires_grad")]
    assert {*ended.args} == {*weights}
    assert sum(len(each.args) - 1 for each in begun) == len(weights)
    assert len(begun) > 2
    for each in weights:
        assert [*each.users] == [ended]
    for each in begun:  # a bucket of more than one weight is no larger than asked
        sizes = [part.meta["val"].numel() * 8 for part in each.args[1:]]
        assert len(sizes) == 1 or sum(sizes) <= 5000


def test_frozen_weights_are_left_out():
    program = placed(1 << 20, frozen=("embed.weight", "head.weight"))
    (ended,) = calls(program, gradients.end_sums)
    assert not {"embed_weight", "head_weight"} & {each.name for each in ended.args}


def test_what_is_brought_again_goes_back_to_the_rank_s_own_rows_through_checkpointed_layers():
    """Latents are gathered and keys made of them there, in a layer whose nodes are marked already."""

    def forward(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        latents = 2 * inputs_embeds[..., :2]
        q = inputs_embeds.unflatten(-1, (4, 8)).transpose(1, 2)
        k = F.linear(latents, self.w).unflatten(-1, (4, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k, is_causal=True)

    program = after("lower_redistributes", small(forward, w=torch.randn(32, 2)), embeds(32))
    (attention,) = ops.attention_nodes(program.graph)
    gathers = [node for node in program.graph.nodes if node.target is ALL_GATHER and node < attention]
    assert len(gathers) == 1
    for node in program.graph.nodes:
        node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    gathers[0].meta.pop("recompute")
    _bring_again(program)
    assert gathers[0].meta["recompute"] == CheckpointPolicy.PREFER_RECOMPUTE
