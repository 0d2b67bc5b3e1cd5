"""`Llama`: a `llama_cpp.Llama` that speculates.

Tokens come from `engine.generate`, sampled by llama_cpp's own sampler chain.  Samplers, logits
processors and stopping criteria are asked once a token, in order and with the same text before it
as in llama_cpp, so the text is the same.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from time import perf_counter
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from swift_gguf.engine import ModelUsedError, Token
from swift_gguf.errors import ContextFullError, UnsupportedModelError
from swift_gguf.llama.adopted import AdoptedLlama
from swift_gguf.llama.adoption import check_grammar, guarded, instead_of
from swift_gguf.llama.completion import Asked, Completion, Request
from swift_gguf.llama.scores import Scores
from swift_gguf.model import Model
from swift_gguf.native import library
from swift_gguf.schemas.constraint import Constraint
from swift_gguf.schemas.matching import Vocabulary
from swift_gguf.stats import Stats
from swift_gguf.tokens import common_prefix

_OF_SAMPLERS = signature(llama_cpp.Llama._init_sampler).parameters.keys() - {"self"}


class Llama(AdoptedLlama):
    """`llama_cpp.Llama` with the same answers, sooner, but for rounding.

    speculation: ``auto``: where it pays; ``off``; or sources of drafts by name
        (`speculation.SOURCES`), joined by commas or in a list.
    draft_model_path: a smaller model of the same family that drafts, too.
    sidecar: draft weights of `swift-gguf prepare`.  None: picked up automatically beside the model;
        ``none``: without.
    n_ctx: as in llama_cpp; None: 4096, or as long as the model was trained for, if that is less.
        Never longer than the model has learned positions.
    flash_attn: None: where the backend has it, as llama.cpp's programs do.  llama_cpp has it off,
        which is slower and rounds differently.
    n_threads, n_threads_batch: None: one a physical core.
    logits_all: keep the logits of every position in `scores`; `logprobs` do not need it.

    A ``grammar`` may also be a `Constraint` (`swift_gguf.schemas`).  Everything else is as in
    llama_cpp.  `speculation` says what drafts, why, and how it went.

    Raises:
        ModelError: the file is missing, damaged or not a model llama.cpp can run (a ValueError).
        SidecarError: the sidecar that was named cannot be used.
    """

    _request = Request()
    _rows: _Rows | None = None
    """Of the generation whose stream is open: what `_settle` closes."""

    # -- generating --------------------------------------------------------------------------------

    @instead_of(llama_cpp.Llama.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        return self._one_thread.each(self._generate(*args, **kwargs))

    def _generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        model = self._adopted
        if model is None:
            yield from super().generate(*args, **kwargs)
            return
        call = signature(llama_cpp.Llama.generate).bind(self, *args, **kwargs)
        call.apply_defaults()
        asked, limit = call.arguments, self._request.max_tokens
        self._mirostat_mu = ctypes.c_float(2.0 * asked["mirostat_tau"])
        sampler = self._init_sampler(**{name: asked[name] for name in _OF_SAMPLERS})
        before, self._sampler = self._sampler, sampler
        self._free(before)
        criteria, stats = asked["stopping_criteria"], Stats()
        with self.speculation.busy(), self._using(sampler):
            self.speculation.stats = stats
            text = self._read(model, [int(token) for token in asked["tokens"]], stats, asked)
            rows, n_prompt = _Rows(self, sampler, text), len(text)
            try:
                while True:
                    token = self._next(model, rows, n_prompt, limit, stats)
                    if criteria is not None and criteria(self._input_ids, self._latest_logits()):
                        return
                    yield token  # what is sent is a draft to llama_cpp, which changes no text
            finally:
                rows.close()
                self.speculation.answered()

    def _read(
        self, model: Model, tokens: list[int], stats: Stats, asked: Mapping[str, Any]
    ) -> list[int]:
        """Evaluates what the context lacks of a prompt.  Returns the whole text: without ``reset``,
        the prompt goes on with what the context holds."""
        start = perf_counter()
        if self._request.echo:
            self.reset()  # log-probabilities of the prompt need its rows
        held: list[int] = self._input_ids.tolist()
        text = tokens if asked["reset"] else held + tokens
        n = common_prefix(held, text)
        if n == len(text) and not (self._is_fresh(model) and n == self.n_tokens):
            n = max(n - 1, 0)  # the last token again, for its logits
        if n < self.n_tokens:
            try:
                model.rollback(min(n, model.n_past))
                self.n_tokens = n
            except UnsupportedModelError:
                n = 0
        if n == 0:
            self.reset()
        if n < len(text):
            self.eval(text[n:])
        stats.prompt_n += len(text) - n
        stats.prompt_s += perf_counter() - start
        return list(text)

    def _next(
        self, model: Model, rows: _Rows, n_prompt: int, limit: int | None, stats: Stats
    ) -> int:
        """Samples a token, an end of generation included.

        A stream ends early where somebody else used the model, and at an end of generation or a
        limit, beyond which llama_cpp goes on.  Then a new one goes on with the text so far.
        """
        n = len(rows.text)
        while len(rows.text) == n:
            if rows.stream is None:
                self.input_ids[: n - 1], self.n_tokens = rows.text[: n - 1], n - 1
                left = None if limit is None else max(limit - stats.predicted_n, 1)
                rows.stream = self.speculation.stream(rows, n_prompt, left, stats)
                self._rows = rows
            try:
                if next(rows.stream, None) is None:
                    rows.stream = None
            except ModelUsedError:
                rows.stream = None
                stats.predicted_n += not model.is_eog(rows.text[-1])
            if rows.stream is None and stats.stop_reason == "context":
                raise ContextFullError(f"the context of {model.n_ctx} tokens is full")
        if stats.predicted_n == limit and stats.stop_reason != "eos":
            stats.stop_reason = "length"
        return rows.text[-1]

    def _settle(self) -> None:
        """Afterwards the context holds the text alone; a generation under way goes on later."""
        if self._rows:
            self._rows.close()
            self._rows = None

    def eval(self, tokens: Sequence[int]) -> None:
        """Decodes tokens after the first `n_tokens` of the context; see `Llama.eval`.

        Raises:
            ContextFullError, DecodeError: as `Model.decode` (RuntimeErrors); `n_tokens` counts what
                was decoded.
        """
        model = self._adopted
        if model is None:
            super().eval(tokens)
            return
        with self._one_thread.inside(), self.speculation.busy():
            self._align(model)
            self._evaluate(model, [int(token) for token in tokens])
            self._requires_eval = False

    def _evaluate(self, model: Model, tokens: list[int]) -> None:
        """Decodes tokens in the batches that llama_cpp would."""
        records = self._request.records if self._request.echo else None
        for first in range(0, len(tokens), self.n_batch):
            batch = tokens[first : first + self.n_batch]
            n_rows = len(batch) if self._keeps_all or records is not None else 1
            model.decode(batch, n_outputs=n_rows)
            if self._keeps_all:
                rows = [model.logits(row) for row in range(n_rows)]
                self.scores[self.n_tokens : self.n_tokens + n_rows] = rows
            if records:
                following = tokens[first + 1 : first + n_rows + 1]
                for row, token in enumerate(following):
                    records.add(self.n_tokens + row, model.logits(row), token)
            end = self.n_tokens + len(batch)
            self.input_ids[self.n_tokens : end], self.n_tokens = batch, end
        self._latest = (model.n_passes, model.output_index(-1))

    def read_ahead(self, tokens: Sequence[int], *, most: int) -> int:
        """Decodes at most `most` of those tokens that the context lacks, in place of what does not
        belong to them.  Returns how many; 0: it has all of them, or the model cannot take back
        what it has.

        For idle time: the caller has the model, and no generation is under way.

        Raises:
            StoppedError: the stop flag is up; the context holds what was decoded before.
        """
        model = self._adopted
        if model is None or model.rollback_refusal or len(tokens) >= self.n_ctx():
            return 0
        held = self._input_ids.tolist()
        n = min(common_prefix(held, tokens), model.n_past)
        if n == len(tokens):
            return 0
        self.n_tokens = n
        self._align(model)
        batch = [int(token) for token in tokens[n : n + most]]
        self._evaluate(model, batch)
        self._requires_eval = False
        return len(batch)

    # -- sampling ----------------------------------------------------------------------------------

    @instead_of(llama_cpp.Llama.sample)
    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        model = self._adopted
        if model is None or self.n_tokens == 0:
            return int(super().sample(*args, idx=idx, **kwargs))
        with self._one_thread.inside(), self.speculation.busy():
            self._refresh(model)
            index = model.output_index(-1 if idx is None else idx - self.n_tokens)
            self._latest = (model.n_passes, index)
            # the sampler of the latest generation stays in use, as in llama_cpp
            sampler = self._sampler or self._init_sampler(*args, **kwargs)
            with self._using(sampler):
                return int(sampler.sample(self._ctx, index))

    @instead_of(llama_cpp.Llama._init_sampler)
    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        call = signature(llama_cpp.Llama._init_sampler).bind(self, *args, **kwargs)
        grammar = call.arguments.get("grammar")
        if isinstance(grammar, Constraint):
            call.arguments["grammar"] = None
            matcher = self._vocabulary.matcher(grammar)
            sampler = llama_cpp.Llama._init_sampler(*call.args, **call.kwargs)
            return guarded(sampler, self._n_vocab, matcher)
        check_grammar(self._model.vocab, grammar)
        sampler = super()._init_sampler(*args, **kwargs)
        return sampler if grammar is None else guarded(sampler, self._n_vocab)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        """What tokens stand for, to hold answers to a schema."""
        return Vocabulary.of(self._model.vocab)

    @contextmanager
    def _using(self, sampler: Any) -> Iterator[None]:
        """Keeps a sampler inside, and frees it afterwards unless it is needed elsewhere.

        llama_cpp leaves samplers to the garbage collector.  Where that comes while Python's stack
        is nearly full (while JSON is read that nests a thousand deep), `LlamaSampler.__del__`
        fails, and the native sampler is lost.
        """
        self._in_use.append(sampler)
        try:
            yield
        finally:
            self._in_use.remove(sampler)
            self._free(sampler)

    def _free(self, sampler: Any) -> None:
        if sampler not in (None, self._sampler, *self._in_use):
            sampler.close()

    # -- logits ------------------------------------------------------------------------------------

    @property
    def _scores(self) -> Any:
        if self._adopted is None or self._keeps_all:
            return super()._scores
        return Scores(self.n_tokens, self._n_vocab, self._latest_logits)

    @property
    def eval_logits(self) -> deque[list[float]]:
        """Logits of the latest token, or of all with logits_all."""
        if self._adopted is None or self._keeps_all:
            logits: deque[list[float]] = super().eval_logits
            return logits
        if self.n_tokens == 0:
            return deque(maxlen=1)
        with self.speculation.busy():
            return deque([self._latest_logits().tolist()], maxlen=1)

    def _latest_logits(self) -> NDArray[np.float32]:
        """What the latest token was sampled from, or the next one will be."""
        model = self._adopted
        assert model is not None
        if self._latest[0] != model.n_passes:  # others came in between
            with self.speculation.busy():
                self._refresh(model)
        logits: NDArray[np.float32] = model.logits_at(self._latest[1])
        return logits

    def _is_fresh(self, model: Model) -> bool:
        """Is the latest row that of the last token?"""
        return model.is_fresh and model.n_past == self.n_tokens

    def _refresh(self, model: Model) -> None:
        """Evaluates the last token again if there is no row of it."""
        if self._is_fresh(model):
            self._latest = (model.n_passes, model.output_index(-1))
        else:
            self.n_tokens -= 1
            self.eval([self.input_ids[self.n_tokens]])

    # -- answers -----------------------------------------------------------------------------------

    @instead_of(llama_cpp.Llama._create_completion)
    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        call = signature(llama_cpp.Llama._create_completion).bind(self, *args, **kwargs)
        call.apply_defaults()
        arguments = dict(call.arguments)
        del arguments["self"]
        if (limit := arguments["max_tokens"]) is not None and limit <= 0:
            arguments["max_tokens"] = None
        yield from self._complete(Asked.of(arguments))

    def piece(self, token: int) -> bytes:
        """What a token stands for in an answer; control tokens, nothing."""
        return library().token_bytes(self._model.vocab, token, special=False)

    def _complete(self, asked: Asked) -> Iterator[Any]:
        """Yields the response, or, for a stream, chunk after chunk."""
        keeps_rows = self._adopted is None or self._keeps_all
        with self.speculation.busy():
            completion = Completion(self, asked, keeps_rows=keeps_rows)
            self._request = completion.request
            try:
                if asked.stream:
                    yield from completion.chunks()
                else:
                    yield completion.whole()
            finally:
                self._request = Request()


class _Rows:
    """llama_cpp's sampler, asked by the engine for one row after another.

    text: the prompt; what is sampled is added.
    """

    def __init__(self, llama: Llama, sampler: Any, text: list[int]) -> None:
        self.text = text
        self.stream: Generator[Token, None, None] | None = None
        """None: the next token needs a new one."""
        self._llama, self._sampler = llama, sampler
        self._model: Model | None = None  # while a token is sampled
        self._is_used = False

    def sample(self, model: Model, row: int) -> int:
        """See `engine.SamplesRows`.

        Raises:
            ModelUsedError: a logits processor has used the llama; the token is in `text`.
        """
        llama, position, index = self._llama, len(self.text) - 1, model.output_index(row)
        llama.input_ids[position], llama.n_tokens = self.text[-1], position + 1
        llama._latest = (model.n_passes, index)
        records = llama._request.records
        kept = model.logits_at(index) if llama._keeps_all or records else None
        self._model, self._is_used = model, False
        try:
            token = int(self._sampler.sample(llama._ctx, index))
        finally:
            self._model = None
        if llama._keeps_all:
            llama.scores[position] = kept
        elif records and kept is not None:
            records.add(position, kept, token)
        self.text.append(token)
        if self._is_used:
            llama.n_tokens = position + 1
            raise ModelUsedError
        return token

    def close(self) -> None:
        """Ends the stream; the context holds what plain decoding would have decoded.

        A logits processor may ask the very llama that it is asked by.  The stream cannot be closed
        then: it is waiting for the token.  The tree goes, the processor finds the text as in
        llama_cpp, and the stream ends when it has its token.
        """
        if self._model is not None:
            self._is_used = True
            try:
                self._model.rollback(self._model.n_past)
            except UnsupportedModelError:
                self._model.clear()
        elif self.stream is not None:
            self.stream.close()
            self.stream = None
