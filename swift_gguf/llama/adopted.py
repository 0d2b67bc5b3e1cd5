"""A `llama_cpp.Llama` whose model and context are in our hands."""

from __future__ import annotations

import os
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, suppress
from inspect import signature
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_chat_format import get_chat_completion_handler
from numpy.typing import NDArray

from swift_gguf.errors import ModelError
from swift_gguf.gguf import check as gguf_check
from swift_gguf.gguf.context_length import ContextLength, context_length
from swift_gguf.gguf.end_token import overrides
from swift_gguf.llama.adoption import AUTO, adopt, in_scope, instead_of, our_errors, refusal
from swift_gguf.llama.chat_format import formats, templated_handler, wants_other_template
from swift_gguf.llama.control import LlamaSpeculation, options_of
from swift_gguf.llama.forms import held
from swift_gguf.llama.one_thread import OneThread
from swift_gguf.llama.scores import without_scores
from swift_gguf.model import Model
from swift_gguf.model.cells import N_SEQUENCES
from swift_gguf.model.loading import cause, fit_context
from swift_gguf.native import StopFlag, library
from swift_gguf.native.deep_stack import on_deep_stack
from swift_gguf.native.threads import default_threads
from swift_gguf.speculation import SpeculationOptions
from swift_gguf.templates import Continued, Prompting


class AdoptedLlama(Llama):  # type: ignore[misc]
    """Loads with what speculation needs, and keeps our `Model` and llama_cpp's view of the context
    in step: `n_tokens`, saved states, embeddings.

    What cannot be adopted stays llama_cpp's: `_adopted` is None then.
    """

    n_tokens: int
    _requires_eval: bool
    _goes_on: Any = None
    _sampler: Any
    _latest = (-1, -1)
    """`n_passes` and the output index of the row of logits that was looked at last."""
    input_ids: NDArray[np.intc]

    def __init__(
        self,
        model_path: str,
        *,
        speculation: str | Sequence[str] | SpeculationOptions = "auto",
        draft_model_path: str | os.PathLike[str] | None = None,
        sidecar: str | os.PathLike[str] | None = None,
        n_ctx: int | None = 512,
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
        self._one_thread = OneThread()
        self._in_use: list[Any] = []
        self._length = ContextLength(trained=None, limit=None)
        self._adopted: Model | None = None
        self._stop = self._stop_flag()
        self._flash_attn, self._keeps_all, self._options = flash_attn, logits_all, options
        wanted = options_of(speculation, draft_model_path)
        self._sidecar = sidecar
        path = os.fspath(model_path)
        if not options.get("vocab_only"):
            header = gguf_check.check(path, tokenizer=False)
            self._length = context_length(header)
            if instead := overrides(header, path):
                options["kv_overrides"] = instead | (options.get("kv_overrides") or {})
            if not _scales_rope(options):
                self._length.warn(path, n_ctx)
            n_ctx = self._length.choose(n_ctx)
            if options.get("lora_path"):
                gguf_check.check_adapter(options["lora_path"])
        library().show_log(verbose)
        with our_errors(path, self._stop) as messages:
            _init(
                self,
                path,
                n_ctx=n_ctx,
                n_batch=max(n_batch, N_SEQUENCES),
                n_ubatch=max(n_ubatch, N_SEQUENCES),
                n_threads=n_threads or default_threads(),
                n_threads_batch=n_threads_batch or n_threads or default_threads(),
                logits_all=logits_all,
                flash_attn=bool(flash_attn),
                verbose=verbose,
                **options,
            )
            if self.lora_path and not self._lora_adapter:  # llama_cpp looks for None
                raise ModelError(f"{self.lora_path} cannot be used with {path}: {cause(messages)}")
        self._speculation = self._take_over(wanted)
        self._stack.callback(self._speculation.close)
        weakref.finalize(self, self._speculation.close)  # before the interpreter falls apart

    @property
    def speculation(self) -> LlamaSpeculation:
        """What drafts, why, and how it went."""
        return self._speculation

    def n_ctx(self) -> int:
        """See `Llama.n_ctx`; not more than there are learned positions."""
        return self._length.usable(super().n_ctx())

    def _stop_flag(self) -> StopFlag:
        """Ends the load and passes while it is up."""
        return StopFlag()

    # -- adopting what llama_cpp made --------------------------------------------------------------

    @property
    def model_params(self) -> Any:
        """What llama_cpp loads the model with."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        params.progress_callback = self._goes_on = library().unless_stopped(self._stop)
        self._model_params = params

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

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """See `Llama.tokenize`."""
        tokenize = super().tokenize
        n_characters = library().stack_characters(self._model.vocab, text)
        return on_deep_stack(n_characters, lambda: list(tokenize(text, add_bos, special)))

    def create_chat_completion(
        self,
        *args: Any,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool | Continued = False,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> Any:
        """See `Llama.create_chat_completion`.  A file's template for tools alone is used for them.

        chat_template_kwargs: further variables of the chat template: ``enable_thinking``, ...
        continue_final_message: the last message is an answer that goes on: what it says or, by
            ``"reasoning_content"``, what it thinks.  What comes is what is new.
        add_generation_prompt: False: the prompt ends with the last message.

        Raises:
            TemplateError: the template refuses them, or does not show what is to go on.
            ModelError: chats do not go by a template (a ValueError).
            SchemaError: a schema is not supported (a ValueError).
        """
        continues = "content" if continue_final_message is True else continue_final_message
        prompting = Prompting(
            variables=chat_template_kwargs or {},
            opens_answer=add_generation_prompt,
            continues=continues or None,
        )
        handler, arguments = self._chat_handler_of(prompting, *args, **kwargs)
        return handler(llama=self, **arguments)

    def _chat_handler_of(
        self, prompting: Prompting, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """What answers a chat, and with which arguments."""
        call = signature(Llama.create_chat_completion).bind(self, *args, **kwargs)
        call.apply_defaults()
        arguments = dict(call.arguments)
        del arguments["self"]
        tools = arguments["tools"]
        if prompting == Prompting() and not wants_other_template(self, tools):
            handler = (
                self.chat_handler
                or self._chat_handlers.get(self.chat_format)
                or get_chat_completion_handler(self.chat_format)
            )
        else:
            handler = templated_handler(self, has_tools=bool(tools))
            arguments["prompting"] = prompting
        return held(handler, arguments), arguments

    def chat_tokens(self, chat: Mapping[str, Any], *, up_to: str) -> list[int]:
        """The prompt of a chat up to the last place where the text `up_to` stands.

        chat: arguments of `create_chat_completion`; no answer is opened.

        Raises:
            TemplateError: the template refuses the messages.
            ValueError: the template does not write the text.
        """
        prompting = Prompting(
            variables=chat.get("chat_template_kwargs") or {}, opens_answer=False, continues=None
        )
        rest = {name: value for name, value in chat.items() if name != "chat_template_kwargs"}
        handler, arguments = self._chat_handler_of(prompting, **rest)
        reader = _PromptReader(self, up_to.encode())
        with suppress(_PromptRead):
            handler(llama=reader, **arguments)
        return reader.tokens

    def _take_over(self, wanted: SpeculationOptions) -> LlamaSpeculation:
        why = refusal(self.model, self._options)
        model = (
            None
            if why
            else adopt(self, flash_attn=self._flash_attn, sidecar=self._sidecar, stop=self._stop)
        )
        if model is None:
            why = why or "the model does not generate text token by token"
            if not self._options.get("vocab_only") and library().has_kernels(self.ctx):
                library().set_batch_invariant(self.ctx, enable=True)
            return LlamaSpeculation(wanted, refusal=why)
        self._adopted = model
        if self.context_params.embeddings:  # switched on in `embed`: they cost every pass
            llama_cpp.llama_set_embeddings(self.ctx, False)
        self.input_ids = np.zeros(self.n_ctx(), np.intc)
        if not self._keeps_all:
            self.scores = np.empty((0, self._n_vocab), np.single)
            self._logits_all = True  # or llama_cpp refuses logprobs; `Scores` has what they need
        return LlamaSpeculation(wanted, model=model, settle=weakref.WeakMethod(self._settle))

    # -- llama_cpp's view of the context ----------------------------------------------------------

    def _settle(self) -> None:
        """Afterwards the context holds the text alone."""

    def _align(self, model: Model) -> None:
        """The context holds the first `n_tokens` of the text, as llama_cpp thinks it does."""
        if self.n_tokens == 0:
            model.clear()
        elif self.n_tokens < model.n_past:
            model.rollback(self.n_tokens)
        elif self.n_tokens > model.n_past:  # what was interrupted left less
            model.decode(self.input_ids[model.n_past : self.n_tokens].tolist())

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """See `Llama.create_completion`.

        Raises:
            SwiftError: another thread is using this llama.
        """
        with self._one_thread.inside():
            answer = super().create_completion(*args, **kwargs)
        return self._one_thread.each(answer) if isinstance(answer, Generator) else answer

    # -- state -------------------------------------------------------------------------------------

    def save_state(self) -> Any:
        """See `Llama.save_state`; the state holds no logits, unless all are kept."""
        model = self._adopted
        if model is None:
            return super().save_state()
        with self._one_thread.inside(), self._speculation.busy():
            self._align(model)
            model.hand_over()
            try:
                return super().save_state()
            finally:
                model.take_back()

    def load_state(self, state: Any) -> None:
        """See `Llama.load_state`."""
        model = self._adopted
        if model is None:
            super().load_state(state)
            return
        with self._one_thread.inside(), self._speculation.busy():
            self._latest = (-1, -1)
            try:
                super().load_state(state if self._keeps_all else without_scores(state))
                model.assume(self.input_ids[: self.n_tokens].tolist())
            except BaseException:
                model.clear()
                self.reset()
                raise

    @instead_of(Llama.embed)
    def embed(self, *args: Any, **kwargs: Any) -> Any:
        model = self._adopted
        if model is None or not self.context_params.embeddings:
            return super().embed(*args, **kwargs)
        with self._one_thread.inside(), self._speculation.busy():
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
            "speculation": self._speculation.options,
            "sidecar": self._sidecar,
            "flash_attn": self._flash_attn,
            "logits_all": self._keeps_all,
        }


class _PromptRead(Exception):
    """Ends a chat handler that has made its prompt."""


class _PromptReader:
    """A llama to chat handlers, which takes the tokens of a prompt and answers nothing."""

    def __init__(self, llama: Llama, up_to: bytes) -> None:
        self._llama, self._up_to = llama, up_to
        self.tokens: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llama, name)

    def tokenize(self, text: bytes, *args: Any, **kwargs: Any) -> list[int]:
        end = text.rindex(self._up_to)
        self.tokens = self._llama.tokenize(text[:end], *args, **kwargs)
        raise _PromptRead


def _scales_rope(options: dict[str, Any]) -> bool:
    """Does the caller say how positions beyond those of the training are to be read?"""
    return any(key.startswith(("rope_", "yarn_")) and options[key] for key in options)


# chat templates are rendered in a process of their own
_init = in_scope(Llama.__init__, Llama.__init__.__globals__ | {"llama_chat_format": formats})
