"""Schedules of passes: built from names and YAML, refused where an invariant would be missing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import yaml

from sp_compile.api import parallelize
from sp_compile.errors import ConfigError, PipelineError
from sp_compile.invariants import RAISED
from sp_compile.passes.minimize_communication import MinimizeCommunication
from sp_compile.passes.normalize import Normalize
from sp_compile.passes.raise_attention import RaiseAttention
from sp_compile.passes.shard_attention import ShardAttention
from sp_compile.pipeline import Pass, build_pipeline, check_schedule, registered_passes, run_pipeline
from tests.passes.graphs import after

NAMES = list(registered_passes())


def without(*left_out: str) -> list[str]:
    return [name for name in NAMES if name not in left_out]


def swapped(first: str, second: str) -> list[str]:
    names = {first: second, second: first}
    return [names.get(name, name) for name in NAMES]


def test_the_default_pipeline_is_every_registered_pass_in_order():
    assert [each.name for each in build_pipeline()] == NAMES
    assert build_pipeline() == build_pipeline(NAMES)


def test_options_come_from_yaml_maps():
    entries = [f"- {name}" for name in NAMES[: NAMES.index("minimize_communication")]]
    text = "\n".join([*entries, "- minimize_communication: {join_keys_and_values: false}", "- lower_redistributes:"])
    *_, minimize, lower = build_pipeline(yaml.safe_load(text))
    assert minimize == MinimizeCommunication(join_keys_and_values=False)
    assert lower.name == "lower_redistributes"


def test_the_attention_strategy_reaches_its_pass_unless_the_pipeline_says_otherwise():
    assert ShardAttention(strategy="allgather_kv") in build_pipeline(attention="allgather_kv")
    explicit = [{name: {"strategy": "allgather_kv"} if name == "shard_attention" else {}} for name in NAMES]
    assert ShardAttention(strategy="allgather_kv") in build_pipeline(explicit, attention="rign")
    with pytest.raises(ConfigError, match="unknown attention strategy 'rign'"):
        build_pipeline(attention="rign")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["normalise"], r"unknown pass 'normalise'; did you mean 'normalize'\?"),
        (["qqq"], r"unknown pass 'qqq'; known: draw_by_position, drop_logits, isolate_requests"),
        ([{"minimize_communication": {"join_keys": False}}],
         r"'minimize_communication' has no option 'join_keys'; did you mean 'join_keys_and_values'\?"),
        ([{"normalize": {"deep": True}}], r"pass 'normalize' has no option 'deep'; it has none"),
        ([{"normalize": {}, "raise_attention": {}}], r"a pass name or one \{name: options\} map, not \{"),
        ([["normalize"]], r"a pass name or one \{name: options\} map, not \['normalize'\]"),
    ],
    ids=["near", "far", "option", "no options", "two in a map", "a list"],
)  # fmt: skip
def test_a_mistake_in_the_pipeline_is_told(spec: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        build_pipeline(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (without("normalize"), r"'split_losses' requires 'canonical', .*; put normalize before it"),
        (without("shard_tokens"), r"'propagate_placements' requires 'tokens_sharded', .*; put shard_tokens before it"),
        (without("raise_attention"), r"'draw_by_position' requires 'attention_raised', .*; put raise_attention before"),
        (swapped("restore_outputs", "lower_redistributes"), r"'lower_redistributes' requires 'gathered_once'"),
        (swapped("minimize_communication", "lower_redistributes"), r"put minimize_communication before it"),
        ([*NAMES, "restore_outputs"], r"'restore_outputs' requires 'placed', .*; put propagate_placements before it"),
    ],
    ids=["canonical", "tokens", "attention", "gathered", "swapped", "broken by an earlier pass"],
)
def test_an_order_that_misses_an_invariant_is_refused_with_the_passes_that_establish_it(spec: Any, message: str):
    with pytest.raises(PipelineError, match=message):
        build_pipeline(spec)


def test_a_pipeline_that_ends_early_cannot_run_on_ranks():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(PipelineError, match=r"ends without 'local_shapes'; add localize_shapes"):
        parallelize(model, sp=1, pipeline=without("localize_shapes", "lower_attention", "overlap_communication"))
    with pytest.raises(PipelineError, match=r"ends without 'kernels_lowered'; add lower_attention"):
        parallelize(model, sp=1, pipeline=without("lower_attention"))
    with pytest.raises(PipelineError, match=r"ends without 'lowered'; add lower_redistributes"):
        parallelize(model, sp=1, pipeline=[])


def test_a_schedule_by_hand_is_checked_alike():
    with pytest.raises(PipelineError, match=r"'raise_attention' requires 'canonical'.*put normalize before it"):
        check_schedule([RaiseAttention()])
    check_schedule([Normalize(), RaiseAttention()])
    orphan = dataclasses.replace(RAISED, name="orphan")
    with pytest.raises(PipelineError, match=r"'orphan', .*; put a pass that establishes it before it"):
        check_schedule([type("Orphan", (Normalize,), {"requires": (orphan,)})()])


def test_a_step_shows_what_its_pass_changed():
    program = after(None, lambda self, inputs_embeds: (2 * inputs_embeds).view(1, -1, 2, 4))
    (step,) = run_pipeline(program, [Normalize()], trace=True)
    assert step.diff.splitlines()[:2] == ["--- before", "+++ normalize"]
    changed = [line for line in step.diff.splitlines()[2:] if line[0] in "+-"]
    assert [line[0] for line in changed] == ["-", "+"]
    assert "aten.view(" in changed[0]
    assert "aten.reshape(" in changed[1]
    assert step.lines_changed == 2
    assert step.seconds > 0


@pytest.mark.parametrize("kind", registered_passes().values(), ids=registered_passes())
def test_passes_are_frozen_dataclasses_with_a_docstring_for_the_table(kind: type[Pass]):
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert kind.__doc__
    assert not kind.__doc__.startswith(kind.__name__)
    assert kind.establishes
