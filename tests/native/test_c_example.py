"""The C program in native/examples: built against the installed package, it speculates."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from swift_gguf.gguf.sidecar import path_beside
from swift_gguf.learning.profile import Known, Profile, Seen, Store
from swift_gguf.subnetwork import SubNetwork
from tests.native.conftest import ROOT
from tests.prepare.test_sidecar import prepared

EXAMPLES = ROOT / "native" / "examples"
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
Tiny = Callable[..., Path]


def done(*command: object, **options: object) -> str:
    finished = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        **options,  # type: ignore[call-overload]
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return str(finished.stdout)


def config(*flags: str) -> str:
    return done(sys.executable, "-m", "swift_gguf", "config", *flags).strip()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled as `swift-gguf config` says."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler
    out = tmp_path_factory.mktemp("example") / "speculate"
    flags = shlex.split(config("--cflags", "--libs"))
    done(compiler, *WARNINGS, EXAMPLES / "speculate.c", "-o", out, *flags)
    return out


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)


def passes(finished: subprocess.CompletedProcess[str]) -> tuple[int, int]:
    """Tokens, and the passes that they took, of a run whose drafts changed nothing."""
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.strip().endswith("the same text")
    assert finished.stdout.strip()
    figures = re.search(r"(\d+) tokens in (\d+) passes", finished.stderr)
    assert figures, finished.stderr
    return int(figures[1]), int(figures[2])


def profile_of(folder: Path, subnetwork: SubNetwork) -> Path:
    """As `swift-gguf tune` leaves it."""
    store = Store(folder)
    seen = {"1": Seen(agrees=(True,) * 100, confidence=(0.9,) * 100)}
    known = Known(subnetwork=subnetwork, seen=seen)
    profile = Profile(
        fingerprint="0" * 32, model="tiny", n_layer=subnetwork.n_layer, known=(known,)
    )
    assert store.add(profile)
    return store.path(profile.fingerprint)


def where_rows_are_free(program: Path, model: Path, profile: Path, *sidecar: Path) -> Path:
    """The profile, after a run, with the costs of a machine where every draft pays."""
    passes(run(program, model, "hello", 4, 0, profile, *sidecar))
    values = json.loads(profile.read_text())
    (costs,) = values["costs"].values()
    n_layer = values["n_layer"]
    costs["pass_ms"] = [[1, 100.0], [2, 100.5], [16, 107.0]]
    costs["ffn_ms"] = costs["attention_ms"] = [45.0 / n_layer] * n_layer
    costs["narrow_ms"] = costs["narrow_ms"] and [80.0 / n_layer] * n_layer
    profile.write_text(json.dumps(values))
    return profile


NOOP = SubNetwork(n_layer=4, skip_ffn=frozenset({1, 3}))
"""What `tiny("llama", noop_ffn=(1, 3))` does without: drafts cannot miss."""


def test_it_is_short() -> None:
    assert len((EXAMPLES / "speculate.c").read_text().splitlines()) < 150


def test_cmake_finds_the_package(tiny: Tiny, tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    found = f"-Dswift_gguf_DIR={config('--cmake-dir')}"
    done(cmake, "-S", EXAMPLES, "-B", tmp_path, found)
    done(cmake, "--build", tmp_path)
    model = tiny("llama", noop_ffn=(1, 3))
    n_tokens, n_passes = passes(run(tmp_path / "speculate", model, "hello hello hello", 40, 0))
    assert 0 < n_passes <= n_tokens


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """The package as a whole, in a folder with a space in its name."""
    folder = tmp_path / "a folder"
    for part in ("include", "lib"):
        shutil.copytree(Path(config("--lib-dir")).parent / part, folder / part)
    return folder


def test_the_package_may_be_moved(moved: Path, tiny: Tiny, tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    found = f"-Dswift_gguf_DIR={moved / 'lib' / 'cmake' / 'swift_gguf'}"
    done(cmake, "-S", EXAMPLES, "-B", tmp_path / "build", found)
    done(cmake, "--build", tmp_path / "build")
    program = tmp_path / "build" / "speculate"
    passes(run(program, tiny("qwen2"), "hello", 20, 0))
    shutil.rmtree(moved)
    assert run(program, tiny("qwen2"), "hello", 20, 0).returncode == 127  # it was that library


def test_pkg_config_finds_it(tiny: Tiny, tmp_path: Path) -> None:
    pkg_config = shutil.which("pkg-config")
    if pkg_config is None:
        pytest.skip("no pkg-config")
    environment = {"PKG_CONFIG_PATH": config("--pkgconfig-dir")}
    flags = shlex.split(done(pkg_config, "--cflags", "--libs", "swift_gguf", env=environment))
    out = tmp_path / "speculate"
    done(shutil.which("cc") or "cc", EXAMPLES / "speculate.c", "-o", out, *flags)
    passes(run(out, tiny("qwen2"), "hello", 20, 0))


def test_pkg_config_finds_a_moved_package(moved: Path, tiny: Tiny, tmp_path: Path) -> None:
    """With the shell's `eval`, as docs/integration.md says."""
    if shutil.which("pkg-config") is None:
        pytest.skip("no pkg-config")
    program, source = tmp_path / "speculate", shlex.quote(str(EXAMPLES / "speculate.c"))
    build = f'eval cc {source} -o {program} "$(pkg-config --cflags --libs swift_gguf)"'
    pkgconfig = str(moved / "lib" / "pkgconfig")
    done("sh", "-ec", build, env=os.environ | {"PKG_CONFIG_PATH": pkgconfig})
    passes(run(program, tiny("qwen2"), "hello", 20, 0))
    shutil.rmtree(moved)
    assert run(program, tiny("qwen2"), "hello", 20, 0).returncode == 127  # it was that library


def test_a_profiles_sub_network_drafts(program: Path, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama", noop_ffn=(1, 3))
    profile = where_rows_are_free(program, model, profile_of(tmp_path, NOOP))
    before = profile.read_text()
    _, n_passes = passes(run(program, model, "hello", 24, 0, profile))
    # with the same costs, but no sub-network, only lookups draft
    profile.write_text(json.dumps(json.loads(before) | {"known": []}))
    _, n_without = passes(run(program, model, "hello", 24, 0, profile))
    assert n_passes < n_without
    # the control: a sub-network that this model needs
    needed = SubNetwork(n_layer=4, skip_attn=frozenset(range(4)), skip_ffn=frozenset({0, 2}))
    other = where_rows_are_free(program, model, profile_of(tmp_path / "other", needed))
    _, n_more = passes(run(program, model, "hello", 24, 0, other))
    assert n_more > n_passes


@pytest.mark.parametrize("temperature", [0, 0.7, 2])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3moe"])
def test_any_temperature_gives_the_text_of_plain_decoding(
    family: str, temperature: float, program: Path, tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny(family, quant="Q8_0")
    n_layer = 6 if family == "gemma3" else 4
    subnetwork = SubNetwork(n_layer=n_layer, skip_attn=frozenset({1}), narrow_ffn=frozenset())
    profile = where_rows_are_free(program, model, profile_of(tmp_path, subnetwork))
    n_tokens, n_passes = passes(
        run(program, model, "hello hello hello hello", 64, temperature, profile)
    )
    assert temperature > 0 or n_passes < n_tokens


def test_a_profile_inside_the_model_is_read(program: Path, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama", noop_ffn=(1, 3))
    profile = where_rows_are_free(program, model, profile_of(tmp_path / "a", NOOP)).read_text()
    inside = with_metadata(model, tmp_path / "x.gguf", {"swift.profile": profile})
    empty = json.dumps(json.loads(profile) | {"known": []})
    without = with_metadata(model, tmp_path / "y.gguf", {"swift.profile": empty})
    _, n_passes = passes(run(program, inside, "hello", 24, 0, "-"))
    _, n_without = passes(run(program, without, "hello", 24, 0, "-"))
    assert n_passes < n_without


def test_a_sidecar_drafts(program: Path, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama", quant="Q8_0")
    sidecar = prepared(model, path_beside(tmp_path / "x.gguf"))
    narrow = SubNetwork(n_layer=4, narrow_ffn=frozenset(range(4)), draft_head=True)
    profile = where_rows_are_free(program, model, profile_of(tmp_path, narrow), sidecar)
    finished = run(program, model, "hello", 64, 0, profile, sidecar)
    passes(finished)
    assert "layer-skip" in finished.stderr
    refused = run(program, model, "hello", 64, 0, profile)
    assert (refused.returncode, refused.stderr) == (
        1,
        "error: no speculation: it needs the model's sidecar\n",
    )


def with_metadata(model: Path, out: Path, values: dict[str, str]) -> Path:
    """A copy of a GGUF with more text in its metadata."""
    reader = gguf.GGUFReader(model)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    for key, text in values.items():
        writer.add_string(key, text)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


DAMAGED = {
    "empty": "",
    "no JSON": "{",
    "deep": "[" * 200_000,
    "no object": "[1]",
    "another version": {"version": 2},
    "another model": {"n_layer": 5},
    "known is text": {"known": "1"},
    "no layer": {"known": [{"skip_attn": "", "skip_ffn": "4"}]},
    "backwards": {"known": [{"skip_attn": "3-1", "skip_ffn": ""}]},
    "overflow": {"known": [{"skip_attn": "99999999999", "skip_ffn": ""}]},
    "words": {"known": [{"skip_attn": "1;2", "skip_ffn": ""}]},
    "numbers": {"known": [{"skip_attn": 1, "skip_ffn": 2}]},
    "head": {"known": [{"skip_attn": "", "skip_ffn": "", "draft_head": 3}]},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_profile_that_cannot_be_used_is_one_line(
    content: str | dict[str, Any], program: Path, tiny: Tiny, tmp_path: Path
) -> None:
    path = profile_of(tmp_path, NOOP)
    if isinstance(content, dict):
        values = json.loads(path.read_text())
        seen = values["known"][0]["seen"]
        for known in content.get("known", []):
            if isinstance(known, dict):
                known |= {"seen": seen}
        path.write_text(json.dumps(values | content))
    else:
        path.write_text(content)
    failed(run(program, tiny("llama"), "hello", 8, 0, path), "error: no speculation: ")


def test_a_profile_that_does_not_exist_is_made(program: Path, tiny: Tiny, tmp_path: Path) -> None:
    path = Store(tmp_path / "new").path("1" * 32)
    passes(run(program, tiny("llama"), "hello", 8, 0, path))
    profile = Store(tmp_path / "new").load("1" * 32)
    assert profile is not None
    assert profile.recycling
    assert profile.costs


def test_failures_are_one_line(program: Path, tiny: Tiny, tmp_path: Path) -> None:
    failed(run(program, tmp_path / "missing.gguf", "x"), "error: ")
    failed(run(program, tiny("mamba"), "x"), "error: no speculation")
    failed(run(program, tiny("llama"), ""), "error: the prompt")


def failed(finished: subprocess.CompletedProcess[str], words: str) -> None:
    assert finished.returncode == 1, finished.stderr
    assert finished.stderr.startswith(words), finished.stderr
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
