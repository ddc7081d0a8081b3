"""What a cachefree ONNX file says of itself.

Verdict, domain and interface, as text that is parsed and never run.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from cachefree.errors import CacheFreeError, DomainError, Refusal
from cachefree.onnx.attention.kinds import KvGraph, KvReport
from cachefree.onnx.attention.layout import Layout
from cachefree.onnx.expressions import parse_expression
from cachefree.onnx.names import Names
from cachefree.sizes import expression
from cachefree.spec import CacheSlot, Condition, Domain, InputSpec, Interface, OutputSpec, Region

__all__ = [
    "CacheDescription",
    "FileDescription",
    "Neutral",
    "describe",
    "describe_cache",
    "describe_loop",
    "generates",
    "neutral_elements",
    "read_description",
    "read_loop",
]

FORMAT = "1"
_KEY = "cachefree."
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Neutral:
    """A neutral element: one value everywhere, or the values of one batch row.

    Attributes:
        fill: The value, where it is one; nothing is stored for an empty tensor.
        values: Otherwise the tensor for batch 1, which is repeated along its batch axis.
    """

    fill: float | int | bool = 0
    values: torch.Tensor | None = None

    def tensor(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The neutral element in a shape."""
        if self.values is None:
            return torch.full(tuple(shape), self.fill, dtype=dtype, device=device)
        return self.values.to(device).expand(tuple(shape)).contiguous()


@dataclass(frozen=True)
class CacheDescription:
    """How a file's cache grows, see ``kv`` of `to_onnx`.

    Attributes:
        report: The kind, and what became of each slot.
        layouts: Place of a slot that is a buffer → how the model lays it out.
        rows_apart: Whether several rows with a past and several new tokens are run one by one.
    """

    report: KvReport = field(default_factory=lambda: KvReport("concat"))
    layouts: Mapping[int, Layout] = field(default_factory=dict)
    rows_apart: bool = False


@dataclass(frozen=True)
class FileDescription:
    """What the file says.

    Attributes:
        interface: Inputs and outputs under their ONNX names.
        neutral: One neutral element a cache slot.
        verdict: The verdict when it was exported.
        tokens: The input that takes token ids.
        logits: The output that gives a score a token.
        vocabulary: The number of token ids; None where it is not known.
        cache: How the cache grows.
    """

    interface: Interface
    neutral: tuple[Neutral, ...]
    verdict: str
    tokens: str | None = None
    logits: str | None = None
    vocabulary: int | None = None
    cache: CacheDescription = field(default_factory=CacheDescription)


def describe_loop(beams: int, ends: Sequence[int]) -> dict[str, str]:
    """The metadata of a file that generates by itself: how many beams, and which ids end a row."""
    return {_KEY + "loop": json.dumps({"beams": beams, "ends": list(ends)})}


def read_loop(metadata: Mapping[str, str]) -> tuple[int, tuple[int, ...]]:
    """What `describe_loop` wrote."""
    told = json.loads(metadata[_KEY + "loop"])
    return int(told["beams"]), tuple(map(int, told.get("ends", ())))


def generates(metadata: Mapping[str, str]) -> bool:
    """Whether a file generates by itself."""
    return _KEY + "loop" in metadata


def describe_cache(graph: KvGraph) -> dict[str, str]:
    """The metadata of a file whose cache is no plain join: key → text."""
    said = {
        "kind": graph.report.kind,
        "kernels": graph.report.kernels,
        "reasons": graph.report.reasons,
        "rows_apart": graph.rows_apart,
        "buffers": [
            {"slot": place, "roles": list(layout.roles), "heads": layout.heads}
            for place, layout in graph.layouts.items()
        ],
    }
    return {_KEY + "kv": json.dumps(said)}


def _cache_of(text: str | None, slots: int) -> CacheDescription:
    if text is None:
        return CacheDescription()
    said = json.loads(text)
    layouts = {
        int(buffer["slot"]): Layout(tuple(map(str, buffer["roles"])), int(buffer["heads"]))
        for buffer in said["buffers"]
    }
    known = {"b", "k", "p", "d", "bk"}
    if any(not 0 <= place < slots or not known.issuperset(layout.roles)
           for place, layout in layouts.items()):  # fmt: skip
        raise ValueError("a buffer is of no slot, or has an unknown axis")
    report = KvReport(str(said["kind"]), dict(said["kernels"]), dict(said["reasons"]))
    return CacheDescription(report, layouts, bool(said["rows_apart"]))


def describe(
    interface: Interface,
    names: Names,
    neutral: Sequence[Neutral],
    verdict: str,
    vocabulary: Mapping[str, int],
) -> dict[str, str]:
    """The metadata of a file: key → text.

    Raises:
        CacheFreeError: a condition of the domain cannot be written so that it is read again as it
            is.
    """
    inputs = [
        _spec_text(spec, name) for spec, name in zip(interface.inputs, names.inputs, strict=True)
    ]
    outputs = [
        _spec_text(spec, name) for spec, name in zip(interface.outputs, names.outputs, strict=True)
    ]
    named_inputs = dict(zip((spec.name for spec in interface.inputs), names.inputs, strict=True))
    named_outputs = dict(zip((spec.name for spec in interface.outputs), names.outputs, strict=True))
    cache = [
        {
            "past": named_inputs[slot.past.name],
            "present": named_outputs[slot.present.name],
            "growing_axes": list(slot.growing_axes),
            "neutral": slot.neutral,
            **_neutral_text(element),
        }
        for slot, element in zip(interface.cache, neutral, strict=True)
    ]
    tokens = next(
        (spec for spec in interface.inputs if named_inputs[spec.name] == names.tokens), None
    )
    roles = {
        "tokens": names.tokens,
        "logits": names.logits,
        "vocabulary": vocabulary.get(tokens.name) if tokens else None,
    }
    regions = [_region_text(region) for region in interface.domain.regions]
    domain = {"regions": regions, "fixed": list(interface.domain.fixed)}
    return {
        _KEY + "format": FORMAT,
        _KEY + "verdict": verdict,
        _KEY + "domain": json.dumps(domain),
        _KEY + "interface": json.dumps(
            {"inputs": inputs, "outputs": outputs, "cache": cache, **roles}
        ),
    }


def read_description(metadata: Mapping[str, str], path: str) -> FileDescription:
    """The description in a file's metadata.

    Raises:
        CacheFreeError: the file has none, or one that this version cannot read.
    """
    if _KEY + "format" not in metadata:
        raise CacheFreeError(
            Refusal(
                f"{path} was not written by cachefree.to_onnx.",
                why=(
                    "It does not say which inputs are the cache, what a neutral cache is, or which"
                    " sizes are allowed."
                ),
                remedy=(
                    "Use onnxruntime.InferenceSession for it, or export the model with"
                    " cachefree.to_onnx."
                ),
            )
        )
    if metadata[_KEY + "format"] != FORMAT:
        raise CacheFreeError(
            Refusal(
                f"{path} has format {metadata[_KEY + 'format']!r}; this version of cachefree reads"
                f" {FORMAT!r}.",
                why="Another version of cachefree wrote it.",
                remedy="Use the version of cachefree that wrote it, or export the model again.",
            )
        )
    try:
        description = _parse(
            json.loads(metadata[_KEY + "interface"]),
            json.loads(metadata[_KEY + "domain"]),
            metadata[_KEY + "verdict"],
        )
        slots = len(description.interface.cache)
        cache = _cache_of(metadata.get(_KEY + "kv"), slots)
        return dataclasses.replace(description, cache=cache)
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        raise CacheFreeError(
            Refusal(
                f"The description in {path} cannot be read.",
                why=f"{type(error).__name__}: {error}",
                remedy="Export the model again with cachefree.to_onnx.",
            )
        ) from error


def _parse(interface: dict[str, Any], domain: dict[str, Any], verdict: str) -> FileDescription:
    inputs = [InputSpec(**_spec_fields(spec)) for spec in interface["inputs"]]
    outputs = [OutputSpec(**_spec_fields(spec)) for spec in interface["outputs"]]
    by_input = {spec.name: spec for spec in inputs}
    by_output = {spec.name: spec for spec in outputs}
    slots = [
        CacheSlot(
            by_input[slot["past"]],
            by_output[slot["present"]],
            tuple(slot["growing_axes"]),
            slot["neutral"],
        )
        for slot in interface["cache"]
    ]
    regions = [_region_of(region) for region in domain["regions"]]
    return FileDescription(
        Interface(
            tuple(inputs),
            tuple(outputs),
            tuple(slots),
            Domain(tuple(regions), tuple(domain["fixed"])),
        ),
        tuple(_neutral_of(slot, by_input[slot["past"]]) for slot in interface["cache"]),
        verdict,
        interface["tokens"],
        interface["logits"],
        interface["vocabulary"],
    )


def _region_text(region: Region) -> dict[str, Any]:
    facts: dict[bool, list[str]] = {False: [], True: []}
    for condition in region.conditions:
        facts[condition.is_implied].append(_fact_text(condition.fact))
    return {"name": region.name, "conditions": facts[False], "implied": facts[True]}


def _region_of(text: dict[str, Any]) -> Region:
    said = [Condition(parse_expression(fact)) for fact in text["conditions"]]
    implied = [Condition(parse_expression(fact), is_implied=True) for fact in text["implied"]]
    return Region(text["name"], (*implied, *said))


def _spec_text(spec: InputSpec | OutputSpec, name: str) -> dict[str, Any]:
    shape = [
        _fact_text(size) if isinstance(size, sympy.Basic) else int(size) for size in spec.shape
    ]
    dtype = str(spec.dtype).removeprefix("torch.")
    return {
        "name": name,
        "path": spec.path,
        "shape": shape,
        "dtype": dtype,
        "is_cache": spec.is_cache,
    }


def _spec_fields(text: dict[str, Any]) -> dict[str, Any]:
    shape = tuple(
        expression(parse_expression(size)) if isinstance(size, str) else size
        for size in text["shape"]
    )
    return {**text, "shape": shape, "dtype": _DTYPES[text["dtype"]]}


def _neutral_text(neutral: Neutral) -> dict[str, Any]:
    if neutral.values is None:
        return {"fill": neutral.fill if abs(neutral.fill) < float("inf") else str(neutral.fill)}
    values = neutral.values.detach().cpu().contiguous()
    raw = base64.b64encode(values.view(-1).view(torch.uint8).numpy().tobytes()).decode()
    return {"values": raw, "values_shape": list(values.shape)}


def _neutral_of(text: dict[str, Any], spec: InputSpec) -> Neutral:
    if "values" not in text:
        fill = text["fill"]
        return Neutral(float(fill) if isinstance(fill, str) else fill)
    raw = bytearray(base64.b64decode(text["values"]))
    return Neutral(values=torch.frombuffer(raw, dtype=spec.dtype).reshape(text["values_shape"]))


def _fact_text(fact: Any) -> str:
    text = str(fact)
    try:
        is_same = str(parse_expression(text)) == text
    except (ValueError, SyntaxError):
        is_same = False
    if not is_same:
        raise CacheFreeError(
            Refusal(
                f"The size expression {text} cannot be written into the file.",
                why="What is read from the file must be what was proved.",
                remedy="Please report the model; a domain with simpler sizes can be exported.",
            )
        )
    return text


def neutral_elements(
    one: Sequence[torch.Tensor], two: Sequence[torch.Tensor], past: Sequence[str]
) -> list[Neutral]:
    """The neutral elements, read off the neutral cache.

    Args:
        one: The neutral cache for batch 1.
        two: The same for batch 2; it must repeat the first row.
        past: The paths of the slots, for the message.

    Raises:
        DomainError: rows of the batch start from different values.
    """
    elements = []
    for row, rows, path in zip(one, two, past, strict=True):
        if row.numel() == 0:
            elements.append(Neutral())
        elif bool((row == row.flatten()[0]).all()):
            elements.append(Neutral(row.flatten()[0].item()))
        elif bool(torch.equal(row.expand(rows.shape), rows)):
            elements.append(Neutral(values=row.detach().cpu()))
        else:
            raise DomainError(
                Refusal(f"The neutral value of {path} is not the same for each row of a batch.")
            )
    return elements
