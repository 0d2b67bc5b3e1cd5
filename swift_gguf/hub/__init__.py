"""Finds and downloads models: the registry and Hugging Face."""

from swift_gguf.hub.models import cache_dir, registry, resolve

__all__ = ["cache_dir", "registry", "resolve"]
