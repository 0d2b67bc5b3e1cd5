"""`swift-gguf chat` as a person meets it in a terminal, and as a script does on a pipe."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from swift_gguf.hub.models import resolve
from tests.cli.conftest import COMMAND, assert_one_line_failure
from tests.fixtures.window import Window

Cli = Callable[..., subprocess.CompletedProcess[str]]
QUICK = ("-n", 24, "-c", 512, "--seed", 5, "-ngl", 0)
ENDLESS = ("-c", 4096, "--seed", 5, "-ngl", 0, "--grammar", "root ::= [a-z ] root")
CTRL_C, CTRL_D, ALT_ENTER, UP = "\x03", "\x04", "\x1b\r", "\x1b[A"
LEFT, BACKSPACE, CLEAR_LINE = "\x1b[D", "\x7f", "\x15"
PASTE = "\x1b[200~{}\x1b[201~"


class Terminal(Window):
    """A terminal that a chat runs in, and what a person sees and types there."""

    def __init__(
        self,
        *arguments: object,
        columns: int = 80,
        lines: int = 24,
        cwd: Path | None = None,
        **environment: str,
    ) -> None:
        super().__init__(columns, lines)
        self.raw = ""
        self.child = pexpect.spawn(
            COMMAND[0],
            [*COMMAND[1:], "chat", *map(str, arguments)],
            dimensions=(lines, columns),
            cwd=cwd,
            env={**os.environ, "TERM": "xterm-256color", **environment},
            encoding="utf-8",
            timeout=None,
        )
        self.child.delaybeforesend = None

    def write_process_input(self, data: str) -> None:
        """Answers what programs ask of terminals."""
        self.child.send(data)

    def type(self, text: str, *, enter: bool = True) -> None:
        self.child.send(text + ("\r" if enter else ""))

    def read(self, seconds: float = 0.05) -> bool:
        """False when the program is gone."""
        try:
            text = self.child.read_nonblocking(65536, timeout=seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += text
        self.feed(text)
        return True

    def set_size(self, columns: int, lines: int) -> None:
        """A person pulls at the window."""
        self.resize(lines, columns)
        self.child.setwinsize(lines, columns)

    def wait(self, condition: Callable[[], Any] | str, seconds: float = 20) -> None:
        """Until it is so, or a text is on the screen."""
        if isinstance(condition, str):
            words = condition
            condition = lambda: words in " ".join(self.text.split())  # noqa: E731
        deadline = time.monotonic() + seconds
        while not condition():
            alive = self.read()
            assert alive or condition(), self.text
            assert time.monotonic() < deadline, self.text

    def ready(self) -> None:
        """An empty prompt waits."""
        self.wait(lambda: any("a message, or /help" in line for line in self.display))

    def ask(self, text: str, *, enter: bool = True) -> None:
        """A message or a command, and what comes of it, up to the next prompt."""
        self.ready()
        self.ask_typed(text, enter=enter)

    def ask_typed(self, text: str = "", *, enter: bool = True) -> None:
        """As `ask`, where the prompt may hold text already."""
        n = self.n_prompts
        self.type(text, enter=enter)
        self.wait(lambda: self.n_prompts > n)
        self.ready()

    def echoes(self, text: str) -> list[float]:
        """Types a text, and returns the seconds until each character was shown."""
        waits = []
        for character in text:
            start, n = time.monotonic(), len(self.raw)
            self.type(character, enter=False)
            self.wait(lambda: len(self.raw) > n, 5)  # noqa: B023
            waits.append(time.monotonic() - start)
            time.sleep(0.05)
        return waits

    def prompt_figures(self) -> tuple[int, int]:
        """The footer's: tokens of the prompt, and how many of them were read before Enter."""
        form = re.compile(r"prompt (\d+) tokens(?:, (\d+) read before Enter)?(?: ·)? context")
        self.wait(lambda: form.search(" ".join(self.text.split())))
        prompt_n, read_n = form.findall(" ".join(self.text.split()))[-1]
        return int(prompt_n), int(read_n or 0)

    @property
    def n_prompts(self) -> int:
        """Every prompt switches pastes in brackets on."""
        return self.raw.count("\x1b[?2004h")

    def leave(self) -> int:
        """Ctrl-D at an empty prompt; the exit code."""
        self.ready()
        self.type(CTRL_D, enter=False)
        return self.end()

    def end(self) -> int:
        deadline = time.monotonic() + 60
        while self.read() and time.monotonic() < deadline:
            pass
        self.child.wait()
        assert self.child.signalstatus is None, self.text
        return int(self.child.exitstatus)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", noop_ffn=(1,), quant="Q8_0")  # bit-invariant


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """`terminal(MODEL, ...)`: a chat of which nothing is left behind."""
    opened: list[Terminal] = []

    def open_(*arguments: object, **options: Any) -> Terminal:
        options.setdefault("SWIFT_GGUF_DATA", str(tmp_path / "data"))
        opened.append(Terminal(*arguments, **options))
        return opened[-1]

    yield open_
    for each in opened:
        each.child.close(force=True)


def saved(terminal: Terminal, path: Path) -> list[dict[str, Any]]:
    terminal.ask(f"/save {path}")
    turns: list[dict[str, Any]] = json.loads(path.read_text())["turns"]
    return turns


# -- in a terminal ---------------------------------------------------------------------------------


def test_a_conversation(terminal: Callable[..., Terminal], model: Path, tmp_path: Path) -> None:
    chat = terminal(model, *QUICK)
    chat.ask("Hello")
    chat.wait("tok/s")
    chat.ask("Grüße, 漢字 🎉")
    first, second = saved(chat, tmp_path / "talk.json")
    assert (first["user"], second["user"]) == ("Hello", "Grüße, 漢字 🎉")
    assert 0 < len(first["tokens"]) <= 24
    assert ">>> Grüße, 漢" in chat.text.replace("漢 ", "漢")
    chat.ask("/stats")
    assert "seed 5" in chat.text
    chat.ask("/regen")
    assert len(saved(chat, tmp_path / "again.json")) == 2
    chat.ask("/undo")
    chat.ask("/undo")
    assert saved(chat, tmp_path / "none.json") == []
    history = tmp_path / "data" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert chat.leave() == 0
    assert "Traceback" not in chat.text


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    terminal: Callable[..., Terminal], model: Path, tmp_path: Path
) -> None:
    chat = terminal(model, *ENDLESS)
    chat.ready()
    chat.type("go on")
    chat.wait("tokens, ")
    time.sleep(0.5)
    chat.type(CTRL_C, enter=False)
    chat.wait("stopped; the text so far is kept")
    (turn,) = saved(chat, tmp_path / "talk.json")
    assert turn["stop_reason"] == "stopped"
    assert len(turn["tokens"]) > 5
    shown = "".join(chat.text.split("go on")[1].split("stopped;")[0].split())
    assert shown == "".join(turn["assistant"].split())
    chat.type("and on")  # the conversation goes on
    chat.wait(lambda: chat.text.count("tokens, "))
    chat.type(CTRL_C, enter=False)
    chat.wait(lambda: chat.text.count("stopped; the text so far is kept") == 2)
    chat.ask("half a message" + CTRL_C, enter=False)
    assert "Ctrl-D or /exit leaves" in chat.text
    assert chat.leave() == 0


def test_several_lines(terminal: Callable[..., Terminal], model: Path, tmp_path: Path) -> None:
    chat = terminal(model, *QUICK)
    chat.ask('"""\rfirst\r  second"""')
    chat.ask("one" + ALT_ENTER + "two")
    chat.ask(PASTE.format("/no\ncommand\n  pasted"))
    turns = saved(chat, tmp_path / "talk.json")
    assert [turn["user"] for turn in turns] == ["first\n  second", "one\ntwo",
                                               "/no\ncommand\n  pasted"]  # fmt: skip
    assert chat.leave() == 0


def test_pasted_tabs_are_blanks_on_the_screen_and_tabs_in_the_message(
    terminal: Callable[..., Terminal], model: Path, tmp_path: Path
) -> None:
    chat = terminal(model, *QUICK)
    chat.ready()
    chat.type(PASTE.format("one\ttwo"), enter=False)
    chat.wait(">>> one two")
    assert "^I" not in chat.text
    n = chat.n_prompts
    chat.type("")
    chat.wait(lambda: chat.n_prompts > n)
    assert saved(chat, tmp_path / "talk.json")[0]["user"] == "one\ttwo"


def test_completion_and_history_across_sessions(
    terminal: Callable[..., Terminal], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("a note")
    chat = terminal(model, *QUICK, cwd=tmp_path)
    chat.ready()
    chat.type("/rea\t", enter=False)
    chat.wait(lambda: chat.display[chat.cursor.y].startswith(">>> /read "))
    chat.type("no\t", enter=False)
    chat.wait("/read notes.txt")
    chat.type("")
    chat.wait("notes.txt (3 tokens) goes with your next message")
    chat.ask("What does it say?")
    chat.type("/exit")
    assert chat.end() == 0
    again = terminal(model, *QUICK)
    again.ready()
    again.type(UP + UP, enter=False)
    again.wait(">>> What does it say?")
    again.type("")
    again.wait("tok/s")
    assert again.leave() == 0


def test_a_saved_conversation_goes_on_in_another_session(
    terminal: Callable[..., Terminal], model: Path, tmp_path: Path
) -> None:
    path, damaged = tmp_path / "talk.json", tmp_path / "damaged.json"
    chat = terminal(model, *QUICK)
    chat.ask("Hello")
    chat.ask(f"/save {path}")
    chat.ask("And then?")
    third = saved(chat, tmp_path / "all.json")[1]
    assert chat.leave() == 0
    damaged.write_text(path.read_text()[:-40])
    again = terminal(model, *QUICK)
    again.ask(f"/load {damaged}")
    again.wait("is not a saved conversation")
    again.ask(f"/load {path}")
    again.ask("And then?")
    # a prompt of less than 64 tokens: decoded at once it is the same, to the bit, as bit by bit
    assert saved(again, tmp_path / "again.json")[1] == third | {
        "sources": again_sources(tmp_path / "again.json")
    }
    assert again.leave() == 0
    assert "Traceback" not in again.text


def again_sources(path: Path) -> object:
    """What drafts may have changed from one session to the next, the text may not."""
    return json.loads(path.read_text())["turns"][1]["sources"]


def test_the_last_conversation_is_resumed(
    terminal: Callable[..., Terminal], model: Path, tmp_path: Path
) -> None:
    """Only the new question is read; another name is one line."""
    chat = terminal(model, *QUICK)
    chat.ask("Tell me about the cat and the dog and the sea. " * 6)
    chat.ask("/save tale")
    chat.wait("and the state of the context (")
    assert chat.leave() == 0
    assert "conversations/last.json, and the state" in "".join(chat.text.split("\n"))
    for arguments in (["--resume"], ["--resume", "tale"]):
        again = terminal(model, *QUICK, *arguments)
        again.wait("and the state of the context")
        again.ask("And then?")
        prompt_n, _ = again.prompt_figures()
        assert prompt_n > 100
        assert again.leave() == 0
        assert "Traceback" not in again.text
    missing = terminal(model, *QUICK, "--resume", "other")
    assert missing.end() == 1
    assert "there is no saved conversation 'other'" in " ".join(missing.text.split())


def test_nothing_is_kept_without_room(
    terminal: Callable[..., Terminal], model: Path, tmp_path: Path
) -> None:
    chat = terminal(model, *QUICK, "--cache-disk", 0)
    chat.ask("Hello " * 70)
    assert chat.leave() == 0
    assert not (tmp_path / "data" / "conversations").exists()
    assert not (tmp_path / "data" / "states").exists()


def test_a_full_context_is_said(terminal: Callable[..., Terminal], model: Path) -> None:
    chat = terminal(model, *ENDLESS[2:], "-c", 256, "-n", 90, "--context", "stop")
    for _ in range(3):
        chat.ask("more")
    assert "the context of 256 tokens is full and the answer ends here" in chat.text
    chat.ask("more")
    assert "/undo, /clear, or /set context shift" in " ".join(chat.text.split())
    chat.ask("/set context shift")
    chat.ask("more")
    assert "the context is full: the oldest" in chat.text
    assert chat.leave() == 0


def test_errors_are_a_line_and_the_chat_goes_on(
    terminal: Callable[..., Terminal], model: Path
) -> None:
    chat = terminal(model, *QUICK)
    for line, says in [
        ("/nonsense", "there is no command /nonsense; /help lists them"),
        ("/load /no/such/file", "/no/such/file cannot be read: No such file or directory"),
        ("/set temp hot", "temp must be a number, not 'hot'"),
        ("/speculation magic", "there is no source of drafts 'magic'"),
        ("x" * 600, "the message is too long"),
    ]:
        chat.ask(line)
        assert says in " ".join(chat.text.split())
    chat.ask("Hello")
    chat.wait("tok/s")
    chat.ask("/speculation off")
    chat.ask("Hello")
    chat.wait("no drafts: switched off")
    assert chat.leave() == 0
    assert "Traceback" not in chat.text


@pytest.mark.parametrize(("columns", "environment"), [(80, {}), (80, {"NO_COLOR": "1"}), (40, {})])
def test_colours_and_width(
    terminal: Callable[..., Terminal], model: Path, columns: int, environment: dict[str, str]
) -> None:
    """No background is ever painted; with NO_COLOR there are no colours at all."""
    chat = terminal(model, *QUICK, "--speculation", "layer-skip", columns=columns, **environment)
    chat.ask("Hello")
    chat.ask("/show")
    chat.ask("/nonsense")
    assert chat.leave() == 0
    codes = re.findall(r"\x1b\[([0-9;]*)m", chat.raw.replace("38;5;102", "37"))
    backgrounds = [code for code in codes if re.search(r"(^|;)(4[0-8]|10[0-7])(;|$)", code)]
    colours = [code for code in codes if re.search(r"(^|;)(3[0-8]|9[0-7])(;|$)", code)]
    assert backgrounds == []
    assert bool(colours) == (not environment)


@pytest.mark.parametrize("size", [(120, 12), (60, 30)], ids=str)
def test_no_word_is_lost_when_the_window_changes(
    terminal: Callable[..., Terminal], model: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    chat = terminal(model, *ENDLESS, "-n", 1500, columns=40, lines=12)
    chat.ask("/set markdown off")
    chat.ready()
    chat.type("Hello")
    chat.wait(lambda: len(chat.text) > 800)  # its first lines are above the screen
    assert "Ctrl-C stops" in chat.text, "it has ended already"
    chat.set_size(*size)
    chat.ready()
    (turn,) = saved(chat, tmp_path / "talk.json")
    answer = "".join(turn["assistant"].split())
    assert len(turn["assistant"]) >= 1500
    assert "".join(chat.text.split()).count(answer) == 1


def test_what_is_typed_meanwhile_waits_and_the_terminal_is_left_as_it_was(
    terminal: Callable[..., Terminal], model: Path
) -> None:
    chat = terminal(model, *ENDLESS)
    before = termios.tcgetattr(chat.child.child_fd)
    chat.ready()
    chat.type("go on")
    chat.wait("tokens, ")
    chat.type("QQQ", enter=False)
    time.sleep(0.3)
    chat.read()
    assert "QQQ" not in chat.text
    chat.type(CTRL_C, enter=False)
    chat.wait(">>> QQQ")
    chat.type("\x15", enter=False)
    assert chat.leave() == 0
    assert termios.tcgetattr(chat.child.child_fd)[:4] == before[:4]


def test_a_chat_that_is_told_to_end_restores_the_terminal(
    terminal: Callable[..., Terminal], model: Path
) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        chat = terminal(model, *ENDLESS)
        chat.ready()
        chat.type("go on")
        chat.wait("tokens, ")
        chat.child.kill(number)
        assert chat.end() == 128 + number
        assert termios.tcgetattr(chat.child.child_fd)[3] & termios.ECHO
        assert not chat.cursor.hidden
        assert "Traceback" not in chat.text


def test_thoughts_are_folded_and_unfolded(
    terminal: Callable[..., Terminal], model: Path, tmp_path: Path
) -> None:
    grammar = 'root ::= "<think>carry the one</think>" "It is 12."'
    chat = terminal(model, "-c", 512, "-ngl", 0, "--grammar", grammar)
    chat.ask("7 and 5?")
    assert re.search(
        r"thought for [0-9.]+ s, [0-9]+ tokens; /show thinking shows the text", chat.text
    )
    assert "carry the one" not in chat.text
    assert "It is 12." in chat.text
    chat.ask("/show thinking")
    assert "carry the one" in chat.text
    (turn,) = saved(chat, tmp_path / "talk.json")
    assert turn["assistant"] == "<think>carry the one</think>It is 12."
    chat.ask("/set thinking show")
    chat.ask("And 5 and 7?")
    assert chat.text.count("carry the one") == 2
    assert chat.leave() == 0


# -- reading ahead ---------------------------------------------------------------------------------

QUESTION = "What is the answer to that question of the model?"
KEYS = {
    "typed": list(QUESTION),
    "pasted": [PASTE.format(QUESTION)],
    "edited": [QUESTION.replace("answer", "token"), *[LEFT] * 31, *[BACKSPACE] * 5, "answer"],
    "deleted": [QUESTION, *[BACKSPACE] * 20, CLEAR_LINE, QUESTION],
}


@pytest.mark.parametrize("way", KEYS)
def test_the_answer_does_not_depend_on_what_was_read_ahead(
    terminal: Callable[..., Terminal], model: Path, tmp_path: Path, way: str
) -> None:
    """At temperature 0, then with a seed."""
    (tmp_path / "notes.txt").write_text("a note on the model and the token\n" * 3)
    told: list[list[dict[str, Any]]] = []
    for more in ((), ("--no-read-ahead",)):
        chat = terminal(model, *QUICK, "--temp", 0, "-sys", "Be brief.", *more, cwd=tmp_path)
        chat.ready()
        for line in (KEYS[way], ["/read notes.txt"], ["And that?"]):
            for n, key in enumerate(line):
                chat.type(key, enter=False)
                chat.read(0.2 if n in (len(line) // 2, len(line) - 1) and not more else 0.01)
            time.sleep(0 if more else 0.5)
            chat.ask_typed()
            if line == KEYS[way]:
                prompt_n, read_n = chat.prompt_figures()
                assert read_n == 0 if more else read_n > prompt_n // 2
                chat.ask("/set temp 1.1")
        told.append(saved(chat, tmp_path / f"{len(told)}.json"))
        assert chat.leave() == 0
        assert "Traceback" not in chat.text
    assert told[0][0]["user"] == QUESTION
    assert [turn["tokens"] for turn in told[0]] == [turn["tokens"] for turn in told[1]]


def test_reading_ahead_is_switched_off_and_on(
    terminal: Callable[..., Terminal], model: Path
) -> None:
    chat = terminal(model, *QUICK)
    for switch in ("off", "on"):
        chat.ask(f"/set read-ahead {switch}")
        chat.ready()
        chat.type(PASTE.format(QUESTION), enter=False)
        chat.read(0.1)
        time.sleep(0.5)
        chat.ask_typed()
        prompt_n, read_n = chat.prompt_figures()
        assert (read_n > prompt_n // 2) == (switch == "on")
        chat.ask("/clear")
    chat.ask(PASTE.format("the answer " * 20) + CTRL_C, enter=False)
    assert chat.leave() == 0
    assert "Traceback" not in chat.text


# -- on a pipe -------------------------------------------------------------------------------------


def test_the_same_text_as_generate(cli: Cli, model: Path) -> None:
    flags = ("-n", 40, "-c", 512, "--temp", 1.1, "-ngl", 0)
    for more in (("-s", 1), ("-s", 2, "-sys", "Be brief."), ("-s", 1, "--speculation", "ngram")):
        chat = cli("chat", model, *flags, *more, stdin="Grüße, 漢字\n")
        answer = cli("generate", model, "-p", "Grüße, 漢字", *flags, *more)
        assert chat.returncode == answer.returncode == 0
        assert chat.stdout == answer.stdout
        assert "tok/s" not in chat.stderr


def test_a_script(cli: Cli, model: Path, tmp_path: Path) -> None:
    """Messages, quotes and commands in; answers out; everything else to standard error."""
    path = tmp_path / "talk.json"
    lines = f'/set n-predict 5\n\nHello\n"""\nseveral\nlines\n"""\n/save {path}\n/exit\nnever\n'
    done = cli("chat", model, *QUICK, stdin=lines)
    assert done.returncode == 0, done.stderr
    turns = json.loads(path.read_text())["turns"]
    assert [turn["user"] for turn in turns] == ["Hello", "several\nlines"]
    assert done.stdout == "".join(turn["assistant"] + "\n" for turn in turns)
    assert "n-predict is 5\n" in done.stderr
    assert f"saved 2 turns to {path}\n" in done.stderr
    assert cli("chat", model, *QUICK, stdin="").returncode == 0
    assert cli("chat", model, *QUICK, stdin="Hello").stdout  # no line break at the end


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("/load nothing\nHello\n", "there is no saved conversation 'nothing'"),
        ("/nonsense\n", "/help lists them"),
        ("x" * 600 + "\n", "too long"),
    ],
)
def test_a_script_ends_at_its_first_error(cli: Cli, model: Path, lines: str, says: str) -> None:
    done = cli("chat", model, *QUICK, stdin=lines)
    assert_one_line_failure(done)
    assert says in done.stderr
    assert done.stdout == ""


def test_input_that_is_no_text(model: Path) -> None:
    command = [*COMMAND, "chat", str(model), *map(str, QUICK)]
    done = subprocess.run(command, input=b"caf\xe9 \xff\n", capture_output=True)
    assert done.returncode == 1
    assert done.stderr == b"swift-gguf: standard input is not UTF-8 text; save it as UTF-8\n"


def test_ctrl_c_ends_a_script(model: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "chat", str(model), *map(str, ENDLESS)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"Hello\nnever\n")
    process.stdin.flush()
    assert len(process.stdout.read(20)) == 20  # it answers while standard input stays open
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"stopped; the text so far is kept" in err
    assert b"Traceback" not in err


def test_models_that_cannot_chat(cli: Cli, model: Path) -> None:
    assert_one_line_failure(cli("chat", "no-such-model"))
    done = cli("chat", model, "--chat-template", "{% for %}", *QUICK, stdin="Hello\n")
    assert_one_line_failure(done)
    assert "chat template" in done.stderr


# -- a real model ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_conversation_equals_generate_and_a_long_prompt_can_be_stopped(
    cli: Cli, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    smollm = resolve("smollm2-135m")
    flags = ("-n", 32, "--seed", 3, "-ngl", 0)
    answer = cli("generate", smollm, "-p", "Write one sentence about the sea.", *flags)
    chat = terminal(smollm, *flags)
    chat.ask("Write one sentence about the sea.")
    (turn,) = saved(chat, tmp_path / "talk.json")
    assert turn["assistant"] + "\n" == answer.stdout
    words = " ".join(turn["assistant"].split()[:6])
    assert words in " ".join(chat.text.split())

    (tmp_path / "long.txt").write_text("the sea is wide and " * 700)
    chat.ask(f"/read {tmp_path}/long.txt")
    chat.ready()
    chat.type("Sum it up.")
    chat.wait("reading")
    time.sleep(1)
    chat.type(CTRL_C, enter=False)
    start = time.monotonic()
    chat.wait("stopped before the first word")
    assert time.monotonic() - start < 3
    chat.ask("/stats")
    assert len(saved(chat, tmp_path / "talk.json")) == 1
    assert chat.leave() == 0


@pytest.mark.slow
def test_typing_does_not_lag_while_the_search_runs(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    chat = terminal(resolve("smollm2-135m"), "-n", 80, "--seed", 3, "-ngl", 0, "--temp", 0,
                    "--speculation", "layer-skip")  # fmt: skip
    chat.ask("Write about the sea.")
    waits = chat.echoes("typing while the search runs")
    assert sorted(waits)[len(waits) // 2] < 0.1, waits
    chat.type("\x15", enter=False)
    steps, deadline = 0, time.monotonic() + 20
    while not steps and time.monotonic() < deadline:  # costs may be measured before
        chat.ask("/stats")
        steps = int(chat.text.split("idle ")[-1].split(" step")[0].split()[-1])
        time.sleep(0.5)
    assert steps > 0
    assert chat.leave() == 0


@pytest.mark.slow
def test_typing_does_not_lag_while_a_file_is_read_ahead(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("The old ships sailed to the harbour with some salt. " * 250)
    chat = terminal(resolve("smollm2-135m"), "-n", 8, "--seed", 3, "-ngl", 0, cwd=tmp_path)
    chat.ask("/read long.txt")
    waits = chat.echoes("typing while a file is read ")
    assert sorted(waits)[len(waits) // 2] < 0.1, waits
    time.sleep(1)
    chat.ask_typed()
    prompt_n, read_n = chat.prompt_figures()
    assert prompt_n > 2500
    assert read_n > 500
    assert chat.leave() == 0
