"""`swift-gguf bench`: compares modes with plain decoding on the prompts of a suite."""
