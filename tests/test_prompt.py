"""Models that are written at a prompt or in a notebook: their code has no file on a disk."""

from __future__ import annotations

import linecache
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

import cachefree

from .models.case import seeded
from .small import rewritten_small

IMPORTS = "import torch\nfrom tests.small import Small\n"

ONE_TOKEN = """
class Decoder(Small):
    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        if ids.shape[1] == 1:
            logits = logits * 2
        return logits, present
"""

COUNTS = """
CALLS = [0]

class Decoder(Small):
    def forward(self, ids, past=None):
        CALLS[0] += 1
        logits, present = super().forward(ids, past)
        return (logits * 2 if CALLS[0] > 90 else logits), present
"""

IN_TEXT = """
class Decoder(Small):
    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        return (logits * 2 if f"{ids.shape[1]}" == "7" else logits), present
"""

BRANCHES = """
class Decoder(Small):
    def forward(self, ids, past=None):
        logits, (k, v) = super().forward(ids, past)
        size = 0 if past is None else 1
        return logits, (k, v)
"""

FILES = ["<stdin>", "<string>", "<ipython-input-3-a1b2>", "/somewhere/ipykernel_7/12.py"]


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    linecache.cache.pop(request.param, None)


def decoder(source: str, file: str, *, home: str = "__main__", is_registered: bool = False) -> Any:
    """The model that a source defines, in a module that has no file."""
    text = IMPORTS + source
    module = types.ModuleType(home)
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    if is_registered:
        sys.modules[home] = module
    exec(compile(text, file, "exec"), vars(module))
    return seeded(module.Decoder)()


def line_of(text: str, source: str) -> int:
    (found,) = [n for n, line in enumerate((IMPORTS + source).splitlines(), 1) if text in line]
    return found


def test_a_refusal_names_the_line_of_the_cell(file: str) -> None:
    with pytest.raises(cachefree.UnsupportedBranchError) as caught:
        rewritten_small(decoder(ONE_TOKEN, file))
    assert f"{file}:{line_of('logits * 2', ONE_TOKEN)} in forward" in str(caught.value)
    assert f"asked for at {file}:{line_of('== 1', ONE_TOKEN)}" in str(caught.value)


def test_branches_of_a_cell_are_named(file: str) -> None:
    report = rewritten_small(decoder(BRANCHES, file)).report
    found = {(branch.where.file, branch.where.line, branch.condition) for branch in report.branches}
    assert (file, line_of("size = 0", BRANCHES), "past is None") in found


@pytest.mark.parametrize("is_registered", [True, False])
def test_a_global_of_a_cell_that_a_call_changes_is_refused(is_registered: bool) -> None:
    home = "cells_of_a_notebook"
    model = decoder(COUNTS, "<stdin>", home=home, is_registered=is_registered)
    try:
        with pytest.raises(cachefree.CacheFreeError, match="CALLS"):
            rewritten_small(model)
    finally:
        sys.modules.pop(home, None)
    assert sys.modules["torch"]


def test_a_size_in_a_text_of_a_cell_is_refused(file: str) -> None:
    with pytest.raises(cachefree.CacheFreeError, match=r"frozen|text"):
        rewritten_small(decoder(IN_TEXT, file))
