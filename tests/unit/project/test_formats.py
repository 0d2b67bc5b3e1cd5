"""docs/formats.md names what profiles hold, and nothing else (of sidecars:
tests/prepare/test_sidecar.py)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.gguf import header
from swift_gguf.gguf.identity import fingerprint, profile_key, weights_digest
from swift_gguf.learning.profile import Known, Profile, Seen, Store, portable
from swift_gguf.planning.cost import PARTS, Costs
from swift_gguf.subnetwork import SubNetwork
from tests.fixtures.formats import named
from tests.fixtures.tiny_gguf import write_tiny

COSTS = Costs(
    pass_ms=((1, 10.0), (2, 12.0)),
    attention_ms=(0.5, 0.5),
    ffn_ms=(1.0, 1.0),
    kv_ms=(0.001, 0.001),
    head_ms=1.5,
    n_kv=64,
)


@pytest.fixture
def profile() -> Profile:
    return Profile(
        fingerprint="0123456789abcdef" * 2,
        model="m.gguf",
        n_layer=2,
        known=(
            Known(
                subnetwork=SubNetwork(n_layer=2, skip_attn=frozenset({1})),
                seen={"window": Seen((True, False), (0.5, 0.25))},
            ),
        ),
        costs={"cpu-2t@256": COSTS.as_dict()},
        recycling=([[1, 2], [3], [0.5]],),
    )


@pytest.mark.parametrize("heading", ["The object", "known", "costs"])
def test_the_fields_of_a_profile(heading: str, profile: Profile, tmp_path: Path) -> None:
    Store(tmp_path).add(profile)
    written: dict[str, Any] = json.loads((tmp_path / f"{profile.fingerprint}.json").read_text())
    fields = set(written)
    if heading == "known":
        (item,) = written["known"]
        fields = set(item) | set(item["seen"]["window"])
    if heading == "costs":
        fields = set(written["costs"]["cpu-2t@256"])
    assert named(heading) == fields


def test_the_parts_of_a_measurement() -> None:
    assert named("costs", row="untimed") == {"untimed", *PARTS}


def test_a_profile_inside_a_gguf_says_nothing_of_its_origin(profile: Profile) -> None:
    written = json.loads(portable(profile))
    assert set(written) == named("The object")
    assert written["fingerprint"] == "0" * 32
    assert not any(written[field] for field in ("costs", "recycling", "search_s", "evaluations"))


def test_fingerprints_as_the_document_says(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model.gguf", "llama", n_layer=2)
    content = path.read_bytes()
    size = len(content)
    table = content[: header.read(path).length]
    print_ = hashlib.sha256(table + size.to_bytes(8, "little")).hexdigest()[:32]
    pieces = [(size - 4096) * i // 255 for i in range(256)]
    digest = hashlib.sha256(b"".join(content[at : at + 4096] for at in pieces)).hexdigest()[:32]
    assert fingerprint(path) == print_
    assert weights_digest(path) == digest
    joined = hashlib.sha256(f"{print_}{print_}{digest}".encode()).hexdigest()[:32]
    assert profile_key(path, path) == joined
