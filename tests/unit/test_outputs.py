"""What a file that is written later needs is found missing at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift_gguf.errors import SwiftError
from swift_gguf.outputs import require_folder


def test_a_missing_folder_is_found_early(tmp_path: Path) -> None:
    require_folder(None)
    require_folder(tmp_path / "file.json")
    with pytest.raises(SwiftError, match="no folder"):
        require_folder(tmp_path / "nowhere" / "file.json")
