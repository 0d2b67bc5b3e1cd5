"""`Llama.speculation`: what drafts for a llama, why, and how it went."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from swift_gguf.engine import SamplesRows, Token, generate
from swift_gguf.errors import SwiftError, UnsupportedModelError
from swift_gguf.model import Model
from swift_gguf.search.drivers import IdleSearch
from swift_gguf.speculation import Speculation, SpeculationOptions
from swift_gguf.stats import Stats


class Rows(SamplesRows, Protocol):
    """Samples, and adds what it sampled to the text."""

    text: list[int]


class LlamaSpeculation:
    """Speculation for one `Llama`.

    model: the llama's model in our hands; None: llama_cpp decodes on its own.
    refusal: why that is so.
    settle: closes the stream that is open, so that the context holds the text alone.

    Raises:
        UnsupportedModelError: drafts are asked for by name, and there can be none.
    """

    def __init__(
        self,
        options: SpeculationOptions,
        *,
        model: Model | None = None,
        refusal: str = "",
        settle: Callable[[], Callable[[], None] | None] = lambda: None,
    ) -> None:
        self.stats = Stats()
        """Of the latest generation."""
        self.model = model
        self.current: Speculation | None = None
        """What drafts, and what it learns."""
        self.options = options
        self._refusal = refusal
        self._settle = settle
        self._idle: IdleSearch | None = None
        self._closed = False
        self._set(options)

    @property
    def mode(self) -> str:
        """``auto``, ``off``, or sources by name, joined by commas; may be set, to a list, too."""
        return self.options.mode

    @mode.setter
    def mode(self, mode: str | Sequence[str]) -> None:
        self._set(replace(self.options, mode=_joined(mode)))

    def _set(self, options: SpeculationOptions) -> None:
        if self.model is None:
            if options.mode not in ("auto", "off"):
                raise UnsupportedModelError(f"no speculation: {self._refusal}")
            self.options = options
            return
        self._end_idle()
        with self.busy():
            fresh = Speculation(self.model, options)
        before, self.current, self.options = self.current, fresh, options
        if before:
            before.retire()

    @property
    def enabled(self) -> bool:
        """Are drafts made, or where that depends, were there some lately?"""
        return self.current is not None and self.current.enabled

    @property
    def reason(self) -> str:
        """Why this drafts, or why nothing does."""
        return self.current.why if self.current else self._refusal

    def idle(self, first: Callable[[], bool] | None = None) -> IdleSearch | None:
        """Measures and searches for better drafts while nobody uses the model, until closed; None
        where there is nothing to do.

        Generations pause it by themselves.  It is a context manager, and is closed with the llama.

        first: more urgent work, done in the thread; False: there is none.
        """
        self._end_idle()
        self._idle = self.current.idle_search(first=first) if self.current else None
        return self._idle

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The model is the caller's inside, and its context holds the text alone.

        Raises:
            SwiftError: it is closed.
        """
        if self._closed:
            raise SwiftError("this llama is closed; make another one")
        with self._idle.paused() if self._idle else nullcontext():
            if settle := self._settle():
                settle()
            yield

    def save(self) -> None:
        """Keeps what was learned in the model's profile; happens now and then, and at the end."""
        if self.current:
            with self.busy():
                self.current.save()

    def stream(
        self, rows: Rows, n_prompt: int, max_tokens: int | None, stats: Stats
    ) -> Generator[Token, None, None]:
        """`engine.generate`, from the text so far on.

        rows: the text, and what samples.
        n_prompt: tokens of it that are the prompt's.

        Raises:
            SwiftError: the llama is closed.
        """
        with self.busy():
            assert self.model is not None
            assert self.current is not None
            return generate(
                self.model,
                list(rows.text),
                sampler=rows,
                drafter=self.current.drafter,
                search=self.current.begin(n_prompt),
                draft_max=self.current.draft_max,
                max_tokens=max_tokens,
                stats=stats,
            )

    def answered(self) -> None:
        """A generation is over."""
        if self.current:
            self.current.end()
        if not self._closed and self.current and self.current.is_save_due:
            self.save()

    def close(self) -> None:
        """Keeps what was learned, and gives the model back; safe to call twice."""
        self._end_idle()
        if not self._closed and (settle := self._settle()):
            settle()  # whoever comes back to a stream must not reach for the model
        self._closed = True
        before, self.current = self.current, None
        if before:
            before.retire()
        if self.model:
            self.model.close()

    def _end_idle(self) -> None:
        idle, self._idle = self._idle, None
        if idle:
            idle.end()


def options_of(
    mode: str | Sequence[str] | SpeculationOptions, draft_model: str | os.PathLike[str] | None
) -> SpeculationOptions:
    """What the user asked for, as options; tests and the server give options themselves.

    Raises:
        SwiftError: a source that does not exist, or one that lacks what it needs.
    """
    path = None if draft_model is None else Path(draft_model)
    if isinstance(mode, SpeculationOptions):
        return replace(mode, draft_model=path or mode.draft_model)
    return SpeculationOptions(mode=_joined(mode), draft_model=path)


def _joined(mode: str | Sequence[str]) -> str:
    return mode if isinstance(mode, str) else ",".join(mode)
