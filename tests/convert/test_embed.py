"""Keys that are added to a GGUF: read by us, skipped by llama.cpp, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from swift_gguf.convert.embed import embed
from swift_gguf.errors import ConvertError
from swift_gguf.gguf import check as gguf_check
from swift_gguf.gguf.identity import fingerprint
from swift_gguf.learning.learning import Learning, space_of
from swift_gguf.learning.profile import EMBEDDED, Known, Profile, Seen, Store, embedded, portable
from swift_gguf.model.model import Model
from swift_gguf.native.binding import library
from swift_gguf.subnetwork import SubNetwork

SKIPPED = frozenset({1, 2})


def profile_of(n_layer: int) -> Profile:
    seen = Seen(agrees=(True,) * 60 + (False,) * 20, confidence=(0.9,) * 80)
    known = Known(subnetwork=SubNetwork(n_layer=n_layer, skip_ffn=SKIPPED), seen={"window": seen})
    return Profile(fingerprint="1" * 32, model="a test", n_layer=n_layer, known=(known,))


def test_all_else_stays_as_it_is(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, out = tiny("llama", quant="Q4_0"), tmp_path / "out.gguf"
    embed(source, out, {EMBEDDED: "{}"})
    before, after = GGUFReader(source), GGUFReader(out)
    assert after.fields[EMBEDDED].contents() == "{}"
    theirs = {name for name in before.fields if not name.startswith("GGUF.")}
    assert {name for name in after.fields if not name.startswith("GGUF.")} == theirs | {EMBEDDED}
    for name in theirs:
        assert after.fields[name].contents() == before.fields[name].contents(), name
    for a, b in zip(before.tensors, after.tensors, strict=True):
        assert (a.name, a.tensor_type) == (b.name, b.tensor_type)
        assert np.array_equal(a.data, b.data)
    gguf_check.check(out)
    with pytest.raises(ConvertError, match=r"already has the key swift\.profile"):
        embed(out, tmp_path / "again.gguf", {EMBEDDED: "{}"})


def test_llama_cpp_skips_the_keys(
    tiny: Callable[..., Path], tmp_path: Path, open_model: Callable[..., Model]
) -> None:
    """Its own loader, which no patch of ours touches; without a word of warning."""
    out = tmp_path / "out.gguf"
    embed(tiny("llama"), out, {EMBEDDED: portable(profile_of(4))})
    patches = Path(__file__).parents[2] / "native" / "patches"
    assert not any("llama-model-loader" in path.read_text() for path in patches.glob("*.patch"))
    api = library().api
    with library().messages() as messages:
        model = api.llama_model_load_from_file(str(out).encode(), api.llama_model_default_params())
        said = list(messages)
    assert model
    api.llama_model_free(model)
    assert said == []
    rows = []
    for path in (tiny("llama"), out):
        model = open_model(path, sidecar=None)
        model.decode([1, 2, 3, 4])
        rows.append(model.logits(0))
    assert np.array_equal(*rows)


def test_what_came_with_a_model_is_where_a_first_run_begins(
    tiny: Callable[..., Path], tmp_path: Path, open_model: Callable[..., Model]
) -> None:
    plain, out = tiny("llama", n_layer=6), tmp_path / "out.gguf"
    embed(plain, out, {EMBEDDED: portable(profile_of(6))})
    for path, expected in ((plain, frozenset()), (out, SKIPPED)):
        model = open_model(path)
        store = Store(tmp_path / "profiles")
        learning = Learning(model, space_of(model), store=store)
        assert learning.started_from_profile is bool(expected)
        if expected:
            assert learning.best.skip_ffn == expected
            assert learning.best_known is not None
            assert learning.best_known.rate.agreement == pytest.approx(0.75)
            learning.save()
            stored = store.load(fingerprint(path))
            assert stored is not None
            assert stored.known[0].subnetwork.skip_ffn == expected
    # what this machine has learned since counts more than what came with the model
    model = open_model(out)
    other = Known(
        subnetwork=SubNetwork(n_layer=6, skip_attn=frozenset({3})),
        seen={"later": Seen(agrees=(True,) * 80, confidence=(0.9,) * 80)},
    )
    store = Store(tmp_path / "others")
    store.add(Profile(fingerprint=fingerprint(out), model="x", n_layer=6, known=(other,)))
    learning = Learning(model, space_of(model), store=store)
    assert learning.best.skip_attn == {3}
    assert not learning.best.skip_ffn


def test_neither_words_nor_costs_travel() -> None:
    profile = profile_of(4)
    text = portable(Profile(**{**vars(profile), "recycling": ([[1, 2], [3]],), "search_s": 9.0}))
    values = json.loads(text)
    assert values["recycling"] == []
    assert values["costs"] == {}
    assert values["fingerprint"] == "0" * 32
    found = embedded(text, fingerprint="2" * 32)
    assert found is not None
    assert found.known == profile.known
    assert found.fingerprint == "2" * 32


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99}', "x" * (1 << 21), "[" * 9999])
def test_nonsense_inside_a_model_is_no_profile(text: str) -> None:
    assert embedded(text, fingerprint="2" * 32) is None
    assert embedded(None, fingerprint="2" * 32) is None
