"""Steps of decoding that are replayed give what steps that run give; a stand-in for CUDA graphs replays on a CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor

import sp_compile
from sp_compile import codegen, cuda_graphs, runtime
from sp_compile.compat import compile_graph
from sp_compile.cuda_graphs import Recorder
from sp_compile.errors import ConfigError
from sp_compile.host_part import PLANS, obstacle, split
from sp_compile.storage import Storage
from tests.local_graphs import local_programs
from tests.models import llama
from tests.passes.test_lower_attention import by_blocks
from tests.test_generation import check_greedy, prompts

pytest.importorskip("transformers")

aten = torch.ops.aten


def spoil(tensors: Sequence[Any]) -> None:
    for each in tensors:
        if isinstance(each, torch.Tensor):
            each.fill_(torch.nan if each.is_floating_point() else 0)


class Replayed:
    """Replays by running again on the inputs of the capture, into the memory of its results."""

    def warm_up(self, run: cuda_graphs.Run) -> Sequence[Any]:
        return run()

    def capture(self, run: cuda_graphs.Run) -> tuple[Callable[[], None], Sequence[Any]]:
        results: list[Any] = []  # which a capture does not compute

        def replay() -> None:
            fresh = run()
            results.extend(each.clone() if isinstance(each, torch.Tensor) else each for each in fresh[len(results) :])
            for mine, each in zip(results, fresh, strict=True):
                if isinstance(mine, torch.Tensor):
                    mine.copy_(each)

        return replay, results


@pytest.fixture
def replaying() -> Any:
    """The stand-in for CUDA graphs, whose memory holds nothing of use between two replays."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        yield patch


def stand_in(patch: pytest.MonkeyPatch) -> None:
    replayed = Recorder._replayed

    def spoiled(self: Recorder, found: Any, inputs: Any) -> Any:
        own = replayed(self, found, inputs)
        spoil([*found.targets, *found.results])
        return own

    patch.setattr(Recorder, "_replayed", spoiled)
    patch.setattr(runtime, "graphs_for", lambda device: Replayed)
    patch.setattr(cuda_graphs, "CAPTURABLE", ("nccl", "gloo"))


def parallel_of(model: Any, sp: int | None = 1, **options: Any) -> Any:
    return sp_compile.parallelize(model, sp=sp, **{"kernel": "flex", "codegen": "eager", **options})


def reasons(parallel: Any) -> list[str]:
    return [each.reason for each in parallel.report().fallbacks if "CUDA graphs" in each.reason]


# The two parts


@pytest.mark.parametrize("step", ["more", "decode"])
def test_the_parts_of_a_step_give_what_the_whole_gives(step: str, monkeypatch: pytest.MonkeyPatch):
    """Of a step for any number of new tokens, and of one for single tokens on a GPU, as far as a CPU can run it."""
    compared, run = [], codegen.LocalProgram.__call__

    def both(self: Any, inputs: Any, sizes: Any) -> Any:
        found, parts = run(self, inputs, sizes), split(self._program.gm)
        apart = parts.device(*inputs, *parts.host(*inputs))
        assert all(torch.equal(one, other) for one, other in zip(found, apart, strict=True))
        assert PLANS.isdisjoint(node.target for node in parts.device.graph.nodes)
        assert not PLANS.isdisjoint(node.target for node in parts.host.graph.nodes)
        assert len(parts.host.graph.nodes) < len(parts.device.graph.nodes)
        assert obstacle(parts) is None
        compared.append(self._program.cached)
        return found

    monkeypatch.setattr(codegen.LocalProgram, "__call__", both)
    on_card = step == "decode"
    with by_blocks() if on_card else nullcontext():
        parallel = parallel_of(llama(), codegen="inductor" if on_card else "eager")
        sp_compile.generate(parallel, prompts((3, 30, 11)), max_new_tokens=4, eos_token_id=-1)
    assert compared == ["first", step, step, step]


def test_code_is_generated_for_the_part_of_the_device():
    """Without a cache, beside which FlexAttention's code for CPUs does not serve."""
    parallel = parallel_of(llama(num_hidden_layers=1))
    batch = sp_compile.pack(prompts((3, 150, 30)))
    with torch.no_grad():
        expected = parallel(**batch, use_cache=False).logits
    (program,) = local_programs(parallel)
    parts = split(program.gm)
    mode = next(each.fake_mode for each in program.local_inputs if isinstance(each, FakeTensor))
    run = compile_graph(parts.device, parts.examples(program.local_inputs, mode), tracing(TracingContext(mode)))
    found: list[torch.Tensor] = []

    def apart(*inputs: Any) -> Any:
        found.extend(run(*inputs, *parts.host(*inputs)))
        return program.gm(*inputs)

    (variant,) = parallel._compiled[0]._variants.values()
    variant.local._variants[0] = ([], {}, apart)
    with torch.no_grad():
        parallel(**batch, use_cache=False)
    assert (found[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def graph_of(build: Callable[[fx.Graph, fx.Node], Any], device: str = "cpu") -> fx.GraphModule:
    """A graph over one input, whose values are known to the nodes."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, device=device)
    graph.output((build(graph, x),))
    return fx.GraphModule(torch.nn.Module(), graph)


def planned(graph: fx.Graph, of: fx.Node) -> fx.Node:
    plan = graph.call_function(torch.ops.sp_compile.block_mask.default, ([of], [], "", None, of, of))
    plan.meta["val"] = torch.empty(1, 1, 2, 2)
    return plan


def test_a_copy_to_the_device_ends_the_part_of_the_host():
    def build(graph: fx.Graph, x: fx.Node) -> Any:
        listed = graph.call_function(aten.unsqueeze.default, (planned(graph, x), 1))
        moved = graph.call_function(aten.to.device, (listed, torch.device("meta"), torch.int32))
        return graph.call_function(aten.add.Tensor, (moved, x))

    parts = split(graph_of(build, "meta"))
    assert [node.target for node in parts.host.graph.nodes][2:4] == [aten.unsqueeze.default, aten.to.device]
    assert [node.op for node in parts.device.graph.nodes] == ["placeholder", "placeholder", "call_function", "output"]
    assert obstacle(parts) is None


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda graph, x: graph.call_function(aten.rand_like.default, (x,)), "it draws random numbers"),
        (
            lambda graph, x: planned(graph, graph.call_function(aten.linear.default, (x, x))),
            "plans of attention depend on what it computes",
        ),
        (
            lambda graph, x: graph.call_function(torch.ops.sp_compile.exchange_rows.default, (x, x, x, x, "")),
            "how many rows are exchanged is read on the host",
        ),
    ],
)
def test_what_cannot_be_replayed_is_told(build: Any, reason: str):
    found = obstacle(split(graph_of(build)))
    assert found is not None
    assert found[1] == reason


def test_sizes_that_depend_on_data_cannot_be_replayed():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        chosen = torch.nonzero(mode.from_tensor(torch.ones(3)))

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        node = graph.call_function(aten.nonzero.default, (x,))
        node.meta["val"] = chosen
        return node

    assert obstacle(split(graph_of(build)))[1] == "its size or value depends on data"


# Recording


class Doubled:
    """Twice the first input and the second, and how often that ran."""

    def __init__(self) -> None:
        self.ran = 0

    def __call__(self, x: torch.Tensor, held: torch.Tensor, n: int) -> list[Any]:
        self.ran += 1
        return [2 * x + n, held, n]


def recorder(run: Any, limit: int = 8) -> tuple[Recorder, list[str]]:
    notes: list[str] = []
    return Recorder(run, frozenset({1}), frozenset({3}), Replayed(), limit, notes.append), notes


def test_what_comes_a_third_time_is_recorded_and_then_replayed(replaying):
    run = Doubled()
    record, notes = recorder(run)
    held, results = torch.ones(5), []
    for i in range(6):
        x = torch.arange(12.0).reshape(3, 4) + i
        results.append((x, record(x, held, 7)))
        assert (len(record), record.replays) == ((1, i - 1) if i > 1 else (0, 0))
        held += 1  # read where it is
    for i, (x, (twice, seen, number)) in enumerate(results):
        assert torch.equal(twice, 2 * x + 7)
        assert torch.equal(seen, torch.full((5,), 1.0 + i)) or i < 2  # which run as they are
        assert number == 7
    assert not notes


def test_inputs_that_are_not_read_may_change(replaying):
    record, _ = recorder(lambda x, held, n, unread: [x + n])
    held = torch.ones(5)
    for i in range(6):
        assert torch.equal(record(torch.full((2,), float(i)), held, 1, torch.ones(i))[0], torch.full((2,), i + 1.0))
    assert record.replays == 4


def test_expanded_inputs_keep_their_strides(replaying):
    strides = []

    def run(x: torch.Tensor, held: torch.Tensor) -> list[torch.Tensor]:
        strides.append(x.stride())
        return [x + held]

    record, _ = recorder(run)
    held = torch.zeros(())
    for i in range(5):
        x = (torch.arange(6.0) + i).reshape(2, 3)[:, ::2].unsqueeze(1).expand(2, 4, 2)
        assert torch.equal(record(x, held)[0], x)
    assert {*strides} == {(3, 0, 2)}


@pytest.mark.parametrize("other", ["address", "shape", "number", "dtype", "strides"])
def test_another_key_is_not_replayed(other: str, replaying):
    run = Doubled()
    record, _ = recorder(run)
    x, held = torch.ones(2, 2), torch.ones(5)
    for _ in range(3):
        record(x, held, 1)
    before = run.ran
    changed = {
        "address": (x, held.clone(), 1),
        "shape": (torch.ones(2, 3), held, 1),
        "number": (x, held, 2),
        "dtype": (x.double(), held, 1),
        "strides": (torch.ones(2, 4)[:, ::2], held, 1),
    }[other]
    found = record(*changed)
    assert (run.ran, record.replays) == (before + 1, 1)
    assert torch.equal(found[0], 2 * changed[0] + changed[2])


def test_graphs_that_were_used_longest_ago_go_first(replaying):
    record, _ = recorder(Doubled(), limit=2)
    held = torch.ones(5)

    def steps(size: int, times: int) -> int:
        before = record.replays
        for _ in range(times):
            assert torch.equal(record(torch.ones(size), held, 0)[0], torch.full((size,), 2.0))
        return record.replays - before

    assert [steps(size, 3) for size in (1, 2)] == [1, 1]
    assert steps(1, 1) == 1
    assert steps(3, 3) == 1  # in the place of the second
    assert len(record) == 2
    assert [steps(1, 1), steps(2, 2)] == [1, 0]


def test_graphs_of_memory_that_is_gone_are_dropped(replaying):
    record, _ = recorder(lambda x, held: [x + 1])
    record._graphs.capture = lambda run: (lambda: None, [torch.ones(2)])  # which keeps no input, as a CUDA graph
    for _ in range(4):
        held = torch.ones(5)
        for _ in range(3):
            record(torch.ones(2), held)
        del held
        gc.collect()
    assert len(record) == 1


def test_a_failure_to_record_is_told_and_steps_run_on():
    class Failing(Replayed):
        def capture(self, run: cuda_graphs.Run) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    notes: list[str] = []
    record, held = Recorder(Doubled(), frozenset({1}), frozenset(), Failing(), 8, notes.append), torch.ones(5)
    for _ in range(5):
        assert torch.equal(record(torch.ones(2), held, 3)[0], torch.full((2,), 5.0))
    assert notes == ["recording failed: RuntimeError: operation not permitted when stream is capturing"]
    assert len(record) == 0


# Decoding


def test_generation_is_the_same_while_the_cache_grows_and_requests_end(replaying):
    model, requests = llama(), prompts((3, 30, 11))
    parallel = parallel_of(model)
    cache = sp_compile.ShardedCache(parallel, page_size=16)
    options: dict[str, Any] = {"max_new_tokens": [40, 12, 25], "eos_token_id": -1, "cache": cache}
    found = sp_compile.generate(parallel, requests, logprobs=True, prompt_logprobs=True, **options)
    assert [len(each.tokens) for each in found] == [40, 12, 25]
    assert check_greedy(model, requests, found) <= 1e-5
    graphs, replays = parallel.report().replayed
    assert graphs >= 2
    assert 10 <= replays <= 39
    assert f"{graphs} CUDA graphs, {replays} steps replayed" in str(parallel.report())
    assert not reasons(parallel)


def ragged(sp: int | None) -> tuple[list[float], int]:
    """Requests of their own pace, of which one joins and one ends; errors of logits, and steps that were replayed."""
    model, (a, b, c) = llama(), prompts((80, 90, 60))
    parallel = parallel_of(model, sp)
    cache, worst, at = sp_compile.ShardedCache(parallel, page_size=8), [], dict[int, int]()

    def run(parts: dict[int, tuple[torch.Tensor, int]]) -> None:
        batch = sp_compile.pack([ids[at[i] : at[i] + new] for i, (ids, new) in parts.items()], numbers=[*parts])
        with torch.no_grad():
            out = batch.split(parallel(**batch, past_key_values=cache).logits)
            for (i, (ids, new)), logits in zip(parts.items(), out, strict=True):
                expected = model(ids[None, : at[i] + new], use_cache=False).logits[0, at[i] :]
                worst.append(float((logits[0] - expected).abs().max() / expected.abs().max()))
                at[i] += new

    at |= {0: 0, 1: 0}
    run({0: (a, 20), 1: (b, 5)})
    for _ in range(10):
        run({0: (a, 1), 1: (b, 1)})
    at[2] = 0
    run({2: (c, 30)})
    for _ in range(10):
        run({2: (c, 1), 0: (a, 1), 1: (b, 1)})
    cache.finish(0)
    for _ in range(10):
        run({1: (b, 1), 2: (c, 1)})
    return worst, parallel.report().replayed[1]


def test_steps_of_single_tokens_on_a_gpu_are_replayed(replaying):
    """Of which one graph serves all, though parts of keys are planned anew in each."""
    model, requests = llama(), prompts((3, 130, 11))
    with by_blocks():
        parallel = parallel_of(model, codegen="inductor")
        cache = sp_compile.ShardedCache(parallel, max_tokens=2048)
        options = {"max_new_tokens": 9, "eos_token_id": -1, "logprobs": True, "prompt_logprobs": True}
        found = sp_compile.generate(parallel, requests, cache=cache, **options)
    assert check_greedy(model, requests, found) <= 1e-5
    assert parallel.report().replayed == (1, 6)
    assert reasons(parallel) == []


def test_requests_join_and_end_between_replays(replaying):
    worst, replays = ragged(1)
    assert max(worst) <= 1e-5
    assert replays >= 10


def on_ranks() -> tuple[list[float], int]:
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        return ragged(None)


def test_ranks_replay_collectives_too(ranks):
    for worst, replays in ranks(2).run(on_ranks):
        assert max(worst) <= 1e-5
        assert replays >= 5


def other_backend() -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        patch.setattr(cuda_graphs, "CAPTURABLE", ("nccl",))
        parallel = parallel_of(llama(), None)
        sp_compile.generate(parallel, prompts((3, 9)), max_new_tokens=3, eos_token_id=-1)
        assert parallel.report().replayed is None
        return reasons(parallel)


def test_collectives_that_no_graph_can_hold_are_told(ranks):
    for found in ranks(2).run(other_backend):
        assert found == [
            "steps are not replayed by CUDA graphs: its collectives run on gloo, which no CUDA graph can hold; use nccl"
        ]


def test_a_kernel_that_the_host_steers_is_told(replaying):
    parallel = parallel_of(llama(), kernel="tiles", strict=True)
    sp_compile.generate(parallel, prompts((3, 9)), max_new_tokens=6, eos_token_id=-1)
    assert reasons(parallel) == ["steps are not replayed by CUDA graphs: kernel tiles is steered by the host"]
    assert parallel.report().replayed is None


def test_long_steps_run(replaying):
    replaying.setattr(cuda_graphs, "MOST_ROWS", 2)
    parallel = parallel_of(llama())
    sp_compile.generate(parallel, prompts((3, 9, 5)), max_new_tokens=8, eos_token_id=-1)
    assert parallel.report().replayed == (0, 0)


@pytest.mark.parametrize("asked", ["auto", "never"])
def test_nothing_is_split_on_a_cpu_or_where_it_is_not_wanted(asked: str, monkeypatch: pytest.MonkeyPatch):
    if asked == "never":
        monkeypatch.setattr(runtime, "graphs_for", lambda device: Replayed)
    monkeypatch.setattr(codegen, "split", lambda gm: pytest.fail("it was split"))
    parallel = parallel_of(llama(), cuda_graphs=asked)
    sp_compile.generate(parallel, prompts((3, 9)), max_new_tokens=3, eos_token_id=-1)
    assert parallel.report().replayed is None
    assert not parallel.report().fallbacks


def test_the_option_is_checked():
    with pytest.raises(ConfigError, match="cuda_graphs='always' is not known; pass one of auto, never"):
        parallel_of(llama(), cuda_graphs="always")
    with pytest.raises(ConfigError, match="did you mean 'cuda_graphs'"):
        parallel_of(llama(), cuda_graph="never")


def test_slots_grow_by_a_quarter_in_whole_pages():
    storage = Storage(None, [0], [torch.zeros(1, 1, 0, 2)], None)
    sizes = []
    for asked in range(0, 4000, 8):
        storage.reserve(asked, page=8)
        assert max(asked, 8) <= len(storage.index) <= max(1.25 * asked, asked) + 8
        assert len(storage.index) % 8 == 0
        sizes.append(len(storage.index))
    assert len({*sizes}) <= 35


def test_generated_code_is_replayed(replaying):
    """Of the part that is left of attention in tiles, which the stand-in can replay as no CUDA graph could."""
    replaying.setattr(cuda_graphs, "obstacle", lambda parts: None)
    model, requests = llama(num_hidden_layers=1), prompts((3, 30, 11))
    parallel = parallel_of(model, kernel="tiles", codegen="inductor")
    options: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": -1, "logprobs": True, "prompt_logprobs": True}
    found = sp_compile.generate(parallel, requests, **options)
    assert check_greedy(model, requests, found) <= 1e-5
    assert parallel.report().replayed[1] >= 10
