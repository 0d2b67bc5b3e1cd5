"""Samplers built on llama.cpp's sampler chains, and speculative sampling."""

from swift_gguf.sampling.sampling import (
    Sampler,
    SamplingOptions,
    SpeculativeSampler,
    draw,
    grammar_sampler,
    llama_seed,
)

__all__ = [
    "Sampler",
    "SamplingOptions",
    "SpeculativeSampler",
    "draw",
    "grammar_sampler",
    "llama_seed",
]
