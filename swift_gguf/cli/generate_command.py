"""`swift-gguf generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from swift_gguf.cli.help import examples, model_argument
from swift_gguf.cli.options import (
    STANDARD_INPUT,
    answer_flags,
    constraint,
    load_model,
    model_flags,
    read_text,
    sampling_flags,
    sampling_options,
    schema_flags,
    speculation_flags,
    speculation_options,
    template_variables,
)

if TYPE_CHECKING:
    from swift_gguf.model import Model
    from swift_gguf.session import Answer, Session
    from swift_gguf.speculation import Speculation

LITTLE = 1.1
"""Speed-up over plain decoding.  Below it, --compare explains what limits the gain."""


@click.command(
    epilog=examples(
        'swift-gguf generate smollm2-135m -p "Why is the sky blue?"',
        "swift-gguf generate model.gguf -f prompt.txt -n 256 --temp 0 --compare",
        "git diff | swift-gguf generate model.gguf -sys 'Write a commit message.'",
        "swift-gguf generate model.gguf -p 'Name a river.' -jf river.schema.json",
        "swift-gguf generate model.gguf --raw -p 'Once upon a time' --json | jq .timings",
    )
)
@model_argument
@click.option("-p", "--prompt", help="The prompt.  [default: standard input]")
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path),
    help="Read the prompt from a file; -: from standard input.",
)
@answer_flags
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without a chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("--compare", is_flag=True, help="Decode again without drafts, and show both speeds.")
@speculation_flags
@sampling_flags
@schema_flags
@model_flags
def generate(model: str, as_json: bool, compare: bool, **values: Any) -> None:
    """Answer one prompt.  The answer goes to standard output, the timings to standard error."""
    from swift_gguf.session import Session
    from swift_gguf.speculation import Speculation

    text = _prompt_text(values)
    speculation_wanted = speculation_options(values)
    options = replace(sampling_options(values).with_seed(), constraint=constraint(values))
    variables = template_variables(values)
    with ExitStack() as stack:
        loaded = stack.enter_context(load_model(model, values))
        prompt = _prompt_tokens(loaded, text, values, variables)
        speculation = Speculation(loaded, speculation_wanted)
        session = stack.enter_context(closing(Session(loaded, speculation)))
        n_predict = values["n_predict"]
        limit = n_predict if n_predict >= 0 else None

        def answer_with(session: Session, show: Callable[[str], None]) -> Answer:
            return _run(session.answer(prompt, options, max_tokens=limit), show)

        answer = answer_with(session, (lambda text: None) if as_json else _show)
        session.save()
        if not as_json:
            click.echo()
        plain, interrupted = None, answer.interrupted
        if compare and speculation.drafter and not interrupted:
            loaded.clear()
            plain = answer_with(Session(loaded), lambda text: None)
            if plain.interrupted:
                plain, interrupted = None, True
        if as_json:
            click.echo(json.dumps(_as_json(answer, speculation, plain), ensure_ascii=False))
        else:
            click.echo("\n" + _footer(answer, speculation, plain), err=True)
    if interrupted:
        raise KeyboardInterrupt


def _run(answer: Answer, show: Callable[[str], None]) -> Answer:
    from swift_gguf.session import stopped_by_ctrl_c

    with stopped_by_ctrl_c(answer):
        for piece in answer:
            show(piece.text)
    show(answer.finish())
    return answer


def _prompt_text(values: dict[str, Any]) -> str:
    prompt: str | None = values["prompt"]
    if prompt is not None and values["file"] is not None:
        raise click.UsageError("give -p or -f, not both")
    if prompt is not None:
        return prompt
    file: Path | None = values["file"]
    if file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError("no prompt; give -p TEXT, -f FILE, or pipe it in")
        file = Path("-")
    from swift_gguf.text import MOST_BYTES, splittable

    # a text file's last line break is not part of the prompt; llama-cli drops it too
    text = read_text(file, limit=MOST_BYTES).removesuffix("\n")
    return splittable(text, STANDARD_INPUT if str(file) == "-" else str(file))


def _prompt_tokens(
    model: Model, text: str, values: dict[str, Any], variables: dict[str, Any]
) -> list[int]:
    from swift_gguf.templates import Prompting
    from swift_gguf.text import encode, read_template, render_chat

    if not values["raw"]:
        template = values["chat_template"]
        messages = [{"role": "user", "content": text}]
        if values["system_prompt"]:
            messages.insert(0, {"role": "system", "content": values["system_prompt"]})
        text = render_chat(
            model,
            messages,
            template=template and read_template(template),
            prompting=Prompting(variables=variables),
        )
    tokens = encode(model, text)
    if not tokens:
        raise click.ClickException("the prompt is empty; give some text")
    return tokens


def _show(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _as_json(answer: Answer, speculation: Speculation, plain: Answer | None) -> dict[str, Any]:
    report = {
        "text": answer.text,
        "tokens": answer.tokens,
        "stop_reason": answer.stats.stop_reason,
        "seed": answer.options.seed,
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


def _verdict(answer: Answer, plain: Answer, *, is_drawn: bool) -> str:
    if plain.tokens == answer.tokens:
        return "the same text"
    if is_drawn:  # by speculative sampling
        return "another sample from the same distribution"
    return "ANOTHER TEXT (perhaps a near tie; see the README)"


def _footer(answer: Answer, speculation: Speculation, plain: Answer | None) -> str:
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
        lines += _comparison(answer, plain, speculation)
    if stats.sources:
        lines.append(f"draft: {speculation.why}")
    if stats.search_s:
        lines.append(f"search: {stats.search_s:.2f} s of {stats.cycle_s:.2f} s")
    return "\n".join(lines)


def _comparison(answer: Answer, plain: Answer, speculation: Speculation) -> Iterator[str]:
    speed = plain.stats.tokens_per_second
    verdict = _verdict(answer, plain, is_drawn=speculation.options.sampled)
    line = f"plain       {speed:8.1f} tok/s   {verdict}"
    if not speed:
        yield line
        return
    ratio = answer.stats.tokens_per_second / speed
    yield f"{line}; speed-up {ratio:.2f}x, each measured once"
    share = speculation.row_share
    if ratio < LITTLE and share is not None:
        yield f"little to gain here: verifying one more token costs {share:.0%} of a forward pass"
