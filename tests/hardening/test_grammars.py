"""Grammars that leave nothing to say, or break llama.cpp's stack: one clear line, no crash.

llama.cpp aborts on these, so a regression here ends the test run itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from swift_gguf.engine import generate
from swift_gguf.errors import GrammarError
from swift_gguf.model.model import Model
from swift_gguf.native.captured import captured_stderr
from swift_gguf.sampling.sampling import Sampler, SamplingOptions
from swift_gguf.server import grammars
from swift_gguf.server.errors import ApiError
from swift_gguf.session import Session
from swift_gguf.speculation import Speculation, SpeculationOptions
from tests.fixtures.corrupt import without_letter

Opener = Callable[..., Model]
PROMPT = list(range(5, 25))
DEAD_ENDS = {
    "at once": 'root ::= "z"',
    "later": 'root ::= "aa" "z"',
    "empty class": "root ::= [z-a]+",
    "no such token": "root ::= <[999999]>",
}


@pytest.fixture(scope="module")
def no_z(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that cannot say z."""
    path = tmp_path_factory.mktemp("no_z") / "model.gguf"
    path.write_bytes(without_letter(tiny("llama", quant="Q8_0").read_bytes(), b"z"))
    return path


@pytest.mark.parametrize("mode", ["off", "ngram,layer-skip"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", DEAD_ENDS)
def test_a_dead_end_is_told(
    no_z: Path, open_model: Opener, mode: str, temperature: float, name: str
) -> None:
    model = open_model(no_z, n_threads=1)
    sampling = SamplingOptions(temperature=temperature, seed=1, grammar=DEAD_ENDS[name])
    with Session(model, Speculation(model, SpeculationOptions(mode=mode))) as session:
        with pytest.raises(GrammarError, match="allows none of the model's tokens"):
            list(session.answer(PROMPT, sampling, max_tokens=8))
        after = session.answer(PROMPT, SamplingOptions(seed=1), max_tokens=8)
        assert len(list(after)) > 0


def test_a_way_out_is_taken(no_z: Path, open_model: Opener) -> None:
    model = open_model(no_z, n_threads=1)
    sampling = SamplingOptions(seed=1, grammar='root ::= "b" ("a" | "z")')
    answer = Session(model).answer(PROMPT, sampling, max_tokens=8)
    assert "".join(piece.text for piece in answer) == "ba"


@pytest.mark.parametrize("name", DEAD_ENDS)
def test_swift_llama(no_z: Path, name: str) -> None:
    from swift_gguf import Llama
    from swift_gguf.native.binding import library

    library()
    from llama_cpp import LlamaGrammar

    llama = Llama(str(no_z), n_threads=1, n_gpu_layers=0, verbose=False)
    grammar = LlamaGrammar.from_string(DEAD_ENDS[name], verbose=False)
    with pytest.raises(GrammarError, match="allows none of the model's tokens"):
        llama.create_completion(PROMPT, grammar=grammar, max_tokens=8, seed=1)
    assert llama.create_completion(PROMPT, max_tokens=4, seed=1)["usage"]["completion_tokens"] > 0
    llama.close()


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000,
        "\n".join(f"r{i} ::= r{i + 1}" for i in range(100_000)) + '\nr100000 ::= "a"\nroot ::= r0',
        'root ::= root "a"',
        'root ::= x root "a"\nx ::= ""',
        'root ::= "a"{1000000000}',
        'root ::= ("a"*',
        "",
    ],
    ids=[
        "groups",
        "rules",
        "left recursion",
        "hidden left recursion",
        "repetition",
        "open",
        "none",
    ],
)
def test_what_breaks_the_parser(
    tiny: Callable[..., Path], open_model: Opener, grammar: str
) -> None:
    model = open_model(tiny("llama"), n_threads=1)
    if not grammar:  # llama.cpp takes it for none
        Sampler(model, SamplingOptions(grammar=grammar)).close()
        return
    with pytest.raises(GrammarError) as refused:
        Sampler(model, SamplingOptions(grammar=grammar))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_are_those_llama_cpp_draws(
    tiny: Callable[..., Path], open_model: Opener, temperature: float
) -> None:
    """A grammar's draws go another way than `llama_sampler_sample`, to the same tokens."""
    model = open_model(tiny("llama"), n_threads=1)
    sampling = SamplingOptions(
        temperature=temperature, seed=7, repeat_penalty=1.1, grammar="root ::= [a-z ]+"
    )

    class Theirs(Sampler):
        def sample(self, model: Model, row: int) -> int:
            return int(
                self._api.llama_sampler_sample(self._chain, model.ctx, model.output_index(row))
            )

    texts = []
    for kind in (Sampler, Theirs):
        model.clear()
        with kind(model, sampling, prompt=PROMPT) as sampler:
            tokens = generate(model, PROMPT, sampler=sampler, max_tokens=40)
            texts.append([token.id for token in tokens])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 40


def test_two_threads_leave_standard_error_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    """One that saved the other's replacement would restore that."""
    before = os.fstat(2)
    barrier = threading.Barrier(2)

    def capture() -> None:
        barrier.wait()
        for _ in range(200):
            with captured_stderr():
                time.sleep(0)

    threads = [threading.Thread(target=capture) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.path.samestat(os.fstat(2), before)
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


@pytest.mark.parametrize(
    ("grammar", "says"),
    [("root ::= (", "unexpected end of input|expecting"), ("root ::= missing", "Undefined rule")],
)
def test_the_parsers_own_words_are_told_and_no_others(
    no_z: Path, open_model: Opener, monkeypatch: pytest.MonkeyPatch, grammar: str, says: str
) -> None:
    @contextmanager
    def with_another_thread() -> Iterator[list[str]]:
        with captured_stderr() as lines:
            os.write(2, b"a request came from 192.0.2.7\n")
            yield lines

    monkeypatch.setattr("swift_gguf.sampling.sampling.captured_stderr", with_another_thread)
    with pytest.raises(GrammarError, match=f"named root: ({says})") as raised:
        Sampler(open_model(no_z, n_threads=1), SamplingOptions(grammar=grammar))
    assert "192.0.2.7" not in str(raised.value)


# -- texts of a few kilobytes that describe gigabytes ----------------------------------------------


BOUNDLESS_GRAMMARS = {
    "many": "root ::= " + '"a"{0,2000} ' * 5000,
    "of a long literal": f'root ::= "{"a" * 60_000}"{{2000}}',
    "of a long class": f"root ::= [{'ab' * 30_000}]{{2000}}",
    "of repetitions": f'root ::= "{"a" * 600}"{{40}}{{50}}',
    "after a comment": f'root ::= "{"a" * 60_000}" # "b"\n {{2000}}',
    "with a quote": 'root ::= "\\"' + "a" * 60_000 + '"{2000}',
}


@pytest.mark.parametrize("name", BOUNDLESS_GRAMMARS)
def test_a_grammar_without_bounds_is_refused(
    name: str, tiny: Callable[..., Path], open_model: Opener
) -> None:
    vocab = open_model(tiny("llama")).vocab
    with pytest.raises(ApiError, match="too many repetitions"):
        grammars.check(vocab, BOUNDLESS_GRAMMARS[name], param="grammar")


@pytest.mark.parametrize("unclosed", ["[", '"', "{", "[a", '"a\\'])
def test_brackets_that_are_never_closed_take_no_time(
    unclosed: str, tiny: Callable[..., Path], open_model: Opener
) -> None:
    vocab = open_model(tiny("llama")).vocab
    start = time.monotonic()
    with pytest.raises(ApiError):
        grammars.check(vocab, "root ::= " + unclosed * 30_001, param="grammar")
    assert time.monotonic() - start < 5


def test_repetitions_that_are_needed_are_taken(
    tiny: Callable[..., Path], open_model: Opener
) -> None:
    vocab = open_model(tiny("llama")).vocab
    grammars.check(vocab, 'root ::= [a-z]{1,2000} "," [0-9]{3} # {9999}', param="x")
