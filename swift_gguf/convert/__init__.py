"""Converts a Hugging Face checkpoint to GGUF: `swift-gguf convert` and `verify`.

llama.cpp's own converter and quantisation do the work.  This package checks the checkpoint before
hours are spent on it, resumes after an interruption, and writes the final file only when it is
complete.
"""
