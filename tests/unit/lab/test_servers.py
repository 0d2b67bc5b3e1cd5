"""What `lab servers` reports: speeds, ratios by request, texts; without a server."""

from __future__ import annotations

import json

from lab.servers import Answer, Report, Request, render
from swift_gguf.bench.subject import Machine


def answer(tokens: int, ms: float, text: str = "a text") -> Answer:
    return Answer(
        prompt_n=50,
        prompt_ms=500.0,
        predicted_n=tokens,
        predicted_ms=ms,
        seconds=0.5 + ms / 1e3,
        text=text,
    )


def report(*requests: tuple[Answer, Answer]) -> Report:
    return Report(
        model="model.gguf",
        suites=["suite.jsonl"],
        tokens=96,
        machine=Machine(cpu="Some CPU", cores=2, system="Linux x86_64", load=0.1),
        has_sidecar=False,
        servers={"stock": [], "swift-gguf": []},
        requests=[
            Request(category="c", question_id=str(i), answers={"stock": a, "swift-gguf": b})
            for i, (a, b) in enumerate(requests)
        ],
    )


SLOW, FAST, OTHER = answer(11, 1000.0), answer(11, 250.0), answer(21, 1000.0, "another")
EMPTY = answer(1, 0.001, "")


def test_speeds_are_all_tokens_over_all_time() -> None:
    found = report((SLOW, FAST), (SLOW, OTHER)).summary("swift-gguf")
    assert found.answer_tokens_per_second == 24  # the first token of an answer takes no time
    assert found.prompt_tokens_per_second == 100
    assert found.seconds == 2.25


def test_ratios_are_by_request() -> None:
    found = report((SLOW, FAST), (SLOW, OTHER), (SLOW, SLOW)).summary("swift-gguf")
    assert found.ratio == (2.0, 1.0, 4.0)
    assert found.different_texts == 1


def test_an_answer_of_one_token_has_no_speed() -> None:
    found = report((SLOW, FAST), (EMPTY, EMPTY))
    assert found.summary("swift-gguf").ratio == (4.0, 4.0, 4.0)
    assert report((EMPTY, EMPTY)).summary("stock").ratio is None


def test_the_table() -> None:
    lines = render(report((SLOW, FAST), (SLOW, OTHER))).splitlines()
    assert lines[-2] == "| stock | 10.0 | 1 | 100.0 | 3.0 | 0 of 2 |"
    assert lines[-1] == "| swift-gguf | 24.0 | 3.00 (2.00, 4.00) | 100.0 | 2.2 | 1 of 2 |"
    assert render(report()) == "no request was answered"


def test_the_file_has_no_texts() -> None:
    found = json.loads(json.dumps(report((SLOW, OTHER)).as_dict()))
    assert found["requests"][0]["answers"]["swift-gguf"] == {
        "prompt_n": 50,
        "prompt_ms": 500.0,
        "predicted_n": 21,
        "predicted_ms": 1000.0,
        "seconds": 1.5,
        "same_text": False,
    }
    assert found["summaries"]["swift-gguf"]["ratio"] == [2.0, 2.0, 2.0]
    assert report().as_dict()["requests"] == []
