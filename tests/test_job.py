"""The main job, on real ranks: what it reads, what it finds, and what it tells when it cannot run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sp_compile.config import JobConfig, ModelConfig, RequestsConfig, RunConfig, load_config
from sp_compile.errors import ConfigError, RankFailedError
from sp_compile.generation_job import run_generation
from sp_compile.job import compare, device_of, load, run_job
from sp_compile.loading import BEGIN, build_model, read_requests
from sp_compile.measure import PeakMemory

transformers = pytest.importorskip("transformers")

LIMITS = transformers.LlamaConfig(max_position_embeddings=8192)

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny(*overrides: str) -> JobConfig:
    job = load_config("prefill", ["codegen=eager", "warmup=0", "repeats=1", "max_tokens=40", *overrides])
    job.model.config.update(TINY, num_key_value_heads=2)
    return job


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A ``save_pretrained`` directory: a tiny Llama and a tokenizer trained on the shipped text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = read_text()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    folder = tmp_path_factory.mktemp("saved")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(7)
    config = transformers.LlamaConfig(**TINY, vocab_size=tokenizer.get_vocab_size())
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def read_text() -> str:
    rows = read_requests(RequestsConfig(), ModelConfig(), LIMITS)
    return "\n\n".join(bytes(row[1:].tolist()).decode() for row in rows)


def test_the_shipped_text_is_ragged():
    lengths = [len(row) for row in read_requests(RequestsConfig(), ModelConfig(), LIMITS)]
    assert 8 <= len(lengths) <= 12
    assert min(lengths) < 10
    assert max(lengths) > 2000


def test_the_job_on_two_ranks():
    result = run_job(tiny())
    assert result is not None
    assert result.ok
    assert result.unsharded is not None
    assert 0 < result.unsharded.max_abs_diff <= result.unsharded.limit
    assert [each.rank for each in result.ranks] == [0, 1]
    assert sum(each.tokens for each in result.ranks) == sum(result.lengths)
    layers = result.config["model"]["config"]["num_hidden_layers"]
    assert sum(each.attention_area for each in result.ranks) == layers * sum(n * (n + 1) // 2 for n in result.lengths)
    assert result.bytes_sent > 0
    assert result.fallbacks == []
    assert result.forward_seconds > 0
    assert all(each.peak_bytes >= 0 for each in result.ranks)
    assert result.versions["torch"] == torch.__version__
    assert result.machine["cores"] >= 1


def test_a_saved_model_brings_its_weights_and_its_tokenizer(saved: Path):
    job = tiny(f"model.path={saved}", "sp=3", "scheme=contiguous", "max_requests=4")
    job.model.config = {}
    model, batch = load(job, "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    first = read_text().split("\n\n")[0]
    assert batch.split(batch["input_ids"])[0][0].tolist() == tokenizer(first)["input_ids"]
    expected = transformers.AutoModelForCausalLM.from_pretrained(saved).state_dict()
    torch.testing.assert_close(dict(model.state_dict()), dict(expected))
    result = run_job(job)
    assert result is not None
    assert result.ok
    assert len(result.ranks) == 3


def test_weights_in_pickles_are_not_read(saved: Path, tmp_path: Path):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        build_model(ModelConfig(path=str(tmp_path)))


def test_every_rank_draws_the_same_weights():
    first, second = (build_model(tiny().model) for _ in range(2))
    other = build_model(tiny("model.seed=1").model)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_nothing_is_drawn_on_the_meta_device():
    assert {each.device.type for each in build_model(tiny().model, "meta").parameters()} == {"meta"}


def test_requests_are_split_cut_and_counted(tmp_path: Path):
    (tmp_path / "b.txt").write_text("four\n \nfive\nsix\n")
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\nthree\n\n")

    def texts(**options: object) -> list[str]:
        config = RequestsConfig(files=[str(tmp_path / "*.txt")], **options)  # type: ignore[arg-type]
        rows = read_requests(config, ModelConfig(), LIMITS)
        assert all(row[0] == BEGIN for row in rows)
        return [bytes(row[1:].tolist()).decode() for row in rows]

    assert texts() == ["one", "two\nthree", "four", "five\nsix"]
    assert texts(split="lines") == ["one", "two", "three", "four", "five", "six"]
    assert texts(split="files") == ["one\n\n\ntwo\nthree", "four\n \nfive\nsix"]
    assert texts(max_requests=2, max_tokens=4) == ["one", "two"]


def test_requests_that_cannot_be_read_are_told(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    cases = [("none*", "no file matches"), ("empty*", "there is no text in"), ("latin*", "not UTF-8 text: byte 3")]
    for name, words in cases:
        with pytest.raises(ConfigError, match=words):
            read_requests(RequestsConfig(files=[str(tmp_path / name)]), ModelConfig(), LIMITS)


def test_requests_that_the_model_does_not_take_are_told():
    with pytest.raises(ConfigError, match=r"request 0 holds token id 256, the model has 100; .*vocab_size to 257"):
        read_requests(RequestsConfig(), ModelConfig(), transformers.LlamaConfig(vocab_size=100))
    small = transformers.LlamaConfig(vocab_size=300, max_position_embeddings=16)
    with pytest.raises(ConfigError, match=r"request 1 has 72 tokens, the model takes 16 .*max_tokens=16"):
        read_requests(RequestsConfig(), ModelConfig(), small)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "LamaForCausalLM"}, r"unknown model.architecture 'LamaForCausalLM'; did you mean 'Llama"),
        (
            {"config": {"hiden_size": 8}},
            r"unknown key 'model.config.hiden_size' for LlamaConfig; did you mean 'hidden_",
        ),
        ({"config": {"hidden_size": "a"}}, "model.config: .*hidden_size.*expected int"),
        ({"config": {"hidden_size": 30, "num_attention_heads": 8}}, "not a multiple of the number of attention heads"),
        ({"attn_implementation": "spda"}, "spda"),
        ({"path": "./nowhere"}, r"model.path='./nowhere'"),
        ({"path": "./nowhere", "config": {"hidden_size": 8}}, "model.config is for random weights"),
    ],
)
def test_models_that_cannot_be_built_are_told(change: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        build_model(dataclasses.replace(ModelConfig(), **change))  # type: ignore[arg-type]


def test_a_directory_without_a_tokenizer_is_told(saved: Path, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    with pytest.raises(ConfigError, match="holds no tokenizer that can be loaded"):
        read_requests(RequestsConfig(), ModelConfig(path=str(tmp_path)), LIMITS)


def test_an_error_on_a_rank_is_told_with_the_rank():
    with pytest.raises(RankFailedError, match=r"^rank \d of 2 raised ConfigError: request 0 holds token id 256"):
        run_job(tiny("model.config.vocab_size=100", "timeout=120"))


def test_logits_that_differ_are_not_right():
    job = tiny("max_requests=2")
    model, batch = load(job, "cpu")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    assert compare(job, model, batch, logits).ok
    scale = float(logits.abs().max())
    logits[0, 3, 5] += 3e-5 * scale
    found = compare(job, model, batch, logits)
    assert not found.ok
    assert found.max_abs_diff == pytest.approx(3e-5 * scale, rel=0.1)
    logits[0, 3, 5] = float("nan")
    assert not compare(job, model, batch, logits).ok


def test_a_timeline_of_each_rank_shows_collectives_and_attention(tmp_path: Path):
    run_job(tiny("attention=ring", "compare=false", "codegen=inductor", f"trace={tmp_path}/new/timeline.json"))
    for rank in range(2):
        events = json.loads((tmp_path / "new" / f"timeline-rank{rank}.json").read_text())["traceEvents"]
        assert "gloo:all_to_all" in {each.get("name", "") for each in events}
        letters = {"sp_compile::exchange_rows": "c", "aten::mm": "p", "sp_compile::attention": "a",
                   "_c10d_functional::wait_tensor": "w"}  # fmt: skip
        begun = sorted((each["ts"], letters[each["name"]]) for each in events if each.get("name") in letters)
        order = "".join(letter for _, letter in begun)
        assert order.count("cpawa") == 2  # queries and a rank's own rows while a block travels, in generated code too


def test_a_timeline_is_of_a_prefill():
    with pytest.raises(ConfigError, match=r"run\.trace is for jobs that only prefill"):
        run_generation(load_config("generate", ["trace=timeline.json"]))


def test_sharded_outputs_cannot_be_compared():
    with pytest.raises(ConfigError, match=r"set run.compare=false"):
        run_job(tiny("outputs=sharded"))


def test_requests_have_no_labels_for_a_loss():
    with pytest.raises(ConfigError, match="is for training"):
        run_job(tiny("outputs=loss"))


def test_cuda_needs_a_gpu_for_each_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(JobConfig(run=RunConfig(sp=2)), 1) == torch.device("cuda", 1)
    assert device_of(JobConfig(run=RunConfig(sp=2, device="cpu")), 1) == torch.device("cpu")
    assert device_of(JobConfig(run=RunConfig(sp=3)), 1) == torch.device("cpu")
    with pytest.raises(ConfigError, match="needs a GPU for each of 3 local ranks, there are 2; set sp=2"):
        device_of(JobConfig(run=RunConfig(sp=3, device="cuda")), 0)


def test_peak_memory_sees_what_is_freed_again_and_forgets_earlier_peaks():
    device = torch.device("cpu")
    earlier = torch.ones(64 << 20)
    del earlier
    with PeakMemory(device) as peak:
        block = torch.ones(16 << 20)
        del block
    assert 60 << 20 <= peak.bytes <= 100 << 20


@pytest.mark.parametrize("overrides", [(), ("do_sample=true", "top_p=0.9", "generate.seed=3")])
def test_the_generating_job_on_two_ranks(overrides: tuple[str, ...]):
    job = load_config("generate", ["codegen=eager", "max_tokens=40", "max_requests=4", "max_new_tokens=6", *overrides])
    job.model.config.update(TINY, num_key_value_heads=2)
    result = run_generation(job)
    assert result is not None
    assert result.unsharded is not None
    assert (result.unsharded.same, result.ok) == (result.unsharded.tokens, True)
    assert sum(result.new_tokens) == result.unsharded.tokens
    assert result.step_requests <= 4
    assert result.bytes_sent > 0
    page = 256 * 2 * 2 * 2 * 8 * 4  # tokens, layers, K and V, kv heads, head dim, bytes
    assert result.cache_bytes == [4 * page, 4 * page]
    assert result.decode_seconds > 0


def test_a_generating_job_may_keep_its_cache_in_another_dtype():
    options = ["codegen=eager", "max_tokens=20", "max_requests=2", "max_new_tokens=3", "cache_dtype=bfloat16", "sp=1"]
    job = load_config("generate", [*options, "compare=false", "page_size=2"])
    job.model.config.update(TINY, num_key_value_heads=2)
    result = run_generation(job)
    assert result is not None
    assert result.unsharded is None
    assert result.ok
    assert result.cache_bytes[0] % (2 * 2 * 2 * 2 * 8 * 2) == 0
