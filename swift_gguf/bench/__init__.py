"""`swift-gguf bench`: modes on the prompts of a suite, in turns, against plain decoding."""
