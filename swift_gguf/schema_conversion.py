"""JSON schemas to llama.cpp's grammars, by llama_cpp's converter; run by `bounded_worker`.

The converter writes repetitions out, and repeats names that hold the whole path of a property, so
two kilobytes of schema describe sixteen megabytes of grammar; and it never comes to the end of a
pattern with a `]` or a `}` that nothing opened.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import util
from pathlib import Path
from types import ModuleType

MAX_LENGTH = 256 * 1024
"""Characters of a grammar."""


def convert(schema: str) -> str:
    """GBNF for the JSON that a schema describes.

    Raises:
        ValueError: it describes too much.
        Exception: whatever the converter trips over.
    """
    gbnf: str = _converter().json_schema_to_gbnf(schema)
    if len(gbnf) > MAX_LENGTH:
        raise ValueError("it describes too much; make it smaller")
    return gbnf


@cache
def _converter() -> ModuleType:
    """The converter alone: to import the package would load llama.cpp."""
    loaded = sys.modules.get("llama_cpp.llama_grammar")
    if loaded is not None:
        return loaded
    package = util.find_spec("llama_cpp")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "llama_grammar.py"
    spec = util.spec_from_file_location("swift_gguf_llama_grammar", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
