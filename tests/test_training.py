"""A step of training on ranks gives the loss and the gradients of the step without them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import sp_compile
from sp_compile.errors import BatchError, MeshError, RankMismatchError, UnsupportedModelError
from tests.training import (
    MODELS,
    Plain,
    apart,
    batch_of,
    built,
    on_a_mesh,
    on_ranks,
    plain,
    plain_on_ranks,
    plain_step,
    special,
    special_on_ranks,
    stepped,
    told,
)

EXACT = 1e-10  # relative, in fp64
SEED = 7
ROUNDED = 5e-6  # in fp64 where the model rounds to fp32 inside, as norms and losses of transformers do


def check(
    ranks: Any, sp: int, name: str, *batches: dict[str, Any], dtype: torch.dtype = torch.float64, gate: float = ROUNDED,
    changes: dict[str, Any] | None = None, **config: Any,
) -> None:  # fmt: skip
    model = built(name, dtype, **(changes or {}))
    expected = [stepped(model, batch) for batch in batches]
    for steps in ranks(sp).run(on_ranks, name, batches, dtype, changes or {}, timeout=900, **config):
        for found, wanted in zip(steps, expected, strict=True):
            assert apart(found, wanted) <= gate


@pytest.mark.parametrize(
    ("sp", "name"),
    [(2, name) for name in MODELS]
    + [pytest.param(sp, name, marks=pytest.mark.slow) for sp in (3, 4) for name in MODELS],
)
def test_loss_and_gradients_are_those_of_one_rank(ranks, sp: int, name: str):
    check(ranks, sp, name, batch_of())


@pytest.mark.parametrize(
    ("sp", "config"),
    [
        (2, {}),
        (3, {"attention": "fetch"}),
        (3, {"attention": "ring", "scheme": "contiguous"}),
        (3, {"attention": "ulysses"}),
        pytest.param(4, {"attention": "hybrid", "ranks_per_node": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_strategy_is_exact(ranks, sp: int, config: dict[str, Any]):
    """Labels that only one rank has, a boundary of labels where a shard ends, and rows of a batch."""
    batches = [batch_of((1, 25), slice(0, 24)), batch_of((1, 24), slice(0, 8), 2), batch_of((2, 9), slice(0, 3), 3)]
    expected = [plain_step(plain(), batch) for batch in batches]
    for steps in ranks(sp).run(plain_on_ranks, batches, **config):
        for found, wanted in zip(steps, expected, strict=True):
            assert apart(found, wanted) <= EXACT


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("smoothed", "fetch"),
        *(("biased", each) for each in ("allgather_kv", "ring", "ulysses")),
        pytest.param("biased", "fetch", marks=pytest.mark.slow),
    ],
)
def test_biases_that_attention_learns_and_losses_of_a_model_s_own_are_exact(ranks, kind: str, strategy: str):
    """A table of relative distances for each head, and slopes that a row's own features set; a z-loss."""
    batches = [batch_of((1, 25), slice(0, 8)), batch_of((2, 9), slice(0, 3), 3)]
    expected = [plain_step(special(kind), batch) for batch in batches]
    for steps in ranks(3).run(special_on_ranks, kind, batches, strategy):
        for found, wanted in zip(steps, expected, strict=True):
            assert apart(found, wanted) <= EXACT


def test_generated_code_for_new_lengths(ranks):
    """Labels that only one rank has, a boundary of labels where a shard ends, and a batch with padding."""
    one_rank, boundary = batch_of((1, 13), slice(0, 12)), batch_of((1, 16), slice(0, 8), seed=2)
    check(ranks, 2, "Llama", one_rank, boundary, dtype=torch.float32, gate=1e-4, codegen="inductor",
          scheme="contiguous")  # fmt: skip


@pytest.mark.parametrize("name", ["Gemma2", pytest.param("Qwen3Moe", marks=pytest.mark.slow)])
def test_a_loss_whose_logits_never_exist(ranks, name: str):
    """Capped logits; a loss of the experts besides; rows of a batch, one of them without labels."""
    rows = batch_of((2, 13), slice(0, 3), 2)
    rows["labels"][1] = -100
    check(ranks, 2, name, rows, outputs="loss")


def gathers(keep: bool, checkpoint: bool) -> tuple[dict[str, torch.Tensor], list[int]]:
    """A step by generated code, and how often keys and values were gathered in its forward and its backward."""
    model = plain()
    if checkpoint:
        layer = model.layer
        model.layer = lambda *args: torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)
    parallel = sp_compile.parallelize(model, outputs="loss", keep_gathered=keep)
    parallel(**batch_of((1, 22)))[0].backward()  # compiles
    parallel.zero_grad()
    with torch.profiler.profile() as forward:
        loss = parallel(**batch_of((1, 25), slice(0, 8)))[0]
    with torch.profiler.profile() as backward:
        loss.backward()
    named = {name.removeprefix("module."): each.grad for name, each in parallel.named_parameters()}
    counts = [
        sum(event.count for event in each.key_averages() if event.key.startswith("_c10d_functional::all_gather"))
        for each in (forward, backward)
    ]
    return {"loss": loss.detach(), **named}, counts


@pytest.mark.parametrize("checkpoint", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_keys_and_values_are_kept_or_gathered_again(ranks, checkpoint: bool):
    model = plain()
    loss, _ = model(**batch_of((1, 25), slice(0, 8)))
    loss.backward()
    expected = {"loss": loss.detach(), **{name: each.grad for name, each in model.named_parameters()}}
    for keep, again in ((True, 0), (False, 2)):
        for found, counts in ranks(2).run(gathers, keep, checkpoint, timeout=600):
            assert counts == [2, again]
            assert apart(found, expected) <= EXACT


def test_packed_and_padded_batches(ranks):
    """Requests that position ids pack, and rows with padding on either side."""
    packed, padded = batch_of((1, 24), slice(0, 3)), batch_of((2, 14), slice(0, 5), 2)
    packed["position_ids"] = torch.cat([torch.arange(each) for each in (9, 1, 14)])[None]
    packed["labels"][:, [9, 10]] = -100  # no request predicts the first token of the next
    padded["attention_mask"] = torch.ones(2, 14, dtype=torch.int64)
    padded["attention_mask"][0, :5], padded["attention_mask"][1, 11:] = 0, 0
    padded["labels"][1, 11:] = -100
    check(ranks, 2, "Llama", packed, padded)


def test_autocast_is_as_exact_as_on_one_rank(ranks):
    model, batch = built("Llama"), batch_of((1, 33))
    exact = {name: each.clone() for name, each in stepped(model, batch).items()}
    own = apart(stepped(model, batch, autocast=True), exact)
    for (found,) in ranks(2).run(on_ranks, "Llama", [batch], torch.float32, {}, True):
        assert 1e-4 < apart(found, exact) <= 2 * own


def dropped(sp_rows: int, chance: float, checkpoint: bool = False, strategy: str = "fetch") -> list[torch.Tensor]:
    """Loss and gradients of two steps of GPT-2 with dropout, from one seed."""
    torch.manual_seed(SEED)
    chances = {"resid_pdrop": chance, "embd_pdrop": chance, "attn_pdrop": chance}
    parallel = sp_compile.parallelize(built("GPT2", **chances), codegen="eager", attention=strategy, strict=True)
    if checkpoint:
        parallel.module.gradient_checkpointing_enable()
    torch.manual_seed(SEED)
    steps = [stepped(parallel, batch_of((1, sp_rows))) for _ in range(2)]
    return [torch.stack([each["loss"] for each in steps]), *(each["transformer.wte.weight"] for each in steps)]


def test_dropout_draws_the_same_whatever_the_number_of_ranks(ranks):
    """In attention too, by whatever strategy."""
    setups = ((2, "allgather_kv"), (3, "ring"), (3, "ulysses"), (1, "fetch"))
    by_two, *others = (ranks(sp).run(dropped, 14, 0.2, False, strategy) for sp, strategy in setups)
    for found in (*by_two, *itertools.chain.from_iterable(others)):
        for each, other in zip(found, by_two[0], strict=True):
            torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-6)
    losses = by_two[0][0]
    assert losses[0] != losses[1]  # every call draws anew


def test_checkpointed_layers_draw_again_what_they_drew(ranks):
    (plain_steps, _), (checkpointed, _) = (ranks(2).run(dropped, 14, 0.2, each) for each in (False, True))
    for each, other in zip(plain_steps, checkpointed, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-6)


def trained(name: str, steps: int, accumulated: int, outputs: str) -> list[float]:
    """Losses of steps of AdamW with clipped gradients; with ranks where there is a group."""
    import torch.distributed as dist

    model = built(name)
    spread = dist.is_initialized()
    if spread:
        model = sp_compile.parallelize(model, codegen="eager", outputs=outputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        for j in range(accumulated):
            batch = batch_of((1, 17 + 4 * j), slice(0, 4), seed=j)
            if spread and outputs == "sharded":
                logits = model(batch["input_ids"]).logits
                loss = sp_compile.loss.cross_entropy(model, logits, batch["labels"])
            else:
                loss = model(**batch, use_cache=False).loss
            (loss / accumulated).backward()
            losses.append(float(loss))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


@pytest.mark.parametrize("outputs", ["full", "sharded", "loss"])
def test_twenty_steps_track_those_of_one_rank(ranks, outputs: str):
    expected = torch.tensor(trained("Llama", 20, 2, "full"))
    assert expected[-6:].mean() < expected[:6].mean()
    for found in ranks(2).run(trained, "Llama", 20, 2, outputs):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


class Noisy(Plain):
    """Adds noise to its embeddings."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        x = self.embed(input_ids)
        logits = self.head(x + 0.1 * torch.randn_like(x))
        return torch.nn.functional.cross_entropy(logits.view(-1, 128), labels.reshape(-1))


class Written(Plain):
    """Adds the mean of the first chunk of 4 rows, which it writes into a tensor, as linear attention does."""

    def layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        y = super().layer(x, i)
        padded = torch.nn.functional.pad(y, (0, 0, 0, -y.shape[1] % 4))
        chunks = padded.reshape(len(y), padded.shape[1] // 4, -1, y.shape[2])
        first = torch.zeros(len(y), 4, y.shape[2], dtype=y.dtype)
        first[:] = chunks[:, 0]  # of a size that is 4 for all lengths, as only arithmetic knows
        return y + first.mean(dim=1, keepdim=True)


def test_what_is_written_into_a_tensor_has_gradients():
    model = Written().double()
    expected = {name: each.clone() for name, each in plain_step(model, batch_of()).items()}
    parallel = sp_compile.parallelize(model, sp=1, codegen="eager")
    assert apart(plain_step(parallel, batch_of()), expected) <= EXACT


def refusals() -> list[str]:
    """What bad input to a step of training says."""
    import torch.distributed as dist
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    batch = batch_of()
    llama = sp_compile.parallelize(built("Llama"), codegen="eager")
    found = [told(lambda: llama(input_ids=batch["input_ids"], labels=batch["labels"][:, 1:]))]
    noisy = sp_compile.parallelize(Noisy(), codegen="eager")
    found.append(told(lambda: noisy(**batch)))
    loss = llama(**batch).loss
    loss.backward()
    found.append(told(loss.backward))
    ignored = llama(input_ids=batch["input_ids"], labels=torch.full_like(batch["labels"], -100)).loss
    found.append(str(float(ignored)))
    other = built("Llama")
    if dist.get_rank() == 1:
        with torch.no_grad():
            other.get_parameter("model.norm.weight")[40] += 1
    found.append(told(lambda: sp_compile.parallelize(other, codegen="eager")(**batch)))
    spread = built("Llama")
    parallelize_module(
        spread, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), {"lm_head": ColwiseParallel()}
    )
    found.append(told(lambda: sp_compile.parallelize(spread, codegen="eager")))
    return found


def test_bad_input_is_refused(ranks):
    for labels, noise, twice, ignored, weights, spread in ranks(2).run(refusals):
        assert labels == f"{BatchError.__name__}: labels have shape [1, 12], the tokens [1, 13]; pass one each"
        assert noise.startswith(UnsupportedModelError.__name__)
        assert "draws random numbers" in noise
        assert "backward through the graph a second time" in twice
        assert ignored == "nan"
        assert weights.startswith(f"{RankMismatchError.__name__}: ranks disagree on the parameter model.norm.weight")
        assert spread.startswith(f"{MeshError.__name__}: lm_head.weight is spread over the mesh axes ('tp',)")


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_data_parallel_ranks_average_whole_gradients(ranks, wrap: str):
    losses, expected = [], {}
    for seed in range(2):
        model = plain()
        loss, _ = model(**batch_of((1, 15), slice(0, 4), seed))
        loss.backward()
        losses.append(float(loss))
        for name, each in model.named_parameters():
            expected[name] = expected.get(name, 0) + each.grad / 2
    for rank, (found, loss) in enumerate(ranks(4).run(on_a_mesh, wrap, timeout=300)):
        assert apart(found, expected) <= EXACT
        assert loss == pytest.approx(losses[rank // 2], rel=EXACT)


def served_then_trained(sp: int | None) -> float:
    """How far gradients are from the unsharded model's, over lengths that a forward of inference had before."""
    model, other = built("Llama"), built("Llama")
    parallel = sp_compile.parallelize(model, sp=sp, codegen="eager")
    requests = torch.arange(3, 23), torch.arange(5, 12)
    batch = dict(sp_compile.pack(requests)) | {"attention_mask": torch.ones(1, 27, dtype=torch.int64)}
    with torch.inference_mode():
        parallel.eval()(**batch)
    parallel.train()(**batch).logits.pow(2).mean().backward()
    alone = [other(each[None]).logits for each in requests]  # with the mask the model itself would mix them
    torch.cat(alone, dim=1).pow(2).mean().backward()
    return apart(*({name: each.grad for name, each in of.named_parameters()} for of in (model, other)))


def test_lengths_that_were_served_under_inference_mode_train(ranks):
    assert served_then_trained(1) <= 1e-5
    assert max(ranks(2).run(served_then_trained, None)) <= 1e-5
