"""The experiment on prompts that are read ahead, on a small real model."""

from __future__ import annotations

import pytest

from lab.ahead import _text, measure, render
from swift_gguf.hub.models import resolve
from swift_gguf.model import Model, ModelOptions


@pytest.mark.slow
def test_what_was_read_ahead_is_not_read_again() -> None:
    with Model(resolve("smollm2-135m"), ModelOptions(n_ctx=1024, n_gpu_layers=0)) as model:
        text = _text(model, 150)
        report = measure(model, text, pause_s=3.0, rounds=1, progress=print)
    assert 150 < report.read_n < report.prompt_n < report.read_n + 20
    assert report.same_texts == 1
    assert report.longest_stop_ms > 0
    assert str(report.prompt_n) in render(report)
