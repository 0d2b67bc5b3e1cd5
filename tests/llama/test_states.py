"""What a llama holds between answers: prefixes, saved states, caches, and what breaks off."""

from __future__ import annotations

import gc
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.llama import Llama
from tests.llama.conftest import PlainLlama, outcome, without_ids

from llama_cpp import (  # isort: skip
    LlamaDiskCache,
    LlamaRAMCache,
    StoppingCriteriaList,
)

PROMPT = "to be or not to be, to be or not to be, to be or"

Llamas = tuple[PlainLlama, Llama]


@pytest.fixture(scope="module")
def flash_attn() -> bool:
    """Trees leave gaps."""
    return True


@pytest.fixture
def both(plain: PlainLlama, swift: Llama) -> Llamas:
    for llama in (plain, swift):
        llama.reset()
        llama.set_cache(None)
    return plain, swift


def say(llama: PlainLlama, prompt: Any, **values: Any) -> Any:
    return without_ids(llama.create_completion(prompt, **({"max_tokens": 20, "seed": 1} | values)))


def text_of(llama: PlainLlama) -> list[int]:
    """What a llama believes to hold."""
    return [int(token) for token in llama.input_ids[: llama.n_tokens]]


def check_same(both: Llamas, action: Callable[..., Any], *args: Any, **values: Any) -> Any:
    plain, swift = (outcome(partial(action, llama, *args, **values)) for llama in both)
    assert plain == swift
    assert text_of(both[0]) == text_of(both[1])
    return plain


def test_the_next_prompt_goes_on_where_the_last_answer_ended(both: Llamas) -> None:
    check_same(both, say, PROMPT)
    check_same(both, lambda llama: say(llama, [*text_of(llama), 40, 41, 42]))
    assert both[1].speculation.stats.prompt_n == 3, "what the context held was decoded again"
    check_same(both, say, PROMPT[:20])
    check_same(both, say, "something else")


def test_the_same_prompt_again(both: Llamas) -> None:
    for max_tokens in (1, 1, 20, 20):
        check_same(both, say, PROMPT, max_tokens=max_tokens)


def test_closing_a_stream_early(both: Llamas) -> None:
    for n in range(1, 12):

        def begin(llama: PlainLlama, n: int = n) -> Any:
            stream = llama.create_completion(PROMPT, max_tokens=30, seed=n, stream=True)
            chunks = [without_ids(chunk) for chunk in itertools.islice(stream, n)]
            stream.close()
            return chunks

        check_same(both, begin)
        check_same(both, say, PROMPT + " x", max_tokens=5)


def test_a_stream_that_is_left_alone(both: Llamas) -> None:
    def leave(llama: PlainLlama) -> Any:
        stream = llama.create_completion(PROMPT, max_tokens=30, seed=3, stream=True)
        next(stream)
        next(stream)
        answer = say(llama, PROMPT + " y")
        del stream
        gc.collect()
        return answer

    answers = [leave(llama) for llama in both]
    assert answers[0] == answers[1]
    assert say(both[0], PROMPT) == say(both[1], PROMPT)


def test_tokens_of_generate(both: Llamas) -> None:
    def tokens(llama: PlainLlama) -> list[int]:
        prompt = llama.tokenize(PROMPT.encode())
        stream = llama.generate(prompt, temp=0.0)
        found = list(itertools.islice(stream, 25))
        stream.close()
        return found

    check_same(both, tokens)
    check_same(both, tokens)


def test_between_two_tokens_everything_is_as_ever(both: Llamas) -> None:
    """Whoever looks at a llama while it generates sees the text before the token that is out."""

    def look(llama: PlainLlama) -> Any:
        seen = []
        prompt = llama.tokenize(PROMPT.encode())
        for token in itertools.islice(llama.generate(prompt, temp=0.0), 20):
            seen.append((token, llama.n_tokens, text_of(llama)))
        return seen

    check_same(both, look)


def test_a_state_saved_between_two_tokens(both: Llamas) -> None:
    def save(llama: PlainLlama) -> Any:
        prompt = llama.tokenize(PROMPT.encode())
        stream = llama.generate(prompt, temp=0.0)
        before = list(itertools.islice(stream, 7))
        state = llama.save_state()
        after = list(itertools.islice(stream, 7))
        stream.close()
        llama.load_state(state)
        again = list(itertools.islice(llama.generate([*prompt, *before], temp=0.0), 7))
        return before, after, again

    _, after, again = check_same(both, save)
    assert after == again


def test_tokens_that_are_sent_to_a_generator_are_verified(both: Llamas) -> None:
    """llama_cpp takes them for drafts."""
    prompt = both[0].tokenize(PROMPT.encode())
    expected = list(itertools.islice(both[0].generate(prompt, temp=0.0), 20))
    for guess in (expected[2:6], [5, 6, 7]):
        stream = both[1].generate(prompt, temp=0.0)
        found = [next(stream), next(stream)]
        found.append(stream.send(guess))
        found += itertools.islice(stream, 17)
        stream.close()
        assert found == expected


def test_states(both: Llamas) -> None:
    def scenario(llama: PlainLlama) -> Any:
        first = say(llama, PROMPT)
        state = llama.save_state()
        other = say(llama, "quite another text, quite another", seed=4)
        llama.load_state(state)
        return first, other, text_of(llama), say(llama, PROMPT + ", and", seed=9)

    check_same(both, scenario)


def test_a_state_after_trees_that_left_gaps(both: Llamas) -> None:
    """Rejected branches leave cells that nobody reads; they are not saved, and the text goes on."""
    plain, swift = both
    assert swift.speculation.model
    for seed in range(20):
        say(swift, PROMPT, max_tokens=40, seed=seed)
        if swift.speculation.model.cells.n_parked:
            break
    else:
        pytest.fail("no tree left a gap")
    say(plain, PROMPT, max_tokens=40, seed=seed)
    states = [llama.save_state() for llama in both]
    assert states[0].llama_state_size == states[1].llama_state_size
    assert swift.speculation.model.cells.n_parked == 0
    check_same(both, lambda llama: llama.create_completion(text_of(llama), seed=1)["choices"])
    plain.load_state(states[0])
    swift.load_state(states[1])
    check_same(both, lambda llama: llama.create_completion(text_of(llama), seed=2)["choices"])


def test_a_small_window_goes_on_after_its_state_was_saved(
    tiny: Callable[..., Path], open_llama: Callable[..., Any]
) -> None:
    """A cache of the window's size fills cells anew that the window has passed: none is held."""
    path = str(tiny("gemma3"))
    options = {"n_ctx": 1024, "n_batch": 64, "n_ubatch": 64, "swa_full": False}
    llamas = [open_llama(kind, path, **options) for kind in (PlainLlama, Llama)]
    text = [5 + i % 200 for i in range(700)]
    for llama in llamas:
        llama.eval(text[:400])
        llama.save_state()
        llama.eval(text[400:])
    check_same(tuple(llamas), lambda llama: say(llama, [*text_of(llama), 9], max_tokens=8))


def test_a_load_that_is_interrupted_leaves_nothing(
    both: Llamas, monkeypatch: pytest.MonkeyPatch
) -> None:
    swift = both[1]
    assert swift.speculation.model
    check_same(both, say, PROMPT)
    state = swift.save_state()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(swift.speculation.model, "assume", interrupted)
        with pytest.raises(KeyboardInterrupt):
            swift.load_state(state)
    assert swift.n_tokens == swift.speculation.model.n_past == 0
    both[0].reset()
    check_same(both, say, PROMPT, seed=7)


def test_states_go_from_one_class_to_the_other(
    both: Llamas, open_llama: Callable[..., Any]
) -> None:
    plain, swift = open_llama(PlainLlama, flash_attn=True), both[1]
    expected = say(plain, PROMPT + " the end")
    plain.reset()
    say(plain, PROMPT)
    swift.load_state(plain.save_state())
    assert say(swift, PROMPT + " the end") == expected
    swift.reset()
    say(swift, PROMPT)
    plain.reset()
    plain.load_state(swift.save_state())
    assert say(plain, PROMPT + " the end") == expected


def test_a_sliding_window_after_loading(
    tiny: Callable[..., Path], open_llama: Callable[..., Any]
) -> None:
    """llama.cpp fills cells anew that the window has passed; a shorter prompt needs them again."""
    path = str(tiny("gemma3", quant="Q8_0"))
    fresh, llama = open_llama(path=path), open_llama(path=path)
    for seed in range(3):
        answers = []
        for each in (fresh, llama):
            say(each, PROMPT * 3, seed=seed)
            if each is llama:
                each.load_state(each.save_state())
                each.load_state(each.save_state())
            first = say(each, [*text_of(each), 40, 41], max_tokens=40, seed=seed)
            answers.append((first, say(each, text_of(each)[:30], max_tokens=40, seed=seed)))
        assert answers[0] == answers[1]


def test_a_state_is_small_and_can_be_pickled(both: Llamas) -> None:
    swift = both[1]
    say(swift, PROMPT)
    state = swift.save_state()
    assert state.scores.size == 1
    data = pickle.dumps(state)
    assert len(data) < state.llama_state_size + 10_000
    swift.reset()
    swift.load_state(pickle.loads(data))
    assert text_of(swift)[: swift.n_tokens] == state.input_ids[: state.n_tokens].tolist()


def test_a_state_that_cannot_be_loaded(both: Llamas) -> None:
    swift = both[1]
    expected = say(swift, PROMPT)
    state = swift.save_state()
    state.llama_state = state.llama_state[: len(state.llama_state) // 2]
    state.llama_state_size = len(state.llama_state)
    with pytest.raises(RuntimeError):
        swift.load_state(state)
    assert say(swift, PROMPT) == expected


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_caches(both: Llamas, tmp_path: Any, kind: str) -> None:
    for llama in both:
        folder = tmp_path / type(llama).__name__
        llama.set_cache(LlamaRAMCache() if kind == "memory" else LlamaDiskCache(str(folder)))
    prompts = [PROMPT, "quite another text", PROMPT + ", that"]
    for seed, prompt in enumerate(prompts):
        check_same(both, say, prompt, seed=seed)
        check_same(both, say, prompt, stream=True)
    check_same(both, say, PROMPT, echo=True)


def test_errors_of_the_callers_own(both: Llamas) -> None:
    class MineError(Exception):
        pass

    for n in (1, 2, 5, 9):

        def fail(input_ids: Any, _: Any, n: int = n) -> bool:
            if len(input_ids) >= 22 + n:
                raise MineError
            return False

        criteria = StoppingCriteriaList([fail])
        found = check_same(both, say, PROMPT, stopping_criteria=criteria, seed=2)
        assert found is MineError
        check_same(both, say, PROMPT, seed=3)


def test_an_error_thrown_into_a_stream(both: Llamas) -> None:
    def interrupt(llama: PlainLlama) -> Any:
        stream = llama.create_completion(PROMPT, seed=3, stream=True, max_tokens=30)
        for _ in range(5):
            next(stream)
        with pytest.raises(KeyboardInterrupt):
            stream.throw(KeyboardInterrupt)
        return llama.n_tokens, say(llama, PROMPT)

    check_same(both, interrupt)


def test_a_full_context(both: Llamas, open_llama: Callable[..., Any]) -> None:
    llamas = [open_llama(kind, n_ctx=256) for kind in (PlainLlama, Llama)]

    def fill(llama: PlainLlama) -> Any:
        long = [20 + i % 7 for i in range(250)]
        answer = say(llama, long, max_tokens=50)
        assert answer["usage"]["total_tokens"] == 256
        too_long = outcome(lambda: say(llama, [20] * 256))
        return answer, too_long, say(llama, PROMPT)

    _, too_long, _ = check_same((llamas[0], llamas[1]), fill)
    assert too_long is ValueError
    for llama in llamas:
        endless = llama.generate([20 + i % 7 for i in range(240)], temp=0.0)
        with pytest.raises((RuntimeError, ValueError)):
            list(itertools.islice(endless, 100))
        assert llama.n_tokens == 256
    check_same((llamas[0], llamas[1]), say, PROMPT)


def test_tokens_that_do_not_exist(both: Llamas) -> None:
    for token in (-1, both[0].n_vocab()):
        assert outcome(partial(say, both[0], [token, 20])) is RuntimeError
        with pytest.raises(RuntimeError):
            say(both[1], [20, token, 20])
    for llama in both:
        llama.reset()
    check_same(both, say, PROMPT)


def test_eval_and_sample(both: Llamas) -> None:
    def by_hand(llama: PlainLlama) -> Any:
        llama.reset()
        llama.eval(llama.tokenize(PROMPT.encode()))
        found = []
        for _ in range(8):
            found.append(llama.sample(temp=0.0))
            llama.eval([found[-1]])
        return found

    check_same(both, by_hand)
    logits = [llama.eval_logits[-1] for llama in both]
    assert logits[0] == logits[1]


def test_many_answers_in_a_row(both: Llamas) -> None:
    """Of every length, with prompts that share more or less."""
    prompts = [PROMPT[: 10 + 3 * i] for i in range(12)]
    for seed, prompt in enumerate(prompts + prompts[::-1]):
        check_same(both, say, prompt, seed=seed, max_tokens=3 + seed)
