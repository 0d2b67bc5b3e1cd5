"""Finds the native library, and makes `llama_cpp` load the same file."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

from swift_gguf.errors import NativeLibraryError

REINSTALL = "reinstall swift-gguf (pip install --force-reinstall swift-gguf, or make)"


def built_folders(name: str) -> list[Path]:
    """The possible paths of a folder of built files.

    An editable install has two roots: the sources, and site-packages with the built files.  In a
    checkout, Python finds the sources first, and they have no built files beside them.
    """
    roots = [Path(root) for root in sys.modules["swift_gguf"].__path__]
    with suppress(PackageNotFoundError):
        roots.append(Path(str(distribution("swift-gguf").locate_file("swift_gguf"))))
    return list(dict.fromkeys(root / name for root in roots))


def _library_folders() -> list[Path]:
    if override := os.environ.get("SWIFT_GGUF_LIB_DIR"):
        return [Path(override)]
    return built_folders("lib")


def find_library() -> Path:
    """The folder of our libllama.

    Raises:
        NativeLibraryError: nothing is built, or SWIFT_GGUF_LIB_DIR has no library.
    """
    tried = _library_folders()
    for folder in tried:
        if any(folder.glob("*llama.*")):
            return folder
    raise NativeLibraryError(
        f"the native library is not in {' or '.join(map(str, tried))}; {REINSTALL}"
    )


def find_llama_server() -> Path:
    """Our build of llama.cpp's server, which stands beside the library.

    Raises:
        NativeLibraryError: it is not built, or nothing is.
    """
    path = find_library().resolve() / "llama-server"
    if not path.exists():
        raise NativeLibraryError(
            f"there is no llama-server in {path.parent}; run make llama-server"
        )
    return path


def import_llama_cpp(folder: Path) -> ModuleType:
    """Imports llama-cpp-python's ctypes binding with the library in this folder.

    Raises:
        NativeLibraryError: the library does not load, or the binding has already loaded another.
    """
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is not None:
        theirs = Path(loaded._base_path)
        if theirs.resolve() != folder.resolve():
            raise NativeLibraryError(
                f"llama_cpp was imported before swift_gguf and loaded {theirs}; "
                "import swift_gguf first, in the same process"
            )
    # llama_cpp reads this once, at its first import
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    except (RuntimeError, OSError, AttributeError, FileNotFoundError) as error:
        raise NativeLibraryError(f"could not load {folder}: {error}; {REINSTALL}") from error
