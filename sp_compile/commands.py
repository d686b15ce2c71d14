"""The commands of ``sp-compile``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sp_compile import __version__, display
from sp_compile.calibration import calibrated
from sp_compile.config import load_config, show_config
from sp_compile.errors import ConfigError
from sp_compile.files import check_target, written_whole
from sp_compile.generation_job import GenerationResult, run_generation
from sp_compile.hardware import load_hardware, write_hardware
from sp_compile.job import JobResult, explain_job, run_job, work_of_job
from sp_compile.pipeline import registered_passes
from sp_compile.planning import Planner, check_dtype, rank_counts
from sp_compile.plots import draw
from sp_compile.sweep import DONE, Results, load_sweep, pandas_module, run_sweep, write_table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Run unmodified models with their tokens spread over ranks.",
)

Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of one that ships, such as prefill.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="sp=4, model.dtype=bfloat16, and so on.")
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sp_compile {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of all commands; ``debug`` is read where errors are shown."""


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show the whole configuration and where each value comes from.")
    ] = False,
) -> None:
    """Prefill a batch over ranks, or generate from it, and compare with the unsharded model.

    Starts its own local ranks; under torchrun it uses those.
    """
    job = load_config(config, overrides or [])
    if print_config:
        typer.echo(show_config(config, overrides or []), nl=False)
        return
    target = json_file or (Path(job.run.json) if job.run.json else None)
    if target is not None:
        check_target(target)
    generates = job.generate.max_new_tokens is not None
    result = run_generation(job, display.progress) if generates else run_job(job, display.progress)
    if result is None:
        return
    if isinstance(result, GenerationResult):
        display.show_generation(result, Console())
    else:
        display.show_result(result, Console())
    if target is not None:
        write_json(result, target)
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def explain(
    config: Config,
    overrides: Overrides = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with pictures and diffs instead.")] = None,
) -> None:
    """Show passes, collectives, balance and fallbacks for any sp, without weights and ranks."""
    job = load_config(config, overrides or [])
    if html is not None:
        check_target(html)
    report = explain_job(job)
    if html is None:
        report.render(Console())
    else:
        name = job.model.path or job.model.architecture
        report.write_html(html, f"{name} over {job.run.sp} ranks")


@app.command()
def diff(config: Config, overrides: Overrides = None) -> None:
    """Show what every pass changes in the graph."""
    display.show_diffs(explain_job(load_config(config, overrides or [])), Console())


@app.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    results: Annotated[
        Path | None, typer.Option(help="Lines of JSON; FILE.parquet is written beside it. CONFIG.jsonl by default.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run points again that failed.")] = False,
) -> None:
    """Run a job at every point of a grid; points that have a result are not run again."""
    pandas_module()
    grid, file = load_sweep(config, overrides or []), Results(results or Path(f"{Path(config).stem}.jsonl"))
    check_target(file.path)
    with display.points() as show:
        found = run_sweep(grid, file, retry, show)
    write_table(found, file.path.with_name(f"{file.path.name}.parquet"))
    display.show_points(found, Console())
    if any(each["status"] != DONE for each in found):
        raise typer.Exit(1)


@app.command()
def plot(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="What sp-compile sweep wrote.")],
    folder: Annotated[Path | None, typer.Option("--out", help="Where to; beside the results by default.")] = None,
) -> None:
    """Draw speed-up, bytes, balance and memory of a sweep, as PNG and SVG."""
    beside = results.with_name(f"{results.stem}-plots")
    for each in draw(_results(results), folder or beside):
        typer.echo(str(each))


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks.")] = "8,64,1024",
    hardware: Annotated[
        str, typer.Option("--gpu", "--hardware", help="h100, h200, b200, or a YAML file with rates.")
    ] = "h100",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all meshes and strategies here.")] = None,
) -> None:
    """Predict prefill, decoding and training on ranks that are not at hand, and the best mesh for each."""
    job, machine, counts = load_config(config, overrides or []), load_hardware(hardware), rank_counts(ranks)
    check_dtype(job.model.dtype, machine)
    if json_file is not None:
        check_target(json_file)
    with display.progress("capturing the model and counting what it computes"):
        work, lengths = work_of_job(job, machine.rates(1))
    planner = Planner(work, machine, job.compile.scheme, keep_gathered=job.compile.keep_gathered)
    found = {count: planner.plans(lengths, count) for count in counts}
    display.show_plans(found, work, lengths, machine, Console())
    if json_file is not None:
        everything = [dataclasses.asdict(each) for of_ranks in found.values() for each in of_ranks]
        _write({"hardware": machine.name, "lengths": lengths, "plans": everything}, json_file)


@app.command()
def calibrate(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="What sp-compile sweep wrote, of jobs on a CPU.")],
    out: Annotated[Path, typer.Option(help="Where to write the rates, for plan --hardware.")] = Path("here.yaml"),
) -> None:
    """Read this machine's rates off half of a sweep's jobs, and compare predictions with all that were measured."""
    check_target(out)
    hardware, compared = calibrated(_results(results))
    write_hardware(hardware, out)
    display.show_compared(hardware, compared, Console())


@app.command()
def passes() -> None:
    """List the passes with their options."""
    display.show_passes(registered_passes(), Console())


def _results(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"there is no file {str(path)!r}")
    return Results(path).read()


def write_json(result: JobResult | GenerationResult, target: Path) -> None:
    """Write a result whole or not at all.

    Raises:
        ConfigError: the directory does not take it.
    """
    _write(dataclasses.asdict(result) | {"ok": result.ok}, target)


def _write(content: Mapping[str, Any], target: Path) -> None:
    with written_whole(target) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
