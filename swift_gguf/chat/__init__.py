"""Talking with a model in a terminal: what is said, how it is shown, what may be asked for."""
