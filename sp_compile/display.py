"""Tables and progress for the command line."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sp_compile.calibration import WITHIN, Compared, share_within
from sp_compile.generation_job import GenerationResult
from sp_compile.hardware import Hardware
from sp_compile.job import JobResult
from sp_compile.pipeline import Pass
from sp_compile.planning import Prediction, best
from sp_compile.report import Report
from sp_compile.sweep import DONE, Point, Show, flat_rows, told
from sp_compile.work import Work

COLOURS = {"+": "green", "-": "red", "@": "cyan"}


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Show a step on standard error while it runs, and how long it took when it is done."""
    console = Console(stderr=True)
    start = time.perf_counter()
    # Few refreshes: the process that shows this is one of those being timed.
    with console.status(text, refresh_per_second=2):
        yield
    console.print(f"{text}: {time.perf_counter() - start:.1f} s", highlight=False, markup=False)


@contextmanager
def points() -> Iterator[Show]:
    """Show on standard error how far a sweep is, how long it will take, and its next point."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as bar:
        task = bar.add_task("points", total=None)

        def show(done: int, total: int, point: Point | None) -> None:
            text = "points" if point is None else told(point.values)
            bar.update(task, completed=done, total=total, description=text)

        yield show


def show_points(results: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The results of a sweep as a table."""
    rows, names = flat_rows(results), [*results[0]["point"]]
    table = Table()
    for name in names:
        table.add_column(Text(name.split(".")[-1]))
    for heading in ("", "seconds", "MB sent", "MB peak", "area", "tokens"):
        table.add_column(heading, justify="right")
    for row in rows:
        verdict = Text(row["status"], "green" if row["status"] == DONE else "bold red")
        figures = [""] * 5
        if "seconds" in row:
            figures = [f"{row['seconds']:.3f}", f"{row['bytes_sent'] / 1e6:.2f}", f"{row['peak_bytes'] / 1e6:.0f}",
                       f"{row['area_most_over_mean']:.2f}", f"{row['tokens_most_over_mean']:.2f}"]  # fmt: skip
        table.add_row(*(Text(str(row[name])) for name in names), verdict, *figures)
    console.print(table)
    console.print("area, tokens: the busiest rank's over the mean", highlight=False)
    for row in rows:
        if row["error"]:
            where = " ".join(f"{name}={row[name]}" for name in names)
            console.print(f"{where}: {row['error']}", highlight=False, markup=False)


def show_plans(
    plans: Mapping[int, Sequence[Prediction]],
    work: Work,
    lengths: Sequence[int],
    hardware: Hardware,
    console: Console,
) -> None:
    """The best mesh of each kind of work for each number of ranks."""
    batch = f"{_count(len(lengths), 'request')}, {sum(lengths):,} tokens"
    amounts = f"{work.operations:.3g} operations and {work.keys:,.0f} bytes of keys and values a token"
    where = f"{hardware.name}, {hardware.ranks_per_node} to a node"
    console.print(f"{batch}; {work.parameters:,} parameters, {amounts}; {where}", highlight=False)
    table = Table()
    for heading in ("", "ranks", "dp x sp", "layout", "attention by", "seconds", "bytes in", "memory", ""):
        table.add_column(heading, justify="right" if heading in ("ranks", "seconds", "bytes in", "memory") else "left")
    for each in best(plans):
        verdict = Text("", "") if each.fits else Text("more than there is", "bold red")
        if each.sharded:
            verdict = Text("fully_shard ").append(verdict)
        table.add_row(each.kind, str(each.ranks), f"{each.dp} x {each.sp}", each.scheme, each.strategy,
                      f"{each.seconds:.4g}", _bytes(each.bytes_in), _bytes(each.memory), verdict)  # fmt: skip
    console.print(table)
    console.print("prefill: logits of each request's last token; decode: a token of every request; training: a step, "
                  "of which only the loss is kept. Bytes and memory are those of a rank.", highlight=False)  # fmt: skip


def show_compared(hardware: Hardware, compared: Sequence[Compared], console: Console) -> None:
    """Predictions beside what was measured."""
    table = Table()
    for heading in ("sp", "attention by", "tokens", "predicted", "measured", "off by", ""):
        table.add_column(heading, justify="left" if heading in ("attention by", "") else "right")
    for each in compared:
        off = Text(f"{each.error:+.0%}", "" if abs(each.error) <= WITHIN else "yellow")
        table.add_row(str(each.sp), each.strategy, f"{sum(each.lengths):,}", f"{each.predicted:.3f}",
                      f"{each.measured:.3f}", off, "used" if each.used else "")  # fmt: skip
    console.print(table)
    others = [each for each in compared if not each.used]
    console.print(f"within {WITHIN:.0%}: {share_within(compared):.0%} of the {len(others)} points that rates were not "
                  f"read off; products {hardware.products:.3g}/s, attention {hardware.attention:.3g}/s",
                  highlight=False)  # fmt: skip


def show_result(result: JobResult, console: Console) -> None:
    """The result of a job as tables."""
    run, chosen = result.config["run"], result.config["compile"]
    console.print(
        f"{_heading(result)}, {sum(result.lengths)} in all; {chosen['scheme']} layout over {run['sp']} ranks",
        highlight=False,
    )
    console.print(_summary(result))
    console.print(_ranks(result))
    if result.fallbacks:
        console.print(_fallbacks(result))


def _summary(result: JobResult) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    unsharded = result.unsharded
    if unsharded is not None:
        verdict = Text("right", "bold green") if unsharded.ok else Text("WRONG", "bold red")
        table.add_row("logits against the unsharded model", verdict)
        table.add_row("  max abs difference", f"{unsharded.max_abs_diff:.2e}")
        ratio = unsharded.max_abs_diff / unsharded.logit_scale if unsharded.logit_scale else 0.0
        allowed = unsharded.limit / unsharded.logit_scale if unsharded.logit_scale else 0.0
        table.add_row("  relative to max |logit|", f"{ratio:.1e} (allowed {allowed:.0e})")
    sp, threads = len(result.ranks), result.threads_per_rank
    table.add_row("first forward, with compilation", f"{result.first_forward_seconds:.1f} s")
    table.add_row(
        f"forward, {_count(sp, 'rank')} x {_count(threads, 'thread')}", f"{result.forward_seconds * 1e3:.1f} ms"
    )
    if unsharded is not None:
        label = f"forward unsharded (eager), {_count(unsharded.threads, 'thread')}"
        table.add_row(label, f"{unsharded.forward_seconds * 1e3:.1f} ms")
        table.add_row("peak memory of that forward", _bytes(unsharded.peak_bytes))
    table.add_row("bytes sent by each rank in a forward", _bytes(result.bytes_sent))
    table.add_row("collectives in a forward", str(len(result.collectives)))
    if result.isolation:
        table.add_row("requests isolated", result.isolation)
    table.add_row("fallbacks", str(sum(each["count"] for each in result.fallbacks)))
    return table


def show_generation(result: GenerationResult, console: Console) -> None:
    """The result of a generating job as a table."""
    run, chosen = result.config["run"], result.config["generate"]
    console.print(
        f"{_heading(result)}, up to {chosen['max_new_tokens']} new ones each; over {run['sp']} ranks", highlight=False
    )
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    whole, new = result.unsharded, sum(result.new_tokens)
    if whole is not None:
        colour = "bold green" if whole.same == whole.tokens else "bold yellow" if result.ok else "bold red"
        same = Text(f"{whole.same} of {whole.tokens}", colour)
        table.add_row("tokens that the unsharded model generates too", same)
    ends = ", ".join(f"{result.finish_reasons.count(each)} {each}" for each in sorted({*result.finish_reasons}))
    table.add_row("requests ended by", ends)
    table.add_row("first run, with compilation", f"{result.first_seconds:.1f} s")
    prompts, ranks = sum(result.lengths), _count(run["sp"], "rank")
    table.add_row(f"prefill, {ranks} x {_count(result.threads_per_rank, 'thread')}",
                  f"{prompts / result.prefill_seconds:.0f} tokens/s")  # fmt: skip
    decoded = new - len([each for each in result.new_tokens if each])
    if decoded:
        table.add_row("decode", f"{decoded / result.decode_seconds:.1f} tokens/s")
    total = result.prefill_seconds + result.decode_seconds
    table.add_row("all of it", f"{total:.2f} s")
    if whole is not None:
        table.add_row(f"generate() of transformers, {_count(whole.threads, 'thread')}", f"{whole.seconds:.2f} s")
    table.add_row("cache of each rank", ", ".join(map(_bytes, result.cache_bytes)))
    table.add_row("bytes sent by each rank for a new token", _bytes(result.bytes_sent / result.step_requests))
    console.print(table)


def _heading(result: JobResult | GenerationResult) -> str:
    """The model and the requests of a job."""
    return (
        f"{result.model}, {result.parameters / 1e6:.1f} M parameters, {result.config['model']['dtype']} "
        f"on {result.device}; {len(result.lengths)} requests of {min(result.lengths)} to {max(result.lengths)} tokens"
    )


def _ranks(result: JobResult) -> Table:
    table = Table("rank", "tokens", "attention area", "share", "forward", "peak memory")
    for column in table.columns:
        column.justify = "right"
    area = sum(each.attention_area for each in result.ranks) or 1
    for each in result.ranks:
        share = f"{100 * each.attention_area / area:.1f} %"
        time_ms = f"{each.forward_seconds * 1e3:.1f} ms"
        table.add_row(
            str(each.rank), str(each.tokens), str(each.attention_area), share, time_ms, _bytes(each.peak_bytes)
        )
    return table


def _fallbacks(result: JobResult) -> Table:
    table = Table("op on gathered inputs", "count", "bytes", "source", "reason")
    for each in result.fallbacks:
        cells = (each["op"], str(each["count"]), _bytes(each["bytes"]), each["source"], each["reason"])
        table.add_row(*map(Text, cells))
    return table


def show_diffs(report: Report, console: Console) -> None:
    """What every pass changed in the graph, as coloured diffs."""
    for step in report.steps:
        title = f"{step.name}: {_count(step.lines_changed or 0, 'line')} changed, {step.seconds * 1e3:.0f} ms"
        console.rule(Text(title, "bold"), align="left")
        for line in step.diff.splitlines():
            console.print(Text(line, COLOURS.get(line[:1], "")), soft_wrap=True)


def show_passes(passes: dict[str, type[Pass]], console: Console) -> None:
    """The passes in the order of the default pipeline, with their options."""
    table = Table("pass", "options", "what it does")
    for column in table.columns[:2]:
        column.no_wrap = True
    for name, kind in passes.items():
        defaults = kind()
        options = [f"{each.name}={getattr(defaults, each.name)!r}" for each in dataclasses.fields(kind)]
        summary = Text((kind.__doc__ or "").strip().splitlines()[0])
        for verb, group in (("requires", kind.requires), ("establishes", kind.establishes)):
            if group:
                summary.append(f"\n{verb} {', '.join(each.name for each in group)}", "dim")
        table.add_row(name, Text("\n".join(options)), summary)
    console.print(table)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(number) < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
