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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from pathlib import Path
from time import perf_counter
from types import FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swift_gguf import gguf_check
from swift_gguf.cells import N_SEQUENCES
from swift_gguf.drafting.source import Drafter
from swift_gguf.engine import Draft, Search, conclude, propose, search_step
from swift_gguf.errors import GrammarError, ModelError
from swift_gguf.llama.control import Swift, options_of
from swift_gguf.loading import (
    Loaded,
    ModelOptions,
    cause,
    fit_context,
    generates_text,
    padded,
)
from swift_gguf.model import Model
from swift_gguf.native import library
from swift_gguf.speculation import SpeculationOptions
from swift_gguf.stats import Stats
from swift_gguf.threads import default_threads
from swift_gguf.verification import Walk

library()  # llama_cpp loads ours at its first import, which is the next line
import llama_cpp  # noqa: E402
from llama_cpp import Llama  # noqa: E402

from swift_gguf.llama.scores import LogProbs, Records, Scores  # noqa: E402

_AUTO = -1  # LLAMA_FLASH_ATTN_TYPE_AUTO


@dataclass
class _Request:
    """What `create_completion` was asked for, as far as generations need to know."""

    max_tokens: int | None
    echo: bool
    records: Records | None


@dataclass
class _Generation:
    """One run of `generate`."""

    stats: Stats
    limit: int | None
    """Tokens at most, if that is known."""
    draft_max: int
    drafter: Drafter | None
    search: Search | None
    draft: Draft | None = None
    walk: Walk | None = None
    """Down the tree of the draft, while it lasts."""
    started: bool = False
    """Was a token sampled?  What is evaluated before is the prompt."""
    cycle_s: float = 0.0


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
        **options: Any,
    ) -> None:
        self._stack = ExitStack()  # what closes it must be there if anything below fails
        self._adopted: Model | None = None
        self._generation: _Generation | None = None
        self._request: _Request | None = None
        self._flash_attn = flash_attn
        self._options = options
        wanted = options_of(speculation)
        path = os.fspath(model_path)
        if not options.get("vocab_only"):
            gguf_check.check(path, tokenizer=False)
            n_ctx = n_ctx or gguf_check.read(path).integer("context_length", 512)
        with _our_errors(path):
            super().__init__(
                path,
                n_ctx=padded(n_ctx),
                n_batch=max(n_batch, N_SEQUENCES),
                n_ubatch=max(n_ubatch, N_SEQUENCES),
                n_threads=n_threads or default_threads(),
                n_threads_batch=n_threads_batch or n_threads or default_threads(),
                logits_all=logits_all,
                flash_attn=bool(flash_attn),
                **options,
            )
        self._keeps_all = logits_all
        self._latest: int | None = None  # output index of the latest row sampled from
        self._evaluated = -1  # passes when the prompt had been evaluated
        self._swift = self._adopt(wanted)
        self._stack.callback(self._swift.close)
        weakref.finalize(self, self._swift.close)  # before the interpreter falls apart

    @property
    def swift(self) -> Swift:
        """What drafts, why, and how it went."""
        return self._swift

    # -- adopting what llama_cpp made --------------------------------------------------------------

    @property
    def _model(self) -> Any:
        return self._internal_model

    @_model.setter
    def _model(self, model: Any) -> None:
        # llama_cpp has loaded the model and makes the context next
        self._internal_model = model
        if self._flash_attn is None:
            self.context_params.flash_attn_type = _AUTO
        if not self._refusal():
            swa_full = self.context_params.swa_full
            fit_context(self.context_params, model.model)
            self.context_params.swa_full = swa_full

    def _refusal(self) -> str:
        """Why the model is left to llama_cpp; empty if it is not."""
        native = self._internal_model.model
        if self._options.get("vocab_only"):
            return "only the vocabulary is loaded"
        if self._options.get("draft_model") is not None:
            return "the draft_model drafts"
        if llama_cpp.llama_model_has_encoder(native):
            return "the model does not generate text token by token"
        has_state = llama_cpp.llama_model_is_recurrent(native)
        has_state = has_state or llama_cpp.llama_model_is_hybrid(native)
        if has_state and self._options.get("embedding"):
            return "the model has a running state, and is loaded for embeddings"
        return ""

    def _adopt(self, wanted: SpeculationOptions) -> Swift:
        refusal = self._refusal()
        loaded = Loaded(self._model.model, self.ctx, self.n_threads, is_ours=False)
        if not refusal and not generates_text(loaded):
            refusal = "the model does not generate text token by token"
        if refusal:
            return Swift(wanted, refusal=refusal)
        if self.context_params.embeddings:  # switched on by `embed`: they cost every pass
            llama_cpp.llama_set_embeddings(self.ctx, False)
        n_gpu_layers = self.model_params.n_gpu_layers
        self._adopted = Model(
            self.model_path,
            ModelOptions(
                n_ctx=self.n_ctx(),
                n_batch=self.n_batch,
                n_threads=self.n_threads,
                n_gpu_layers=-1 if n_gpu_layers == 0x7FFFFFFF else n_gpu_layers,
                flash_attn=self._flash_attn,
            ),
            loaded=loaded,
        )
        self.input_ids = np.zeros(self.n_ctx(), np.intc)
        if not self._keeps_all:
            self.scores = np.empty((0, self._n_vocab), np.single)
            self._logits_all = True  # or llama_cpp refuses logprobs; `Scores` has what they need
        return Swift(wanted, model=self._adopted, settle=weakref.WeakMethod(self._settle))

    # -- llama_cpp's loop --------------------------------------------------------------------------

    @wraps(Llama.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        if self._adopted is None:
            yield from super().generate(*args, **kwargs)
            return
        call = signature(Llama.generate).bind(self, *args, **kwargs)
        self._hide_rows(call.arguments)
        with self._swift.busy():
            if self._adopted.n_passes != self._evaluated:
                self._requires_eval = True  # the logits are no longer those of the last token
            generation = self._generation = self._begin(call.arguments["tokens"])
            try:
                yield from self._run(Llama.generate(*call.args, **call.kwargs), generation)
            finally:
                if self._generation is generation:
                    self._settle()
                    self._generation = None
                self._swift.answered()

    def _begin(self, prompt: Sequence[int]) -> _Generation:
        speculation, request = self._swift.current, self._request
        assert speculation is not None
        self._swift.stats = Stats(stop_reason="stopped")
        limit = request.max_tokens if request else None
        search = speculation.begin(len(prompt))
        return _Generation(
            self._swift.stats, limit, speculation.draft_max, speculation.drafter, search
        )

    def _run(
        self, tokens: Generator[int, Sequence[int] | None, None], generation: _Generation
    ) -> Generator[int, Sequence[int] | None, None]:
        """Passes on what llama_cpp yields.

        Whenever a token is out, `n_tokens` counts those before it, as in `Llama`.
        """
        stats, sent = generation.stats, None
        with closing(tokens):
            while True:
                try:
                    token = tokens.send(sent)
                except StopIteration:
                    return
                stats.predicted_n += 1
                if llama_cpp.llama_vocab_is_eog(self._model.vocab, token):
                    stats.predicted_n -= 1
                    stats.stop_reason = "eos"
                elif stats.predicted_n == generation.limit:
                    stats.stop_reason = "length"
                sent = yield token
                if self._generation is not generation:  # another one began; as Llama, mix them up
                    self._settle()
                    self._generation = generation
                if sent is not None:
                    self._settle()  # llama_cpp verifies what was sent
                elif generation.walk:  # the token was guessed, and is decoded already
                    self._append([token])

    def eval(self, tokens: Sequence[int]) -> None:
        """Decodes tokens after the first `n_tokens` of the context; see `Llama.eval`."""
        if self._adopted is None:
            super().eval(tokens)
            return
        with self._swift.busy():
            self._cut(self._adopted)
            generation = self._generation
            if generation and generation.started and len(tokens) == 1:
                self._guess(self._adopted, generation, tokens[0])
            else:
                self._evaluate(self._adopted, tokens)
            self._requires_eval = False

    def _guess(self, model: Model, generation: _Generation, token: int) -> None:
        """Decodes a token, and guesses after it."""
        stats = generation.stats
        if generation.search and generation.cycle_s:
            search_step(generation.search, generation.cycle_s, stats)
        start = perf_counter()
        n_max = min(generation.draft_max, model.n_ctx - self.n_tokens - 1, model.room - 1)
        if generation.limit is not None:
            n_max = min(n_max, generation.limit - stats.predicted_n - 1)
        generation.draft = propose(model, int(token), generation.drafter, n_max=n_max)
        generation.walk = Walk(generation.draft.tree, is_eog=model.is_eog)
        self._append([token])
        generation.cycle_s = perf_counter() - start
        stats.cycle_s += generation.cycle_s

    def _evaluate(self, model: Model, tokens: Sequence[int]) -> None:
        """Decodes tokens as they are, in the batches llama_cpp would."""
        start = perf_counter()
        generation, request = self._generation, self._request
        records = request.records if request and request.echo else None
        # drafts of others are verified by llama_cpp, which asks for a row of each of them
        all_rows = self._keeps_all or records or (generation and generation.started)
        for first in range(0, len(tokens), self.n_batch):
            batch = [int(token) for token in tokens[first : first + self.n_batch]]
            n_rows = len(batch) if all_rows else 1
            model.decode(batch, n_outputs=n_rows, exact=not all_rows)
            if self._keeps_all:
                rows = [model.logits(row) for row in range(n_rows)]
                self.scores[self.n_tokens : self.n_tokens + n_rows] = rows
            self._append(batch)
            following = [*tokens[first + 1 : first + len(batch) + 1]]
            if records:
                for row, token in enumerate(following):
                    position = self.n_tokens - n_rows + row
                    records.add(position, model.logits(row), batch[row], token)
        self._latest = None
        self._evaluated = model.n_passes
        if generation:
            generation.stats.prompt_n += len(tokens)
            generation.stats.prompt_s += perf_counter() - start

    @wraps(Llama.sample)
    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        generation, model = self._generation, self._adopted
        if model is None or generation is None:
            return int(super().sample(*args, idx=idx, **kwargs))
        start = perf_counter()
        walk = generation.walk
        row = walk.node + 1 if walk else (idx - self.n_tokens if idx is not None else -1)
        self._latest = model.output_index(row)
        # llama_cpp counts back from n_tokens; from the first on, llama.cpp counts itself
        token = int(super().sample(*args, idx=self.n_tokens + self._latest, **kwargs))
        generation.started = True
        self._record(model, token)
        if walk:
            walk.take(token)
            seconds = perf_counter() - start
            generation.stats.sample_s += seconds
            generation.stats.cycle_s += seconds
            generation.cycle_s += seconds
            if walk.done:
                self._conclude(model, generation)
        return token

    def _conclude(self, model: Model, generation: _Generation) -> None:
        """The walk is over: what was guessed right is text, and whoever guessed hears of it."""
        walk, draft = generation.walk, generation.draft
        assert walk
        assert draft
        generation.walk = generation.draft = None
        drafter = generation.drafter if walk.done else None
        conclude(model, draft, walk.verdict, drafter, generation.stats)

    def _settle(self) -> None:
        """Breaks off a walk: afterwards the context is nobody's but the text's."""
        generation, model = self._generation, self._adopted
        if model and generation and generation.walk:
            self._conclude(model, generation)
            self.n_tokens = min(self.n_tokens, model.n_past)

    def _append(self, tokens: Sequence[int]) -> None:
        end = self.n_tokens + len(tokens)
        self.input_ids[self.n_tokens : end] = tokens
        self.n_tokens = end

    def _cut(self, model: Model) -> None:
        """Forgets what llama_cpp does not count any more."""
        if self.n_tokens == 0:
            model.clear()
        elif self.n_tokens < model.n_past:
            model.rollback(self.n_tokens)

    @wraps(Llama._init_sampler)
    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        grammar = signature(Llama._init_sampler).bind(self, *args, **kwargs).arguments
        _check_grammar(self._model.vocab, grammar.get("grammar"))
        return super()._init_sampler(*args, **kwargs)

    # -- logits ------------------------------------------------------------------------------------

    @property
    def _scores(self) -> Any:
        if self._adopted is None or self._keeps_all:
            return super()._scores
        records = self._request.records if self._request else None
        return Scores(self.n_tokens, self._n_vocab, records, self._latest_logits)

    @property
    def eval_logits(self) -> deque[list[float]]:
        """Logits of the latest token, or of all with logits_all."""
        if self._adopted is None or self._keeps_all:
            logits: deque[list[float]] = super().eval_logits
            return logits
        latest = self._latest_logits()
        return deque([] if latest is None else [latest.tolist()], maxlen=1)

    def _latest_logits(self) -> NDArray[np.float32] | None:
        """What the latest token was sampled from, or the next one will be."""
        model = self._adopted
        assert model is not None
        index = model.output_index(-1) if self._latest is None else self._latest
        logits: NDArray[np.float32] = model.logits_at(index)
        return logits

    def _record(self, model: Model, token: int) -> None:
        """Keeps what will be asked about the row that `token` was sampled from."""
        position = self.n_tokens - 1
        if self._keeps_all:
            self.scores[position] = self._latest_logits()
        elif self._request and self._request.records:
            logits = self._latest_logits()
            assert logits is not None
            self._request.records.add(position, logits, int(self.input_ids[position]), token)

    def _hide_rows(self, arguments: dict[str, Any]) -> None:
        """Stopping criteria get the logits that the latest token was sampled from, which llama_cpp
        looks for in its matrix."""
        criteria = arguments.get("stopping_criteria")
        if criteria is not None and not hasattr(criteria, "_is_hidden"):

            def stops(input_ids: Any, _: Any) -> Any:
                return criteria(input_ids, self._latest_logits())

            stops._is_hidden = True  # type: ignore[attr-defined]
            arguments["stopping_criteria"] = stops

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
        self._hide_rows(call.arguments)
        values = call.arguments
        n_top, echo = values["logprobs"], bool(values["echo"])
        keeps = n_top is not None and not self._keeps_all
        if keeps and echo:
            self.reset()  # what the context holds already has no rows any more
        limit = values["max_tokens"]
        self._request = _Request(
            max_tokens=limit if limit is not None and limit > 0 else None,
            echo=echo,
            records=Records(n_top=n_top) if keeps else None,
        )
        try:
            yield from _completion(*call.args, **call.kwargs)
        finally:
            self._request = None

    # -- state -------------------------------------------------------------------------------------

    def save_state(self) -> Any:
        """See `Llama.save_state`; the state holds no logits, unless all are kept."""
        if self._adopted is None:
            return super().save_state()
        with self._swift.busy():
            self._cut(self._adopted)
            has_gaps = self._adopted.hand_over()
            state = super().save_state()
            if has_gaps:
                self.load_state(state)
            return state

    def load_state(self, state: Any) -> None:
        """See `Llama.load_state`."""
        if self._adopted is None:
            super().load_state(state)
            return
        with self._swift.busy():
            try:
                super().load_state(state if self._keeps_all else _without_scores(state))
            except BaseException:
                self._adopted.clear()
                self.reset()
                raise
            self._adopted.assume(self.input_ids[: self.n_tokens].tolist())
            self._adopted.n_passes += 1

    @wraps(Llama.embed)
    def embed(self, *args: Any, **kwargs: Any) -> Any:
        if self._adopted is None or not self.context_params.embeddings:
            return super().embed(*args, **kwargs)
        with self._swift.busy():
            self._adopted.clear()
            self._adopted.hand_over()
            llama_cpp.llama_set_embeddings(self.ctx, True)
            try:
                return super().embed(*args, **kwargs)
            finally:
                llama_cpp.llama_set_embeddings(self.ctx, False)
                self._adopted.clear()
                self.reset()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return state | {
            "speculation": self._swift.options,
            "flash_attn": self._flash_attn,
            "logits_all": self._keeps_all,
        }


def _with_globals(function: Any, **replaced: Any) -> Callable[..., Any]:
    """A function of another module that finds other things by some names."""
    scope = function.__globals__ | replaced
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


# llama_cpp names the class where it means its own: `Llama.logits_to_logprobs`
_completion = _with_globals(Llama._create_completion, Llama=SwiftLlama)


def _without_scores(state: Any) -> Any:
    return llama_cpp.LlamaState(
        input_ids=state.input_ids,
        scores=state.scores[:0],
        n_tokens=state.n_tokens,
        llama_state=state.llama_state,
        llama_state_size=state.llama_state_size,
        seed=state.seed,
    )


@contextmanager
def _our_errors(path: str) -> Iterator[None]:
    """One line with llama.cpp's reason, where llama_cpp only says that it failed."""
    with library().messages() as messages:
        try:
            yield
        except ValueError as error:
            if not str(error).startswith("Failed to "):
                raise
            raise ModelError(f"{Path(path)} cannot be loaded: {cause(messages)}") from error


def _check_grammar(vocab: Any, grammar: Any) -> None:
    """llama_cpp would crash on one that does not parse."""
    if grammar is None:
        return
    sampler = llama_cpp.llama_sampler_init_grammar(
        vocab, grammar._grammar.encode("utf-8"), grammar._root.encode("utf-8")
    )
    if not sampler:
        raise GrammarError("the grammar is not valid GBNF; check its rules")
    llama_cpp.llama_sampler_free(sampler)
