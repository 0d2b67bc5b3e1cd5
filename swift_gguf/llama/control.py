"""What `SwiftLlama.swift` is: how answers are sped up, and how that went."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from swift_gguf.errors import SwiftError, UnsupportedModelError
from swift_gguf.llama.generation import Generation
from swift_gguf.model import Model
from swift_gguf.search.drivers import IdleSearch
from swift_gguf.speculation import Speculation, SpeculationOptions
from swift_gguf.stats import Stats


class Swift:
    """Speculation for one `SwiftLlama`.

    model: the llama's model in our hands; None: llama_cpp decodes on its own.
    refusal: why that is so.
    settle: breaks off what the llama is about to do with the model.

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
    def speculation(self) -> str:
        """``auto``, ``off``, or sources by name, joined by commas; may be set, to a list, too."""
        return self.options.mode

    @speculation.setter
    def speculation(self, mode: str | Sequence[str] | SpeculationOptions) -> None:
        self._set(options_of(mode))

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
    def why(self) -> str:
        """The reason for what drafts, or for why nothing does."""
        return self.current.why if self.current else self._refusal

    def idle(self) -> IdleSearch | None:
        """Searches for better drafts while nobody uses the model, until closed; None where there
        is nothing to search.

        Generations pause it by themselves.  It is a context manager, and is closed with the llama.
        """
        self._end_idle()
        self._idle = self.current.idle_search() if self.current else None
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

    def begin(self, prompt_n: int, *, limit: int | None) -> Generation:
        """A generation after a prompt of `prompt_n` tokens, of at most `limit` tokens."""
        assert self.model is not None
        assert self.current is not None
        generation = Generation(self.model, self.current, prompt_n=prompt_n, limit=limit)
        self.stats = generation.stats
        return generation

    def answered(self) -> None:
        """A generation is over."""
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


def options_of(mode: str | Sequence[str] | SpeculationOptions) -> SpeculationOptions:
    """What the user asked for, as options.

    Raises:
        SwiftError: a source that does not exist.
    """
    if isinstance(mode, SpeculationOptions):
        return mode
    return SpeculationOptions(mode=mode if isinstance(mode, str) else ",".join(mode))
