"""The library under another binding, as docs/integration.md shows it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from swift_gguf.model import Model
from swift_gguf.native.binding import library
from swift_gguf.native.load import find_library
from swift_gguf.planning.measuring import estimated
from tests.native.conftest import ROOT
from tests.native.test_c_example import with_metadata

Tiny = Callable[..., Path]


def script_of_the_docs(word: str, folder: Path) -> Path:
    """The Python block of the page that holds a word."""
    text = (ROOT / "docs" / "integration.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    path = folder / "app.py"
    path.write_text(block)
    return path


def run(*arguments: object, lib: Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"LLAMA_CPP_LIB_PATH": str(lib)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_llama_cpp_python_drafts_with_it(
    tiny: Tiny, open_model: Callable[..., Model], tmp_path: Path
) -> None:
    script = script_of_the_docs("swift_gguf_speculate(", tmp_path)
    path, prompt = tiny("llama", quant="Q8_0"), "hello " * 12
    loaded = open_model(path)
    # rows are cheap enough for drafts, with any number of threads; flash attention is off here
    costs = replace(estimated(loaded), pass_ms=((1, 9.0), (2, 9.1), (16, 9.9)), untimed=())
    key = re.sub(r"-\d+t", "-{}t-nofa", loaded.machine_key) + "@256"
    values = {
        "version": 1,
        "n_layer": loaded.n_layer,
        "known": [],
        "costs": {key.format(n): costs.as_dict() for n in range(1, 129)},
    }
    profile = {"swift.profile": json.dumps(values)}
    model = with_metadata(path, tmp_path / "model.gguf", profile)
    output = run(script, model, prompt, lib=find_library())
    plain = run("-c", PLAIN, model, prompt, lib=find_library())
    assert output.startswith(plain)
    figures = re.search(r"^(\d+) tokens in (\d+) passes$", output, re.MULTILINE)
    assert figures, output
    assert int(figures[2]) < int(figures[1])  # drafts were accepted


PLAIN = """
import sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=1024, verbose=False)
prompt = llm.tokenize(sys.argv[2].encode())
text = []
for token in llm.generate(prompt, temp=0, reset=True):
    text.append(token)
    if len(text) >= 64 or token == llm.token_eos():
        break
print(llm.detokenize(text).decode(errors="replace"))
"""


def test_the_check_tells_whether_it_fits(tmp_path: Path) -> None:
    script = script_of_the_docs("swift_gguf_struct_size", tmp_path)
    output = run(script, lib=find_library())
    assert "DIFFERS" not in output
    assert output.rstrip().endswith(library().llama_commit)
    assert len(output.splitlines()) == 6
    # the control: a binding with another idea of a struct
    script.write_text(script.read_text().replace("llama_cpp\n\n", f"llama_cpp\n{OTHER_BATCH}\n", 1))
    assert "DIFFERS" in run(script, lib=find_library())


OTHER_BATCH = "class llama_batch(ctypes.Structure): _fields_ = [('n', ctypes.c_int)]\n"
OTHER_BATCH += "llama_cpp.llama_batch = llama_batch"
