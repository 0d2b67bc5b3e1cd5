"""The model as the server uses it: every generation is counted and can be stopped."""

from __future__ import annotations

import gc
import logging
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from swift_gguf.llama import Llama
from swift_gguf.llama.chat_format import CHATML, FOR_TOOLS, BoundedFormatter
from swift_gguf.llama.completion import Asked
from swift_gguf.model import ModelOptions
from swift_gguf.native import StopFlag, library
from swift_gguf.native import chat as native_chat
from swift_gguf.native.memory import give_back_free_pages
from swift_gguf.server.conversations import Conversations
from swift_gguf.server.embedder import Embedder
from swift_gguf.server.next_turn import NextTurn
from swift_gguf.server.options import ServerOptions
from swift_gguf.server.syntax import Syntax, Syntaxes
from swift_gguf.server.worker import Job
from swift_gguf.speculation import SpeculationOptions
from swift_gguf.stats import Stats

_log = logging.getLogger("swift_gguf")

TIDY_EVERY_S = 20.0
PROMPT_END = 64
"""Tokens at the end of a prompt that are examined.  They contain the beginning of the answer."""

CHATML_END = "<|im_end|>"
_JOINED_ARGUMENTS = re.compile(r"arguments['\"\]]*\s*\+")


@dataclass
class Tally:
    """Sums of the generations for one request, or for all of them."""

    stats: Stats = field(default_factory=Stats)
    generations: int = 0
    """Each gets its first token from the prompt's forward pass."""
    prompt_tokens: int = 0
    """Of every choice's prompt, decoded or not."""
    completion_tokens: int = 0
    n_past: int = 0
    """The longest text in the context."""

    def count(self, stats: Stats) -> None:
        """Counts a generation."""
        self.stats.add(stats)
        self.generations += 1

    def add(self, other: Tally) -> None:
        """Counts another request."""
        self.stats.add(other.stats)
        self.prompt_tokens += other.prompt_tokens
        self.generations += other.generations
        self.n_past = max(self.n_past, other.n_past)

    @property
    def predicted_per_second(self) -> float:
        """As llama-server has it: without the first tokens, which come with their prompts."""
        n, seconds = self.stats.predicted_n - self.generations, self.stats.cycle_s
        return n / seconds if n > 0 and seconds else 0.0


class Started:
    """Event: the prompt fits, and prompt processing begins."""


class ServedLlama(Llama):
    """A `Llama` for the server.  Only one thread may use it at a time, except for `interrupt`."""

    last_n_tokens_size: int
    _conversations: Conversations | None = None
    _embedder: Embedder | None = None
    _next_turn: NextTurn | None = None
    _answered: tuple[Mapping[str, Any], str] | None = None
    _job: Job[ServedLlama] | None = None
    _tally: Tally
    _reuses = True
    _tidied_at = -math.inf
    thinks = False
    """True if the prompt of the latest generation opens the reasoning."""
    _syntaxes: Syntaxes
    _syntax_of: Callable[[Mapping[str, Any]], Syntax | None]
    _may_expect: Sequence[Mapping[str, Any]] = ()
    """Variables with which the template may have rendered the prompt."""
    _shown: frozenset[int] = frozenset()
    _prompt_end = ""

    def __init__(self, model_path: str, *, stop: StopFlag | None = None, **options: Any) -> None:
        self._given_stop = stop
        super().__init__(model_path, **options)

    def _stop_flag(self) -> StopFlag:
        return self._given_stop or StopFlag()

    @classmethod
    def load(
        cls,
        path: Path,
        loading: ModelOptions,
        speculation: SpeculationOptions,
        options: ServerOptions,
        *,
        stop: StopFlag | None = None,
    ) -> ServedLlama:
        """Loads a model for the server, and searches for better drafts in idle time.

        stop: raising the flag stops the load.

        Raises:
            StoppedError: the load was stopped.
            ModelError: the file is missing or damaged, or llama.cpp cannot run the model.
            UnsupportedModelError: the options name a draft source that the model does not support.
        """
        llama = cls(
            str(path),
            speculation=speculation,
            sidecar=None if loading.sidecar == "auto" else loading.sidecar or "none",
            n_ctx=loading.n_ctx,
            n_threads=loading.n_threads,
            n_gpu_layers=loading.n_gpu_layers,
            flash_attn=loading.flash_attn,
            last_n_tokens_size=options.sampling.repeat_last_n,
            verbose=False,
            stop=stop,
        )
        llama.prepare(
            cache_bytes=options.cache_bytes,
            template=options.chat_template,
            reads_ahead=options.reads_ahead,
        )
        return llama

    def prepare(
        self, *, cache_bytes: int, template: str | None = None, reads_ahead: bool = True
    ) -> None:
        """Prepares the model for jobs.

        reads_ahead: see `ServerOptions`.
        template: a Jinja template for chats that replaces the model's own.

        Raises:
            NativeLibraryError: the library that parses answers is missing.
        """
        native_chat.check()
        bos, eos = self._ends_as_text()
        self._syntaxes = Syntaxes(bos_token=bos, eos_token=eos)
        if self.speculation.model is None:
            library().set_stop_flag(self.ctx, self._stop)
        self.look_back(self.last_n_tokens_size)
        if template is not None or "tokenizer.chat_template" not in self.metadata:
            self._chat_by(template)
        self._conversations = Conversations(self, budget=cache_bytes)
        if reads_ahead:
            self._next_turn = NextTurn(self)
        self.speculation.idle(first=self._next_turn.step if self._next_turn else None)

    def look_back(self, repeat_last_n: int) -> None:
        """Sets the number of tokens that are penalised; -1: all.  In llama_cpp, -1 means none."""
        self.last_n_tokens_size = self.n_ctx() if repeat_last_n < 0 else repeat_last_n

    def _chat_by(self, template: str | None) -> None:
        """template: None, as the model has none either: ChatML, llama-server's choice, too."""
        bos, eos = self._ends_as_text()
        stop: list[str] = []
        if template is None:
            _log.warning("the model has no chat template; using ChatML; see --chat-template")
            self.chat_format: str | None = "chatml"
            template = CHATML
            end = self.tokenize(CHATML_END.encode(), add_bos=False, special=True)
            if not (len(end) == 1 and self._ends(end[0])):
                stop = [CHATML_END]  # text to this model
        else:
            self.chat_format, self.chat_handler = "chat_template.default", None
            self.metadata["tokenizer.chat_template"] = template
            self.metadata.pop(f"tokenizer.{FOR_TOOLS}", None)
            self._chat_handlers.pop(FOR_TOOLS, None)
        formatter = BoundedFormatter(template, eos, bos, stop=stop)
        self._chat_handlers[self.chat_format] = formatter.to_chat_handler()

    def _ends_as_text(self) -> tuple[str, str]:
        """The texts of the BOS and EOS tokens, for templates."""
        bos, eos = (
            self._model.token_get_text(token) if token >= 0 else ""
            for token in (self.token_bos(), self.token_eos())
        )
        return bos, eos

    # -- jobs --------------------------------------------------------------------------------------

    @contextmanager
    def working_for(self, job: Job[ServedLlama], *, reuses: bool = True) -> Iterator[Tally]:
        """Generations inside belong to the job, and end when it is stopped.

        reuses: tokens in the KV cache or in a saved state are not processed again.
        """
        self._job, self._tally, self._reuses = job, Tally(), reuses
        self._answered = None
        try:
            yield self._tally
        finally:
            self._job = None
            if monotonic() - self._tidied_at >= TIDY_EVERY_S:
                give_back_free_pages()
                self._tidied_at = monotonic()

    @wraps(Llama.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        job = self._job
        if self._next_turn:
            with self.speculation.busy():
                self._next_turn.forget()
        if job is None:
            yield from super().generate(*args, **kwargs)
            return
        tally, prompt = self._tally, list(kwargs["tokens"] if "tokens" in kwargs else args[0])
        job.check()
        tally.prompt_tokens += len(prompt)
        job.post(Started())
        # from here on a raised flag stays up: the search, which lowers it, has left the model
        with self.speculation.busy():
            if self._conversations is not None:
                self._conversations.enter(prompt if self._reuses else [])
            if not self._reuses:
                self.reset()
            job.check()
            stats, start = self.speculation.stats, perf_counter()
            n_said = 0
            self._prompt_end = self._text_of(prompt[-PROMPT_END:])
            self.thinks = self._prompt_end.rstrip().endswith("<think>")
            try:
                with closing(super().generate(*args, **kwargs)) as stream:
                    for token in stream:
                        if not self._ends(token):
                            n_said += 1
                        yield token
                        job.check()
            finally:
                tally.completion_tokens += n_said if self._request.max_tokens != 0 else 0
                if self.speculation.model is None:  # llama_cpp decodes, and counts nothing
                    seconds = perf_counter() - start
                    tally.count(Stats(prompt_n=len(prompt), predicted_n=n_said, cycle_s=seconds))
                elif self.speculation.stats is not stats:
                    tally.count(self.speculation.stats)
                tally.n_past = max(tally.n_past, self.n_tokens)

    def complete(self, prompt: str | Sequence[int], **arguments: Any) -> Any:
        """As `create_completion`, but that `max_tokens` 0 is none: the prompt alone."""
        answer = self._complete(Asked.of({"prompt": prompt, **arguments}))
        return answer if arguments.get("stream") else next(answer)

    def piece(self, token: int) -> bytes:
        """The bytes of a token in an answer."""
        return library().token_bytes(self.vocab, token, special=token in self._shown)

    def _text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens, with control tokens."""
        pieces = [library().token_bytes(self.vocab, token, special=True) for token in tokens]
        return b"".join(pieces).decode("utf-8", "replace")

    def answered(self, chat: Mapping[str, Any], answer: str) -> None:
        """A chat was answered to the end; see `NextTurn.follows`."""
        if self._reuses:
            self._answered = chat, answer

    def rest(self) -> None:
        """No request waits: the next turn of the latest chat can be read ahead."""
        answered, self._answered = self._answered, None
        if answered and self._next_turn:
            with self.speculation.busy():
                self._next_turn.follows(*answered)

    @property
    def n_read_ahead(self) -> int:
        """Tokens of next turns that were processed after answers."""
        return self._next_turn.n_read if self._next_turn else 0

    # -- how answers are written -------------------------------------------------------------------

    def expect(
        self,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None = None,
    ) -> Sequence[str]:
        """Sets the syntax of the next answers to the template's syntax for these tools.

        tools: None: the answers have another form, or are not chats.
        variables: further variables of the template.

        Returns: the texts that end such an answer.
        """
        source = None if tools is None else self._template(bool(tools))
        self._may_expect = []
        if source is not None:
            wanted = dict(variables or {})
            self._may_expect = [wanted, {"enable_thinking": False, **wanted}]
            self._syntax_of = partial(self._syntaxes.of, source, tools or ())
        syntax = self._syntax_of(self._may_expect[0]) if self._may_expect else None
        marks = syntax.shown if syntax and (tools or syntax.thinking) else ()
        ids = [self.tokenize(mark.encode(), add_bos=False, special=True) for mark in marks]
        self._shown = frozenset(found[0] for found in ids if len(found) == 1)
        return syntax.stops if syntax else ()

    def syntax_here(self, *, thinks: bool, splits: bool) -> Syntax | None:
        """The syntax of the current answer, if its prompt ends like llama.cpp's prompt.

        thinks: the answer may have reasoning.
        splits: the reasoning is split from the content, as llama.cpp's parser does.
        """
        # llama.cpp enables reasoning by default, while our templates use their own default
        known = (self._syntax_of(variables) for variables in self._may_expect)
        end = self._prompt_end.rstrip()
        syntax = next((one for one in known if one and end.endswith(one.opening.rstrip())), None)
        if syntax is None or (syntax.thinking and not splits):
            return None
        is_open = bool(syntax.thinking) and syntax.opening.rstrip().endswith(syntax.thinking)
        return None if is_open and not thinks else syntax

    def _template(self, has_tools: bool) -> str | None:
        """The source of the template that renders chats."""
        names = [f"tokenizer.{FOR_TOOLS}"] * has_tools + ["tokenizer.chat_template"]
        return next((self.metadata[name] for name in names if name in self.metadata), None)

    def _ends(self, token: int) -> bool:
        return bool(library().api.llama_vocab_is_eog(self.vocab, token))

    def interrupt(self) -> None:
        """Ends the current forward pass early.  Called from any thread."""
        self._stop.raise_()

    def resume(self) -> None:
        """Reverts `interrupt`."""
        self._stop.lower()

    def close(self) -> None:
        """Frees the model."""
        gc.collect()  # samplers of stopped answers: the interpreter's end would be too late
        self._conversations = None
        if self._embedder:
            self._embedder.close()
            self._embedder = None
        super().close()

    # -- what it is --------------------------------------------------------------------------------

    @property
    def vocab(self) -> Any:
        """llama.cpp's."""
        return self._model.vocab

    @property
    def chat_template(self) -> str:
        """The template of chats."""
        return self._template(has_tools=False) or CHATML

    def calls_as_text(self, *, has_tools: bool) -> bool:
        """True if the chat template joins a call's arguments to text, as DeepSeek's does."""
        return bool(_JOINED_ARGUMENTS.search(self._template(has_tools) or ""))

    def embedder(self) -> Embedder:
        """The embedder, which is created when it is first needed."""
        if self._embedder is None:
            self._embedder = Embedder(
                self.model,
                n_threads=self.n_threads,
                pools=any(key.endswith(".pooling_type") for key in self.metadata),
                stop=self._stop,
            )
        return self._embedder

    def meta(self) -> dict[str, Any]:
        """The model's entry in /v1/models, with llama-server's names."""
        return {
            "n_vocab": self.n_vocab(),
            "n_ctx": self.n_ctx(),
            "n_ctx_train": self._model.n_ctx_train(),
            "n_embd": self.n_embd(),
            "n_params": self._model.n_params(),
            "size": self._model.size(),
        }

    def about_speculation(self) -> dict[str, Any]:
        """The entry in /props."""
        return {"enabled": self.speculation.enabled, "why": self.speculation.reason}


Work = Callable[[ServedLlama, Job[ServedLlama]], Iterator[object]]
"""The work of a request on the model.  It yields the results, one after another."""
