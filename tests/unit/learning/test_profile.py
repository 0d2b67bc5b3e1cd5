"""Profiles: what two processes learn adds up, and no file or crash is in anybody's way."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swift_gguf.errors import ModelError
from swift_gguf.gguf import header as gguf_header
from swift_gguf.gguf.identity import fingerprint
from swift_gguf.learning import profile as profile_module
from swift_gguf.learning.profile import MAX_KNOWN, MAX_SEEN, Known, Profile, Seen, Store
from swift_gguf.planning.cost import Costs
from swift_gguf.search.objective import Outcome
from swift_gguf.subnetwork import SubNetwork
from tests.fixtures.tiny_gguf import write_tiny

PRINT = "0123456789abcdef" * 2
N_LAYER = 10
COSTS = Costs(
    pass_ms=((1, 10.0), (4, 20.5)),
    attention_ms=(0.5,) * N_LAYER,
    ffn_ms=(0.25,) * N_LAYER,
    kv_ms=(0.001,) * N_LAYER,
    head_ms=1.5,
    n_kv=64,
).as_dict()


def seen(agrees: str, confidence: float = 0.5) -> Seen:
    return Seen(tuple(bit == "1" for bit in agrees), (confidence,) * len(agrees))


def known(ffn: int, **windows: str) -> Known:
    """`known(3, a="011")`: in window a, the draft without FFN 3 was wrong, right and right."""
    return Known(
        subnetwork=SubNetwork(n_layer=N_LAYER, skip_ffn=frozenset({ffn})),
        seen={key: seen(agrees) for key, agrees in (windows or {"w": "01"}).items()},
    )


def learned(*items: Known, **values: Any) -> Profile:
    return replace(
        Profile(fingerprint=PRINT, model="m.gguf", n_layer=N_LAYER, known=items), **values
    )


FULL = learned(
    replace(
        known(1, a="0111", b="1"),
        subnetwork=SubNetwork(
            n_layer=N_LAYER, skip_attn=frozenset({3, 5, 6, 7, 8, 9}), skip_ffn=frozenset({4})
        ),
    ),
    known(2),
    costs={"cpu-2t@4096": COSTS},
    search_s=1.5,
    evaluations=7,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "profiles")


def path_of(store: Store) -> Path:
    return store.folder / f"{PRINT}.json"


def names(store: Store) -> set[str]:
    """What lies in the folder besides locks."""
    return {path.name for path in store.folder.iterdir() if path.suffix != ".lock"}


def change(store: Store, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edits the file by hand."""
    values = json.loads(path_of(store).read_text())
    edit(values)
    path_of(store).write_text(json.dumps(values))


# -- the fingerprint -------------------------------------------------------------------------------


def test_a_fingerprint_is_that_of_the_header(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.gguf", "llama")
    own = fingerprint(path)
    assert len(own) == 32
    content = path.read_bytes()
    (tmp_path / "copy.gguf").write_bytes(content)
    (tmp_path / "weights.gguf").write_bytes(content[:-4] + b"\1\2\3\4")
    (tmp_path / "longer.gguf").write_bytes(content + bytes(32))
    assert fingerprint(tmp_path / "copy.gguf") == own
    assert fingerprint(tmp_path / "weights.gguf") == own
    assert fingerprint(tmp_path / "longer.gguf") != own
    others = [write_tiny(tmp_path / f"{name}.gguf", name) for name in ("qwen2", "gemma3")]
    others.append(write_tiny(tmp_path / "q8.gguf", "llama", quant="Q8_0"))
    assert len({own, *(fingerprint(other) for other in others)}) == 4


def test_the_header_counts_to_its_end(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.gguf", "llama")
    own = fingerprint(path)
    content = bytearray(path.read_bytes())
    end = gguf_header.read(path).length
    f32, i32 = (number.to_bytes(4, "little") for number in (0, 26))
    assert content[end - 12 : end - 8] == f32  # the last tensor's type, before its offset
    content[end - 12 : end - 8] = i32
    path.write_bytes(content)
    assert fingerprint(path) != own


def test_no_fingerprint_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError):
        fingerprint(tmp_path / "a.gguf")


# -- values ----------------------------------------------------------------------------------------


def test_what_was_seen_adds_up() -> None:
    ours = learned(known(1, a="01"), known(2, a="0", b="11"), search_s=2.0)
    theirs = learned(known(3, a="1"), known(2, b="00", c="1"), evaluations=4)
    merged = ours.merged(theirs)
    # what was learned last comes first, and of one window the later score counts
    assert merged.known == (known(3, a="1"), known(2, a="0", b="00", c="1"), known(1, a="01"))
    assert (merged.search_s, merged.evaluations) == (2.0, 4)
    assert (merged.known[1].positions, merged.known[1].agreement) == (4, 0.25)


def test_only_the_latest_are_kept() -> None:
    ours = learned(*(known(layer) for layer in range(MAX_KNOWN)))
    merged = ours.merged(learned(known(9), known(8)))
    assert merged.known == (known(9), known(8), *ours.known[:-2])
    windows = {f"w{i}": "1" for i in range(MAX_SEEN)}
    once = learned(known(1, **windows))
    twice = once.merged(learned(known(1, w3="0", new="0")))
    assert list(twice.known[0].seen) == [
        *(k for k in windows if k not in ("w0", "w3")),
        "w3",
        "new",
    ]
    assert twice.known[0].seen["w3"] == seen("0")


def test_what_was_seen_is_what_the_search_scored() -> None:
    outcome = Outcome(np.array([True, False]), np.array([0.25, 1.0], dtype=np.float32))
    back = Seen.of(outcome).outcome()
    np.testing.assert_array_equal(back.agrees, outcome.agrees)
    np.testing.assert_allclose(back.confidence, outcome.confidence, atol=1e-3)


def test_newer_costs_win() -> None:
    newer = COSTS | {"head_ms": 2.0}
    ours = learned(costs={"cpu": COSTS, "cuda": COSTS})
    assert ours.merged(learned(costs={"cpu": newer})).costs == {"cpu": newer, "cuda": COSTS}


def test_different_models_do_not_mix() -> None:
    for other in (
        learned(fingerprint="0" * 32),
        Profile(fingerprint=PRINT, model="m", n_layer=3),
    ):
        with pytest.raises(ValueError, match="different models"):
            FULL.merged(other)


@pytest.mark.parametrize(
    "values",
    [
        {"fingerprint": "../../etc/passwd"},
        {"fingerprint": PRINT.upper()},
        {"n_layer": N_LAYER + 1},
        {"n_layer": -1},
        {"model": None},
        {"search_s": math.nan},
        {"search_s": -1.0},
        {"evaluations": -1},
        {"evaluations": 1.5},
        {"known": (known(1), known(1))},
        {"known": tuple(known(layer) for layer in range(MAX_KNOWN + 1))},
        {"costs": {"cpu": {}}},
        {"costs": {"cpu": COSTS | {"ffn_ms": [1.0], "attention_ms": [1.0]}}},
    ],
)
def test_impossible_profiles(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        replace(FULL, **values)


@pytest.mark.parametrize(
    "windows",
    [
        {},
        {f"w{i}": seen("1") for i in range(MAX_SEEN + 1)},
        {1: seen("1")},
    ],
)
def test_impossible_windows(windows: dict[Any, Seen]) -> None:
    with pytest.raises(ValueError):
        replace(known(1), seen=windows)


@pytest.mark.parametrize(
    ("agrees", "confidence"),
    [((), ()), ((True,), ()), ((True,), (1.01,)), ((True,), (math.nan,)), ((True,), ("1",))],
)
def test_impossible_scores(agrees: Any, confidence: Any) -> None:
    with pytest.raises(ValueError):
        Seen(agrees, confidence)


# -- the store -------------------------------------------------------------------------------------


def test_round_trip(store: Store) -> None:
    assert store.load(PRINT) is None
    assert not store.folder.exists()
    assert store.add(FULL) == FULL
    assert store.load(PRINT) == FULL
    assert store.load("f" * 32) is None
    assert names(store) == {f"{PRINT}.json"}


LAYERS = st.frozensets(st.integers(0, N_LAYER - 1))
NUMBERS = st.floats(0, 1e9)
SEEN = st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=5).map(
    lambda pairs: Seen(*map(tuple, zip(*pairs, strict=True)))
)
KNOWN = st.builds(
    Known,
    subnetwork=st.builds(SubNetwork, n_layer=st.just(N_LAYER), skip_attn=LAYERS, skip_ffn=LAYERS),
    seen=st.dictionaries(st.text(), SEEN, min_size=1, max_size=MAX_SEEN),
)
LEARNED = st.builds(
    Profile,
    fingerprint=st.just(PRINT),
    model=st.text(),
    n_layer=st.just(N_LAYER),
    known=KNOWN.map(lambda item: (item,)),
    costs=st.dictionaries(st.text(), st.just(COSTS), max_size=3),
    search_s=NUMBERS,
    evaluations=st.integers(0, 1 << 40),
)
AGAIN = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@AGAIN
@given(steps=st.lists(LEARNED, min_size=1, max_size=10))
def test_what_is_stored_is_all_that_was_learned(store: Store, steps: list[Profile]) -> None:
    store.forget(PRINT)
    stored = None
    for step in steps:
        stored = store.add(step)
        assert stored is not None
        assert store.load(PRINT) == stored
    assert stored is not None
    assert stored.evaluations == sum(step.evaluations for step in steps)
    assert stored.search_s == pytest.approx(sum(step.search_s for step in steps))
    assert set(stored.costs) == {where for step in steps for where in step.costs}
    assert stored.known[0].subnetwork == steps[-1].known[0].subnetwork
    assert steps[-1].known[0].seen.items() <= stored.known[0].seen.items()
    assert len(stored.known) == min(
        MAX_KNOWN, len({item.subnetwork for step in steps for item in step.known})
    )


def test_forget(store: Store) -> None:
    assert not store.forget(PRINT)
    assert not store.folder.exists()
    store.add(FULL)
    (store.folder / f"{PRINT}.tmp").write_text("left by a killed process")
    assert store.forget(PRINT)
    assert names(store) == set()
    assert store.load(PRINT) is None
    assert not store.forget(PRINT)


def test_no_file_outside_the_folder(store: Store) -> None:
    for act in (store.load, store.forget):
        with pytest.raises(ValueError, match="not a fingerprint"):
            act("../" + PRINT)


def test_what_a_killed_process_left_is_written_over(store: Store) -> None:
    store.add(learned(known(1)))
    (store.folder / f"{PRINT}.tmp").write_text('{"version": 1, "finger')
    store.add(learned(known(2)))
    assert names(store) == {f"{PRINT}.json"}


# -- files that cannot be used ---------------------------------------------------------------------


def assert_set_aside(
    store: Store, caplog: pytest.LogCaptureFixture, suffix: str, content: bytes
) -> None:
    (message,) = [record.getMessage() for record in caplog.records if record.name == "swift_gguf"]
    assert caplog.records[-1].levelno == logging.WARNING
    assert "renamed to" in message
    assert "\n" not in message
    assert (store.folder / f"{PRINT}.json.{suffix}").read_bytes() == content
    assert not path_of(store).exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values.update(known=[{"skip_attn": "3"}]),
        lambda values: values["known"][0].update(skip_attn=f"{N_LAYER}"),
        lambda values: values["known"][0].update(skip_attn=3),
        lambda values: values["known"][0].update(skip_ffn="x"),
        lambda values: values["known"][0].update(seen={}),
        lambda values: values["known"][0]["seen"].update(x={"agrees": "01", "confidence": [1]}),
        lambda values: values["known"][0]["seen"].update(x={"agrees": "2", "confidence": [1]}),
        lambda values: values["known"][0]["seen"].update(
            x={"agrees": "1", "confidence": [10**400]}
        ),
        lambda values: values["known"][0]["seen"].update(x={"agrees": [1], "confidence": [1]}),
        lambda values: values["known"][0].update(comment="a"),
        lambda values: values.update(n_layer=4),
        lambda values: values.update(n_layer="10"),
        lambda values: values.update(fingerprint="0" * 32),
        lambda values: values.update(evaluations=math.inf),
        lambda values: values["costs"].update(cpu={"pass_ms": []}),
        lambda values: values["costs"]["cpu-2t@4096"].pop("row_ms"),
        lambda values: values.update(costs=[]),
        lambda values: values.update(version=0),
        lambda values: values.update(version=True),
        lambda values: values.update(version="2"),
        lambda values: values.pop("version"),
        lambda values: values.pop("n_layer"),
    ],
)
@pytest.mark.parametrize("act", ["load", "add"])
def test_damage_is_set_aside(
    store: Store,
    caplog: pytest.LogCaptureFixture,
    edit: Callable[[dict[str, Any]], object],
    act: str,
) -> None:
    store.add(FULL)
    change(store, edit)
    content = path_of(store).read_bytes()
    if act == "load":
        assert store.load(PRINT) is None
        assert_set_aside(store, caplog, "damaged", content)
        assert store.add(FULL) == FULL
    else:
        assert store.add(FULL) == FULL
        assert (store.folder / f"{PRINT}.json.damaged").read_bytes() == content
        assert len(caplog.records) == 1
    assert store.load(PRINT) == FULL


def test_a_profile_that_claims_other_layers_is_set_aside(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.add(Profile(fingerprint=PRINT, model="m", n_layer=99, evaluations=3))
    assert store.add(FULL) == FULL
    assert "99 layers" in caplog.text
    assert names(store) == {f"{PRINT}.json", f"{PRINT}.json.damaged"}


def test_a_newer_version_is_set_aside(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.add(FULL)
    change(store, lambda values: values.update(version=2, known="in a form of the future"))
    content = path_of(store).read_bytes()
    assert store.load(PRINT) is None
    assert_set_aside(store, caplog, "newer-2", content)


def test_nothing_set_aside_is_lost(store: Store) -> None:
    store.folder.mkdir()
    for content in ("one", "two", "three"):
        path_of(store).write_text(content)
        assert store.load(PRINT) is None
    kept = {path.read_text() for path in store.folder.glob("*.damaged*")}
    assert kept == {"one", "two", "three"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["version", "fingerprint", "model", "n_layer", "known", "costs", "search_s", "evaluations"]
)


@AGAIN
@given(content=st.binary(max_size=64) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_content_stops_anybody(store: Store, content: bytes) -> None:
    store.forget(PRINT)
    store.folder.mkdir(exist_ok=True)
    path_of(store).write_bytes(content)
    assert store.load(PRINT) is None
    assert not path_of(store).exists()


@AGAIN
@given(edits=st.dictionaries(FIELDS, JSON, min_size=1), in_known=JSON)
def test_no_edit_stops_anybody(store: Store, edits: dict[str, Any], in_known: Any) -> None:
    store.forget(PRINT)
    store.add(FULL)
    change(store, lambda values: values.update(edits))
    profile = store.load(PRINT)
    assert path_of(store).exists() == (profile is not None)
    if profile is not None:
        assert store.add(learned()) is not None
    store.forget(PRINT)
    store.add(FULL)
    change(store, lambda values: values["known"][0].update(seen=in_known))
    profile = store.load(PRINT)
    assert path_of(store).exists() == (profile is not None)
    store.forget(PRINT)
    store.add(FULL)
    change(store, lambda values: values["known"][0]["seen"].update(x=in_known))
    profile = store.load(PRINT)
    assert profile is None or "x" in profile.known[0].seen


def test_deep_nesting_is_damage(store: Store) -> None:
    store.folder.mkdir()
    path_of(store).write_text("[" * 100_000)
    assert store.load(PRINT) is None
    assert names(store) == {f"{PRINT}.json.damaged"}


# -- an operating system that does not play along --------------------------------------------------


def assert_one_warning(caplog: pytest.LogCaptureFixture, *words: str) -> None:
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("swift_gguf", logging.WARNING)
    assert "\n" not in record.getMessage()
    assert all(word in record.getMessage() for word in words)


def test_a_folder_that_cannot_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "profiles")
    assert store.add(FULL) is None
    assert_one_warning(caplog, "cannot be written")


def test_a_folder_that_cannot_be_written(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.add(FULL)
    store.folder.chmod(0o500)
    try:
        if os.access(store.folder, os.W_OK):
            pytest.skip("this user may write anywhere")
        (store.folder / f"{PRINT}.lock").unlink(missing_ok=True)
        assert store.add(FULL) is None
        assert store.load(PRINT) == FULL
    finally:
        store.folder.chmod(0o700)
    assert_one_warning(caplog, "cannot be written")


def test_a_full_disk_leaves_the_old_profile(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    store.add(FULL)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert store.add(FULL) is None
    assert_one_warning(caplog, "cannot be written", "No space left")
    assert store.load(PRINT) == FULL
    assert store.add(FULL) is not None
    assert names(store) == {f"{PRINT}.json"}


def test_something_that_is_no_file_is_left_alone(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    path_of(store).mkdir(parents=True)
    assert store.load(PRINT) is None
    assert_one_warning(caplog, "cannot be read")
    assert store.add(FULL) is None
    assert path_of(store).is_dir()


def test_a_lock_that_is_never_released(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(FULL)
    monkeypatch.setattr(profile_module, "LOCK_SECONDS", 0.05)
    with filelock.FileLock(store.folder / f"{PRINT}.lock"):
        assert store.add(FULL) is None
        assert_one_warning(caplog, "cannot be written", "lock")
        assert store.load(PRINT) == FULL  # reading needs no lock
        assert not store.forget(PRINT)
    assert store.add(FULL) is not None


# -- processes -------------------------------------------------------------------------------------

KILLS = 40


def write_on(store: Store) -> None:
    """Adds seconds of search, until it is killed."""
    while True:
        store.add(learned(known(1, a="01"), search_s=1.0))


def write_until_told(store: Store, pipe: Connection) -> None:
    """Adds evaluations, and reports how many were stored."""
    stored = 0
    while not pipe.poll(0.002):
        stored += store.add(learned(known(2, a="1"), evaluations=1)) is not None
    pipe.send(stored)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs cheap processes")
def test_killed_writers_damage_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("fork")
    rng = random.Random(1)
    ours, theirs = context.Pipe()
    survivor = context.Process(target=write_until_told, args=(store, theirs), daemon=True)
    survivor.start()
    evaluations = 0
    for number in range(KILLS):
        victim = context.Process(target=write_on, args=(store,), daemon=True)
        victim.start()
        time.sleep(rng.uniform(0.0, 0.003 * number))  # a slow machine gets some that write, too
        assert victim.is_alive()
        victim.kill()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        if (profile := store.load(PRINT)) is not None:
            assert profile.evaluations >= evaluations
            evaluations = profile.evaluations
    ours.send("stop")
    assert ours.poll(10)
    stored = ours.recv()
    survivor.join()
    profile = store.load(PRINT)
    assert profile is not None
    assert profile.evaluations == stored > 0  # nothing lost, nothing counted twice
    assert profile.search_s > 0
    by_layer = sorted(profile.known, key=lambda item: min(item.subnetwork.skip_ffn))
    assert by_layer == [known(1, a="01"), known(2, a="1")]
    assert names(store) == {f"{PRINT}.json"}
    assert caplog.records == []
