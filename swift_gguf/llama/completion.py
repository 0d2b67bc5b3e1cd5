"""What `create_completion` asks of a generation, and llama_cpp's code for it, made to ask us."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from swift_gguf.llama.scores import Records


@dataclass(frozen=True)
class Request:
    """As far as generations need to know it."""

    max_tokens: int | None = None
    echo: bool = False
    """Are log-probabilities of the prompt asked for, too?"""
    records: Records | None = None
    """Of the rows that log-probabilities are asked of."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any], *, keeps_rows: bool) -> Request:
        """keeps_rows: log-probabilities are to be had without records."""
        n_top, limit = arguments["logprobs"], arguments["max_tokens"]
        records = None if n_top is None or keeps_rows else Records(n_top=n_top)
        return cls(
            max_tokens=limit if limit is not None and limit > 0 else None,
            echo=bool(arguments["echo"]) and records is not None,
            records=records,
        )


def with_globals(function: Any, **replaced: Any) -> Callable[..., Any]:
    """A function of another module that finds other things by some names."""
    scope = function.__globals__ | replaced
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class Criteria:
    """Stopping criteria that get the logits which the latest token was sampled from; llama_cpp
    looks for them in a matrix of all."""

    def __init__(self, criteria: Callable[[Any, Any], bool], latest: Callable[[], Any]) -> None:
        self._criteria, self._latest = criteria, latest

    def __call__(self, input_ids: Any, _: Any) -> bool:
        return self._criteria(input_ids, self._latest())
