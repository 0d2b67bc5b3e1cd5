"""What is learned about a model and kept between runs."""

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
