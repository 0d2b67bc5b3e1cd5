"""What speculative sampling takes for a distribution is what the user's sampler draws from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from swift_gguf.errors import GrammarError, SamplingError
from swift_gguf.model import Model, ModelOptions
from swift_gguf.native.binding import library
from swift_gguf.sampling.sampling import Processor, Sampler, SamplingOptions, SpeculativeSampler
from swift_gguf.sampling.speculative import Distribution
from tests.conftest import N_GPU_LAYERS
from tests.fixtures.tiny_gguf import VOCAB

PROMPT = [72, 101, 108, 108, 111, 32, 72, 72]
AB = "root ::= [ab]+"
A, B = 97, 98  # ids of bytes are their values
PLAIN = SamplingOptions(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7)
PENALISED = replace(PLAIN, repeat_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Iterator[Model]:
    """Output rows 0 to 2 are those of the last three tokens of the prompt."""
    with Model(tiny("llama"), ModelOptions(n_ctx=256, n_gpu_layers=N_GPU_LAYERS)) as model:
        model.decode(PROMPT, n_outputs=3)
        yield model


def reference(
    logits: NDArray[np.float32],
    options: SamplingOptions,
    *,
    recent: Sequence[int] = (),
    allowed: Callable[[int], bool] = lambda token: True,
) -> NDArray[np.float64]:
    """The same in numpy, [n_vocab]; recent: tokens that penalties look at."""
    values = logits.astype(np.float64)
    values[[not allowed(token) for token in range(len(values))]] = -math.inf
    for token, count in Counter(recent).items():
        factor = options.repeat_penalty
        values[token] *= factor if values[token] <= 0 else 1 / factor
        values[token] -= count * options.frequency_penalty + options.presence_penalty
    if options.temperature <= 0:
        return np.asarray(np.arange(len(values)) == values.argmax(), np.float64)
    if options.top_k:
        values[np.argsort(-values)[options.top_k :]] = -math.inf
    p = softmax(values)
    if options.top_p < 1:
        order = np.argsort(-p)
        before = np.cumsum(p[order]) - p[order]
        values[order[before >= options.top_p]] = -math.inf
    values[p < options.min_p * p.max()] = -math.inf
    return softmax(values / options.temperature)


def softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = np.exp(values - values.max())
    return np.asarray(weights / weights.sum())


def dense(distribution: Distribution) -> NDArray[np.float64]:
    return distribution.of_all(np.arange(len(VOCAB), dtype=np.int32))


def assert_drawn_from(distribution: Distribution, tokens: Sequence[int]) -> None:
    """Pearson's test; tokens of which less than 5 are expected count as one."""
    n, counts = len(tokens), Counter(tokens)
    assert set(counts) <= set(distribution.ids.tolist())
    expected = distribution.p * n
    found = np.array([counts[token] for token in distribution.ids.tolist()])
    rare = expected < 5
    cells = [*zip(found[~rare], expected[~rare], strict=True)]
    if expected[rare].sum() > 5:
        cells.append((found[rare].sum(), expected[rare].sum()))
    freedom = len(cells) - 1
    assert freedom >= 4, "too few to tell"
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    # its mean is `freedom`, its variance twice that: four sigma, and a little for the skew
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4


def check(processor: Processor, model: Model, options: SamplingOptions, **known: Any) -> None:
    for row in range(3):
        expected = reference(model.logits(row), options, **known)
        found = processor.distribution(model, row)
        assert dense(found) == pytest.approx(expected, abs=1e-5)
        assert found.ids.tolist() == np.flatnonzero(expected > 0).tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"top_k": 1},
        {"top_k": 12},
        {"top_k": 200},
        {"top_k": 10_000},
        {"top_p": 0.6},
        {"top_p": 0.97},
        {"min_p": 0.05},
        {"min_p": 0.5},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    ],
)
def test_each_part_against_numpy(model: Model, changes: dict[str, Any]) -> None:
    options = replace(PLAIN, **changes)
    with Processor.build(model, options) as processor:
        check(processor, model, options)


def test_the_parts_that_are_tested_do_something(model: Model) -> None:
    sizes = []
    for changes in ({}, {"top_k": 200}, {"top_p": 0.97}, {"min_p": 0.05}, {"top_k": 1}):
        with Processor.build(model, replace(PLAIN, **changes)) as processor:
            sizes.append(len(processor.distribution(model, 0).ids))
    assert sizes[0] == model.n_vocab
    assert sizes[-1] == 1
    assert all(1 < size < model.n_vocab for size in sizes[1:-1])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("last_n", [-1, 0, 2, 64])
def test_penalties_see_the_prompt_and_what_is_accepted(
    model: Model, temperature: float, last_n: int
) -> None:
    options = replace(PENALISED, temperature=temperature, repeat_last_n=last_n)

    def recent(tokens: list[int]) -> list[int]:
        return tokens if last_n < 0 else tokens[len(tokens) - min(last_n, len(tokens)) :]

    with Processor.build(model, options, prompt=PROMPT) as processor:
        check(processor, model, options, recent=recent(PROMPT))
        processor.accept(33)
        processor.accept(33)
        check(processor, model, options, recent=recent([*PROMPT, 33, 33]))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_grammar_excludes(model: Model, temperature: float) -> None:
    options = replace(PLAIN, temperature=temperature, grammar=AB)
    with Processor.build(model, options) as processor:
        check(processor, model, options, allowed=lambda token: token in (A, B))
        processor.accept(A)
        ends = [token for token in range(len(VOCAB)) if model.is_eog(token)]
        assert ends
        check(processor, model, options, allowed=lambda token: token in (A, B, *ends))


def test_asking_changes_nothing(model: Model) -> None:
    with Processor.build(model, PENALISED, prompt=PROMPT) as processor:
        first = dense(processor.distribution(model, 1))
        processor.distribution(model, 0)
        assert (dense(processor.distribution(model, 1)) == first).all()


def test_forks_do_not_disturb_each_other(model: Model) -> None:
    grammar = 'root ::= "a" [bc] | "b" [de]'
    options = replace(PENALISED, grammar=grammar)

    def check_after(processor: Processor, path: list[int], allowed: str) -> None:
        check(processor, model, options, recent=[*PROMPT, *path], allowed=bytes_in(allowed))

    with Processor.build(model, options, prompt=PROMPT) as root:
        with root.fork() as left, root.fork() as right:
            left.accept(A)
            right.accept(B)
            check_after(right, [B], "de")
            with left.fork() as below:
                below.accept(ord("c"))
                check_after(left, [A], "bc")
            check_after(left, [A], "bc")
        check_after(root, [], "ab")
        root.accept(B)
        check_after(root, [B], "de")


def bytes_in(text: str) -> Callable[[int], bool]:
    return set(text.encode()).__contains__


def test_a_fork_outlives_what_it_came_from(model: Model) -> None:
    options = replace(PENALISED, grammar=AB)
    with Processor.build(model, options, prompt=PROMPT) as root:
        fork = root.fork()
    with fork:
        check(fork, model, options, recent=PROMPT, allowed=bytes_in("ab"))


@pytest.mark.parametrize(
    "options",
    [
        replace(PLAIN, temperature=0.7),
        SamplingOptions(temperature=3.0, top_k=40, top_p=0.99, min_p=0.001),
        replace(PENALISED, top_k=20, grammar="root ::= [a-z]+"),
    ],
)
def test_the_users_sampler_draws_from_it(model: Model, options: SamplingOptions) -> None:
    with Processor.build(model, options) as processor:
        distribution = processor.distribution(model, 0)
    n = 3000
    tokens = []
    # each draw with a sampler of its own, or penalties and grammar would move on
    for seed in range(n):
        with Sampler(model, replace(options, seed=seed)) as sampler:
            tokens.append(sampler.sample(model, 0))
    assert_drawn_from(distribution, tokens)


def test_greedy_is_the_users_sampler_to_the_token(model: Model) -> None:
    options = replace(PENALISED, temperature=0.0)
    with (
        Sampler(model, options, prompt=PROMPT) as plain,
        SpeculativeSampler(model, options, prompt=PROMPT) as drawn,
    ):
        for row in (0, 1, 2, 2, 2, 2, 1):
            assert drawn.sample(model, row) == plain.sample(model, row)


def test_of_two_equal_logits_greedy_takes_the_first(model: Model) -> None:
    logits = np.zeros(model.n_vocab, np.float32)
    logits[[40, 50]] = 3.0
    with Processor.build(model, replace(PLAIN, temperature=0.0)) as processor:
        ids, values = library().candidates(processor._chain, logits)
    assert ids[np.isfinite(values)].tolist() == [40]


def test_candidates_leave_the_logits_they_are_given(model: Model) -> None:
    logits = model.logits(0)
    with Processor.build(model, replace(PLAIN, temperature=0.5, top_k=3)) as processor:
        ids, values = library().candidates(processor._chain, logits)
    assert (logits == model.logits(0)).all()
    assert (len(ids), ids.dtype, values.dtype) == (3, np.int32, np.float32)
    assert values.tolist() == (logits[ids] / np.float32(0.5)).tolist()


def test_a_grammar_that_nothing_follows_is_an_error(model: Model) -> None:
    # only ends of generation have a logit, and the grammar wants a letter first
    ends = [token for token in range(len(VOCAB)) if model.is_eog(token)]
    options = replace(PLAIN, grammar=AB, top_k=4)
    with Processor.build(model, options) as processor:
        logits = np.full(model.n_vocab, -np.inf, np.float32)
        logits[ends] = 1.0
        with pytest.raises(SamplingError, match="check the grammar"):
            Distribution.softmax(*library().candidates(processor._chain, logits))


def test_a_grammar_that_does_not_parse_is_refused(model: Model) -> None:
    for kind in (Processor.build, SpeculativeSampler, Sampler):
        with pytest.raises(GrammarError, match="not valid GBNF"):
            kind(model, replace(PLAIN, grammar="root ::= ["))


# -- the sampler of the engine ---------------------------------------------------------------------


def run(model: Model, options: SamplingOptions) -> list[int]:
    """A made-up generation: row 0 drafts and rows 1 and 2 judge, in a chain of trees."""
    tokens = []
    with SpeculativeSampler(model, options, prompt=PROMPT) as sampler:
        tokens.append(sampler.sample(model, 2))
        for _ in range(6):
            q = sampler.proposal(model, 0, [])
            children = sampler.draw(q, 3)
            below = sampler.proposal(model, 0, children[:1])
            leaves = sampler.draw(below, 2)
            tokens.append(sampler.choose(model, 1, children, q))
            if tokens[-1] == children[0]:
                tokens.append(sampler.choose(model, 2, leaves, below))
    return tokens


def test_a_seed_determines_every_token(model: Model) -> None:
    options = SamplingOptions(temperature=1.5, repeat_penalty=1.2, grammar="root ::= [a-z]+")
    assert run(model, replace(options, seed=1)) == run(model, replace(options, seed=1))
    assert run(model, replace(options, seed=1)) != run(model, replace(options, seed=2))


def test_a_proposal_sees_its_path_and_leaves_the_state(model: Model) -> None:
    options = replace(PENALISED, grammar='root ::= "a" [bc] | "b" [de]')
    with SpeculativeSampler(model, options, prompt=PROMPT) as sampler:
        for path, allowed in (([A], "bc"), ([B], "de"), ([], "ab")):
            q = sampler.proposal(model, 1, path)
            expected = reference(
                model.logits(1), options, recent=[*PROMPT, *path], allowed=bytes_in(allowed)
            )
            assert dense(q) == pytest.approx(expected, abs=1e-5)
        first = sampler.choose(model, 1, [], None)
        assert set(sampler.proposal(model, 1, []).ids.tolist()) == set(
            b"bc" if first == A else b"de"
        )


def test_what_is_emitted_follows_the_target(model: Model) -> None:
    """Row 0 drafts for row 2, which judges; no state, so that one sampler serves for all draws."""
    options = replace(PLAIN, temperature=4.0)
    tokens, accepted = [], 0
    with Processor.build(model, options) as processor:
        p = processor.distribution(model, 2)
    with SpeculativeSampler(model, options) as sampler:
        q = sampler.proposal(model, 0, [])
        for _ in range(3000):
            children = sampler.draw(q, 3)
            tokens.append(sampler.choose(model, 2, children, q))
            accepted += tokens[-1] in children
    assert_drawn_from(p, tokens)
    assert 100 < accepted < 2900
    with pytest.raises(AssertionError):  # the test can tell them apart
        assert_drawn_from(q, tokens)


def test_a_real_vocabulary_takes_milliseconds() -> None:
    """152 064 tokens: a Python loop over them would take a hundred."""
    logits = np.random.default_rng(0).normal(size=152_064).astype(np.float32)
    api = library().api
    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    try:
        seconds = []
        for _ in range(5):
            start = perf_counter()
            Distribution.softmax(*library().candidates(chain, logits))
            seconds.append(perf_counter() - start)
    finally:
        api.llama_sampler_free(chain)
    assert min(seconds) < 0.05
