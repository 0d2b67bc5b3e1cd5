"""Measurements: of the mechanism, against unpatched llama.cpp (`reference`), of searches
(`search_quality`), and of ways to draft (`drafting`)."""
