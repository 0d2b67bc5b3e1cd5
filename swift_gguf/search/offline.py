"""Offline tuning: the search runs on windows of texts that the model generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from swift_gguf.engine import generate
from swift_gguf.errors import ContextFullError
from swift_gguf.model import Model
from swift_gguf.sampling import Sampler, SamplingOptions
from swift_gguf.search.drivers import Meter
from swift_gguf.search.optimizer import Searcher
from swift_gguf.search.window import TextWindow

ANSWER_TOKENS = 96
WINDOW = 32
STEPS = 12
"""Steps on a window: one for the incumbent, four for challengers, the others for new candidates."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a tuning."""

    seconds: float
    steps: int
    texts: int
    done: bool
    """True if the search does not expect to find anything better."""


def tune(
    model: Model,
    searcher: Searcher,
    prompts: Sequence[Sequence[int]],
    *,
    seconds: float,
    report: Callable[[Progress], None] = lambda progress: None,
    meter: Meter | None = None,
    answer_tokens: int = ANSWER_TOKENS,
    window: int = WINDOW,
    steps: int = STEPS,
    own_past: bool = False,
) -> Progress:
    """Searches on the model's greedy answers to the prompts, which are used in turn.

    It may be interrupted at any time.  The searcher then has the best sub-network so far.

    prompts: token ids.  Prompts that do not fit the context with an answer are left out.
    seconds: the time limit, which includes the time of the answers.  No step begins after it.
    window: the number of positions in a window.
    steps: the number of steps on a window.  SWIFT's search needs 1.
    own_past: see `search.window`.  SWIFT's search needs True.

    Raises:
        ContextFullError: no prompt fits.
    """
    meter = meter or Meter()
    fitting = [p for p in prompts if 0 < len(p) <= model.n_ctx - answer_tokens - window]
    if not fitting:
        raise ContextFullError(
            f"no prompt fits the context of {model.n_ctx} with an answer of {answer_tokens} "
            "tokens; use a larger --ctx-size"
        )
    start = perf_counter()
    texts = 0

    def progress() -> Progress:
        return Progress(
            seconds=perf_counter() - start, steps=meter.steps, texts=texts, done=searcher.done
        )

    while progress().seconds < seconds and not searcher.done:
        prompt = fitting[texts % len(fitting)]
        _answer(model, prompt, answer_tokens)
        texts += 1
        for piece in _windows(model, len(prompt), window, own_past=own_past):
            for _ in range(steps):
                if progress().seconds >= seconds or searcher.done:
                    return progress()
                began = perf_counter()
                searcher.step(piece)
                meter.seconds += perf_counter() - began
                meter.steps += 1
                report(progress())
    return progress()


def _answer(model: Model, prompt: Sequence[int], n: int) -> None:
    with Sampler(model, SamplingOptions(temperature=0)) as sampler:
        for _ in generate(model, prompt, sampler=sampler, max_tokens=n):
            pass


def _windows(model: Model, prompt_n: int, longest: int, *, own_past: bool) -> Iterator[TextWindow]:
    """Windows of equal length that cover the answer; none if it is too short."""
    length = model.n_past - prompt_n  # positions before a token that the target chose
    n_windows = max(1, round(length / longest))
    size = min(longest, length // n_windows)
    if size < 4:
        return
    for i in range(n_windows):
        yield TextWindow(model, prompt_n - 1 + i * size, size, own_past=own_past)
