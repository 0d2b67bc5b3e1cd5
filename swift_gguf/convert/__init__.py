"""From a Hugging Face checkpoint to a GGUF: `swift-gguf convert`, and `verify`.

llama.cpp's own converter and quantisation do the work; here are what they lack: looking at what is
there before hours are spent on it, steps that can be taken up again, and nothing half under the
final name.
"""
