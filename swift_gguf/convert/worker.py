"""The process of a step: its name as the argument, the job as JSON on a line of standard input.
Ends when standard input does, so that nothing outlives who started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swift_gguf.errors import ConvertError, SwiftError


def convert(job: dict[str, Any]) -> None:
    """Runs llama.cpp's converter as it is, with the gguf-py beside it: before anything imports
    another.  It trusts code of the checkpoint's; whether that may run, the job says."""
    root = Path(job["converter"])
    sys.path[:0] = [str(root / "gguf-py"), str(root)]
    script = str(root / "convert_hf_to_gguf.py")
    sys.argv = [script, job["folder"], "--outfile", job["out"], "--outtype", job["outtype"]]
    if not job["trust_code"]:
        _trust_no_code()
    if job["name"]:
        sys.argv += ["--model-name", job["name"]]
    runpy.run_path(script, run_name="__main__")


def _trust_no_code() -> None:
    """Has transformers take its own classes of configurations and tokenizers, whatever it is asked
    for; where it has none, that is an error."""
    import transformers
    from transformers import dynamic_module_utils

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConvertError(
            "the checkpoint brings Python code, which could do anything; read it, then pass "
            "--trust-remote-code to run it"
        )

    # what every import of a checkpoint's module comes to, should there be other ways
    dynamic_module_utils.get_class_in_module = refuse
    for auto in (transformers.AutoConfig, transformers.AutoTokenizer):
        auto.from_pretrained = _untrusting(auto.from_pretrained)


def _untrusting(load: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: load(*args, **{**options, "trust_remote_code": False})


def quantize(job: dict[str, Any]) -> None:
    from swift_gguf.convert import imatrix
    from swift_gguf.native.convert import Quantization, quantize_file

    fields = job["quantization"]
    overrides = tuple((pattern, name) for pattern, name in fields.pop("overrides"))
    means = imatrix.read(Path(job["imatrix"])) if job["imatrix"] else None
    quantize_file(
        Path(job["source"]),
        Path(job["out"]),
        Quantization(**fields, overrides=overrides),
        imatrix=means,
        n_threads=job["n_threads"],
    )
    try_out(job)


def try_out(job: dict[str, Any]) -> None:
    """Loads a model and decodes a token, on the CPU: what llama.cpp makes of it ends this process
    at most."""
    from swift_gguf.errors import UnsupportedModelError
    from swift_gguf.model import Model, ModelOptions

    threads = job["n_threads"] or None
    options = ModelOptions(n_ctx=256, n_batch=64, n_threads=threads, n_gpu_layers=0, sidecar=None)
    # encoders, which do not say a text token by token, are models all the same
    with contextlib.suppress(UnsupportedModelError), Model(Path(job["out"]), options) as model:
        model.decode([0])
        model.logits(0)


def peak_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError, TypeError):
        # Linux; what getrusage says there includes the process that this one was forked from
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) << 10  # type: ignore[index]
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _end_with_parent() -> None:
    while os.read(0, 1):  # not through sys.stdin: the interpreter could not end meanwhile
        pass
    os._exit(1)


def main() -> None:
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        {"convert": convert, "quantize": quantize, "try_out": try_out}[sys.argv[1]](job)
        with open(job["out"], "rb") as file:
            os.fsync(file.fileno())
    except (SwiftError, OSError, MemoryError) as error:
        sys.exit(f"swift-gguf: {error}")
    os.write(answers, json.dumps({"peak_bytes": peak_bytes()}).encode() + b"\n")


if __name__ == "__main__":
    main()
