"""`SwiftLlama`: a `llama_cpp.Llama` that speculates.

llama_cpp's own loop runs (`Llama.generate`): it evaluates a token, samples, yields, and so on.
Here, evaluating a token also decodes a tree of guesses after it, and sampling reads the row of the
node that the text has come to; while what is sampled was guessed, there is nothing to evaluate.
Samplers, logits processors and stopping criteria are called as ever, once a token, in order and
with the same text before it, so that the text is the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from inspect import signature
from time import perf_counter
from typing import Any

import numpy as np
from llama_cpp import Llama
from numpy.typing import NDArray

from swift_gguf.llama.adopted import AdoptedLlama
from swift_gguf.llama.adoption import check_grammar, guarded, instead_of
from swift_gguf.llama.completion import Asked, Completion, Criteria, Request
from swift_gguf.llama.generation import Generation
from swift_gguf.llama.scores import Scores
from swift_gguf.model import Model
from swift_gguf.native import library
from swift_gguf.schemas.constraint import Constraint
from swift_gguf.schemas.matching import Vocabulary


class SwiftLlama(AdoptedLlama):
    """`llama_cpp.Llama` with the same answers, sooner.

    speculation: ``auto``; ``off``; sources by name (`speculation.SOURCES`), joined by
        commas; or `SpeculationOptions`.
    n_ctx: as `Llama` has it; None: 4096, or as long as the model was trained for, if that is less.
        Never longer than the model has learned positions.
    flash_attn: as `Llama` has it, which leaves it off: with it texts may be others than without.
        None: where the backend has it.
    n_threads, n_threads_batch: None: one a physical core.
    logits_all: keep logits of every position in `scores`; `logprobs` do not need it.

    A ``grammar`` may be a `Constraint` (`swift_gguf.schemas`), too.

    Everything else is as `Llama` takes it.  `swift` tells what drafts, why, and how it went.

    Raises:
        ModelError: the file is missing, damaged or not a model llama.cpp can run (a ValueError).
    """

    _generation: Generation | None = None
    _request = Request()
    _sampled_at: int | None = None  # output index that the latest token was sampled from

    # -- llama_cpp's loop --------------------------------------------------------------------------

    @instead_of(Llama.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        return self._one_thread.each(self._generate(*args, **kwargs))

    def _generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        model = self._adopted
        if model is None:
            yield from super().generate(*args, **kwargs)
            return
        call = signature(Llama.generate).bind(self, *args, **kwargs)
        self._wrap_criteria(call.arguments)
        prompt = call.arguments["tokens"] = list(call.arguments["tokens"])
        with self._swift.busy():
            if self._request.echo:
                self.reset()  # what the context holds already has no rows any more
            if model.n_passes != self._evaluated:
                self._requires_eval = True  # the logits are not the last token's any more
            generation = self._swift.begin(len(prompt), limit=self._request.max_tokens)
            self._generation = generation
            try:
                yield from self._run(Llama.generate(*call.args, **call.kwargs), generation)
            finally:
                if self._generation is generation:
                    self._settle()
                    self._generation = None
                self._swift.answered()

    def _run(
        self, tokens: Generator[int, Sequence[int] | None, None], generation: Generation
    ) -> Generator[int, Sequence[int] | None, None]:
        """Passes on what llama_cpp yields.

        Whenever a token is out, `n_tokens` counts those before it, as in `Llama`.
        """
        sent = None
        with closing(tokens):
            while True:
                try:
                    token = tokens.send(sent)
                except StopIteration:
                    return
                generation.put_out(token)
                sent = yield token
                if self._generation is not generation:  # two at once get mixed up, as in `Llama`
                    self._settle()
                    self._generation = generation
                if sent is not None:
                    self._settle()  # llama_cpp verifies what was sent
                elif generation.walking:  # the token was guessed, and is decoded already
                    self._append([token])

    def eval(self, tokens: Sequence[int]) -> None:
        """Decodes tokens after the first `n_tokens` of the context; see `Llama.eval`.

        Raises:
            ContextFullError, DecodeError: as `Model.decode` (RuntimeErrors); `n_tokens` counts what
                was decoded.
        """
        model, generation = self._adopted, self._generation
        if model is None:
            super().eval(tokens)
            return
        with self._one_thread.inside(), self._swift.busy():
            self._align(model)
            if generation and generation.started and len(tokens) == 1:
                generation.guess(int(tokens[0]))
                self._append(tokens)
            else:
                start = perf_counter()
                self._evaluate(model, [int(token) for token in tokens])
                if generation:
                    generation.prefilled(len(tokens), perf_counter() - start)
            self._requires_eval = False

    def _evaluate(self, model: Model, tokens: list[int]) -> None:
        """Decodes tokens as they are, in the batches and by the kernels that llama_cpp would."""
        records = self._request.records if self._request.echo else None
        # what is sent to a generation is verified by llama_cpp, which asks for a row of each
        is_sent = self._generation is not None and self._generation.started
        all_rows = self._keeps_all or is_sent or records is not None
        for first in range(0, len(tokens), self.n_batch):
            batch = tokens[first : first + self.n_batch]
            n_rows = len(batch) if all_rows else 1
            model.decode(batch, n_outputs=n_rows, exact=False)
            if self._keeps_all:
                rows = [model.logits(row) for row in range(n_rows)]
                self.scores[self.n_tokens : self.n_tokens + n_rows] = rows
            if records:
                following = tokens[first + 1 : first + n_rows + 1]
                for row, token in enumerate(following):
                    records.add(self.n_tokens + row, model.logits(row), token)
            self._append(batch)
        self._sampled_at = None
        self._evaluated = model.n_passes

    @instead_of(Llama.sample)
    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        model, generation = self._adopted, self._generation
        if model is None or self.n_tokens == 0:
            return int(super().sample(*args, idx=idx, **kwargs))
        start = perf_counter()
        if generation is None:
            with self._swift.busy():
                self._refresh(model)
                return self._sample(model, idx, *args, **kwargs)
        if generation.walking:
            idx = self.n_tokens + generation.row
        token = self._sample(model, idx, *args, **kwargs)
        self._record(token)
        generation.sampled(token, perf_counter() - start)
        return token

    def _sample(self, model: Model, idx: int | None, *args: Any, **kwargs: Any) -> int:
        """idx: n_tokens and output row `idx - n_tokens`; None: the last one."""
        self._sampled_at = model.output_index(-1 if idx is None else idx - self.n_tokens)
        # llama_cpp passes on what is left of idx, which llama.cpp looks up among a batch's tokens
        return int(super().sample(*args, idx=self.n_tokens + self._sampled_at, **kwargs))

    def _refresh(self, model: Model) -> None:
        """Evaluates the last token again if there were passes in between."""
        if model.n_passes != self._evaluated or self._requires_eval:
            self.n_tokens -= 1
            self.eval([self.input_ids[self.n_tokens]])

    @instead_of(Llama._init_sampler)
    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        call = signature(Llama._init_sampler).bind(self, *args, **kwargs)
        grammar = call.arguments.get("grammar")
        if isinstance(grammar, Constraint):
            call.arguments["grammar"] = None
            matcher = self._vocabulary.matcher(grammar)
            return guarded(Llama._init_sampler(*call.args, **call.kwargs), self._n_vocab, matcher)
        check_grammar(self._model.vocab, grammar)
        sampler = super()._init_sampler(*args, **kwargs)
        return sampler if grammar is None else guarded(sampler, self._n_vocab)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        """What tokens stand for, to hold answers to a schema."""
        return Vocabulary.of(self._model.vocab)

    def _settle(self) -> None:
        """Breaks off a walk: afterwards the context holds the text alone."""
        if self._adopted and self._generation and self._generation.walking:
            self._generation.end_walk()
            self.n_tokens = min(self.n_tokens, self._adopted.n_past)

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
        with self._swift.busy():
            if self._generation is None:
                self._refresh(self._adopted)
            return deque([self._latest_logits().tolist()], maxlen=1)

    def _latest_logits(self) -> NDArray[np.float32]:
        """What the latest token was sampled from, or the next one will be."""
        model = self._adopted
        assert model is not None
        index = model.output_index(-1) if self._sampled_at is None else self._sampled_at
        logits: NDArray[np.float32] = model.logits_at(index)
        return logits

    def _record(self, token: int) -> None:
        """Keeps what will be asked about the row that `token` was sampled from."""
        position, records = self.n_tokens - 1, self._request.records
        if self._keeps_all:
            self.scores[position] = self._latest_logits()
        elif records:
            records.add(position, self._latest_logits(), token)

    def _wrap_criteria(self, arguments: dict[str, Any]) -> None:
        criteria = arguments.get("stopping_criteria")
        if criteria is not None and not isinstance(criteria, Criteria):
            arguments["stopping_criteria"] = Criteria(criteria, self._latest_logits)

    # -- answers -----------------------------------------------------------------------------------

    @instead_of(Llama._create_completion)
    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        call = signature(Llama._create_completion).bind(self, *args, **kwargs)
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
        if self._adopted is not None:
            sampling = dict(asked.sampling)
            self._wrap_criteria(sampling)
            asked = replace(asked, sampling=sampling)
        keeps_rows = self._adopted is None or self._keeps_all
        with self._swift.busy():
            completion = Completion(self, asked, keeps_rows=keeps_rows)
            self._request = completion.request
            try:
                if asked.stream:
                    yield from completion.chunks()
                else:
                    yield completion.whole()
            finally:
                self._request = Request()
