"""`SwiftDraftModel`: drafts for a `llama_cpp.Llama` whose class cannot be changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp.llama_speculative import LlamaDraftModel
from numpy.typing import NDArray

from swift_gguf.drafting.ngram import NGram
from swift_gguf.drafting.recycling import Recycling
from swift_gguf.drafting.tree import Offer
from swift_gguf.gguf.identity import profile_key
from swift_gguf.learning import Store
from swift_gguf.planning.calibration import Calibration
from swift_gguf.planning.economy import PRIORS
from swift_gguf.tokens import common_prefix

SEEN_ONCE = 0.5
"""A successor that was seen in a text, not in the target's logits, is given this probability."""


class SwiftDraftModel(LlamaDraftModel):  # type: ignore[misc]
    """Guesses from what the text has said before and what followed a token elsewhere.

    All it sees is token ids; llama_cpp verifies a chain of them in one pass, with its own kernels
    and `logits_all`.  `SwiftLlama` knows costs and logits, drafts by the model itself, too, and is
    the better choice wherever the class can be changed.

    num_pred_tokens: draft tokens at most.
    p_min: drafts end where the whole of it is less likely to be right than that, by what became of
        earlier ones.
    model_path: the model's file; successors that `SwiftLlama` or `swift-gguf` have learned of it
        are used, too.
    """

    def __init__(
        self,
        *,
        num_pred_tokens: int = 10,
        p_min: float = 0.4,
        model_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.num_pred_tokens = num_pred_tokens
        self.p_min = p_min
        self._calibration = Calibration(PRIORS)
        self._ngram = NGram()
        self._recycling = _known_successors(Path(model_path)) if model_path else Recycling()
        self._text: list[int] = []
        self._offered: list[tuple[int, list[Offer]]] = []  # the latest draft, and what else

    def __call__(self, input_ids: NDArray[np.intc], /, **_: Any) -> NDArray[np.intc]:
        """Draft tokens after `input_ids`; none where nothing is likely enough."""
        text: list[int] = input_ids.tolist()
        self._learn(text)
        self._text = text
        self._ngram.follow(text)
        self._recycling.follow(text)
        self._offered = []
        path: list[int] = []
        joint = 1.0
        while len(path) < self.num_pred_tokens and (offers := self._offers(path)):
            best = max(offers, key=self._acceptance)
            joint *= self._acceptance(best)
            self._offered.append((best.token, offers))
            if joint < self.p_min:  # not drafted, but its fate tells how likely it was
                break
            path.append(best.token)
        return np.array(path, np.intc)

    def _offers(self, path: list[int]) -> list[Offer]:
        return [
            Offer(offer.token, offer.probability, lookup.name)
            for lookup in (self._ngram, self._recycling)
            for offer in lookup.offers(path)
        ]

    def _acceptance(self, offer: Offer) -> float:
        return self._calibration.acceptance_of(offer)

    def _learn(self, text: list[int]) -> None:
        """What became of the latest draft, and what follows what."""
        common = common_prefix(self._text, text)
        if common == len(self._text):
            new = text[common:]
            self._calibration.passed(len(new))
            for (guess, offers), token in zip(self._offered, new, strict=False):
                self._calibration.judge(offers, token)
                if guess != token:
                    break
        for i in range(max(common, 1), len(text)):
            previous = text[i - 2] if i > 1 else None
            self._recycling.learn(text[i - 1], [text[i]], [SEEN_ONCE], previous=previous)


def _known_successors(model: Path) -> Recycling:
    profile = Store().load(profile_key(model, None))
    known = list(profile.recycling) if profile else []
    return Recycling.from_rows(known, n_vocab=1 << 31)
