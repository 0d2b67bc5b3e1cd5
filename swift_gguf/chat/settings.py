"""The settings that `/set` changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from swift_gguf.errors import SwiftError
from swift_gguf.sampling import SamplingOptions
from swift_gguf.templates import THINKS

THINKING = ("fold", "show", "hide")
CONTEXT = ("shift", "stop")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How answers are sampled and shown."""

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    n_predict: int = -1
    """Maximum number of tokens per answer; below 0: no limit."""
    thinking: str = "fold"
    """``fold``: show thoughts only while they are generated; ``show``; ``hide``."""
    markdown: bool = True
    context: str = "shift"
    """When the context is full: ``shift`` drops the oldest turns; ``stop``."""
    read_ahead: bool = True
    """Read the prompt while the person types it."""
    reasoning: str = "auto"
    """Whether the model thinks first: ``on``, ``off``, or ``auto`` (the template decides)."""

    @property
    def max_tokens(self) -> int | None:
        return self.n_predict if self.n_predict >= 0 else None

    def set(self, key: str, value: str) -> Settings:
        """The settings with another value, given as text.

        Raises:
            SwiftError: there is no such key, or the value is not valid.
        """
        key = key.lower().replace("_", "-")
        if key not in KEYS:
            raise SwiftError(f"there is no setting {key!r}; use one of {', '.join(KEYS)}")
        parsed = _parsed(key, value)
        if key in _SAMPLING:
            changed = replace(self.sampling, **{_SAMPLING[key]: parsed})
            return replace(self, sampling=changed)
        return replace(self, **{key.replace("-", "_"): parsed})

    def values(self) -> dict[str, str]:
        """All settings as text, in the form that `set` takes."""
        sampling = {key: getattr(self.sampling, name) for key, name in _SAMPLING.items()}
        own = {key: getattr(self, key.replace("-", "_")) for key in KEYS if key not in _SAMPLING}
        shown = {True: "on", False: "off", None: "random"}
        return {
            key: shown[value] if isinstance(value, bool | None) else str(value)
            for key, value in {**sampling, **own}.items()
        }


def _parsed(key: str, value: str) -> Any:
    kind, what = KEYS[key]
    try:
        return kind(value)
    except (ValueError, KeyError) as error:
        raise SwiftError(f"{key} must be {what}, not {value!r}") from error


def _seed(value: str) -> int | None:
    if value == "random":
        return None
    number = int(value)
    return None if number == -1 else number


def _natural(value: str) -> int:
    number = int(value)
    if number < 0:
        raise ValueError(value)
    return number


def _switch(value: str) -> bool:
    return {"on": True, "off": False}[value.lower()]


def _one_of(*values: str) -> Callable[[str], str]:
    return lambda value: values[values.index(value.lower())]


_SAMPLING = {
    "temp": "temperature",
    "top-k": "top_k",
    "top-p": "top_p",
    "min-p": "min_p",
    "repeat-penalty": "repeat_penalty",
    "repeat-last-n": "repeat_last_n",
    "presence-penalty": "presence_penalty",
    "frequency-penalty": "frequency_penalty",
    "seed": "seed",
}

KEYS: dict[str, tuple[Callable[[str], Any], str]] = {
    "temp": (float, "a number"),
    "top-k": (_natural, "a whole number, 0 for all tokens"),
    "top-p": (float, "a number"),
    "min-p": (float, "a number"),
    "repeat-penalty": (float, "a number"),
    "repeat-last-n": (int, "a whole number"),
    "presence-penalty": (float, "a number"),
    "frequency-penalty": (float, "a number"),
    "seed": (_seed, "a whole number, or random"),
    "n-predict": (int, "a whole number, -1 for no limit"),
    "thinking": (_one_of(*THINKING), f"one of {', '.join(THINKING)}"),
    "markdown": (_switch, "on or off"),
    "context": (_one_of(*CONTEXT), f"one of {', '.join(CONTEXT)}"),
    "read-ahead": (_switch, "on or off"),
    "reasoning": (_one_of(*THINKS), f"one of {', '.join(THINKS)}"),
}
"""Setting name (as on the command line): the parser of its value, and a description of it."""
