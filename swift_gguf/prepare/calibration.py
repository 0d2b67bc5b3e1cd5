"""Calibration text: the model's own answers.

A draft has to predict the model's own tokens, so the relevant activations are those of its own
answers, not of other text.  Several answers to a prompt are drawn in parallel, as branches of a
tree: a pass over eight tokens costs far less than eight passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from swift_gguf.model import Model
from swift_gguf.prepare.texts import Text

N_ANSWERS = 8  # parallel answers to a prompt
TEMPERATURE = 0.8
CANDIDATES = 40  # top-k of the draw


def answer(
    model: Model,
    prompt: Sequence[int],
    *,
    n_tokens: int,
    rng: np.random.Generator,
    n_answers: int = N_ANSWERS,
    on_pass: Callable[[int], None] = lambda n: None,
) -> Text:
    """Draws answers of at most `n_tokens` tokens each.  Clears the context before and after.

    on_pass: called after every pass with the number of tokens that it added.
    """
    model.clear()
    model.decode(prompt, exact=False)
    tokens = [_draw(model, 0, rng) for _ in range(n_answers)]
    answers: list[list[int]] = [[] for _ in tokens]
    open_answers, parents = list(range(n_answers)), [-1] * n_answers
    n_nodes = 0
    while open_answers:
        for i, token in zip(open_answers, tokens, strict=True):
            answers[i].append(token)
        going_on = [
            k
            for k, (i, token) in enumerate(zip(open_answers, tokens, strict=True))
            if not model.is_eog(token) and len(answers[i]) < n_tokens
        ]
        on_pass(len(tokens))
        if not going_on or len(going_on) > model.room:
            break
        model.decode_tree([tokens[k] for k in going_on], [parents[k] for k in going_on])
        open_answers = [open_answers[k] for k in going_on]
        parents = list(range(n_nodes, n_nodes + len(going_on)))
        n_nodes += len(going_on)
        tokens = [_draw(model, row, rng) for row in range(len(going_on))]
    model.clear()
    return Text(prompt=list(prompt), answers=answers)


def _draw(model: Model, row: int, rng: np.random.Generator) -> int:
    tokens, probabilities = model.top(row, CANDIDATES)
    weights = np.asarray(probabilities) ** (1 / TEMPERATURE)
    return int(rng.choice(tokens, p=weights / weights.sum()))


def replay(model: Model, text: Text) -> Iterator[tuple[int, int]]:
    """Decodes the prompt, and then each answer after it; all tokens get outputs.

    Yields, after each batch, the number of the answer (-1: the prompt) and the batch size.
    """
    model.clear()
    for number, tokens in enumerate([text.prompt, *text.answers], start=-1):
        for start in range(0, len(tokens), model.n_batch):
            piece = tokens[start : start + model.n_batch]
            model.decode(piece, n_outputs=len(piece), exact=False)
            yield number, len(piece)
        if number >= 0:
            model.rollback(len(text.prompt))
    model.clear()
