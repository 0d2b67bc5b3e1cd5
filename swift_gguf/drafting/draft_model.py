"""Drafts with another, smaller model (Leviathan et al., ICML 2023)."""

from __future__ import annotations

from pathlib import Path

from swift_gguf.drafting.passes import Passes
from swift_gguf.drafting.tree import Offer, Tree
from swift_gguf.errors import (
    ContextFullError,
    DecodeError,
    ModelError,
    StoppedError,
    UnsupportedModelError,
)
from swift_gguf.gguf import header as gguf_header
from swift_gguf.gguf.context_length import context_length
from swift_gguf.model import Model, ModelOptions
from swift_gguf.native import library
from swift_gguf.tokens import common_prefix

NAME = "draft-model"

MAX_VOCAB_DIFFERENCE = 128
"""llama.cpp's SPEC_VOCAB_MAX_SIZE_DIFFERENCE.  Vocabularies are padded to round sizes."""


class DraftModel(Passes):
    """A draft model with its own context, which follows the target's text.

    Raises:
        ModelError: the file is missing or damaged, or its vocabulary is not the target's.
        UnsupportedModelError: it cannot remove tokens from its cache.
    """

    def __init__(self, path: Path, target: Model) -> None:
        options = target.options
        model = Model(
            path,
            ModelOptions(
                n_ctx=_context(path, target.n_ctx),
                n_batch=options.n_batch,
                n_threads=target.n_threads,
                n_gpu_layers=options.n_gpu_layers,
                flash_attn=options.flash_attn,
            ),
            stop=target.stop,
        )
        try:
            if refusal := model.rollback_refusal:
                raise UnsupportedModelError(f"{path} cannot draft: {refusal}; use another model")
            _require_same_vocabulary(model, target)
        except BaseException:
            model.close()
            raise
        super().__init__(NAME, model)
        self._target = target

    def begin(self, pending: int) -> None:
        """Decodes the part of the target's text that its context lacks.

        After that, each draft token costs one pass.  After an error, the next draft starts again.
        """
        text, own = self._target.tokens, self.model.tokens
        common = common_prefix(text, own)
        if common == 0:
            self.model.clear()
        elif common < len(own):
            self.model.rollback(common)
        try:
            if common < len(text):
                self.model.decode(text[common:], n_outputs=0)
        except StoppedError:
            raise
        except (DecodeError, ContextFullError):  # unknown token, or full context
            return
        super().begin(pending)

    def offers(self, tree: Tree, node: int, k: int) -> list[Offer]:
        """See `Passes.offers`.  Tokens that only the draft model has are left out."""
        offers = super().offers(tree, node, k)
        return [offer for offer in offers if offer.token < self._target.n_vocab]

    def lag(self) -> int:
        """The approximate number of tokens that `begin` has to decode."""
        return max(0, self._target.n_past - self.model.n_past)

    def close(self) -> None:
        """Frees the model."""
        self.model.close()


def _context(path: Path, n_ctx: int) -> int:
    """The context size: the target's, or the draft model's trained length if that is less.

    The draft model does not draft beyond its context.
    """
    length = context_length(gguf_header.read(path))
    return n_ctx if length.scaled else min(n_ctx, length.trained or n_ctx)


def _require_same_vocabulary(draft: Model, target: Model) -> None:
    """Compares tokenizer type, special tokens and the texts of all tokens.

    llama.cpp's common_speculative_are_compatible makes the same checks.
    """
    api = library().api
    vocabularies = draft.vocab, target.vocab
    types = [api.llama_vocab_type(vocab) for vocab in vocabularies]
    if types[0] != types[1]:
        raise _different(draft, "its tokenizer has another type")
    for name in ("bos", "eos"):
        get = getattr(api, f"llama_vocab_{name}")
        if get(draft.vocab) != get(target.vocab):
            raise _different(draft, f"its {name} token is different")
    if abs(draft.n_vocab - target.n_vocab) > MAX_VOCAB_DIFFERENCE:
        raise _different(draft, f"it has {draft.n_vocab} tokens instead of {target.n_vocab}")
    for token in range(min(draft.n_vocab, target.n_vocab)):
        a, b = (api.llama_vocab_get_text(vocab, token) for vocab in vocabularies)
        if a != b:
            raise _different(draft, f"its token {token} is different")


def _different(draft: Model, how: str) -> ModelError:
    return ModelError(
        f"{draft.path} cannot draft for this model: {how}; use a smaller model of the same family"
    )
