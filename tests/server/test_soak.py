"""Twenty seconds of the soak; `scripts/soak_server.py` runs it for half an hour."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak_server.py"


@pytest.mark.slow
def test_soak(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    # a young process has not seen its peak yet: the half hour holds it to 2 %
    options = ["--minutes", "0.34", "--clients", "30", "--flat", "0.5", "--json", str(report)]
    command = [sys.executable, str(SCRIPT), str(model), *options, "--", "-t", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["requests"] > 100
    assert found["n_faults"] == 0
    assert found["outcomes"]["stream: answered"] > 0
    assert set(found["statuses"]) <= {"200", "400", "404", "408", "413", "415", "503"}
