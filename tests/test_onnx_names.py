"""Names in ONNX files: mechanical, unique, and the next cache is found by name alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachefree.errors import CacheFreeError
from cachefree.onnx.names import Names, axis_name, name_interface, steps_of
from cachefree.onnx.roles import is_mask, is_position
from cachefree.sizes import size_symbol
from cachefree.spec import CacheSlot, Domain, InputSpec, Interface, OutputSpec, Region

B, S, P, E, PE = map(size_symbol, ("batch", "query", "past", "encoder", "past_encoder"))
F32, I64 = torch.float32, torch.int64


def interface(
    pasts: list[str],
    *,
    inputs: dict[str, tuple[Any, ...]] | None = None,
    outputs: dict[str, tuple[Any, ...]] | None = None,
    presents: list[str] | None = None,
    encoder: frozenset[int] = frozenset(),
) -> Interface:
    """An interface with these cache paths; `encoder` lists those of the encoder."""
    inputs = inputs if inputs is not None else {"input_ids": (B, S)}
    outputs = outputs if outputs is not None else {"[0]": (B, S, 7)}
    free = [InputSpec(f"in{i}", path, shape, I64) for i, (path, shape) in enumerate(inputs.items())]
    cache, out = [], []
    for i, path in enumerate(pasts):
        length = PE if i in encoder else P
        cache.append(InputSpec(f"past{i}", path, (B, 2, length, 8), F32, True))
        present = presents[i] if presents else f"[1][{i}]"
        grown = E if i in encoder else P + S
        out.append(OutputSpec(f"present{i}", present, (B, 2, grown, 8), F32, True))
    plain = [
        OutputSpec(f"out{i}", path, shape, F32) for i, (path, shape) in enumerate(outputs.items())
    ]
    slots = [CacheSlot(a, b, (2,), "zero length") for a, b in zip(cache, out, strict=True)]
    domain = Domain((Region("all"),))
    return Interface((*free, *cache), (*plain, *out), tuple(slots), domain)


def cache_names(spec: Interface, style: Any = "optimum") -> list[tuple[str, str]]:
    names = name_interface(spec, style, {"in0": 7})
    free = len(spec.inputs) - len(spec.cache)
    plain = len(spec.outputs) - len(spec.cache)
    return list(zip(names.inputs[free:], names.outputs[plain:], strict=True))


def layers(template: str, count: int) -> list[str]:
    return [template.format(i=i, j=j) for i in range(count) for j in range(2)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_pairs_by_layer(count: int) -> None:
    expected = [
        (f"past_key_values.{i}.{kind}", f"present.{i}.{kind}")
        for i in range(count)
        for kind in ("key", "value")
    ]
    assert cache_names(interface(layers("past_kvs[{i}][{j}]", count))) == expected


@pytest.mark.parametrize(
    "paths",
    [
        ["cache['k'][0]", "cache['k'][1]", "cache['v'][0]", "cache['v'][1]"],
        [
            "cache.key_cache[0]",
            "cache.key_cache[1]",
            "cache.value_cache[0]",
            "cache.value_cache[1]",
        ],
        ["k_cache[0]", "k_cache[1]", "v_cache[0]", "v_cache[1]"],
        [
            "past[0]['prev_key']",
            "past[1]['prev_key']",
            "past[0]['prev_value']",
            "past[1]['prev_value']",
        ],
    ],
)
def test_kinds_that_are_said(paths: list[str]) -> None:
    assert [past for past, _ in cache_names(interface(paths))] == [
        "past_key_values.0.key",
        "past_key_values.1.key",
        "past_key_values.0.value",
        "past_key_values.1.value",
    ]


def test_all_keys_then_all_values() -> None:
    paths = [f"past[{kind}][{layer}]" for kind in range(2) for layer in range(3)]
    assert [past for past, _ in cache_names(interface(paths))] == [
        f"past_key_values.{layer}.{kind}" for kind in ("key", "value") for layer in range(3)
    ]


def test_encoder_and_decoder() -> None:
    paths = [f"past[{layer}][{part}]" for layer in range(2) for part in range(4)]
    names = cache_names(interface(paths, encoder=frozenset({2, 3, 6, 7})))
    assert names[:4] == [
        ("past_key_values.0.decoder.key", "present.0.decoder.key"),
        ("past_key_values.0.decoder.value", "present.0.decoder.value"),
        ("past_key_values.0.encoder.key", "present.0.encoder.key"),
        ("past_key_values.0.encoder.value", "present.0.encoder.value"),
    ]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["past"], [("past", "present.past")]),
        (["mems[0]", "mems[1]"], [("mems.0", "present.mems.0"), ("mems.1", "present.mems.1")]),
        (["past[0]", "past[1]", "past[2]"], [(f"past.{i}", f"present.past.{i}") for i in range(3)]),
        (["state['a b'].x"], [("state.a_b.x", "present.state.a_b.x")]),
    ],
)
def test_unknown_structures_keep_their_path(
    paths: list[str], expected: list[tuple[str, str]]
) -> None:
    assert cache_names(interface(paths)) == expected


def test_states_for_genai() -> None:
    spec = interface(["cache[0]['conv_state']", "cache[0]['recurrent_state']"])
    assert cache_names(spec, "genai") == [
        ("past.0.conv", "present.0.conv"),
        ("past.0.recurrent", "present.0.recurrent"),
    ]


def test_own_paths() -> None:
    spec = interface(["past[0][0]", "past[0][1]"], inputs={"idx": (B, S)})
    names = name_interface(spec, "model", {"in0": 7})
    assert names.inputs == ("idx", "past.0.0", "past.0.1")
    assert names.outputs == ("output.0", "output.1.0", "output.1.1")
    assert (names.tokens, names.logits) == ("idx", "output.0")


def test_roles() -> None:
    spec = interface(
        ["past[0][0]", "past[0][1]"],
        inputs={"idx": (B, S), "mask": (B, P + S), "position_ids": (B, S)},
        outputs={"[0]": (B, S, 7), "[2]": (B, S, 16)},
    )
    names = name_interface(spec, "optimum", {"in0": 7, "in2": 64})
    assert names.inputs[:3] == ("input_ids", "attention_mask", "position_ids")
    assert names.outputs[:2] == ("logits", "output.2")
    assert (names.tokens, names.logits) == ("input_ids", "logits")


def test_hidden_states_are_not_called_logits() -> None:
    spec = interface(["past[0][0]", "past[0][1]"], outputs={"[0]": (B, S, 16)})
    assert name_interface(spec, "optimum", {"in0": 7}).logits is None


def test_axes() -> None:
    assert axis_name(4) == 4
    assert axis_name(B) == "batch_size"
    assert axis_name(P + S) == "past_sequence_length + sequence_length"
    assert axis_name(E) == "encoder_sequence_length"
    assert axis_name(2 * B) == "2*batch_size"
    assert axis_name(size_symbol("frames")) == "frames"


def test_unknown_style() -> None:
    with pytest.raises(CacheFreeError, match="There are no names 'hf'"):
        name_interface(interface(["past"]), "hf", {})  # type: ignore[arg-type]


def test_steps() -> None:
    assert steps_of("past[0]['k'].x[12]") == ["past", 0, "k", "x", 12]
    assert steps_of("[1][0]") == [1, 0]
    assert steps_of("") == []


steps = st.one_of(
    st.integers(0, 3).map("[{}]".format),
    st.sampled_from(["['k']", "['value']", ".key", ".conv", "['a b']", ".self_attn"]),
)
paths = st.builds(
    lambda root, rest: root + "".join(rest),
    st.sampled_from(["past", "cache", "mems", "logits", "input_ids", "present"]),
    st.lists(steps, max_size=3),
)


@given(
    st.lists(paths, min_size=1, max_size=8, unique=True),
    st.sampled_from(["optimum", "genai", "model"]),
)
def test_names_are_unique_and_pairs_are_found(cache: list[str], style: Any) -> None:
    names: Names = name_interface(interface(cache), style, {"in0": 7})
    every = [*names.inputs, *names.outputs]
    assert len(set(every)) == len(every)
    assert all(name.isprintable() and " " not in name for name in every)
    assert len(names.inputs) == len(cache) + 1


@pytest.mark.parametrize(
    ("path", "dtype", "is_known"),
    [
        ("attention_mask", I64, True),
        ("inputs['mask']", torch.bool, True),
        ("token_types", I64, False),
        ("key_padding_mask", torch.bool, False),
        ("attention_mask", F32, False),
    ],
)
def test_what_a_mask_is(path: str, dtype: torch.dtype, is_known: bool) -> None:
    assert is_mask(InputSpec("mask", path, (B, P + S), dtype)) is is_known
    assert not is_mask(InputSpec("mask", path, (B, S), dtype))


@pytest.mark.parametrize(
    ("path", "is_known"),
    [
        ("position_ids", True),
        ("input_pos", True),
        ("cache_position", True),
        ("pos_tags", False),
        ("composer", False),
        ("relative_position_bias", False),
    ],
)
def test_what_positions_are(path: str, is_known: bool) -> None:
    assert is_position(InputSpec("x", path, (B, S), I64)) is is_known
    assert not is_position(InputSpec("x", path, (B, S), F32))


def test_a_mask_of_padding_has_no_usual_name() -> None:
    spec = interface(["past"], inputs={"input_ids": (B, S), "key_padding_mask": (B, P + S)})
    assert name_interface(spec, "optimum", {"in0": 7}).inputs[1] == "key_padding_mask"
