"""Local shapes: the rank's rows wherever a value is sharded, the batch's tokens only in whole values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile.errors import PassCrashError
from sp_compile.passes.localize_shapes import LocalizeShapes
from sp_compile.pipeline import run_pipeline
from sp_compile.placements import Gathered, Shard
from sp_compile.program import placement
from sp_compile.symbols import expr, is_tensor
from tests.passes.graphs import after, call, calls, embeds, ops_of, qkv, repeated


def many_shapes(self: Any, inputs_embeds: torch.Tensor) -> Any:
    """Attention, merged dims, constants and expansions in one graph."""
    x, tokens = inputs_embeds, inputs_embeds.shape[1]
    q, k, v = qkv(x)
    out = F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)
    flat = out.transpose(1, 2).reshape(-1, 16)
    pairs = x.view(1, 2 * tokens, 16) + torch.ones(2 * tokens, 16)
    return flat + torch.zeros(tokens, 16), pairs, x[:, :, None].expand(1, tokens, 3, 32), (2 * x).sum(1)


def test_every_sharded_dim_has_the_ranks_rows_and_every_gathered_one_those_of_all():
    program = after("localize_shapes", many_shapes, embeds(32), sp=3)
    rows = expr(program.symbols["shard_length"])
    sizes = []
    for node in program.graph.nodes:
        held = placement(node)
        if is_tensor(node) and isinstance(held, Shard):
            assert expr(node.meta["val"].shape[held.dim]) == held.outer * held.inner * rows, node.name
            sizes.append(held.outer * held.inner)
        if is_tensor(node) and isinstance(held, Gathered):
            assert expr(node.meta["val"].shape[held.dim]) == 3 * rows, node.name
            sizes.append(3)
    assert {1, 2, 3} == set(sizes)


def test_no_size_of_the_global_view_is_left():
    program = after("localize_shapes", many_shapes, embeds(32))
    left = [node.name for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)
            and any(program.tokens in expr(size).free_symbols for size in node.meta["val"].shape)]  # fmt: skip
    assert left == []
    assert expr(program.symbols["tokens"]) != program.tokens


def test_only_arguments_along_the_sharded_dim_change():
    def forward(self: Any, inputs_embeds: torch.Tensor) -> Any:
        tokens = inputs_embeds.shape[1]
        return inputs_embeds.view(1, tokens, 2, 4), (2 * inputs_embeds).sum(1).expand(tokens, 8)

    program = after("localize_shapes", forward)
    reshape, expand = call(program, "aten.reshape"), call(program, "aten.expand")
    one, rows, *rest = reshape.args[1]
    assert (one, rest) == (1, [2, 4])
    assert (rows.target, rows.args[0].meta["index_input"]) == (torch.ops.aten.sym_size.int, "local_index")
    assert expand.args[1][0].name == "tokens"  # replicated: the global length


def test_a_merged_dim_counts_its_rows_per_token():
    program = after("localize_shapes", lambda self, inputs_embeds: (2 * inputs_embeds).view(-1))
    (rows,) = call(program, "aten.reshape").args[1]
    assert expr(rows.meta["val"]) == 8 * expr(program.symbols["shard_length"])


def test_tokens_and_rows_are_symbols_of_their_own():
    program = after("localize_shapes", lambda self, inputs_embeds: 2 * inputs_embeds, sp=2)
    tokens, rows = (program.symbols[name] for name in ("tokens", "shard_length"))
    environment = tokens.node.shape_env
    assert environment is rows.node.shape_env
    assert expr(tokens) != expr(rows)
    assert environment.guards == []  # nothing was specialised to the lengths of the capture
    assert len(program.local_inputs) == len(program.graph.find_nodes(op="placeholder"))


def test_an_op_that_does_not_fit_the_local_shapes_is_found_here():
    program = after("lower_redistributes", lambda self, inputs_embeds: inputs_embeds + torch.ones(3, 8).sum(0))
    call(program, "aten.add").args = (call(program, "aten.add").args[0], call(program, "aten.ones"))
    with pytest.raises(PassCrashError, match=r"pass 'localize_shapes' crashed: .*dimension"):
        run_pipeline(program, [LocalizeShapes()])


def test_one_rank_keeps_its_arguments():
    program = after("localize_shapes", lambda self, inputs_embeds: inputs_embeds.view(1, -1, 2, 4), sp=1)
    assert calls(program, "aten.sym_size") == []
    assert ops_of(program) == ["aten.reshape"]
