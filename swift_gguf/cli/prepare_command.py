"""`swift-gguf prepare`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swift_gguf.cli.help import examples, model_argument
from swift_gguf.cli.options import load_model, model_flags, read_text

if TYPE_CHECKING:
    from swift_gguf.model import Model
    from swift_gguf.prepare.run import Preparation, Report

CONTEXT = 2048  # tokens, for a prompt and all its answers
BATCH = 128  # tokens in a batch, each with logits


@click.command(
    epilog=examples(
        "swift-gguf prepare model.gguf                # writes model.swift.gguf",
        "swift-gguf prepare model.gguf --calibration mine.jsonl --tokens 50000",
        "swift-gguf prepare model.gguf -o elsewhere.gguf --width 0.25 --tune 0",
    )
)
@model_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
              help="File to write.  [default: MODEL.swift.gguf beside the model]")  # fmt: skip
@click.option("--width", default=0.125, show_default=True, metavar="SHARE",
              type=click.FloatRange(0, 1, min_open=True),
              help="Share of each FFN's neurons that drafts use.")  # fmt: skip
@click.option("--rank", metavar="N", type=click.IntRange(0),
              help="Rank of the linear map that replaces the other neurons; 0: none.  [default: a "
              "sixth of the embedding size]")  # fmt: skip
@click.option("--head", default=65536, show_default=True, metavar="N", type=click.IntRange(0),
              help="Number of tokens that drafts choose from; 0: all.")  # fmt: skip
@click.option("--attention/--no-attention", default=True, show_default=True,
              help="Copy attention matrices of eight bits or more with fewer bits.")  # fmt: skip
@click.option("--type", "kind", default="Q4_0", show_default=True, metavar="TYPE",
              help="Type of the draft weights: Q4_0, Q4_K, Q8_0, ...")  # fmt: skip
@click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE",
              help="Prompts to calibrate on: JSON lines with `turns`, or one prompt per line.  "
              "[default: built-in prompts]")  # fmt: skip
@click.option("--tokens", default=12000, show_default=True, metavar="N", type=click.IntRange(1),
              help="Number of tokens of the model's own answers to calibrate on.")  # fmt: skip
@click.option("-s", "--seed", default=1, show_default=True, metavar="N", type=click.IntRange(0),
              help="Random seed of the answers.")  # fmt: skip
@click.option("--tune", "minutes", default=1.0, show_default=True, metavar="M",
              type=click.FloatRange(0),
              help="Minutes to tune the drafts afterwards; 0: do not tune.")  # fmt: skip
@model_flags
def prepare(model: str, output: Path | None, minutes: float, **values: Any) -> None:
    """Make weights for faster drafts from the model itself.

    The file beside the model is picked up automatically.  Ctrl-C stops; the same command
    resumes later.
    """
    from swift_gguf.gguf.sidecar import path_beside

    values |= {"ctx_size": CONTEXT, "sidecar": "none"}
    with load_model(model, values, n_batch=BATCH, holds_several=True) as loaded:
        out = output or path_beside(loaded.path)
        with _display() as report:
            _prepare(loaded, out, values, report)
        path = loaded.path
    if minutes and out == path_beside(path):
        _try_out(path, minutes, values)


def _prepare(model: Model, out: Path, values: dict[str, Any], report: Report) -> None:
    from swift_gguf.prepare.run import Preparation, PrepareOptions
    from swift_gguf.prepare.texts import load_texts, save_texts, texts_key

    options = PrepareOptions(
        width=values["width"],
        rank=values["rank"],
        n_head=values["head"],
        attention=values["attention"],
        n_tokens=values["tokens"],
        kind=values["kind"],
        seed=values["seed"],
    )
    prompts = _prompts(model, values["calibration"])
    preparation = Preparation(model, prompts, options, report=report)
    click.echo(_plan(preparation, out), err=True)
    unfinished = out.with_name(out.name + ".texts.json")
    key = texts_key(model.path, prompts, options.seed)
    texts = load_texts(unfinished, key)
    for text in preparation.answers(texts):
        texts.append(text)
        save_texts(unfinished, key, texts)
    n_bytes = preparation.write(out, texts)
    unfinished.unlink(missing_ok=True)
    error = preparation.error
    accuracy = f"; relative error of the narrow FFNs: {error:.0%}"
    click.echo(f"wrote {out}, {n_bytes / 1e6:.0f} MB{'' if error is None else accuracy}")


def _plan(preparation: Preparation, out: Path) -> str:
    n_bytes, model_bytes = preparation.expected_bytes, preparation.model.n_bytes
    plan = f"will write {out}, about {n_bytes / 1e6:.0f} MB ({n_bytes / model_bytes:.0%})"
    return plan if preparation.odd_columns is None else f"{plan}; {preparation.odd_columns}"


def _prompts(model: Model, file: Path | None) -> list[list[int]]:
    """The prompts as tokens, in the chat template if the model has one."""
    from swift_gguf.prepare.prompts import PROMPTS
    from swift_gguf.suite import read_suite
    from swift_gguf.text import encode, render_chat

    if file is None:
        texts = list(PROMPTS)
    elif file.suffix == ".jsonl":
        texts = [row.turns[0] for row in read_suite(file)]
    else:
        texts = [line for line in read_text(file).split("\n") if line.strip()]
    has_template = model.metadata("tokenizer.chat_template") is not None
    longest = CONTEXT // 4

    def tokens(text: str) -> list[int]:
        if has_template:
            text = render_chat(model, [{"role": "user", "content": text}])
        return encode(model, text)

    prompts = [ids for ids in map(tokens, texts) if 0 < len(ids) <= longest]
    if not prompts:
        raise click.ClickException(f"{file} has no prompt of at most {longest} tokens")
    return prompts


def _try_out(path: Path, minutes: float, values: dict[str, Any]) -> None:
    """Measures and tunes, so that the first answer already has good drafts."""
    from swift_gguf.cli.tune_command import tune_lines

    with load_model(str(path), {**values, "sidecar": None}) as model:
        click.echo(tune_lines(model, minutes))


@contextmanager
def _display() -> Iterator[Report]:
    """A progress bar; without a terminal, a line for each step."""
    if not sys.stderr.isatty():
        last = ""

        def line(what: str, share: float) -> None:
            nonlocal last
            if what != last:
                last = what
                click.echo(what, err=True)

        yield line
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        tasks: dict[str, rich.TaskID] = {}

        def show(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=share)

        yield show
