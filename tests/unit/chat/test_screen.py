"""What the chat shows, and where a person types: no model, no terminal."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from rich.console import Console
from rich.segment import Segment, Segments

from swift_gguf.chat.commands import COMMANDS
from swift_gguf.chat.markdown import THEME, Markdown, rendered, split
from swift_gguf.chat.prompt import ChatCompleter, history
from swift_gguf.chat.screen import Plain
from swift_gguf.chat.settings import Settings
from swift_gguf.chat.terminal import Terminal
from swift_gguf.text.thinking import Part

ANSWER = """\
# Adding

Some *text* with `code`,
on two lines. A tag: <b>bold</b>, a type: List<String>

1. one
2. two

   still two

```python
def add(a, b):

    return a + b  # <- done
```

| a | b |
|---|---|
| 1 | 2 |

> quoted
"""


def shown(text: str, **options: object) -> str:
    """A finished answer on a terminal of 80 columns."""
    out = io.StringIO()
    console = Console(file=out, width=80, theme=THEME, highlight=False, **options)  # type: ignore[arg-type]
    for line in rendered(console, Markdown(text)):
        console.print(Segments([*line, Segment.line()]), end="")
    return out.getvalue()


def test_no_word_of_an_answer_is_swallowed() -> None:
    text = shown(ANSWER)
    for words in ("Adding", "code", "<b>bold</b>", "List<String>", "still two", "# <- done",
                  "return a + b", "quoted"):  # fmt: skip
        assert words in text
    assert "text with code,\non two lines." in text  # the model's own line breaks
    assert shown("def f():\n    return 1") == "def f():\n    return 1\n"  # no fence


def test_colours_are_the_terminals_own_and_never_a_background() -> None:
    text = shown(ANSWER, force_terminal=True, color_system="truecolor")
    codes = {code for part in text.split("\x1b[")[1:] for code in part.split("m")[0].split(";")}
    assert "35" in codes  # a keyword
    assert not codes & {"7", "48", "38", *map(str, range(40, 48)), *map(str, range(100, 108))}


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(ANSWER, force_terminal=True)
    codes = {code for part in text.split("\x1b[")[1:] for code in part.split("m")[0].split(";")}
    assert not codes & set(map(str, range(30, 50)))


@given(st.lists(st.sampled_from([*ANSWER, "\n\n", "```", "- a\n", "| a |\n", "x\u2028y"])))
def test_blocks_are_all_of_the_text_and_only_the_last_is_open(pieces: list[str]) -> None:
    text = "".join(pieces)
    blocks, rest = split(text)
    assert "".join("".join([*blocks, rest]).split()) == "".join(text.split())


def test_a_block_is_finished_when_the_next_begins() -> None:
    blocks, rest = split(ANSWER)
    assert len(blocks) == 5
    assert blocks[0] == "# Adding\n\n"
    assert rest == "> quoted\n"
    assert split("one line") == ([], "one line")
    assert split("") == ([], "")


def lines_of(terminal_text: str) -> list[str]:
    """What a screen shows in the end, of text with cursor movements."""
    import pyte

    screen = pyte.HistoryScreen(80, 400)
    pyte.Stream(screen).feed(terminal_text.replace("\n", "\r\n"))
    return [line.rstrip() for line in screen.display]


def drawn(texts: list[str], *, height: int, parts: list[Part] | None = None,
          settings: Settings | None = None) -> str:  # fmt: skip
    """What is left of an answer that comes in pieces."""
    out = io.StringIO()
    console = Console(file=out, width=80, height=height, theme=THEME, force_terminal=True,
                      highlight=False, color_system="standard")  # fmt: skip
    screen = Terminal(console)
    with screen.answer(settings or Settings()) as view:
        view._next = 0  # type: ignore[attr-defined]
        for i, text in enumerate(texts):
            view.feed(text, [parts[i]] if parts else [Part(text)])
            view._next = 0  # type: ignore[attr-defined]  # draw at every piece
    return "\n".join(lines_of(out.getvalue())).rstrip()


@pytest.mark.parametrize("height", [6, 24, 100])
@pytest.mark.parametrize("before", ["", "Before\n\n"])
def test_streamed_is_the_same_as_printed_at_once(height: int, before: str) -> None:
    """However it is cut, and however tall the terminal."""
    text = before + "".join(f"- item {i}\n" for i in range(40)) + "\nAfter\n"
    at_once = drawn([text], height=200)
    assert [line for line in at_once.splitlines() if "item" in line] == [
        f" • item {i}" for i in range(40)
    ]
    assert drawn([text[i : i + 7] for i in range(0, len(text), 7)], height=height) == at_once


def test_raw_text_streams_too() -> None:
    text = "a  b\n\n# no heading\n" + "word " * 40
    assert drawn(list(text), height=10, settings=Settings(markdown=False)).split() == text.split()


def test_a_model_does_not_control_the_terminal() -> None:
    assert drawn(["a\x1b[2Jb\x07\x9bcd"], height=24) == "a\ufffd[2Jb\ufffd\ufffdcd"


def test_thoughts_fold_show_and_hide() -> None:
    parts = [Part("first thought, ", True), Part("second", True), Part("Answer.")]
    texts = [part.text for part in parts]
    folded = drawn(texts, height=24, parts=parts)
    assert "first thought" not in folded
    assert "thought for" in folded
    assert "2 tokens; /show thinking shows the text" in folded
    assert folded.endswith("Answer.")
    kept = drawn(texts, height=24, parts=parts, settings=Settings(thinking="show"))
    assert "first thought, second" in kept
    hidden = drawn(texts, height=24, parts=parts, settings=Settings(thinking="hide"))
    assert "first" not in hidden


def test_a_pipe_gets_answers_alone() -> None:
    out, err = io.StringIO(), io.StringIO()
    screen = Plain(out, err)
    screen.note("loaded")
    with screen.answer(Settings()) as view:
        view.feed("<think>", [])
        view.feed("hm", [Part("hm", True)])
        view.feed("</think>yes", [Part("yes")])
    with screen.answer(Settings(thinking="hide")) as view:
        view.feed("<think>hm</think>yes", [Part("hm", True), Part("yes")])
    screen.sources([("target", "a "), ("ngram", "b c")], "proposed by: ...")
    assert out.getvalue() == "<think>hm</think>yes\nyes\na {ngram:b c}\nproposed by: ...\n"
    assert err.getvalue() == "loaded\n"


def test_sources_have_colours_and_a_legend() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system="standard")
    Terminal(console).sources([("target", "mine "), ("ngram", "copied")], "proposed by: ngram 50%")
    assert "mine \x1b[4;32mcopied" in out.getvalue()
    assert "proposed by" in out.getvalue()


# -- typing ----------------------------------------------------------------------------------------


def completed(text: str) -> list[str]:
    found = ChatCompleter().get_completions(Document(text), CompleteEvent())
    return [text[: len(text) + item.start_position] + item.text for item in found]


def test_commands_keys_and_values_are_completed() -> None:
    assert completed("/re") == ["/regen", "/read "]
    assert {word.strip() for word in completed("/")} == set(COMMANDS)
    assert completed("/set te") == ["/set temp"]
    assert completed("/set thinking ") == [f"/set thinking {x}" for x in ("fold", "show", "hide")]
    assert completed("/speculation ngram,rec") == ["/speculation ngram,recycling"]
    assert completed("no command") == completed("/unknown x") == []


def test_paths_are_completed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert completed(f"/read {tmp_path}/no") == [f"/read {tmp_path}/notes.txt"]


def test_history_is_private_and_outlives_the_session(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history"
    first = history(path)
    for text in ("one", "two\nlines", "漢字 \udce9"):
        first.append_string(text)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(history(path).load_history_strings()) == ["漢字 ?", "two\nlines", "one"]


def test_a_history_that_others_could_read_is_made_private(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.touch(0o644)
    history(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_chat_goes_on_where_no_history_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert isinstance(history(tmp_path / "file" / "history"), InMemoryHistory)
    path = tmp_path / "history"
    kept = history(path)
    path.unlink()
    os.mkdir(path)  # what it writes to is gone
    kept.append_string("lost, and no matter")
