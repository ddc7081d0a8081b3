"""What holds of every rule."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import sympy
import torch

from cachefree.align import Divergence
from cachefree.rules import RULES, Rule, Site, replaced
from cachefree.sizes import size_symbol
from cachefree.terms import Table, topological

PAST = size_symbol("past")
CPU = torch.device("cpu")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_rule_is_named_explained_and_tested(rule: Rule) -> None:
    assert rule.name == rule.name.lower()
    assert rule.neutral
    text = inspect.getdoc(type(rule)) or ""
    for block in ("Before:", "After:", "Why equal:"):
        assert block in text, block
    home = Path(inspect.getfile(type(rule)))
    assert (Path(__file__).parent / f"test_{home.stem}.py").exists()


def test_rules_have_names_of_their_own() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_no_rule_matches_what_is_none_of_its_business(rule: Rule) -> None:
    table = Table()
    x = table.input("x", (2, PAST, 4), torch.float32, CPU)
    gelu = table.like(x, torch.ops.aten.gelu.default, (x, "none"))
    relu = table.like(x, torch.ops.aten.relu.default, (x,))
    assert rule.edit(Site(table, Divergence(gelu, relu), (gelu,), (PAST,))) is None
    assert rule.edit(Site(table, Divergence(gelu, relu), (), (PAST,))) is None


def test_edits_are_made_below_every_use() -> None:
    aten = torch.ops.aten
    table = Table()
    x = table.input("x", (sympy.Integer(2), 4), torch.float32, CPU)
    inner = table.like(x, aten.neg.default, (x,))
    outer = table.like(x, aten.exp.default, (inner,))
    both = table.like(x, aten.add.Tensor, (inner, outer, 1))
    around = table.like(x, aten.abs.default, (inner,))
    again = table.like(x, aten.sin.default, (outer,))
    (result,) = replaced(table, (both,), {inner: around, outer: again})
    names = [term.name for term in topological([result])]
    assert names == ["input", "neg.default", "abs.default", "exp.default", "sin.default",
                     "add.Tensor"]  # fmt: skip
    assert replaced(table, (both,), {}) == (both,)
