"""From paths in the model's call to the names of an ONNX file, mechanical and unique.

``past_key_values[3][1]`` becomes ``past_key_values.3.value`` and its next value
``present.3.value``. A structure that is none of the known ones keeps the argument's own path:
``mems[0]`` is ``mems.0``, and comes out as ``present.mems.0``. So the next cache is always found by
name alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy

from cachefree.errors import CacheFreeError, Refusal
from cachefree.spec import CacheSlot, InputSpec, Interface

__all__ = ["Names", "Style", "axis_name", "name_interface"]

Style = Literal["optimum", "genai", "model"]

_AXES = {
    "batch": "batch_size",
    "query": "sequence_length",
    "past": "past_sequence_length",
    "encoder": "encoder_sequence_length",
    "past_encoder": "past_encoder_sequence_length",
}
_KEY, _VALUE = {"k", "key", "keys"}, {"v", "value", "values"}
_STATES = {"conv": {"conv"}, "recurrent": {"recurrent", "ssm", "rnn"}}
_CROSS = {"cross", "encoder", "memory"}


@dataclass(frozen=True)
class Names:
    """The names of one ONNX file.

    Attributes:
        inputs: One for each input of the interface, in order.
        outputs: One for each output, in order.
        tokens: The input that takes token ids; None where there is none.
        logits: The output that gives a score a token; None where there is none.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tokens: str | None = None
    logits: str | None = None


def axis_name(size: Any) -> Any:
    """The name of an axis.

    An int stays one, ``past + query`` is ``past_sequence_length + sequence_length``.
    """
    if not isinstance(size, sympy.Basic) or size.is_Integer:
        return int(size)
    names = {
        symbol: sympy.Symbol(_AXES.get(str(symbol), str(symbol))) for symbol in size.free_symbols
    }
    return str(size.xreplace(names))


def name_interface(interface: Interface, style: Style, vocabulary: Mapping[str, int]) -> Names:
    """Names every input and output.

    Args:
        interface: What goes in and comes out.
        style: ``"optimum"``, ``"genai"``, or ``"model"`` for the arguments' own paths.
        vocabulary: Input name → rows of the table that its ids are looked up in
            (`vocabulary_sizes`).

    Raises:
        CacheFreeError: an unknown style.
    """
    if style not in ("optimum", "genai", "model"):
        raise CacheFreeError(
            Refusal(
                f"There are no names {style!r}.", remedy='Use names="optimum", "genai" or "model".'
            )
        )
    tokens = _token_input(interface, vocabulary)
    logits = _logits_output(
        interface, vocabulary.get(interface.inputs[tokens].name) if tokens is not None else None
    )
    every = (*interface.cache, *interface.crossing)
    slots = _slot_names(every, style)
    pasts = {slot.past.name: past for slot, (past, _) in zip(every, slots, strict=True)}
    presents = {slot.present.name: present for slot, (_, present) in zip(every, slots, strict=True)}
    inputs = [pasts.get(spec.name) or dotted(spec.path, "input") for spec in interface.inputs]
    outputs = [presents.get(spec.name) or dotted(spec.path, "output") for spec in interface.outputs]
    if style != "model":
        _give_roles(interface, inputs, outputs, tokens, logits)
    unique = _unique([*inputs, *outputs])
    inputs, outputs = unique[: len(inputs)], unique[len(inputs) :]
    return Names(
        tuple(inputs),
        tuple(outputs),
        None if tokens is None else inputs[tokens],
        None if logits is None else outputs[logits],
    )


def dotted(path: str, root: str) -> str:
    """A path with dots, ``past['layers'][0].k`` as ``past.layers.0.k``.

    ``root`` in front where it has no name.
    """
    steps = steps_of(path)
    if not steps or isinstance(steps[0], int):
        steps = [root, *steps]
    return ".".join(re.sub(r"\W+", "_", str(step)).strip("_") or "_" for step in steps)


_STEP = re.compile(r"\[(\d+)\]|\[(['\"])(.*?)\2\]|\[(.*?)\]|\.?(\w+)")


def steps_of(path: str) -> list[int | str]:
    """The parts of a path: names, keys and indices."""
    steps: list[int | str] = []
    for index, _, key, other, name in _STEP.findall(path):
        steps.append(int(index) if index else key or other or name)
    return steps


def _token_input(interface: Interface, vocabulary: Mapping[str, int]) -> int | None:
    """The first input that is looked up; one that is called so comes first."""
    looked_up = [
        (0 if re.search(r"input_ids|^ids$|token", spec.path) else 1, place)
        for place, spec in enumerate(interface.inputs)
        if not spec.is_cache
        and spec.name in vocabulary
        and not re.search(r"pos|type|segment|mask", spec.path)
    ]
    return min(looked_up)[1] if looked_up else None


def _logits_output(interface: Interface, vocabulary: int | None) -> int | None:
    """The output that is called logits, else the first with a score for each token."""
    free = [(place, spec) for place, spec in enumerate(interface.outputs) if not spec.is_cache]
    for place, spec in free:
        if steps_of(spec.path)[-1:] == ["logits"]:
            return place
    for place, spec in free:
        if (
            vocabulary is not None
            and spec.dtype.is_floating_point
            and spec.shape[-1:] == (vocabulary,)
        ):
            return place
    return None


def _give_roles(
    interface: Interface,
    inputs: list[str],
    outputs: list[str],
    tokens: int | None,
    logits: int | None,
) -> None:
    """Gives inputs and outputs their usual names, where nothing else has them."""
    if tokens is not None and not {"input_ids", "inputs_embeds"} & set(inputs):
        inputs[tokens] = "input_ids"
    masks = [
        place
        for place, spec in enumerate(interface.inputs)
        if not spec.is_cache
        and _is_mask(spec)
        and len(spec.shape) == 2
        and _counts_past(spec.shape[1])
    ]
    if len(masks) == 1 and "attention_mask" not in inputs:
        inputs[masks[0]] = "attention_mask"
    if not interface.cache:
        _name_encoder_mask(interface, inputs)
    slots = (*interface.cache, *interface.crossing)
    rows = {size for slot in slots if _is_encoder(slot) for size in _rows(slot)}
    for place, spec in enumerate(interface.inputs):
        is_encoders = len(spec.shape) == 2 and spec.shape[1] in rows and _is_mask(spec)
        if is_encoders and "encoder_attention_mask" not in inputs:
            inputs[place] = "encoder_attention_mask"
    if logits is not None and "logits" not in outputs:
        outputs[logits] = "logits"


def _name_encoder_mask(interface: Interface, inputs: list[str]) -> None:
    """Gives the one mask over an encoder's tokens its usual name."""
    masks = [
        place
        for place, spec in enumerate(interface.inputs)
        if len(spec.shape) == 2 and _is_mask(spec)
    ]
    if len(masks) == 1 and "attention_mask" not in inputs:
        inputs[masks[0]] = "attention_mask"


def _is_mask(spec: InputSpec) -> bool:
    """Whether it is named as a mask; of padding, it says the opposite of what clients give."""
    return "mask" in spec.path and "pad" not in spec.path


def _rows(slot: CacheSlot) -> list[Any]:
    """The sizes of the slot's next value where it is the encoder's rows."""
    return [slot.present.shape[axis] for axis in slot.growing_axes]


def _counts_past(size: Any) -> bool:
    return isinstance(size, sympy.Add) and any(
        "past" in str(symbol) for symbol in size.free_symbols
    )


def _slot_names(slots: Sequence[CacheSlot], style: Style) -> list[tuple[str, str]]:
    """A name for the past and one for the present of each slot."""
    own = [dotted(slot.past.path, "past") for slot in slots]
    if style == "model":
        return [
            (past, dotted(slot.present.path, "output"))
            for past, slot in zip(own, slots, strict=True)
        ]
    roles = [role for reading in _READINGS if (role := reading(slots)) is not None]
    tails: list[str | None] = roles[0] if roles else [None] * len(slots)
    states = "past" if style == "genai" else "past_key_values"
    return [
        (
            (past, f"present.{past}")
            if tail is None
            else (f"{states if _is_state(tail) else 'past_key_values'}.{tail}", f"present.{tail}")
        )
        for past, tail in zip(own, tails, strict=True)
    ]


def _is_state(tail: str) -> bool:
    return tail.rsplit(".", 1)[-1] in _STATES


def _named_kinds(slots: Sequence[CacheSlot]) -> list[str | None] | None:
    """Structures that say what they hold.

    ``cache['k'][0]``, ``layers[0].value``, ``key_cache[1]``.
    """
    return _tails(slots, [_kind_in_words(slot) for slot in slots])


def _paired_kinds(slots: Sequence[CacheSlot]) -> list[str | None] | None:
    """``past[layer][0 or 1]``: the key and the value; 2 and 3 are those of the encoder."""
    paths = [steps_of(slot.past.path) for slot in slots]
    sizes = Counter(str(path[:-1]) for path in paths)
    kinds = []
    for slot, path in zip(slots, paths, strict=True):
        last, width = path[-1], sizes[str(path[:-1])]
        has_layer = any(isinstance(step, int) for step in path[:-1])
        is_wide = width == 2 or (width == 4 and _holds_encoder(slots))
        is_pair = isinstance(last, int) and has_layer and is_wide
        kinds.append(("key", "value")[int(last) % 2] if is_pair and slot.growing_axes else None)
    return _tails(slots, kinds)


def _transposed_kinds(slots: Sequence[CacheSlot]) -> list[str | None] | None:
    """``past[0 or 1][layer]``: all keys, then all values."""
    paths = [steps_of(slot.past.path) for slot in slots]
    outer = {path[1] for path in paths if len(path) == 3}
    if outer != {0, 1} or any(len(path) != 3 for path in paths):
        return None
    return _tails(slots, [("key", "value")[int(path[1])] for path in paths], layer=2)


_READINGS: tuple[Callable[[Sequence[CacheSlot]], list[str | None] | None], ...] = (
    _named_kinds,
    _paired_kinds,
    _transposed_kinds,
)


def _tails(
    slots: Sequence[CacheSlot], kinds: Sequence[str | None], layer: int = -1
) -> list[str | None] | None:
    """``{layer}.{kind}`` of each slot.

    None where that tells two slots by one name, or is known of none.
    """
    tails: list[str | None] = []
    has_encoder = _holds_encoder(slots)
    for slot, kind in zip(slots, kinds, strict=True):
        steps = steps_of(slot.past.path)
        numbers = [step for step in steps if isinstance(step, int)]
        number = steps[layer] if layer >= 0 else next(iter(numbers), None)
        if kind is None or number is None:
            tails.append(None)
        elif has_encoder and kind in ("key", "value"):
            tails.append(f"{number}.{'encoder' if _is_encoder(slot) else 'decoder'}.{kind}")
        else:
            tails.append(f"{number}.{kind}")
    known = [tail for tail in tails if tail is not None]
    return tails if known and len(set(known)) == len(known) else None


def _kind_in_words(slot: CacheSlot) -> str | None:
    words = [_words(step) for step in steps_of(slot.past.path) if isinstance(step, str)]
    for found in reversed(words):
        if bool(found & _KEY) != bool(found & _VALUE):
            return "key" if found & _KEY else "value"
        for kind, known in _STATES.items():
            if found & known:
                return kind
    return None


def _words(step: str) -> set[str]:
    return set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", step).lower()))


def _is_encoder(slot: CacheSlot) -> bool:
    sizes = [slot.past.shape[axis] for axis in slot.growing_axes]
    symbols = {str(symbol) for size in sizes for symbol in getattr(size, "free_symbols", ())}
    named = [_words(step) for step in steps_of(slot.past.path)[1:] if isinstance(step, str)]
    return (
        any("encoder" in symbol for symbol in symbols)
        or any(words & _CROSS for words in named)
        or _is_filled_once(slot)
    )


def _is_filled_once(slot: CacheSlot) -> bool:
    """Whether the slot's next value has as many rows after every call: those of an encoder."""
    rows = [sympy.sympify(size) for size in _rows(slot)]
    return bool(rows) and all(size.is_Symbol and "past" not in str(size) for size in rows)


def _holds_encoder(slots: Sequence[CacheSlot]) -> bool:
    return any(_is_encoder(slot) for slot in slots)


def _unique(names: Sequence[str]) -> list[str]:
    """The names, a number behind each that was there before."""
    taken: set[str] = set()
    result = []
    for name in names:
        candidate, number = name, 1
        while candidate in taken:
            candidate, number = f"{name}_{number}", number + 1
        taken.add(candidate)
        result.append(candidate)
    return result
