"""Conversations on generated models: which tokens are decoded, what is kept, what is saved."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.chat import archive
from swift_gguf.chat.chat import Chat
from swift_gguf.chat.commands import Leave, handle
from swift_gguf.chat.conversation import Conversation, Turn
from swift_gguf.chat.reader import read
from swift_gguf.chat.screen import Plain
from swift_gguf.chat.settings import Settings
from swift_gguf.engine import generate
from swift_gguf.errors import ContextFullError, DecodeError, ModelError, SwiftError
from swift_gguf.model.model import Model
from swift_gguf.native.binding import StopFlag
from swift_gguf.sampling.sampling import Sampler, SamplingOptions
from swift_gguf.session import Answer, Piece, Session, stopped_by_ctrl_c
from swift_gguf.speculation import Speculation, SpeculationOptions
from swift_gguf.templates.template import Prompting
from swift_gguf.text.text import encode, render_chat
from swift_gguf.text.text import piece as bytes_of
from tests.fixtures.tokenizer import CHATML, THINKING

OpenModel = Callable[..., Model]
SEEDED = SamplingOptions(seed=7, temperature=0.9)

# Answers lose their blanks and their thoughts, and the last answer is marked, as in templates of
# reasoning models: text that was rendered once is rendered otherwise later.
REASONING = (
    "{% for message in messages %}"
    "{% set content = message['content'].split('</think>')[-1] | trim %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Talk:
    """A chat whose screen is kept."""

    def __init__(self, model: Model, *, mode: str = "off", template: str | None = None,
                 settings: Settings | None = None, system: str | None = None,
                 variables: dict[str, object] | None = None) -> None:  # fmt: skip
        self.out, self.err = io.StringIO(), io.StringIO()
        speculation = Speculation(model, SpeculationOptions(mode=mode))
        self.session = Session(model, speculation)
        self.conversation = Conversation(
            model, system=system, template=template, variables=variables
        )
        settings = settings or Settings(sampling=SEEDED, n_predict=20)
        self.chat = Chat(self.session, self.conversation, Plain(self.out, self.err), settings)

    def say(self, text: str) -> str:
        """What comes to standard output."""
        before = len(self.out.getvalue())
        handle(self.chat, text)
        return self.out.getvalue()[before:].removesuffix("\n")

    @property
    def prompt_n(self) -> int:
        """Prompt tokens decoded for the latest answer."""
        assert self.chat._latest is not None
        return self.chat._latest.stats.prompt_n

    @property
    def turns(self) -> list[Turn]:
        return self.conversation.turns

    @property
    def notes(self) -> str:
        return self.err.getvalue()


def spelt(talk: Talk) -> str:
    """The text of the next prompt, control tokens included."""
    model = talk.session.model
    tokens = talk.conversation.prompt("x")
    return b"".join(bytes_of(model, token, special=True) for token in tokens).decode()


@pytest.fixture
def model(tiny: Callable[..., Path], open_model: OpenModel) -> Model:
    return open_model(tiny("llama", noop_ffn=(1,), quant="Q8_0"), n_ctx=512)  # bit-invariant


@pytest.fixture
def talk(model: Model) -> Iterator[Talk]:
    made = Talk(model)
    yield made
    made.session.close()


# -- tokens ----------------------------------------------------------------------------------------


def test_only_what_is_new_is_decoded(talk: Talk, model: Model) -> None:
    """An answer cut by its limit, one that ended by itself, whatever its tokens spell."""
    talk.say("Hello")
    for n, text in enumerate(("and then?", "漢字 🎉", "!"), start=1):
        undecoded = [*talk.turns[-1].tokens] != model.tokens[-len(talk.turns[-1].tokens) :]
        new = f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        talk.say(text)
        assert talk.prompt_n == len(encode(model, new, start=False)) + undecoded
        assert len(talk.turns) == n + 1


def test_the_models_own_tokens_are_kept_whatever_their_text_is_tokenised_to(
    talk: Talk, model: Model
) -> None:
    """Byte by byte, as no tokenizer would."""
    strange = tuple(b"the question of the token")
    assert tuple(encode(model, bytes(strange).decode())) != strange
    talk.turns.append(Turn(user="Hi", tokens=strange, text=bytes(strange).decode()))
    prompt = talk.conversation.prompt("So?")
    first = encode(model, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert prompt[: len(first)] == first
    assert tuple(prompt[len(first) : len(first) + len(strange)]) == strange
    new = "<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt[len(first) + len(strange) :] == encode(model, new, start=False)


def test_a_template_that_renders_answers_otherwise_later_changes_no_token(model: Model) -> None:
    talk = Talk(model, template=REASONING)
    blank = tuple(b" \n yes \n")
    talk.turns.append(Turn(user="Hi", tokens=blank, text=" \n yes \n"))
    prompt = talk.conversation.prompt("So?")
    assert blank in [tuple(prompt[i : i + len(blank)]) for i in range(len(prompt))]


def test_thoughts_stay_out_where_the_template_leaves_them_out(model: Model) -> None:
    tokens = tuple(b"<think>\nhm\n</think>\n\nyes")
    parts, thought_n = read(model, tokens)
    assert [(part.text, part.is_thought) for part in parts if part.text.strip()][-1][0] == "s"
    assert bytes(tokens[thought_n:]) == b"yes"
    turn = Turn(user="Hi", tokens=tokens, text=bytes(tokens).decode(), thought_n=thought_n)
    for template, kept in ((REASONING, b"yes"), (CHATML, bytes(tokens))):
        conversation = Conversation(model, template=template)
        conversation.turns.append(turn)
        prompt = conversation.prompt("So?")
        start = len(encode(model, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"))
        assert bytes(prompt[start : start + len(kept)]) == kept
        assert prompt[start + len(kept)] == encode(model, "<|im_end|>")[0]


def test_a_model_is_told_whether_and_how_hard_to_think(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the chat was started with, and by `/set reasoning`, for the next answer."""
    started: dict[str, object] = {"reasoning_effort": "low"}
    talk = Talk(model, template=THINKING, variables=started)
    answer, seen = talk.session.answer, []

    def watched(prompt: list[int], *args: Any, **kwargs: Any) -> Any:
        seen.append(prompt)
        return answer(prompt, *args, **kwargs)

    monkeypatch.setattr(talk.session, "answer", watched)
    for command, variables in (
        ("/set reasoning auto", started),
        ("/set reasoning off", started | {"enable_thinking": False}),
        ("/set reasoning on", started | {"enable_thinking": True}),
    ):
        talk.say(command)
        talk.say("/clear")
        talk.say("Hi")
        asked = [{"role": "user", "content": "Hi"}]
        wanted = render_chat(
            model, asked, template=THINKING, prompting=Prompting(variables=variables)
        )
        assert seen[-1] == encode(model, wanted)
    assert seen[0] == seen[2] != seen[1]


def test_a_template_that_rewrites_answers_is_rendered_as_a_whole(model: Model) -> None:
    upper = CHATML.replace("message['content']", "(message['content'] | replace('\ue000', '?'))")
    conversation = Conversation(model, template=upper)
    conversation.turns.append(Turn(user="Hi", tokens=(65,), text="A"))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"},
                {"role": "user", "content": "So?"}]  # fmt: skip
    assert conversation.prompt("So?") == encode(model, render_chat(model, messages))


@pytest.mark.parametrize("mode", ["auto", "ngram,recycling", "layer-skip"])
def test_answers_are_what_plain_decoding_gives(model: Model, mode: str) -> None:
    """Turn by turn, with the same seed, whatever drafts."""
    told = []
    for each in ("off", mode):
        model.clear()
        talk = Talk(model, mode=each, system="Be brief.")
        for text in ("Tell me", "more of it", "and more"):
            talk.say(text)
        talk.session.close()
        told.append([turn.tokens for turn in talk.turns])
    assert told[0] == told[1]
    sources = {source for turn in talk.turns for source in turn.sources}
    assert mode != "layer-skip" or "layer-skip" in sources


def test_the_first_answer_is_that_of_a_lone_prompt(talk: Talk, model: Model) -> None:
    talk.say("Tell me")
    prompt = encode(model, render_chat(model, [{"role": "user", "content": "Tell me"}]))
    model.clear()
    with Sampler(model, SEEDED, prompt=prompt) as sampler:
        plain = generate(model, prompt, sampler=sampler, max_tokens=20)
        assert tuple(token.id for token in plain) == talk.turns[0].tokens


def test_models_without_rollback_chat_too(tiny: Callable[..., Path], open_model: OpenModel) -> None:
    talk = Talk(open_model(tiny("mamba"), n_ctx=512), mode="auto")
    for text in ("one", "two"):
        talk.say(text)
    assert [len(turn.tokens) > 0 for turn in talk.turns] == [True, True]
    assert "recurrent" in talk.chat.figures.why


# -- commands --------------------------------------------------------------------------------------


def test_regen_answers_again_and_undo_removes(talk: Talk) -> None:
    first = talk.say("Hello")
    again = talk.say("/regen")
    assert again != first
    assert talk.prompt_n == 1  # the prompt is there, its last token gets the logits
    assert [turn.user for turn in talk.turns] == ["Hello"]
    assert talk.turns[0].seed == 8
    talk.say("More")
    assert talk.turns[1].seed == 7
    talk.say("/undo")
    talk.say("/undo")
    assert talk.turns == []
    assert "removed: More\nremoved: Hello" in talk.notes
    assert talk.say("Hello") == first
    talk.say("/clear")
    assert talk.turns == []
    with pytest.raises(SwiftError, match="nothing to undo"):
        talk.say("/undo")
    with pytest.raises(SwiftError, match="send a message first"):
        talk.say("/regen")


def test_regen_that_fails_keeps_the_answer(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.say("Hello")
    turns = list(talk.turns)
    monkeypatch.setattr(talk.chat, "_fitting", lambda user: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        talk.say("/regen")
    assert talk.turns == turns


def test_a_file_goes_with_the_next_message(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "my notes.txt"
    path.write_text("über ```\nall")
    talk.say(f'/read "{path}"')
    talk.say(f"/read {path}")
    assert "my notes.txt (" in talk.notes
    talk.say("Well?")
    content = "my notes.txt:\n````\nüber ```\nall\n````\n\n"
    assert talk.turns[0].user == f"{content}{content}Well?"
    talk.say("And?")
    assert talk.turns[1].user == "And?"


def test_a_file_stays_until_it_was_said(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("all")
    talk.say(f"/read {path}")
    with pytest.raises(ContextFullError):
        talk.say("x" * 600)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "answer", stopped_at_once(Session.answer))
        talk.say("Well?")
    assert talk.turns == []
    talk.say("Well?")
    talk.say("And?")
    assert [turn.user for turn in talk.turns] == ["notes.txt:\n```\nall\n```\n\nWell?", "And?"]
    talk.say(f"/read {path}")
    talk.say("/undo")  # a file that is too long must not be in the way for ever
    assert "removed: the attached file" in talk.notes
    assert len(talk.turns) == 2
    talk.say("So?")
    assert talk.turns[-1].user == "So?"


def stopped_at_once(answer_of: Callable[..., Answer]) -> Callable[..., Answer]:
    """Of `Session.answer`: an answer that ends before its first word."""

    def stopped(*arguments: Any, **options: Any) -> Answer:
        answer = answer_of(*arguments, **options)
        answer.stop()
        return answer

    return stopped


def test_settings_hold_for_the_next_answer(talk: Talk) -> None:
    talk.say("/set n-predict 3")
    talk.say("/set temp 0")
    talk.say("Hello")
    assert len(talk.turns[0].tokens) == 3
    assert "n-predict is 3\ntemp is 0.0\nstopped after 3 tokens" in talk.notes
    assert "seed                 7" in talk.say("/set")
    talk.say("/system Answer in German.")
    assert "system\nAnswer in German.<|im_end|>" in spelt(talk)
    talk.say("/system none")
    assert talk.conversation.system is None


def test_figures_and_sources_are_shown(model: Model) -> None:
    talk = Talk(model, mode="layer-skip")
    talk.say("Hello")
    stats = talk.say("/stats")
    for figure in ("seed 7", "layer-skip", "speed-up", "tokens per pass", "of 512 tokens"):
        assert figure in stats
    shown, _, legend = talk.say("/show").rpartition("\nproposed by: ")
    assert "layer-skip" in legend
    assert "{layer-skip:" in shown
    assert shown.replace("{layer-skip:", "").replace("}", "") == talk.turns[0].text.replace("}", "")
    talk.session.close()


def test_the_gain_is_against_plain_passes(model: Model) -> None:
    """Of the answer itself, where it has some; known before where every pass verified a draft."""
    prompt = encode(model, "once upon a time")
    plain = Session(model).answer(prompt, SEEDED, max_tokens=30)
    assert len(list(plain)) == 30
    assert plain.stats.plain_cycles == plain.stats.cycles == 29
    assert plain.plain_ms == pytest.approx(1e3 * plain.stats.plain_s / 29)
    assert plain.gain is not None
    assert 0.3 < plain.gain < 1.0  # the engine's own time is lost
    session = Session(model, Speculation(model, SpeculationOptions(mode="layer-skip")))
    drafted = session.answer(prompt, SEEDED, max_tokens=30)
    assert [piece.token for piece in drafted] == plain.tokens
    assert drafted.stats.plain_cycles < 8
    known_ms = session.plain_ms()
    assert known_ms is not None
    assert drafted.plain_ms == pytest.approx(known_ms, rel=0.5)
    session.close()


def test_speculation_changes_between_answers_and_the_text_does_not(talk: Talk) -> None:
    plain = talk.say("Hello")
    talk.say("/speculation layer-skip")
    assert "speculation: layer-skip" in talk.notes
    assert talk.say("/undo") == ""
    assert talk.say("Hello") == plain
    assert "layer-skip" in talk.turns[0].sources
    with pytest.raises(SwiftError, match="no source of drafts 'magic'"):
        talk.say("/speculation magic")
    assert "layer-skip" in talk.say("/undo") + talk.say("Hello") + talk.say("/show")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nonsense", "/help lists them"),
        ("/read", "needs a file name"),
        ("/read /no/such/file", "cannot be read: No such file"),
        ("/read /", "cannot be read: Is a directory"),
        ("/read /dev/zero", "/dev/zero cannot be read: it is not a regular file"),
        ("/load /dev/zero", "/dev/zero cannot be read: it is not a regular file"),
        ("/read ~nobody-has-this-name/x", "cannot be read"),
        ("/load /no/such/file", "cannot be read"),
        ("/save /no/such/folder/x", "cannot be written: No such file"),
        ("/set temp", "needs a key and a value"),
        ("/stats", "send a message first"),
        ("/show", "send a message first"),
        ("/show thinking", "has no thoughts"),
        ("/show me", "/show thinking"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(talk: Talk, line: str, says: str) -> None:
    with pytest.raises(SwiftError, match=says) as raised:
        talk.say(line)
    assert "\n" not in str(raised.value)
    assert talk.turns == []


def test_what_is_no_command(talk: Talk) -> None:
    talk.say("/etc/passwd is a file")
    talk.say(" \n")
    talk.say('"""\n/help\nme"""')
    assert [turn.user for turn in talk.turns] == ["/etc/passwd is a file", "/help\nme"]
    with pytest.raises(Leave):
        talk.say("/bye")


def test_a_file_that_is_no_text_or_too_long(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "long").write_text("x" * 600)
    with pytest.raises(SwiftError, match="not UTF-8"):
        talk.say(f"/read {tmp_path}/binary")
    with pytest.raises(SwiftError, match="has 600 tokens, but the context has 512; start with"):
        talk.say(f"/read {tmp_path}/long")
    (tmp_path / "longer").write_text("x" * 5_400_000)
    with pytest.raises(SwiftError, match=r"longer is too long: .* give a part of it"):
        talk.say(f"/read {tmp_path}/longer")
    with (tmp_path / "film.mp4").open("wb") as film:
        film.truncate(3 << 30)
    with pytest.raises(SwiftError, match=r"film.mp4 is not UTF-8 text"):
        talk.say(f"/read {tmp_path}/film.mp4")


def test_a_file_with_a_byte_order_mark_is_its_text(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"\xef\xbb\xbfall")
    talk.say(f"/read {tmp_path}/notes.txt")
    talk.say("Well?")
    assert talk.turns[0].user == "notes.txt:\n```\nall\n```\n\nWell?"


def test_a_template_that_refuses_a_message(model: Model) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    talk = Talk(model, template=template, system="Be.")
    with pytest.raises(ModelError, match="no system"):
        talk.say("Hello")
    talk.say("/system none")
    talk.say("Hello")
    assert len(talk.turns) == 1


# -- a full context --------------------------------------------------------------------------------

# every token is a letter, and it never ends
ENDLESS = SamplingOptions(seed=3, temperature=0.9, grammar="root ::= [a-z] root")


@pytest.fixture
def small(tiny: Callable[..., Path], open_model: OpenModel) -> Model:
    return open_model(tiny("llama", noop_ffn=(1,)), n_ctx=256)


def test_the_oldest_turns_leave_a_full_context(small: Model) -> None:
    talk = Talk(small, settings=Settings(sampling=ENDLESS, n_predict=50))
    for number in range(8):
        talk.say(f"message {number}")
        assert len(talk.turns[-1].tokens) == 50
    assert "the context is full: the oldest " in talk.notes
    assert talk.conversation.first > 0
    text = spelt(talk)
    assert "message 0" not in text
    assert "message 7" in text


def test_an_answer_goes_on_when_turns_have_left(small: Model) -> None:
    """After the prompt without those turns, and what was said before they left."""
    talk = Talk(small, settings=Settings(sampling=ENDLESS, n_predict=100))
    talk.say("one")
    talk.chat.settings = Settings(sampling=ENDLESS, n_predict=180)
    talk.say("two")
    turn = talk.turns.pop()
    assert len(turn.tokens) == 180
    assert turn.stop_reason == "length"
    assert "the oldest turn is dropped" in talk.notes
    assert small.tokens == talk.conversation.prompt("two", said=turn.tokens[:-1])
    assert len(small.tokens) < 256 < len(small.tokens) + 100


def test_a_context_that_stops_says_so(small: Model) -> None:
    settings = Settings(sampling=ENDLESS, context="stop")
    talk = Talk(small, settings=settings)
    talk.say("one")
    assert "the context of 256 tokens is full and the answer ends here" in talk.notes
    with pytest.raises(ContextFullError, match="/undo, /clear, or /set context shift"):
        talk.say("two")
    assert len(talk.turns) == 1


def test_a_lone_answer_that_fills_the_context_ends(small: Model) -> None:
    talk = Talk(small, settings=Settings(sampling=ENDLESS))
    talk.say("one")
    assert "the answer ends here" in talk.notes


def test_a_message_longer_than_the_context_is_refused(talk: Talk) -> None:
    talk.say("Hello")
    turns = list(talk.turns)
    with pytest.raises(ContextFullError, match="but the context has 512"):
        talk.say("x" * 600)
    assert talk.turns == turns
    assert talk.conversation.first == 0
    talk.say("Hello again")
    assert len(talk.turns) == 2


def test_undo_brings_turns_back(talk: Talk) -> None:
    talk.turns.extend(Turn(user=str(i), tokens=(65,), text="A") for i in range(3))
    talk.conversation.first = 2
    talk.say("/undo")
    assert talk.conversation.first == 0


# -- stopping --------------------------------------------------------------------------------------


def test_an_answer_can_be_stopped_from_another_thread(model: Model) -> None:
    """In the middle of a pass or between two: the context holds what was said, and goes on."""
    session = Session(model, Speculation(model, SpeculationOptions(mode="layer-skip")))
    prompt = encode(model, "once upon a time")
    whole = list(session.answer(prompt, ENDLESS, max_tokens=60))
    for n in (1, 2, 30):
        model.clear()
        answer = session.answer(prompt, ENDLESS)
        pieces = []
        for piece in answer:
            pieces.append(piece)
            if len(pieces) == n:
                thread = threading.Thread(target=answer.stop)
                thread.start()
                thread.join()
        assert answer.interrupted
        assert answer.stats.stop_reason == "stopped"
        assert answer.plain_ms is not None
        assert [piece.token for piece in pieces] == [piece.token for piece in whole[:n]]
        assert model.tokens == [*prompt, *answer.tokens[:-1]]
    answer.stop()  # too late, and no harm to the next
    assert [piece.token for piece in session.answer(prompt, ENDLESS, max_tokens=60)] == [
        piece.token for piece in whole
    ]
    session.close()


def test_stopped_before_the_first_word_leaves_nothing(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk.say("Hello")
    kept = list(talk.turns)
    answer_with = talk.session.answer

    def stopped(*arguments: object, **options: object) -> object:
        answer = answer_with(*arguments, **options)  # type: ignore[arg-type]
        decode = type(talk.session.model).decode

        def stop_first(model: Model, *rest: object, **more: object) -> None:
            answer.stop()
            decode(model, *rest, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(type(talk.session.model), "decode", stop_first)
        return answer

    monkeypatch.setattr(talk.session, "answer", stopped)
    talk.say("And now?")
    assert "stopped before the first word" in talk.notes
    assert talk.turns == kept


def test_ctrl_c_stops_a_pass_under_way(model: Model) -> None:
    """The handler that Python would run only afterwards is not what stops it."""
    session = Session(model)
    answer = session.answer(encode(model, "once"), ENDLESS)
    before = signal.getsignal(signal.SIGINT)
    with stopped_by_ctrl_c(answer):
        for piece in answer:
            assert piece
            if len(answer.tokens) == 5:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)  # in a hurry
    assert 5 <= len(answer.tokens) < 20
    assert answer.interrupted
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("n_before", "said_n"), [(0, 0), (1, 4)])
def test_ctrl_c_while_the_lock_is_held(
    model: Model, monkeypatch: pytest.MonkeyPatch, n_before: int, said_n: int
) -> None:
    """The handler runs in the thread that holds it, between two of its instructions."""
    answer = Session(model).answer(encode(model, "once"), ENDLESS, max_tokens=4)
    stop_flag = type(model.stop)
    lower, n_calls = stop_flag.lower, count()

    def interrupted(flag: StopFlag) -> None:
        if next(n_calls) == n_before:
            signal.raise_signal(signal.SIGINT)
        lower(flag)

    monkeypatch.setattr(stop_flag, "lower", interrupted)
    with stopped_by_ctrl_c(answer):
        assert len(list(answer)) == said_n
    assert answer.interrupted
    assert len(list(Session(model).answer(answer.prompt, ENDLESS, max_tokens=4))) == 4


def test_stopped_while_the_model_is_waited_for(model: Model) -> None:
    """The prompt is not decoded any more."""
    session = Session(model)
    answer = session.answer(encode(model, "once"), ENDLESS, max_tokens=4)

    @contextmanager
    def leaving(**_: bool) -> Iterator[None]:
        answer.stop()
        yield

    session.exclusive = leaving  # type: ignore[method-assign]
    assert list(answer) == []
    assert model.tokens == []
    assert answer.stats.stop_reason == "stopped"
    del session.exclusive
    assert len(list(session.answer(answer.prompt, ENDLESS, max_tokens=4))) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DecodeError("broken")])
def test_what_was_said_before_it_failed_is_kept(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    whole = talk.say("Hello")
    talk.say("/undo")
    with monkeypatch.context() as patch:
        patch.setattr(Answer, "__iter__", fails_after(5, error))
        with pytest.raises(type(error)):
            talk.say("Hello")
    (turn,) = talk.turns
    assert len(turn.tokens) == len(turn.sources) == 5
    assert turn.stop_reason == "stopped"
    assert whole.encode().startswith(turn.text.rstrip("\ufffd").encode())
    path = tmp_path / "talk.json"
    talk.say(f"/save {path}")
    talk.say("More")
    assert len(talk.turns) == 2
    talk.say(f"/load {path}")
    assert talk.turns == [turn]
    with monkeypatch.context() as patch:
        patch.setattr(Answer, "__iter__", fails_after(0, error))
        with pytest.raises(type(error)):
            talk.say("And?")
    assert talk.turns == [turn]


def fails_after(n: int, error: BaseException) -> Callable[[Answer], Iterator[Piece]]:
    """Of `Answer.__iter__`: an error instead of the piece after `n`."""
    pieces_of = Answer.__iter__

    def pieces(answer: Answer) -> Iterator[Piece]:
        for number, piece in enumerate(pieces_of(answer)):
            if number == n:
                raise error
            yield piece

    return pieces


# -- files -----------------------------------------------------------------------------------------


def test_a_saved_conversation_goes_on_as_if_it_had_never_stopped(
    open_model: OpenModel, model: Model, tmp_path: Path
) -> None:
    talk = Talk(model, system="Be brief.")
    talk.say("Grüße 🎉")
    talk.say("More")
    path = tmp_path / "talk.json"
    talk.say(f"/save {path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(tmp_path.iterdir()) == [path]
    third = talk.conversation.prompt("And?")

    other = Talk(open_model(model.path, n_ctx=512))
    other.say("something else")
    other.say(f"/load {path}")
    assert other.turns == talk.turns[:2]
    assert other.conversation.system == "Be brief."
    assert other.conversation.prompt("And?") == third
    other.say("And?")
    assert "loaded 2 turns" in other.notes
    other.say(f"/save {path}")  # its own file may be replaced
    assert len(json.loads(path.read_text())["turns"]) == 3


def test_tokens_of_another_vocabulary_are_made_anew(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    turn = Turn(user="Hi", tokens=(99999, 3), text="yes", sources=("target", "ngram"), seed=1)
    archive.save(path, model, system=None, turns=[turn])
    _, (loaded,) = archive.load(path, model)
    assert loaded.tokens == tuple(encode(model, "yes"))
    assert loaded.sources == ()
    assert (loaded.user, loaded.text, loaded.seed) == ("Hi", "yes", 1)


def test_other_files_are_not_replaced(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text("print()")
    with pytest.raises(SwiftError, match="not a saved conversation; choose another name"):
        talk.say(f"/save {path}")
    assert path.read_text() == "print()"


SAVED = {"format": archive.FORMAT, "version": 1, "model": "m", "system": None}
TURN = {"user": "a", "assistant": "b", "tokens": [98], "sources": ["target"], "seed": 1,
        "stop_reason": "eos"}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not a saved conversation"),
        ("{", "not a saved conversation"),
        ("[" * 100_000, "not a saved conversation"),
        ("[]", "/save writes one"),
        ({**SAVED, "version": 9, "turns": []}, "another version"),
        (SAVED, "'turns' is missing"),
        ({**SAVED, "turns": {}}, "not a list"),
        ({**SAVED, "turns": [1]}, "not an object"),
        ({**SAVED, "turns": [], "system": 1}, "not a text"),
        ({**SAVED, "turns": [{**TURN, "tokens": [-1]}]}, "not a token id"),
        ({**SAVED, "turns": [{**TURN, "tokens": [True]}]}, "not a token id"),
        ({**SAVED, "turns": [{**TURN, "tokens": [1e400]}]}, "not a token id"),
        (
            {**SAVED, "turns": [{**TURN, "sources": ["a", "b"]}]},
            "the numbers of tokens and sources differ",
        ),
        ({**SAVED, "turns": [{**TURN, "user": None}]}, "not a text"),
        ({**SAVED, "turns": [{"user": "a"}]}, "is missing"),
    ],
)
def test_a_damaged_conversation_is_refused_and_the_present_one_stays(
    talk: Talk, tmp_path: Path, content: object, says: str
) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    talk.say("Hello")
    turns = list(talk.turns)
    with pytest.raises(SwiftError, match=says) as raised:
        talk.say(f"/load {path}")
    assert str(path) in str(raised.value)
    assert talk.turns == turns
    path.write_bytes(b"\xff\x00")
    with pytest.raises(SwiftError, match=f"{path} is not UTF-8 text"):
        talk.say(f"/load {path}")


def test_a_conversation_may_begin_with_a_byte_order_mark(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({**SAVED, "turns": [TURN]}).encode())
    assert archive.load(path, model)[1][0].user == "a"


def test_half_a_character_in_a_file(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({**SAVED, "turns": [{**TURN, "user": "\ud83c"}]}))
    _, (turn,) = archive.load(path, model)
    assert turn.user == "?"


def test_a_full_disk_leaves_the_file_as_it_was(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk.json"
    talk.say("Hello")
    talk.say(f"/save {path}")
    before = path.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SwiftError, match="cannot be written: No space left"):
        talk.say(f"/save {path}")
    assert path.read_text() == before
    assert sorted(tmp_path.iterdir()) == [path]


def test_ctrl_c_thrice_interrupts(model: Model) -> None:
    answer = Session(model).answer(encode(model, "once"), ENDLESS)

    def press_thrice() -> None:
        with stopped_by_ctrl_c(answer):
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        press_thrice()


# -- the idle search -------------------------------------------------------------------------------


def test_the_idle_search_finds_better_drafts_and_says_so(model: Model) -> None:
    """Planted: FFN 1 adds nothing, so leaving it out is free."""
    talk = Talk(model, mode="layer-skip", settings=Settings(sampling=SEEDED, n_predict=120))
    talk.session.search_when_idle(talk.chat.on_idle_step)
    first = talk.say("Hello")
    idle = talk.session.idle
    assert idle is not None
    deadline = time.monotonic() + 20
    while idle.meter.steps < 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert idle.meter.steps >= 20
    assert " steps in " in talk.say("/stats")
    talk.say("/undo")
    assert talk.say("Hello") == first  # the search leaves no trace
    talk.session.save()
    talk.session.close()


@pytest.mark.parametrize("is_kept", [True, False])
def test_speculation_changes_after_a_search_that_broke(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_kept: bool
) -> None:
    """The new one is in use, the old one closed and what it learned kept, if it can be."""
    session, done = talk.session, list[str]()
    talk.say("/speculation layer-skip")
    before = session.speculation
    assert before is not None

    def on_step() -> None:
        if session.speculation is before:
            raise DecodeError("the search is broken")

    def save() -> None:
        done.append("save")
        if not is_kept:
            raise SwiftError("no room")

    session.search_when_idle(on_step)
    talk.say("Hello")
    idle = session.idle
    assert idle is not None
    deadline = time.monotonic() + 20
    while idle._error is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert idle._error is not None
    monkeypatch.setattr(before, "save", save)
    monkeypatch.setattr(before, "close", lambda: done.append("close"))
    talk.say("/speculation recycling,layer-skip")
    assert done == ["save", "close"]
    assert session.speculation is not before
    assert session.idle is not idle
    talk.say("Hello")
    assert len(talk.turns) == 2
    assert "the search in idle time ended: the search is broken" in caplog.text
    assert ("what was learned is lost: no room" in caplog.text) == (not is_kept)


def test_what_was_learned_is_kept_now_and_then(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    speculation = talk.session.speculation
    assert speculation is not None
    saves, now = list[float](), [1000.0]
    save = speculation.save

    def counted() -> None:
        saves.append(now[0])
        save()

    monkeypatch.setattr(speculation, "save", counted)
    monkeypatch.setattr("swift_gguf.speculation.monotonic", lambda: now[0])
    for seconds in (0, 30, 31, 1):
        now[0] += seconds
        talk.say("Hello")
    assert saves == [1000.0, 1061.0]


def test_better_drafts_are_told_of_once_they_are_worth_it(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[float | None] = [None]
    monkeypatch.setattr(talk.chat, "_expectation", lambda: expected[-1])
    talk.say("Hello")
    for value, found in [
        (None, ""),
        (0.97, ""),  # plain decoding is faster still
        (1.01, ""),
        (1.3, "better drafts, predicted speed-up 1.30x"),
    ]:
        expected.append(value)
        talk.chat.on_idle_step()
        assert talk.chat.current_figures().found == found
    talk.say("More")  # they draft from now on
    assert talk.chat.current_figures().found == ""
    expected.append(1.5)
    talk.chat.on_idle_step()
    assert talk.chat.current_figures().found.endswith("speed-up 1.50x, before 1.30x")
