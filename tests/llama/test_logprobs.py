"""Log-probabilities against a plain forward pass; echoes; the start token; gaps to fill."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swift_gguf.errors import UnsupportedModelError
from swift_gguf.llama import Llama
from tests.fixtures.tiny_gguf import GAP_TOKENS, VOCAB
from tests.llama.conftest import ALWAYS, LOADING, PlainLlama, joined

from llama_cpp import LlamaGrammar  # isort: skip

TEXT = "the cat sat on the mat, naïve 東京 🙂, the cat sat"
BOS = VOCAB.endoftext


@pytest.fixture(scope="module", params=[False, True], ids=["no start token", "start token"])
def both(tiny: Callable[..., Path], request: Any) -> Iterator[tuple[PlainLlama, Llama]]:
    """Models that fill gaps, and of which the second puts a start token before a text."""
    path = str(tiny("llama", quant="Q8_0", bos=request.param, gaps=True))
    llamas = (
        PlainLlama(path, logits_all=True, **LOADING),
        Llama(path, speculation=ALWAYS, **LOADING),
    )
    yield llamas
    for llama in llamas:
        llama.close()


def ids(llama: PlainLlama, text: str) -> list[int]:
    """Without a start token."""
    return list(llama.tokenize(text.encode(), add_bos=False, special=True))


def rows(plain: PlainLlama, tokens: list[int]) -> Any:
    """Log-probabilities, [n_tokens, n_vocab]: row i is of what follows token i."""
    plain.reset()
    plain.eval(tokens)
    return np.asarray(PlainLlama.logits_to_logprobs(plain.scores[: len(tokens)]))


def parts(llama: PlainLlama, prompt: Any, **options: Any) -> dict[str, Any]:
    """A completion's choice; of a stream, the chunks' together."""
    values: dict[str, Any] = {"temperature": 0.0, "seed": 1, **options}
    answer: Any = llama.create_completion(prompt, **values)
    chunks = list(answer) if values.get("stream") else [answer]
    choices = [chunk["choices"][0] for chunk in chunks]
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    return {
        "text": "".join(choice["text"] for choice in choices),
        "finish_reason": choices[-1]["finish_reason"],
        "logprobs": {key: [one for each in logprobs for one in each[key]] for key in logprobs[0]}
        if logprobs
        else None,
    }


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", ["text", "ids", "ids with a start token"])
def test_an_echo_is_scored_token_by_token(
    both: tuple[PlainLlama, Llama], kind: str, stream: bool
) -> None:
    plain, swift = both
    written = ids(swift, TEXT)
    if kind == "ids with a start token":
        written = [BOS, *written]
    before = [BOS] if kind == "text" and swift._model.add_bos_token() else []
    prompt = TEXT if kind == "text" else written
    said = parts(swift, prompt, echo=True, logprobs=3, max_tokens=4, stream=stream)
    shown = ("<|endoftext|>" if kind == "ids with a start token" else "") + TEXT
    assert said["text"].startswith(shown)
    logprobs = said["logprobs"]
    assert {len(column) for column in logprobs.values()} == {len(written) + 4}

    # what was generated, by what a greedy pass says
    tokens = before + written
    for _ in range(4):
        tokens.append(int(np.argmax(rows(plain, tokens)[-1])))
    expected = rows(plain, tokens)
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for i in range(1, len(written) + 4):
        position = len(before) + i
        row, token = expected[position - 1], tokens[position]
        assert logprobs["token_logprobs"][i] == pytest.approx(row[token], abs=1e-6)
        top = sorted(logprobs["top_logprobs"][i].values(), reverse=True)[:3]
        assert top == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-6)
        assert logprobs["tokens"][i] in logprobs["top_logprobs"][i]
    # offsets are of characters, in what is shown
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert said["text"][offset:].startswith(token)


def test_an_echo_without_scores_and_of_no_tokens(both: tuple[PlainLlama, Llama]) -> None:
    swift = both[1]
    for prompt in (TEXT, ids(swift, TEXT)):
        for stream in (False, True):
            said = parts(swift, prompt, echo=True, max_tokens=3, stream=stream)
            plain = parts(swift, prompt, max_tokens=3)
            assert said["text"] == TEXT + plain["text"]
            assert said["logprobs"] is None


def test_the_formula_of_evaluations(both: tuple[PlainLlama, Llama]) -> None:
    """What is asked of a choice: the sum over its tokens, the generated one left out; and whether
    each is the likeliest.  A model that ends there at once must not take one of them away."""
    plain, swift = both
    context, choices = "the cat sat on", (" the", " of", " model code", "\x07")
    for choice in choices:
        tokens, n_context = ids(swift, context) + ids(swift, choice), len(ids(swift, context))
        for bias in (None, {VOCAB.im_end: 100.0}):
            logprobs = parts(swift, tokens, echo=True, logprobs=1, max_tokens=1, logit_bias=bias)[
                "logprobs"
            ]
            found = sum(logprobs["token_logprobs"][n_context:-1])
            row = rows(plain, tokens)
            wanted = [row[i - 1][tokens[i]] for i in range(n_context, len(tokens))]
            assert found == pytest.approx(sum(wanted), abs=1e-5)
            tops = logprobs["top_logprobs"][n_context:-1]
            greedy = all(
                one == max(top.values())
                for one, top in zip(logprobs["token_logprobs"][n_context:-1], tops, strict=True)
            )
            best = [int(np.argmax(row[i - 1])) for i in range(n_context, len(tokens))]
            assert greedy == (best == tokens[n_context:])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bytes_of_a_character(both: tuple[PlainLlama, Llama], stream: bool) -> None:
    """Each is a token of its own here; a chat's client can put the character together."""
    swift = both[1]
    options: Any = {"stream": stream, "max_tokens": 9, "grammar": LlamaGrammar.from_string(
        'root ::= "é🙂!"', verbose=False)}  # fmt: skip
    said = parts(swift, TEXT, logprobs=3, **options)
    assert said["text"] == "é🙂!"
    tokens, offsets = said["logprobs"]["tokens"], said["logprobs"]["text_offset"]
    assert tokens[:2] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert [offset - len(TEXT) for offset in offsets] == [0, 0, 1, 1, 1, 1, 2]
    assert all(len(top) in (3, 4) for top in said["logprobs"]["top_logprobs"])

    answer: Any = swift.create_chat_completion(
        [{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=3, **options
    )
    choices = [chunk["choices"][0] for chunk in (list(answer) if stream else [answer])]
    content = [
        one for choice in choices if choice["logprobs"] for one in choice["logprobs"]["content"]
    ]
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == "é🙂!"
    assert all(len(one["top_logprobs"]) == 3 for one in content)
    assert len({bytes(one["bytes"]) for one in content[0]["top_logprobs"]}) == 3


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("stop", [["a", "s"], ["s", "a"]])
def test_the_stop_that_begins_first(
    both: tuple[PlainLlama, Llama], stop: list[str], logprobs: int | None, stream: bool
) -> None:
    swift = both[1]
    grammar = LlamaGrammar.from_string('root ::= "tsa"', verbose=False)
    (token,) = (id for id, text in enumerate(VOCAB.tokens) if text == "assi")
    said = parts(
        swift, "t", stop=stop, logprobs=logprobs, stream=stream,
        grammar=LlamaGrammar.from_string('root ::= "x" "assi" "!"', verbose=False),
        logit_bias={token: 90.0},
    )  # fmt: skip
    assert (said["text"], said["finish_reason"]) == ("x", "stop")
    said = parts(swift, "t", stop=stop, logprobs=logprobs, stream=stream, grammar=grammar)
    assert (said["text"], said["finish_reason"]) == ("t", "stop")
    if logprobs:
        assert said["logprobs"]["tokens"] == ["t"]


def test_the_text_of_the_end_token_ends_nothing(both: tuple[PlainLlama, Llama]) -> None:
    swift = both[1]
    grammar = LlamaGrammar.from_string('root ::= "a <|im_end|> b"', verbose=False)
    for stream in (False, True):
        answer: Any = swift.create_chat_completion(
            [{"role": "user", "content": "Hi"}], grammar=grammar, max_tokens=40, stream=stream
        )
        said = joined(answer)
        assert (said["text"], said["finish_reason"]) == ("a <|im_end|> b", "stop")


def test_one_start_token(both: tuple[PlainLlama, Llama], tiny: Callable[..., Path]) -> None:
    """Whether a text writes it or not, and where a chat template does not."""
    swift = both[1]
    adds = swift._model.add_bos_token()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = [swift.create_completion(text + "a b c", max_tokens=8, temperature=0.0)
                 for text in ("", "<|endoftext|>")]  # fmt: skip
    counts = [text["usage"]["prompt_tokens"] for text in texts]
    n = len(ids(swift, "a b c"))
    assert counts == ([n + 1, n + 1] if adds else [n, n + 1])
    if adds:
        assert texts[0]["choices"] == texts[1]["choices"]
    messages = [{"role": "user", "content": "Name a river."}]
    prompt = "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n"
    chat = swift.create_chat_completion(messages, max_tokens=8, temperature=0.0)
    assert chat["usage"]["prompt_tokens"] == len(ids(swift, prompt)) + adds
    plain = swift.create_completion(prompt, max_tokens=8, temperature=0.0, repeat_penalty=1.1)
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]


def test_a_template_that_writes_the_start_token(
    tiny: Callable[..., Path], open_llama: Callable[..., Any]
) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for bos in (False, True):
        llama = open_llama(path=str(tiny("llama", bos=bos, template=template)))
        chat = llama.create_chat_completion([{"role": "user", "content": "a b"}], max_tokens=2)
        assert chat["usage"]["prompt_tokens"] == 1 + len(ids(llama, "a b"))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_gap_is_filled(both: tuple[PlainLlama, Llama], stream: bool) -> None:
    swift = both[1]
    before, after = "def add(a, b):\n", "\n    return c"
    start = [BOS] if swift._model.add_bos_token() else []
    pre, suf, mid = GAP_TOKENS
    prompt = [*start, pre, *ids(swift, before), suf, *ids(swift, after), mid]
    expected = parts(swift, prompt, max_tokens=8)["text"]
    said = parts(swift, before, suffix=after, max_tokens=8, stream=stream)
    assert said["text"] == expected
    assert parts(swift, ids(swift, before), suffix=after, max_tokens=8)["text"] == expected
    echo = parts(swift, before, suffix=after, max_tokens=8, echo=True, logprobs=1, stream=stream)
    assert echo["text"] == before + expected
    assert len(echo["logprobs"]["tokens"]) == len(ids(swift, before)) + 8


def test_a_model_that_knows_no_gaps(open_llama: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot fill a gap"):
        open_llama().create_completion("a", suffix="b")


def test_an_empty_prompt(both: tuple[PlainLlama, Llama]) -> None:
    """There is a start token to go on from, whether or not texts get it; llama_cpp fails."""
    said = parts(both[1], "", max_tokens=4, logprobs=1, echo=True)
    assert said["logprobs"]["text_offset"][0] == 0
    assert said["text"] == parts(both[1], [BOS], max_tokens=4)["text"]
