"""Each rule on a decoder of one layer: it fires, is proved, and is right with and without past."""

from __future__ import annotations

from typing import Any

from torch import nn

import cachefree
from tests.assertions import equal_calls
from tests.models.case import anywhere, calls, tokens
from tests.small import rewritten_small, small

DRAWN = calls(tokens(12), cache="past")


class Case:
    """What `equal_calls` needs to know."""

    prefill = staticmethod(DRAWN["prefill"])
    step = staticmethod(DRAWN["step"])

    def __init__(self, domain: Any = anywhere) -> None:
        self.domain = domain


def closed_by(rule: Any, build: type[nn.Module], domain: Any = anywhere) -> cachefree.Rewritten:
    """The rewritten model, whose report names the rule, and which is the model in float64."""
    model = small(build).double()
    rewritten = rewritten_small(model)
    names = {branch.rule for branch in rewritten.report.branches}
    assert rule.name in names, f"closed by {names}"
    assert rewritten.report.verdict.is_proof
    assert equal_calls(Case(domain), model, rewritten) >= 20
    return rewritten


def refused(build: type[nn.Module]) -> cachefree.UnsupportedBranchError:
    """The refusal of a model that a rule must not close."""
    model = small(build)
    try:
        rewritten = rewritten_small(model)
    except cachefree.UnsupportedBranchError as error:
        return error
    raise AssertionError(f"accepted:\n{rewritten.report}")
