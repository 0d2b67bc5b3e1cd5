"""Statistics of answers as text: the footer, `/stats` and `/show`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from textwrap import wrap

from swift_gguf.engine import TARGET
from swift_gguf.model import Model
from swift_gguf.session import ENOUGH, Answer, Session
from swift_gguf.stats import Stats
from swift_gguf.text import StreamDecoder

N_LINES = 4
"""Maximum number of lines of the footer."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Statistics of the latest answer and of the session."""

    tokens_per_second: float = 0.0
    gain: float | None = None
    """Speed-up over plain decoding, by the measured time of a plain forward pass."""
    plain_ms: float | None = None
    acceptance_rate: float | None = None
    """None if nothing was drafted."""
    mean_acceptance_length: float = 1.0
    sources: tuple[tuple[str, float], ...] = ()
    """(source, share of the answer's tokens); the target first."""
    why: str = ""
    """The sources of drafts, or the reason why there are none."""
    prompt_n: int = 0
    read_n: int = 0
    """Tokens of the prompt that were in the context before the message was sent."""
    prompt_s: float = 0.0
    """Time for the others."""
    n_past: int = 0
    n_ctx: int = 0
    found: str = ""
    """What the idle search has found since the answer."""

    @classmethod
    def of(cls, session: Session, answers: Sequence[Answer], sources: Sequence[str]) -> Figures:
        """The figures of a reply.  Call it only while nothing else uses the model.

        answers: what it consists of: one answer, and one more after every time that the context
            filled up.
        """
        first, answer = answers[0], answers[-1]
        stats, speculation = answer.stats, session.speculation
        return cls(
            tokens_per_second=stats.tokens_per_second,
            gain=answer.gain,
            plain_ms=answer.plain_ms,
            acceptance_rate=stats.acceptance_rate if stats.drafted else None,
            mean_acceptance_length=stats.mean_acceptance_length,
            sources=shares(sources),
            why=speculation.why if speculation else "switched off",
            prompt_n=len(first.prompt),
            read_n=len(first.prompt) - first.stats.prompt_n,
            prompt_s=first.stats.prompt_s,
            n_past=session.model.n_past,
            n_ctx=session.model.n_ctx,
        )


def shares(sources: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """(source, share of the tokens); the target first, the others by share."""
    counts = Counter(sources)
    ordered = sorted(counts.items(), key=lambda item: (item[0] != TARGET, -item[1], item[0]))
    return tuple((source, n / len(sources)) for source, n in ordered)


def footer(figures: Figures, *, width: int) -> list[str]:
    """The footer: at most `N_LINES` lines of at most `width` columns."""
    lines = [""]
    for item in _footer_items(figures):
        joined = f"{lines[-1]} · {item}" if lines[-1] else item
        if len(joined) > width and lines[-1]:
            lines.append(item)
        else:
            lines[-1] = joined
    wrapped = [part for line in lines for part in wrap(line, width)]
    if len(wrapped) > N_LINES:
        wrapped[N_LINES - 1] = _cut(" ".join(wrapped[N_LINES - 1 :]), width)
    return wrapped[:N_LINES]


def _footer_items(figures: Figures) -> Iterator[str]:
    if figures.found:
        yield f"idle search: {figures.found}"
    if figures.tokens_per_second:
        yield f"{figures.tokens_per_second:.1f} tok/s"
    if figures.acceptance_rate is not None:
        if figures.gain is not None and figures.plain_ms is not None:
            yield f"speed-up {figures.gain:.2f}x (a plain pass takes {figures.plain_ms:.1f} ms)"
        yield f"accepted {figures.acceptance_rate:.0%}"
        yield f"{figures.mean_acceptance_length:.2f} tokens per pass"
        yield ", ".join(f"{source} {share:.0%}" for source, share in figures.sources)
    if figures.prompt_n:
        read = f", {figures.read_n} read before Enter" if figures.read_n else ""
        yield f"prompt {figures.prompt_n} tokens{read}"
    if figures.n_ctx:
        yield f"context {figures.n_past}/{figures.n_ctx}"
    if figures.acceptance_rate is None and figures.why:
        yield f"no drafts: {figures.why}"


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"


def details(
    answer: Answer, figures: Figures, *, n_answers: int, total: Stats, idle: str
) -> list[str]:
    """The lines of `/stats`.

    n_answers, total: the session's answers, and their statistics added up.
    idle: the state of the idle search.
    """
    stats = answer.stats
    lines = [
        f"prompt     {figures.prompt_n} tokens, {figures.read_n} read before Enter, "
        f"{figures.prompt_n - figures.read_n} in {figures.prompt_s:.2f} s",
        f"answer     {stats.predicted_n} tokens ({stats.stop_reason}), "
        f"{stats.tokens_per_second:.1f} tok/s, seed {answer.options.seed}",
    ]
    if stats.drafted and figures.gain is not None and figures.plain_ms is not None:
        lines.append(
            f"speed-up   {figures.gain:.2f}x; a plain pass takes "
            f"{figures.plain_ms:.1f} ms, {_how(stats)}"
        )
    if stats.drafted:
        lines.append(
            f"drafts     {stats.accepted} of {stats.drafted} tokens accepted "
            f"({stats.acceptance_rate:.0%}), {stats.mean_acceptance_length:.2f} tokens per pass"
        )
    for name, source in stats.sources.items():
        lines.append(
            f"  {name:<12} {source.accepted} of {source.drafted} in {source.drafts} drafts"
        )
    other = stats.sample_s + stats.overhead_s
    lines += [
        f"time       draft {stats.draft_s:.2f} s, verify {stats.verify_s:.2f} s, "
        f"search {stats.search_s:.2f} s, other {other:.2f} s",
        f"source     {figures.why}",
        f"idle       {idle}",
        f"context    {figures.n_past} of {figures.n_ctx} tokens",
        f"session    {n_answers} answers, {total.predicted_n} tokens, {total.accepted} of "
        f"{total.drafted} draft tokens accepted, {total.prompt_s + total.cycle_s:.1f} s",
    ]
    return lines


def _how(stats: Stats) -> str:
    if stats.plain_cycles >= ENOUGH:
        return f"measured {stats.plain_cycles} times in this answer"
    return "measured earlier and updated by every pass since"


def runs(model: Model, tokens: Sequence[int], sources: Sequence[str]) -> list[tuple[str, str]]:
    """(source, text) for each run of tokens from the same source."""
    decoder = StreamDecoder(model)
    pieces = [(source, decoder.feed(token)) for token, source in zip(tokens, sources, strict=True)]
    if pieces:
        pieces[-1] = (pieces[-1][0], pieces[-1][1] + decoder.finish())
    grouped = groupby(pieces, key=lambda item: item[0])
    found = ((source, "".join(text for _, text in group)) for source, group in grouped)
    return [(source, text) for source, text in found if text]
