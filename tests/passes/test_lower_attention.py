"""FlexAttention in place of the attention that it computes: what it captures, its functions, blocks and results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import transformers
from torch import fx, nn
from torch.nn.attention.flex_attention import create_block_mask

import sp_compile
from sp_compile import codegen
from sp_compile.builder import Builder
from sp_compile.graph_text import lines
from sp_compile.invariants import KERNELS_LOWERED
from sp_compile.kernels import choice
from sp_compile.kernels.flex import BLOCK, arguments_of, blocks, rule_graph
from sp_compile.kernels.plan import with_valid
from sp_compile.layout import token_layout
from sp_compile.ops import AttentionArgs
from sp_compile.passes.lower_attention import LowerAttention
from sp_compile.program import Program
from sp_compile.runtime import ParallelModule
from sp_compile.score_rule import DRAWS, FUNCTIONS, evaluate
from sp_compile.symbols import shape_of
from tests.local_graphs import local_programs
from tests.models import llama
from tests.passes.graphs import (
    LENGTHS,
    Ranks,
    after,
    call,
    calls,
    embeds,
    ops_of,
    packed,
    qkv,
    repeated,
    run_whole,
)
from tests.passes.test_plan_attention import layers
from tests.ranks import RankPool
from tests.test_flex import Flex, alibi, causal, distances, documents, prefix, softcap
from tests.test_generation import check_greedy, prompts

SIZES = (2, 3, 5, 6)  # batch, heads, queries, keys


class FlexArgs(NamedTuple):
    """The arguments of a ``flex_attention`` node."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    score: fx.Node
    blocks: tuple[Any, ...]
    scale: float
    options: Mapping[str, Any]
    score_captured: Sequence[fx.Node]
    mask_captured: Sequence[fx.Node]

    @property
    def mask(self) -> fx.Node:
        """The mask function."""
        return self.blocks[-1]


def program_of(model: Any, kernel: str = "flex", last: str = "lower_attention", sp: int = 2) -> Program:
    inputs = packed(32) if isinstance(model, Flex) else embeds(32)
    return after(last, model, inputs, sp=sp, options={"plan_attention": {"kernel": kernel}})


def windows(*sizes: int | None) -> Callable[..., torch.Tensor]:
    return lambda self, inputs_embeds: layers([*sizes], inputs_embeds)


def flexes(program: Program) -> list[FlexArgs]:
    return [FlexArgs(*node.args) for node in calls(program, "flex_attention")]


# which nodes


def test_flex_attention_replaces_the_attention_that_it_computes_and_no_other():
    program = program_of(windows(None, 3, None), last="localize_shapes")
    other = calls(program, "sp_compile.attention")[1]
    other.args = tuple(AttentionArgs(*other.args)._replace(kernel="dense", plan=None))
    LowerAttention().run(program)
    program.graph.lint()
    KERNELS_LOWERED.check(program)
    attentions = ("flex_attention", "sp_compile.attention")
    assert [each for each in ops_of(program) if each in attentions] == [attentions[i] for i in (0, 1, 0)]
    assert call(program, "sp_compile.attention") is other
    assert len(calls(program, "sp_compile.block_mask")) == 1  # that of the window has no reader any more


@pytest.mark.parametrize("kernel", ["tiles", "dense"])
def test_other_kernels_stay_as_they_are(kernel: str):
    program = program_of(windows(None, 3), kernel, last="localize_shapes")
    before = [*lines(program)]
    LowerAttention().run(program)
    assert [*lines(program)] == before
    assert len(calls(program, "sp_compile.attention")) == 2


# what functions capture


@pytest.mark.parametrize("sp", [1, 2])
def test_layers_share_what_they_capture_and_their_functions(sp: int):
    program = program_of(windows(None, 3, None, 3), sp=sp)
    found = flexes(program)
    for one, other in ((0, 2), (1, 3)):
        assert found[one].blocks[2:] == found[other].blocks[2:]
        assert found[one][7:] == found[other][7:]
        assert found[one].score is found[other].score
    assert found[0].mask is not found[1].mask
    made = [(each.args[0], tuple(each.args[1]), *each.args[2:]) for each in calls(program, "sp_compile.captured")]
    assert len(made) == len(set(made))
    assert sum(dims != (0, 1, 2, 3) for _, dims, _ in made) == 4  # rows, columns, starts, and keys that exist
    functions = {each.target for each in program.graph.find_nodes(op="get_attr")}
    assert functions == {name for name, _ in program.gm.named_children()}
    assert len(functions) == 4


@pytest.mark.parametrize(
    ("model", "score", "mask", "sp"),
    [
        (Flex(), [], [], 1),
        (Flex(), [], [], 2),
        (Flex(causal, alibi), ["x0", "x1", "x2"], ["x0", "x1"], 1),
        (Flex(None, distances), ["x0", "x1", "table0"], [], 2),
        (Flex(documents), [], ["x0", "x1", "x2", "x3"], 2),
    ],
    ids=["nothing", "nothing on ranks", "ALiBi", "relative positions", "documents"],
)
def test_functions_capture_what_they_read(model: Flex, score: list[str], mask: list[str], sp: int):
    program = program_of(model, last="localize_shapes", sp=sp)
    operands = AttentionArgs(*call(program, "sp_compile.attention").args).operands
    LowerAttention().run(program)
    (found,) = flexes(program)
    read_mask = [*mask, f"x{len(operands)}"]  # the keys that exist
    functions = ((found.score, found.score_captured, score, 5), (found.mask, found.mask_captured, read_mask, 4))
    for function, captured, names, own in functions:
        graph = getattr(program.gm, function.target).graph
        named = [each.target for each in graph.find_nodes(op="placeholder")][own:]
        sized = ["size0"] if names else []  # all of one symbol
        assert named == [*names, *sized]
        assert len(captured) == len(named)
        vectors = captured[: len(names)]
        assert {each.target for each in vectors} <= {torch.ops.sp_compile.captured.default}
        for name, each in zip(names, vectors, strict=True):
            if name[1:] in map(str, range(len(operands))):
                assert each.args[0] is operands[int(name[1:])]


# functions by element


def check(
    rule: str,
    operands: Sequence[torch.Tensor] = (),
    tables: Sequence[torch.Tensor] = (),
    valid: torch.Tensor | None = None,
) -> None:
    """Both functions of a rule give for each element what the rule does for all."""
    rule, operands = with_valid(rule, operands, valid)
    score = torch.randn(SIZES)
    right = evaluate(rule, operands, ("mask", "score", "bias"), score, tables)
    changed = right.get("score", score) + right.get("bias", 0)
    for output, expected in (("mask", right.get("mask", torch.tensor(True))), ("score", changed)):
        names = arguments_of(rule, output)
        kept = {i: varying(each) for i, each in enumerate(operands) if f"x{i}" in names}
        read = {i: len(each) > 1 for i, each in enumerate(tables) if f"table{i}" in names}
        captured = [operands[i].reshape([operands[i].shape[dim - 4] for dim in dims] or [1])
                    for i, dims in kept.items()]  # fmt: skip
        captured += [tables[i] if per_head else tables[i][0] for i, per_head in read.items()]
        function = rule_graph(nn.Module(), rule, output, kept, read, sizes=2)
        places = [each.flatten() for each in torch.meshgrid(*map(torch.arange, SIZES), indexing="ij")]
        given = [score.flatten(), *places] if output == "score" else places
        found = torch.vmap(lambda *own: function(*own, *captured, 5, 6))(*given)  # noqa: B023
        torch.testing.assert_close(found.reshape(SIZES), expected.expand(SIZES), equal_nan=True)


def varying(operand: torch.Tensor) -> tuple[int, ...]:
    return tuple(dim for dim in range(4) if dim >= 4 - operand.dim() and operand.shape[dim - 4] != 1)


ROWS, COLUMNS = torch.arange(SIZES[2])[:, None] * 2 - 3, torch.arange(SIZES[3])[None] - 2
PADDING = (torch.arange(SIZES[3]) >= torch.tensor([0, 2])[:, None])[:, None, None]
SLOPES = torch.tensor([0.5, -1.0, 2.0]).reshape(1, 3, 1, 1)
INDEX = "t0 = sub(x0, x1); t1 = add(t0, 8)"
PAIR = [ROWS, COLUMNS]
CASES: dict[str, tuple[Any, ...]] = {
    "nothing": ("",),
    "causal": ("mask = le(x1, x0)", PAIR),
    "window": ("t0 = le(x1, x0); t1 = sub(x0, x1); t2 = lt(t1, 3); mask = and(t0, t2)", PAIR),
    "padded batch": ("t0 = le(x1, x0); mask = and(t0, x2)", [*PAIR, PADDING]),
    "window of each head": ("t0 = sub(x0, x1); mask = lt(t0, x2)", [*PAIR, SLOPES]),
    "window of each head of three dims": ("t0 = sub(x0, x1); mask = lt(t0, x2)", [*PAIR, SLOPES[0]]),
    "one number": ("t0 = sub(x0, x1); mask = lt(t0, x2)", [*PAIR, torch.tensor([[2]])]),
    "bias": ("bias = copy(x0)", [torch.randn(SIZES)]),
    "bias of a matrix": ("bias = copy(x0)", [torch.randn(1, 1, *SIZES[2:])]),
    "ALiBi": ("mask = le(x1, x0); t0 = sub(x1, x0); bias = mul(t0, x2)", [*PAIR, SLOPES]),
    "softcap": ("t0 = div(score, 2.0); t1 = tanh(t0); score = mul(t1, 2.0)",),
    "score and bias": ("score = mul(score, x2); bias = mul(x0, 0.5); mask = ne(x1, x0)", [*PAIR, SLOPES]),
    "bias first": ("bias = mul(x0, 0.5); score = tanh(score)", PAIR),
    "lookup": (f"{INDEX}; bias = lookup(table0, t1)", PAIR, [torch.randn(1, 20)]),
    "lookup with heads": (f"{INDEX}; bias = lookup(table0, t1)", PAIR, [torch.randn(3, 20)]),
    "lookup of a mask": (f"{INDEX}; mask = lookup(table0, t1)", PAIR, [torch.randn(1, 20) > 0]),
    "lookup by each row": (f"{INDEX}; t2 = add(t1, x2); bias = lookup(table1, t2); mask = lookup(table0, t1)",
                           [*PAIR, PADDING], [torch.randn(3, 20) > 0, torch.randn(3, 20)]),
    "lookup by a float": ("t0 = float(x0); t1 = add(t0, 3.0); bias = lookup(table0, t1)", PAIR, [torch.randn(1, 20)]),
    "numbers chosen": ("t0 = le(x1, x0); bias = where(t0, 0.0, -1.5)", PAIR),
    "names assigned again": ("t0 = add(x0, 1); t0 = mul(t0, x1); bias = copy(t0); t0 = le(x0, x1); mask = not(t0)",
                             PAIR),
    "a base": ("bias = pow(2.0, x0); mask = le(x1, x0)", PAIR),
    "numbers first": ("t0 = sub(3, x0); t1 = div(1.0, t0); mask = gt(2, t1)", PAIR),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("padded", [False, True], ids=["", "with keys that do not exist"])
def test_functions_give_for_each_element_what_the_rule_does(case: tuple[Any, ...], padded: bool):
    check(*case, valid=torch.arange(SIZES[3]) % 4 != 1 if padded else None)


ARITY = {"where": 3, **dict.fromkeys(("add", "sub", "mul", "div", "floor_divide", "remainder", "pow", "maximum",
         "minimum", "le", "lt", "ge", "gt", "eq", "ne", "and", "or", "xor"), 2)}  # fmt: skip


@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) - DRAWS - {"lookup"}))
def test_every_function_of_rules_is_one_of_elements(function: str):
    count = ARITY.get(function, 1)
    condition = ["t0"] * (function == "where")
    odd = [ROWS, 2 * COLUMNS + 1]  # no zero to divide by
    for vectors in (odd, [each / 2 for each in odd]):
        for arguments in (["x0", "x1"], ["x0", "3"], ["x1", "0.5"], ["3", "x0"], ["-1.5", "x1"]):
            if count == 1 and not arguments[0].startswith("x"):
                continue
            call = ", ".join([*condition, *arguments][:count])
            check(f"t0 = le(x1, x0); t1 = {function}({call}); bias = float(t1); mask = bool(t1)", vectors)


# blocks


def test_blocks_are_where_this_torch_looks_for_them():
    def mask(_: Flex, positions: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda b, h, q, k: (k <= q) & ((k >= 256) == (q >= 256)) & (q - k < 300)

    program, inputs = program_of(Flex(mask), sp=1), packed(32, [384])
    values = run_whole(program, inputs)
    found = fx.map_arg(FlexArgs(*call(program, "flex_attention").args).blocks[:-1], lambda node: values[node])
    right = create_block_mask(mask(Flex(), torch.zeros(0)), 1, 1, 384, 384, device="cpu")
    named = right.as_tuple()
    assert len(found) == len(named) - 1
    assert found[:2] == named[:2] == (384, 384)
    assert found[-2:] == named[-3:-1] == (BLOCK, BLOCK)
    held = []
    for count, which in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        at = [next(i for i, each in enumerate(named) if each is getattr(right, name)) for name in (count, which)]
        counts, listed = (found[i] for i in at)
        assert (counts.dtype, listed.dtype) == (torch.int32, torch.int32)
        assert counts.shape == (1, 1, blocks(384))
        assert listed.shape == (1, 1, blocks(384), blocks(384))
        assert counts.is_contiguous()
        assert listed.is_contiguous()
        assert counts[0, 0].tolist() == [*getattr(right, count)[0, 0].tolist(), 0]
        for row, own in enumerate(getattr(right, count)[0, 0].tolist()):
            assert listed[0, 0, row, :own].tolist() == getattr(right, which)[0, 0, row, :own].tolist()
        held += at
    assert int(right.full_kv_num_blocks.sum()) > 0
    assert all(each is None for i, each in enumerate(found[:-2]) if i > 1 and i not in held)


# log-sum-exp, queries that see nothing


def test_the_log_sum_exp_is_a_natural_logarithm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(choice.KERNELS, "flex", lambda need: None)  # a CPU's generated code has none
    model, inputs = Flex(documents, return_lse=True), packed(32)
    program = program_of(model)
    (binary,) = [each for each in calls(program, "getitem") if each.args == (call(program, "flex_attention"), 1)]
    (natural,) = binary.users
    assert (natural.target, natural.args) == (torch.ops.aten.mul.Tensor, (binary, math.log(2)))
    assert flexes(program)[0].options["OUTPUT_LOGSUMEXP"] is True
    for found in Ranks(program, inputs, token_layout(LENGTHS, 2)).outputs():
        torch.testing.assert_close(tuple(found), model(**inputs), atol=1e-5, rtol=1e-5)


def test_what_nobody_reads_is_not_made():
    program = program_of(windows(None))
    assert flexes(program)[0].options["OUTPUT_LOGSUMEXP"] is False
    assert [each.args[1] for each in call(program, "flex_attention").users] == [0]
    assert calls(program, "sp_compile.fill_empty") == []


def hidden(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """The first three queries see no key and weigh all alike."""
    rows = torch.arange(inputs_embeds.shape[1])
    q, k, v = qkv(inputs_embeds)
    score = q @ repeated(k).transpose(-1, -2) * 0.5
    score = torch.where(rows[None, :] <= rows[:, None] - 3, score, torch.finfo(torch.float32).min)
    return score.softmax(-1) @ repeated(v)


def test_queries_that_see_no_key_get_the_mean_of_the_values_where_the_model_gives_it():
    program = program_of(hidden)
    fill = call(program, "sp_compile.fill_empty")
    assert fill.args[0].args == (call(program, "flex_attention"), 0)
    assert fill.args[1] is flexes(program)[0].v.args[0]  # which is a copy of the values


# the whole graph


WINDOWS = windows(None, 3, None)


@pytest.mark.parametrize(
    ("model", "sp"),
    [(WINDOWS, 1), (WINDOWS, 2), (WINDOWS, 3), (hidden, 3), (Flex(documents), 3), (Flex(prefix), 2),
     (Flex(causal, alibi), 2), (Flex(documents, softcap), 1), (Flex(None, distances), 2)],
    ids=["windows-1", "windows-2", "windows-3", "hidden", "documents", "prefix", "ALiBi", "softcap", "distances"],
)  # fmt: skip
def test_ranks_compute_what_the_tiles_do(model: Any, sp: int):
    program = program_of(model, "tiles", last="localize_shapes", sp=sp)
    batches = [packed(32, lengths) for lengths in (LENGTHS, (9, 26), (1, 2, 1))]
    layouts = [token_layout(lengths, sp, min_shard_length=2) for lengths in (LENGTHS, (9, 26), (1, 2, 1))]
    if not isinstance(model, Flex):
        batches = [{"inputs_embeds": each["inputs_embeds"]} for each in batches]
    tiles = [Ranks(program, *each).outputs() for each in zip(batches, layouts, strict=True)]
    for plan in calls(program, "sp_compile.tile_plan"):
        plan.target = torch.ops.sp_compile.block_mask.default
    for node in calls(program, "sp_compile.attention"):
        node.args = tuple(AttentionArgs(*node.args)._replace(kernel="flex"))
    LowerAttention().run(program)
    assert calls(program, "sp_compile.attention") == []
    for inputs, layout, right in zip(batches, layouts, tiles, strict=True):
        found = Ranks(program, inputs, layout).outputs()
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
        expected = model(**inputs) if isinstance(model, Flex) else model(None, **inputs)
        torch.testing.assert_close(found[0], [expected], atol=1e-5, rtol=1e-5)


class ByBlocks(fx.Interpreter):
    """Runs a graph whose FlexAttention sees the blocks that it is told, as generated code does, but not eager code.

    Attributes:
        rows: of the batch, of each FlexAttention that ran.
    """

    rows: ClassVar[list[int]] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not torch.ops.higher_order.flex_attention:
            return super().call_function(target, args, kwargs)
        found = FlexArgs(*args)
        self.rows.append(found.q.shape[0])
        partial, full = (listed_blocks(*found.blocks[i : i + 2]) for i in (2, 4))

        def mask(b: Any, h: Any, q: Any, k: Any, *captured: Any) -> Any:
            place = b, 0, q // BLOCK, k // BLOCK
            return (found.mask(b, h, q, k, *captured[:-2]) & captured[-2][place]) | captured[-1][place]

        read = (*found.mask_captured, partial, full)
        return target(*found._replace(blocks=(*found.blocks[:-1], mask), mask_captured=read))


def listed_blocks(counts: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    named = torch.arange(which.shape[-1]) < counts[..., None]
    found = torch.zeros(*which.shape[:-1], 1 << 10, dtype=torch.bool)
    return found.scatter(-1, torch.where(named, which, (1 << 10) - 1).long(), named)


def bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=128, hidden_size=32, n_layer=1, n_head=4)
    return transformers.BloomForCausalLM(config).eval()


def mistral() -> Any:
    config = transformers.MistralConfig(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                        num_attention_heads=4, num_key_value_heads=2, sliding_window=30)  # fmt: skip
    return transformers.MistralForCausalLM(config).eval()


@contextmanager
def by_blocks() -> Iterator[pytest.MonkeyPatch]:
    """Programs are those for a GPU, where :class:`ByBlocks` stands in for generated code."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Program, "device_kind", lambda self, node: "cuda")
        patched.setattr(Builder, "compiles_for_gpu", True)
        patched.setattr(codegen, "compile_graph", lambda gm, *_: ByBlocks(gm).run)
        patched.setitem(choice.KERNELS, "flex", lambda need: None)
        patched.setattr(ByBlocks, "rows", [])
        yield patched


def generated_by_blocks(build: Callable[[], Any], sp: int | None) -> tuple[float, set[int], ParallelModule]:
    """The error of log-probabilities, into how many parts keys were split, and the model that ran."""
    torch.manual_seed(5)
    model, requests = build(), prompts((1, 17, 200))
    with by_blocks():
        parallel = sp_compile.parallelize(model, sp=sp, kernel="flex")
        options: dict[str, Any] = {"max_new_tokens": 4, "prefill_tokens": 150, "eos_token_id": -1}
        found = sp_compile.generate(parallel, requests, logprobs=True, prompt_logprobs=True, **options)
        return check_greedy(model, requests, found), {*ByBlocks.rows}, parallel


def of_two_ranks(build: Callable[[], Any]) -> tuple[float, set[int]]:
    return generated_by_blocks(build, None)[:2]


@pytest.mark.parametrize("build", [llama, mistral, bloom])
def test_keys_that_two_ranks_hold_are_split(build: Callable[[], Any], ranks: Callable[[int], RankPool]):
    for worst, parts in ranks(2).run(of_two_ranks, build):
        assert worst <= 1e-5
        assert 1 in parts
        assert max(parts) > 1, parts


@pytest.mark.parametrize(
    ("build", "heads"), [(llama, 2), (mistral, 2), (bloom, 4)], ids=["grouped heads", "windows", "a bias of each head"]
)
def test_keys_of_a_cache_are_split_on_a_gpu(build: Callable[[], Any], heads: int):
    worst, parts, parallel = generated_by_blocks(build, 1)
    assert worst <= 1e-5
    assert 1 in parts
    assert max(parts) > 1
    for program in local_programs(parallel):
        split, of_queries = calls(program, "as_parts"), calls(program, "queries_of_parts")
        layers = len(flexes(program)) // 2 if program.steps else 0
        decodes = program.cached == "decode"
        assert [len(split), len(of_queries)] == [layers * (not decodes), layers * decodes]
        assert len(split) == len(calls(program, "merged_parts"))
        assert len(of_queries) == len(calls(program, "merged_queries"))
        assert len(calls(program, "sp_compile.split_block_mask")) == bool(split)
        assert len(calls(program, "sp_compile.query_blocks")) == bool(of_queries)
        assert all(shape_of(each)[1] == heads for each in (*split, *of_queries))
    assert {"more", "decode"} <= {each.cached for each in local_programs(parallel)}


@pytest.mark.parametrize(("build", "split"), [(llama, True), (mistral, True), (bloom, False)])
def test_rows_of_a_batch_decode_together(build: Callable[[], Any], split: bool):
    """Padded ones; biases of each head are not for heads of several rows."""
    torch.manual_seed(6)
    model, ids = build(), torch.randint(3, 120, (3, 170))
    mask = torch.ones_like(ids)
    mask[0, :40] = mask[2, :150] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
               "attention_mask": mask, "pad_token_id": 0, "eos_token_id": -1}  # fmt: skip
    expected = model.generate(ids, **options)
    with by_blocks():
        parallel = sp_compile.parallelize(model, sp=1, kernel="flex")
        found = parallel.generate(ids, **options)
        parts = {*ByBlocks.rows}
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    assert found.sequences.equal(expected.sequences)
    (program,) = (each for each in local_programs(parallel) if each.cached == "decode")
    assert bool(calls(program, "queries_of_parts")) == split
    assert (max(parts) > 3) == split


def test_heads_that_fill_more_than_a_block_have_no_parts_of_their_own():
    def wide(self: Any, inputs_embeds: torch.Tensor) -> torch.Tensor:
        q = inputs_embeds[..., None].expand(-1, -1, -1, 4).transpose(1, 2)  # 130 heads
        k, v = (inputs_embeds[:, None, :, start : start + 4] for start in (0, 4))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    with by_blocks():
        program = after("lower_attention", wide, embeds(130), cached="decode", kernel="flex")
    assert [len(calls(program, each)) for each in ("as_parts", "queries_of_parts")] == [1, 0]


def test_a_model_without_attention_is_left_alone():
    program = after("lower_attention", lambda self, inputs_embeds: 2 * inputs_embeds)
    assert flexes(program) == []
    assert [*program.gm.named_children()] == []
    for (found,) in Ranks(program, embeds(), token_layout(LENGTHS, 2)).outputs():
        assert found.equal(2 * embeds()["inputs_embeds"])
