"""GGUF files before libllama sees them: headers, checks, identity, sidecars."""
