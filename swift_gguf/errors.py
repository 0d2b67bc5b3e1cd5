"""Errors of swift-gguf.

Every message is one line that names what is wrong and what to do about it.  The command line
prints it and exits with 1; libraries catch `SwiftError` and need not know the subclasses.
"""

from __future__ import annotations


class SwiftError(Exception):
    """Root of everything swift-gguf raises on purpose."""


class NativeLibraryError(SwiftError, ImportError):
    """The native library is missing, foreign, or built for another version of this package."""


class ModelError(SwiftError, ValueError):
    """A model reference cannot be resolved, or its file cannot be loaded."""


class DownloadError(ModelError):
    """A model could not be fetched, or what arrived is not what was asked for."""


class ContextFullError(SwiftError, RuntimeError):
    """A prompt or batch does not fit the context window."""


class DecodeError(SwiftError, RuntimeError):
    """llama.cpp could not evaluate a batch."""


class NotFiniteError(DecodeError):
    """Logits are no numbers: weights are damaged."""


class SpoiledError(NotFiniteError):
    """A draft pass wrote what is not finite; the context is empty now, or will be with its tree."""


class StoppedError(DecodeError):
    """A pass was stopped because something more urgent came up; nothing of it is left."""


class UnsupportedModelError(SwiftError):
    """The model runs, but cannot be used for what was asked (rolled back, drafted with, ...)."""


class SubnetworkError(SwiftError, ValueError):
    """A sub-network names layers the model does not have or sub-layers that cannot be skipped."""


class SidecarError(SwiftError):
    """A sidecar is damaged, or was derived from another model."""


class SamplingError(SwiftError, ValueError):
    """Sampling options that make no sense."""


class GrammarError(SwiftError, ValueError):
    """A grammar does not parse, or leaves nothing to say."""


class SchemaError(GrammarError):
    """A JSON schema is none, or asks for what cannot be held."""

    def __init__(self, message: str, *, path: tuple[str | int, ...] = ()) -> None:
        """path: keys and indices that lead to the place in the schema."""
        super().__init__(message)
        self.path = path


class SuiteError(SwiftError, ValueError):
    """A file of prompts is not one."""


class TemplateError(ModelError):
    """A chat template is none, refuses the messages, or wants more time or memory than it gets."""


class ConvertError(SwiftError):
    """A checkpoint is not whole, or cannot be converted or quantised as asked."""
