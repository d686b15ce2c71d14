"""Invariants catch graphs that were broken on purpose, and the pipeline catches wrong passes by them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sp_compile import invariants, ops
from sp_compile.collectives import is_wait
from sp_compile.errors import FallbackError, PassCrashError, PostconditionError, PreconditionError
from sp_compile.invariants import CANONICAL, FUNCTIONAL, Invariant, Violation
from sp_compile.ops import AttentionArgs
from sp_compile.passes.normalize import Normalize
from sp_compile.pipeline import Pass, run_pipeline
from sp_compile.placements import REPLICATE, Gathered, Partial, Shard
from sp_compile.program import Program, insert_redistribute, placement
from tests.passes.graphs import after, call, calls, embeds, qkv, repeated, small

aten = torch.ops.aten


def attention(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv(inputs_embeds)
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)


def doubled(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    return (2 * inputs_embeds).view(1, -1, 2, 4)


def in_pairs(self: Any, inputs_embeds: torch.Tensor) -> Any:
    return (2 * inputs_embeds).split(4, -1)[0] + torch.arange(4)


def add_after(node: Any, target: Any, *args: Any, **meta: Any) -> Any:
    """Insert a call after a node whose readers then read the call."""
    with node.graph.inserting_after(node):
        new = node.graph.call_function(target, (node, *args))
    new.meta.update({"val": node.meta["val"], **meta})
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def write_in_place(program: Program) -> None:
    call(program, "aten.mul").target = aten.mul_.Tensor


def use_view(program: Program) -> None:
    call(program, "aten.reshape").target = aten.view.default


def assert_metadata(program: Program) -> None:
    add_after(call(program, "aten.mul"), aten._assert_tensor_metadata.default)


def isolate_nothing(program: Program) -> None:
    program.isolated = True


def read_tokens_whole(program: Program) -> None:
    cut = call(program, "redistribute")
    cut.replace_all_uses_with(cut.args[0])
    program.graph.erase_node(cut)


def place(op: str, placed: Any) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        calls(program, op)[0].meta["placement"] = placed

    return change


def gather_one_input(program: Program) -> None:
    add = call(program, "aten.add")
    add.replace_input_with(add.args[0], insert_redistribute(program, add.args[0], REPLICATE, add))


def forget_a_gather(program: Program) -> None:
    summed = call(program, "aten.sum")
    summed.args = (summed.args[0].args[0], *summed.args[1:])


def move_gathered_rows(program: Program) -> None:
    key = call(program, "sp_compile.attention").args[1]
    add_after(key, aten.transpose.int, 1, 2, placement=Gathered(2))


def keys_in_normal_order(program: Program) -> None:
    call(program, "sp_compile.attention").args[1].meta["placement"] = REPLICATE


def claim_a_cache(program: Program) -> None:
    program.cached = "more"


def drop_plan(program: Program) -> None:
    node = call(program, "sp_compile.attention")
    node.args = tuple(AttentionArgs(*node.args)._replace(plan=None))


def ask_for_flex(program: Program) -> None:
    node = call(program, "sp_compile.attention")
    node.args = tuple(AttentionArgs(*node.args)._replace(kernel="flex"))


def return_rows(program: Program) -> None:
    output = program.graph.output_node()
    output.args = ([output.args[0][0].args[0]],)


def gather_twice(program: Program) -> None:
    rows = call(program, "aten.reshape")
    insert_redistribute(program, rows, Gathered(1), program.graph.output_node())


def keep_a_redistribute(program: Program) -> None:
    add_after(call(program, "aten.mul"), ops.redistribute)


def keep_row_numbers(program: Program) -> None:
    node = call(program, "aten.mul")
    with program.graph.inserting_after(node):
        program.graph.call_function(ops.row_numbers, (0, 1, 1))


def keep_a_global_size(program: Program) -> None:
    node = call(program, "aten.mul")
    node.meta["val"] = after(None, doubled).graph.find_nodes(op="placeholder")[1].meta["val"]


def projected(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    q, k, v = (F.linear(inputs_embeds, each)[:, None] for each in self.weights.chunk(3))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def lossy(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(inputs_embeds[0], torch.zeros(inputs_embeds.shape[1], dtype=torch.int64))


def reduce_at_once(program: Program) -> None:
    (loss,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.cross_entropy_loss.default)
    loss.args = (*loss.args[:3], 2, *loss.args[4:])


def drop_by_state(program: Program) -> None:
    output = program.graph.output_node()
    with program.graph.inserting_before(output):
        program.graph.call_function(torch.ops.aten.dropout.default, (output.all_input_nodes[0], 0.5, True))


def drop_weights_by_state(program: Program) -> None:
    (node,) = ops.attention_nodes(program.graph)
    node.args = tuple(AttentionArgs(*node.args)._replace(rule="keep = bernoulli(score, 0.9)"))


def want_only_the_loss(program: Program) -> None:
    program.outputs = "loss"


def want_gradients(program: Program) -> None:
    program.differentiable = True
    for node in program.graph.find_nodes(op="placeholder"):
        node.meta["requires_grad"] = node.name == "inputs_embeds"


def wait_early(program: Program) -> None:
    wait = next(node for node in program.graph.nodes if is_wait(node))
    wait.args[0].append(wait)


@dataclass(frozen=True)
class Broken:
    """An invariant, the last pass before the check, the model, what breaks the graph, and what is said."""

    invariant: Invariant
    last: str
    model: Callable[..., Any] | torch.nn.Module
    change: Callable[[Program], None]
    says: str


BROKEN = {
    "a write in place": Broken(
        invariants.FUNCTIONAL, "normalize", doubled, write_in_place,
        r"%mul\w* \(aten.mul_\): expected no op that writes in place, found aten.mul_.Tensor"),
    "a view": Broken(
        invariants.CANONICAL, "normalize", doubled, use_view,
        r"%view \(aten.view\): expected aten.reshape for every change of shape, found aten.view.default"),
    "an assertion": Broken(
        invariants.CANONICAL, "normalize", doubled, assert_metadata,
        r"\(aten._assert_tensor_metadata\): expected no metadata assertions, found aten._assert_tensor_metadata"),
    "a loss of all rows": Broken(
        invariants.LOSSES_SPLIT, "split_losses", lossy, reduce_at_once,
        r"%cross_entropy_loss\w* \(.*\): expected a loss for each row, summed after it, found one that is reduced at"),
    "logits beside the loss": Broken(
        invariants.LOGITS_DROPPED, "drop_logits", doubled, want_only_the_loss,
        r"%view \(aten.reshape\): expected outputs that are single values, found shape \[1, s\d+, 2, 4\]"),
    "dropout that the generator's state decides": Broken(
        invariants.DRAWN, "draw_by_position", doubled, drop_by_state,
        r"%dropout\w* \(aten.dropout\): expected a mask drawn by the seed and the place, found one drawn by what ran"),
    "weights that are dropped by the generator's state": Broken(
        invariants.DRAWN, "draw_by_position", attention, drop_weights_by_state,
        r"%attention\w* \(sp_compile.attention\): expected weights dropped by the seed and the place, found by"),
    "a weight whose gradient stays on its rank": Broken(
        invariants.GRADIENTS_PLACED, "place_gradients", doubled, want_gradients,
        r"%inputs_embeds \(.*\): expected a weight whose gradient is summed over ranks, found used by %"),
    "attention as it was written": Broken(
        invariants.RAISED, "normalize", attention, lambda program: None,
        r"%scaled_dot_product_attention \(.*\): expected sp_compile.attention, or the reason .*, found aten.sc"),
    "a mask that was not joined": Broken(
        invariants.APART, "isolate_requests", attention, isolate_nothing,
        r"%attention_default \(sp_compile.attention\): expected a mask that hides other requests, found 'mask = le"),
    "tokens read whole": Broken(
        invariants.TOKENS_SHARDED, "shard_tokens", doubled, read_tokens_whole,
        r"%mul\w* \(aten.mul\): expected %inputs_embeds cut to the rank's rows along dim 1, found used whole"),
    "rows in another dim than the rule says": Broken(
        invariants.PLACED, "propagate_placements", doubled, place("aten.mul", Shard(2)),
        r"%mul\w* \(aten.mul\): expected Shard\(1\), found Shard\(2\)"),
    "a whole value taken for rows": Broken(
        invariants.PLACED, "propagate_placements", in_pairs, place("aten.arange", Shard(0)),
        r"%arange \(aten.arange\): expected a rule for its inputs' placements, found no rule"),
    "a part of a tuple placed apart": Broken(
        invariants.PLACED, "propagate_placements", in_pairs, place("getitem", REPLICATE),
        r"%getitem \(getitem\): expected Shard\(1\), found Replicate"),
    "a whole input beside rows": Broken(
        invariants.PLACED, "propagate_placements", lambda self, inputs_embeds: inputs_embeds + inputs_embeds.sin(),
        gather_one_input, r"%add_\d+ \(aten.add\): expected input %redistribute\w* as Shard\(1\), found Replicate"),
    "rows where a gather is needed": Broken(
        invariants.PLACED, "propagate_placements", lambda self, inputs_embeds: (2 * inputs_embeds).sum(1),
        forget_a_gather, r"%sum_1 \(aten.sum\): expected a rule .*, found runs over the token dim"),
    "a sum over ranks that was not taken": Broken(
        invariants.PLACED, "propagate_placements", doubled, place("redistribute", Partial("sum")),
        r"%mul\w* \(aten.mul\): expected .*, found "),
    "gathered rows in another dim than they moved to": Broken(
        invariants.PLACED, "shard_attention", attention, move_gathered_rows,
        r"%transpose_int \(aten.transpose\): expected Gathered\(1\), found Gathered\(2\)"),
    "keys in normal order": Broken(
        invariants.KEYS_PADDED, "shard_attention", attention, keys_in_normal_order,
        r"%attention_default \(sp_compile.attention\): expected %redistribute_\d as Gathered\(2\), found Replicate"),
    "attention that does not see the cache": Broken(
        invariants.CACHE_SEEN, "shard_cache", attention, claim_a_cache,
        r"%attention_default \(sp_compile.attention\): expected a merge with attention over held keys, found none"),
    "attention without a plan": Broken(
        invariants.PLANNED, "plan_attention", attention, drop_plan,
        r"%attention_default \(sp_compile.attention\): expected a plan, found none"),
    "attention that was not lowered": Broken(
        invariants.KERNELS_LOWERED, "lower_attention", attention, ask_for_flex,
        r"%attention_default \(sp_compile.attention\): expected no attention that FlexAttention computes, found kern"),
    "an output left on the ranks": Broken(
        invariants.RESTORED, "restore_outputs", doubled, return_rows,
        r"%view \(aten.reshape\): expected outputs in normal order on every rank, found Shard\(1\)"),
    "a value gathered twice": Broken(
        invariants.GATHERED_ONCE, "minimize_communication", doubled, gather_twice,
        r"%redistribute_\d \(redistribute\): expected %view gathered once, by %redistribute_\d, found gathered again"),
    "a redistribute": Broken(
        invariants.LOWERED, "lower_redistributes", doubled, keep_a_redistribute,
        r"%redistribute\w* \(redistribute\): expected index selections, functional collectives and .*, found redist"),
    "row numbers": Broken(
        invariants.LOWERED, "lower_redistributes", doubled, keep_row_numbers,
        r"%row_numbers \(row_numbers\): expected index selections, functional collectives and .*, found row_"),
    "a wait that comes early": Broken(
        invariants.OVERLAPPED, "overlap_communication", small(projected, weights=torch.ones(12, 8)), wait_early,
        r"%wait_tensor\w* \(.*\): expected a wait behind all work that does not need it, found %linear\w* after it"),
    "a global size": Broken(
        invariants.LOCAL, "localize_shapes", doubled, keep_a_global_size,
        r"%mul\w* \(aten.mul\): expected shapes of the local view, found global size s\d+"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_a_broken_graph_is_caught_with_the_node_the_expectation_and_the_finding(case: Broken):
    program = after(case.last, case.model, embeds(32) if case.model is attention else None)
    if case.invariant is not invariants.RAISED:
        case.invariant.check(program)
    case.change(program)
    with pytest.raises(Violation) as caught:
        case.invariant.check(program)
    assert re.search(f"node .*{case.says}", str(caught.value)), caught.value


def test_every_invariant_has_a_broken_graph():
    defined = {each for each in vars(invariants).values() if isinstance(each, Invariant)}
    assert defined == {case.invariant for case in BROKEN.values()}


def test_sdpa_with_a_reason_may_stay():
    program = after(
        "raise_attention", lambda self, inputs_embeds: F.scaled_dot_product_attention(*[inputs_embeds.mT] * 3)
    )
    invariants.RAISED.check(program)
    del call(program, "aten.scaled_dot_product_attention").meta["not_raised"]
    with pytest.raises(Violation):
        invariants.RAISED.check(program)


def test_sharded_outputs_need_not_be_restored():
    program = after("restore_outputs", doubled, outputs="sharded")
    assert placement(program.graph.output_node().args[0][0]) == Shard(1)
    invariants.RESTORED.check(program)


@dataclass(frozen=True)
class Wrong(Pass):
    """Writes in place."""

    name = "wrong"
    requires = ()

    def run(self, program: Any) -> None:
        node = call(program, "aten.mul")
        node.target = aten.mul_.Scalar


@dataclass(frozen=True)
class Claims(Wrong):
    """Writes in place and claims not to."""

    name = "claims"
    establishes = (FUNCTIONAL,)


@dataclass(frozen=True)
class Admits(Wrong):
    """Writes in place and says so."""

    name = "admits"
    breaks = (FUNCTIONAL,)


@dataclass(frozen=True)
class Needs(Pass):
    """Does nothing with a graph that it wants canonical."""

    name = "needs"
    requires = (CANONICAL,)

    def run(self, program: Any) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Raises(Pass):
    """Raises what it is given."""

    name = "raises"
    error: type[Exception] = KeyError

    def run(self, program: Any) -> None:
        raise self.error("no such node")


def captured() -> Program:
    return after(None, doubled)


def test_a_pass_that_does_not_establish_what_it_claims_is_caught():
    with pytest.raises(
        PostconditionError, match=r"after pass 'claims': functional: node %mul_\d+ \(aten.mul_\)"
    ) as caught:
        run_pipeline(captured(), [Claims()])
    assert "expected no op that writes in place, found aten.mul_.Scalar" in str(caught.value)


def test_a_pass_that_breaks_what_an_earlier_one_established_is_caught_unless_it_says_so():
    with pytest.raises(PostconditionError, match="after pass 'wrong': functional"):
        run_pipeline(captured(), [Normalize(), Wrong()])
    assert [step.name for step in run_pipeline(captured(), [Normalize(), Admits()])] == ["normalize", "admits"]


def test_a_graph_that_does_not_hold_what_a_pass_requires_is_caught_before_it_runs():
    with pytest.raises(PreconditionError, match=r"before pass 'needs': canonical: node %view \(aten.view\)"):
        run_pipeline(captured(), [Needs(), Raises()])


def test_a_pass_that_raises_is_named_with_the_error():
    with pytest.raises(PassCrashError, match=r"pass 'raises' crashed: KeyError: 'no such node'") as caught:
        run_pipeline(captured(), [Raises()])
    assert isinstance(caught.value.__cause__, KeyError)


def test_errors_for_the_caller_are_not_taken_for_crashes():
    with pytest.raises(FallbackError, match=r"^no such node$"):
        run_pipeline(captured(), [Raises(FallbackError)])


def test_without_verification_nothing_is_checked():
    assert len(run_pipeline(captured(), [Claims(), Needs()], verify=False)) == 2
