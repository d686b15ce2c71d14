"""The command line: tables, JSON, one-line errors and exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sp_compile import __version__, commands
from sp_compile.cli import main
from sp_compile.errors import ConfigError, RankFailedError
from sp_compile.job import JobResult, RankResult, Unsharded
from sp_compile.pipeline import PassStep, registered_passes
from sp_compile.report import Collective, Report

TINY = [
    *("codegen=eager", "warmup=0", "repeats=1", "max_tokens=30", "max_requests=3", "model.config.hidden_size=32"),
    *("model.config.num_hidden_layers=2", "model.config.intermediate_size=48"),
]


def result(ok: bool = True) -> JobResult:
    fallback = {"op": "aten.cumsum", "count": 3, "bytes": 2048, "source": "model.py:7", "reason": "no rule [for it]"}
    return JobResult(
        model="LlamaForCausalLM",
        parameters=1_000_000,
        device="cpu",
        lengths=[1, 5],
        threads_per_rank=1,
        first_forward_seconds=2.0,
        forward_seconds=0.25,
        bytes_sent=3 << 20,
        bytes_by_formula=3 << 20,
        collectives=[],
        isolation="2 attention masks joined",
        fallbacks=[fallback],
        ranks=[RankResult(0, 3, 10, 1 << 20, 0.25), RankResult(1, 3, 6, 1 << 20, 0.2)],
        unsharded=Unsharded(0.5, 2, 1 << 30, 1e-6 if ok else 1.0, 1.0, 1e-5, ok),
        config={"run": {"sp": 2}, "compile": {"scheme": "zigzag"}, "model": {"dtype": "float32"}},
        versions={},
        machine={},
    )


def run_module(*arguments: str, launcher: tuple[str, ...] = ("-m", "sp_compile")) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_run_prints_a_table_shows_progress_and_writes_json(tmp_path: Path):
    target = tmp_path / "result.json"
    found = run_module("run", "prefill", "sp=2", *TINY, "--json", str(target))
    assert found.returncode == 0, found.stderr
    for words in ("right", "max abs difference", "bytes sent", "peak memory", "attention area", "fallbacks"):
        assert words in found.stdout
    assert "first forward" in found.stderr
    assert "Traceback" not in found.stderr
    content = json.loads(target.read_text())
    assert content["ok"] is True
    assert len(content["ranks"]) == 2
    assert content["config"]["model"]["config"]["hidden_size"] == 32
    assert {"cores", "cpu"} <= content["machine"].keys()
    assert os.uname().nodename not in target.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_run_generates(tmp_path: Path):
    target = tmp_path / "result.json"
    found = run_module("run", "generate", "sp=2", *TINY, "max_new_tokens=4", "--json", str(target))
    assert found.returncode == 0, found.stderr
    for words in ("12 of 12", "prefill, 2 ranks x 1 thread", "decode", "tokens/s", "cache of each rank", "bytes sent"):
        assert words in found.stdout
    assert "generate() of transformers" in found.stderr
    assert json.loads(target.read_text())["ok"] is True


def test_run_uses_the_ranks_of_torchrun():
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sp_compile")
    found = run_module("run", "prefill", "sp=2", *TINY, launcher=launcher)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("max abs difference") == 1
    assert found.stderr.count("more forwards") == 1


def test_a_rank_that_is_killed_ends_the_job_with_its_name():
    command = [sys.executable, "-m", "sp_compile", "run", "prefill", *TINY, "repeats=100000000"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        ranks = wait_for_ranks(job.pid)
        time.sleep(3)
        os.kill(ranks[1], signal.SIGKILL)
        _, errors = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 2
    assert "rank 1 of 2 was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    assert "resource_tracker" not in errors
    assert not any(Path("/proc", str(rank)).exists() for rank in ranks)


def wait_for_ranks(parent: int) -> list[int]:
    """The two ranks, in the order in which they were started."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        listing = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        ranks = [int(pid) for pid in listing if "spawn_main" in Path("/proc", pid, "cmdline").read_text()]
        if len(ranks) == 2:
            return ranks
        time.sleep(0.1)
    raise AssertionError("the ranks did not start")


def test_passes_lists_every_pass_with_its_options(capsys):
    assert main(["passes"]) == 0
    shown = capsys.readouterr().out
    for name, kind in registered_passes().items():
        assert name in shown
        assert all(field.name in shown for field in dataclasses.fields(kind))


def report() -> Report:
    step = PassStep("shard_tokens", "%a = f()\n%b = g(%a, [1, 2])", "%a = f()\n%c = h(%a, [1, 2])", 2, 0.001)
    gather = Collective("all_gather", "all_gather", 4096, "[8, 4]", "model.py:7", "2 linear", 512)
    return Report(
        sp=2,
        scheme="zigzag",
        lengths=(5, 3),
        shard_length=4,
        tokens_per_rank=[4, 4],
        attention_area_per_rank=[11, 10],
        strategies=["allgather_kv", "window", "window"],
        collectives=[gather],
        isolation="",
        fallbacks=[],
        steps=[step],
    )


def test_diff_shows_what_every_pass_changed(capsys, monkeypatch):
    monkeypatch.setattr(commands, "explain_job", lambda _: report())
    assert main(["diff", "prefill"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("shard_tokens: 2 lines changed, 1 ms")
    assert "-%b = g(%a, [1, 2])" in shown
    assert "+%c = h(%a, [1, 2])" in shown
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["diff", "prefill"]) == 0
    assert "\x1b[32m+%c" in capsys.readouterr().out


def test_explain_shows_bytes_and_balance(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(commands, "explain_job", lambda job: asked.append(job.run.sp) or report())
    assert main(["explain", "prefill", "sp=64"]) == 0
    shown = capsys.readouterr().out
    assert asked == [64]
    assert "1 collectives, 4096 bytes sent by each rank" in shown
    assert "[8, 4]" in shown
    assert "attention by 0: allgather_kv, 1-2: window" in shown
    assert "meanwhile 2 linear, 5.1e+02 operations in products" in shown


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sp_compile {__version__}\n"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("run", "explain", "diff", "passes"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "prefil"], "did you mean 'prefill.yaml'?"),
        (["run", "prefill", "run.spp=2"], "unknown key 'run.spp'; did you mean 'sp'?"),
        (
            ["explain", "prefill", "scheme=zig"],
            "scheme='zig' is not known; pass one of contiguous, zigzag, whole, chunked",
        ),
        (["diff", "prefill", "sp"], "'sp' is not key=value"),
        (["run", "prefill", "--json", "no/such/folder/x.json"], "there is no directory 'no/such/folder'"),
        (["explain", "prefill", "pipeline=[normalise]"], "unknown pass 'normalise'; did you mean 'normalize'?"),
    ],
)
def test_mistakes_are_one_clean_line(arguments: list[str], words: str, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("error: ")
    assert words in shown.err


def test_unknown_commands_suggest_the_nearest(capsys):
    assert main(["rnu", "prefill"]) == 2
    assert "Did you mean 'run'?" in capsys.readouterr().err


def test_errors_of_ranks_are_cut_to_a_line_unless_debugging(capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise RankFailedError("rank 1 of 2 raised ValueError: x\n\nTraceback ...")

    monkeypatch.setattr(commands, "run_job", fail)
    assert main(["run", "prefill"]) == 2
    assert capsys.readouterr().err == "error: rank 1 of 2 raised ValueError: x (--debug shows the rest)\n"
    with pytest.raises(RankFailedError, match="Traceback"):
        main(["run", "prefill", "--debug"])


def test_a_wrong_result_ends_with_code_1_and_fallbacks_are_listed(capsys, monkeypatch):
    monkeypatch.setattr(commands, "run_job", lambda *_: result(ok=False))
    assert main(["run", "prefill"]) == 1
    shown = capsys.readouterr().out
    assert "WRONG" in shown
    assert "aten.cumsum" in shown
    assert "[for it]" in " ".join(shown.split())
    monkeypatch.setattr(commands, "run_job", lambda *_: result(ok=True))
    assert main(["run", "prefill"]) == 0


def test_json_is_whole_or_not_there(tmp_path: Path):
    target = tmp_path / "result.json"
    target.write_text("before")
    broken = dataclasses.replace(result(), config={"x": object()})
    with pytest.raises(TypeError):
        commands.write_json(broken, target)
    assert target.read_text() == "before"
    commands.write_json(result(), target)
    assert json.loads(target.read_text())["fallbacks"][0]["op"] == "aten.cumsum"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    with pytest.raises(ConfigError, match="cannot be written"):
        commands.write_json(result(), tmp_path)


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "sp_compile.commands")
    assert main(["passes"]) == 2
    assert "pip install 'sp_compile[cli]'" in capsys.readouterr().err
