"""Attention that is causal for several tokens and unmasked for one."""

from __future__ import annotations

import sympy
import torch

from cachefree.rules.rule import Edit, Site
from cachefree.terms import Term

__all__ = ["OneTokenAttention"]

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


class OneTokenAttention:
    """Switches a causal flag off where there is one new token.

    Before: ``sdpa(q, k, v, is_causal=q.shape[2] > 1)``.

    After: ``sdpa(q, k, v, mask)`` with ``mask = (j <= i) | (S == 1)``.

    Why equal: torch aligns ``is_causal`` top left, which is ``j <= i``; at S = 1 the mask is true
    everywhere, and attention with such a mask is attention without one.
    """

    name = "causal flag for several tokens"
    neutral = "a mask that masks nothing for one token"

    def edit(self, site: Site) -> Edit | None:
        """Attention with a mask for attention with a causal flag; None where no flag differs."""
        other = site.divergence.other
        if other.op is not _SDPA or other.args[3] is not None or other.args[5]:
            return None
        for source in site.sources:
            if source.op is _SDPA and source.args[3] is None and source.args[5]:
                return Edit(source, self._masked(site, source))
        return None

    def _masked(self, site: Site, source: Term) -> Term:
        query, key = source.args[0], source.args[1]
        shape = (query.sizes[-2], key.sizes[-2])
        table, device, line = site.table, source.device, source.line
        every = table.make(
            "full", (shape, True, torch.bool, device), shape, torch.bool, device, line
        )
        causal = table.make(aten.tril.default, (every, 0), shape, torch.bool, device, line)
        length = sympy.sympify(shape[0])
        count = table.make(
            "arange", (length, 1, 1, torch.int64, device), (1,), torch.int64, device, line
        )
        single = table.make(aten.eq.Scalar, (count, 1), (1,), torch.bool, device, line)
        mask = table.make(
            aten.logical_or.default, (causal, single), shape, torch.bool, device, line
        )
        return table.like(
            source, _SDPA, (*source.args[:3], mask, source.args[4], False, *source.args[6:])
        )
