"""The library that is loaded: whose it is, what it leaves unchanged, that it leaks nothing."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from swift_gguf.drafting import LayerSkip
from swift_gguf.drafting.policy import Threshold
from swift_gguf.engine import generate
from swift_gguf.errors import NativeLibraryError
from swift_gguf.model import Model, ModelOptions
from swift_gguf.native import abi
from swift_gguf.native import binding as native
from swift_gguf.native.binding import library
from swift_gguf.native.load import find_library
from swift_gguf.sampling.sampling import Sampler, SamplingOptions
from swift_gguf.subnetwork import SubNetwork
from tests.native.conftest import ROOT

CPUINFO = Path("/proc/cpuinfo")

LOAD = "from swift_gguf.native import library; library()"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | environment
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT
    )


def test_versions() -> None:
    pin = (ROOT / "native" / "llama_cpp.pin").read_text()
    assert library().llama_commit in pin
    assert (
        f"#define SWIFT_GGUF_ABI {abi.ABI}\n"
        in (ROOT / "native" / "include" / "swift_gguf.h").read_text()
    )


def test_another_abi_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI", abi.ABI + 1)
    with pytest.raises(ImportError, match=f"has ABI {abi.ABI}.*needs {abi.ABI + 1}.*reinstall"):
        native.Library(find_library())


def test_a_struct_of_another_size_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    longer = type("Longer", (native.Cost,), {"_fields_": [("more", ctypes.c_int64)]})
    monkeypatch.setattr(native, "Cost", longer)
    with pytest.raises(ImportError, match="disagree about swift_gguf_cost"):
        native.Library(find_library())


def test_a_checkout_finds_what_is_installed() -> None:
    """In the checkout's folder Python may find the sources first, which have no library."""
    # what an editable install puts before the path; then the folder shadows the package
    only_the_path = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if isinstance(f, type)]"
    )
    done = run_python(
        f"{only_the_path}; import swift_gguf; print(len(swift_gguf.__path__)); {LOAD}",
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_no_library_is_an_import_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_GGUF_LIB_DIR", str(tmp_path))
    with pytest.raises(NativeLibraryError, match="reinstall"):
        find_library()


@pytest.mark.slow
def test_an_unpatched_library_is_an_import_error(reference_lib: Path) -> None:
    done = run_python(LOAD, SWIFT_GGUF_LIB_DIR=str(reference_lib))
    assert done.returncode == 1
    assert "NativeLibraryError" in done.stderr.splitlines()[-1]
    assert "without swift-gguf's patch" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_llama_cpp_imported_first_with_another_library(reference_lib: Path) -> None:
    done = run_python("import llama_cpp; " + LOAD, LLAMA_CPP_LIB_PATH=str(reference_lib))
    assert "import swift_gguf first" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2moe", "phi3", "mamba"])
def test_unset_is_bit_identical_to_unpatched(
    family: str, reference_lib: Path, tiny: Callable[..., Path]
) -> None:
    from lab.reference import compare_logits

    assert compare_logits(tiny(family, quant="Q4_0"), find_library(), reference_lib) == 0


@pytest.mark.skipif(
    not (CPUINFO.exists() and "amx_int8" in CPUINFO.read_text()), reason="a processor without AMX"
)
def test_amx_is_left_out() -> None:
    """Its layout of weights has none of our kernels, and GCC builds of it crash."""
    assert b"AMX_INT8 = 1" not in library().api.llama_print_system_info()


@pytest.mark.slow
def test_a_real_model_unset_is_bit_identical_to_unpatched(reference_lib: Path) -> None:
    from lab.reference import compare_logits
    from swift_gguf.hub.models import resolve

    assert compare_logits(resolve("smollm2-135m"), find_library(), reference_lib) == 0


def resident_mb() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / 1e6


@pytest.mark.slow
def test_a_thousand_generations_leak_nothing(tiny: Callable[..., Path]) -> None:
    with Model(tiny("llama"), ModelOptions(n_ctx=128, n_gpu_layers=0)) as model:
        subnetwork = SubNetwork(n_layer=model.n_layer, skip_ffn=frozenset([1, 2]))

        def generations(count: int) -> None:
            for i in range(count):
                options = SamplingOptions(seed=i, repeat_penalty=1.1, grammar="root ::= [^x]*")
                with Sampler(model, options) as sampler:
                    drafter = LayerSkip(model, subnetwork, policy=Threshold(0.1))
                    prompt = [5, 6, 7, i % 100 + 5]
                    stream = generate(model, prompt, sampler=sampler, drafter=drafter, max_tokens=8)
                    for n, _ in enumerate(stream):
                        if n == i % 11:
                            break

        generations(100)
        before = resident_mb()
        generations(1000)
        assert resident_mb() - before < 4


@pytest.mark.slow
def test_loading_and_closing_leaks_nothing(tiny: Callable[..., Path]) -> None:
    path = tiny("llama")

    def load(count: int) -> None:
        for _ in range(count):
            with Model(path, ModelOptions(n_ctx=128, n_gpu_layers=0)) as model:
                skipping = SubNetwork(n_layer=model.n_layer, skip_ffn=frozenset([1]))
                model.decode([1, 2, 3], subnetwork=skipping)

    load(20)
    before = resident_mb()
    load(100)
    assert resident_mb() - before < 10
