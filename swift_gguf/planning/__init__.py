"""ROOM planning."""

from swift_gguf.planning.planner import Drafts, Planner

__all__ = ["Drafts", "Planner"]
