"""Prompts that are read while they are typed, on generated and on real models."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from swift_gguf.chat import ahead as ahead_module
from swift_gguf.chat.ahead import ReadAhead
from swift_gguf.chat.chat import Chat
from swift_gguf.chat.commands import begun
from swift_gguf.chat.conversation import Conversation, Turn
from swift_gguf.chat.screen import Plain
from swift_gguf.chat.settings import Settings
from swift_gguf.errors import SwiftError
from swift_gguf.hub.models import resolve
from swift_gguf.model.model import Model
from swift_gguf.sampling.sampling import SamplingOptions
from swift_gguf.session import Session
from swift_gguf.text.text import encode
from tests.chat.test_chat import REASONING, Talk
from tests.fixtures.tokenizer import CHATML, THINKING

OpenModel = Callable[..., Model]
GREEDY = Settings(sampling=SamplingOptions(temperature=0), n_predict=12)
SEEDED = Settings(sampling=SamplingOptions(seed=7, temperature=0.9), n_predict=12)

WORDS = st.sampled_from(
    [" ", "  ", "\n", "\n\n", ".", ", ", "the", " the", "answer", "ing", "'s", "'", "123", "4",
     "漢字", "。", "🎉", "e\u0301", "a", "aa", "(", "):", "\t", "<|im", "_end|>", "==", "---",
     "https://x.y/z?q=1&", "\u00a0", "\u3000", "पं", "한국어"]
)  # fmt: skip
TEXTS = (
    st.lists(WORDS, max_size=30).map("".join)
    | st.text(max_size=40)
    | st.text(alphabet="ab \n.", max_size=60)
)


class Typist(Talk):
    """A chat whose messages are typed, and read meanwhile."""

    def type(self, lines: Sequence[str], *, waits: Callable[[], bool] = lambda: True) -> str:
        """Types until the last of the lines is there, and sends it.

        waits: whether what is certain of a line is read before the next key.
        """
        with ReadAhead(self.session, lambda line: begun(self.chat, line)) as ahead:
            with ahead.typing():
                for line in lines:
                    ahead.changed(line)
                    if waits():
                        read(ahead)
            return self.say(lines[-1])

    @property
    def read_n(self) -> int:
        return self.chat.figures.read_n


def read(ahead: ReadAhead) -> None:
    """Waits until all that is certain is read."""
    deadline = time.monotonic() + 60
    while ahead._due is not None or ahead._works:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "PAUSE_S", 0.0)
    monkeypatch.setattr(ahead_module, "BATCH", 16)


@pytest.fixture
def model(tiny: Callable[..., Path], open_model: OpenModel) -> Model:
    return open_model(tiny("llama", noop_ffn=(1,), quant="Q8_0"), n_ctx=512)  # bit-invariant


# -- what is certain -------------------------------------------------------------------------------


def holds_for_every_text(model: Model, template: str | None, *, n: int) -> None:
    """Whatever is typed on, the prompt begins with the tokens that were certain before."""
    conversation = Conversation(model, template=template, system="Be brief.")
    conversation.turns.append(Turn(user="Hi", tokens=tuple(encode(model, "Yes.")), text="Yes."))
    chat = Chat(Session(model), conversation, Plain())
    n_begun = 0

    @settings(max_examples=n, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
    @given(TEXTS, TEXTS)
    def check(text: str, more: str) -> None:
        nonlocal n_begun
        assume(not (text + more)[:1].isspace())  # blanks may join the template's own
        known = chat.begun(text)
        n_begun = max(n_begun, len(known))
        assert conversation.prompt(text + more)[: len(known)] == known

    check()
    assert n_begun > len(chat.begun("")) + 10


@pytest.mark.parametrize("template", [CHATML, REASONING.replace(".split('</think>')[-1]", "")])
def test_what_is_certain_stays_whatever_is_typed_on(model: Model, template: str) -> None:
    holds_for_every_text(model, template, n=200)


GEMMA = CHATML.replace("<|im_start|>", "<start_of_turn>").replace("<|im_end|>", "<end_of_turn>")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "template"),
    [("smollm2-135m", CHATML), ("qwen2.5-coder-0.5b", CHATML), ("gemma3-270m", GEMMA)],
)
def test_what_is_certain_stays_with_the_tokens_of_real_models(
    open_model: OpenModel, name: str, template: str
) -> None:
    holds_for_every_text(open_model(resolve(name), n_ctx=2048), template, n=300)


def test_all_but_the_last_word_is_certain(model: Model) -> None:
    chat = Typist(model, system="Be brief.").chat
    opening = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    for line, certain in [
        ("", ""),
        ("Hel", ""),
        ("Hello", ""),
        ("Hello wor", "Hello"),
        ("Hello world ", "Hello world"),
        ('"""\nHello\nwor', "Hello"),
        ('"""Hello world"""', "Hello"),
        ("/home/you is a", "/home/you is"),
        ("/set temp 0", ""),
        ("/nonsense with words", ""),
    ]:
        assert begun(chat, line) == encode(model, opening + certain), line


def test_a_file_is_certain_as_soon_as_its_name_is_there(model: Model, tmp_path: Path) -> None:
    talk = Typist(model)
    path = tmp_path / "notes.txt"
    path.write_text("the answer is not a question\n")
    opening = encode(model, "<|im_start|>user\n")
    assert begun(talk.chat, f"/read {path}") == encode(
        model, "<|im_start|>user\nnotes.txt:\n```\nthe answer is not a question\n```"
    )
    for wrong in ("/read", f"/read {tmp_path}", f"/read {path}x"):
        with pytest.raises(SwiftError):
            begun(talk.chat, wrong)
    talk.say(f"/read {path}")
    attached = begun(talk.chat, "")
    assert attached[: len(opening)] == opening
    assert len(attached) > len(opening) + 10
    assert begun(talk.chat, f"/read {path}")[: len(attached)] == attached
    talk.say("/undo")
    assert begun(talk.chat, "") == opening


def test_thoughts_that_the_template_drops_are_not_read(model: Model) -> None:
    tokens = tuple(b"<think>\nhm\n</think>\n\nyes")
    talk = Typist(model, template=REASONING)
    talk.turns.append(
        Turn(user="Hi", tokens=tokens, text=bytes(tokens).decode(), thought_n=len(tokens) - 3)
    )
    known = begun(talk.chat, "So what")
    assert known == talk.conversation.prompt("So what")[: len(known)]
    assert ord("h") not in known[20:]


def test_how_the_model_shall_think_is_known(model: Model) -> None:
    """`/set reasoning` holds for what is read ahead, too."""
    template = THINKING.replace("{%- for", "{%- if enable_thinking %}{{- 'T' }}{%- endif %}{%- for")
    talk = Typist(model, template=template)
    talk.say("/set reasoning on")
    assert begun(talk.chat, "")[0] == ord("T")
    talk.say("/set reasoning off")
    assert begun(talk.chat, "")[0] != ord("T")


@pytest.mark.parametrize("context", ["shift", "stop"])
def test_nothing_is_read_that_does_not_fit(model: Model, context: str) -> None:
    talk = Typist(model)
    talk.say(f"/set context {context}")
    line = "x y " * 100
    assert begun(talk.chat, line)
    assert begun(talk.chat, line * 2) == []
    talk.type([line, line * 2, "Hello "])
    assert len(talk.turns) == 1


# -- answers ---------------------------------------------------------------------------------------


def typed(line: str) -> list[str]:
    """Every state of a line that is typed key by key."""
    return [line[:n] for n in range(len(line) + 1)]


FIRST, SECOND = "Tell me of the answer to that question", "and of the model's token ids"
WAYS = {
    "typed": [*typed(FIRST)],
    "pasted": [FIRST],
    "edited": [*typed("Tell me of it all"), "Tell of it all", FIRST],
    "deleted": [*typed(FIRST), *reversed(typed(FIRST)), FIRST],
    "recalled": ["something else that was said before", "", "and another one ", FIRST],
    "a command first": [*typed("/stats"), "", FIRST],
}


@pytest.mark.parametrize("mode", ["off", "ngram,recycling", "layer-skip"])
@pytest.mark.parametrize("how", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_the_answer_is_the_same(model: Model, how: Settings, mode: str) -> None:
    plain = Talk(model, settings=how, system="Be brief.")
    for line in (FIRST, SECOND):
        plain.say(line)
    for name, lines in WAYS.items():
        model.clear()
        talk = Typist(model, settings=how, system="Be brief.", mode=mode)
        talk.type(lines)
        assert talk.read_n > 20
        talk.type(typed(SECOND))
        assert [turn.tokens for turn in talk.turns] == [turn.tokens for turn in plain.turns], name
        assert talk.prompt_n < 30
        talk.session.close()


def test_the_footer_says_how_much_was_there(model: Model) -> None:
    talk = Typist(model, settings=GREEDY)
    talk.type(typed(FIRST))
    prompt = encode(model, f"<|im_start|>user\n{FIRST}<|im_end|>\n<|im_start|>assistant\n")
    known = encode(model, f"<|im_start|>user\n{FIRST.rpartition(' ')[0]}")
    assert (talk.chat.figures.prompt_n, talk.read_n) == (len(prompt), len(known))
    assert talk.prompt_n == len(prompt) - len(known)
    assert f"{len(prompt)} tokens, {len(known)} read before Enter" in talk.say("/stats")
    talk.say("/clear")
    model.clear()
    talk.say(FIRST)
    assert (talk.read_n, talk.prompt_n) == (0, len(prompt))  # the control


def test_a_file_is_read_while_it_is_named(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("the answer is not a question\n" * 5)
    talk, plain = Typist(model, settings=GREEDY), Talk(model, settings=GREEDY)
    talk.type(typed(f"/read {path}"))
    assert len(model.tokens) > 40
    talk.type(["Why"])
    assert talk.prompt_n < 25
    model.clear()
    plain.say(f"/read {path}")
    plain.say("Why")
    (turn,), (expected,) = talk.turns, plain.turns
    assert (turn.user, turn.tokens) == (expected.user, expected.tokens)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_whatever_is_typed_the_answers_are_the_same(
    tiny: Callable[..., Path], open_model: OpenModel, family: str
) -> None:
    """Edits at random, with and without time to read them; the idle search runs beside."""
    model = open_model(tiny(family, quant="Q8_0") if family == "llama" else tiny(family), n_ctx=512)
    chance = random.Random(5)
    lines = ["the answer to that question", "and with it", "is not for you", "of the model"]
    plain = Talk(model, settings=SEEDED)
    for line in lines:
        plain.say(line)
    model.clear()
    talk = Typist(model, settings=SEEDED, mode="layer-skip" if family == "llama" else "auto")
    talk.session.search_when_idle()
    for line in lines:
        states, text = [""], ""
        for _ in range(30):
            start = chance.randint(0, len(text))
            end = min(len(text), start + chance.randint(0, 6))
            text = text[:start] + chance.choice(["", "the ", "x", line, " \n"]) + text[end:]
            text = text.lstrip("/")[:120]
            states.append(text)
        talk.type([*states, line], waits=lambda: chance.random() < 0.3)
    assert [turn.tokens for turn in talk.turns] == [turn.tokens for turn in plain.turns]
    talk.session.close()


def test_the_idle_search_keeps_to_the_answer(model: Model) -> None:
    """What the person types is not what the model says."""
    settings = Settings(sampling=SEEDED.sampling, n_predict=60)
    talk = Typist(model, mode="layer-skip", settings=settings)
    speculation = talk.session.speculation
    assert speculation is not None
    talk.session.search_when_idle()
    talk.say("Hello")
    windows = speculation._idle_windows
    assert windows is not None
    answered = len(model.tokens)
    with ReadAhead(talk.session, lambda line: begun(talk.chat, line)) as ahead, ahead.typing():
        ahead.changed("the answer to that question is not for you ")
        read(ahead)
        with talk.session.exclusive():
            assert len(model.tokens) > answered + 10
            for _ in range(20):
                window = windows()
                assert window is not None
                assert window.start + window.n < answered
                assert window.start >= windows.first - 1
    talk.session.close()


# -- a real model ----------------------------------------------------------------------------------


@pytest.fixture
def smollm(open_model: OpenModel) -> Model:
    return open_model(resolve("smollm2-135m"), n_ctx=2048)


@pytest.mark.slow
def test_a_pass_that_reads_deleted_text_stops(
    smollm: Model, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    monkeypatch.undo()
    talk = Typist(smollm)
    text = "the old ships sailed to the harbour with some salt and " * 60
    took = []
    with ReadAhead(talk.session, lambda line: begun(talk.chat, line)) as ahead, ahead.typing():
        read(ahead)
        opening = list(smollm.tokens)
        for _ in range(5):
            ahead.changed(text)
            while not ahead.is_in_pass:
                time.sleep(0.0005)
            time.sleep(0.02)  # somewhere in the pass
            start = time.monotonic()
            ahead.changed("")
            while ahead._works:
                time.sleep(0.0005)
            took.append(time.monotonic() - start)
            assert smollm.tokens[: len(opening)] == opening
            read(ahead)
    record_property("seconds until a pass stops", took)
    print("a pass stops after", ", ".join(f"{1e3 * each:.1f} ms" for each in took))
    assert sorted(took)[2] < 1  # 0.05 on an idle machine


QUESTION = "What did they carry?"


@pytest.mark.slow
def test_a_real_answer_is_the_same(smollm: Model) -> None:
    text = "The 7 old ships sailed to the harbour, with 12 barrels of salt.\n\n" * 20
    for how in (GREEDY, SEEDED):
        plain = Talk(smollm, settings=how)
        plain.say(text + QUESTION)
        smollm.clear()
        talk = Typist(smollm, settings=how)
        talk.type(
            [
                text,
                f"{text}Who",
                text[:300],
                text,
                *(text + q for q in typed("What did they carry?")),
            ]
        )
        assert [turn.tokens for turn in talk.turns] == [turn.tokens for turn in plain.turns]
        assert talk.prompt_n < 16
        smollm.clear()
