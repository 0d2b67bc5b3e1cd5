"""What may be told of an answer, and when: whole characters, nothing of a stop string."""

from __future__ import annotations

from itertools import permutations

import pytest

from swift_gguf.llama.answer_text import AnswerText, Told
from swift_gguf.llama.scores import LogProbs, Scored, in_bytes, name


def tell(pieces: list[bytes], *stops: str, by_token: bool = False) -> list[Told]:
    """All that is told of tokens, one after the other, until a stop."""
    text = AnswerText([stop.encode() for stop in stops], by_token=by_token)
    told: list[Told] = []
    for piece in pieces:
        told += text.feed(piece)
        if text.is_stopped:
            break
    return told + list(text.finish())


def said(pieces: list[bytes], *stops: str, by_token: bool = False) -> str:
    return "".join(one.text for one in tell(pieces, *stops, by_token=by_token))


def test_characters_come_with_the_last_of_their_tokens() -> None:
    smile = [bytes([byte]) for byte in "🙂".encode()]
    assert tell([b"a", *smile, b"b"]) == [Told("a", 1), Told("🙂", 4), Told("b", 1)]
    by_token = [Told("a", 1), *[Told("", 1)] * 3, Told("🙂", 1), Told("b", 1)]
    assert tell([b"a", *smile, b"b"], by_token=True) == by_token
    # a character and a half in one token
    assert tell([b"\xc3\xa9\xc3", b"\xa9!"]) == [Told("éé!", 2)]


@pytest.mark.parametrize("by_token", [False, True])
def test_bytes_that_are_no_character_are_left_out_and_hold_nothing_up(by_token: bool) -> None:
    text = AnswerText(by_token=by_token)
    told = [one.text for piece in (b"a\xff", b"\xc3", b"b", b"c") for one in text.feed(piece)]
    assert "".join(told) == "abc"
    assert told[-1] == "c"
    assert said([b"a", b"\xf0\x9f"], by_token=by_token) == "a"


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("stops", list(permutations(["zz", ":", "):"])))
def test_the_stop_that_begins_first_in_the_text_wins(
    stops: tuple[str, ...], by_token: bool
) -> None:
    assert said([b"a", b"):", b"b"], *stops, by_token=by_token) == "a"
    assert said([b"a):b"], *stops, by_token=by_token) == "a"
    assert said([b"a", b":b"], *stops, by_token=by_token) == "a"
    assert said([b"a)", b":b"], *stops, by_token=by_token) == "a"


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_what_a_stop_may_have_begun_with_waits(size: int, by_token: bool) -> None:
    full = "abcabdé abcabc! never".encode()
    pieces = [full[i : i + size] for i in range(0, len(full), size)]
    assert said(pieces, "abcabc!", "xyz", by_token=by_token) == "abcabdé "
    assert said(pieces, "abcabcd", "verb", by_token=by_token) == full.decode()
    text = AnswerText([b"abc"], by_token=by_token)
    assert [list(text.feed(piece)) for piece in (b"a", b"b")] == [[], []]
    assert "".join(one.text for one in text.feed(b"d")) == "abd"


def test_tokens_after_a_stop_are_not_told() -> None:
    assert tell([b"a", b"b", b"", b"c"], "c", by_token=True) == [
        Told("a", 1), Told("b", 1), Told("", 1)
    ]  # fmt: skip
    assert tell([b"a", b"xs", b"top"], "stop", by_token=True) == [Told("a", 1), Told("x", 1)]
    assert tell([b"a", b""], by_token=True) == [Told("a", 1), Told("", 1)]


def test_tokens_are_named_apart() -> None:
    pieces = [b"a", b"\xf0", b"\x9f", b"a", "é".encode()]
    top = tuple((id, -float(id + 1)) for id in range(4))
    logprobs = LogProbs(
        [Scored(2, None), Scored(4, -9.0, top), Scored(1, -2.0, top)], [0, 1, 2], pieces.__getitem__
    )
    assert logprobs["tokens"] == ["bytes:\\x9f", "é", "bytes:\\xf0"]
    assert logprobs["top_logprobs"][0] is None
    first = {"a": -1.0, "bytes:\\xf0": -2.0, "bytes:\\x9f": -3.0, "bytes:\\x61": -4.0}
    assert logprobs["top_logprobs"][1:] == [{**first, "é": -9.0}, first]
    # a chat has exactly as many as were asked for, and the bytes to put characters together of
    assert [len(one["top_logprobs"]) for one in logprobs.content[1:]] == [4, 4]
    assert bytes(logprobs.content[1]["bytes"]) == "é".encode()
    assert name(b"a") == "a"
    assert in_bytes(b"a") == "bytes:\\x61"
