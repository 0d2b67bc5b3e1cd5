"""Fields of requests that the server does not support.

A field that would change the answer is refused, unless its value is the server's own behaviour.
A field that does not change the answer is ignored.  Unknown fields are ignored too, because many
clients send fields of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swift_gguf.server.errors import bad_request

HARMLESS = frozenset(
    {
        "metadata",
        "prediction",  # a guess at the answer, which does not change the answer
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    }
)
"""Fields of OpenAI's API that do not change the answer."""

UNHELD: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # OpenRouter's
    "reasoning": (),
    # vLLM's
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "prompt_logprobs": (0,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "truncate_prompt_tokens": (-1,),
    "use_beam_search": (False,),
    # llama-server's
    "adaptive_target": (-1,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "grammar_lazy": (False,),
    "ignore_eos": (False,),
    "json_schema": (),
    "lora": ([],),
    "min_keep": (0, 1),
    "n_keep": (0, -1),
    "n_probs": (0,),
    "reasoning_budget_tokens": (-1,),
    "samplers": (),
    "t_max_predict_ms": (0, -1),
    "thinking_budget_tokens": (-1,),
    "top_n_sigma": (-1, 0),
    "xtc_probability": (0,),
}
"""Fields that would change the answer, and the values that do not."""

INSTEAD = {
    "chat_template": "the server's --chat-template",
    "guided_choice": "grammar",
    "guided_grammar": "grammar",
    "guided_json": "response_format",
    "guided_regex": "response_format with a pattern, or grammar",
    "json_schema": "response_format",
    "n_probs": "logprobs",
    "reasoning": "reasoning_effort",
    "structured_outputs": "response_format or grammar",
}


def refuse_unheld(given: Mapping[str, Any]) -> None:
    """Checks the fields of a request.

    Raises:
        ApiError: one of them is not supported.
    """
    for name, neutral in UNHELD.items():
        value = given.get(name)
        if value is None or any(value == none and _kind(value) is _kind(none) for none in neutral):
            continue
        instead = f"; use {INSTEAD[name]}" if name in INSTEAD else ""
        raise bad_request(f"{name} is not supported here{instead}", param=name)


def _kind(value: Any) -> type:
    """The type of a value, where 0 equals 0.0 but not False."""
    return float if type(value) is int else type(value)
