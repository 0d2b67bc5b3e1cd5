"""How long the first token takes after Enter, with the prompt read ahead and without."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter, sleep
from typing import Any

from lab.command import model_parser, positive, tell
from lab.output import markdown, write_json
from swift_gguf.bench.spread import Spread
from swift_gguf.bench.subject import Machine, Subject, machine, subject
from swift_gguf.chat.ahead import ReadAhead
from swift_gguf.chat.chat import Chat
from swift_gguf.chat.commands import begun
from swift_gguf.chat.conversation import Conversation
from swift_gguf.chat.screen import Plain
from swift_gguf.chat.settings import Settings
from swift_gguf.hub import models
from swift_gguf.model import Model, ModelOptions
from swift_gguf.outputs import require_folder
from swift_gguf.sampling import SamplingOptions
from swift_gguf.session import Session
from swift_gguf.suite import BUILT_IN
from swift_gguf.text import encode

SETTINGS = Settings(sampling=SamplingOptions(temperature=0), n_predict=16)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Times to the first token, in seconds from Enter, and what it takes to stop a pass."""

    machine: Machine
    subject: Subject
    prompt_n: int
    pause_s: float
    """Time between the paste and Enter."""
    read_n: int
    """Tokens of the prompt that were read before Enter, in the last round."""
    ahead_s: Spread
    without_s: Spread
    stop_ms: Spread
    """From the deletion of the text until the pass that reads it has stopped."""
    longest_stop_ms: float
    same_texts: int
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Watched(io.StringIO):
    """Notes when the first text is written."""

    first: float | None = None

    def write(self, text: str) -> int:
        if self.first is None and text:
            self.first = perf_counter()
        return super().write(text)


def measure(
    model: Model, text: str, *, pause_s: float, rounds: int, progress: Callable[[str], None]
) -> Report:
    """Pastes the text, waits, and presses Enter: in turns with reading ahead and without."""
    ahead_s, without_s, same = [], [], 0
    for number in range(rounds):
        with_it, told = _sent(model, text, pause_s=pause_s)
        figures = with_it.figures
        ahead_s.append(told[0])
        _, plainly = _sent(model, text, pause_s=None)
        without_s.append(plainly[0])
        same += told[1] == plainly[1]
        progress(f"round {number + 1} of {rounds}: {told[0]:.2f} s, without {plainly[0]:.2f} s")
    stops = list(_stops(model, text, n=rounds))
    return Report(
        machine=machine(),
        subject=subject(model),
        prompt_n=figures.prompt_n,
        pause_s=pause_s,
        read_n=figures.read_n,
        ahead_s=Spread.of(ahead_s),
        without_s=Spread.of(without_s),
        stop_ms=Spread.of(stops),
        longest_stop_ms=max(stops),
        same_texts=same,
        rounds=rounds,
    )


def _chat(model: Model, out: io.StringIO) -> Chat:
    model.clear()
    screen = Plain(out, io.StringIO())
    return Chat(Session(model), Conversation(model, system="Be brief."), screen, SETTINGS)


def _sent(model: Model, text: str, *, pause_s: float | None) -> tuple[Chat, tuple[float, str]]:
    """The chat, the seconds to the first token, and the answer.

    pause_s: None: nothing is read ahead.
    """
    out = _Watched()
    chat = _chat(model, out)
    with ReadAhead(chat.session, lambda line: begun(chat, line)) as ahead:
        if pause_s is None:
            start = perf_counter()
        else:
            with ahead.typing():
                ahead.changed(text)
                sleep(pause_s)
                start = perf_counter()
        chat.say(text)
    assert out.first is not None
    return chat, (out.first - start, out.getvalue())


def _stops(model: Model, text: str, *, n: int) -> Iterator[float]:
    """Milliseconds until a pass has stopped whose text is deleted, at n places of a pass."""
    chat = _chat(model, io.StringIO())
    with ReadAhead(chat.session, lambda line: begun(chat, line)) as ahead, ahead.typing():
        sleep(1.0)  # what comes before the message is read
        for place in range(n):
            ahead.changed(text)
            while not ahead.is_in_pass:
                sleep(0.0005)
            sleep(0.1 * place / n)
            start = perf_counter()
            ahead.changed("")
            while ahead.is_in_pass:
                sleep(0.0002)
            yield 1e3 * (perf_counter() - start)


def render(report: Report) -> str:
    """Markdown."""
    headers = ["model", "prompt", "read before Enter", "first token, s", "without, s",
               "a pass stops, ms", "longest, ms", "same texts"]  # fmt: skip
    row = [
        report.subject.name,
        f"{report.prompt_n}",
        f"{report.read_n}",
        report.ahead_s.text(),
        report.without_s.text(),
        report.stop_ms.text(1),
        f"{report.longest_stop_ms:.1f}",
        f"{report.same_texts} of {report.rounds}",
    ]
    return markdown(headers, [row])


def main(arguments: Sequence[str]) -> int:
    parser = model_parser("ahead", __doc__)
    parser.add_argument("--tokens", type=positive, default=600, metavar="N", help="of the text")
    parser.add_argument("--pause", type=float, default=5.0, metavar="S", help="before Enter")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N")
    args = parser.parse_args(arguments)
    require_folder(args.json)
    options = ModelOptions(n_threads=args.threads, n_gpu_layers=args.n_gpu_layers)
    with Model(models.resolve(args.model), options) as model:
        text = _text(model, args.tokens)
        report = measure(model, text, pause_s=args.pause, rounds=args.rounds, progress=tell)
    if args.json:
        write_json(args.json, report.as_dict())
    print(render(report))
    return 0


def _text(model: Model, n: int) -> str:
    """The tasks of the built-in suite, again and again, until there are `n` tokens."""
    lines: list[str] = []
    while len(encode(model, "\n".join(lines))) < n:
        lines.append(f"{len(lines) + 1}. {BUILT_IN[len(lines) % len(BUILT_IN)]}")
    return "\n".join([*lines, "", "How many of these are translations?"])
