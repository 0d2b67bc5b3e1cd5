"""`scripts/make_synthetic.py` writes models that load and compute like trained ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("type_name", "n_bytes"), [("q4_0", 18), ("q8_0", 34)])
def test_synthetic_model_is_valid_and_balanced(
    tmp_path: Path, type_name: str, n_bytes: int
) -> None:
    path = tmp_path / "synthetic.gguf"
    script = [sys.executable, str(ROOT / "scripts" / "make_synthetic.py"), str(path)]
    subprocess.run([*script, "--shape", "tiny", "--type", type_name], check=True)
    assert [file.name for file in tmp_path.iterdir()] == ["synthetic.gguf"]

    weights = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    query = weights["blk.0.attn_q.weight"]
    assert query.n_bytes == 256 * 256 // 32 * n_bytes
    values = gguf.quants.dequantize(query.data, query.tensor_type)
    assert values.shape == (256, 256)
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(256**-0.5, rel=0.1)
    assert abs(values.mean()) < 0.1 * values.std()
