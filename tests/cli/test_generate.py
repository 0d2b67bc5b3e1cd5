"""`swift-gguf generate` on a generated model."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swift_gguf.cli.generate_command import _comparison
from tests.cli.conftest import COMMAND, assert_one_line_failure

Cli = Callable[..., subprocess.CompletedProcess[str]]
QUICK = ("-n", 24, "-c", 256, "--temp", 0, "-ngl", 0)
LAYER_SKIP = ("--speculation", "layer-skip", "--search", "off")


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", noop_ffn=(1,))


def test_streams_text_and_shows_figures_apart(
    cli: Cli, model: Path, knowing: Callable[..., Path]
) -> None:
    done = cli("generate", knowing(model, {1}), "-p", "hello", *LAYER_SKIP, *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "tok/s" not in done.stdout
    for figure in ("tok/s", "mean acceptance length", "without FFN 1", "(100%)"):
        assert figure in done.stderr


def test_json(cli: Cli, model: Path, knowing: Callable[..., Path]) -> None:
    done = cli(
        *("generate", knowing(model, {1}), "-p", "hello", "--json"),
        *(*LAYER_SKIP, "--draft-p-min", 0, *QUICK),
    )
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert set(report) == {"text", "tokens", "stop_reason", "seed", "timings", "speculation"}
    timings = report["timings"]
    assert set(timings) == {
        "prompt_n", "prompt_ms", "predicted_n", "predicted_ms", "predicted_per_second",
        "draft_n", "draft_n_accepted",
    }  # fmt: skip
    assert timings["predicted_n"] == len(report["tokens"]) <= 24
    assert report["stop_reason"] in ("length", "eos")
    # FFN 1 adds nothing: every draft token must have been accepted
    assert timings["draft_n"] == timings["draft_n_accepted"] > 0
    speculation = report["speculation"]
    assert speculation["enabled"]
    source = speculation["sources"]["layer-skip"]
    assert sum(source["accepted_length_histogram"]) == source["drafts"]
    assert set(speculation["seconds"]) == {"draft", "verify", "search", "other"}


def test_speculation_does_not_change_the_text(
    cli: Cli, model: Path, knowing: Callable[..., Path]
) -> None:
    """The same tokens with and without, greedy and sampled, and `--compare` says so."""
    knowing(model, {1, 2})
    for sampling in (("--temp", 0), ("--temp", 1.3, "--seed", 11), ("--seed", 4, "--top-k", 3)):
        arguments = ("-p", "tell me", "--json", "-n", 40, "-c", 256, "-ngl", 0, *sampling)
        plain, skipped = (
            json.loads(cli("generate", model, *arguments, *mode).stdout)
            for mode in (("--speculation", "off"), (*LAYER_SKIP, "--draft-p-min", 0))
        )
        assert plain["tokens"] == skipped["tokens"]
        assert plain["speculation"]["why"] == "switched off"
        assert plain["timings"]["draft_n"] == 0 < skipped["timings"]["draft_n"]
    compare = ("-p", "tell me", "--compare", "--speculation", "layer-skip", *QUICK)
    assert "the same text" in cli("generate", model, *compare).stderr
    report = json.loads(cli("generate", model, "--json", *compare).stdout)
    assert report["plain"]["same_tokens"]


def test_a_seed_is_drawn_and_reported(cli: Cli, model: Path) -> None:
    arguments = ("generate", model, "-p", "x", "--json", "-n", 20, "-c", 128, "--temp", 1.5)
    first = json.loads(cli(*arguments).stdout)
    again = json.loads(cli(*arguments, "--seed", first["seed"]).stdout)
    other = json.loads(cli(*arguments).stdout)
    assert again["tokens"] == first["tokens"]
    assert other["seed"] != first["seed"]


def test_where_the_prompt_comes_from(cli: Cli, model: Path, tmp_path: Path) -> None:
    prompt = "Grüße, 漢字\nand a second line"
    (tmp_path / "prompt.txt").write_text(prompt)
    (tmp_path / "marked.txt").write_text(prompt.replace("\n", "\r\n"), encoding="utf-8-sig")
    answers = [
        json.loads(done.stdout)["tokens"]
        for done in (
            cli("generate", model, "--json", "-p", prompt, *QUICK),
            cli("generate", model, "--json", "-f", tmp_path / "prompt.txt", *QUICK),
            cli("generate", model, "--json", "-f", tmp_path / "marked.txt", *QUICK),
            cli("generate", model, "--json", *QUICK, stdin=prompt),
            cli("generate", model, "--json", "-f", "-", *QUICK, stdin=f"\ufeff{prompt}\n"),
        )
    ]
    assert answers[1:] == answers[:1] * 4


def test_template_raw_and_system_prompt(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")

    def prompt_n(*flags: object) -> int:
        done = cli("generate", model, "--json", "-p", "hi", *flags, *QUICK)
        return int(json.loads(done.stdout)["timings"]["prompt_n"])

    raw = prompt_n("--raw")
    assert prompt_n("--chat-template", tmp_path / "mine.jinja") == raw + 1
    assert prompt_n() > raw + 4
    assert prompt_n("-sys", "Be brief.") > prompt_n() + 4


def test_files_may_begin_with_a_byte_order_mark(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8-sig")
    (tmp_path / "yes.gbnf").write_text('root ::= "yes"\n', encoding="utf-8-sig")
    flags = ("--chat-template", tmp_path / "mine.jinja", "--grammar-file", tmp_path / "yes.gbnf")
    done = cli("generate", model, "--json", "-p", "hi", *flags, *QUICK)
    report = json.loads(done.stdout)
    raw = json.loads(cli("generate", model, "--json", "--raw", "-p", "hi!", *QUICK).stdout)
    assert report["timings"]["prompt_n"] == raw["timings"]["prompt_n"]
    assert report["text"] == "yes"
    for flag in ("--chat-template", "--grammar-file", "-f"):
        (tmp_path / "utf16").write_bytes("root".encode("utf-16-le"))
        prompt = [] if flag == "-f" else ["-p", "hi"]
        done = cli("generate", model, *prompt, flag, tmp_path / "utf16", *QUICK)
        assert_one_line_failure(done)
        assert f"{tmp_path}/utf16 is not UTF-8 text" in done.stderr


def test_what_a_template_is_told(cli: Cli, model: Path) -> None:
    template = "{{ enable_thinking | tojson }} {{ reasoning_effort or '-' }} {{ style }}"

    def answer(*flags: object) -> tuple[int, list[int]]:
        """How many tokens the prompt has, and what comes after it."""
        done = cli("generate", model, "--json", *flags, *QUICK)
        report = json.loads(done.stdout)
        return report["timings"]["prompt_n"], report["tokens"]

    def prompt(*flags: object) -> tuple[int, list[int]]:
        return answer("-p", "hi", "--chat-template", template, *flags)

    def told(text: str) -> tuple[int, list[int]]:
        return answer("--raw", "-p", text)

    assert told("a b") != told("a b c d")
    style = '{"style": "very very dry", "enable_thinking": true}'
    assert prompt("--chat-template-kwargs", style) == told("true - very very dry")
    assert prompt("-rea", "off", "--chat-template-kwargs", style) == told("false - very very dry")
    assert prompt("--reasoning", "on", "--reasoning-effort", "high") == told("true high ")
    assert prompt("--reasoning-effort", "none") == told("false - ")


def test_limits(cli: Cli, model: Path) -> None:
    report = json.loads(cli("generate", model, "-p", "x", "--json", "-n", 0, "-c", 128).stdout)
    assert report["tokens"] == []
    done = cli("generate", model, "-p", "x", "--json", "-c", 64, "--grammar", "root ::= [a-z] root")
    report = json.loads(done.stdout)
    assert report["stop_reason"] == "context"
    assert report["text"].isalpha()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "x" * 2000, "-c", 64), "ctx-size"),
        (("-p", "x", "--grammar", "root ::= ["), "grammar"),
        (("-p", "x", "--repeat-penalty", "0"), "above 0"),
        (("-p", "x", "--temp", "nan"), "finite"),
        (("-p", "x", "--chat-template", "{{ nothing.at.all }}"), "chat template"),
        (("-p", "x", "--chat-template", "{% for %}"), "chat template"),
        (("-p", "x", "--chat-template", "missing.jinja"), "neither Jinja text nor a file"),
        (("-p", "x", "--chat-template-kwargs", "{"), "not a JSON object"),
        (("-p", "x", "--chat-template-kwargs", '{"messages": []}'), "'messages' cannot be set"),
        (("-f", "missing.txt"), "missing.txt"),
        (("-f", "/dev/zero"), "/dev/zero cannot be read: it is not a regular file"),
        (("-p", "", "--raw"), "empty"),
    ],
)
def test_bad_input_is_one_line(
    cli: Cli, model: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = cli("generate", model, "-c", 256, *arguments)
    assert_one_line_failure(done)
    assert message in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("nonsense",),
        ("generate", "m", "--top-k", "many"),
        ("generate", "m", "--draft-max", "0"),
        ("generate", "m", "-p", "x", "-f", "y"),
    ],
)
def test_usage_errors_exit_with_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert "Usage: swift-gguf" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(cli: Cli) -> None:
    done = cli("generate", "no-such-model", "-p", "x", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ModelError" in done.stderr


def test_models_without_rollback_run_plainly(cli: Cli, tiny: Callable[..., Path]) -> None:
    for family in ("mamba", "lfm2"):
        report = json.loads(cli("generate", tiny(family), "-p", "x", "--json", *QUICK).stdout)
        assert report["tokens"]
        assert not report["speculation"]["enabled"]
        assert "recurrent" in report["speculation"]["why"]
        done = cli("generate", tiny(family), "-p", "x", "--speculation", "layer-skip", *QUICK)
        assert_one_line_failure(done)
        assert "--speculation off" in done.stderr


def test_a_small_context_holds_a_full_draft(cli: Cli, model: Path) -> None:
    done = cli(
        "generate", model, "-p", "x", "-c", 8, "-n", 30, "--draft-p-min", 0, "--draft-max", 64
    )
    assert done.returncode == 0, done.stderr


def test_standard_input_that_is_no_text(model: Path) -> None:
    command = [*COMMAND, "generate", str(model), *map(str, QUICK)]
    done = subprocess.run(command, input=b"caf\xe9 \xff", capture_output=True)
    assert done.returncode == 1
    assert done.stderr == b"swift-gguf: standard input is not UTF-8 text; save it as UTF-8\n"


def test_a_terminal_that_cannot_show_a_character(cli: Cli, model: Path) -> None:
    done = cli("generate", model, "-p", "x", *QUICK, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_error_message(model: Path) -> None:
    command = " ".join([*COMMAND, "generate", str(model), "-p", "hi", *map(str, QUICK)])
    done = subprocess.run(f"{command} | head -c 1", shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_ctrl_c_ends_the_answer_and_keeps_it(model: Path) -> None:
    """In a real terminal: text is there as it comes, the figures after the interrupt."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "generate", str(model), "-p", "hi", "-c", "40000", "--temp", "0",
         "--grammar", "root ::= [a-z ] root"],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    deadline = time.monotonic() + 60
    while len(seen) < 200 and time.monotonic() < deadline:
        seen += os.read(controller, 1024)
    assert process.poll() is None, seen
    process.send_signal(signal.SIGINT)
    while True:
        try:
            part = os.read(controller, 1024)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        seen += part
    assert process.wait(timeout=20) == 130
    assert b"tok/s" in seen
    assert b"stopped" in seen
    assert b"Traceback" not in seen


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from swift_gguf.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'llama_cpp', 'rich', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "generate" in done.stdout


@pytest.mark.parametrize(("speed", "says_why"), [(105.0, True), (150.0, False)])
def test_compare_says_what_limits_a_small_gain(speed: float, says_why: bool) -> None:
    def answer(tokens_per_second: float) -> Any:
        return SimpleNamespace(
            tokens=[1, 2], stats=SimpleNamespace(tokens_per_second=tokens_per_second)
        )

    speculation: Any = SimpleNamespace(row_share=0.85, options=SimpleNamespace(sampled=False))
    text = "\n".join(_comparison(answer(speed), answer(100.0), speculation))
    assert f"{speed / 100:.2f}x" in text
    assert ("verifying one more token costs 85% of a forward pass" in text) == says_why


def test_a_json_schema(cli: Cli, model: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema), encoding="utf-8")
    for flags in (("-j", json.dumps(schema)), ("-jf", path), ("--json-schema-file", path)):
        done = cli("generate", model, "-p", "x", *flags, "-n", 100, "-c", 256, "-ngl", 0)
        assert json.loads(done.stdout)["a"] in (1, 2), done.stderr
    sampled = ("--temp", 1.5, "-s", 3, "--speculative-sampling")
    done = cli("generate", model, "-p", "x", "-j", json.dumps(schema), *sampled, "-n", 100)
    assert json.loads(done.stdout)["a"] in (1, 2), done.stderr


def test_a_json_schema_that_is_none(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    for flags, why in (
        (("-j", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (("-j", "{"), "not JSON"),
        (("-jf", tmp_path / "bad.json"), "not JSON"),
        (("-jf", tmp_path / "missing.json"), "missing.json"),
    ):
        done = cli("generate", model, "-p", "x", *flags)
        assert_one_line_failure(done)
        assert why in done.stderr
    done = cli("generate", model, "-p", "x", "-j", "{}", "--grammar", 'root ::= "a"')
    assert done.returncode == 2
