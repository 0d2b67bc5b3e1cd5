"""`SwiftLlama`: a `llama_cpp.Llama` that speculates.

llama_cpp's own loop runs (`Llama.generate`): it evaluates a token, samples, yields, and so on.
Here, evaluating a token also decodes a tree of guesses after it, and sampling reads the row of the
node that the text has come to; while what is sampled was guessed, there is nothing to evaluate.
Samplers, logits processors and stopping criteria are called as ever, once a token, in order and
with the same text before it, so that the text is the same.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import wraps
from inspect import signature
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swift_gguf import gguf_check
from swift_gguf.cells import N_SEQUENCES
from swift_gguf.llama.adoption import (
    AUTO,
    adopt,
    check_grammar,
    context_length,
    guarded,
    our_errors,
    refusal,
)
from swift_gguf.llama.control import Swift, options_of
from swift_gguf.llama.generation import Generation
from swift_gguf.loading import fit_context, padded
from swift_gguf.model import Model
from swift_gguf.native import library
from swift_gguf.speculation import SpeculationOptions
from swift_gguf.threads import default_threads

library()  # llama_cpp loads ours at its first import, which is the next line
import llama_cpp  # noqa: E402
from llama_cpp import Llama  # noqa: E402

from swift_gguf.llama.chat_format import formats  # noqa: E402
from swift_gguf.llama.completion import Criteria, Request, with_globals  # noqa: E402
from swift_gguf.llama.scores import LogProbs, Scores, without_scores  # noqa: E402


class SwiftLlama(Llama):  # type: ignore[misc]
    """`llama_cpp.Llama` with the same answers, sooner.

    speculation: ``auto``; ``off``; sources by name (`swift_gguf.speculation.SOURCES`), joined by
        commas; or `SpeculationOptions`.
    flash_attn: None: where the backend has it.  Off, verified rows differ from plainly decoded ones
        by rounding on CPUs.
    n_threads, n_threads_batch: None: one a physical core.
    logits_all: keep logits of every position in `scores`; `logprobs` do not need it.

    Everything else is as `Llama` takes it.  `swift` tells what drafts, why, and how it went.

    Raises:
        ModelError: the file is missing, damaged or not a model llama.cpp can run (a ValueError).
    """

    n_tokens: int
    input_ids: NDArray[np.intc]

    def __init__(
        self,
        model_path: str,
        *,
        speculation: str | Sequence[str] | SpeculationOptions = "auto",
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        logits_all: bool = False,
        flash_attn: bool | None = None,
        verbose: bool = True,
        **options: Any,
    ) -> None:
        self._stack = ExitStack()  # what closes it must be there if anything below fails
        self._adopted: Model | None = None
        self._generation: Generation | None = None
        self._request = Request()
        self._flash_attn, self._keeps_all, self._options = flash_attn, logits_all, options
        wanted = options_of(speculation)
        path = os.fspath(model_path)
        if not options.get("vocab_only"):
            gguf_check.check(path, tokenizer=False)
            n_ctx = n_ctx or context_length(path)
        library().show_log(verbose)
        with our_errors(path):
            _init(
                self,
                path,
                n_ctx=padded(n_ctx),
                n_batch=max(n_batch, N_SEQUENCES),
                n_ubatch=max(n_ubatch, N_SEQUENCES),
                n_threads=n_threads or default_threads(),
                n_threads_batch=n_threads_batch or n_threads or default_threads(),
                logits_all=logits_all,
                flash_attn=bool(flash_attn),
                verbose=verbose,
                **options,
            )
        self._sampled_at: int | None = None  # output index that the latest token was sampled from
        self._evaluated = -1  # passes there had been after the latest `eval`
        self._swift = self._take_over(wanted)
        self._stack.callback(self._swift.close)
        weakref.finalize(self, self._swift.close)  # before the interpreter falls apart

    @property
    def swift(self) -> Swift:
        """What drafts, why, and how it went."""
        return self._swift

    # -- adopting what llama_cpp made --------------------------------------------------------------

    @property
    def _model(self) -> Any:
        return self._llama_model

    @_model.setter
    def _model(self, model: Any) -> None:
        # llama_cpp has loaded the model and makes the context next
        self._llama_model = model
        params = self.context_params
        if self._flash_attn is None:
            params.flash_attn_type = AUTO
        if not refusal(model.model, self._options):
            swa_full = params.swa_full  # the caller's to say
            fit_context(params, model.model)
            params.swa_full = swa_full

    def _take_over(self, wanted: SpeculationOptions) -> Swift:
        why = refusal(self.model, self._options)
        model = None if why else adopt(self, flash_attn=self._flash_attn)
        if model is None:
            why = why or "the model does not generate text token by token"
            return Swift(wanted, refusal=why)
        self._adopted = model
        if self.context_params.embeddings:  # switched on in `embed`: they cost every pass
            llama_cpp.llama_set_embeddings(self.ctx, False)
        self.input_ids = np.zeros(self.n_ctx(), np.intc)
        if not self._keeps_all:
            self.scores = np.empty((0, self._n_vocab), np.single)
            self._logits_all = True  # or llama_cpp refuses logprobs; `Scores` has what they need
        return Swift(wanted, model=model, settle=weakref.WeakMethod(self._settle))

    # -- llama_cpp's loop --------------------------------------------------------------------------

    @wraps(Llama.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
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
        with self._swift.busy():
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
        """Decodes tokens as they are, in the batches llama_cpp would."""
        records = self._request.records if self._request.echo else None
        # what is sent to a generation is verified by llama_cpp, which asks for a row of each
        is_sent = self._generation is not None and self._generation.started
        all_rows = self._keeps_all or is_sent or records is not None
        for first in range(0, len(tokens), self.n_batch):
            batch = tokens[first : first + self.n_batch]
            n_rows = len(batch) if all_rows else 1
            model.decode(batch, n_outputs=n_rows, exact=not all_rows)
            if self._keeps_all:
                rows = [model.logits(row) for row in range(n_rows)]
                self.scores[self.n_tokens : self.n_tokens + n_rows] = rows
            if records:
                following = tokens[first + 1 : first + n_rows + 1]
                for row, token in enumerate(following):
                    records.add(self.n_tokens + row, model.logits(row), batch[row], token)
            self._append(batch)
        self._sampled_at = None
        self._evaluated = model.n_passes

    @wraps(Llama.sample)
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

    def _settle(self) -> None:
        """Breaks off a walk: afterwards the context holds the text alone."""
        if self._adopted and self._generation and self._generation.walking:
            self._generation.end_walk()
            self.n_tokens = min(self.n_tokens, self._adopted.n_past)

    def _align(self, model: Model) -> None:
        """The context holds the first `n_tokens` of the text, as llama_cpp thinks it does."""
        if self.n_tokens == 0:
            model.clear()
        elif self.n_tokens < model.n_past:
            model.rollback(self.n_tokens)
        elif self.n_tokens > model.n_past:  # an interrupt emptied a context with a running state
            model.decode(self.input_ids[model.n_past : self.n_tokens].tolist())

    def _append(self, tokens: Sequence[int]) -> None:
        end = self.n_tokens + len(tokens)
        self.input_ids[self.n_tokens : end] = tokens
        self.n_tokens = end

    @wraps(Llama._init_sampler)
    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        arguments = signature(Llama._init_sampler).bind(self, *args, **kwargs).arguments
        grammar = arguments.get("grammar")
        check_grammar(self._model.vocab, grammar)
        sampler = super()._init_sampler(*args, **kwargs)
        return sampler if grammar is None else guarded(sampler, self._n_vocab)

    # -- logits ------------------------------------------------------------------------------------

    @property
    def _scores(self) -> Any:
        if self._adopted is None or self._keeps_all:
            return super()._scores
        records = self._request.records
        return Scores(self.n_tokens, self._n_vocab, records, self._latest_logits)

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
            records.add(position, self._latest_logits(), int(self.input_ids[position]), token)

    def _wrap_criteria(self, arguments: dict[str, Any]) -> None:
        criteria = arguments.get("stopping_criteria")
        if criteria is not None and not isinstance(criteria, Criteria):
            arguments["stopping_criteria"] = Criteria(criteria, self._latest_logits)

    @staticmethod
    def logits_to_logprobs(logits: Any, axis: int = -1) -> Any:
        """See `Llama.logits_to_logprobs`; of rows that are log-probabilities, these."""
        if isinstance(logits, (LogProbs, Scores)):
            return logits
        return Llama.logits_to_logprobs(logits, axis)

    @wraps(Llama._create_completion)
    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if self._adopted is None:
            yield from super()._create_completion(*args, **kwargs)
            return
        call = signature(Llama._create_completion).bind(self, *args, **kwargs)
        call.apply_defaults()
        self._wrap_criteria(call.arguments)
        with self._swift.busy():
            self._request = Request.of(call.arguments, keeps_rows=self._keeps_all)
            try:
                yield from _completion(*call.args, **call.kwargs)
            finally:
                self._request = Request()

    # -- state -------------------------------------------------------------------------------------

    def save_state(self) -> Any:
        """See `Llama.save_state`; the state holds no logits, unless all are kept."""
        model = self._adopted
        if model is None:
            return super().save_state()
        with self._swift.busy():
            self._align(model)
            has_gaps = model.hand_over()
            state = super().save_state()
            if has_gaps:
                requires_eval = self._requires_eval
                self.load_state(state)
                self._requires_eval = requires_eval
            else:
                model.take_back()
            return state

    def load_state(self, state: Any) -> None:
        """See `Llama.load_state`."""
        model = self._adopted
        if model is None:
            super().load_state(state)
            return
        with self._swift.busy():
            try:
                super().load_state(state if self._keeps_all else without_scores(state))
            except BaseException:
                model.clear()
                self.reset()
                raise
            model.assume(self.input_ids[: self.n_tokens].tolist())

    @wraps(Llama.embed)
    def embed(self, *args: Any, **kwargs: Any) -> Any:
        model = self._adopted
        if model is None or not self.context_params.embeddings:
            return super().embed(*args, **kwargs)
        with self._swift.busy():
            model.clear()
            model.hand_over()
            llama_cpp.llama_set_embeddings(self.ctx, True)
            try:
                return super().embed(*args, **kwargs)
            finally:
                llama_cpp.llama_set_embeddings(self.ctx, False)
                model.clear()
                self.reset()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return state | {
            "speculation": self._swift.options,
            "flash_attn": self._flash_attn,
            "logits_all": self._keeps_all,
        }


# llama_cpp names the class where it means its own: `Llama.logits_to_logprobs`
_completion = with_globals(Llama._create_completion, Llama=SwiftLlama)
# chat templates are rendered in a process of their own
_init = with_globals(Llama.__init__, llama_chat_format=formats)
