"""The past and the present of a slot as one buffer of a fixed capacity: nothing is copied.

Two kernels do that. ``GroupQueryAttention`` lets no token see a later one, so it is taken where the
mask was shown to hide them; it reads the rows that are there and no others. ``TensorScatter`` with
``Attention`` takes any mask, and reads the whole buffer. Both write the new rows where the past
ends, which the file takes as an input, ``past_length``.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections import Counter
from typing import Any

import sympy
import torch
from torch import fx

from cachefree.onnx.attention.chain import NoSiteError
from cachefree.onnx.attention.editing import Writing
from cachefree.onnx.attention.kinds import KvGraph
from cachefree.onnx.attention.layout import Layout
from cachefree.onnx.attention.masking import with_blank_rows, without_blank_rows
from cachefree.onnx.attention.operands import Plain, expanded
from cachefree.onnx.attention.operators import onnx_node
from cachefree.onnx.attention.rows import rows_are_apart
from cachefree.onnx.attention.site import Site
from cachefree.onnx.attention.values import SizeNodes
from cachefree.onnx.program import CAPACITY
from cachefree.sizes import size_symbol
from cachefree.spec import CacheSlot, InputSpec, Interface

__all__ = ["GROUPED", "LENGTH", "SCATTERED", "with_shared"]

log = logging.getLogger(__name__)
aten = torch.ops.aten
_CAPACITY = size_symbol(CAPACITY)
LENGTH = "past_length"
GROUPED = "GroupQueryAttention"
SCATTERED = "TensorScatter, Attention"
_BATCH = size_symbol("batch")
_GROUPED_SIZES = 8  # the kernel refuses heads of other sizes than multiples of this


def with_shared(module: fx.GraphModule, interface: Interface) -> KvGraph:
    """Writes joins and attentions over shared buffers.

    Args:
        module: The one graph.
        interface: Its inputs and outputs.

    Returns:
        A graph whose slots that are buffers are (B, K, C, D), C their capacity, with one more
        input behind the others, of P elements: `past_length` in the file.
    """
    writing = Writing(module, interface, "shared")
    is_apart = rows_are_apart(writing.module, interface, writing.shapes)
    sites = _of_one_length(writing, writing.sites())
    marker = _add_length(writing, sites) if sites else None
    layouts: dict[int, Layout] = {}
    has_grouped = False
    for site in sites:
        try:
            kernel = _write(writing, site, is_apart)
        except NoSiteError as error:
            writing.refuse(site, str(error))
            continue
        has_grouped |= kernel == GROUPED
        for join, layout in ((site.keys, site.key_layout), (site.values, site.value_layout)):
            writing.report.kernels[join.slot.past.path] = kernel
            layouts[join.place] = layout
    for path, reason in writing.report.reasons.items():
        log.info("%s is joined by Concat: %s", path, reason)
    if not layouts:
        if marker is not None:
            writing.finish()
            writing.graph.erase_node(marker)
        writing.finish()
        return KvGraph(writing.module, interface, writing.report)
    assert marker is not None
    _read_sizes_elsewhere(writing, layouts, marker)
    writing.finish()
    changed = _interface(interface, layouts)
    return KvGraph(writing.module, changed, writing.report, layouts, has_grouped)


def _of_one_length(writing: Writing, sites: list[Site]) -> list[Site]:
    """The sites whose past is the one that most have: a file has one length."""
    lengths = Counter(site.keys.slot.past.shape[site.keys.slot.growing_axes[0]] for site in sites)
    if not lengths:
        return []
    most = lengths.most_common(1)[0][0]
    kept = []
    for site in sites:
        if site.keys.slot.past.shape[site.keys.slot.growing_axes[0]] == most:
            kept.append(site)
        else:
            writing.refuse(site, "its past has another length than that of other slots")
    return kept


def _add_length(writing: Writing, sites: list[Site]) -> fx.Node:
    """A further input, whose length is that of the past."""
    slot = sites[0].keys.slot
    with writing.graph.inserting_after(writing.sizes.placeholders[-1]):
        marker = writing.graph.placeholder(LENGTH)
    length = slot.past.shape[slot.growing_axes[0]]
    with writing.shapes.mode:
        size = writing.shapes.value(sites[0].keys.past).shape[slot.growing_axes[0]]
        writing.shapes.values[marker] = torch.empty((size,), dtype=torch.bool)
    writing.sizes.placeholders.append(marker)
    if writing.sizes.last is writing.sizes.placeholders[-2]:
        writing.sizes.last = marker
    del length
    return marker


def _write(writing: Writing, site: Site, is_apart: bool) -> str:
    dtype = writing.shapes.dtype(site.query)
    if dtype not in (torch.float32, torch.float16):
        raise NoSiteError(f"no kernel computes it in {dtype}")
    mask, sight = writing.mask(site)
    with writing.graph.inserting_before(site.result):
        kept = mask if mask is None else writing.kept_low(site, mask, sight)
        size = int(site.keys.slot.past.shape[site.key_layout.roles.index("d")])
        is_low, is_blank = kept is not mask, None
        if kept is not None and not sight.sees_itself:
            kept, is_blank = without_blank_rows(writing.graph, kept, dtype)
        if sight.hides_future and not is_low and is_apart and size % _GROUPED_SIZES == 0:
            _write_grouped(writing, site, kept, is_blank, is_causal=sight.is_causal)
            return GROUPED
        _write_scattered(writing, site, kept, is_blank)
        return SCATTERED


def _write_grouped(
    writing: Writing,
    site: Site,
    mask: fx.Node | None,
    is_blank: fx.Node | None,
    *,
    is_causal: bool,
) -> None:
    graph, plain = writing.graph, Plain(writing, site)
    dtype = writing.shapes.dtype(site.query)
    call = graph.call_function
    batch, tokens = (writing.sizes.node(size) for size in (plain.batch, plain.tokens))
    length = writing.sizes.node(plain.length)
    size, heads, own = plain.size, site.heads, site.key_layout.heads

    def packed(node: fx.Node, count: int) -> fx.Node:
        turned = call(aten.transpose.int, (node, 1, 2))
        return call(aten.reshape.default, (turned, [batch, tokens, count * size]))

    total = call(aten.scalar_tensor.default, (length,), {"dtype": torch.int32})
    last = call(aten.sub.Tensor, (total, 1))
    inputs = [
        packed(plain.query(), heads),
        packed(plain.rows(site.keys.new, site.key_layout), own),
        packed(plain.rows(site.values.new, site.value_layout), own),
        site.keys.past, site.values.past,
        call(aten.expand.default, (call(aten.reshape.default, (last, [1])), [batch])),
        call(aten.reshape.default, (total, [1])),
        None, None, None,
        None if mask is None or is_causal else plain.whole_rows(mask),
    ]  # fmt: skip
    present = (dtype, _buffer(writing, site))
    result, keys, values = onnx_node(
        graph, GROUPED, inputs, [(dtype, [batch, tokens, heads * size]), present, present],
        {"num_heads": heads, "kv_num_heads": own, **plain.attributes()}, "com.microsoft",
    )  # fmt: skip
    apart = call(aten.reshape.default, (result, [batch, tokens, heads, size]))
    result = call(aten.transpose.int, (apart, 1, 2))
    if is_blank is not None:
        result = with_blank_rows(graph, is_blank, result, dtype, is_safe=site.is_safe)
    writing.replace(site, plain.as_result(result), (keys, values))


def _write_scattered(
    writing: Writing, site: Site, mask: fx.Node | None, is_blank: fx.Node | None
) -> None:
    graph, plain = writing.graph, Plain(writing, site)
    dtype = writing.shapes.dtype(site.query)
    call = graph.call_function
    batch = writing.sizes.node(plain.batch)
    past = plain.length - plain.tokens
    counts = []
    for size in (past, plain.length):
        number = writing.sizes.node(size)
        count = call(aten.scalar_tensor.default, (number,), {"dtype": torch.int64})
        count = call(aten.reshape.default, (count, [1]))
        counts.append(call(aten.expand.default, (count, [batch])))
    buffers = []
    for join, layout in ((site.keys, site.key_layout), (site.values, site.value_layout)):
        new = plain.rows(join.new, layout)
        buffers += onnx_node(
            graph, "TensorScatter", [join.past, new, counts[0]],
            [(dtype, _buffer(writing, site))], {"axis": 2},
        )  # fmt: skip
    bias = None if mask is None else _to_the_end(writing, site, plain, mask, dtype)
    inputs = [plain.query(), *buffers, bias, None, None, counts[1]]
    (result,) = onnx_node(graph, "Attention", inputs, [(dtype, plain.result())], plain.attributes())
    if is_blank is not None:
        result = with_blank_rows(graph, is_blank, result, dtype, is_safe=site.is_safe)
    writing.replace(site, plain.as_result(result), buffers)


def _to_the_end(
    writing: Writing, site: Site, plain: Plain, mask: fx.Node, dtype: torch.dtype
) -> fx.Node:
    """A mask with columns for the rows of the buffer that are not there yet: they are hidden."""
    graph, call = writing.graph, writing.graph.call_function
    whole = expanded(writing, mask, plain.tokens, plain.length)
    shape = writing.shapes.of(whole)
    lead = [writing.sizes.node(size) for size in shape[:-1]]
    end = call(torch.ops.aten.sym_size.int, (site.keys.past, 2))
    rest = call(operator.sub, (end, writing.sizes.node(plain.length)))
    hidden = graph.call_function(
        aten.full.default, ([*lead, rest], float("-inf")), {"dtype": dtype}
    )
    return call(aten.cat.default, ((whole, hidden), -1))


def _buffer(writing: Writing, site: Site) -> list[Any]:
    """The sizes of a buffer."""
    graph = writing.graph
    batch = writing.sizes.node(_BATCH)
    capacity = graph.call_function(torch.ops.aten.sym_size.int, (site.keys.past, 2))
    size = int(site.keys.slot.past.shape[site.key_layout.roles.index("d")])
    return [batch, site.key_layout.heads, capacity, size]


def _read_sizes_elsewhere(writing: Writing, layouts: dict[int, Layout], marker: fx.Node) -> None:
    """Reads from other inputs the sizes that were read from slots which are buffers now."""
    interface, graph = writing.interface, writing.graph
    names = {interface.cache[place].past.name: place for place in layouts}
    placeholders = writing.sizes.placeholders[: len(interface.inputs)]
    buffers = {
        node: interface.cache[names[spec.name]].past
        for node, spec in zip(placeholders, interface.inputs, strict=True)
        if spec.name in names
    }
    kept: list[InputSpec] = [
        dataclasses.replace(spec, shape=() if spec.name in names else spec.shape)
        for spec in interface.inputs
    ]
    slot = next(iter(buffers.values()))
    place = next(place for place in layouts)
    rows = interface.cache[place].past.shape[interface.cache[place].growing_axes[0]]
    del slot
    kept.append(InputSpec(LENGTH, LENGTH, (rows,), torch.bool))
    elsewhere = SizeNodes(graph, dataclasses.replace(interface, inputs=tuple(kept)))
    first = next(iter(buffers))
    elsewhere.read.setdefault(_BATCH, (first, 0))
    for node, spec in buffers.items():
        for user in list(node.users):
            if user.op == "call_method" and user.target == "size":
                size = sympy.sympify(spec.shape[int(user.args[1])])
                found = elsewhere.node(size)
                user.replace_all_uses_with(found)
                graph.erase_node(user)


def _interface(interface: Interface, layouts: dict[int, Layout]) -> Interface:
    """The interface of the file: buffers, and the length of the past."""
    changed: dict[str, tuple[Any, ...]] = {}
    cache = []
    for place, slot in enumerate(interface.cache):
        if place in layouts:
            size = slot.past.shape[layouts[place].roles.index("d")]
            shape = (_BATCH, layouts[place].heads, _CAPACITY, size)
            changed[slot.past.name] = changed[slot.present.name] = shape
            slot = CacheSlot(
                dataclasses.replace(slot.past, shape=shape),
                dataclasses.replace(slot.present, shape=shape), (2,), slot.neutral,
            )  # fmt: skip
            rows = interface.cache[place].past.shape[interface.cache[place].growing_axes[0]]
        cache.append(slot)
    inputs = [
        dataclasses.replace(spec, shape=changed.get(spec.name, spec.shape))
        for spec in interface.inputs
    ]
    outputs = [
        dataclasses.replace(spec, shape=changed.get(spec.name, spec.shape))
        for spec in interface.outputs
    ]
    inputs.append(InputSpec(LENGTH, LENGTH, (rows,), torch.bool))
    return Interface(tuple(inputs), tuple(outputs), tuple(cache), interface.domain)
