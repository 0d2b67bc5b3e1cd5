"""Two llamas of one tiny bit-invariant model: llama_cpp's own, and ours, which always drafts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from swift_gguf.llama import Llama
from swift_gguf.native import library
from swift_gguf.speculation import SpeculationOptions
from tests.conftest import N_GPU_LAYERS

import llama_cpp  # isort: skip - swift_gguf first: it brings the library

ALWAYS = SpeculationOptions(mode="ngram,recycling,layer-skip", fixed=True, draft_max=6)
"""Drafts in every cycle, whatever they cost."""
TREES = replace(ALWAYS, tree="best-first")
"""With flash attention, they may be trees."""

LOADING: dict[str, Any] = {"n_ctx": 512, "n_gpu_layers": N_GPU_LAYERS, "verbose": False}


class PlainLlama(llama_cpp.Llama):  # type: ignore[misc]
    """llama_cpp's own, on our kernels: llama.cpp's round differently.

    What is held to it is all that becomes of logits.
    """

    def __init__(self, *args: Any, flash_attn: bool = True, **options: Any) -> None:
        super().__init__(*args, flash_attn=flash_attn, **options)
        library().set_batch_invariant(self.ctx, enable=True)


@pytest.fixture
def open_llama(tiny_path: str) -> Iterator[Callable[..., Any]]:
    """`open_llama(Llama, n_ctx=...)`, closed after the test."""
    opened: list[Any] = []

    def open_(kind: type = Llama, path: str = tiny_path, **options: Any) -> Any:
        if issubclass(kind, Llama):
            options = {"speculation": ALWAYS} | options
        opened.append(kind(path, **(LOADING | options)))
        return opened[-1]

    yield open_
    for llama in opened:
        llama.close()


@pytest.fixture(scope="module")
def flash_attn() -> bool:
    return True


@pytest.fixture(scope="module")
def plain(tiny_path: str, flash_attn: bool) -> Iterator[Any]:
    """llama_cpp's own; `logits_all`, or it refuses logprobs."""
    llama = PlainLlama(tiny_path, flash_attn=flash_attn, logits_all=True, **LOADING)
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def swift(tiny_path: str, flash_attn: bool) -> Iterator[Llama]:
    options = TREES if flash_attn else ALWAYS
    llama = Llama(tiny_path, speculation=options, flash_attn=flash_attn, **LOADING)
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


def joined(response: Any) -> dict[str, Any]:
    """What a response says, or the chunks of a streamed one together."""
    parts = [response] if isinstance(response, dict) else list(response)
    said: dict[str, Any] = {"text": "", "calls": "", "logprobs": [], "finish_reason": None}
    for choice in (part["choices"][0] for part in parts):
        message = choice.get("message") or choice.get("delta") or {}
        said["text"] += choice.get("text") or message.get("content") or ""
        for call in message.get("tool_calls") or []:
            said["calls"] += call["function"]["arguments"]
        said["logprobs"] += entries(choice["logprobs"])
        said["finish_reason"] = choice["finish_reason"] or said["finish_reason"]
    return said


def entries(logprobs: Any) -> list[Any]:
    """Of `logprobs`, token by token."""
    if logprobs is None:
        return []
    if "content" in logprobs:
        return [one["logprob"] for one in logprobs["content"]]
    return list(zip(logprobs["text_offset"], logprobs["token_logprobs"], strict=True))


def outcome(action: Callable[[], Any]) -> Any:
    """What an action returns, or the type of what it raises."""
    try:
        return action()
    except Exception as error:
        return type(error)
