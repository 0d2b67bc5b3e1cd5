"""Texts to measure on: a suite's prompts, spread over its categories, and greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from swift_gguf.bench.suite_run import SPARE
from swift_gguf.bench.suites import pick
from swift_gguf.engine import generate
from swift_gguf.errors import SuiteError
from swift_gguf.model import Model
from swift_gguf.sampling import Sampler, SamplingOptions
from swift_gguf.search.window import TextWindow
from swift_gguf.speculation import Speculation
from swift_gguf.stats import Stats
from swift_gguf.suite import read_suite
from swift_gguf.text import chat_template, encode, render_chat

Progress = Callable[[str], None]
"""Called with a line of text for each event."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The first turn of a suite's row, tokenized."""

    category: str
    question_id: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A prompt and the target's greedy answer, without an end-of-generation token."""

    prompt: Prompt
    answer: tuple[int, ...]

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt.tokens, *self.answer]


def context_size(longest: int, tokens: int) -> int:
    """The context to load a model with for prompts of at most `longest` and answers of `tokens`."""
    return longest + tokens + SPARE


def prompts(
    model: Model,
    suite: Path,
    n: int,
    *,
    longest: int,
    seed: int,
    categories: Collection[str] | None = None,
) -> list[Prompt]:
    """n prompts of a suite in Spec-Bench's form, in the model's chat template if it has one.

    longest: prompts of more tokens are left out.
    categories: None: all.

    Raises:
        SuiteError: the file is no suite, or too few of its prompts are that short.
    """
    rows = [row for row in read_suite(suite) if not categories or row.category in categories]
    tokens = {row: _encode(model, row.turns[0]) for row in rows}
    fitting = [row for row, ids in tokens.items() if 0 < len(ids) <= longest]
    if len(fitting) < n:
        raise SuiteError(
            f"{suite} has {len(fitting)} prompts of at most {longest} tokens; "
            "ask for fewer, or for longer ones with --max-prompt"
        )
    return [
        Prompt(category=row.category, question_id=row.question_id, tokens=tuple(tokens[row]))
        for row in pick(fitting, n, seed=seed)
    ]


def _encode(model: Model, text: str) -> list[int]:
    if chat_template(model) is not None:
        text = render_chat(model, [{"role": "user", "content": text}])
    return encode(model, text)


def answer(model: Model, prompt: Prompt, n: int) -> Document:
    """The greedy answer of at most n tokens, decoded plainly."""
    _, ids = decode(model, prompt, None, n)
    return Document(prompt=prompt, answer=ids)


def hold(model: Model, tokens: Sequence[int]) -> None:
    """Makes these the tokens of the context, decoded by the whole model."""
    model.clear()
    model.decode(tokens)


def windows(model: Model, document: Document, size: int, *, own_past: bool) -> list[TextWindow]:
    """The answer in pieces of `size` positions, the last one shorter; the model holds the document.

    own_past: see `swift_gguf.search.window`.
    """
    first, end = len(document.prompt.tokens) - 1, len(document.tokens) - 1
    return [
        TextWindow(model, start, min(size, end - start), own_past=own_past)
        for start in range(first, end, size)
    ]


def decode(
    model: Model, prompt: Prompt, speculation: Speculation | None, tokens: int
) -> tuple[Stats, tuple[int, ...]]:
    """A greedy answer: what happened, and its ids."""
    stats = Stats()
    with Sampler(model, SamplingOptions(temperature=0, seed=0)) as sampler:
        answer = generate(
            model,
            prompt.tokens,
            sampler=sampler,
            drafter=speculation.drafter if speculation else None,
            search=speculation.begin(len(prompt.tokens)) if speculation else None,
            draft_max=speculation.draft_max if speculation else 1,
            max_tokens=tokens,
            stats=stats,
        )
        return stats, tuple(token.id for token in answer)
