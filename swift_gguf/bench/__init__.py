"""Measurements: of the mechanism (`mechanism`), and against unpatched llama.cpp (`reference`)."""
