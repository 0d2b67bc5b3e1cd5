"""Reads and checks GGUF files without libllama: headers, identity, sidecars."""
