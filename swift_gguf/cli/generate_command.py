"""`swift-gguf generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swift_gguf.cli.options import (
    load_model,
    model_flags,
    read_text,
    sampling_flags,
    sampling_options,
    search_flags,
    speculation_flags,
    speculation_options,
)

if TYPE_CHECKING:
    from swift_gguf.model import Model
    from swift_gguf.sampling import SamplingOptions
    from swift_gguf.speculation import Speculation
    from swift_gguf.stats import Stats


@click.command()
@click.argument("model")
@click.option("-p", "--prompt", help="The prompt.  [default: standard input]")
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Read the prompt from a file.")
@click.option(
    "-n", "--n-predict", default=-1, metavar="N", help="At most N tokens; -1: to the end."
)
@click.option("-sys", "--system-prompt", metavar="TEXT", help="A system message.")
@click.option(
    "--chat-template", metavar="JINJA", help="A template (text or file) instead of the model's."
)
@click.option("--raw", is_flag=True, help="No chat template: continue the prompt as it stands.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, no stream.")
@click.option(
    "--compare", is_flag=True, help="Decode the prompt plainly too, and show both speeds."
)
@speculation_flags
@search_flags
@sampling_flags
@model_flags
def generate(model: str, as_json: bool, compare: bool, **values: Any) -> None:
    """Answer one prompt, streaming to the terminal; figures go to standard error."""
    from swift_gguf.speculation import Speculation

    text = _prompt_text(values)
    speculation_wanted = speculation_options(values)
    options = sampling_options(values).with_seed()
    with ExitStack() as stack:
        loaded = stack.enter_context(load_model(model, values))
        prompt = _prompt_tokens(loaded, text, values)
        speculation = stack.enter_context(closing(Speculation(loaded, speculation_wanted)))
        job = _Job(loaded, prompt, options, values["n_predict"])
        answer = job.run(
            speculation,
            show=None if as_json else _show,
            draws=values["speculative_sampling"],
        )
        speculation.save()
        if not as_json:
            click.echo()
        plain, interrupted = None, answer.interrupted
        if compare and speculation.drafter and not interrupted:
            loaded.clear()
            plain = job.run(None, show=None)
            if plain.interrupted:
                plain, interrupted = None, True
        if as_json:
            click.echo(
                json.dumps(_as_json(answer, speculation, plain, options), ensure_ascii=False)
            )
        else:
            click.echo("\n" + _footer(answer, speculation, plain), err=True)
    if interrupted:
        raise KeyboardInterrupt


@dataclass
class _Answer:
    tokens: list[int]
    text: str
    stats: Stats
    is_drawn: bool = False
    """By speculative sampling: the same distribution, not the same text."""
    interrupted: bool = False


@dataclass
class _Job:
    """One prompt, to be answered with speculation or without."""

    model: Model
    prompt: list[int]
    options: SamplingOptions
    n_predict: int

    def run(
        self,
        speculation: Speculation | None,
        *,
        show: Callable[[str], None] | None,
        draws: bool = False,
    ) -> _Answer:
        """draws: speculative sampling."""
        from swift_gguf.engine import generate as generate_tokens
        from swift_gguf.sampling import Sampler, SpeculativeSampler
        from swift_gguf.stats import Stats
        from swift_gguf.text import StreamDecoder

        answer = _Answer([], "", Stats(), is_drawn=draws)
        if self.n_predict == 0:
            answer.stats.stop_reason = "length"
            return answer
        decoder = StreamDecoder(self.model)
        show = show or (lambda _: None)
        kind = SpeculativeSampler if draws else Sampler
        with kind(self.model, self.options, prompt=self.prompt) as sampler:
            drawing = sampler if isinstance(sampler, SpeculativeSampler) else None
            search = speculation.begin(len(self.prompt), sampler=drawing) if speculation else None
            stream = generate_tokens(
                self.model,
                self.prompt,
                sampler=sampler,
                drafter=speculation.drafter if speculation else None,
                search=search,
                draft_max=speculation.draft_max if speculation else 1,
                max_tokens=self.n_predict if self.n_predict > 0 else None,
                stats=answer.stats,
            )
            try:
                for token in stream:
                    answer.tokens.append(token.id)
                    piece = decoder.feed(token.id)
                    answer.text += piece
                    show(piece)
            except KeyboardInterrupt:
                answer.interrupted = True
        rest = decoder.finish()
        answer.text += rest
        show(rest)
        return answer


def _prompt_text(values: dict[str, Any]) -> str:
    prompt: str | None = values["prompt"]
    if prompt is not None and values["file"] is not None:
        raise click.UsageError("give -p or -f, not both")
    if prompt is not None:
        return prompt
    # a text file ends with a line break that is no part of the prompt; llama-cli drops it too
    if values["file"] is not None:
        return read_text(values["file"]).removesuffix("\n")
    if sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError("no prompt; give -p TEXT, -f FILE, or pipe it in")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise click.ClickException("standard input is not UTF-8 text") from error


def _prompt_tokens(model: Model, text: str, values: dict[str, Any]) -> list[int]:
    from swift_gguf.text import encode, read_template, render_chat

    if not values["raw"]:
        template = values["chat_template"]
        messages = [{"role": "user", "content": text}]
        if values["system_prompt"]:
            messages.insert(0, {"role": "system", "content": values["system_prompt"]})
        text = render_chat(model, messages, template=template and read_template(template))
    tokens = encode(model, text)
    if not tokens:
        raise click.ClickException("the prompt is empty; give some text")
    return tokens


def _show(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _as_json(
    answer: _Answer, speculation: Speculation, plain: _Answer | None, options: SamplingOptions
) -> dict[str, Any]:
    report = {
        "text": answer.text,
        "tokens": answer.tokens,
        "stop_reason": answer.stats.stop_reason,
        "seed": options.seed,
        "timings": answer.stats.timings(),
        "speculation": {
            "enabled": speculation.enabled,
            "why": speculation.why,
            **answer.stats.speculation(),
        },
    }
    if plain is not None:
        report["plain"] = {
            "timings": plain.stats.timings(),
            "same_tokens": plain.tokens == answer.tokens,
        }
    return report


def _verdict(answer: _Answer, plain: _Answer) -> str:
    if plain.tokens == answer.tokens:
        return "the same text"
    if answer.is_drawn:
        return "another draw of the same distribution"
    return "ANOTHER TEXT (a near tie? see the README)"


def _footer(answer: _Answer, speculation: Speculation, plain: _Answer | None) -> str:
    stats = answer.stats
    lines = [
        f"prompt {stats.prompt_n} tokens in {stats.prompt_s:.2f} s, "
        f"answer {stats.predicted_n} tokens ({stats.stop_reason})"
    ]
    if stats.sources:
        lines.append(
            f"speculative {stats.tokens_per_second:8.1f} tok/s   "
            f"accepted {stats.accepted} of {stats.drafted} draft tokens "
            f"({stats.acceptance_rate:.0%}), mean acceptance length "
            f"{stats.mean_acceptance_length:.2f}"
        )
    else:
        lines.append(f"no drafts   {stats.tokens_per_second:8.1f} tok/s   {speculation.why}")
    if plain is not None:
        line = f"plain       {plain.stats.tokens_per_second:8.1f} tok/s   {_verdict(answer, plain)}"
        if plain.stats.tokens_per_second:
            ratio = stats.tokens_per_second / plain.stats.tokens_per_second
            line += f"; the first is {ratio:.2f}x plain, each measured once"
        lines.append(line)
    if stats.sources:
        lines.append(f"draft: {speculation.why}")
    if stats.search_s:
        lines.append(f"search: {stats.search_s:.2f} s of {stats.cycle_s:.2f} s")
    return "\n".join(lines)
