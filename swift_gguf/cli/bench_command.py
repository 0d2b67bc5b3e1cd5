"""`swift-gguf bench`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swift_gguf.cli.help import examples, model_argument
from swift_gguf.cli.options import (
    layer_skip_flags,
    layer_skip_options,
    load_model,
    model_flags,
    sampling_flags,
    sampling_options,
)
from swift_gguf.errors import SwiftError

if TYPE_CHECKING:
    from swift_gguf.bench.modes import Mode
    from swift_gguf.bench.suite_report import Progress, Report
    from swift_gguf.bench.suite_run import BenchOptions
    from swift_gguf.model import Model
    from swift_gguf.suite import Row


def _modes(ctx: click.Context, parameter: click.Parameter, value: str) -> list[Mode]:
    from swift_gguf.bench.modes import parse_modes

    try:
        return parse_modes(value)
    except SwiftError as error:
        raise click.BadParameter(str(error)) from error


# greedy by default, so that texts can be compared
@click.command(
    context_settings={"default_map": {"temp": 0.0}},
    epilog=examples(
        "swift-gguf bench smollm2-135m --limit 8",
        "swift-gguf bench model.gguf --suite mine.jsonl --json report.json --plot report.png",
        "swift-gguf bench model.gguf --modes auto,ngram:4,prompt-lookup --oracle",
    ),
)
@model_argument
@click.option("--suite", "suites", multiple=True, metavar="FILE",
              help="Prompts as JSON lines in Spec-Bench's format, or a built-in suite: everyday, "
              "code-editing.  May be repeated.  [default: both built-in suites]")  # fmt: skip
@click.option("--modes", default="auto", show_default=True, callback=_modes, metavar="LIST",
              help="auto; auto-bare (no sidecar); layer-skip, ngram, recycling, draft-model, or "
              "several joined by +, with :N for drafts of N tokens and no search; peers: "
              "llama-cpp-python, prompt-lookup.  Plain decoding always runs, too.")  # fmt: skip
@click.option("--oracle", is_flag=True,
              help="Also try fixed settings; the best one shows what is possible.")  # fmt: skip
@click.option("--draft-model", type=click.Path(path_type=Path), metavar="FILE",
              help="The small GGUF for the mode draft-model.")  # fmt: skip
@click.option("-n", "--n-predict", default=128, show_default=True, metavar="N",
              type=click.IntRange(1), help="Maximum number of tokens per answer.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N",
              help="Use at most N prompts, spread over the categories.")  # fmt: skip
@click.option("--category", "categories", multiple=True, metavar="NAME",
              help="Use only this category.  May be repeated.")  # fmt: skip
@click.option("--repeat", default=1, show_default=True, metavar="N", type=click.IntRange(1),
              help="Measure each prompt N times.")  # fmt: skip
@click.option("--cold", is_flag=True, help="Ignore what was learned about the model.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE",
              help="Save the report after each prompt.  The same command resumes an unfinished "
              "report.")  # fmt: skip
@click.option("--restart", is_flag=True, help="Ignore what is in the --json file, and start again.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), metavar="FILE.png",
              help="Draw the speed-ups as a PNG file.")  # fmt: skip
@layer_skip_flags
@sampling_flags
@model_flags
def bench(
    model: str, json_path: Path | None, plot_path: Path | None, restart: bool, **values: Any
) -> None:
    """Measure the speed-up over plain decoding, on the same prompts in turns.

    Ctrl-C stops; with --json, the same command resumes later.  The command fails if an answer
    differs from plain decoding's where the results must be bit-identical.
    """
    from swift_gguf.bench.suite_table import plot, render
    from swift_gguf.bench.suites import NAMES, load
    from swift_gguf.outputs import require_folder, require_matplotlib

    for path in (json_path, plot_path):
        require_folder(path)
    if plot_path:
        require_matplotlib()
    rows = load(values["suites"] or NAMES, categories=values["categories"], limit=values["limit"])
    options = _options(values)
    with load_model(model, values) as loaded:
        report, interrupted = _measure(loaded, rows, options, json_path, restart=restart)
    click.echo(render(report))
    if plot_path:
        plot(report, plot_path)
    if interrupted:
        raise KeyboardInterrupt
    if report.broken:
        raise SwiftError(
            f"{report.broken} answers differ from plain decoding, although this model's results "
            "do not depend on the batch size: this is a bug, please report it"
        )


def _options(values: dict[str, Any]) -> BenchOptions:
    from swift_gguf.bench.suite_run import BenchOptions

    drafts_with_model = any("draft-model" in mode.sources for mode in values["modes"])
    if drafts_with_model and values["draft_model"] is None:
        raise click.UsageError("the mode draft-model needs --draft-model FILE")
    return BenchOptions(
        modes=values["modes"],
        sampling=sampling_options(values).with_seed(),
        n_predict=values["n_predict"],
        repeat=values["repeat"],
        oracle=values["oracle"],
        draft_model=values["draft_model"],
        layer_skip=layer_skip_options(values),
        cold=values["cold"],
    )


def _measure(
    model: Model, rows: list[Row], options: BenchOptions, json_path: Path | None, *, restart: bool
) -> tuple[Report, bool]:
    """The report, and whether Ctrl-C ended it early."""
    from swift_gguf.bench.suite_run import begin, measure

    report = begin(model, rows, options)
    if json_path and not restart:
        report.resume(json_path)
    with _bar(report) as show:

        def keep(report: Report) -> None:
            if json_path:
                report.save(json_path)
            show(report)

        try:
            measure(model, rows, options, report, progress=keep)
        except KeyboardInterrupt:
            return report, True
    return report, False


@contextmanager
def _bar(report: Report) -> Iterator[Progress]:
    """A progress bar with the time left; nothing if there is no terminal."""
    if not sys.stderr.isatty():
        yield lambda report: None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("measuring", total=report.units, completed=len(report.done))

        def show(report: Report) -> None:
            bar.update(task, completed=len(report.done), description=_line(report))

        yield show


def _line(report: Report) -> str:
    """The modes' speed-ups so far."""
    summaries = {mode.name: report.summary(mode.name) for mode in report.modes[1:]}
    shown = [f"{name} {s.speedup:.2f}x" for name, s in summaries.items() if s and s.speedup]
    return ", ".join(shown[:3]) or "measuring"
