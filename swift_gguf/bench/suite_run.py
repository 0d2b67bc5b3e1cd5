"""The run of `swift-gguf bench`: every mode answers every request, one mode after the other.

The order rotates with each request, so that slow periods of the machine affect all modes equally.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swift_gguf import __version__
from swift_gguf.bench.contenders import DEFAULTS, Answer, Contender, opened
from swift_gguf.bench.modes import PLAIN, Mode, sweep
from swift_gguf.bench.subject import machine, subject
from swift_gguf.bench.suite_report import Progress, Report, Result
from swift_gguf.bench.ties import explain, is_bit_invariant
from swift_gguf.engine import generate
from swift_gguf.gguf.identity import fingerprint
from swift_gguf.model import Model
from swift_gguf.sampling import Sampler, SamplingOptions
from swift_gguf.speculation import SpeculationOptions
from swift_gguf.suite import Row
from swift_gguf.text import Message, StreamDecoder, chat_template, encode, render_chat
from swift_gguf.tokens import common_prefix

WARM_UP = "Hello"
WARM_UP_TOKENS = 8
SPARE = 64
"""Extra positions in the context, for a draft and its verification."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure, and how."""

    modes: Sequence[Mode]
    """Must include plain decoding."""
    sampling: SamplingOptions
    """Must have a seed, so that every mode draws the same tokens."""
    n_predict: int = 128
    """Maximum tokens per answer."""
    repeat: int = 1
    """How often to answer each row."""
    oracle: bool = False
    """Also measure the fixed settings of `modes.sweep`."""
    draft_model: Path | None = None
    layer_skip: SpeculationOptions = DEFAULTS
    """Options for modes that use this source."""
    cold: bool = False
    """Every mode begins without a profile."""


def begin(model: Model, rows: Sequence[Row], options: BenchOptions) -> Report:
    """A report without results.  Clears the context."""
    swept = [mode for mode in sweep() if mode not in options.modes] if options.oracle else []
    return Report(
        settings=_settings(model, rows, options),
        modes=[*options.modes, *swept],
        swept=swept,
        machine=machine(),
        subject=subject(model),
        bit_invariant=is_bit_invariant(model),
        units=len(rows) * options.repeat,
    )


def _settings(model: Model, rows: Sequence[Row], options: BenchOptions) -> dict[str, Any]:
    texts = json.dumps([asdict(row) for row in rows])
    sampling = asdict(options.sampling)
    if options.sampling.temperature <= 0:
        del sampling["seed"]  # greedy sampling does not use it
    return {
        "swift_gguf": __version__,
        "model": fingerprint(model.path),
        "rows": hashlib.sha256(texts.encode()).hexdigest()[:16],
        "modes": [mode.name for mode in options.modes],
        "n_predict": options.n_predict,
        "repeat": options.repeat,
        "oracle": options.oracle,
        "draft_model": str(options.draft_model) if options.draft_model else None,
        "layer_skip": str(options.layer_skip),
        "cold": options.cold,
        **sampling,
        **asdict(model.options),
        "n_threads": model.n_threads,
        "cpu": machine().cpu,
    }


def measure(
    model: Model,
    rows: Sequence[Row],
    options: BenchOptions,
    report: Report,
    *,
    progress: Progress,
) -> None:
    """Answers the missing rows of a report.  Adds a row when all modes have answered it.

    Leaves the context empty.

    Raises:
        SwiftError: a mode is not possible with this model.
    """
    if len(report.done) == report.units:
        return
    try:
        _warm_up(model)
        with opened(
            model,
            report.modes,
            options.sampling,
            draft_model=options.draft_model,
            layer_skip=options.layer_skip,
            cold=options.cold,
        ) as contenders:
            for name, contender in contenders.items():
                report.setup_s.setdefault(name, contender.setup_s)
            for unit in range(report.units):
                if unit in report.done:
                    continue
                row = rows[unit % len(rows)]
                results, is_whole = _play(model, contenders, row, unit, options)
                report.results += results
                if not is_whole:
                    report.left_out.add(unit)
                report.why = {name: contender.why for name, contender in contenders.items()}
                report.peak_memory_bytes = _peak_memory(report.peak_memory_bytes)
                progress(report)
    finally:
        model.clear()


def _warm_up(model: Model) -> None:
    """Warms up pages and graphs with plain decoding, so that no mode's first answer is slower."""
    prompt = encode(model, WARM_UP)
    with Sampler(model, SamplingOptions(temperature=0)) as sampler:
        for _ in generate(model, prompt, sampler=sampler, max_tokens=WARM_UP_TOKENS):
            pass
    model.clear()


def _play(
    model: Model,
    contenders: Mapping[str, Contender],
    row: Row,
    unit: int,
    options: BenchOptions,
) -> tuple[list[Result], bool]:
    """The results of a conversation, and True if all of it fits the context.

    Every turn continues with plain decoding's answers.  As in a chat, the earlier turns are already
    in the context of each mode when its time begins.
    """
    results: list[Result] = []
    messages: list[Message] = []
    said: list[int] = []
    for turn, text in enumerate(row.turns):
        messages.append({"role": "user", "content": text})
        prompt = _prompt(model, messages)
        if len(prompt) + options.n_predict + SPARE > model.n_ctx:
            return results, False
        held = prompt[: min(common_prefix(said, prompt), len(prompt) - 1)]
        answers = {}
        for name in _rotated(list(contenders), unit + turn):
            contenders[name].hold(held)
            answers[name] = contenders[name].answer(prompt, max_tokens=options.n_predict)
        plain = answers[PLAIN]
        for name in contenders:
            diverged = answers[name].ids != plain.ids
            is_greedy = options.sampling.temperature <= 0 and not options.sampling.has_penalties
            results.append(
                Result(
                    mode=name,
                    category=row.category,
                    question_id=row.question_id,
                    unit=unit,
                    turn=turn,
                    stats=answers[name].stats,
                    diverged=diverged,
                    near_tie=_is_near_tie(model, prompt, plain, answers[name])
                    if diverged and is_greedy
                    else None,
                )
            )
        said = [*prompt, *plain.ids]
        messages.append({"role": "assistant", "content": _text(model, plain.ids)})
    return results, True


def _is_near_tie(model: Model, prompt: Sequence[int], plain: Answer, other: Answer) -> bool | None:
    if model.rollback_refusal:
        return None
    return explain(model, prompt, plain.ids, other.ids).is_near_tie


def _prompt(model: Model, messages: Sequence[Message]) -> list[int]:
    """The messages in the model's chat template; without one, the texts joined by newlines."""
    if chat_template(model) is not None:
        return encode(model, render_chat(model, messages))
    return encode(model, "\n".join(message["content"] for message in messages))


def _text(model: Model, ids: Sequence[int]) -> str:
    decoder = StreamDecoder(model)
    return "".join(map(decoder.feed, ids)) + decoder.finish()


def _rotated(names: Sequence[str], by: int) -> list[str]:
    first = by % len(names)
    return [*names[first:], *names[:first]]


def _peak_memory(before: int | None) -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    in_bytes = peak if sys.platform == "darwin" else peak * 1024
    return max(before or 0, in_bytes)
