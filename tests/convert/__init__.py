"""Nothing here runs without what makes and reads checkpoints."""

import pytest

for name in ("sentencepiece", "torch", "transformers"):
    pytest.importorskip(name, reason="the packages of the extra `convert` are not installed")
