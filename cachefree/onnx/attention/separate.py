"""Joins and attentions as ``Attention`` with a past and a present, separate from one another."""

from __future__ import annotations

import logging

import torch
from torch import fx

from cachefree.onnx.attention.chain import NoSiteError
from cachefree.onnx.attention.editing import Writing
from cachefree.onnx.attention.kinds import KvGraph
from cachefree.onnx.attention.masking import with_blank_rows, without_blank_rows
from cachefree.onnx.attention.operands import Plain
from cachefree.onnx.attention.operators import onnx_node
from cachefree.onnx.attention.site import Site
from cachefree.spec import Interface

__all__ = ["with_attention"]

log = logging.getLogger(__name__)


def with_attention(module: fx.GraphModule, interface: Interface) -> KvGraph:
    """Writes joins and attentions as ``Attention`` with a past and a present (opset 23 on).

    Args:
        module: The one graph.
        interface: Its inputs and outputs.
    """
    writing = Writing(module, interface, "attention")
    for site in writing.sites():
        try:
            if not (site.key_layout.is_plain and site.value_layout.is_plain):
                raise NoSiteError("its rows are not (batch, heads, rows, size) in memory")
            if writing.shapes.dtype(site.query) not in (torch.float32, torch.float16):
                raise NoSiteError(f"Attention computes in float32, and it is in "
                                  f"{writing.shapes.dtype(site.query)}")  # fmt: skip
            _write_attention(writing, site)
        except NoSiteError as error:
            writing.refuse(site, str(error))
            continue
        for join in (site.keys, site.values):
            writing.report.kernels[join.slot.past.path] = "Attention"
    writing.finish()
    for path, reason in writing.report.reasons.items():
        log.info("%s is joined by Concat: %s", path, reason)
    return KvGraph(writing.module, interface, writing.report)


def _write_attention(writing: Writing, site: Site) -> None:
    mask, sight = writing.mask(site)
    graph, dtype = writing.graph, writing.shapes.dtype(site.query)
    with graph.inserting_before(site.result):
        is_blank = None
        if mask is not None and not sight.sees_itself:
            mask = writing.kept_low(site, mask, sight)
            mask, is_blank = without_blank_rows(graph, mask, dtype)
        plain = Plain(writing, site)
        bias = None if mask is None else plain.whole_rows(mask)
        inputs = [
            plain.query(), plain.rows(site.keys.new, site.key_layout),
            plain.rows(site.values.new, site.value_layout), bias,
            plain.rows(site.keys.past, site.key_layout),
            plain.rows(site.values.past, site.value_layout),
        ]  # fmt: skip
        present = (dtype, plain.present())
        result, keys, values = onnx_node(
            graph, "Attention", inputs, [(dtype, plain.result()), present, present],
            plain.attributes(),
        )  # fmt: skip
        if is_blank is not None:
            result = with_blank_rows(graph, is_blank, result, dtype, is_safe=site.is_safe)
        result = plain.as_result(result)
        presents = [
            plain.as_slot(keys, site.keys.slot.present.shape, site.key_layout),
            plain.as_slot(values, site.values.slot.present.shape, site.value_layout),
        ]
    writing.replace(site, result, presents)
