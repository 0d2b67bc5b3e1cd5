"""`python -m swift_gguf`."""

from swift_gguf.cli import main

main()
