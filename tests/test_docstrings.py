"""The examples in docstrings are run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import cachefree

ROOT = Path(cachefree.__file__).parent


def modules_with_examples() -> list[str]:
    return sorted(
        ".".join(("cachefree", *path.relative_to(ROOT).with_suffix("").parts))
        for path in ROOT.rglob("*.py")
        if ">>> " in path.read_text()
    )


def test_there_are_examples() -> None:
    assert {"cachefree.rewrite", "cachefree.explain"} <= set(modules_with_examples())


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    failed, attempted = doctest.testmod(
        module, extraglobs={"cachefree": cachefree, "torch": torch}, report=True
    )
    assert attempted
    assert not failed
