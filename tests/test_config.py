"""Configurations: what is accepted, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sp_compile.config import CompileConfig, JobConfig, compile_config, load_config, show_config
from sp_compile.config_files import read_parts
from sp_compile.errors import ConfigError
from sp_compile.loading import read_requests


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return path

    return _write


def test_the_shipped_job_is_found_by_each_of_its_names(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [load_config(name) for name in ("prefill", "prefill.yaml", "configs/prefill.yaml")]
    assert jobs[0] == jobs[1] == jobs[2]
    assert jobs[0].model.architecture == "LlamaForCausalLM"
    assert (jobs[0].run.sp, jobs[0].compile.scheme) == (2, "zigzag")


def test_parts_that_ship_are_put_together(write):
    job = load_config(write("defaults: [prefill, model/mixtral_8x7b, requests/long_prompt]\nrun: {sp: 8}"))
    assert (job.model.architecture, job.model.config["num_local_experts"]) == ("MixtralForCausalLM", 8)
    assert (job.requests.lengths, job.run.sp, job.run.repeats) == ([131072], 8, 3)
    assert load_config("model/llama_8b").model.config == load_config("configs/llama_8b.yaml").model.config
    with pytest.raises(ConfigError, match=r"no file 'model/lama_8b'.*did you mean 'model/llama_8b.yaml'\?"):
        load_config("model/lama_8b")


def test_files_of_ones_own_do_not_change_those_that_ship(tmp_path: Path, monkeypatch):
    shipped = load_config("prefill")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "llama_small.yaml").write_text("model: {seed: 99}")
    own = tmp_path / "configs" / "model" / "llama_8b.yaml"
    own.write_text("defaults: [model/llama_8b]\nmodel: {seed: 7}")
    assert load_config("prefill") == load_config("./prefill") == shipped
    assert load_config(own).model.seed == 7
    assert load_config(own).model.config == load_config("model/llama_8b").model.config
    assert load_config("configs/model/llama_small.yaml").model.seed == 99


def test_every_key_has_a_value_in_the_parts_of_the_shipped_jobs():
    for line in show_config("generate").splitlines():
        assert not line.endswith("# default"), line


def test_a_file_only_needs_what_differs(write):
    job = load_config(write("compile: {scheme: contiguous}\nrun:\n"))
    assert job == JobConfig(compile=CompileConfig(scheme="contiguous"))


def test_overrides_come_last_and_may_leave_out_the_section(write):
    path = write("run: {sp: 4}\nmodel: {config: {hidden_size: 64, num_hidden_layers: 2}}\n")
    job = load_config(path, ["sp=3", "run.timeout=5", "model.config.num_hidden_layers=1", "scheme=contiguous"])
    assert (job.run.sp, job.run.timeout, job.compile.scheme) == (3, 5.0, "contiguous")
    assert job.model.config == {"hidden_size": 64, "num_hidden_layers": 1}


def test_one_file_of_requests_is_a_list_of_one(write):
    assert load_config(write(""), ["requests.files=a*.txt"]).requests.files == ["a*.txt"]
    assert load_config(write(""), ["files=[a.txt, b.txt]"]).requests.files == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("modle: {}", [], r"unknown key 'modle'; did you mean 'model'\?"),
        ("model: {pth: x}", [], r"unknown key 'model.pth'; did you mean 'path'\?"),
        ("", ["run.repeat=3"], r"unknown key 'run.repeat'; did you mean 'repeats'\?"),
        ("", ["schema=zigzag"], r"unknown key 'schema'; did you mean 'scheme'\?"),
        ("", ["qqq=1"], r"unknown key 'qqq'; known: .*architecture"),
        ("", ["sp"], r"'sp' is not key=value"),
        ("", ["sp=two"], r"run.sp: .*'two'.*; expected a whole number$"),
        ("", ["strict=maybe"], r"compile.strict: .*; expected true or false$"),
        ("", ["max_tokens=many"], r"requests.max_tokens: .*; expected a whole number or null$"),
        ("", ["sp=0"], r"sp=0 is too small; pass at least 1"),
        ("", ["scheme=zigzig"], r"scheme='zigzig' is not known; pass one of contiguous, zigzag, whole, chunked, auto"),
        ("", ["dtype=int8"], r"dtype='int8' is not known; pass one of float32"),
        ("", ["cache_dtype=int8"], r"cache_dtype='int8' is not known; pass one of None, float32"),
        ("", ["max_new_tokens=0"], r"max_new_tokens=0 is too small; pass at least 1"),
        ("", ["seed=3"], r"'seed' is a key of model and generate; write model.seed=3 or so"),
        ("model: 3", [], r"section 'model' is 3; expected keys and values"),
        ("- model", [], r"holds a list; expected sections of keys and values"),
        ("model: [", [], r"cannot be read as YAML: .*line 2"),
        ("model: !!python/object/apply:os.getcwd []", [], r"cannot be read as YAML: .*python/object"),
        ("", ["model.config={a: [}"], r"cannot be read"),
    ],
)
def test_mistakes_are_told(write, text: str, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(write(text), overrides)


def test_a_missing_file_names_the_nearest_shipped_one(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no file 'prefil.yaml'.*did you mean 'prefill.yaml'\?"):
        load_config("prefil.yaml")
    with pytest.raises(ConfigError, match="there is no file"):
        load_config(tmp_path / "prefill.yaml")
    for name in ("h100", "hardware/h100"):
        with pytest.raises(ConfigError, match="there is no file"):
            load_config(name)
    with pytest.raises(ConfigError, match=r"no file 'h10', .*did you mean 'h100.yaml'\?"):
        read_parts("h10", "hardware")
    with pytest.raises(ConfigError, match="no file 'prefill'"):
        read_parts("prefill", "hardware")
    assert read_parts("hardware/h100", "hardware") == read_parts("h100.yaml", "hardware")


def test_compile_config_takes_whole_jobs_and_bare_sections(write):
    bare = compile_config(
        write("scheme: contiguous\npipeline: [normalize, {shard_attention: {strategy: allgather_kv}}]")
    )
    assert bare.scheme == "contiguous"
    assert bare.pipeline == ["normalize", {"shard_attention": {"strategy": "allgather_kv"}}]
    assert compile_config(write("compile: {codegen: eager}\nrun: {sp: 4}")).codegen == "eager"
    assert compile_config(write("run: {sp: 4}")) == compile_config({}) == compile_config(None) == CompileConfig()
    assert compile_config({"compile": {"strict": True}}).strict


def test_compile_overrides_win_and_none_is_ignored():
    given = CompileConfig(scheme="contiguous", strict=True)
    chosen = compile_config(given, scheme="zigzag", strict=None, outputs="sharded")
    assert chosen == CompileConfig(scheme="zigzag", strict=True, outputs="sharded")
    assert given == CompileConfig(scheme="contiguous", strict=True)


def test_compile_mistakes_are_told():
    with pytest.raises(ConfigError, match=r"unknown key 'atention'; did you mean 'attention'\?"):
        compile_config(None, atention="ring")
    with pytest.raises(ConfigError, match=r"unknown key 'compile.sceme'; did you mean 'scheme'\?"):
        compile_config({"compile": {"sceme": "zigzag"}})
    with pytest.raises(ConfigError, match=r"strict: .*; expected true or false"):
        compile_config({"strict": "maybe"})
    with pytest.raises(ConfigError, match="codegen='triton' is not known; pass one of inductor, eager"):
        compile_config(None, codegen="triton")
    with pytest.raises(ConfigError, match=r"pipeline: .*; expected "):
        compile_config(None, pipeline="normalize")


def test_files_are_read_over_those_that_they_include(tmp_path: Path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small.yaml").write_text("model: {config: {hidden_size: 64, num_hidden_layers: 1}}\n")
    (tmp_path / "models" / "wide.yaml").write_text("defaults: [small]\nmodel: {config: {hidden_size: 128}}\n")
    job = tmp_path / "job.yaml"
    job.write_text("defaults: [prefill, models/wide]\nrun: {sp: 4}\n")
    found = load_config(job, ["scheme=whole"])
    assert (found.model.config["hidden_size"], found.model.config["num_hidden_layers"]) == (128, 1)
    assert found.model.config["vocab_size"] == 257  # of the file that ships
    assert (found.run.sp, found.compile.scheme) == (4, "whole")
    monkeypatch.chdir(tmp_path)
    shown = show_config("job.yaml", ["scheme=whole"])
    assert load_config(_written(tmp_path, shown)) == found
    origins = {line.split(":")[0].strip(): line.rpartition("# ")[2] for line in shown.splitlines()}
    expected = {
        "hidden_size": "models/wide.yaml",
        "num_hidden_layers": "models/small.yaml",
        "vocab_size": "sp_compile/configs/model/llama_small.yaml",
        "sp": "job.yaml",
        "scheme": "command line",
        "cache_dtype": "default",
    }
    assert {name: origins[name] for name in expected} == expected
    assert compile_config(job, scheme="whole").scheme == "whole"


def _written(folder: Path, text: str) -> Path:
    (folder / "shown.yaml").write_text(text)
    return folder / "shown.yaml"


def test_files_that_cannot_be_read_are_told(tmp_path: Path):
    (tmp_path / "a.yaml").write_bytes(b"run: {sp: \xff}")
    with pytest.raises(ConfigError, match=r"a.yaml cannot be read: it is no text in UTF-8"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        load_config("n" * 300)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("defaults: [../sub/b.yaml]")
    with pytest.raises(ConfigError, match="files include one another in a circle"):
        load_config(tmp_path / "sub" / "b.yaml")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["defaults: [b]", "defaults: [a]"], r"a.yaml includes .*b.yaml includes .*a.yaml: files include one another"),
        (["defaults: [c]"], r"there is no file 'c', which .*a.yaml includes, and none of that name ships"),
        (["defaults: prefill"], r"a.yaml: defaults is 'prefill'; expected a list"),
        (["defaults: [b]", "run: {spp: 2}"], r"unknown key 'run.spp'; did you mean 'sp'\?"),
    ],
)
def test_mistakes_in_includes_are_told(tmp_path: Path, texts: list[str], message: str):
    for name, text in zip("ab", texts, strict=False):
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "a.yaml")


def test_requests_may_be_drawn_instead_of_read():
    job = load_config("prefill", ["requests.lengths=[7,300,5]", "max_requests=2", "max_tokens=200"])
    limits = SimpleNamespace(vocab_size=11, max_position_embeddings=250)
    drawn = read_requests(job.requests, job.model, limits)
    assert [len(each) for each in drawn] == [7, 200]
    assert all(0 <= int(each.min()) <= int(each.max()) < 11 for each in drawn)
    assert all(map(torch.equal, drawn, read_requests(job.requests, job.model, limits)))
    limits.max_position_embeddings = 199
    with pytest.raises(ConfigError, match="request 1 has 200 tokens, the model takes 199"):
        read_requests(job.requests, job.model, limits)
    job.requests.files = ["some.txt"]
    with pytest.raises(ConfigError, match=r"requests.files and .* are both set"):
        read_requests(job.requests, job.model, limits)
    for lengths in ("[]", "[4,0]"):
        with pytest.raises(ConfigError, match="is too small; pass at least 1"):
            load_config("prefill", [f"requests.lengths={lengths}"])
