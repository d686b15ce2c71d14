"""Predictions rest on what the graph computes; rates of a machine are found again in times that they explain."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sp_compile import calibration
from sp_compile.calibration import FEWEST, calibrated, share_within
from sp_compile.cli import main
from sp_compile.config import JobConfig, load_config
from sp_compile.costs import predicted
from sp_compile.errors import ConfigError
from sp_compile.hardware import Hardware, load_hardware, write_hardware
from sp_compile.job import work_of_job
from sp_compile.layout import token_layout
from sp_compile.planning import Planner, best, rank_counts
from sp_compile.work import Work

pytest.importorskip("transformers")

WIDTH, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 64, 96, 2, 4, 2, 257
SMALL = [f"model.config.{name}={size}" for name, size in {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS}.items()]  # fmt: skip
LENGTHS = [700, 40, 260]
H100 = load_hardware("h100")


def job(*overrides: str) -> JobConfig:
    return load_config("prefill", [*SMALL, f"requests.lengths={LENGTHS}", *overrides])


@pytest.fixture(scope="module")
def work() -> Work:
    found, lengths = work_of_job(job(), H100.rates(1))
    assert lengths == LENGTHS
    return found


def test_the_work_of_a_token_is_counted_in_the_graph(work: Work):
    head = WIDTH // HEADS
    of_layer = WIDTH * head * (2 * HEADS + 2 * KV_HEADS) + 3 * WIDTH * INNER
    assert work.operations == 2 * (LAYERS * of_layer + WIDTH * VOCABULARY)
    assert work.head == 2 * WIDTH * VOCABULARY
    assert work.repeated == 0
    assert work.keys == LAYERS * 2 * KV_HEADS * head * 4
    frequencies = head // 2  # a buffer
    assert work.parameters == LAYERS * (of_layer + 2 * WIDTH) + 2 * WIDTH * VOCABULARY + WIDTH + frequencies
    assert work.weights == 4 * work.parameters
    assert work.apart
    assert work.widest < work.traffic


def test_of_experts_only_those_that_compute_are_counted():
    experts = ["model.architecture=MixtralForCausalLM", "model.config.num_local_experts=8"]
    one, two = (
        work_of_job(job(*experts, f"model.config.num_experts_per_tok={each}"), H100.rates(1))[0] for each in (1, 2)
    )
    assert two.operations - one.operations == 2 * LAYERS * 3 * WIDTH * INNER
    assert two.weights == one.weights
    more, _ = work_of_job(job(*experts, "model.config.num_local_experts=64"), H100.rates(1))
    assert more.weights > 6 * two.weights
    router = LAYERS * 56 * 4  # bytes of what it says of the experts that are more
    assert two.traffic <= more.traffic <= two.traffic + router
    assert two.saved <= more.saved <= two.saved + 3 * router


def free(**rates: Any) -> Hardware:
    """Hardware that takes no time but for these rates."""
    nothing: dict[str, Any] = dict.fromkeys(("products", "attention", "memory", "inside", "between"), math.inf)
    nothing |= dict.fromkeys(("latency", "part", "layer", "hidden"), 0.0)
    return dataclasses.replace(H100, **{**nothing, **rates})


def test_a_prefill_is_its_products_its_attention_and_its_bytes(work: Work):
    layout = token_layout(tuple(LENGTHS), 4, "zigzag", min_shard_length=2)

    def seconds(strategy: str = "allgather_kv", **rates: Any) -> float:
        return Planner(work, free(**rates)).prefill(layout, 4)[strategy][0]

    assert seconds() == 0
    assert seconds(products=1e3) == pytest.approx(layout.shard_length * (work.operations - work.head) / 1e3)
    pairs = sum(length * (length + 1) // 2 for length in LENGTHS)  # of which the busiest rank has a quarter or more
    of_pair = LAYERS * 2 * HEADS * 2 * (WIDTH // HEADS)
    assert pairs / 4 <= seconds(attention=1e3) * 1e3 / of_pair <= 1.1 * pairs / 4
    gathered = 3 * layout.shard_length * work.keys
    assert seconds(inside=1e3) == pytest.approx(gathered / 1e3)
    assert seconds(latency=1.0) == LAYERS
    assert seconds(layer=1.0) == LAYERS
    assert seconds("auto", products=1e9, attention=1e9, inside=1e6) <= min(
        seconds(name, products=1e9, attention=1e9, inside=1e6) for name in ("allgather_kv", "fetch", "ring", "ulysses")
    )
    whole = Planner(work, free(inside=1e3), whole_outputs=True).prefill(layout, 4)["allgather_kv"]
    assert whole[1] == pytest.approx(gathered + 3 * layout.shard_length * VOCABULARY * 4)


def test_a_step_of_decoding_reads_weights_and_cache(work: Work):
    (found,) = (each for each in Planner(work, free(memory=1e3)).plans([4000], 2) if each.kind == "decode")
    assert found.seconds == pytest.approx((work.weights + 2000 * work.keys) / 1e3)
    assert found.memory == work.weights + 2000 * work.keys


def test_a_training_step_takes_three_times_the_products_and_sums_gradients(work: Work):
    plans = Planner(work, free(products=1e3)).plans([4000], 2)
    one = next(each for each in plans if each.kind == "training" and not each.sharded)
    assert one.seconds == pytest.approx(3 * 2000 * work.operations / 1e3)
    keys = 2000 * work.keys  # of the other rank, there and their gradients back
    assert one.bytes_in == pytest.approx(work.weights + 2 * keys)
    passing = 2 * 2000 * work.widest + work.outputs
    assert one.memory == pytest.approx(4 * work.weights + 2000 * work.saved + passing + keys)


def test_windows_and_requests_that_lie_whole_on_a_rank_cost_what_they_cost(work: Work):
    window = [each._replace(reach=each.reach._replace(back=100)) for each in work.attentions]
    small = dataclasses.replace(work, attentions=tuple(window))
    decode = next(each for each in Planner(small, free(memory=1e3)).plans([4000], 2) if each.kind == "decode")
    assert decode.memory == work.weights + 100 * work.keys / 2
    layout = token_layout((50,) * 8, 2, "whole", min_shard_length=2)
    found = Planner(work, free(latency=1.0)).prefill(layout, 2)
    assert found["auto"][0] == found["local"][0] == 0
    assert found["allgather_kv"][0] > 0


def test_auto_is_a_choice_that_could_be_made(work: Work):
    """Of a step of training, too, whose attention is predicted twice."""
    machine = free(products=1e9, attention=1e9, inside=1e7, latency=1e-4)
    plans = [each for each in Planner(work, machine).plans([4000], 4) if each.kind == "training" and not each.sharded]
    seconds = {each.strategy: each.seconds for each in plans}
    assert seconds["auto"] in [each for name, each in seconds.items() if name != "auto"]  # all layers are alike


def test_meshes_are_all_that_requests_fill_and_the_first_fits(work: Work):
    plans = Planner(work, H100).plans(LENGTHS, 16)
    assert {(each.dp, each.sp) for each in plans} == {(1, 16), (2, 8)}
    assert all(each.strategy != "hybrid" for each in plans if each.sp == 8)
    assert any(each.strategy == "hybrid" for each in plans if each.sp == 16)
    assert {each.dp for each in Planner(work, H100).plans([1000], 16)} == {1}
    tight = dataclasses.replace(H100, capacity=4.5 * work.weights)
    first = {each.kind: each for each in best({16: Planner(work, tight).plans(LENGTHS, 16)})}
    assert first["training"].sharded
    assert first["training"].fits
    by_kind = [each for each in plans if each.kind == "prefill"]
    assert [each.seconds for each in by_kind] == sorted(each.seconds for each in by_kind)


def test_links_between_nodes_are_what_a_batch_over_several_waits_for(work: Work):
    layout = token_layout((100_000,), 64, "zigzag", min_shard_length=2)
    near, far = (
        {name: each.seconds for name, each in
         predicted(layout, work.attentions[0], True, free(inside=1e11, between=between).rates(64),
                   H100.nodes(64)).items()}
        for between in (1e11, 1e9)
    )  # fmt: skip
    assert far["allgather_kv"] == pytest.approx(near["allgather_kv"] * 12.5)  # eight adapters share what comes
    assert far["fetch"] > 50 * near["fetch"]
    assert far["hybrid"] < far["fetch"]
    assert [H100.nodes(sp) and H100.nodes(sp).size for sp in (8, 12, 13, 24)] == [None, 6, 1, 8]


def test_descriptions_of_machines_are_checked(tmp_path: Path):
    assert load_hardware("h100").dtype == load_hardware("b200").dtype == "bfloat16"
    path = tmp_path / "mine.yaml"
    write_hardware(H100, path)
    assert load_hardware(str(path)) == H100
    text = path.read_text()
    for old, new, words in (
        ("inside:", "insid:", "unknown key 'insid'; did you mean 'inside'"),
        ("memory: ", "# ", "says nothing of 'memory'"),
        ("latency: ", "latency: -1 # ", "latency is -1, which no machine has"),
        ("products: ", "products: fast # ", "products is 'fast'; expected a number"),
        ("ranks_per_node: 8", "ranks_per_node: 2.5", "expected a whole number"),
        ("ranks_per_node: 8", "ranks_per_node: .inf", "expected a whole number"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=words):
            load_hardware(str(path))
    path.write_text("defaults: [h100]\nname: mine\n")
    assert load_hardware(str(path)) == dataclasses.replace(H100, name="mine")
    with pytest.raises(ConfigError, match="there is no file 'h10'"):
        load_hardware("h10")


def results(hardware: Hardware, work: Work) -> list[dict[str, Any]]:
    """What a sweep would write on such a machine."""
    found = []
    for sp in (1, 2, 4):
        for strategy in ("allgather_kv", "ulysses"):
            for lengths in ([1500], [700, 40, 260, 90], [5000], [300, 900]):
                config = dataclasses.asdict(job(f"run.sp={sp}", f"compile.attention={strategy}"))
                layout = token_layout(tuple(lengths), sp, "zigzag", min_shard_length=2)
                by_name = Planner(work, hardware, whole_outputs=True).prefill(layout, sp)
                seconds = by_name[strategy if sp > 1 else "local"][0]
                if sp == 1:  # one job, whose times scatter
                    seconds *= {"allgather_kv": 0.8, "ulysses": 1.2}[strategy]
                machine = {"cpu": "a processor", "memory_bytes": 1 << 34, "gpus": []}
                result = {"config": config, "machine": machine, "lengths": lengths, "forward_seconds": seconds}
                point = {"run.sp": sp, "compile.attention": strategy}
                found.append({"status": "done", "point": point, "result": result})
    return found


def test_rates_are_found_again_in_times_that_they_explain(work: Work, monkeypatch):
    true = dataclasses.replace(free(products=5e9, attention=2e9, inside=1e8, latency=1e-3, layer=2e-3, memory=1e10),
                               cores=1, between=1e8, ranks_per_node=1 << 20)  # fmt: skip
    monkeypatch.setattr(calibration, "_memory_rate", lambda: true.memory)
    found, compared = calibrated(results(true, work))
    for name in ("products", "attention", "inside", "layer", "memory"):
        assert getattr(found, name) == pytest.approx(
            getattr(true, name), rel=0.02
        )  # weights are read while products run
    assert share_within(compared, 1e-2) == 1
    assert len(compared) == 20  # on one rank both strategies are one job
    assert sum(each.used for each in compared) == 10


def test_results_that_no_rates_can_be_read_off_are_refused(work: Work):
    some = results(free(products=1e9), work)
    with pytest.raises(ConfigError, match=f"takes {FEWEST} or more"):
        calibrated(some[:8])
    for name, value in (("attention", "auto"), ("scheme", "auto"), ("pipeline", ["normalize"])):
        compiled = some[3]["result"]["config"]["compile"]
        some[3]["result"]["config"]["compile"] = {**compiled, name: value}
        with pytest.raises(ConfigError, match=f"compile.{name} of run.sp=1 compile.attention=allgather_kv is"):
            calibrated(some)
        some[3]["result"]["config"]["compile"] = compiled
    with pytest.raises(ConfigError, match="no point of the results is a prefill"):
        calibrated([{"status": "failed", "result": None}])
    some[0]["result"]["machine"] = {**some[0]["result"]["machine"], "cpu": "another"}
    with pytest.raises(ConfigError, match="several machines"):
        calibrated(some)


def test_plan_prints_the_best_mesh_and_writes_all(capsys, tmp_path: Path):
    target = tmp_path / "plans.json"
    arguments = ["plan", "prefill", *SMALL, "model.dtype=bfloat16", f"requests.lengths={LENGTHS}"]
    assert main([*arguments, "--ranks", "1,16", "--gpu", "b200", "--json", str(target)]) == 0
    shown = capsys.readouterr().out
    assert all(each in shown for each in ("prefill", "decode", "training", "B200", "2 x 8"))
    assert '"strategy": "hybrid"' in target.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h100"], "rates of H100 SXM are for bfloat16, and model.dtype=float32"),
        (["--gpu", "h100", "--ranks", "8,x"], "expected numbers of ranks"),
        (["--gpu", "v100"], "there is no file 'v100'"),
    ],
)
def test_mistakes_are_told_before_any_work(arguments: list[str], words: str, capsys):
    assert main(["plan", "prefill", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert rank_counts("8,64") == [8, 64]


LARGE = """
import resource, time
from sp_compile.config import load_config
from sp_compile.job import work_of_job
from sp_compile.planning import Planner
from sp_compile.hardware import load_hardware
start = time.perf_counter()
sizes = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8_000_000)
job = load_config("prefill", ["model.dtype=bfloat16", "requests.lengths=[8000000]",
                              *(f"model.config.{name}={size}" for name, size in sizes.items())])
hardware = load_hardware("h100")
work, lengths = work_of_job(job, hardware.rates(1))
plans = Planner(work, hardware).plans(lengths, 1024)
prefill = next(each for each in plans if each.kind == "prefill")
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, prefill.seconds)
"""


@pytest.mark.slow
def test_1024_ranks_and_8_million_tokens_are_planned_in_a_minute():
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, timeout=300)
    seconds, gigabytes, predicted_seconds = map(float, done.stdout.split())
    assert seconds < 60
    assert gigabytes < 4
    scores = 32 * 32 * 2 * 256 * 8e6**2 / 2  # of layers and heads, over pairs
    assert 1 < predicted_seconds / (scores / 1024 / H100.attention) < 1.5
