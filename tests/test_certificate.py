"""Certificates: they hold, they are about one graph, and every change of them is noticed."""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

import cachefree
import cachefree.checker
from cachefree.checker.replay import LAWS, WrongCertificateError, replay
from cachefree.checker.sizes import Sizes, parsed
from cachefree.checker.terms import Terms

from .models import CASES
from .small import Small, rewritten_small, small

Content = dict[str, Any]
BOUND = ["the graph", "the captured paths", "the domain"]


@pytest.fixture(scope="module")
def rewritten() -> cachefree.Rewritten:
    return rewritten_small(small())


@pytest.fixture(scope="module")
def content(rewritten: cachefree.Rewritten) -> Content:
    return minimal(rewritten.certificate.content)


def holds(content: Content) -> bool:
    try:
        replay(content)
    except WrongCertificateError:
        return False
    return True


def without_unused(region: Content) -> None:
    """Leaves out the terms that no step and no output is made of."""
    terms, steps = region["terms"], region["steps"]
    used = {*region["path"], *region["neutral"].values()}
    used |= {step[side] for step in steps for side in ("before", "after")}
    for place in reversed(range(len(terms))):
        if place in used:
            used.update(int(term) for term in re.findall(r"'term': (\d+)", str(terms[place])))
    new = {old: place for place, old in enumerate(sorted(used))}
    kept = json.dumps([terms[old] for old in sorted(used)])
    moved = re.sub(r'"term": (\d+)', lambda match: f'"term": {new[int(match[1])]}', kept)
    region["terms"] = json.loads(moved)
    region["path"] = [new[place] for place in region["path"]]
    region["neutral"] = {path: new[place] for path, place in region["neutral"].items()}
    for step in steps:
        step.update(before=new[step["before"]], after=new[step["after"]])


def minimal(content: Content) -> Content:
    """The certificate without steps that it holds without, and terms that nothing is made of."""
    kept = copy.deepcopy(content)
    for region in kept["regions"]:
        for step in list(region["steps"]):
            steps = region["steps"]
            region["steps"] = [other for other in steps if other is not step]
            if not holds(kept):
                region["steps"] = steps
        without_unused(region)
    assert holds(kept)
    return kept


def test_a_certificate_holds_and_is_complete(rewritten: cachefree.Rewritten) -> None:
    checked = cachefree.check_certificate(rewritten)
    assert checked.is_complete
    assert checked.verdict == "PROVED_EXACT"
    assert checked.replayed > 10
    assert checked.bound_to == BOUND
    assert "0 trusted; compared with the graph, the captured paths, the domain" in str(checked)


def test_a_certificate_says_law_place_and_side_condition(rewritten: cachefree.Rewritten) -> None:
    content = rewritten.certificate.content
    steps = [step for region in content["regions"] for step in region["steps"]]
    assert {step["law"] for step in steps} == set(content["laws"]) == set(rewritten.report.laws)
    assert all("small.py" in step["where"] for step in steps if step["law"] == "concat")
    assert all(law["statement"] and law["kind"] == "exact" for law in content["laws"].values())
    assert any("torch" in assumed for assumed in content["assumed"])
    assert [region["call"] for region in content["regions"]] == ["first call", "later calls"]


def test_side_conditions_are_told() -> None:
    class Windowed(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            return logits, tuple(part[:, -4:] for part in present)

    steps = [
        step
        for region in rewritten_small(small(Windowed)).certificate.content["regions"]
        for step in region["steps"]
    ]
    assert any("≤" in text for step in steps for text in step["because"])


def test_every_step_of_a_minimal_certificate_is_needed(content: Content) -> None:
    assert content["regions"][0]["steps"]
    assert content["regions"][1]["steps"] == [], "no edit: the graph is the later path"
    for place, step in enumerate(content["regions"][0]["steps"]):
        changed = copy.deepcopy(content)
        del changed["regions"][0]["steps"][place]
        assert not holds(changed), step


def test_no_step_passes_for_one_of_another_law(content: Content) -> None:
    laws = {step["law"] for step in content["regions"][0]["steps"]} | {"copy", "spelling", "lowest"}
    for place, step in enumerate(content["regions"][0]["steps"]):
        for law in laws - {step["law"]}:
            changed = copy.deepcopy(content)
            changed["regions"][0]["steps"][place]["law"] = law
            assert not holds(changed), (step, law)


def test_no_step_is_trusted_that_can_be_replayed(content: Content) -> None:
    changed = copy.deepcopy(content)
    changed["regions"][0]["steps"][0]["is_trusted"] = True
    with pytest.raises(WrongCertificateError, match="not to be trusted"):
        replay(changed)


def test_no_step_leads_elsewhere(content: Content) -> None:
    """Each side of each step, replaced by a neighbour among the terms."""
    region = content["regions"][0]
    for place, step in enumerate(region["steps"]):
        for side in ("before", "after"):
            for term in (step[side] - 1, step[side] + 1):
                if not 0 <= term < len(region["terms"]) or term in step.values():
                    continue
                changed = copy.deepcopy(content)
                changed["regions"][0]["steps"][place][side] = term
                assert not holds(changed), (step, side)


def mutants(content: Content) -> Iterator[tuple[str, Content]]:
    """The certificate with one number, size, operator or order changed in a term, each its own."""

    def places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        if isinstance(value, dict):
            for key, part in value.items():
                if key not in ("device", "bytes"):
                    yield from places(part, (*path, key))
        elif isinstance(value, list):
            for key, part in enumerate(value):
                yield from places(part, (*path, key))
        else:
            yield path

    tables = [("graph", "terms"), ("regions", 0, "terms")]
    for table in tables:
        for path in places(_at(content, table), table):
            for new in _others(path, _at(content, path)):
                changed = copy.deepcopy(content)
                _at(changed, path[:-1])[path[-1]] = new
                yield f"{path}: {_at(content, path)} → {new}", changed


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def _others(path: tuple[Any, ...], value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
    elif path[-1] == "float":
        yield "0.25"
    elif path[-1] == "op" and value.startswith("aten."):
        yield "aten.add.Tensor" if value != "aten.add.Tensor" else "aten.sub.Tensor"
    elif path[-1] == "dtype" and value:
        yield "float64" if value != "float64" else "float16"
    elif path[-2:-1] == ("size",) or value in ("past", "query", "batch"):
        yield {"past": "query", "query": "batch", "batch": "query"}.get(value, value)


def test_no_term_can_be_changed(content: Content, rewritten: cachefree.Rewritten) -> None:
    """Sizes, numbers, operators and operands: what is still a proof is one of another model."""
    survivors, count = [], 0
    for name, changed in mutants(content):
        if changed == content:
            continue
        count += 1
        if holds(changed):
            survivors.append((name, changed))
    assert count > 200
    assert len(survivors) < 5, [name for name, _ in survivors]
    for name, changed in survivors:
        try:
            cachefree.check_certificate(changed, rewritten)
        except cachefree.CertificateError:
            continue
        pytest.fail(name)


CHANGES: dict[str, Callable[[Content], Any]] = {
    "another format": lambda c: c.update(format="cachefree.certificate/0"),
    "a better verdict": lambda c: c.update(verdict="PROVED_REAL"),
    "a checked verdict": lambda c: c.update(verdict="CHECKED"),
    "other outputs of the path": lambda c: c["regions"][0]["path"].reverse(),
    "other outputs of the graph": lambda c: c["graph"]["outputs"].reverse(),
    "fewer outputs": lambda c: c["regions"][0]["path"].pop(),
    "no outputs": lambda c: (
        c["graph"].update(outputs=[]), [region.update(path=[]) for region in c["regions"]]
    ),
    "no first call": lambda c: c["regions"].pop(0),
    "no later calls": lambda c: c["regions"].pop(1),
    "no domain for later calls": lambda c: c["domain"].pop(1),
    "no domain": lambda c: c.update(domain=[]),
    "a narrower region": lambda c: c["regions"][1]["facts"].append(["=", "query", 1]),
    "an impossible region": lambda c: c["regions"][0]["facts"].append(["<", "query", 0]),
    "a domain with more sizes": lambda c: c["domain"][1]["facts"].clear(),
    "something past on the first call": lambda c: c["regions"][0]["values"].update(past=1),
    "another past": lambda c: c["regions"][0]["values"].update(past="query"),
    "the first call's path for later calls": lambda c: c["regions"].__setitem__(
        1, {**c["regions"][0], "call": "later calls"}
    ),
    "a term made of itself": lambda c: c["graph"]["terms"][-1]["args"].__setitem__(
        0, {"term": len(c["graph"]["terms"]) - 1}
    ),
    "no terms": lambda c: c["graph"].update(terms=[]),
    "a step of no law": lambda c: c["regions"][0]["steps"][0].update(law="because I say so"),
    "a size that is a program": lambda c: c["regions"][0]["facts"].append(["__import__", "os"]),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_claim_can_be_changed(content: Content, change: Callable[[Content], Any]) -> None:
    changed = copy.deepcopy(content)
    change(changed)
    assert changed != content
    with pytest.raises(cachefree.CertificateError):
        cachefree.check_certificate(changed)


TOLD: dict[str, Callable[[Content], Any]] = {
    "a neutral cache of its own": lambda c: c["regions"][0]["neutral"].update({"past[0]": 1}),
    "a domain with other sizes": lambda c: c["domain"][1]["facts"].append([">=", "past", 3]),
    "stand-ins left out": lambda c: c.update(stand_ins=["addmm"], verdict="PROVED_REAL"),
    "another name of an input": lambda c: c["graph"]["inputs"][1].__setitem__(0, "past_7"),
    "another name of the model": lambda c: c.update(model="Other"),
    "another statement of a law": lambda c: c["laws"]["full"].update(statement="0 = 1"),
    "an edit that no rule made": lambda c: c["edits"].append({"rule": "join", "neutral": "none"}),
}  # fmt: skip


@pytest.mark.parametrize("change", TOLD.values(), ids=TOLD)
def test_what_is_told_of_a_rewritten_model_is_compared(
    content: Content, rewritten: cachefree.Rewritten, change: Callable[[Content], Any]
) -> None:
    cachefree.check_certificate(content, rewritten)
    changed = copy.deepcopy(content)
    change(changed)
    with pytest.raises(cachefree.CertificateError):
        cachefree.check_certificate(changed, rewritten)


def test_a_law_is_not_called_more_exact_than_it_is(content: Content) -> None:
    changed = copy.deepcopy(content)
    changed["laws"]["full"]["kind"] = "real"
    with pytest.raises(cachefree.CertificateError, match="full is not so exact"):
        cachefree.check_certificate(changed)


def test_the_values_of_a_constant_are_those_that_it_is_named_by() -> None:
    """A finite number in the place of an infinity would hide it from the laws of zeros."""
    raw = torch.tensor([torch.inf]).numpy().tobytes()
    named = ["bits", hashlib.sha256(raw).hexdigest()]
    line: Content = {
        "op": "constant", "args": [named, [1], {"dtype": "float32"}, "cpu"], "shape": [1],
        "dtype": {"dtype": "float32"}, "device": {"device": "cpu"}, "bytes": raw.hex(),
    }  # fmt: skip
    assert len(Terms(Sizes([], {})).read([line], {})) == 1
    line["bytes"] = torch.tensor([1.0]).numpy().tobytes().hex()
    with pytest.raises(ValueError, match="values that are not its own"):
        Terms(Sizes([], {})).read([line], {})


def _restates(law: str, op: str, args: Any, shape: Any, facts: Any = (), rows: Any = None) -> bool:
    """Whether a law of the checker has a right side for an operator on ``x``, (past, 4)."""
    terms = Terms(Sizes(list(facts), {}))
    kind = torch.float32, "device:cpu"
    x = terms.make("input", ("x",), rows or (PAST, 4), *kind)
    before = terms.make(op, (x, *args), shape, *kind)
    return any(True for _ in LAWS[law][1](terms, before))


def _twice(*values: Any) -> Any:
    return tuple(value * 2 for value in values[-1])


@pytest.mark.parametrize("is_hook", [True, False])
def test_what_runs_beside_the_graph_is_seen(is_hook: bool) -> None:
    rewritten = rewritten_small(small())
    module = rewritten.graph_module
    if is_hook:
        module.register_forward_hook(_twice)
    else:
        module.__dict__["forward"] = _twice
    with pytest.raises(cachefree.CertificateError, match="the graph has hooks, or a forward of"):
        cachefree.check_certificate(rewritten)


def test_a_slice_with_steps_is_no_slice_of_neighbours() -> None:
    assert _restates("clamp-slice", "aten.slice.Tensor", (1, 0, 4, 1), (PAST, 4))
    assert not _restates("clamp-slice", "aten.slice.Tensor", (1, 0, 4, 2), (PAST, 2))


@pytest.mark.parametrize(("dtype", "holds"), [(torch.float16, False), (torch.float32, True)])
def test_a_number_of_another_dtype_keeps_its_dimension(dtype: torch.dtype, holds: bool) -> None:
    terms = Terms(Sizes([], {}))
    one = terms.make("input", ("x",), (1,), torch.float32, "device:cpu")
    other = terms.make("input", ("y",), (1,), dtype, "device:cpu")
    wide = terms.make("aten.mul.Tensor", (one, other), (1,), torch.float32, "device:cpu")
    (right,) = tuple(LAWS["ones-of-elements"][1](terms, wide)) or (None,)
    assert (right is not None) is holds
    if right is not None:
        assert (right.op, right.shape) == ("reshape", (1,))
        assert right.args[0].shape == ()
        assert [part.shape for part in right.args[0].args] == [(), ()]


def test_nothing_is_repeated_of_what_may_be_empty() -> None:
    pad = (1, 0), "replicate", None
    for facts, holds in (((), False), ((PAST >= 1,), True)):
        found = _restates(
            "pad-replicate", "aten.pad.default", pad, (4, PAST + 1), facts, rows=(4, PAST)
        )
        assert found is holds


def test_what_may_be_no_integer_is_not_rounded() -> None:
    half = parsed(["IntTrueDiv", "past", 2])
    assert not Sizes([half > 0, half < 1], {}).holds(sympy.false)


def test_a_certificate_of_another_model_is_refused(content: Content) -> None:
    class Scaled(Small):
        def attend(self, q, k):
            return super().attend(q * 2, k)

    other = rewritten_small(small(Scaled))
    assert cachefree.check_certificate(other).is_complete
    with pytest.raises(cachefree.CertificateError, match="the graph computes"):
        cachefree.check_certificate(content, other)


def test_saved_and_checked_elsewhere(rewritten: cachefree.Rewritten, tmp_path: Path) -> None:
    path = rewritten.certificate.save(tmp_path / "decoder.certificate.json")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert cachefree.check_certificate(path).bound_to == []
    assert cachefree.check_certificate(path, rewritten).bound_to == BOUND
    path.write_text(path.read_text()[:-20])
    with pytest.raises(cachefree.CertificateError, match="is no certificate"):
        cachefree.check_certificate(path)
    with pytest.raises(cachefree.CertificateError, match="is no certificate"):
        cachefree.check_certificate(tmp_path / "nothing.json")


def test_beside_an_onnx_file(rewritten: cachefree.Rewritten, tmp_path: Path) -> None:
    cachefree.to_onnx(rewritten, tmp_path / "decoder.onnx", certificate=True)
    path = tmp_path / "decoder.certificate.json"
    assert cachefree.check_certificate(path).bound_to == ["decoder.onnx", "decoder.onnx.data"]
    weights = tmp_path / "decoder.onnx.data"
    raw = bytearray(weights.read_bytes())
    raw[7] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(cachefree.CertificateError, match="not the one that it was written with"):
        cachefree.check_certificate(path)
    weights.unlink()
    with pytest.raises(cachefree.CertificateError, match="is not beside it"):
        cachefree.check_certificate(path)


def test_copies_and_graphs_without_a_proof_have_none(rewritten: cachefree.Rewritten) -> None:
    with pytest.raises(cachefree.CacheFreeError, match="A copy of a rewritten model"):
        copy.deepcopy(rewritten).certificate  # noqa: B018 - what is tested
    unchecked = rewritten_small(small(Different), check="off")
    with pytest.raises(cachefree.CacheFreeError, match="Nothing was proved"):
        unchecked.certificate  # noqa: B018 - what is tested


class Different(Small):
    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        return (logits if past is None else logits * 2), present


def test_a_model_that_changed_has_the_certificate_of_what_it_is_now() -> None:
    model = small()
    rewritten = rewritten_small(model)
    before = rewritten.certificate.content
    model.double()
    rewritten(torch.zeros(1, 3, dtype=torch.long))
    assert cachefree.check_certificate(rewritten).is_complete
    with pytest.raises(cachefree.CertificateError):
        cachefree.check_certificate(before, rewritten)


REPLAYED = ("nano_gpt", "streaming_softmax", "lstm_language_model")


@pytest.mark.parametrize("name", REPLAYED)
def test_join_models_are_replayed_completely(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    rewritten = cachefree.rewrite(case.build(), case.example_inputs, **case.rewrite_options)
    checked = cachefree.check_certificate(rewritten)
    assert checked.is_complete, checked


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.expects_proof], ids=str)
def test_every_proof_has_a_certificate_that_holds(case: Any) -> None:
    try:
        rewritten = cachefree.rewrite(case.build(), case.example_inputs, **case.rewrite_options)
    except cachefree.CacheFreeError:
        if not case.may_refuse:
            raise
        return
    if rewritten.report.loops:
        with pytest.raises(cachefree.CacheFreeError, match="has no certificate"):
            _ = rewritten.certificate
        return
    checked = cachefree.check_certificate(rewritten)
    assert checked.trusted.total() <= (checked.replayed + checked.trusted.total()) // 4, checked


QUERY, PAST = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("query", "past"))
FACTS = [
    (["<=", "query", ["+", "past", "query"]], True),
    (["<=", ["max", 0, ["+", "query", -4]], "query"], True),
    (["=", ["min", "past", ["max", "past", 3]], "past"], True),
    (["or", ["<", "past", 3], [">", "past", 2]], True),
    (["=", ["+", ["*", 2, ["//", "query", 2]], ["%", "query", 2]], "query"], True),
    ([">=", ["*", "past", "query"], "past"], False),
    (["<", "query", ["+", "past", "query"]], False),
    (["!=", "query", 1], False),
    (["=", ["max", "past", 3], "past"], False),
    (["<=", ["min", "query", 5], 4], False),
    (["or", ["<", "past", 3], [">", "past", 3]], False),
]


@pytest.mark.parametrize(("fact", "holds"), FACTS, ids=lambda value: str(value))
def test_facts_about_sizes_are_decided(fact: Any, holds: bool) -> None:
    sizes = Sizes([QUERY >= 1], {})
    assert sizes.holds(parsed(fact)) is holds


def test_sizes_that_are_one_number_have_one_form() -> None:
    sizes = Sizes([QUERY >= 1], {PAST: sympy.Integer(0)})
    assert sizes.form(sympy.Max(QUERY - 1, 0) + 1) == sizes.form(QUERY + 2 * PAST)
    assert sizes.form(sympy.Min(QUERY, 1)) == 1
    assert sizes.form(sympy.Max(QUERY, 2)) != sizes.form(QUERY)
    anything = Sizes([], {})
    clamped = sympy.Max(QUERY - 1, 0)
    assert anything.form(sympy.Min(clamped, QUERY)) == anything.form(clamped)


def test_nothing_is_shown_where_elimination_gives_up() -> None:
    assert not Sizes([], {}).holds(parsed(["=", ["IntTrueDiv", "past", "query"], 1]))


def test_the_checker_shares_no_code_with_the_prover() -> None:
    folder = Path(cachefree.checker.__file__).parent
    allowed = {"cachefree.checker", "cachefree.errors"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.startswith("cachefree"):
                    assert name.startswith(tuple(allowed)), f"{path.name} imports {name}"


def test_the_report_is_json(rewritten: cachefree.Rewritten) -> None:
    told = json.loads(json.dumps(rewritten.report.as_dict()))
    assert told["verdict"] == "PROVED_EXACT"
    assert {law["name"]: law["kind"] for law in told["proof"]} == dict.fromkeys(
        rewritten.report.laws, "exact"
    )
    assert any(text.startswith(f"torch {torch.__version__}") for text in told["assumed"])
    assert any("capture" in text for text in told["assumed"])
