"""Sub-networks as values, and layer lists as text."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swift_gguf.errors import SubnetworkError, SwiftError
from swift_gguf.subnetwork import SubNetwork, format_layers, parse_layers

LAYERS = st.frozensets(st.integers(0, 10_000), max_size=60) | st.frozensets(st.integers(0, 30))


# -- text ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(LAYERS)
@example(frozenset())
@example(frozenset({0, 10_000}))
def test_text_and_layers_round_trip(layers: frozenset[int]) -> None:
    text = format_layers(layers)
    assert parse_layers(text) == layers
    assert format_layers(parse_layers(text)) == text
    assert re.fullmatch(r"(\d+(-\d+)?(,\d+(-\d+)?)*)?", text)
    assert len(text.split(",")) == max(1, sum(layer - 1 not in layers for layer in layers))


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("", set()),
        (" , ,", set()),
        ("3", {3}),
        ("3,5-9", {3, 5, 6, 7, 8, 9}),
        (" 3 , 5 - 6 ,", {3, 5, 6}),
        ("7,3-4,3", {3, 4, 7}),
        ("4-4", {4}),
        ("0-10000", set(range(10_001))),
    ],
)
def test_lists_people_write(text: str, layers: set[int]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    ("layers", "text"),
    [([], ""), ([4], "4"), ([9, 3, 5, 6, 7, 8], "3,5-9"), ([1, 2], "1-2"), ({0, 2, 4}, "0,2,4")],
)
def test_ranges_are_as_long_as_can_be(layers: list[int], text: str) -> None:
    assert format_layers(layers) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x", "'x' is not a layer; write layers as in 3,5-9"),
        ("3,x", "'x'"),
        ("3;5", "'3;5'"),
        ("-3", "'-3'"),
        ("3-", "'3-'"),
        ("-", "'-'"),
        ("1-2-3", "'1-2-3'"),
        ("1.5", "'1.5'"),
        ("9-5", "runs backwards; write 5-9"),
        ("10001", "no layer 10001"),
        ("0-99999999999", "no layer 99999999999"),
        ("9" * 5000, "is not a layer"),  # beyond what Python turns into an int
    ],
)
def test_anything_else_is_one_clear_line(text: str, words: str) -> None:
    with pytest.raises(SubnetworkError, match=re.escape(words)) as caught:
        parse_layers(text)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, SwiftError)
    assert isinstance(caught.value, ValueError)


@settings(deadline=None)
@given(st.text("0123456789-, x", max_size=12))
def test_any_text_gives_layers_or_one_line(text: str) -> None:
    layers, message = None, ""
    try:
        layers = parse_layers(text)
    except SubnetworkError as error:
        message = str(error)
    assert len(message.splitlines()) == (layers is None)
    if layers is not None:
        assert parse_layers(format_layers(layers)) == layers


def test_a_line_break_in_the_text_does_not_break_the_message() -> None:
    with pytest.raises(SubnetworkError) as caught:
        parse_layers("3,x\ny")
    assert "\n" not in str(caught.value)


# -- values ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_masks_name_the_skipped_layers(n_layer: int, data: st.DataObject) -> None:
    layers = st.frozensets(st.integers(0, n_layer - 1))
    attn, ffn = data.draw(layers), data.draw(layers)
    network = SubNetwork(n_layer=n_layer, skip_attn=attn, skip_ffn=ffn)
    for mask, skipped in (
        (network.attn_mask, attn),
        ([share == 0.0 for share in network.ffn_shares], ffn),
    ):
        assert len(mask) == n_layer
        assert {layer for layer, skip in enumerate(mask) if skip} == skipped


def test_equal_networks_are_one_key() -> None:
    one = SubNetwork(n_layer=8, skip_attn=frozenset({1, 2}), skip_ffn=frozenset({5}))
    same = SubNetwork(n_layer=8, skip_attn=parse_layers("1-2"), skip_ffn=parse_layers("5"))
    others = {
        dataclasses.replace(one, n_layer=9),
        dataclasses.replace(one, skip_attn=one.skip_ffn),
        SubNetwork(n_layer=8, skip_attn=one.skip_ffn, skip_ffn=one.skip_attn),
        SubNetwork(n_layer=8),
    }
    assert one == same
    assert hash(one) == hash(same)
    assert len(others) == 4
    assert one not in others
    assert {one: "found"}[same] == "found"


def test_networks_do_not_change() -> None:
    network = SubNetwork(n_layer=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        network.n_layer = 9  # type: ignore[misc]


def leaving_out(kind: str, layers: frozenset[int]) -> SubNetwork:
    options: dict[str, Any] = {kind: layers}
    return SubNetwork(n_layer=4, **options)


@pytest.mark.parametrize("kind", ["skip_attn", "skip_ffn"])
@pytest.mark.parametrize("layer", [-1, 4, 5])
def test_layers_must_exist(kind: str, layer: int) -> None:
    with pytest.raises(SubnetworkError, match=f"layer {layer} .* layers 0 to 3") as caught:
        leaving_out(kind, frozenset({1, layer}))
    assert "\n" not in str(caught.value)
    leaving_out(kind, frozenset({0, 3}))


@pytest.mark.parametrize("n_layer", range(1, 101))
def test_the_uniform_network_keeps_both_ends_and_skips_every_second(n_layer: int) -> None:
    network = SubNetwork.uniform(n_layer)
    assert network.n_layer == n_layer
    assert network.skip_attn == network.skip_ffn
    assert not network.skip_ffn & {0, n_layer - 1}
    assert len(network.skip_ffn) == max(0, n_layer - 1) // 2
    assert not any(layer + 1 in network.skip_ffn for layer in network.skip_ffn)


@pytest.mark.parametrize(
    ("attn", "ffn", "text"),
    [
        ("", "", "the whole model"),
        ("1-3,5", "", "without attention 1-3,5"),
        ("", "2", "without FFN 2"),
        ("1", "2-3", "without attention 1 and FFN 2-3"),
    ],
)
def test_people_can_read_it(attn: str, ffn: str, text: str) -> None:
    network = SubNetwork(n_layer=8, skip_attn=parse_layers(attn), skip_ffn=parse_layers(ffn))
    assert str(network) == text
