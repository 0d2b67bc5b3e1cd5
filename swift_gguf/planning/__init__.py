"""What to draft before each pass: costs, acceptance rates, and the planner that weighs them."""

from swift_gguf.planning.planner import Drafts, Planner

__all__ = ["Drafts", "Planner"]
