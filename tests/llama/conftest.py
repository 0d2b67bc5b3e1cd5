"""Two llamas of one tiny bit-invariant model: llama_cpp's own, and ours, which always drafts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.llama import SwiftLlama
from swift_gguf.speculation_options import SpeculationOptions
from tests.conftest import N_GPU_LAYERS

from llama_cpp import Llama  # isort: skip - swift_gguf first: it brings the library

ALWAYS = SpeculationOptions(
    mode="ngram,recycling,layer-skip", fixed=True, tree="best-first", draft_max=6
)
"""Trees of drafts in every cycle, whatever they cost."""

LOADING: dict[str, Any] = {"n_ctx": 512, "n_gpu_layers": N_GPU_LAYERS, "verbose": False}


@pytest.fixture(scope="session")
def tiny_path(tiny: Callable[..., Path]) -> str:
    """Llama, 8-bit weights: the same bits at every width."""
    return str(tiny("llama", quant="Q8_0"))


@pytest.fixture
def open_llama(tiny_path: str) -> Iterator[Callable[..., Any]]:
    """`open_llama(SwiftLlama, n_ctx=...)`, closed after the test."""
    opened: list[Any] = []

    def open_(kind: type = SwiftLlama, path: str = tiny_path, **options: Any) -> Any:
        if issubclass(kind, SwiftLlama):
            options = {"speculation": ALWAYS} | options
        else:
            options = {"flash_attn": True} | options
        opened.append(kind(path, **(LOADING | options)))
        return opened[-1]

    yield open_
    for llama in opened:
        llama.close()


@pytest.fixture(scope="module")
def plain(tiny_path: str) -> Iterator[Any]:
    """llama_cpp's own; `logits_all`, or it refuses logprobs."""
    llama = Llama(tiny_path, flash_attn=True, logits_all=True, **LOADING)
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def swift(tiny_path: str) -> Iterator[SwiftLlama]:
    llama = SwiftLlama(tiny_path, speculation=ALWAYS, **LOADING)
    yield llama
    llama.close()


def without_ids(response: Any) -> Any:
    """A response, or the chunks of a streamed one, without what differs from call to call."""
    if not isinstance(response, dict):
        return [without_ids(chunk) for chunk in response]
    response = copy.deepcopy(response)
    for key in ("id", "created"):
        assert response.pop(key)
    for choice in response["choices"]:
        calls = (choice.get("message") or choice.get("delta") or {}).get("tool_calls") or []
        for call in calls:
            call.pop("id")
    return response


def outcome(action: Callable[[], Any]) -> Any:
    """What an action returns, or the type of what it raises."""
    try:
        return action()
    except Exception as error:
        return type(error)
