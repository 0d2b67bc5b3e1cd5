"""`Llama.speculation`: what drafts, why, figures, idle search, what is kept and refused."""

from __future__ import annotations

import gc
import itertools
import pickle
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import swift_gguf
from swift_gguf.errors import (
    GrammarError,
    ModelError,
    SidecarError,
    SwiftError,
    UnsupportedModelError,
)
from swift_gguf.gguf.identity import profile_key
from swift_gguf.learning.profile import Store
from swift_gguf.llama import Llama
from swift_gguf.model import ModelOptions
from swift_gguf.server.options import ServerOptions
from swift_gguf.server.served import ServedLlama
from swift_gguf.speculation import SpeculationOptions
from tests.llama.conftest import LOADING, PlainLlama, without_ids
from tests.prepare.test_sidecar import prepared

from llama_cpp import LlamaGrammar, LogitsProcessorList  # isort: skip
from llama_cpp._internals import LlamaSampler  # isort: skip
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # isort: skip

PROMPT = "one two three, one two three, one two three, one two"


def say(llama: PlainLlama, prompt: Any = PROMPT, **values: Any) -> Any:
    return without_ids(llama.create_completion(prompt, **({"max_tokens": 20, "seed": 1} | values)))


def test_figures(swift: Llama) -> None:
    swift.reset()
    answer = say(swift)
    stats = swift.speculation.stats
    assert stats.prompt_n == answer["usage"]["prompt_tokens"]
    assert stats.predicted_n == answer["usage"]["completion_tokens"] == 20
    assert stats.stop_reason == "length"
    assert stats.cycle_n == 19  # the first token comes with the prompt
    assert 0 < stats.accepted <= stats.drafted
    assert stats.cycle_s >= stats.draft_s + stats.verify_s > 0
    stream = swift.create_completion(PROMPT, seed=1, stream=True, max_tokens=20)
    list(itertools.islice(stream, 5))
    stream.close()
    assert swift.speculation.stats is not stats
    assert (swift.speculation.stats.stop_reason, swift.speculation.stats.prompt_n) == ("stopped", 1)
    eos = swift.token_eos()
    say(swift, logit_bias={eos: 1000.0})
    assert (swift.speculation.stats.stop_reason, swift.speculation.stats.predicted_n) == ("eos", 0)


def test_modes(open_llama: Callable[..., Any]) -> None:
    llama = open_llama(speculation="auto")
    assert llama.speculation.mode == "auto"
    expected = say(llama)
    for mode, name in (("off", "off"), ("ngram", "ngram"), (["ngram", "recycling"], None)):
        llama.speculation.mode = mode
        assert llama.speculation.mode == (name or "ngram,recycling")
        assert llama.speculation.enabled is (mode != "off")
        llama.reset()
        assert say(llama) == expected
        assert (llama.speculation.stats.drafted > 0) is (mode != "off")
        assert set(llama.speculation.stats.sources) <= {"ngram", "recycling"}
    llama.speculation.mode = "off"
    assert llama.speculation.reason == "switched off"
    with pytest.raises(SwiftError, match="drafts of 65 tokens; give 1 to 64"):
        SpeculationOptions(draft_max=65)
    with pytest.raises(SwiftError, match="no source of drafts 'telepathy'"):
        llama.speculation.mode = "telepathy"
    assert llama.speculation.mode == "off"
    with pytest.raises(SwiftError, match="telepathy"):
        Llama(llama.model_path, speculation="telepathy", **LOADING)


def test_a_mode_set_in_the_middle_of_an_answer(open_llama: Callable[..., Any]) -> None:
    llama = open_llama()
    expected = say(llama, max_tokens=30)
    llama.reset()
    prompt = llama.tokenize(PROMPT.encode())
    tokens = list(itertools.islice(llama.generate(prompt, temp=0.0), 24))
    llama.reset()
    stream = llama.generate(prompt, temp=0.0)
    found: list[int] = []
    for mode in ("off", "ngram", "auto", "ngram,layer-skip"):
        found += itertools.islice(stream, 6)
        llama.speculation.mode = mode
    stream.close()
    assert found == tokens
    llama.reset()
    assert say(llama, max_tokens=30) == expected


def test_what_is_learned_is_kept(open_llama: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    llama = open_llama(PlainLlama)  # any file of its own: learning goes by its name and header
    path.write_bytes(Path(llama.model_path).read_bytes() + b"\0" * 64)
    learner = open_llama(path=str(path))
    store = Store()
    assert store.load(profile_key(path, None)) is None  # nothing is measured first
    say(learner)
    profile = store.load(profile_key(path, None))  # after the first answer
    assert profile is not None
    rows = len(profile.recycling)
    assert rows > 0
    say(learner, "quite another text that teaches something new", max_tokens=60)
    learner.close()
    profile = store.load(profile_key(path, None))
    assert profile is not None
    assert len(profile.recycling) > rows


def test_idle_search_yields_to_whoever_uses_the_model(open_llama: Callable[..., Any]) -> None:
    llama = open_llama()
    expected = [say(llama, seed=seed, max_tokens=40) for seed in range(3)]
    state = llama.save_state()
    llama.reset()
    with llama.speculation.idle() as idle:
        for seed, answer in enumerate(expected):
            assert say(llama, seed=seed, max_tokens=40) == answer
            steps = idle.meter.steps
            deadline = time.monotonic() + 20
            while idle.meter.steps == steps and time.monotonic() < deadline:
                time.sleep(0.01)
            assert idle.meter.steps > steps, "nothing was searched"
            assert llama.save_state().llama_state_size == state.llama_state_size or seed < 2
        stream = llama.create_completion(PROMPT, seed=0, max_tokens=40, stream=True)
        text = next(stream)["choices"][0]["text"]
        steps = idle.meter.steps
        time.sleep(0.1)
        assert idle.meter.steps == steps, "searched in the middle of an answer"
        text += "".join(chunk["choices"][0]["text"] for chunk in stream)
        assert text == expected[0]["choices"][0]["text"]
        llama.eval(llama.tokenize(b"one two"))
        time.sleep(0.1)
        assert isinstance(llama.sample(temp=0.0), int)
        llama.load_state(state)
        assert llama.n_tokens == state.n_tokens
    say(llama)


def test_idle_search_ends_with_the_llama(open_llama: Callable[..., Any]) -> None:
    llama = open_llama()
    say(llama)
    idle = llama.speculation.idle()
    assert idle is not None
    llama.close()
    with idle.paused():
        pass
    llama.speculation.mode  # noqa: B018 - can still be read
    off = open_llama(speculation="off")
    assert off.speculation.idle() is None


def test_a_closed_llama_says_so(open_llama: Callable[..., Any]) -> None:
    llama = open_llama()
    say(llama)
    stream = llama.create_completion(PROMPT, max_tokens=40, seed=1, stream=True)
    list(itertools.islice(stream, 7))
    llama.close()
    with pytest.raises(SwiftError, match="closed"):
        list(stream)
    llama.close()
    with pytest.raises(SwiftError, match="closed"):
        say(llama)
    with pytest.raises(SwiftError, match="closed"):
        llama.save_state()


def test_it_goes_when_nobody_needs_it(tiny_path: str) -> None:
    llama = Llama(tiny_path, **LOADING)
    say(llama)
    gone, model = weakref.ref(llama), llama.speculation.model
    assert model is not None
    del llama
    gc.collect()
    assert gone() is None
    assert model.ctx is None


def test_samplers_go_without_the_garbage_collector(open_llama: Callable[..., Any]) -> None:
    plain, swift = open_llama(PlainLlama), open_llama()
    gc.collect()
    assert n_samplers_left(lambda: say(plain)) > 1  # the control
    assert n_samplers_left(lambda: say(swift)) <= 1
    assert n_samplers_left(lambda: say(swift, stop=["e"], logit_bias={5: 1.0})) <= 1


def test_a_logits_processor_may_ask_the_llama_it_belongs_to(
    open_llama: Callable[..., Any],
) -> None:
    """What samples meanwhile is not freed under its feet."""
    llama = open_llama()
    asked: list[Any] = []

    def processor(ids: Any, scores: Any) -> Any:
        if not asked:
            asked.append(None)
            kept = llama.save_state()
            asked.append(say(llama, "four five", max_tokens=2))
            llama.load_state(kept)
        return scores

    assert say(llama, max_tokens=3, logits_processor=LogitsProcessorList([processor]))
    assert asked[1]["usage"]["completion_tokens"] == 2
    assert n_samplers_left(lambda: say(llama)) <= 1


def test_a_logits_processor_that_uses_the_llama_in_the_middle_of_an_answer(
    open_llama: Callable[..., Any],
) -> None:
    """The draft under way is lost, the text is not."""
    llama = open_llama()
    expected = say(llama, max_tokens=24)
    for when in (2, 5, 6, 11):
        calls: list[int] = []

        def processor(ids: Any, scores: Any, when: int = when, calls: list[int] = calls) -> Any:
            calls.append(len(ids))
            if len(calls) == when:
                kept = llama.save_state()
                assert kept.n_tokens == len(ids)
                assert say(llama, "four five", max_tokens=6)
                llama.load_state(kept)
            return scores

        llama.reset()
        assert say(llama, max_tokens=24, logits_processor=LogitsProcessorList([processor])) == (
            expected
        )
        assert calls == [*range(calls[0], calls[0] + 24)]


def test_a_model_that_drafts(open_llama: Callable[..., Any], tiny_path: str) -> None:
    expected = say(open_llama(speculation="off"))
    llama = open_llama(speculation="draft-model", draft_model_path=tiny_path)
    assert say(llama) == expected
    assert llama.speculation.stats.sources["draft-model"].accepted > 0
    llama.speculation.mode = "ngram"
    llama.speculation.mode = "draft-model"
    with pytest.raises(SwiftError, match="draft-model"):
        open_llama(speculation="draft-model")


def test_a_sidecar_that_is_named(
    open_llama: Callable[..., Any], tiny_path: str, tmp_path: Path
) -> None:
    """By the class, and so by `swift-gguf serve`."""
    with pytest.raises(SidecarError, match="nowhere"):
        open_llama(sidecar=tmp_path / "nowhere.swift.gguf")
    assert open_llama(sidecar="none").speculation.model.sidecar is None
    path = prepared(Path(tiny_path), tmp_path / "own.swift.gguf")
    assert open_llama(sidecar=path).speculation.model.sidecar.path == path
    served = ServedLlama.load(
        Path(tiny_path),
        ModelOptions(n_ctx=256, n_gpu_layers=0, sidecar=path),
        SpeculationOptions(),
        ServerOptions(),
    )
    with closing(served):
        assert served.speculation.model is not None
        assert served.speculation.model.sidecar is not None
        assert served.speculation.model.sidecar.path == path


def n_samplers_left(ask: Callable[[], object]) -> int:
    """After four requests, until the collector comes."""
    gc.collect()
    before = len(open_samplers())
    gc.disable()
    try:
        for _ in range(4):
            ask()
        return len(open_samplers()) - before
    finally:
        gc.enable()
        gc.collect()


def open_samplers() -> list[LlamaSampler]:
    return [each for each in gc.get_objects() if isinstance(each, LlamaSampler) and each.sampler]


def test_no_matrix_of_logits(open_llama: Callable[..., Any]) -> None:
    llama = open_llama()
    assert llama.scores.nbytes == 0
    assert say(llama, logprobs=2)["choices"][0]["logprobs"]["top_logprobs"]
    assert llama.scores.nbytes == 0
    assert llama._scores.copy().size == 1
    assert llama._scores.shape == (llama.n_tokens, llama.n_vocab())


def test_logits_of_all_positions_for_those_who_ask(open_llama: Callable[..., Any]) -> None:
    llamas = [open_llama(kind, logits_all=True) for kind in (PlainLlama, Llama)]
    for llama in llamas:
        say(llama, temperature=0.0, logprobs=2, echo=True)
    plain, swift = llamas
    assert (plain.scores[: plain.n_tokens] == swift.scores[: swift.n_tokens]).all()
    assert plain.eval_logits == swift.eval_logits


def test_pickling(open_llama: Callable[..., Any]) -> None:
    llama = open_llama(speculation=SpeculationOptions(mode="ngram", draft_max=3), seed=7)
    expected = say(llama)
    again = pickle.loads(pickle.dumps(llama))
    try:
        assert again.speculation.options == llama.speculation.options
        assert again.context_params.flash_attn_type == -1  # where the backend has it
        assert say(again) == expected
    finally:
        again.close()


@pytest.mark.parametrize("flash_attn", [None, True, False])
def test_flash_attention_is_the_callers_to_say(
    open_llama: Callable[..., Any], flash_attn: bool | None
) -> None:
    llama = open_llama(flash_attn=flash_attn)
    wanted = -1 if flash_attn is None else int(flash_attn)
    assert llama.context_params.flash_attn_type == wanted
    assert len(say(llama)["choices"][0]["text"]) > 0


@pytest.mark.parametrize(
    ("n_ctx", "n_batch", "real"), [(16, 512, 256), (300, 8, 512), (0, 1, 512), (512, 64, 512)]
)
def test_small_contexts_and_batches(
    open_llama: Callable[..., Any], n_ctx: int, n_batch: int, real: int
) -> None:
    llama = open_llama(n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_batch)
    assert llama.n_ctx() == len(llama.input_ids) == real
    long = [20 + i % 9 for i in range(200)]
    expected = say(open_llama(n_ctx=512), long, temperature=0.0)["choices"]
    assert say(llama, long, temperature=0.0)["choices"] == expected


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_models_with_a_running_state_decode_plainly(
    tiny: Callable[..., Path], open_llama: Callable[..., Any], family: str
) -> None:
    path = str(tiny(family, quant="Q8_0"))
    llama, plain = open_llama(path=path, speculation="auto"), open_llama(PlainLlama, path=path)
    assert not llama.speculation.enabled
    assert "state" in llama.speculation.reason
    for prompt in (PROMPT, PROMPT + " three", "other", PROMPT):
        assert say(llama, prompt) == say(plain, prompt)
        assert llama.n_tokens == plain.n_tokens
    assert llama.speculation.idle() is None
    with pytest.raises(UnsupportedModelError, match="no speculation"):
        llama.speculation.mode = "ngram"
    assert say(llama) == say(plain)


def test_the_vocabulary_alone(open_llama: Callable[..., Any]) -> None:
    llama = open_llama(vocab_only=True, speculation="auto")
    assert not llama.speculation.enabled
    assert llama.speculation.reason == "only the vocabulary is loaded"
    tokens = llama.tokenize(b"Hello world")
    assert llama.detokenize(tokens) == b"Hello world"
    assert llama.speculation.idle() is None
    llama.speculation.save()
    llama.speculation.mode = "off"
    with pytest.raises(UnsupportedModelError, match="only the vocabulary"):
        llama.speculation.mode = "ngram"


def test_a_draft_model_of_the_callers_own(open_llama: Callable[..., Any]) -> None:
    lookup = LlamaPromptLookupDecoding(num_pred_tokens=4)
    llama = open_llama(draft_model=lookup, speculation="auto")
    assert llama.speculation.reason == "the draft_model drafts"
    expected = say(open_llama(PlainLlama))
    assert say(llama) == expected


def test_embeddings_and_answers_from_one_llama(open_llama: Callable[..., Any]) -> None:
    texts = ["Hello world", "a different text", "Hello world"]
    plain, swift = (open_llama(kind, embedding=True) for kind in (PlainLlama, Llama))
    expected = say(open_llama(PlainLlama))
    for _ in range(2):
        assert say(swift) == expected
        assert swift.create_embedding(texts) == plain.create_embedding(texts)
        assert swift.embed(texts[0], normalize=True) == plain.embed(texts[0], normalize=True)
        assert swift.n_tokens == 0
    assert say(swift) == expected
    with pytest.raises(RuntimeError, match="embedding=True"):
        open_llama().embed("x")


BAD = {
    "missing": (None, "cannot be read"),
    "empty": (b"", "GGUF"),
    "something else": (b"#!/bin/sh\n" * 100, "GGUF"),
    "cut off": (0.6, "ends before|cut|beyond|damaged|shorter"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tiny_path: str, tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = tmp_path / "bad.gguf"
    if isinstance(content, float):
        data = Path(tiny_path).read_bytes()
        content = data[: int(len(data) * content)]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        Llama(str(path), **LOADING)
    assert isinstance(caught.value, ValueError)  # what users of PlainLlama catch
    assert len(str(caught.value).splitlines()) == 1


def test_a_grammar_that_does_not_parse(swift: Llama) -> None:
    with pytest.raises(GrammarError, match="GBNF") as caught:
        say(swift, grammar=LlamaGrammar.from_string('root ::= "a" (('))
    assert isinstance(caught.value, ValueError)
    assert say(swift)


def test_a_process_ends_quietly_whatever_it_left_open(tiny_path: str) -> None:
    """An answer in the middle, a search in idle time, no close."""
    code = f"""
from swift_gguf import Llama
llama = Llama({tiny_path!r}, n_ctx=256, verbose=False, speculation="ngram,layer-skip")
llama.create_completion("one two three, one two three", max_tokens=30)
stream = llama.create_completion("one two three, one two", max_tokens=30, stream=True)
next(stream)
idle = llama.speculation.idle()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_verbose_shows_what_llama_cpp_logs(tiny_path: str) -> None:
    code = f"""
from swift_gguf import Llama
Llama({tiny_path!r}, n_ctx=256, verbose=True).close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "llama_context" in done.stderr


def test_the_package_has_the_names_it_lists() -> None:
    for name in swift_gguf.__all__:
        assert getattr(swift_gguf, name).__name__ == name
    with pytest.raises(AttributeError, match="telepathy"):
        swift_gguf.telepathy  # noqa: B018


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, swift_gguf; print({'numpy', 'llama_cpp', 'ctypes'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
