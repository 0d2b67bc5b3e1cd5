"""The process of a step.

The argument is the step's name; the job is a line of JSON on standard input.  The process exits
when standard input closes, so it never outlives its parent.
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
    """Runs llama.cpp's unchanged converter with the gguf-py beside it.

    Must run before anything imports another gguf-py.  The converter itself trusts the checkpoint's
    Python code; unless the job allows it, this function prevents that such code runs.
    """
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
    """Makes transformers use only its own classes of configurations and tokenizers.

    A checkpoint that needs its own class fails.
    """
    import transformers
    from transformers import dynamic_module_utils

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConvertError(
            "the checkpoint needs its own Python code, which could do anything; read it, then pass "
            "--trust-remote-code to run it"
        )

    # every import of a checkpoint's module ends here, also those that the lines below miss
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
    """Loads the model and decodes a token on the CPU.

    If llama.cpp aborts, only this process ends.
    """
    from swift_gguf.errors import UnsupportedModelError
    from swift_gguf.model import Model, ModelOptions

    threads = job["n_threads"] or None
    options = ModelOptions(n_ctx=256, n_batch=64, n_threads=threads, n_gpu_layers=0, sidecar=None)
    # an encoder cannot generate text, but it is a valid model
    with contextlib.suppress(UnsupportedModelError), Model(Path(job["out"]), options) as model:
        model.decode([0])
        model.logits(0)


def peak_bytes() -> int:
    """Peak memory of this process; 0 if the system does not report it."""
    with contextlib.suppress(OSError, TypeError):
        # Linux: getrusage would include the memory of the parent before the exec
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) << 10  # type: ignore[index]
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would keep the interpreter from exiting
        pass
    os._exit(1)


def main() -> None:
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answers = os.dup(1)
    os.dup2(2, 1)  # keep the output of libraries out of the answer
    try:
        {"convert": convert, "quantize": quantize, "try_out": try_out}[sys.argv[1]](job)
        with open(job["out"], "rb") as file:
            os.fsync(file.fileno())
    except (SwiftError, OSError, MemoryError) as error:
        sys.exit(f"swift-gguf: {error}")
    os.write(answers, json.dumps({"peak_bytes": peak_bytes()}).encode() + b"\n")


if __name__ == "__main__":
    main()
