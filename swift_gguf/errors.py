"""Errors of swift-gguf.

Every message is one line that says what is wrong and what to do.  The command line prints it and
exits with 1.  Programs can catch `SwiftError`, the base class.
"""

from __future__ import annotations


class SwiftError(Exception):
    """Base class of all errors that swift-gguf raises."""


class NativeLibraryError(SwiftError, ImportError):
    """The native library is missing, or was built for another version of this package."""


class ModelError(SwiftError, ValueError):
    """A model reference cannot be resolved, or its file cannot be loaded."""


class DownloadError(ModelError):
    """A download failed, or the file is not the one that was requested."""


class ContextFullError(SwiftError, RuntimeError):
    """A prompt or batch does not fit the context window."""


class DecodeError(SwiftError, RuntimeError):
    """llama.cpp could not evaluate a batch."""


class NotFiniteError(DecodeError):
    """Logits are NaN or infinite: the weights are damaged."""


class SpoiledError(NotFiniteError):
    """A draft pass wrote NaN or infinity to the KV cache, which is therefore cleared."""


class StoppedError(DecodeError):
    """A forward pass was interrupted; the KV cache is as it was before the pass."""


class UnsupportedModelError(SwiftError):
    """The model runs, but does not support the request (rollback, drafting, ...)."""


class SubnetworkError(SwiftError, ValueError):
    """A sub-network names missing layers, or sub-layers that cannot be skipped."""


class StateError(SwiftError):
    """The saved state of a context is damaged, or does not fit this context."""


class SidecarError(SwiftError):
    """A sidecar is damaged, or was made from another model."""


class SamplingError(SwiftError, ValueError):
    """A sampling option has an invalid value."""


class GrammarError(SwiftError, ValueError):
    """A grammar does not parse, or allows no token."""


class SchemaError(GrammarError):
    """A JSON schema is invalid, or it has a constraint that cannot be enforced."""

    def __init__(self, message: str, *, path: tuple[str | int, ...] = ()) -> None:
        """path: keys and indices of the place in the schema."""
        super().__init__(message)
        self.path = path


class SuiteError(SwiftError, ValueError):
    """A file is not a valid suite of prompts."""


class TemplateError(ModelError):
    """A chat template is invalid, rejects the messages, or exceeds its time or memory limit."""


class ConvertError(SwiftError):
    """A checkpoint is incomplete, or cannot be converted or quantised as requested."""
