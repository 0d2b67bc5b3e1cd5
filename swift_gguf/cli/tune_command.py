"""`swift-gguf tune`."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from swift_gguf.cli.help import examples, model_argument
from swift_gguf.cli.options import load_model, model_flags, paper_options, search_flags

if TYPE_CHECKING:
    from swift_gguf.learning import Learning
    from swift_gguf.model import Model
    from swift_gguf.search.offline import Progress

DEFAULT_MINUTES = 3.0
SAVE_EVERY = 50  # steps


@click.command(
    epilog=examples(
        "swift-gguf tune model.gguf --minutes 10",
        "swift-gguf tune model.gguf --suite mine.jsonl --json",
        "swift-gguf tune model.gguf --reset           # delete what was learned",
    )
)
@model_argument
@click.option("--suite", type=click.Path(path_type=Path), metavar="FILE",
              help="Prompts as JSON lines with `turns`.  [default: built-in prompts]")  # fmt: skip
@click.option("--minutes", default=DEFAULT_MINUTES, show_default=True, metavar="M",
              type=click.FloatRange(0, min_open=True), help="Minutes to search for.")  # fmt: skip
@click.option("--draft-max", default=8, show_default=True, metavar="N",
              type=click.IntRange(1, 64), help="Maximum number of draft tokens.")  # fmt: skip
@click.option("--reset", is_flag=True, help="Delete what was learned about the model, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@search_flags
@model_flags
def tune(model: str, reset: bool, as_json: bool, **values: Any) -> None:
    """Find the layers that a model's drafts can skip, and save the result.

    Ctrl-C stops early and keeps the best result so far.
    """
    if reset:
        _reset(model)
        return
    with load_model(model, values) as loaded:
        report = _tune(loaded, values)
    click.echo(json.dumps(report) if as_json else _lines(report))


def _reset(reference: str) -> None:
    """Deletes the model's profiles: the one without a sidecar and the one with it."""
    from swift_gguf.gguf.identity import profile_key
    from swift_gguf.gguf.sidecar import path_beside
    from swift_gguf.hub import resolve
    from swift_gguf.learning import Store

    model = resolve(reference)
    sidecars = [path for path in (path_beside(model),) if path.exists()]
    found = [Store().forget(profile_key(model, sidecar)) for sidecar in (None, *sidecars)]
    click.echo("deleted" if any(found) else "nothing was learned about this model")


def tune_lines(model: Model, minutes: float) -> str:
    """Tunes on the built-in prompts, and returns what `tune` would print."""
    values = {"suite": None, "search": "auto", "draft_max": 8, "minutes": minutes}
    return _lines(_tune(model, values))


def _tune(model: Model, values: dict[str, Any]) -> dict[str, Any]:
    from swift_gguf.errors import UnsupportedModelError
    from swift_gguf.learning import Learning, SearchOptions, space_of
    from swift_gguf.search.offline import STEPS, WINDOW
    from swift_gguf.search.offline import tune as tune_offline

    if refusal := model.rollback_refusal:
        raise UnsupportedModelError(f"nothing to tune: {refusal}")
    space = space_of(model)
    if space is None:
        raise UnsupportedModelError("nothing to tune: this model has no layer that can be skipped")
    prompts = _prompts(model, values["suite"])
    paper = paper_options(values) if values["search"] == "paper" else None
    options = SearchOptions(paper=paper, draft_max=values["draft_max"])
    learning = Learning(model, space, options=options)
    learning.measure_costs()
    learning.save()
    interrupted = False
    with _display(learning, 60 * values["minutes"]) as show:

        def report(progress: Progress) -> None:
            show(progress)
            if progress.steps % SAVE_EVERY == 0:  # so that a power cut loses little
                learning.save()

        assert learning.searcher is not None  # there is a space
        try:
            tune_offline(
                model,
                learning.searcher,
                prompts,
                seconds=60 * values["minutes"],
                report=report,
                meter=learning.meter,
                window=paper.context_window if paper else WINDOW,
                steps=1 if paper else STEPS,
                own_past=paper is not None,
            )
        except KeyboardInterrupt:
            interrupted = True
    learning.save()
    return _report(learning, interrupted=interrupted)


def _prompts(model: Model, suite: Path | None) -> list[list[int]]:
    """The first turns of a suite, shuffled, as chat prompts."""
    from swift_gguf.suite import BUILT_IN, read_suite
    from swift_gguf.text import encode, render_chat

    texts = [row.turns[0] for row in read_suite(suite)] if suite else list(BUILT_IN)
    random.Random(0).shuffle(
        texts
    )  # suites are sorted by category, and a short tuning should see all
    has_template = model.metadata("tokenizer.chat_template") is not None

    def tokens(text: str) -> list[int]:
        if has_template:
            text = render_chat(model, [{"role": "user", "content": text}])
        return encode(model, text)

    return [tokens(text) for text in texts]


class _Show(Protocol):
    def __call__(self, progress: Progress, /) -> None: ...


@contextmanager
def _display(learning: Learning, seconds: float) -> Iterator[_Show]:
    """A progress bar with the best result so far; nothing if there is no terminal."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("tuning", total=seconds)

        def show(progress: Progress) -> None:
            bar.update(
                task,
                completed=min(progress.seconds, seconds),
                description=f"{progress.steps} tried  {_best(learning)}",
            )

        yield show


def _best(learning: Learning) -> str:
    known = learning.best_known
    return f"best {known.rate.speedup:.2f}x" if known else "searching"


def _report(learning: Learning, *, interrupted: bool) -> dict[str, Any]:
    best, known = learning.best, learning.best_known
    matchness = getattr(learning.searcher, "best_score", None)
    return {
        "interrupted": interrupted,
        "search_s": learning.meter.seconds,
        "evaluations": learning.meter.steps,
        "best": {
            "skip_attn": sorted(best.skip_attn),
            "skip_ffn": sorted(best.skip_ffn),
            "narrow_ffn": sorted(best.narrow_ffn),
            "draft_head": best.draft_head,
            "text": str(best),
            "pass_share": learning.costs.draft_ms(best) / learning.costs.verify_ms(1),
            "predicted_speedup": known.rate.speedup if known else None,
            "agreement": known.rate.agreement if known else None,
            "matchness": matchness,
        },
    }


def _lines(report: dict[str, Any]) -> str:
    best = report["best"]
    lines = [
        f"{report['evaluations']} drafts scored in {report['search_s']:.0f} s"
        + (", interrupted" if report["interrupted"] else ""),
        f"best: {best['text']}",
    ]
    if best["matchness"] is not None:
        return "\n".join(
            [
                *lines,
                f"matchness {best['matchness']:.2f}; the result of --search paper is not saved",
            ]
        )
    if best["agreement"] is None:
        return "\n".join([*lines, "too few drafts were scored to predict a speed-up"])
    speedup = best["predicted_speedup"]
    verdict = "" if speedup >= 1 else ": plain decoding is faster here and will be used"
    lines.append(
        f"agrees with the model at {best['agreement']:.0%} of positions, costs "
        f"{best['pass_share']:.0%} of a forward pass; predicted speed-up {speedup:.2f}x{verdict}"
    )
    return "\n".join(lines)
