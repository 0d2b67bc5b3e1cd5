"""What the mechanism costs on one model: passes by width, draft passes, graph switches, the engine.

Everything is measured round by round, all cases in every round, so that a slow spell of the machine
hits all of them alike; a draft pass is compared with a full pass measured right before it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from lab.command import model_parser, positive, tell
from lab.mechanism_report import (
    DraftTime,
    EngineTime,
    PartTime,
    PassTime,
    Report,
    SwitchTime,
    render,
)
from lab.output import write_json
from swift_gguf.bench.spread import Spread
from swift_gguf.bench.subject import machine, subject
from swift_gguf.drafting import Drafter, LayerSkip
from swift_gguf.drafting.policy import Threshold
from swift_gguf.engine import generate
from swift_gguf.errors import UnsupportedModelError
from swift_gguf.hub import models
from swift_gguf.learning import space_of
from swift_gguf.model import Model, ModelOptions
from swift_gguf.native import Cost, library
from swift_gguf.outputs import require_folder
from swift_gguf.sampling import Sampler, SamplingOptions
from swift_gguf.stats import Stats
from swift_gguf.subnetwork import SubNetwork
from swift_gguf.text import encode

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
SWITCH_WIDTHS = (2, 4, 8)
ENGINE_TOKENS = 64
ENGINE_RUNS = 3
PROMPT = "Write a function that returns the largest of three numbers, and explain every step.\n"


def context_size(context: int) -> int:
    """The context a model must be loaded with to be measured at `context` tokens."""
    return -(-max(context + max(WIDTHS), 2 * ENGINE_TOKENS) // 256) * 256


# -- sub-networks ----------------------------------------------------------------------------------


def subnetworks(model: Model) -> dict[str, SubNetwork]:
    """The sub-networks whose draft passes are measured, by name; only what the model can skip."""
    attn, ffn = (
        [i for i, layer in enumerate(kind) if layer.status == "ok"] for kind in model.sublayers
    )
    uniform = SubNetwork.uniform(model.n_layer)
    wanted: dict[str, tuple[Sequence[int], Sequence[int]]] = {
        "every 4th FFN": ([], ffn[3::4]),
        "every 2nd FFN": ([], ffn[1::2]),
        "every 2nd attention": (attn[1::2], []),
        "uniform, both": (
            [i for i in attn if i in uniform.skip_attn],
            [i for i in ffn if i in uniform.skip_ffn],
        ),
        "all FFNs": ([], ffn),
        "all attention": (attn, []),
        "everything": (attn, ffn),
    }
    return {
        name: SubNetwork(
            n_layer=model.n_layer, skip_attn=frozenset(skip_attn), skip_ffn=frozenset(skip_ffn)
        )
        for name, (skip_attn, skip_ffn) in wanted.items()
        if skip_attn or skip_ffn
    }


# -- measuring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    subnetwork: SubNetwork | None = None
    width: int = 1
    rows: int = 1


_FULL = _Case()


class _Bench:
    """Passes over a context of fixed length; every pass is rolled back."""

    def __init__(self, model: Model, context: int, repeats: int) -> None:
        self.model, self.context, self.repeats = model, context, repeats
        self._synchronize = library().api.llama_synchronize
        # Spread over the vocabulary: what a pass costs depends on the tokens in a MoE only.
        self._ids = [7919 * i % model.n_vocab for i in range(context + max(WIDTHS))]

    def restart(self) -> None:
        self.model.clear()
        self.model.decode(self._ids[: self.context])

    def once(self, case: _Case) -> float:
        """Seconds of one pass."""
        model = self.model
        tokens = self._ids[self.context : self.context + case.width]
        start = perf_counter()
        model.decode(tokens, n_outputs=case.rows, subnetwork=case.subnetwork)
        self._synchronize(model.ctx)  # a GPU is still at work when decode returns
        seconds = perf_counter() - start
        model.rollback(self.context)
        return seconds

    def repeated(self, case: _Case) -> list[float]:
        """Seconds of passes that reuse one graph; the pass that builds it is not counted."""
        self.once(case)
        return [self.once(case) for _ in range(self.repeats)]

    def cost(self, case: _Case) -> Cost:
        return self.model.pass_cost(
            case.subnetwork,
            n_tokens=case.width,
            n_outputs=case.rows,
            n_kv=self.context + case.width,
        )


def measure(
    model: Model,
    *,
    rounds: int = 7,
    context: int = 128,
    repeats: int = 2,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measures a model that is loaded with a context of `context_size(context)` tokens.

    repeats: timed passes of each kind in a round.  progress: told what happens next, a line each.
    Leaves the model with an empty context.

    Raises:
        UnsupportedModelError: the model cannot be rolled back, or the context is too small.
    """
    if refusal := model.rollback_refusal:
        raise UnsupportedModelError(f"nothing to measure: {refusal}; use another model")
    if model.n_ctx < context + max(WIDTHS):
        raise UnsupportedModelError(
            f"the model has a context of {model.n_ctx} tokens; measure at a smaller one"
        )
    if min(rounds, context, repeats) < 1:
        raise ValueError("rounds, context and repeats start at 1")
    where = machine()
    bench = _Bench(model, context, repeats)
    skipping = subnetworks(model)
    try:
        bench.restart()
        passes = _Passes(bench)
        drafts = _Drafts(bench, skipping)
        switches = _Switches(
            bench, skipping.get("uniform, both") or next(iter(skipping.values()), None)
        )
        for number in range(1, rounds + 1):
            progress(f"round {number} of {rounds}")
            passes.round()
            drafts.round()
            switches.round()
        progress("engine")
        engine = _engine(model, runs=min(rounds, ENGINE_RUNS))
    finally:
        model.clear()
    return Report(
        machine=where,
        subject=subject(model),
        context=context,
        rounds=rounds,
        repeats=repeats,
        passes=passes.result(),
        drafts=drafts.result(),
        parts=drafts.parts(),
        switches=switches.result(),
        engine=engine,
    )


def _ms(samples: Sequence[float]) -> Spread:
    return Spread.of(1e3 * value for value in samples)


class _Passes:
    """The whole model at every width: all rows with logits, and one."""

    def __init__(self, bench: _Bench) -> None:
        self._bench = bench
        rows = {(width, rows) for width in WIDTHS for rows in (width, 1)}
        self._samples: dict[_Case, list[float]] = {
            _Case(None, width, n_rows): [] for width, n_rows in sorted(rows)
        }

    def round(self) -> None:
        for case, samples in self._samples.items():
            samples += self._bench.repeated(case)

    def result(self) -> tuple[PassTime, ...]:
        return tuple(
            PassTime(width=case.width, rows=case.rows, ms=_ms(samples))
            for case, samples in self._samples.items()
        )


class _Drafts:
    """One-token passes of sub-networks, each beside a full pass."""

    def __init__(self, bench: _Bench, skipping: dict[str, SubNetwork]) -> None:
        self._bench = bench
        self._cases = {name: _Case(subnetwork) for name, subnetwork in skipping.items()}
        full = bench.cost(_FULL)
        self._full_bytes = full.weight_bytes + full.kv_bytes
        self._head_bytes = full.head_bytes
        self._bytes = {}
        for name, case in self._cases.items():
            cost = bench.cost(case)
            self._bytes[name] = cost.weight_bytes + cost.kv_bytes
        self._samples: dict[str, list[float]] = defaultdict(list)
        self._ratios: dict[str, list[float]] = defaultdict(list)

    def _share(self, name: str) -> float:
        return self._bytes[name] / self._full_bytes

    def round(self) -> None:
        for name, case in self._cases.items():
            full = self._bench.repeated(_FULL)
            draft = self._bench.repeated(case)
            self._samples["full"] += full
            self._samples[name] += draft
            expected = statistics.median(full) * self._share(name)
            self._ratios[name].append(statistics.median(draft) / expected)
        if everything := self._cases.get("everything"):
            # no logits wanted: neither head nor sub-layers run
            self._samples["rest"] += self._bench.repeated(_Case(everything.subnetwork, 1, 0))

    def result(self) -> tuple[DraftTime, ...]:
        return tuple(
            DraftTime(
                name=name,
                subnetwork=str(case.subnetwork),
                ms=_ms(self._samples[name]),
                byte_share=self._share(name),
                ratio=Spread.of(self._ratios[name]),
            )
            for name, case in self._cases.items()
        )

    def parts(self) -> tuple[PartTime, ...]:
        """FFN, attention, head, the rest, and the unexplained remainder of a full pass."""
        if not self._cases:
            return ()
        ms = {name: _ms(samples).median for name, samples in self._samples.items()}
        parts = {
            label: (ms["full"] - ms[name], self._full_bytes - self._bytes[name])
            for label, name in (("FFN", "all FFNs"), ("attention", "all attention"))
            if name in self._cases
        }
        parts["head"] = (ms["everything"] - ms["rest"], self._head_bytes)
        parts["rest"] = (ms["rest"], self._bytes["everything"] - self._head_bytes)
        unexplained = ms["full"] - sum(part[0] for part in parts.values())
        parts["interaction"] = (unexplained, 0)
        parts["full pass"] = (ms["full"], self._full_bytes)
        return tuple(
            PartTime(name=name, ms=part_ms, n_bytes=n_bytes)
            for name, (part_ms, n_bytes) in parts.items()
        )


class _Switches:
    """Compares alternating drafts and verifications with each repeated alone."""

    def __init__(self, bench: _Bench, subnetwork: SubNetwork | None) -> None:
        self._bench, self._draft = bench, _Case(subnetwork)
        self._widths = SWITCH_WIDTHS if subnetwork else ()
        self._extra: dict[int, list[float]] = defaultdict(list)
        self._fastest: dict[int, dict[str, float]] = defaultdict(
            lambda: defaultdict(lambda: float("inf"))
        )

    def round(self) -> None:
        for width in self._widths:
            verify = _Case(None, width, width)
            alone = {
                "draft": self._bench.repeated(self._draft),
                "verify": self._bench.repeated(verify),
            }
            turns = [
                (self._bench.once(self._draft), self._bench.once(verify))
                for _ in range(self._bench.repeats)
            ]
            in_turn = {
                "draft": [draft for draft, _ in turns],
                "verify": [verification for _, verification in turns],
            }
            self._extra[width].append(
                sum(
                    statistics.median(in_turn[kind]) - statistics.median(alone[kind])
                    for kind in alone
                )
                / 2
            )
            fastest = self._fastest[width]
            for kind in alone:
                fastest[kind] = min(fastest[kind], *alone[kind])
                fastest[f"{kind} in turn"] = min(fastest[f"{kind} in turn"], *in_turn[kind])

    def result(self) -> tuple[SwitchTime, ...]:
        return tuple(
            SwitchTime(
                width=width,
                extra_ms=_ms(self._extra[width]),
                floor_ms=1e3
                * sum(fastest[f"{kind} in turn"] - fastest[kind] for kind in ("draft", "verify"))
                / 2,
            )
            for width, fastest in self._fastest.items()
        )


class _NativeClock:
    """Adds up the time inside the native calls of an engine cycle, while the `with` block runs.

    `Stats` times the methods that make these calls, their Python included.
    """

    def __init__(self) -> None:
        native = library()
        self._places = (
            (native.api, "llama_decode"),
            (native.api, "llama_sampler_sample"),
            (native, "draft"),
        )
        self.seconds = 0.0

    def __enter__(self) -> _NativeClock:
        self._originals = [getattr(owner, name) for owner, name in self._places]
        for (owner, name), function in zip(self._places, self._originals, strict=True):
            setattr(owner, name, self._timed(function))
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), function in zip(self._places, self._originals, strict=True):
            setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += perf_counter() - start

        return timed


@dataclass(frozen=True, kw_only=True)
class _Run:
    stats: Stats
    outside_s: float


def _run(model: Model, prompt: Sequence[int], drafter: Drafter | None) -> _Run:
    stats, clock = Stats(), _NativeClock()
    model.clear()
    with Sampler(model, SamplingOptions(temperature=0.0, seed=0)) as sampler:
        tokens = generate(
            model, prompt, sampler=sampler, drafter=drafter, max_tokens=ENGINE_TOKENS, stats=stats
        )
        next(tokens, None)  # the prompt and the first token are not part of a cycle
        with clock:
            for _ in tokens:
                pass
    return _Run(stats=stats, outside_s=stats.cycle_s - clock.seconds)


def _engine(model: Model, *, runs: int) -> tuple[EngineTime, ...]:
    drafters: dict[str, Drafter | None] = {"plain": None}
    if space := space_of(model):
        drafters["layer-skip"] = LayerSkip(model, space.uniform(), policy=Threshold(0.8))
    prompt = encode(model, PROMPT)
    times = []
    for mode, drafter in drafters.items():
        done = [_run(model, prompt, drafter) for _ in range(runs)]
        done = [run for run in done if run.stats.cycles]  # a model may answer with nothing
        if not done:
            continue
        cycles = sum(run.stats.cycles for run in done)
        times.append(
            EngineTime(
                mode=mode,
                cycles=cycles,
                cycle_ms=1e3 * sum(run.stats.cycle_s for run in done) / cycles,
                overhead_us=Spread.of(
                    1e6 * run.stats.overhead_s / run.stats.cycles for run in done
                ),
                overhead_share=Spread.of(run.stats.overhead_s / run.stats.cycle_s for run in done),
                outside_us=Spread.of(1e6 * run.outside_s / run.stats.cycles for run in done),
                outside_share=Spread.of(run.outside_s / run.stats.cycle_s for run in done),
            )
        )
    return tuple(times)


def main(arguments: Sequence[str]) -> int:
    parser = model_parser("mechanism", __doc__)
    parser.add_argument("--rounds", type=positive, default=7, metavar="N")
    parser.add_argument(
        "--repeats", type=positive, default=2, metavar="N", help="passes of a kind a round"
    )
    parser.add_argument(
        "--context", type=positive, default=128, metavar="N", help="tokens decoded before"
    )
    args = parser.parse_args(arguments)
    require_folder(args.json)
    options = ModelOptions(
        n_ctx=context_size(args.context), n_threads=args.threads, n_gpu_layers=args.n_gpu_layers
    )
    with Model(models.resolve(args.model), options) as model:
        report = measure(
            model, rounds=args.rounds, context=args.context, repeats=args.repeats, progress=tell
        )
    if args.json:
        write_json(args.json, report.as_dict())
    print(render(report))
    return 0
