"""The profile of a model: good sub-networks and the costs of passes, kept between runs.

Each model has one JSON file, and all processes that run the model share it.  An error here never
stops a generation: if a profile cannot be read or written, there is a warning, and learning starts
again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from swift_gguf.drafting.recycling import MAX_ROWS, Recycling
from swift_gguf.hub import cache_dir
from swift_gguf.planning.cost import Costs
from swift_gguf.search.objective import Outcome
from swift_gguf.subnetwork import SubNetwork, format_layers, parse_layers

VERSION = 1
MAX_KNOWN = 8
MAX_SEEN = 16
MAX_COSTS = 32
MAX_TOKEN = 1 << 31
LOCK_SECONDS = 2.0
EMBEDDED = "swift.profile"
"""The key of a GGUF's metadata that may hold a profile."""
MAX_EMBEDDED = 1 << 20  # characters

_log = logging.getLogger("swift_gguf")


# -- values ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A sub-network's draft tokens at the positions of one window, in plain values.

    Raises:
        ValueError: there are no positions, or the values are not valid.
    """

    agrees: tuple[bool, ...]
    """True if the draft's likeliest token is the text's token."""
    confidence: tuple[float, ...]
    """The draft's probability of its likeliest token."""

    def __post_init__(self) -> None:
        if not self.agrees or len(self.agrees) != len(self.confidence):
            raise ValueError("agreement and confidence must have the same number of positions")
        for probability in self.confidence:
            _require_real(probability, most=1.0)

    @classmethod
    def of(cls, outcome: Outcome) -> Seen:
        """The values of an outcome, rounded to 3 digits."""
        confidence = (min(1.0, round(float(p), 3)) for p in outcome.confidence)
        return cls(tuple(map(bool, outcome.agrees)), tuple(confidence))

    def outcome(self) -> Outcome:
        """The values as the search uses them."""
        return Outcome(np.array(self.agrees), np.array(self.confidence, dtype=np.float32))


@dataclass(frozen=True, kw_only=True)
class Known:
    """A sub-network that was tried, and its results.

    The results hold on every machine.  The speed-up does not, so it is not stored.

    Raises:
        ValueError: there are no results, or too many.
    """

    subnetwork: SubNetwork
    seen: Mapping[str, Seen]
    """The results by window, the latest last, at most `MAX_SEEN`."""

    def __post_init__(self) -> None:
        if not 0 < len(self.seen) <= MAX_SEEN or not all(isinstance(key, str) for key in self.seen):
            raise ValueError(f"a sub-network needs 1 to {MAX_SEEN} windows with names")

    @property
    def positions(self) -> int:
        """The number of scored positions."""
        return sum(len(window.agrees) for window in self.seen.values())

    @property
    def agreement(self) -> float:
        """The share of positions where its draft token was right."""
        return sum(sum(window.agrees) for window in self.seen.values()) / self.positions

    def merged(self, later: Known) -> Known:
        """With later results added.  The oldest windows are dropped."""
        earlier = {key: seen for key, seen in self.seen.items() if key not in later.seen}
        latest = list({**earlier, **later.seen}.items())[-MAX_SEEN:]
        return replace(self, seen=dict(latest))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What is known about a model, or what a process has learned and not stored yet.

    Raises:
        ValueError: a value is not valid.
    """

    fingerprint: str
    model: str
    """The model's name, for people."""
    n_layer: int
    known: tuple[Known, ...] = ()
    """Different sub-networks, the latest learned first, at most `MAX_KNOWN`."""
    costs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """`Costs.as_dict` by the machine where they were measured (`Model.machine_key`), the latest
    last, at most `MAX_COSTS`."""
    recycling: tuple[Any, ...] = ()
    """`Recycling.to_rows`: the table of successors, the latest learned last."""
    search_s: float = 0.0
    """Time spent on search."""
    evaluations: int = 0
    """Sub-networks scored, repetitions included."""

    def __post_init__(self) -> None:
        _require_fingerprint(self.fingerprint)
        if not isinstance(self.model, str):
            raise ValueError("the model's name is not a string")
        _require_whole(self.n_layer)
        _require_real(self.search_s)
        _require_whole(self.evaluations)
        subnetworks = {known.subnetwork for known in self.known}
        if len(subnetworks) != len(self.known) or len(self.known) > MAX_KNOWN:
            raise ValueError("a sub-network is listed twice, or there are too many sub-networks")
        layers = {subnetwork.n_layer for subnetwork in subnetworks}
        layers |= {Costs.from_dict(costs).n_layer for costs in self.costs.values()}
        if not layers <= {self.n_layer}:
            raise ValueError(f"a sub-network or its costs do not fit {self.n_layer} layers")

    def merged(self, learned: Profile) -> Profile:
        """This profile with what was learned since.  Totals and results add up.

        The newer measurement of costs replaces the older one, unless it is trusted less
        (`Costs.trust`).

        Raises:
            ValueError: they are profiles of different models.
        """
        if (self.fingerprint, self.n_layer) != (learned.fingerprint, learned.n_layer):
            raise ValueError(f"the profiles are of different models: {self.model}, {learned.model}")
        stored = {known.subnetwork: known for known in self.known}
        latest = {
            known.subnetwork: stored[known.subnetwork].merged(known)
            if known.subnetwork in stored
            else known
            for known in learned.known
        }
        known = list({**latest, **{s: k for s, k in stored.items() if s not in latest}}.values())
        return Profile(
            fingerprint=self.fingerprint,
            model=learned.model,
            n_layer=self.n_layer,
            known=tuple(known[:MAX_KNOWN]),
            costs=_trusted_costs(self.costs, learned.costs),
            recycling=_latest_rows(self.recycling, learned.recycling),
            search_s=self.search_s + learned.search_s,
            evaluations=self.evaluations + learned.evaluations,
        )


def _trusted_costs(
    stored: Mapping[str, Mapping[str, Any]], learned: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    def trust(costs: Mapping[str, Any]) -> int:
        return Costs.from_dict(costs).trust

    better = {
        key: costs
        for key, costs in learned.items()
        if key not in stored or trust(costs) >= trust(stored[key])
    }
    others = {key: costs for key, costs in stored.items() if key not in better}
    return dict(list({**others, **better}.items())[-MAX_COSTS:])


def _latest_rows(stored: tuple[Any, ...], learned: tuple[Any, ...]) -> tuple[Any, ...]:
    """One row for each context, the latest."""
    rows = {tuple(row[0]): row for row in stored}
    for row in learned:
        rows.pop(tuple(row[0]), None)  # the latest learned come last
        rows[tuple(row[0])] = row
    return tuple(rows.values())[-MAX_ROWS:]


def _require_whole(value: object) -> None:
    # other JSON parsers round numbers above 2^53
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise ValueError(f"{str(value)[:40]!r} is not a whole number from 0 to 2^53 - 1")


def _require_real(value: object, *, most: float = 1e18) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{str(value)[:40]!r} is not a number from 0 to {most:g}")


def _require_fingerprint(text: object) -> None:
    """Checks a fingerprint, because it becomes the name of a file."""
    if not isinstance(text, str) or len(text) != 32 or not set(text) <= set("0123456789abcdef"):
        raise ValueError(f"{text!r:.60} is not a fingerprint")


# -- JSON ------------------------------------------------------------------------------------------


class _UnusableError(Exception):
    """The file is not a profile that we can read.  `suffix` is added to its name."""

    def __init__(self, suffix: str, why: str) -> None:
        super().__init__(why)
        self.suffix = suffix


def _to_json(profile: Profile) -> str:
    known = [
        {
            "skip_attn": format_layers(item.subnetwork.skip_attn),
            "skip_ffn": format_layers(item.subnetwork.skip_ffn),
            "narrow_ffn": format_layers(item.subnetwork.narrow_ffn),
            "draft_head": item.subnetwork.draft_head,
            "seen": {
                key: {
                    "agrees": "".join("01"[agrees] for agrees in window.agrees),
                    "confidence": list(window.confidence),
                }
                for key, window in item.seen.items()
            },
        }
        for item in profile.known
    ]
    values = {
        "version": VERSION,
        "fingerprint": profile.fingerprint,
        "model": profile.model,
        "n_layer": profile.n_layer,
        "known": known,
        "costs": profile.costs,
        "recycling": profile.recycling,
        "search_s": profile.search_s,
        "evaluations": profile.evaluations,
    }
    return json.dumps(values, separators=(",", ":"), allow_nan=False) + "\n"


def _from_json(content: bytes) -> Profile:
    try:
        values = json.loads(content)
        version = values.pop("version")
        if isinstance(version, int) and VERSION < version < 1_000_000:
            raise _UnusableError(f"newer-{version}", "it was written by a newer swift-gguf")
        if version != VERSION or isinstance(version, bool):
            raise ValueError("it has no version")
        n_layer = values["n_layer"]
        _require_whole(n_layer)
        known = tuple(_known(item, n_layer) for item in values.pop("known"))
        recycling = values.pop("recycling", [])
        Recycling.from_rows(recycling, n_vocab=MAX_TOKEN)  # only to check the values
        return Profile(known=known, recycling=tuple(recycling), **values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _UnusableError("damaged", f"it is damaged ({error!s:.80})") from None


def _known(item: dict[str, Any], n_layer: int) -> Known:
    draft_head = item.pop("draft_head", False)
    if not isinstance(draft_head, bool):
        raise ValueError("draft_head must be true or false")
    return Known(
        subnetwork=SubNetwork(
            n_layer=n_layer,
            skip_attn=parse_layers(item.pop("skip_attn")),
            skip_ffn=parse_layers(item.pop("skip_ffn")),
            narrow_ffn=parse_layers(item.pop("narrow_ffn", "")),
            draft_head=draft_head,
        ),
        seen={key: _seen(window) for key, window in item.pop("seen").items()},
        **item,
    )


def _seen(window: dict[str, Any]) -> Seen:
    agrees = window.pop("agrees")
    if not isinstance(agrees, str) or set(agrees) - {"0", "1"}:
        raise ValueError("agrees must consist of 0 and 1")
    return Seen(agrees=tuple(bit == "1" for bit in agrees), confidence=tuple(window["confidence"]))


def portable(profile: Profile) -> str:
    """The part of a profile that may be stored in a model's file, as text.

    It has the sub-networks and their results.  It has neither the costs of this machine nor tokens
    of the user's texts.
    """
    shared = replace(
        profile, fingerprint="0" * 32, costs={}, recycling=(), search_s=0.0, evaluations=0
    )
    return _to_json(shared).strip()


def embedded(text: str | None, *, fingerprint: str) -> Profile | None:
    """The profile in a model's metadata (key `EMBEDDED`), if there is one."""
    if text is None:
        return None
    try:
        if len(text) > MAX_EMBEDDED:
            raise _UnusableError("", "it is too long")
        return replace(_from_json(text.encode()), fingerprint=fingerprint)
    except _UnusableError as error:
        _log.warning("the profile in the model's file is not used: %s", error)
        return None


# -- the folder ------------------------------------------------------------------------------------


class Store:
    """Profiles in a folder: SWIFT_GGUF_PROFILES, or a folder in the user's cache.

    Several processes may use it at once.  `load`, `add` and `forget` do not raise an error for a
    damaged file or a failure of the file system; they log a warning.
    """

    def __init__(self, folder: Path | None = None) -> None:
        override = os.environ.get("SWIFT_GGUF_PROFILES")
        self.folder = folder or (Path(override) if override else cache_dir() / "profiles")

    def load(self, fingerprint: str) -> Profile | None:
        """The profile of a model, if there is one."""
        path = self.path(fingerprint)
        with _forgiving(path, "read"):
            try:
                return _read(
                    path
                )  # without the lock, because the file is always replaced as a whole
            except _UnusableError:
                with _locked(path):
                    return _read_or_set_aside(path)
        return None

    def add(self, learned: Profile) -> Profile | None:
        """Adds what this process learned since the last call.

        Returns the whole profile, or None if it could not be stored.

        learned: its `search_s` and `evaluations` are added to the stored totals.
        """
        path = self.path(learned.fingerprint)
        with _forgiving(path, "written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                stored = _read_or_set_aside(path)
                if stored and stored.n_layer != learned.n_layer:
                    _set_aside(path, "damaged", f"it is for a model with {stored.n_layer} layers")
                    stored = None
                profile = stored.merged(learned) if stored else learned
                _replace(path, _to_json(profile))
                return profile
        return None

    def forget(self, fingerprint: str) -> bool:
        """Removes the profile of a model.  True if there was one."""
        path = self.path(fingerprint)
        with _forgiving(path, "removed"):
            if self.folder.exists():
                with _locked(path):
                    path.with_suffix(".tmp").unlink(missing_ok=True)
                    found = path.exists()
                    path.unlink(missing_ok=True)
                    return found
        return False

    def path(self, fingerprint: str) -> Path:
        """The path of a model's profile.  The file may not exist."""
        _require_fingerprint(fingerprint)
        return self.folder / f"{fingerprint}.json"


@contextmanager
def _forgiving(path: Path, what: str) -> Iterator[None]:
    """Logs errors of the operating system and of the lock as a warning."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        _log.warning("the profile %s cannot be %s (%s); continuing without it", path, what, reason)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other writers out.  The system releases the lock if the process is killed."""
    import filelock

    lock = filelock.FileLock(path.with_suffix(".lock"))
    with lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.01):
        yield


def _read(path: Path) -> Profile | None:
    try:
        profile = _from_json(path.read_bytes())
    except FileNotFoundError:
        return None
    if profile.fingerprint != path.stem:
        raise _UnusableError("damaged", "it is for another model")
    return profile


def _read_or_set_aside(path: Path) -> Profile | None:
    """Reads a profile, or renames the file if it is not usable.  Called with the lock held."""
    try:
        return _read(path)
    except _UnusableError as error:
        _set_aside(path, error.suffix, str(error))
        return None


def _set_aside(path: Path, suffix: str, why: str) -> None:
    """Renames a file that is not usable.  Called with the lock held.

    Files that were renamed before are kept, because they may still be of use.
    """
    target, number = path.with_name(f"{path.name}.{suffix}"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{suffix}.{number}")
    path.rename(target)
    _log.warning("the profile %s is not usable (%s); renamed to %s", path, why, target.name)


def _replace(path: Path, text: str) -> None:
    """Replaces a file as a whole.  Called with the lock held.

    The temporary file always has the same name, so it overwrites what a killed process left.
    """
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
