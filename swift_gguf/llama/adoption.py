"""Making a context of llama_cpp's one that can speculate, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

from swift_gguf.errors import ModelError
from swift_gguf.model import Model, ModelOptions
from swift_gguf.model.loading import Loaded, cause, generates_text, refuse_if_stopped
from swift_gguf.native import StopFlag, library
from swift_gguf.sampling import draw, grammar_sampler
from swift_gguf.schemas.matching import Matcher

ALL_LAYERS = 0x7FFFFFFF
"""llama_cpp's n_gpu_layers for -1."""
AUTO = -1
"""LLAMA_FLASH_ATTN_TYPE_AUTO"""


_Method = TypeVar("_Method", bound=Callable[..., Any])


def instead_of(original: Any) -> Callable[[_Method], _Method]:
    """`functools.wraps`, which hides from type checkers that what it wraps is a method."""

    def wrapped(method: _Method) -> _Method:
        wraps(original)(method)
        return method

    return wrapped


def refusal(model: Any, options: dict[str, Any]) -> str:
    """Why a model that llama_cpp loaded with these options is left to it; empty if it is not."""
    from llama_cpp.llama_chat_format import Llava15ChatHandler, MTMDChatHandler

    api = library().api
    if options.get("vocab_only"):
        return "only the vocabulary is loaded"
    if options.get("draft_model") is not None:
        return "the draft_model drafts"
    if isinstance(options.get("chat_handler"), (Llava15ChatHandler, MTMDChatHandler)):
        return "images are decoded by llama_cpp alone"
    if api.llama_model_has_encoder(model):
        return "the model does not generate text token by token"
    has_state = api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model)
    if has_state and options.get("embedding"):
        return "the model has a running state, and is loaded for embeddings"
    return ""


def adopt(
    llama: Any,
    *,
    flash_attn: bool | None,
    sidecar: str | os.PathLike[str] | None,
    stop: StopFlag,
) -> Model | None:
    """A llama's model and context as our `Model`; None if it does not generate text.

    sidecar: as `Llama` has it.

    Raises:
        SidecarError: the sidecar that was named cannot be used.
    """
    loaded = Loaded(llama.model, llama.ctx, llama.n_threads, llama.n_ctx(), is_ours=False)
    if not generates_text(loaded):
        return None
    n_gpu_layers = llama.model_params.n_gpu_layers
    options = ModelOptions(
        n_ctx=llama.n_ctx(),
        n_batch=llama.n_batch,
        n_threads=llama.n_threads,
        n_gpu_layers=-1 if n_gpu_layers == ALL_LAYERS else n_gpu_layers,
        flash_attn=flash_attn,
        sidecar="auto" if sidecar is None else None if sidecar == "none" else Path(sidecar),
    )
    return Model(llama.model_path, options, loaded=loaded, stop=stop)


@contextmanager
def our_errors(path: str | os.PathLike[str], stop: StopFlag) -> Iterator[Sequence[str]]:
    """What llama.cpp logs; one line with its reason where llama_cpp only says that it failed.

    Raises:
        StoppedError: it failed because the flag is up.
    """
    with library().messages() as messages:
        try:
            yield messages
        except ValueError as error:
            if not str(error).startswith("Failed to "):
                raise
            refuse_if_stopped(stop)
            raise ModelError(f"{path} cannot be loaded: {cause(messages)}") from error


def check_grammar(vocab: Any, grammar: Any) -> None:
    """llama_cpp would crash on a `LlamaGrammar` that does not parse.

    Raises:
        GrammarError: it does not.
    """
    if grammar is not None:
        library().api.llama_sampler_free(grammar_sampler(vocab, grammar._grammar))


def guarded(sampler: Any, n_vocab: int, matcher: Matcher | None = None) -> Any:
    """A `LlamaSampler` with a grammar, that raises GrammarError where it would crash.

    matcher: rules tokens out before all else; logits processors see that.
    """
    chain = sampler.sampler

    def sample(ctx: Any, idx: int = -1) -> int:
        return draw(chain, library().logits(ctx.ctx, idx, n_vocab), matcher)

    sampler.sample = sample
    return sampler


def in_scope(function: Any, scope: dict[str, Any]) -> Callable[..., Any]:
    """A function of another module that finds what it names in a scope of ours."""
    made = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made
