"""What is remembered of a model between runs, and put to use."""

from swift_gguf.learning.learning import Learning, SearchOptions, space_of
from swift_gguf.learning.profile import EMBEDDED, Known, Profile, Seen, Store, embedded, portable

__all__ = [
    "EMBEDDED",
    "Known",
    "Learning",
    "Profile",
    "SearchOptions",
    "Seen",
    "Store",
    "embedded",
    "portable",
    "space_of",
]
