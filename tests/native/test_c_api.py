"""What programs in C call and Python does not: verification, what it refuses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.model.model import Model
from swift_gguf.native.binding import library

INT, INTS, POINTER = ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_void_p
ARGUMENT, ROLLBACK, SAMPLER, DECODE = -1, -2, -5, -100
Tiny = Callable[..., Path]
Opener = Callable[..., Model]


def c(name: str, *arguments: Any) -> Any:
    function = getattr(library().api._lib, name)
    function.argtypes = list(arguments)
    return function


def ints(values: list[int]) -> Any:
    return (INT * max(1, len(values)))(*values)


# -- verification ----------------------------------------------------------------------------------


class Chain:
    """A greedy llama_sampler chain. A grammar comes behind the choice, and may not allow it."""

    def __init__(self, grammar: str = "", model: Model | None = None) -> None:
        self.api = library().api
        self.pointer = self.api.llama_sampler_chain_init(
            self.api.llama_sampler_chain_default_params()
        )
        self.api.llama_sampler_chain_add(self.pointer, self.api.llama_sampler_init_greedy())
        if model is not None:
            vocab = self.api.llama_model_get_vocab(model._model)
            sampler = self.api.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
            assert sampler
            self.api.llama_sampler_chain_add(self.pointer, sampler)

    def __del__(self) -> None:
        self.api.llama_sampler_free(self.pointer)


def verify(
    model: Model, chain: Chain | None, token: int, pos: int, draft: list[int], seq_id: int = 0
) -> list[int] | int:
    found = (INT * (len(draft) + 1))()
    n = c("swift_gguf_verify", POINTER, POINTER, INT, INT, INT, INTS, INT, INTS)(
        model.ctx, chain and chain.pointer, seq_id, token, pos, ints(draft), len(draft), found
    )
    return n if n < 0 else list(found[:n])


def n_held(model: Model) -> int:
    api = library().api
    return int(api.llama_memory_seq_pos_max(api.llama_get_memory(model.ctx), 0)) + 1


def plain(model: Model, chain: Chain, n: int) -> list[int]:
    text = [5]
    for pos in range(n):
        found = verify(model, chain, text[-1], pos, [])
        assert isinstance(found, list)
        text += found
    return text


def test_right_drafts_are_kept_and_wrong_ones_taken_back(tiny: Tiny, open_model: Opener) -> None:
    path, chain = tiny("llama", quant="Q8_0"), Chain()
    text = plain(open_model(path), chain, 12)
    model = open_model(path)
    assert verify(model, chain, 5, 0, text[1:5]) == text[1:6]
    assert n_held(model) == 5
    wrong = (text[7] + 1) % model.n_vocab
    assert verify(model, chain, text[5], 5, [text[6], wrong, text[8]]) == text[6:8]
    assert n_held(model) == 7
    assert verify(model, chain, text[7], 7, []) == text[8:9]
    assert n_held(model) == 8


def test_bad_arguments_are_codes_and_change_nothing(tiny: Tiny, open_model: Opener) -> None:
    model, chain = open_model(tiny("llama")), Chain()
    assert verify(model, chain, 5, 0, [6]) != ARGUMENT
    before = n_held(model)
    assert verify(model, None, 5, before, []) == ARGUMENT
    for pos in (-1, 0, before + 1, 1 << 30):
        assert verify(model, chain, 5, pos, []) == ARGUMENT
    assert verify(model, chain, 5, before, [1] * model.n_ctx) == ARGUMENT
    for seq_id in (-1, 1 << 20):
        assert verify(model, chain, 5, before, [], seq_id) == ARGUMENT
    for token in (-1, model.n_vocab):
        code = verify(model, chain, token, before, [5])
        assert isinstance(code, int)
        assert code <= DECODE
    assert n_held(model) == before
    assert isinstance(verify(model, chain, 5, before, []), list)


@pytest.mark.parametrize("n_allowed", [0, 1, 2, 3])
def test_a_sampler_that_throws_is_a_code(n_allowed: int, tiny: Tiny, open_model: Opener) -> None:
    """Never 0 tokens: a caller that counts them would decode the same for ever."""
    path = tiny("llama", quant="Q8_0")
    text = plain(open_model(path), Chain(), 3)
    allowed = " ".join(f"<[{token}]>" for token in text[1 : 1 + n_allowed])
    model = open_model(path)
    chain = Chain(f"root ::= {allowed}", model) if allowed else Chain('root ::= "\\x00"', model)
    found = verify(model, chain, 5, 0, text[1:3])
    assert found == (text[1:4] if n_allowed == 3 else SAMPLER)
    assert n_held(model) == (3 if n_allowed == 3 else 0)
    if n_allowed < 3:
        library().api.llama_sampler_reset(chain.pointer)
        assert verify(model, chain, 5, 0, text[1:3]) == SAMPLER  # and did not abort
        # another chain goes on from there
        assert verify(model, Chain(), 5, 0, text[1:3]) == text[1:4]


def test_a_model_that_cannot_go_back_decodes_plainly(tiny: Tiny, open_model: Opener) -> None:
    model, chain = open_model(tiny("mamba")), Chain()
    assert verify(model, chain, 5, 0, [6]) == ROLLBACK
    assert len(plain(model, chain, 3)) == 4


@pytest.mark.parametrize("name", ["swift_gguf_subnetwork_load", "swift_gguf_sidecar_load"])
def test_reasons_fit_the_callers_buffer(name: str, tiny: Tiny, open_model: Opener) -> None:
    sidecar = [POINTER] if name == "swift_gguf_subnetwork_load" else []
    function = c(name, POINTER, ctypes.c_char_p, *sidecar, ctypes.c_char_p, ctypes.c_size_t)
    function.restype = POINTER
    model = open_model(tiny("llama"))._model
    for size in (0, 1, 5):
        error = ctypes.create_string_buffer(b"#" * 16)
        for pointer in (None, model):
            nothing = [None] if sidecar else []
            assert not function(pointer, b"/nowhere", *nothing, error, size)
            assert error.raw[size:16] == b"#" * (16 - size)
    assert not function(model, b"/nowhere", *([None] if sidecar else []), None, 0)
