#!/usr/bin/env python3
"""Whatever drafts, searches, stops or leaves early: the text is the one of plain decoding.

A round is a model, a way to speculate and some requests in one session, all drawn from the seed and
the round's number: `--seed S --first N --rounds 1` repeats it.  So that it does to the token,
clocks are drawn as well, in place of the machine's; the planner then believes in costs of all
kinds.  Only in rounds with a search in idle time do threads and real clocks decide what is drafted
when.

Models are generated ones whose arithmetic is the same at every width, or --model NAME.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

# tests/ is not installed with the package
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from swift_gguf import engine
from swift_gguf.engine import generate
from swift_gguf.gguf.sidecar import path_beside
from swift_gguf.hub.models import resolve
from swift_gguf.learning.profile import Store
from swift_gguf.llama import Llama
from swift_gguf.model import Model, ModelOptions
from swift_gguf.prepare.run import Preparation, PrepareOptions
from swift_gguf.sampling.sampling import Sampler, SamplingOptions
from swift_gguf.session import Session
from swift_gguf.speculation import TREES, Speculation, SpeculationOptions
from swift_gguf.stats import Stats
from swift_gguf.text.text import StreamDecoder, encode
from tests.fixtures.controls import accept_drafts
from tests.fixtures.tiny_gguf import write_tiny

from llama_cpp import Llama as PlainLlama, LlamaGrammar  # isort: skip - swift_gguf brings the library

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "phi3")
QUANTS = ("Q8_0", "Q4_1")
SIDECARS = ("Q8_0", "Q4_0")  # the latter with copies of attention
MODES = ("auto", "auto", "ngram", "recycling", "layer-skip", "draft-model", "ngram,recycling",
         "ngram,layer-skip", "ngram,recycling,layer-skip,draft-model")  # fmt: skip
WORDS = ("the", "model", "answer", "code", "self", "return", "print", "Hello", "world", "with",
         "question", "def", "1", "2", ",", ".", "\n", "ä", "🦙")  # fmt: skip
GRAMMARS = ("root ::= [a-z ]+", 'root ::= ("yes" | "no" | " ")+', 'root ::= "{" [^{}]* "}"')
STOPS = ("e", "the", "\n", "an")
IDLE_ATTN, IDLE_FFN = (3,), (2, 4)
"""Sub-layers that output zero in some models: drafts without them are right."""


@dataclass(frozen=True)
class Request:
    """A request for one answer."""

    prompt: tuple[int, ...]
    sampling: SamplingOptions
    max_tokens: int | None
    leave_after: int | None
    """The consumer stops reading after this many tokens."""
    stop: str | None
    """The consumer stops reading when the text contains this."""
    interrupt_s: float | None
    """Another thread stops the answer after this time; then it must begin like the plain one."""


@dataclass
class Result:
    tokens: list[int]
    held: list[int]
    """The tokens in the context afterwards."""


class Models:
    """Model files; each is written once."""

    def __init__(self, folder: Path, named: str | None) -> None:
        self._folder, self._named = folder, named

    def target(self, rng: random.Random) -> Path:
        """A model to test; some have a sidecar."""
        if self._named:
            return resolve(self._named)
        family, quant, seed = rng.choice(FAMILIES), rng.choice(QUANTS), rng.randrange(3)
        kind = rng.choice(SIDECARS) if rng.random() < 0.3 else None
        is_easy = rng.random() < 0.5
        marks = (f"-prepared-{kind}" if kind else "") + "-easy" * is_easy
        path = self._folder / f"{family}-{quant}-{seed}{marks}.gguf"
        if not path.exists():
            attn, ffn = (IDLE_ATTN, IDLE_FFN) if is_easy else ((), ())
            write_tiny(
                path, family, quant=quant, seed=seed, n_layer=6, noop_attn=attn, noop_ffn=ffn
            )
            if kind:
                _prepare(path, kind)
        return path

    def draft(self) -> Path:
        """A draft model for the others; for one of them, it is often right."""
        if self._named:
            return resolve(self._named)
        path = self._folder / "draft.gguf"
        if not path.exists():
            write_tiny(path, "llama", quant="Q8_0", n_layer=6, noop_ffn=(2,))
        return path


def _prepare(path: Path, kind: str) -> None:
    options = PrepareOptions(width=0.5, n_head=96, n_tokens=300, answer_tokens=12, kind=kind)
    loading = ModelOptions(n_ctx=512, n_batch=128, n_gpu_layers=0, n_threads=1, sidecar=None)
    with Model(path, loading) as model:
        preparation = Preparation(model, [list(range(5, 25))], options)
        preparation.write(path_beside(path), list(preparation.answers()))


# -- drawing ---------------------------------------------------------------------------------------


def draw_speculation(rng: random.Random, models: Models) -> SpeculationOptions:
    mode = rng.choice(MODES)
    by_hand = "layer-skip" in mode and rng.random() < 0.3
    return SpeculationOptions(
        mode=mode,
        draft_model=models.draft() if "draft-model" in mode else None,
        skip_attn=frozenset(rng.choice((IDLE_ATTN, (), (1, 4)))) if by_hand else None,
        skip_ffn=frozenset(rng.choice((IDLE_FFN, (2,), (1, 3)))) if by_hand else None,
        search=rng.choice(("auto", "auto", "off")),
        draft_max=rng.choice((None, 1, 2, 3, 5, 8, 16, 40)),
        p_min=rng.choice((None, None, 0.0, 0.3, 0.8)),
        tree=rng.choice((None, None, *TREES)),
        fixed=rng.random() < 0.3,
    )


def draw_sampling(rng: random.Random) -> SamplingOptions:
    return SamplingOptions(
        temperature=rng.choice((0.0, 0.0, 0.3, 0.8, 1.5)),
        top_k=rng.choice((0, 1, 5, 40)),
        top_p=rng.choice((0.5, 0.95, 1.0)),
        min_p=rng.choice((0.0, 0.05, 0.3)),
        repeat_penalty=rng.choice((1.0, 1.0, 1.1, 1.5)),
        presence_penalty=rng.choice((0.0, 0.0, 0.5)),
        frequency_penalty=rng.choice((0.0, 0.0, 0.3)),
        repeat_last_n=rng.choice((-1, 0, 8, 64)),
        seed=rng.getrandbits(32),
        grammar=rng.choice((None,) * 5 + GRAMMARS),
    )


def draw_prompt(rng: random.Random, model: Model, before: Sequence[int]) -> tuple[int, ...]:
    """A new text, or one that continues the conversation; it often repeats itself."""
    phrase = " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
    tokens = encode(model, phrase * rng.choice((1, 1, 3)))
    if rng.random() < 0.2:
        tokens += [rng.randrange(5, 256) for _ in range(rng.randint(1, 20))]
    if before and rng.random() < 0.4:
        tokens = [*before[: rng.randint(1, len(before))], *tokens]
    return tuple(tokens[-model.n_ctx + rng.choice((1, 8, 60)) :])


def draw_request(
    rng: random.Random, model: Model, before: Sequence[int], *, longest: int
) -> Request:
    kind = rng.random()
    return Request(
        prompt=draw_prompt(rng, model, before),
        sampling=draw_sampling(rng),
        max_tokens=None if longest > 100 and rng.random() < 0.03 else rng.randint(1, longest),
        leave_after=rng.randint(1, 12) if kind < 0.15 else None,
        stop=rng.choice(STOPS) if 0.15 < kind < 0.3 else None,
        interrupt_s=rng.random() * 0.02 if 0.3 < kind < 0.4 else None,
    )


# -- running ---------------------------------------------------------------------------------------


@contextmanager
def drawn_clocks(rng: random.Random) -> Iterator[None]:
    """Replaces the package's clock: the elapsed time is random."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += rng.lognormvariate(-8.0, 1.0)
        return now

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("swift_gguf.") and hasattr(module, "perf_counter"):
                stack.enter_context(mock.patch.object(module, "perf_counter", clock))
        yield


def plainly(model: Model, request: Request, *, n: int | None) -> Result:
    """The answer by plain decoding; n: the consumer stops reading after n tokens."""
    with Sampler(model, request.sampling, prompt=request.prompt) as sampler:
        stream = generate(model, request.prompt, sampler=sampler, max_tokens=request.max_tokens)
        tokens: list[int] = []
        decoder, text = StreamDecoder(model), ""
        for token in stream:
            tokens.append(token.id)
            text += decoder.feed(token.id)
            if len(tokens) == n or (request.stop and request.stop in text):
                break
        stream.close()
    return Result(tokens, list(model.tokens))


def speculatively(session: Session, request: Request) -> tuple[Result, Stats]:
    """The answer of a session with drafts."""
    answer = session.answer(request.prompt, request.sampling, max_tokens=request.max_tokens)
    timer = threading.Timer(request.interrupt_s or 0, answer.stop)
    if request.interrupt_s is not None:
        timer.start()
    with closing(iter(answer)) as pieces:
        for _ in pieces:
            if len(answer.tokens) == request.leave_after:
                break
            if request.stop and request.stop in answer.text:
                break
    if request.interrupt_s is not None:
        timer.join()
    with session.exclusive():
        return Result(list(answer.tokens), list(session.model.tokens)), answer.stats


def difference(request: Request, plain: Result, drafted: Result) -> str:
    """What is wrong; empty if nothing is."""
    if request.interrupt_s is not None:
        n = len(drafted.tokens)
        return "" if drafted.tokens == plain.tokens[:n] else "another beginning"
    if drafted.tokens != plain.tokens:
        return "another text"
    return "" if drafted.held == plain.held else "another context afterwards"


def run_round(
    seed: int,
    number: int,
    models: Models,
    *,
    n_requests: int,
    longest: int,
    tell: Callable[[str], None],
) -> Counter[str]:
    """Runs a round; counts requests, draft tokens, accepted tokens and diverged answers."""
    rng = random.Random(f"{seed}/{number}")
    path, options = models.target(rng), draw_speculation(rng, models)
    loading = ModelOptions(n_ctx=256, n_batch=64, n_threads=1, n_gpu_layers=0)
    kind = rng.random()
    is_idle = kind < 0.25
    counts: Counter[str] = Counter()
    if kind > 0.8:
        with drawn_clocks(random.Random(f"{seed}/{number}/clock")):
            for index, wrong in enumerate(llama_round(rng, path, options, n_requests, longest)):
                counts["requests"] += 1
                counts["diverged"] += bool(wrong)
                if wrong:
                    tell(f"seed {seed} round {number} request {index}: {path.name} {wrong}")
        return counts
    with ExitStack() as stack:
        if not is_idle:
            stack.enter_context(drawn_clocks(random.Random(f"{seed}/{number}/clock")))
        model, plain = (stack.enter_context(Model(path, loading)) for _ in range(2))
        profiles = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        speculation = Speculation(model, options, store=Store(profiles))
        session = stack.enter_context(Session(model, speculation))
        if is_idle:
            session.search_when_idle()
        before: list[int] = []
        for index in range(n_requests):
            request = draw_request(rng, model, before, longest=longest)
            if not is_idle:  # a thread's timing cannot be drawn
                request = replace(request, interrupt_s=None)
            expected = plainly(plain, request, n=request.leave_after)
            where = f"seed {seed} round {number} request {index}"
            what = f"\n  {path.name} {options}\n  {request}\n  plain   {expected.tokens}"
            counts["requests"] += 1
            try:
                result, stats = speculatively(session, request)
            except Exception as error:
                counts["diverged"] += 1
                tell(f"{where}: {type(error).__name__}: {error}{what}")
                break
            counts += Counter(drafted=stats.drafted, accepted=stats.accepted)
            counts["tokens"] += len(result.tokens)
            if wrong := difference(request, expected, result):
                counts["diverged"] += 1
                tell(f"{where}: {wrong}{what}\n  drafted {result.tokens}")
            before = result.held
            if is_idle and rng.random() < 0.5:
                time.sleep(rng.random() * 0.02)
    return counts


def llama_round(
    rng: random.Random, path: Path, options: SpeculationOptions, n_requests: int, longest: int
) -> Iterator[str]:
    """The same of `Llama` against llama_cpp's own: for each completion, what is wrong."""
    loading: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_gpu_layers": 0, "verbose": False}
    loading["flash_attn"] = options.tree not in (None, "chain")  # which trees need
    with ExitStack() as stack:
        profiles = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, SWIFT_GGUF_PROFILES=profiles))
        swift = stack.enter_context(closing(Llama(str(path), speculation=options, **loading)))
        plain = stack.enter_context(closing(PlainLlama(str(path), n_threads_batch=1, **loading)))
        assert swift.speculation.model is not None
        before: list[int] = []
        for _ in range(n_requests):
            request = draw_request(rng, swift.speculation.model, before, longest=longest)
            expected, drafted = (_completion(llama, request) for llama in (plain, swift))
            before = swift.input_ids[: swift.n_tokens].tolist()
            same = drafted == expected
            yield "" if same else f"{options}\n  {request}\n  {expected}\n  {drafted}"


def _completion(llama: Any, request: Request) -> list[int]:
    """The tokens of an answer until the consumer stops reading."""
    sampling = request.sampling
    grammar = sampling.grammar and LlamaGrammar.from_string(sampling.grammar, verbose=False)
    room = llama.n_ctx() - len(request.prompt)
    limit = min(n for n in (request.max_tokens, request.leave_after, room) if n is not None)
    said: list[int] = []
    if limit <= 0:
        return said
    llama.set_seed(sampling.seed)
    tokens = llama.generate(
        list(request.prompt),
        grammar=grammar,
        temp=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repeat_penalty=sampling.repeat_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
    )
    with closing(tokens):
        for token in tokens:
            said.append(token)
            if token == llama.token_eos() or len(said) == limit:
                break
    return said


def soak(
    *,
    seed: int,
    numbers: range,
    n_requests: int = 20,
    longest: int = 40,
    named: str | None = None,
    control: bool = False,
    seconds: float = float("inf"),
    tell: Callable[[str], None] = print,
) -> Counter[str]:
    """Runs all rounds, or as many as the time allows."""
    total: Counter[str] = Counter()
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        if control:
            stack.enter_context(mock.patch.object(engine, "choose", accept_drafts))
        models = Models(Path(stack.enter_context(tempfile.TemporaryDirectory())), named)
        for number in numbers:
            total += run_round(
                seed, number, models, n_requests=n_requests, longest=longest, tell=tell
            )
            total["rounds"] += 1
            if time.monotonic() > end:
                break
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--requests", type=int, default=20, help="in a round")
    parser.add_argument("--longest", type=int, default=40, help="tokens of an answer")
    parser.add_argument("--model", help="a bit-invariant model instead of generated ones")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end early")
    parser.add_argument("--control", action="store_true", help="accept every draft: must fail")
    options = parser.parse_args()
    start = time.monotonic()
    total = soak(
        seed=options.seed,
        numbers=range(options.first, options.first + options.rounds),
        n_requests=options.requests,
        longest=options.longest,
        named=options.model,
        control=options.control,
        seconds=options.seconds,
    )
    print(
        f"{total['requests']} requests in {total['rounds']} rounds from {options.first} on, "
        f"seed {options.seed}, {time.monotonic() - start:.0f} s: {total['tokens']} tokens, "
        f"{total['accepted']} of {total['drafted']} draft tokens accepted, "
        f"{total['diverged']} divergences"
    )
    return int(total["diverged"] > 0)


if __name__ == "__main__":
    sys.exit(main())
