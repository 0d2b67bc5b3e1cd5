"""Models by name or address: the registry, Hugging Face, downloads."""

from swift_gguf.hub.models import cache_dir, registry, resolve

__all__ = ["cache_dir", "registry", "resolve"]
