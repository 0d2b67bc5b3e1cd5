"""Sidecars on generated models: derived, loaded, drafted with, refused."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import gguf
import numpy as np
import pytest

from swift_gguf.drafting import LayerSkip
from swift_gguf.engine import generate
from swift_gguf.errors import ModelError, SidecarError, SubnetworkError, UnsupportedModelError
from swift_gguf.gguf import header as gguf_header
from swift_gguf.gguf import sidecar as sidecars
from swift_gguf.learning.learning import space_of
from swift_gguf.model import Model, ModelOptions
from swift_gguf.native.binding import library
from swift_gguf.prepare import weights
from swift_gguf.prepare.attention import PARTS
from swift_gguf.prepare.narrow_ffn import add_ffn
from swift_gguf.prepare.narrowing import Fit, Narrow, ffns_of
from swift_gguf.prepare.run import Preparation, PrepareOptions
from swift_gguf.sampling.sampling import Sampler, SamplingOptions
from swift_gguf.stats import Stats
from swift_gguf.subnetwork import SubNetwork
from tests.fixtures.formats import named

PROMPT = list(range(5, 25))
DENSE = ("llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "falcon")
SMALL = PrepareOptions(width=0.5, n_head=96, n_tokens=300, answer_tokens=12, kind="Q8_0")

Opener = Callable[..., Model]
Tiny = Callable[..., Path]


def prepared(model: Path, out: Path, options: PrepareOptions = SMALL) -> Path:
    """Derives a sidecar as `swift-gguf prepare` does."""
    loaded = Model(model, ModelOptions(n_ctx=512, n_batch=128, n_gpu_layers=0, sidecar=None))
    with loaded:
        preparation = Preparation(loaded, [PROMPT, PROMPT[3:]], options)
        preparation.write(out, list(preparation.answers()))
    return out


def narrow(model: Model, *, head: bool = True) -> SubNetwork:
    assert model.sidecar is not None
    return SubNetwork(
        n_layer=model.n_layer, narrow_ffn=model.sidecar.narrow_layers, draft_head=head
    )


def logits_of(model: Model, tokens: Sequence[int], subnetwork: SubNetwork | None) -> np.ndarray:
    model.clear()
    model.decode(tokens, subnetwork=subnetwork)
    return np.asarray(model.logits(0))


# -- what is written -------------------------------------------------------------------------------


def test_the_document_names_what_is_written(tiny: Tiny, tmp_path: Path) -> None:
    """Every key and tensor of docs/formats.md is in a sidecar of some family, and no others are."""
    keys, tensors = set[str](), set[str]()
    for family in ("llama", "qwen2", "phi3", "gpt2"):
        header = gguf_header.read(prepared(tiny(family), tmp_path / f"{family}.swift.gguf"))
        keys |= set(header.metadata)
        tensors |= {re.sub(r"^blk\.\d+\.", "blk.N.", name) for name in header.tensors}
    assert keys == named("Keys")
    assert tensors == named("Tensors")


# -- what a draft pass computes --------------------------------------------------------------------


@pytest.mark.parametrize("family", DENSE)
def test_the_whole_width_is_the_model_itself(
    family: str, tiny: Tiny, open_model: Opener, tmp_path: Path
) -> None:
    """All neurons and all tokens, in the model's own type: the same logits, to the bit."""
    path = tiny(family, quant="Q8_0")
    whole = PrepareOptions(width=1.0, n_head=1 << 20, n_tokens=100, answer_tokens=8, kind="Q8_0")
    model = open_model(path, sidecar=prepared(path, tmp_path / "x.swift.gguf", whole))
    assert model.sidecar is not None
    assert model.sidecar.n_head == model.n_vocab
    assert len(model.sidecar.narrow_layers) == model.n_layer
    full, draft = (logits_of(model, PROMPT, net) for net in (None, narrow(model)))
    np.testing.assert_array_equal(draft, full)

    stats = Stats()
    model.clear()
    with Sampler(model, SamplingOptions(temperature=0.0), prompt=PROMPT) as sampler:
        drafter = LayerSkip(model, narrow(model))
        list(
            generate(
                model,
                PROMPT,
                sampler=sampler,
                drafter=drafter,
                draft_max=4,
                max_tokens=40,
                stats=stats,
            )
        )
    assert stats.drafted > 20
    assert stats.accepted == stats.drafted


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_the_order_of_neurons_changes_nothing_but_rounding(
    family: str, tiny: Tiny, open_model: Opener, tmp_path: Path
) -> None:
    path, out = tiny(family), tmp_path / "x.swift.gguf"
    source = weights.Weights(path)
    written = weights.Sidecar(out)
    rng = np.random.default_rng(1)
    ffns = ffns_of(source, 99)
    f32 = gguf.GGMLQuantizationType.F32
    for ffn in ffns:
        order = rng.permutation(ffn.n_ff)
        for part in ("up", *(["gate"] if ffn.has_gate else [])):
            rows = ffn.rows(order) if part == "up" else order
            written.add_rows(ffn.name(part), source, rows, f32)
            if source.has(ffn.name(part, "bias")):
                bias = source.values(ffn.name(part, "bias")).reshape(-1)
                written.add_array(ffn.name(part, "bias"), bias[rows])
        written.add_values(ffn.name("down"), source.values(ffn.name("down"))[:, order], f32)
        if source.has(ffn.name("down", "bias")):
            bias = source.values(ffn.name("down", "bias")).reshape(-1)
            written.add_array(ffn.name("down", "bias"), bias)
    written.finish(path, [ffn.n_ff for ffn in ffns], 0)
    model = open_model(path, sidecar=out)
    full, draft = (logits_of(model, PROMPT, net) for net in (None, narrow(model, head=False)))
    np.testing.assert_allclose(draft, full, atol=1e-3 * np.abs(full).max())
    assert np.argmax(draft) == np.argmax(full)


def test_the_draft_head_knows_some_tokens_and_their_logits_are_the_models(
    tiny: Tiny, open_model: Opener, tmp_path: Path
) -> None:
    path = tiny("llama", quant="Q8_0")
    model = open_model(path, sidecar=prepared(path, tmp_path / "x.swift.gguf"))
    head_only = SubNetwork(n_layer=model.n_layer, draft_head=True)
    full, draft = (logits_of(model, PROMPT, net) for net in (None, head_only))
    known = np.isfinite(draft)
    assert known.sum() == 96
    np.testing.assert_array_equal(draft[known], full[known])
    assert np.all(draft[~known] == -np.inf)
    model.clear()
    model.decode(PROMPT, n_outputs=5, subnetwork=head_only)  # several rows at once, too
    for row in range(5):
        assert np.isfinite(model.logits(row)).sum() == 96


@pytest.mark.parametrize("family", DENSE)
def test_narrow_drafts_cost_less_and_never_change_the_text(
    family: str, tiny: Tiny, open_model: Opener, tmp_path: Path
) -> None:
    path = tiny(family, quant="Q8_0")
    model = open_model(path, sidecar=prepared(path, tmp_path / "x.swift.gguf"))
    subnetwork = narrow(model)
    full, draft = model.pass_cost(None), model.pass_cost(subnetwork)
    assert draft.weight_bytes < 0.9 * full.weight_bytes
    assert draft.head_bytes < full.head_bytes

    def text(drafter: LayerSkip | None) -> tuple[list[int], Stats]:
        model.clear()
        stats = Stats()
        with Sampler(model, SamplingOptions(temperature=0.0), prompt=PROMPT) as sampler:
            tokens = generate(
                model,
                PROMPT,
                sampler=sampler,
                drafter=drafter,
                draft_max=4,
                max_tokens=48,
                stats=stats,
            )
            return [token.id for token in tokens], stats

    plain, _ = text(None)
    drafted, stats = text(LayerSkip(model, subnetwork))
    assert drafted == plain
    assert stats.drafted > 0
    before = logits_of(model, PROMPT, None)
    np.testing.assert_array_equal(logits_of(model, PROMPT, None), before)


def test_a_refit_is_nearer_to_the_whole_ffn_than_no_refit(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("llama")
    loaded = Model(path, ModelOptions(n_ctx=512, n_batch=128, n_gpu_layers=0, sidecar=None))
    with loaded:
        options = PrepareOptions(width=0.5, n_head=0, n_tokens=2000, answer_tokens=24)
        preparation = Preparation(loaded, [PROMPT, PROMPT[::-1], PROMPT[4:]], options)
        preparation.write(tmp_path / "x.swift.gguf", list(preparation.answers()))
        assert preparation.error is not None
        assert preparation.error < 0.9 * preparation.errors[0.0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_linear_path_is_what_its_rows_and_columns_say(
    family: str, tiny: Tiny, open_model: Opener, tmp_path: Path
) -> None:
    """With no neuron kept, an FFN is the linear map."""
    path, out, rank = tiny(family), tmp_path / "x.swift.gguf", 32
    source = weights.Weights(path)
    written, rng = weights.Sidecar(out), np.random.default_rng(1)
    f32 = gguf.GGMLQuantizationType.F32
    ffns = ffns_of(source, 99)
    maps = {}
    for ffn in ffns:
        rows, columns = (rng.standard_normal((rank, ffn.n_embd)).astype("f4") for _ in range(2))
        maps[ffn.layer] = rows.T @ columns
        fit = Fit(rows, np.vstack([columns, np.zeros((1, ffn.n_embd), np.float32)]))
        add_ffn(written, source, Narrow(ffn, np.arange(0), fit), lambda length: f32)
    written.finish(path, [rank] * len(ffns), 0)
    model = open_model(path, sidecar=out)
    seen: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def see(layer: int, inputs: np.ndarray, activations: np.ndarray, output: np.ndarray) -> None:
        assert activations.shape[1] == rank
        seen[layer] = inputs.copy(), output.copy()

    model.usable_sidecar()
    with model.observe_ffn(see):
        model.decode(PROMPT, n_outputs=len(PROMPT), subnetwork=narrow(model, head=False))
    assert set(seen) == set(maps)
    for layer, (inputs, output) in seen.items():
        expected = inputs @ maps[layer]
        np.testing.assert_allclose(output, expected, atol=2e-3 * np.abs(expected).max())


def write_whole_ffns_and_attention(path: Path, out: Path, kind: gguf.GGMLQuantizationType) -> int:
    """A sidecar that narrows nothing, with copies of attention; returns the bytes it saves."""
    source, written, saved = weights.Weights(path), weights.Sidecar(out), 0
    ffns = ffns_of(source, 99)
    for ffn in ffns:
        whole = Narrow(ffn, np.arange(ffn.n_ff))
        add_ffn(written, source, whole, lambda length: gguf.GGMLQuantizationType.Q8_0)
        for part in PARTS:
            name = f"blk.{ffn.layer}.attn_{part}.weight"
            if source.has(name):
                rows = np.arange(source.shape(name)[0])
                before = written.n_bytes
                written.add_rows(name, source, rows, kind)
                saved += source.rows(name, rows).nbytes - (written.n_bytes - before)
    written.finish(path, [ffn.n_ff for ffn in ffns], 0)
    return saved


@pytest.mark.parametrize("family", DENSE)
def test_drafts_read_their_own_copies_of_attention(
    family: str, tiny: Tiny, open_model: Opener, tmp_path: Path
) -> None:
    """In the model's own type they change no bit; in fewer bits a draft differs and costs less."""
    path = tiny(family, quant="Q8_0")
    same, less = tmp_path / "same.swift.gguf", tmp_path / "less.swift.gguf"
    assert write_whole_ffns_and_attention(path, same, gguf.GGMLQuantizationType.Q8_0) == 0
    saved = write_whole_ffns_and_attention(path, less, gguf.GGMLQuantizationType.Q4_0)
    model = open_model(path, sidecar=same)
    full, draft = (logits_of(model, PROMPT, net) for net in (None, narrow(model, head=False)))
    np.testing.assert_array_equal(draft, full)

    model = open_model(path, sidecar=less)
    subnetwork = narrow(model, head=False)
    draft = logits_of(model, PROMPT, subnetwork)
    assert not np.array_equal(draft, full)
    assert np.corrcoef(draft, full)[0, 1] > 0.9
    np.testing.assert_array_equal(logits_of(model, PROMPT, None), full)
    whole, cheaper = model.pass_cost(None), model.pass_cost(subnetwork)
    assert whole.weight_bytes - cheaper.weight_bytes == saved > 0
    one_layer = SubNetwork(n_layer=model.n_layer, narrow_ffn=frozenset({1}))
    assert 0 < whole.weight_bytes - model.pass_cost(one_layer).weight_bytes < saved


@pytest.mark.parametrize(
    ("quant", "kind", "n_copies"), [("Q8_0", "Q4_0", 4), ("Q8_0", "Q8_0", 0), ("Q4_1", "Q4_0", 0)]
)
def test_attention_is_copied_where_that_saves_much(
    quant: str, kind: str, n_copies: int, tiny: Tiny, tmp_path: Path
) -> None:
    path, out = tiny("llama", quant=quant), tmp_path / "x.swift.gguf"
    options = replace(SMALL, kind=kind)
    with Model(path, ModelOptions(n_ctx=512, n_gpu_layers=0, sidecar=None)) as model:
        expected = Preparation(model, [PROMPT], options).expected_bytes
    prepared(path, out, options)
    matrices = [t for t in gguf.GGUFReader(out).tensors if t.name.endswith(".weight")]
    copies = [t for t in matrices if ".attn_" in t.name]
    assert len(copies) == n_copies * model.n_layer
    assert all(t.tensor_type.name == kind for t in copies)
    assert expected == sum(t.n_bytes for t in matrices)
    prepared(path, out, replace(options, attention=False))
    assert not any(".attn_" in t.name for t in gguf.GGUFReader(out).tensors)


def test_fewer_experts_cost_less(tiny: Tiny, open_model: Opener) -> None:
    """A mixture of experts needs no sidecar: a draft runs fewer of a token's experts."""
    model = open_model(tiny("qwen3moe"))
    one_expert = SubNetwork(n_layer=model.n_layer, narrow_ffn=frozenset(range(model.n_layer)))
    assert model.pass_cost(one_expert).weight_bytes < model.pass_cost(None).weight_bytes
    full, draft = (logits_of(model, PROMPT, net) for net in (None, one_expert))
    assert np.isfinite(draft).all()
    assert not np.array_equal(full, draft)
    np.testing.assert_array_equal(logits_of(model, PROMPT, None), full)


def test_models_without_a_dense_ffn_are_refused(tiny: Tiny) -> None:
    loaded = Model(tiny("qwen3moe"), ModelOptions(n_ctx=256, n_gpu_layers=0, sidecar=None))
    with loaded, pytest.raises(UnsupportedModelError, match="no dense FFN"):
        Preparation(loaded, [PROMPT])


def test_what_an_observer_raises_stops_the_run(tiny: Tiny, open_model: Opener) -> None:
    model = open_model(tiny("llama"))
    seen = []

    def interrupted(layer: int, *seen_there: np.ndarray) -> None:
        seen.append(layer)
        raise KeyboardInterrupt

    def run() -> None:
        with model.observe_ffn(interrupted):
            for _ in range(50):
                model.decode([7])

    with pytest.raises(KeyboardInterrupt):
        run()
    assert seen == [0]
    assert model.n_past <= 1
    model.clear()
    model.decode(PROMPT)  # and nobody observes any more
    assert seen == [0]


def test_an_interrupt_on_a_callbacks_first_line(
    open_model: Opener, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one that comes while llama.cpp computes is raised: Python drops it there."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    library()._catch_interrupts()  # again: pytest has a hook of its own
    model = open_model(tiny("llama"))

    def on_call(frame: FrameType, event: str, _: object) -> None:
        if frame.f_code.co_name == "on_ffn":
            sys.settrace(None)
            raise KeyboardInterrupt

    def run() -> None:
        with model.observe_ffn(lambda *_: None):
            sys.settrace(on_call)
            try:
                model.decode([5, 6])
            finally:
                sys.settrace(None)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert model.tokens == []
    model.decode([5, 6])


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture
def pair(tiny: Tiny, tmp_path: Path) -> tuple[Path, Path]:
    """A model of the test's own and the sidecar beside it."""
    model = tmp_path / "model.gguf"
    shutil.copy(tiny("llama", quant="Q8_0"), model)
    return model, prepared(model, sidecars.path_beside(model), replace(SMALL, kind="Q4_0"))


def test_a_sidecar_beside_the_model_is_found_and_searched_with(
    pair: tuple[Path, Path], open_model: Opener
) -> None:
    model = open_model(pair[0])
    assert model.sidecar is not None
    assert model.sidecar.path == pair[1]
    space = space_of(model)
    assert space is not None
    assert space.is_narrow
    assert set(space.ffn) == set(model.sidecar.narrow_layers)
    assert narrow(model) in space
    without = open_model(pair[0], sidecar=None)
    assert without.sidecar is None
    with pytest.raises(SubnetworkError, match="swift-gguf prepare"):
        without.decode(PROMPT, subnetwork=SubNetwork(n_layer=without.n_layer, draft_head=True))


def refused(model: Path, open_model: Opener, match: str) -> None:
    """Named, it is an error; found beside the model, it is left aside with the same words."""
    beside = sidecars.path_beside(model)
    with pytest.raises(SidecarError, match=match):
        open_model(model, sidecar=beside)
    loaded = open_model(model)
    assert loaded.sidecar is None
    assert loaded.sidecar_refusal
    loaded.decode(PROMPT)


def test_another_models_sidecar_is_refused(
    pair: tuple[Path, Path], tiny: Tiny, open_model: Opener
) -> None:
    shutil.copy(tiny("llama", quant="Q8_0", seed=7), pair[0])
    refused(pair[0], open_model, "derived from another model")


def test_a_retrained_models_old_sidecar_is_refused(
    pair: tuple[Path, Path], open_model: Opener
) -> None:
    """The same header and size, other weights."""
    data = bytearray(pair[0].read_bytes())
    data[-5000:-4000] = bytes(1000)
    pair[0].write_bytes(data)
    refused(pair[0], open_model, "derived from another model")


def test_a_model_is_no_sidecar(pair: tuple[Path, Path], tiny: Tiny, open_model: Opener) -> None:
    shutil.copy(tiny("qwen2"), pair[1])
    refused(pair[0], open_model, "not a sidecar but a qwen2")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_truncated_sidecar_is_refused(
    share: float, pair: tuple[Path, Path], open_model: Opener
) -> None:
    data = pair[1].read_bytes()
    pair[1].write_bytes(data[: int(share * len(data))])
    refused(pair[0], open_model, "no sidecar")


def rewrite(path: Path, change: Callable[[str, np.ndarray], np.ndarray | None]) -> None:
    """The same sidecar with some tensors changed or left out."""
    reader = gguf.GGUFReader(path)
    tensors = [(t.name, np.array(t.data), t.tensor_type) for t in reader.tensors]
    fields = {name: field.contents() for name, field in reader.fields.items()}
    writer = gguf.GGUFWriter(path, sidecars.ARCHITECTURE)
    for key in ("swift.fingerprint", "swift.weights"):
        writer.add_string(key, fields[key])
    writer.add_uint32("swift.version", fields["swift.version"])
    writer.add_array("swift.n_narrow", fields["swift.n_narrow"])
    writer.add_uint32("swift.n_head", fields["swift.n_head"])
    for name, data, kind in tensors:
        changed = change(name, data)
        if changed is not None:
            quantised = kind if changed.dtype == np.uint8 else None
            writer.add_tensor(name, changed, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        ("blk.0.ffn_up.weight", lambda data: None),
        ("blk.1.ffn_gate.weight", lambda data: data[:8]),
        ("blk.0.ffn_down.weight", lambda data: data[:32]),
        ("output.ids", lambda data: data[:40]),
        ("output.ids", lambda data: data + 1_000_000),
        ("output.ids", lambda data: -data - 1),
        ("output.weight", lambda data: data[:, :18]),
        ("output.ids", lambda data: data.reshape(-1, 1)),
        ("blk.0.ffn_up.weight", lambda data: np.zeros((32, 64), np.int32)),
        ("blk.0.attn_q.weight", lambda data: data[:32]),
        ("blk.1.attn_output.weight", lambda data: data[:, :18]),
        ("blk.1.attn_v.weight", lambda data: np.zeros((32, 64), np.int32)),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused(
    tensor: str,
    what: Callable[[np.ndarray], np.ndarray | None],
    pair: tuple[Path, Path],
    open_model: Opener,
) -> None:
    rewrite(pair[1], lambda name, data: what(data) if name == tensor else data)
    model = open_model(pair[0], sidecar=pair[1])  # the header says nothing wrong
    with pytest.raises(SidecarError, match="cannot be used"):
        model.decode(PROMPT, subnetwork=narrow(model))
    model.decode(PROMPT)  # the model goes on without
    found = open_model(pair[0])
    space = space_of(found)  # beside the model nobody asked for it: drafts do without
    assert space is not None
    assert not space.is_narrow
    assert found.sidecar_refusal


def test_a_copy_of_what_the_model_does_not_have_is_refused(
    tiny: Tiny, open_model: Opener, tmp_path: Path
) -> None:
    path, out = tiny("phi3"), tmp_path / "x.swift.gguf"  # q, k and v are one matrix there
    written = weights.Sidecar(out)
    written.add_array("blk.0.attn_q.weight", np.zeros((64, 64), np.float32))
    written.finish(path, [0] * 4, 0)
    with (
        open_model(path, sidecar=out) as model,
        pytest.raises(SidecarError, match=r"attn_q\.weight stands for nothing"),
    ):
        model.decode(
            PROMPT, subnetwork=SubNetwork(n_layer=model.n_layer, narrow_ffn=frozenset({0}))
        )


def test_an_interrupted_write_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    path, out = tiny("llama"), tmp_path / "x.swift.gguf"
    written = weights.Sidecar(out)
    written.add_array("blk.0.ffn_down.weight", np.zeros((4, 4), np.complex64))  # no such type
    with pytest.raises(Exception, match=r".*"):
        written.finish(path, [4], 0)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_sidecar_is_one_clear_line(tiny: Tiny, open_model: Opener) -> None:
    with pytest.raises((SidecarError, ModelError), match="cannot be read"):
        open_model(tiny("llama"), sidecar=Path("/nowhere/x.swift.gguf"))


def test_a_closed_model_loads_no_sidecar(pair: tuple[Path, Path], open_model: Opener) -> None:
    model = open_model(pair[0])
    assert model.sidecar is not None
    subnetwork = narrow(model)
    model.close()
    model.usable_sidecar()
    with pytest.raises(SubnetworkError):
        model._handles.of(subnetwork)
