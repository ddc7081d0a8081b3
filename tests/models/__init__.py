"""Decoders as people write them, and decoders that must be refused."""

from __future__ import annotations

from . import (
    audio,
    containers,
    counted,
    dtypes,
    first_call,
    first_values,
    flags,
    from_inputs,
    gpt,
    masks,
    mems,
    mixed,
    neox,
    own_ways,
    positions,
    prefixes,
    recurrent,
    refused_branches,
    refused_inputs,
    refused_regimes,
    refused_states,
    rotary,
    running,
    sentinels,
    sinusoid,
    start_rows,
    streaming,
    transformer_xl,
    windows,
    wrapped,
)
from .case import ModelCase, RefusalCase

CASES: tuple[ModelCase, ...] = (
    *gpt.CASES,
    *rotary.CASES,
    *neox.CASES,
    *masks.CASES,
    *positions.CASES,
    *sinusoid.CASES,
    *mems.CASES,
    *transformer_xl.CASES,
    *containers.CASES,
    *sentinels.CASES,
    *flags.CASES,
    *windows.CASES,
    *dtypes.CASES,
    *wrapped.CASES,
    *audio.CASES,
    *mixed.CASES,
    *streaming.CASES,
    *recurrent.CASES,
    *running.CASES,
    *first_values.CASES,
    *from_inputs.CASES,
    *own_ways.CASES,
    *counted.CASES,
    *first_call.CASES,
    *prefixes.CASES,
    *start_rows.CASES,
)
REFUSALS: tuple[RefusalCase, ...] = (
    *refused_inputs.REFUSALS,
    *refused_branches.REFUSALS,
    *refused_regimes.REFUSALS,
    *refused_states.REFUSALS,
)

__all__ = ["CASES", "REFUSALS", "ModelCase", "RefusalCase"]
