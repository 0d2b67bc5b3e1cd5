"""The report of `swift-gguf bench`: results of each request, their sums, and the JSON file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swift_gguf.bench.modes import AUTO, PLAIN, Mode
from swift_gguf.bench.spread import Spread
from swift_gguf.bench.subject import Machine, Subject
from swift_gguf.errors import SwiftError
from swift_gguf.stats import SourceStats, Stats

VERSION = 1

_COUNTS = ("prompt_n", "predicted_n", "cycles", "cycle_n")
_SECONDS = ("prompt_s", "draft_s", "verify_s", "sample_s", "search_s", "cycle_s")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One request, answered in one mode."""

    mode: str
    category: str
    question_id: str
    unit: int
    """Number of the row in the run; each repetition has its own number."""
    turn: int
    stats: Stats
    diverged: bool = False
    """True if the token ids differ from plain decoding."""
    near_tie: bool | None = None
    """True if rounding explains the difference; None if there is none, or this is unknown."""

    @property
    def tokens(self) -> int:
        """Tokens that the cycles produce; the first token comes from the prompt's pass."""
        return max(0, self.stats.predicted_n - 1)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A mode compared with plain decoding on the same requests.

    A speed-up is the ratio of total tokens per total second; None if nothing took time.
    """

    requests: int
    tokens: int
    stats: Stats
    """The sum over all requests."""
    tokens_per_second: float | None
    end_to_end_tokens_per_second: float | None
    """Includes prompt processing and the first token of each answer."""
    speedup: float | None
    end_to_end_speedup: float | None
    speedup_by_request: Spread | None
    first_token_s: Spread
    """Of each answer: the time that its prompt takes, as far as it is not in the context."""
    requests_s: float
    """Seconds of all requests: prompts and answers."""
    diverged: int
    near_ties: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[Result, Result]]) -> Summary:
        """pairs: for each request, the mode's result and plain decoding's."""
        ours, plain = [a for a, _ in pairs], [b for _, b in pairs]
        by_request = [ratio for a, b in pairs if (ratio := _ratio(_decoding([a]), _decoding([b])))]
        return cls(
            requests=len(pairs),
            tokens=sum(result.tokens for result in ours),
            stats=total(result.stats for result in ours),
            tokens_per_second=_decoding(ours),
            end_to_end_tokens_per_second=_end_to_end(ours),
            speedup=_ratio(_decoding(ours), _decoding(plain)),
            end_to_end_speedup=_ratio(_end_to_end(ours), _end_to_end(plain)),
            speedup_by_request=Spread.of(by_request) if by_request else None,
            first_token_s=Spread.of(result.stats.prompt_s for result in ours),
            requests_s=_whole(ours),
            diverged=sum(result.diverged for result in ours),
            near_ties=sum(result.near_tie is True for result in ours),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        spread = self.speedup_by_request
        speculation = self.stats.speculation()
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "end_to_end_tokens_per_second": self.end_to_end_tokens_per_second,
            "speedup": self.speedup,
            "end_to_end_speedup": self.end_to_end_speedup,
            "speedup_by_request": asdict(spread) if spread else None,
            "first_token_seconds": asdict(self.first_token_s),
            "requests_seconds": self.requests_s,
            "diverged": {"requests": self.diverged, "near_ties": self.near_ties},
            **speculation,
            "seconds": {"prompt": self.stats.prompt_s, **speculation["seconds"]},
        }


def total(stats: Iterable[Stats]) -> Stats:
    """The sum of several generations' statistics, without a stop reason."""
    result = Stats()
    for one in stats:
        result.add(one)
    return result


def _decoding(results: Sequence[Result]) -> float | None:
    """Tokens per second of the cycles."""
    tokens = sum(result.tokens for result in results)
    return _ratio(tokens, sum(result.stats.cycle_s for result in results))


def _end_to_end(results: Sequence[Result]) -> float | None:
    tokens = sum(result.stats.predicted_n for result in results)
    return _ratio(tokens, _whole(results))


def _whole(results: Sequence[Result]) -> float:
    """Seconds of whole requests."""
    return sum(result.stats.prompt_s + result.stats.cycle_s for result in results)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The best fixed setting of a sweep, including plain decoding, and how `auto` compares."""

    mode: str
    speedup: float
    auto_share: float | None
    """Speed of `auto` divided by the speed of the best setting."""


@dataclass(kw_only=True)
class Report:
    """The results so far.  It is filled row by row, so an interrupted run can resume."""

    settings: Mapping[str, Any]
    """The settings of the run, as JSON types; only a run with the same settings can resume."""
    modes: Sequence[Mode]
    swept: Sequence[Mode]
    """The modes that only belong to the sweep."""
    machine: Machine
    subject: Subject
    bit_invariant: bool
    units: int
    """Number of rows to answer, including repetitions."""
    results: list[Result] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)
    """Units with a turn that does not fit the context."""
    setup_s: dict[str, float] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    """For each mode: the sources of drafts at the end, or why there are none."""
    peak_memory_bytes: int | None = None
    """Of the whole process; None if the system does not report it."""

    @property
    def done(self) -> set[int]:
        """Units that are answered, or do not fit the context."""
        return {result.unit for result in self.results} | self.left_out

    @property
    def categories(self) -> list[str]:
        return sorted({result.category for result in self.results})

    def diverged(self, *, of_peers: bool) -> list[Result]:
        """Answers that differ from plain decoding, of other programs or of our modes."""
        modes = {mode.name for mode in self.modes if mode.is_peer == of_peers}
        return [result for result in self.results if result.diverged and result.mode in modes]

    @property
    def broken(self) -> int:
        """Number of our answers that differ although the model is bit-invariant."""
        return len(self.diverged(of_peers=False)) if self.bit_invariant else 0

    def summary(self, mode: str, category: str | None = None) -> Summary | None:
        """The summary of one category, or of all; None without an answer."""
        pairs = [pair for pair in self._pairs(mode) if category in (None, pair[0].category)]
        return Summary.of(pairs) if pairs else None

    def first(self, mode: str) -> Summary | None:
        """The summary of only the first request, when a mode may still have to learn."""
        pairs = self._pairs(mode)[:1]
        return Summary.of(pairs) if pairs else None

    def _pairs(self, mode: str) -> list[tuple[Result, Result]]:
        plain = {(r.unit, r.turn): r for r in self.results if r.mode == PLAIN}
        return [(r, plain[r.unit, r.turn]) for r in self.results if r.mode == mode]

    def limit(self, category: str | None = None) -> Limit | None:
        """The best fixed setting; None without fixed settings or answers."""
        speedups = {PLAIN: 1.0}
        for mode in self.modes:
            summary = self.summary(mode.name, category) if mode.is_fixed else None
            if summary and summary.speedup:
                speedups[mode.name] = summary.speedup
        if len(speedups) == 1:
            return None
        best = max(speedups, key=lambda name: speedups[name])
        auto = self.summary(AUTO, category)
        return Limit(
            mode=best,
            speedup=speedups[best],
            auto_share=auto.speedup / speedups[best] if auto and auto.speedup else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types, without the answers' texts and token ids."""
        limit, limits = self.limit(), {name: self.limit(name) for name in self.categories}
        return {
            "version": VERSION,
            "complete": len(self.done) == self.units,
            "settings": self.settings,
            "machine": asdict(self.machine),
            "subject": asdict(self.subject),
            "bit_invariant": self.bit_invariant,
            "peak_memory_bytes": self.peak_memory_bytes,
            "modes": {mode.name: self._mode_dict(mode.name) for mode in self.modes},
            "limit": {
                "total": asdict(limit),
                "categories": {name: asdict(found) for name, found in limits.items() if found},
            }
            if limit
            else None,
            "left_out": sorted(self.left_out),
            "requests": [_result_dict(result) for result in self.results],
        }

    def _mode_dict(self, mode: str) -> dict[str, Any]:
        def as_dict(summary: Summary | None) -> dict[str, Any] | None:
            return summary.as_dict() if summary else None

        return {
            "why": self.why.get(mode),
            "setup_s": self.setup_s.get(mode),
            "total": as_dict(self.summary(mode)),
            "categories": {name: as_dict(self.summary(mode, name)) for name in self.categories},
            "first": as_dict(self.first(mode)),
        }

    def save(self, path: Path) -> None:
        """Replaces the file atomically: if the process is killed, the earlier file stays."""
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(self.as_dict(), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def resume(self, path: Path) -> None:
        """Takes over the results of an earlier run with the same settings, if the file exists.

        Raises:
            SwiftError: the file is not a report, or is from a run with other settings.
        """
        if not path.exists():
            return
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            other = _first_difference(values["settings"], self.settings)
            results = [_result(value) for value in values["requests"]]
            left_out = set(values["left_out"])
            setup_s = {name: mode["setup_s"] for name, mode in values["modes"].items()}
            if values["version"] != VERSION:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SwiftError(
                f"{path} is not a report of this bench; name another file, or overwrite it with "
                "--restart"
            ) from None
        if other:
            raise SwiftError(
                f"{path} is from a run with other settings ({other}); name another file, or "
                "overwrite it with --restart"
            )
        self.results, self.left_out, self.setup_s = results, left_out, setup_s


def _first_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    for name, value in ours.items():
        if theirs.get(name) != value:
            return f"{name}: {theirs.get(name)!s:.60} there, {value!s:.60} here"
    return None


def _result_dict(result: Result) -> dict[str, Any]:
    return {
        "mode": result.mode,
        "category": result.category,
        "question_id": result.question_id,
        "unit": result.unit,
        "turn": result.turn,
        "diverged": result.diverged,
        "near_tie": result.near_tie,
        "stop_reason": result.stats.stop_reason,
        **{name: getattr(result.stats, name) for name in (*_COUNTS, *_SECONDS)},
        "sources": {name: source.as_dict() for name, source in result.stats.sources.items()},
    }


def _result(values: dict[str, Any]) -> Result:
    sources = {name: _source(source) for name, source in values.pop("sources").items()}
    names = ("stop_reason", *_COUNTS, *_SECONDS)
    stats = Stats(sources=sources, **{name: values.pop(name) for name in names})
    return Result(stats=stats, **values)


def _source(values: dict[str, Any]) -> SourceStats:
    histogram = dict(enumerate(values.pop("accepted_length_histogram")))
    return SourceStats(accepted_lengths=Counter(histogram), **values)


Progress = Callable[[Report], None]
"""Called after every row that is answered."""
