"""The planner's choices without the machine's noise: recorded answers, replayed on measured costs.

An answer is recorded once, with the target's likeliest tokens at each of its positions, which is
all that lookups learn from.  A replay then drafts, verifies and learns as in a generation, by the
planner's and the sources' own code, and adds up what the passes would take.  So settings can be
told apart that differ by less than a shared machine's mood, and repeated to the last digit.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from lab.command import model_parser, positive, tell
from lab.output import markdown, write_json
from swift_gguf.bench.modes import AUTO, PLAIN, Mode
from swift_gguf.bench.suites import NAMES, load
from swift_gguf.drafting.ngram import NGram
from swift_gguf.drafting.policy import Threshold
from swift_gguf.drafting.recycling import Recycling
from swift_gguf.drafting.source import Cycle, Lookup
from swift_gguf.drafting.tree import ROOT, Shape, Tree
from swift_gguf.drafting.verification import verify
from swift_gguf.engine import generate
from swift_gguf.hub import models
from swift_gguf.model import Model, ModelOptions
from swift_gguf.outputs import require_folder
from swift_gguf.planning import Planner
from swift_gguf.planning.cost import Costs
from swift_gguf.planning.economy import MAX_NODES
from swift_gguf.planning.measuring import measure
from swift_gguf.planning.planner import WIDE
from swift_gguf.sampling import Sampler, SamplingOptions
from swift_gguf.text import chat_template, encode, render_chat

N_LIKELIEST = 4  # what the planner's recycling asks of a row
CHUNK = 32
WARM_UP = 64

SWEPT_SOURCES = (("ngram",), ("recycling",), ("ngram", "recycling"))
SWEPT_LENGTHS = (1, 2, 3, 5, 7, 11)
LOOKUPS: Mapping[str, Callable[[], Lookup]] = {"ngram": NGram, "recycling": Recycling}


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A prompt, the target's greedy answer, and the most likely tokens at each position.

    Raises:
        ValueError: there are not as many rows of likeliest tokens as tokens and one.
    """

    category: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """An end of generation excluded."""
    likeliest: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]
    """[len(answer) + 1], after the prompt and after each token: tokens and probabilities."""

    def __post_init__(self) -> None:
        if len(self.likeliest) != len(self.answer) + 1:
            raise ValueError(f"{len(self.likeliest)} rows for {len(self.answer)} tokens")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, for `from_dict`."""
        rows = [[list(tokens), list(probabilities)] for tokens, probabilities in self.likeliest]
        return {
            "category": self.category,
            "prompt": list(self.prompt),
            "answer": list(self.answer),
            "likeliest": rows,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recording:
        """The inverse of `as_dict`."""
        return cls(
            category=values["category"],
            prompt=tuple(values["prompt"]),
            answer=tuple(values["answer"]),
            likeliest=tuple((tuple(ids), tuple(ps)) for ids, ps in values["likeliest"]),
        )


def record(model: Model, category: str, prompt: Sequence[int], *, max_tokens: int) -> Recording:
    """Answers a prompt plainly, and reads the likeliest tokens off in a second pass."""
    with Sampler(model, SamplingOptions(temperature=0)) as sampler:
        stream = generate(model, prompt, sampler=sampler, max_tokens=max_tokens)
        answer = [token.id for token in stream]
    model.rollback(len(prompt) - 1)
    tokens = [prompt[-1], *answer]
    likeliest = []
    for start in range(0, len(tokens), CHUNK):
        piece = tokens[start : start + CHUNK]
        model.decode(piece, n_outputs=len(piece))
        for row in range(len(piece)):
            ids, probabilities = model.top(row, N_LIKELIEST)
            likeliest.append((tuple(ids), tuple(round(p, 4) for p in probabilities)))
    return Recording(
        category=category, prompt=tuple(prompt), answer=tuple(answer), likeliest=tuple(likeliest)
    )


class Prices:
    """Fixed costs; see `economy.Prices`."""

    is_known = True

    def __init__(self, costs: Costs) -> None:
        self._ms = [costs.verify_ms(width) for width in range(1, MAX_NODES + 2)]

    def verify_ms(self, width: int) -> float:
        return self._ms[width - 1]

    def observe(self, width: int, ms: float) -> None:
        pass


class Text:
    """Stands for the model that the planner uses; answers from a recording."""

    n_branches = Model.n_branches

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.rows: dict[int, tuple[Sequence[int], Sequence[float]]] = {}
        """What `top` gives for the rows of the latest pass that lie on the text."""

    def is_eog(self, token: int) -> bool:
        return False

    def top(self, row: int, k: int = 1) -> tuple[Sequence[int], Sequence[float]]:
        tokens, probabilities = self.rows[row]
        return tokens[:k], probabilities[:k]


class Replay:
    """One mode, which learns from one recording to the next."""

    def __init__(self, mode: Mode, costs: Costs) -> None:
        """mode: ``auto``, or sources of `LOOKUPS` with a fixed length."""
        self._text = Text()
        self._prices = Prices(costs)
        self._n_max = mode.draft_max or MAX_NODES
        self._planner = Planner(
            cast(Model, self._text),
            self._prices,
            lookups=[LOOKUPS[name]() for name in mode.sources or LOOKUPS],
            fixed=Threshold(0.0) if mode.is_fixed else None,
            shape=Shape(n_nodes=0) if mode.is_fixed else WIDE,
        )

    def play(self, recording: Recording) -> float:
        """Milliseconds of the answer after its first token, which comes with the prompt."""
        self._planner.begin()
        self._text.tokens = list(recording.prompt)
        total, pending, last = 0.0, 0, len(recording.answer) - 1
        while pending < last:
            ms, n_tokens = self._cycle(recording, pending, min(self._n_max, last - pending - 1))
            total, pending = total + ms, pending + n_tokens
        return total

    def _cycle(self, recording: Recording, pending: int, n_max: int) -> tuple[float, int]:
        """One cycle; the answer's token `pending` is the first one to decode."""
        text, answer = self._text, recording.answer
        tree = self._planner.draft(answer[pending], n_max=n_max) if n_max > 0 else Tree()
        places = _places(tree, answer, pending)
        text.rows = {
            node + 1: recording.likeliest[place + 1]  # ROOT is row 0
            for node, place in places.items()
        }
        verdict = verify(tree, choose=lambda node: answer[places[node] + 1], is_eog=text.is_eog)
        text.tokens += [answer[pending], *(tree.tokens[node] for node in verdict.kept)]
        ms = self._prices.verify_ms(len(tree) + 1)
        self._planner.observe(Cycle(tree, verdict, draft_s=0.0, verify_s=ms / 1e3))
        return ms, len(verdict.tokens)


def _places(tree: Tree, answer: Sequence[int], pending: int) -> dict[int, int]:
    """The nodes whose path agrees with the answer, and their positions in it."""
    places = {ROOT: pending}
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        place = places.get(parent, len(answer)) + 1
        if place < len(answer) and answer[place] == token:
            places[node] = place
    return places


def sweep() -> list[Mode]:
    """Fixed settings of lookups, of which the best is the limit."""
    return [Mode("+".join(names), n) for names in SWEPT_SOURCES for n in SWEPT_LENGTHS]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A category, or all of them."""

    category: str
    auto: float
    """Speed-up over plain decoding."""
    best: float
    """The best of the fixed settings, including plain decoding."""
    best_name: str


def compare(recordings: Sequence[Recording], costs: Costs, *, cold: bool = False) -> list[Line]:
    """Compares `auto` with every fixed setting, by category and in total.

    cold: each recording is the first that a mode meets.
    """
    recordings = [each for each in recordings if len(each.answer) > 1]
    auto = _times(Mode(AUTO), recordings, costs, cold=cold)
    plain = [(len(each.answer) - 1) * costs.verify_ms(1) for each in recordings]
    fixed = {PLAIN: plain}
    for mode in sweep():
        fixed[mode.name] = _times(mode, recordings, costs, cold=cold)

    def line(name: str, chosen: Sequence[int]) -> Line:
        def total(times: Sequence[float]) -> float:
            return sum(times[i] for i in chosen)

        best = min(fixed, key=lambda name: total(fixed[name]))
        base = total(plain)
        return Line(
            category=name,
            auto=base / total(auto),
            best=base / total(fixed[best]),
            best_name=best,
        )

    names = list(dict.fromkeys(each.category for each in recordings))
    lines = [
        line(name, [i for i, each in enumerate(recordings) if each.category == name])
        for name in names
    ]
    return [*lines, line("all", range(len(recordings)))]


def _times(mode: Mode, recordings: Sequence[Recording], costs: Costs, *, cold: bool) -> list[float]:
    replay = Replay(mode, costs)
    times = []
    for recording in recordings:
        times.append((Replay(mode, costs) if cold else replay).play(recording))
    return times


# -- the command -----------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    parser = model_parser("replay", __doc__)
    parser.add_argument(
        "--suite", action="append", metavar="FILE", help="as `swift-gguf bench`; may be repeated"
    )
    parser.add_argument("--limit", type=positive, default=45, metavar="N", help="rows")
    parser.add_argument("--tokens", type=positive, default=96, metavar="N", help="of an answer")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the order they come in")
    parser.add_argument(
        "--recordings", type=Path, metavar="FILE", help="kept here, and taken from here if it is"
    )
    args = parser.parse_args(arguments)
    require_folder(args.json)
    recordings, costs = _recorded(args)
    random.Random(args.seed).shuffle(recordings)
    print("passes of w tokens: " + ", ".join(f"{w}: {ms:.1f} ms" for w, ms in costs.pass_ms))
    lines = {
        "one answer after the other": compare(recordings, costs),
        "each answer the first one": compare(recordings, costs, cold=True),
    }
    for title, found in lines.items():
        print(f"\n{title}\n\n{render(found)}")
    if args.json:
        write_json(args.json, {title: [asdict(x) for x in found] for title, found in lines.items()})
    return 0


def render(lines: Sequence[Line]) -> str:
    """Markdown."""
    rows = (
        [x.category, f"{x.auto:.2f}", f"{x.best:.2f} {x.best_name}", f"{x.auto / x.best:.2f}"]
        for x in lines
    )
    return markdown(["category", "auto", "best fixed", "auto / best"], rows)


def _recorded(args: argparse.Namespace) -> tuple[list[Recording], Costs]:
    path: Path | None = args.recordings
    if path and path.exists():
        values = json.loads(path.read_text(encoding="utf-8"))
        costs = Costs.from_dict(values["costs"])
        return [Recording.from_dict(each) for each in values["recordings"]], costs
    require_folder(path)
    rows = load(args.suite or NAMES, categories=(), limit=args.limit)
    options = ModelOptions(n_threads=args.threads, n_gpu_layers=args.n_gpu_layers, sidecar=None)
    recordings = []
    with Model(models.resolve(args.model), options) as model:
        model.decode([7919 * i % model.n_vocab for i in range(WARM_UP)])
        costs = measure(model)
        for n, row in enumerate(rows, 1):
            text = row.turns[0]
            if chat_template(model) is not None:
                text = render_chat(model, [{"role": "user", "content": text}])
            prompt = encode(model, text)
            if len(prompt) + args.tokens + 1 <= model.n_ctx:
                model.clear()
                recordings.append(record(model, row.category, prompt, max_tokens=args.tokens))
            tell(f"{n} of {len(rows)} recorded")
    if path:
        values = {
            "costs": costs.as_dict(),
            "recordings": [recording.as_dict() for recording in recordings],
        }
        write_json(path, values)
    return recordings, costs
