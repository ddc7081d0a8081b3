"""`explain` says why a model is refused and which change helps; the changes do help."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import cachefree
from cachefree.advice import Change, apply

from .assertions import Unchanged
from .small import IDS, Small, rewritten_small, small

HEAD = """
import torch
import torch.nn.functional as F
from tests.small import Small


class Model(Small):
"""

# name → (the model, part of the refusal, a line of the change)
REFUSED = {
    "a path for one token": (
        """
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            if ids.shape[1] == 1:
                logits = logits * 2
            else:
                logits = (
                    logits + 1
                )
            return logits, present
        """,
        "compute different things",
        "-        if ids.shape[1] == 1:",
    ),
    "dropout of a function": (
        """
        def attend(self, q, k):
            return F.dropout(super().attend(q, k), p=0.1)
        """,
        "draws random numbers",
        "+        return F.dropout(super().attend(q, k), p=0.1, training=self.training)",
    ),
    "a length that is read from values": (
        """
        def forward(self, ids, past=None):
            n = int(ids.ne(0).sum(dim=1).max().item())
            return super().forward(ids[:, :n], past)
        """,
        "values of a tensor",
        "+        n = ids.shape[1]",
    ),
    "a factor that is read from values": (
        """
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            return logits * float(self.out.bias.abs().max().item()), present
        """,
        "values of a tensor",
        "+        return logits * self.out.bias.abs().max(), present",
    ),
    "a write to the cache": (
        """
        def forward(self, ids, past=None):
            if past is not None:
                k, v = past
                k.mul_(1.0)
                past = (k, v)
            return super().forward(ids, past)
        """,
        "writes in place to 'past[0]'",
        "+            k = k.mul(1.0)",
    ),
    "the last row of the first call only": (
        """
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            if past is None:
                logits = logits[:, -1:]
            return logits, present
        """,
        "compute different things",
        "-        if past is None:",
    ),
    "the length of another axis": (
        """
        def forward(self, ids, past=None):
            start = past[0].shape[2] if past is not None else 0
            logits, present = super().forward(ids, past)
            at = torch.arange(start, start + ids.shape[1])
            return logits + self.pos(at).sum(-1, keepdim=True), present
        """,
        "compute different things",
        "+        start = past[0].shape[1] if past is not None else 0",
    ),
    "a cache that is not returned": (
        """
        def forward(self, ids, past=None):
            x = self.emb(ids)
            k = x if past is None else torch.cat([past, x], dim=1)
            return self.out(self.attend(x, k) @ k)
        """,
        "No argument of Model.forward carries a cache",
        "+        return self.out(self.attend(x, k) @ k), k",
    ),
}


def model_of(source: str, file: Path, *, training: bool = False) -> Any:
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return small(module.Model).train(training)


def source_of(body: str) -> str:
    return HEAD.lstrip() + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ") + "\n"


QUICK = ("a path for one token", "a cache that is not returned")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in REFUSED],
)
def test_the_change_that_is_shown_makes_it_go(name: str, tmp_path: Path) -> None:
    body, refusal, line = REFUSED[name]
    source = source_of(body)
    model = model_of(source, tmp_path / "before.py")
    unchanged = Unchanged(model)
    found = cachefree.explain(model, (IDS[:2, :3],))
    unchanged.check()
    assert not found.is_rewritable
    assert refusal in str(found)
    assert found.changes, str(found)
    change = found.changes[0]
    assert change.file == str(tmp_path / "before.py")
    assert line in change.diff.splitlines(), change.diff
    assert change.diff in str(found)
    after = apply(_of_distinct_lines(found.changes), source)
    assert rewritten_small(model_of(after, tmp_path / "after.py")).report.verdict.is_proof


def _of_distinct_lines(changes: tuple[Change, ...]) -> list[Change]:
    first: dict[int, Change] = {}
    for change in changes:
        first.setdefault(change.line, change)
    return list(first.values())


def test_evaluation_mode_is_told_at_the_call() -> None:
    class Dropping(Small):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.1)

        def attend(self, q, k):
            return self.drop(super().attend(q, k))

    found = cachefree.explain(small(Dropping).train(), (IDS[:2, :3],))
    (change,) = found.changes
    assert change.file == ""
    assert "+cachefree.rewrite(model.eval())" in change.diff.splitlines()


def test_a_model_that_goes_is_explained_by_its_report() -> None:
    found = cachefree.explain(small(), (IDS[:2, :3],))
    assert found.is_rewritable
    assert found.report is not None
    assert "past is None" in str(found)
    assert "first call: nothing; later: cat, cat" in str(found)
    assert found._repr_html_() == found.report._repr_html_()
    assert "later calls" in found.plot().svg
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["is_rewritable"] is True
    assert plain["report"]["verdict"] == "PROVED_EXACT"
    assert plain["error"] is None


def test_a_refusal_as_a_page_and_as_values(tmp_path: Path) -> None:
    body, _, _ = REFUSED["the last row of the first call only"]
    model = model_of(source_of(body), tmp_path / "before.py")
    found = cachefree.explain(model, (IDS[:2, :3],))
    page = found._repr_html_()
    assert "refused" in page
    assert 'class="row new"' in page
    assert 'class="row marked"' in page
    assert "What to do:" in page
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["error"] == "UnsupportedBranchError"
    assert plain["refusals"][0]["file"] == str(tmp_path / "before.py")
    assert plain["changes"][0]["diff"].startswith("--- ")
    assert {branch["condition"] for branch in plain["branches"]} >= {"past is None"}
    assert "only in the first path" in found.plot().svg


def test_what_is_no_model_is_explained_too() -> None:
    found = cachefree.explain(Small)
    assert "not the class Small" in str(found)
    with pytest.raises(ValueError, match="before its paths were captured"):
        found.plot()


def test_a_change_of_other_lines_is_not_made() -> None:
    change = Change("", "m.py", 2, ("b",), ("c",))
    assert apply([change], "a\nb\n") == "a\nc\n"
    assert change.diff == "--- m.py\n+++ m.py\n@@ -2,1 +2,1 @@\n-b\n+c"
    with pytest.raises(ValueError, match="line 2"):
        apply([change], "a\nx\n")
