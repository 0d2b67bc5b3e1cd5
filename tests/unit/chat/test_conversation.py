"""The chat's parts that need no model: thoughts, settings, commands, figures."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_gguf.chat.commands import COMMANDS, help_lines, is_open, unquoted
from swift_gguf.chat.figures import Figures, footer, shares
from swift_gguf.chat.settings import KEYS, Settings
from swift_gguf.errors import SwiftError
from swift_gguf.sampling.sampling import SamplingOptions
from swift_gguf.text.thinking import MARKS, Part, Thoughts

# -- thoughts --------------------------------------------------------------------------------------


def parts_of(*texts: str, is_open: bool = False) -> tuple[str, str]:
    """Thoughts and answer, of a text that comes in pieces."""
    thoughts = Thoughts(is_open=is_open)
    parts = [part for text in texts for part in thoughts.feed(text)] + thoughts.finish()
    thought = "".join(part.text for part in parts if part.is_thought)
    return thought, "".join(part.text for part in parts if not part.is_thought)


@pytest.mark.parametrize(("begin", "end"), MARKS)
def test_thoughts_and_answer_are_told_apart(begin: str, end: str) -> None:
    text = f"{begin}\nIs it 4? Yes.\n{end}\n\nIt is 4 < 5."
    assert parts_of(text) == ("Is it 4? Yes.", "It is 4 < 5.")


def test_gpt_oss_ends_its_thoughts_with_a_message() -> None:
    analysis = "<|channel|>analysis<|message|>Hm.<|end|>"
    final = "<|start|>assistant<|channel|>final<|message|>Yes."
    assert parts_of(analysis + final) == ("Hm.", "Yes.")
    assert parts_of(*(analysis + final)) == ("Hm.", "Yes.")
    assert parts_of("<|channel|>final<|message|>Yes.") == ("", "Yes.")


@given(
    thought=st.text(alphabet="ab <>/thinkd\n", max_size=20),
    answer=st.text(alphabet="ab <>/think\n", max_size=20),
    mark=st.sampled_from(MARKS),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_it_does_not_matter_how_the_text_is_cut(
    thought: str, answer: str, mark: tuple[str, str], cuts: list[int]
) -> None:
    text = f"{mark[0]}{thought}{mark[1]}{answer}"
    if mark[1] in thought:
        return
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert parts_of(*pieces) == parts_of(text)
    assert parts_of(text) == (thought.strip(), answer.lstrip())


def test_an_answer_without_thoughts_is_left_as_it_is() -> None:
    for text in ("", " Hello", "<thin air>", "a <think> b </think>", "  <th", "<|channel|>other"):
        assert parts_of(text) == ("", text)
        assert parts_of(*text) == ("", text)


def test_thoughts_that_the_prompt_has_opened_and_ones_that_never_end() -> None:
    assert parts_of("so", " be it\n</th", "ink>", "\nYes", is_open=True) == ("so be it", "Yes")
    assert parts_of("<think>on and on </thi") == ("on and on </thi", "")


def test_text_is_held_back_only_where_it_may_be_a_mark() -> None:
    thoughts = Thoughts()
    assert thoughts.feed("<think>a") == [Part("a", is_thought=True)]
    assert thoughts.feed(" b </") == [Part(" b", is_thought=True)]
    assert thoughts.feed("b>") == [Part(" </b>", is_thought=True)]
    assert thoughts.is_open
    assert thoughts.feed("</think>") == []
    assert not thoughts.is_open
    assert thoughts.feed("c </think>") == [Part("c </think>")]


@pytest.mark.parametrize(
    ("before", "text", "parts"),
    [
        ("", "<think>a</think>b", [("a", True), ("b", False)]),
        ("<think>", "\na</think>b", [("a", True), ("b", False)]),
        ("<think>a", " b</think> c", [(" b", True), ("c", False)]),
        ("<think>a\n", "b</think>c", [("b", True), ("c", False)]),
        ("<think>a</think>b", " c", [(" c", False)]),
        ("a", " <think>b", [(" <think>b", False)]),
        ("a <", "think>", [("think>", False)]),
        ("<thi", "s", [("s", False)]),
    ],
)
def test_what_was_there_before_is_no_part_of_what_comes(
    before: str, text: str, parts: list[tuple[str, bool]]
) -> None:
    thoughts = Thoughts()
    thoughts.skip(before)
    found = thoughts.feed(text) + thoughts.finish()
    assert [(part.text, part.is_thought) for part in found] == parts


def test_what_was_said_before() -> None:
    for before, said in (("<think>a", ""), ("<think>a</think>b <", "b <"), (" a", " a"), ("", "")):
        assert Thoughts().skip(before) == said


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "name", "expected"),
    [
        ("temp", "0.3", "temperature", 0.3),
        ("TOP_K", "0", "top_k", 0),
        ("seed", "7", "seed", 7),
        ("seed", "random", "seed", None),
        ("repeat-last-n", "-1", "repeat_last_n", -1),
    ],
)
def test_sampling_is_set_by_the_command_lines_names(
    key: str, value: str, name: str, expected: object
) -> None:
    changed = Settings(sampling=SamplingOptions(seed=1)).set(key, value)
    assert getattr(changed.sampling, name) == expected


def test_settings_of_the_chats_own() -> None:
    settings = Settings().set("n-predict", "12").set("thinking", "Hide").set("markdown", "off")
    assert (settings.max_tokens, settings.thinking, settings.markdown) == (12, "hide", False)
    assert settings.set("n_predict", "-1").max_tokens is None
    assert settings.set("context", "stop").context == "stop"
    assert settings.set("reasoning", "OFF").reasoning == "off"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("temperature", "1", "temp, top-k"),
        ("temp", "hot", "must be a number, not 'hot'"),
        ("temp", "nan", "finite"),
        ("top-k", "-1", "whole number"),
        ("seed", "x", "random"),
        ("repeat-penalty", "0", "above 0"),
        ("thinking", "loud", "fold, show, hide"),
        ("markdown", "maybe", "on or off"),
    ],
)
def test_what_cannot_be_set_is_said_in_a_line(key: str, value: str, says: str) -> None:
    with pytest.raises(SwiftError, match=says) as raised:
        Settings().set(key, value)
    assert "\n" not in str(raised.value)


def test_every_setting_is_listed_and_can_be_set_to_what_is_listed() -> None:
    settings = Settings(sampling=SamplingOptions(seed=3, min_p=0.25), n_predict=4)
    values = settings.values()
    assert set(values) == set(KEYS)
    own = {field.name for field in fields(Settings)} - {"sampling"}
    assert own <= {key.replace("-", "_") for key in KEYS}
    again = Settings()
    for key, value in values.items():
        again = again.set(key, value)
    assert again == settings


# -- commands --------------------------------------------------------------------------------------


def test_quotes_hold_a_message_of_several_lines() -> None:
    assert not is_open("hello")
    assert not is_open('say """ this')
    assert is_open('"""')
    assert is_open('"""one\ntwo')
    assert not is_open('"""one\ntwo"""')
    assert not is_open('""""""')
    assert unquoted('"""\none\n  two\n"""') == "one\n  two"
    assert unquoted('"""one"""') == "one"
    assert unquoted("plain") == "plain"
    assert unquoted('"""open') == '"""open'


def test_every_command_has_help_of_a_line_at_80_columns() -> None:
    lines = help_lines()
    assert {line.split()[0] for line in lines} >= set(COMMANDS)
    assert max(map(len, lines)) < 80


# -- figures ---------------------------------------------------------------------------------------

GAINING = Figures(
    tokens_per_second=31.25,
    gain=1.42,
    plain_ms=45.5,
    acceptance_rate=0.74,
    mean_acceptance_length=2.91,
    sources=(("target", 0.4), ("ngram", 0.35), ("recycling", 0.25)),
    why="ngram, recycling: where they pay",
    prompt_n=612,
    read_n=590,
    n_past=812,
    n_ctx=4096,
)
IDLE = Figures(
    tokens_per_second=108.0, gain=0.99, plain_ms=9.0, n_past=1, n_ctx=4096, why="w " * 60
)


def test_the_footer_says_what_was_gained_and_how_that_is_known() -> None:
    text = " ".join(footer(GAINING, width=80))
    for figure in ("31.2 tok/s", "speed-up 1.42x (a plain pass takes 45.5 ms)",
                   "accepted 74%", "2.91 tokens per pass",
                   "target 40%, ngram 35%", "prompt 612 tokens, 590 read before Enter",
                   "context 812/4096"):  # fmt: skip
        assert figure in text
    assert "no drafts" not in text


def test_the_footer_says_how_much_of_the_prompt_was_read_before() -> None:
    (line,) = footer(replace(GAINING, read_n=0), width=300)
    assert "prompt 612 tokens · context" in line


def test_the_footer_says_why_nothing_drafts_and_claims_no_gain_then() -> None:
    text = " ".join(footer(IDLE, width=80))
    assert "no drafts: w w w" in text
    assert "plain" not in text


def test_the_footer_says_what_the_idle_search_found() -> None:
    assert footer(replace(GAINING, found="better drafts"), width=80)[0].startswith(
        "idle search: better drafts"
    )


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("figures", [GAINING, IDLE, Figures()])
def test_the_footer_keeps_within_the_terminal(width: int, figures: Figures) -> None:
    lines = footer(replace(figures, found="better drafts, 1.31x plain expected"), width=width)
    assert len(lines) <= 4
    assert all(0 < len(line) <= width for line in lines)


def test_shares_begin_with_the_target() -> None:
    assert shares(["ngram", "ngram", "recycling", "target"]) == (
        ("target", 0.25),
        ("ngram", 0.5),
        ("recycling", 0.25),
    )
    assert shares([]) == ()
