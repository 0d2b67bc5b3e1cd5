"""`swift-gguf convert` as a person meets it: written, refused, killed and taken up again."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
import transformers

from swift_gguf.cli.convert_command import _amount
from swift_gguf.convert import checkpoint as checkpoints
from swift_gguf.convert import plan
from swift_gguf.convert.run import Conversion, ConvertOptions
from swift_gguf.errors import ConvertError
from swift_gguf.gguf import check as gguf_check
from swift_gguf.gguf import header as gguf_header
from swift_gguf.gguf.sidecar import path_beside
from swift_gguf.learning.profile import EMBEDDED
from swift_gguf.native.convert import Quantization
from tests.cli.conftest import COMMAND, assert_one_line_failure, cli  # noqa: F401
from tests.convert.conftest import convert
from tests.hub.test_models import Hub, hub, serve  # noqa: F401

pytestmark = pytest.mark.slow

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of the test's own, in several files."""
    return Path(
        shutil.copytree(checkpoint("llama-spm", shard_bytes=2_000_000), tmp_path / "checkpoint")
    )


def left(out: Path) -> list[str]:
    """What lies beside a model."""
    return sorted(path.name for path in out.parent.iterdir() if path.name != "checkpoint")


def test_a_checkpoint_becomes_a_model_in_one_command(
    cli: Cli,  # noqa: F811
    folder: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "model.gguf"
    done = cli("convert", folder, "-o", out, "--quantize", "q4_k_m", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bytes"] == out.stat().st_size
    assert report["architecture"] == "LlamaForCausalLM"
    assert 0 < report["peak_bytes"] < 1.3 * report["largest_part_bytes"] + 2e9
    assert report["peak_bytes"] > 10 * report["bytes"], "importing torch takes more"
    assert done.stderr.splitlines()[1:3] == ["converting", "quantizing"]
    assert left(out) == ["model.gguf"]
    header = gguf_header.read(out)
    assert header.metadata["general.file_type"] == 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M
    answer = cli("generate", out, "--raw", "-p", "fox", "-n", "8", "--temp", "0", "--json")
    assert len(json.loads(answer.stdout)["tokens"]) >= 1, answer.stderr
    again = cli("convert", folder, "-o", out, "--quantize", "Q8_0")
    assert_one_line_failure(again)
    assert "--force" in again.stderr
    forced = cli("convert", folder, "-o", out, "--outtype", "bf16", "--force")
    assert forced.returncode == 0, forced.stderr
    assert gguf_header.read(out).metadata["general.file_type"] == 32  # LLAMA_FTYPE_MOSTLY_BF16


def test_memory_goes_by_the_largest_file_not_by_the_model(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    shard = 32_000_000
    size = {"n_embd": 1024, "n_layer": 8, "shard_bytes": shard, "dtype": torch.bfloat16}
    peaks = []
    for options in ({}, size):
        found = checkpoints.read(checkpoint("llama-spm", **options))
        wanted = ConvertOptions(quantization=Quantization(name="Q8_0"))
        with Conversion(found, tmp_path / "model.gguf", wanted) as conversion:
            conversion.run()
        peaks.append(conversion.peak_bytes)
    assert found.largest_part < 1.1 * shard
    assert found.n_bytes > 4 * shard
    assert 0 < peaks[1] - peaks[0] < 1.3 * shard + 20e6


def test_all_of_it_at_once_is_ready_to_use(
    cli: Cli,  # noqa: F811
    folder: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "model.gguf"
    profiles = {"SWIFT_GGUF_PROFILES": str(tmp_path / "profiles")}
    asked = ["--quantize", "IQ4_XS", "--imatrix", "auto", "--keep-intermediate"]
    asked += ["--prepare", "--tune", "--minutes", "0.05", "--embed-profile"]
    asked += ["--calibration-tokens", "300", "--outtype", "f16"]
    done = cli("convert", folder, "-o", out, *asked, **profiles)
    assert done.returncode == 0, done.stderr
    kept = tmp_path / "model.f16.gguf"
    assert {out.name, kept.name, path_beside(out).name} <= set(left(out))
    assert not any("convert" in name for name in left(out))
    metadata = gguf_header.read(out).metadata
    assert json.loads(metadata[EMBEDDED])["known"]
    info = cli("info", out, "--json", **profiles)
    assert info.returncode == 0, info.stderr
    answer = cli(
        "generate", out, "--raw", "-p", "fox", "-n", "16", "--temp", "0", "--json",
        "--speculation", "layer-skip", **profiles,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert "draft weights" not in answer.stderr, "the sidecar was refused"
    assert json.loads(answer.stdout)["timings"]["draft_n"] > 0


def _under_another_name(folder: Path) -> None:
    last = sorted(folder.glob("model-*.safetensors"))[-1]
    last.rename(folder / "mtp.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(last.name, "mtp.safetensors"))


def _left_over(folder: Path) -> None:
    """Beside the index, of another version and in another form."""
    part = min(folder.glob("model-*.safetensors"))
    for name in ("model.safetensors", "consolidated.safetensors"):
        shutil.copy(part, folder / name)


def _marked(folder: Path) -> None:
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def test_the_weights_are_those_of_the_index(folder: Path, tmp_path: Path) -> None:
    """Whatever its files are called, what lies beside them, and how they begin."""
    expected = convert(folder, tmp_path / "expected.gguf").read_bytes()
    for change in (_under_another_name, _left_over, _marked):
        changed = tmp_path / change.__name__ / folder.name  # which gives the model its name
        shutil.copytree(folder, changed)
        change(changed)
        assert convert(changed, tmp_path / "model.gguf").read_bytes() == expected, change


# -- written, but no model that runs ---------------------------------------------------------------


def odd_olmoe(folder: Path) -> None:
    """Fewer KV heads: transformers norms keys as they are, llama.cpp as wide as queries."""
    config = transformers.OlmoeConfig(**SMALL, num_key_value_heads=2, num_experts=4)
    transformers.OlmoeForCausalLM(config).save_pretrained(folder)


def granite_without_attention(folder: Path) -> None:
    """A hybrid of which no layer attends: llama.cpp aborts at the first token."""
    config = transformers.GraniteMoeHybridConfig(
        **SMALL, layer_types=["mamba", "mamba"], mamba_n_heads=4, mamba_d_head=32,
        mamba_d_state=16, mamba_expand=2, shared_intermediate_size=64, num_local_experts=0,
    )  # fmt: skip
    transformers.GraniteMoeHybridForCausalLM(config).save_pretrained(folder)


SMALL = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("make", [odd_olmoe, granite_without_attention])
@pytest.mark.parametrize("flags", [(), ("--quantize", "Q8_0", "--imatrix", "auto")], ids=str)
def test_only_a_model_that_runs_was_written(
    cli: Cli,  # noqa: F811
    tokenizers: Callable[[str], Path],
    tmp_path: Path,
    make: Callable[[Path], None],
    flags: tuple[str, ...],
) -> None:
    folder = tmp_path / "checkpoint"
    make(folder)
    for path in tokenizers("bpe").iterdir():
        if path.name != "vocab_size.json":
            shutil.copy(path, folder)
    out = tmp_path / "model.gguf"
    done = cli("convert", folder, "-o", out, *flags)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"llama.cpp cannot run the converted {folder}: " in last, last
    assert "use the original one instead" in last
    assert "Traceback" not in done.stderr
    assert "wrote" not in done.stdout
    assert left(out) == []


def test_keys_that_transformers_5_renames_are_named(
    cli: Cli,  # noqa: F811
    tokenizers: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoint"
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL)).save_pretrained(folder)
    for path in tokenizers("bpe").iterdir():
        if path.name != "vocab_size.json":
            shutil.copy(path, folder)
    done = cli("convert", folder, "-o", tmp_path / "model.gguf")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("swift-gguf: its config.json lacks 'rotary_pct'; transformers 5 "), last
    assert left(tmp_path / "model.gguf") == []


def test_a_dry_run_writes_nothing(
    cli: Cli,  # noqa: F811
    folder: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "model.gguf"
    shown = cli("convert", folder, "-o", out, "--quantize", "Q8_0", "--prepare", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "LlamaForCausalLM" in shown.stdout
    assert shown.stdout.rstrip().endswith("enough")
    values = json.loads(
        cli("convert", folder, "-o", out, "--quantize", "Q8_0", "--dry-run", "--json").stdout
    )
    assert left(out) == []
    real = cli("convert", folder, "-o", out, "--quantize", "Q8_0")
    assert real.returncode == 0, real.stderr
    expected = values["model_bytes"] - plan.METADATA_BYTES
    assert out.stat().st_size == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantize", "Q9"], "there is no type 'Q9'; there are F32"),
        (["--quantize", "IQ1_S"], "--imatrix auto"),
        (["--quantize", "Q4_0", "--tensor-type", "ffn=Q9"], "no type 'Q9' of tensors"),
        (["--quantize", "Q4_0", "--imatrix", "/nowhere"], "/nowhere cannot be read"),
        (["-o", "/nowhere/model.gguf"], "no such folder"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(
    cli: Cli,  # noqa: F811
    folder: Path,
    tmp_path: Path,
    arguments: list[str],
    words: str,
) -> None:
    out = tmp_path / "model.gguf"
    done = cli("convert", folder, *([] if "-o" in arguments else ["-o", out]), *arguments)
    assert_one_line_failure(done)
    assert words in done.stderr
    assert left(out) == []


def _cut(folder: Path) -> None:
    part = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(part, part.stat().st_size - 1000)


def _lose(pattern: str) -> Callable[[Path], None]:
    return lambda folder: sorted(folder.glob(pattern))[0].unlink()


def _unknown(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["NeverHeardOfForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))


def _strange_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"no protobuf")


def _strange_tensor(folder: Path) -> None:
    """A tensor that no model of the kind has: only the converter can know."""
    part = sorted(folder.glob("*.safetensors"))[0]
    data = part.read_bytes()
    part.write_bytes(data.replace(b"self_attn.q_proj", b"self_attn.x_proj"))
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("self_attn.q_proj", "self_attn.x_proj"))
    for other in sorted(folder.glob("*.safetensors"))[1:]:
        other.write_bytes(other.read_bytes().replace(b"self_attn.q_proj", b"self_attn.x_proj"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, "cut short"),
        (_lose("*.safetensors"), "lacks 1 of"),
        (_lose("tokenizer.model"), "has no tokenizer"),
        (_unknown, "it knows"),
        (_strange_tokenizer, "converter failed"),
        (_strange_tensor, "Can not map tensor"),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(
    cli: Cli,  # noqa: F811
    folder: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    words: str,
) -> None:
    damage(folder)
    out = tmp_path / "model.gguf"
    done = cli("convert", folder, "-o", out, "--quantize", "Q8_0")
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[-1].startswith("swift-gguf: ")
    assert words in lines[-1]
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_a_repository_of_the_hub_is_fetched_and_converted(
    cli: Cli,  # noqa: F811
    folder: Path,
    tmp_path: Path,
    hub: Hub,  # noqa: F811
) -> None:
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    asked = ["convert", "hf:owner/repo", "-o", tmp_path / "model.gguf", "--quantize", "Q8_0"]
    where = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    shown = cli(*asked, "--dry-run", HF_HOME=str(tmp_path / "looked"), **where)
    assert shown.returncode == 0, shown.stderr
    assert "LlamaForCausalLM, about " in shown.stdout
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]
    done = cli(*asked, HF_HOME=str(tmp_path / "home"), **where)
    assert done.returncode == 0, done.stderr
    gguf_check.check(tmp_path / "model.gguf")


@pytest.mark.parametrize("trusts", [False, True])
def test_code_of_the_checkpoint_runs_only_if_it_is_trusted(
    cli: Cli,  # noqa: F811
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    trusts: bool,
) -> None:
    """A configuration that is a program, of an architecture whose tokenizer the converter loads
    with trust in all that the folder brings."""
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["DreamModel"]
    config["auto_map"] = {"AutoConfig": "configuration_x.X"}
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (folder / "configuration_x.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig\n"
        "class X(LlamaConfig): pass\n"
    )
    done = cli(
        "convert", folder, "-o", tmp_path / "model.gguf",
        *(["--trust-remote-code"] if trusts else []), HF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    gguf_check.check(tmp_path / "model.gguf")
    assert marker.exists() is trusts


def test_without_torch_there_is_one_line_with_the_command(folder: Path, tmp_path: Path) -> None:
    hide = tmp_path / "hide.py"
    hide.write_text(
        "import importlib.util as u, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        f"sys.argv[1:] = ['convert', {str(folder)!r}]\n"
        "from swift_gguf.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, str(hide)], capture_output=True, text=True)
    assert_one_line_failure(done)
    assert "converting needs torch; install them: pip install 'swift-gguf[convert]'" in done.stderr


# -- ended in the middle ---------------------------------------------------------------------------

N_KILLS = 20


def command(folder: Path, out: Path) -> list[str]:
    return [*COMMAND, "convert", str(folder), "-o", str(out), "--quantize", "Q4_K_M"]


def test_killed_at_any_moment_it_leaves_nothing_broken(folder: Path, tmp_path: Path) -> None:
    """Nothing under the final name but the whole model, nothing that a later run stumbles over,
    and no process that goes on by itself."""
    reference = tmp_path / "reference.gguf"
    start = time.monotonic()
    subprocess.run(command(folder, reference), check=True, capture_output=True)
    seconds = time.monotonic() - start
    whole = reference.read_bytes()
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(killed, folder, tmp_path / f"{seed}.gguf", seed, seconds, whole)
            for seed in range(N_KILLS // 4)
        ]
        n_killed = sum(run.result() for run in runs)
    assert n_killed >= N_KILLS // 2, "too few were killed before they ended"
    wait_for_orphans()


def killed(folder: Path, out: Path, seed: int, seconds: float, whole: bytes) -> int:
    """Begins, is killed and goes on some times, and is left to end; how often was it killed?"""
    rng, n_killed = random.Random(seed), 0
    for number in range(4):
        was_whole = out.exists()
        child = subprocess.Popen(
            [*command(folder, out), "--force"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # late moments are those of writing and renaming
        time.sleep(seconds * rng.uniform(0.2, 1.2))
        child.send_signal(signal.SIGKILL)
        n_killed += child.wait() != 0
        assert out.exists() or not was_whole, f"kill {number}: a model that was whole is gone"
        assert not out.exists() or out.read_bytes() == whole, f"kill {number}: half a model"
    subprocess.run([*command(folder, out), "--force"], check=True, capture_output=True)
    assert out.read_bytes() == whole
    assert not out.with_name(f"{out.name}.convert").exists()
    return n_killed


def wait_for_orphans() -> None:
    """Steps end with whoever started them."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        steps = [line for line in lines if "swift_gguf.convert.worker" in line]
        if not steps:
            return
        time.sleep(0.1)
    raise AssertionError(f"still running after 20 s: {steps}")


def test_an_interrupt_ends_it_at_once_and_the_next_run_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.gguf"
    work = tmp_path / "model.gguf.convert"
    child = subprocess.Popen(
        command(folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(work.glob("intermediate-*.gguf")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, said = child.communicate(timeout=60)
    assert time.monotonic() - start < 5
    assert child.returncode == 130, said
    assert "Traceback" not in said
    assert not out.exists()
    again = subprocess.run(command(folder, out), capture_output=True, text=True, check=True)
    assert "converting" not in again.stderr.splitlines(), "it began anew"
    assert "quantizing" in again.stderr.splitlines()
    gguf_check.check(out)


def test_two_at_once_do_not_mix(folder: Path, tmp_path: Path) -> None:
    found, out = checkpoints.read(folder), tmp_path / "model.gguf"
    with (
        Conversion(found, out, ConvertOptions()),
        pytest.raises(ConvertError, match="another process is converting"),
        Conversion(found, out, ConvertOptions()),
    ):
        pass
    assert left(out) == []


def test_other_options_begin_where_they_differ(folder: Path, tmp_path: Path) -> None:
    found, out = checkpoints.read(folder), tmp_path / "model.gguf"
    steps: list[str] = []

    def report(what: str, done: int, total: int, unit: str, /) -> None:
        if steps[-1:] != [what]:
            steps.append(what)

    for name, expected in (("Q8_0", ["converting", "quantizing"]), ("Q4_0", ["quantizing"])):
        steps.clear()
        with Conversion(found, out, ConvertOptions(quantization=Quantization(name=name))) as run:
            run.run(report)
        assert steps == expected, name
    assert len(list((tmp_path / "model.gguf.convert").glob("quantized-*.gguf"))) == 1
    os.utime(folder / "config.json", (1, 1))  # another checkpoint, for all one knows
    steps.clear()
    with Conversion(checkpoints.read(folder), out, ConvertOptions()) as run:
        run.run(report)
        run.finish({})
        run.forget()
    assert steps == ["converting"]
    assert left(out) == ["model.gguf"]


def test_what_else_is_wanted_tells_whether_it_is_done(folder: Path, tmp_path: Path) -> None:
    """Ended in what comes after the model: the next run goes on there, if it wants the same."""
    found, out = checkpoints.read(folder), tmp_path / "model.gguf"
    q8_0 = Quantization(name="Q8_0")
    with Conversion(found, out, ConvertOptions(quantization=q8_0, prepares=True)) as run:
        run.run()
        run.finish({})
    for same in (True, False):
        options = ConvertOptions(quantization=q8_0, prepares=same)
        assert Conversion(found, out, options).is_done
    for other in (
        ConvertOptions(quantization=q8_0, embeds=True),
        ConvertOptions(quantization=q8_0, keep_intermediate=True),
    ):
        assert not Conversion(found, out, other).is_done


def test_what_is_kept_replaces_nothing_unasked(
    cli: Cli,  # noqa: F811
    folder: Path,
    tmp_path: Path,
) -> None:
    kept = tmp_path / "model.f16.gguf"
    kept.write_text("mine")
    asked = ["convert", folder, "-o", tmp_path / "model.gguf", "--quantize", "Q8_0"]
    done = cli(*asked, "--keep-intermediate")
    assert_one_line_failure(done)
    assert f"{kept} exists; give --force" in done.stderr
    assert left(kept) == [kept.name]
    assert kept.read_text() == "mine"
    assert cli(*asked).returncode == 0
    assert kept.read_text() == "mine"


# -- no room ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Six megabytes."""
    mount = tmp_path / "disk"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mount)]
    if subprocess.run(["mount", *options], capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_is_too_small_is_noticed_before(
    cli: Cli,  # noqa: F811
    folder: Path,
    small_disk: Path,
) -> None:
    out = small_disk / "model.gguf"
    done = cli("convert", folder, "-o", out, "--quantize", "Q8_0")
    assert_one_line_failure(done)
    assert "are free; free some space" in done.stderr
    assert list(small_disk.iterdir()) == []
    shown = cli("convert", folder, "-o", out, "--quantize", "Q8_0", "--dry-run")
    assert shown.returncode == 1
    assert "not enough" in shown.stdout


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_a_disk_that_fills_up_meanwhile_costs_one_line(
    folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, outtype: str
) -> None:
    """The intermediate does not fit, or fits and the model beside it does not."""
    monkeypatch.setattr(plan.Plan, "require_space", lambda self: None)  # as if there was room then
    out = small_disk / "model.gguf"
    options = ConvertOptions(quantization=Quantization(name="F32"), outtype=outtype)
    with (
        pytest.raises(ConvertError, match="the disk is full: free some space") as caught,
        Conversion(checkpoints.read(folder), out, options) as conversion,
    ):
        conversion.run()
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(small_disk.rglob("*.part")), "half a file was left on a full disk"


def test_a_disk_that_is_full_in_the_end_costs_one_line(
    folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model fits, its copy with keys does not."""
    out = small_disk / "model.gguf"
    options = ConvertOptions(outtype="f16", embeds=True)
    whole = plan.Plan(intermediate=4, model=4, sidecar=0, folder=small_disk)
    assert dataclasses.replace(whole, copies=True).needed == whole.needed + 4
    monkeypatch.setattr(plan.Plan, "require_space", lambda self: None)
    with Conversion(checkpoints.read(folder), out, options) as conversion:
        conversion.run()
        with pytest.raises(ConvertError, match="the disk is full: free some space"):
            conversion.finish({EMBEDDED: "{}"})
    assert not out.exists()
    assert not [path for path in small_disk.rglob("*") if path.match("whole*")]
    with Conversion(checkpoints.read(folder), out, options) as conversion:
        conversion.run(lambda *_: pytest.fail("it began anew"))
        conversion.finish({})  # nothing to add: no copy
    gguf_check.check(out)


def test_what_a_killed_run_left_is_no_reason_to_refuse(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, usage = tmp_path / "model.gguf", shutil.disk_usage(tmp_path)
    half = tmp_path / "model.gguf.convert" / "intermediate-0.part"
    half.parent.mkdir()
    half.write_bytes(b"half")
    free = usage.free
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage._replace(free=0 if half.exists() else free)
    )
    with Conversion(checkpoints.read(folder), out, ConvertOptions()):
        assert not half.exists()
    free = 0
    for _ in range(2):  # refused, and nobody's: neither folder nor lock stay
        with (
            pytest.raises(ConvertError, match="are free; free some space"),
            Conversion(checkpoints.read(folder), out, ConvertOptions()),
        ):
            pass
        assert left(out) == []


def test_amounts_are_readable() -> None:
    assert _amount(1_500_000, 250_000_000, "bytes") == "1.5 MB of 250 MB"
    assert _amount(3, 12, "layers") == "3 of 12 layers"
