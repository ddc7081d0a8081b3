"""Replays a certificate: every step is looked up in a second statement of the laws.

Nothing here is the prover's. In each region the certificate has the one graph's outputs, the
outputs of the path that the model takes there, and steps ``before = after``. Each step has to be an
instance of its law, with its side condition shown from the facts of the region. Steps that hold are
joined, with all that follows by putting equals for equals; the outputs have to be equal then.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy

from cachefree.checker.alone import ALONE
from cachefree.checker.measure import mismeasured
from cachefree.checker.numbers import NUMBERS
from cachefree.checker.shapes import SHAPES
from cachefree.checker.sizes import Sizes, parsed
from cachefree.checker.terms import Term, Terms

__all__ = ["FORMAT", "Checked", "WrongCertificateError", "replay", "restated"]

FORMAT = "cachefree.certificate/1"
LAWS: dict[str, Any] = {**SHAPES, **NUMBERS, **ALONE}
REAL = {
    "add-zero-float", "attention-mask", "elementwise-real", "elementwise-signless",
    "folded-function", "grouped-attention", "infinity", "lowest-finite", "lowest-hides",
    "mask-nothing", "packed-heads", "padded-convolution", "slice-of-convolution",
    "slice-of-linear", "zero-product",
}  # fmt: skip
"""Laws that hold over the real numbers only; all others hold bit for bit."""
TRUSTED = {
    "elementwise", "elementwise-real", "elementwise-signless", "fill-nothing", "lowest-hides",
    "mask-nothing", "neutral-truth", "packed-heads", "padded-convolution", "same-at-every-size",
    "slice-of-convolution", "where",
}  # fmt: skip
"""Laws of which a certificate may ask that a step be trusted: it takes a solver for elements."""
AT_EVERY_SIZE = "same-at-every-size"
"""What is compared by computing it at every size up to a bound: no law."""


class WrongCertificateError(Exception):
    """A certificate that does not show what it says; the message names the place."""


@dataclass
class Checked:
    """What replaying a certificate gave.

    Attributes:
        verdict: What is shown, as the certificate says.
        replayed: How many steps were found to be instances of their laws.
        trusted: How many steps were not looked into: law → how many.
        laws: All laws, with how often each was applied.
        bound_to: What the certificate was compared with: the graph, the ONNX file.
    """

    verdict: str
    replayed: int = 0
    trusted: Counter[str] = field(default_factory=Counter)
    laws: Counter[str] = field(default_factory=Counter)
    bound_to: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether every step was replayed."""
        return not self.trusted

    def __str__(self) -> str:
        told = ", ".join(f"{law} ×{count}" for law, count in self.trusted.items())
        return (
            f"{self.verdict}: {self.replayed} steps replayed, "
            f"{self.trusted.total()} trusted{f' ({told})' if told else ''}; "
            f"compared with {', '.join(self.bound_to) or 'nothing else'}"
        )


def replay(certificate: Mapping[str, Any]) -> Checked:
    """Replays every step of a certificate, and says what was shown.

    Raises:
        WrongCertificateError: it does not show what it says.
    """
    _expect(certificate["format"] == FORMAT, "it is of another format")
    checked = Checked(certificate["verdict"])
    regions = certificate["regions"]
    for place, region in enumerate(regions):
        with _located(f"region {place} ({region['call']})"):
            _replay_region(certificate, region, checked)
    with _located("the domain"):
        _check_domain(certificate["domain"], regions)
    for law, told in certificate["laws"].items():
        _expect(told["kind"] == ("real" if law in REAL else "exact"), f"{law} is not so exact")
    _expect(set(checked.laws) <= {*certificate["laws"], AT_EVERY_SIZE}, "it lists other laws")
    is_real = any(law in REAL for law in checked.laws) or bool(certificate["stand_ins"])
    due = "PROVED_REAL" if is_real else "PROVED_EXACT"
    due = "CHECKED" if AT_EVERY_SIZE in checked.laws else due
    _expect(checked.verdict == due, f"its steps show {due}, not {checked.verdict}")
    return checked


class _located:
    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, (LookupError, ValueError, TypeError, AttributeError)):
            error = WrongCertificateError(f"it cannot be read: {error!r}")
        if isinstance(error, WrongCertificateError):
            raise WrongCertificateError(f"{self.where}: {error}") from None


def _expect(truth: bool, words: str) -> None:
    if not truth:
        raise WrongCertificateError(words)


def _replay_region(whole: Mapping[str, Any], region: Mapping[str, Any], checked: Checked) -> None:
    values = {parsed(name): parsed(size) for name, size in region["values"].items()}
    sizes = Sizes([parsed(fact) for fact in region["facts"]], values)
    terms = Terms(sizes)
    plain = terms.read(region["terms"], {})
    stand_ins = {path: plain[number] for path, number in region["neutral"].items()}
    graph = terms.read(whole["graph"]["terms"], stand_ins)
    points = list(_points(sizes, whole))
    _expect(bool(points), "no sizes were found at which its facts hold")
    for point in points:
        wrong = mismeasured(list(dict.fromkeys((*plain, *graph))), point)
        _expect(wrong is None, f"{wrong}, at {point}")
    for number, step in enumerate(region["steps"]):
        before, after = plain[step["before"]], plain[step["after"]]
        with _located(f"step {number} ({step['law']})"):
            _replay_step(terms, step, before, after, checked)
        terms.join(before, after)
    pairs = list(zip(whole["graph"]["outputs"], region["path"], strict=True))
    _expect(bool(pairs), "there are no outputs")
    for output, (one, other) in enumerate(pairs):
        same = terms.are_equal(graph[one], plain[other])
        _expect(same, f"output {output} of the one graph is not shown to be the path's")


def _replay_step(terms: Terms, step: Any, before: Term, after: Term, checked: Checked) -> None:
    law = step["law"]
    kind = (before.shape, before.dtype, before.device)
    _expect(kind == (after.shape, after.dtype, after.device), "its two sides differ in type")
    checked.laws[law] += 1
    if step.get("is_trusted"):
        _expect(law in TRUSTED, "a step of this law is not to be trusted but replayed")
        checked.trusted[law] += 1
        return
    _expect(restated(terms, law, before, after), "it is no instance of its law")
    checked.replayed += 1


def restated(terms: Terms, law: str, before: Term, after: Term) -> bool:
    """Whether ``before = after`` is an instance of a law, by its second statement."""
    heads, rights = LAWS.get(law, (frozenset(), None))
    if rights is None or (heads is not None and before.op not in heads):
        return False
    return any(right is after for right in rights(terms, before))


def _check_domain(domain: Any, regions: Any) -> None:
    """Every size of the domain is in a region that was replayed."""
    _expect({part["call"] for part in domain} == {"first call", "later calls"}, "a call is missing")
    for part in domain:
        own = [region for region in regions if region["call"] == part["call"]]
        known = Sizes([parsed(fact) for fact in part["facts"]], {})
        served = [
            sympy.And(
                *(parsed(fact) for fact in region["facts"]),
                *(sympy.Eq(parsed(a), parsed(b)) for a, b in region["values"].items()),
            )
            for region in own
        ]
        _expect(known.holds(sympy.Or(*served)), f"no region serves all of {part['facts']}")


def _points(sizes: Sizes, whole: Mapping[str, Any]) -> Iterator[dict[Any, int]]:
    """Two choices of sizes in a region, that nobody who wrote the certificate chose."""
    text = json.dumps(whole["regions"], sort_keys=True, default=str)
    draw = random.Random(hashlib.sha256(text.encode()).hexdigest())
    names = sorted(_symbols(whole), key=str)
    found = 0
    for attempt in range(4000):
        high = (200, 40, 6, 3)[attempt % 4]
        point = {name: draw.randint(0 if attempt % 2 else 1, high) for name in names}
        if sizes.is_inside(point):
            yield point
            found += 1
            if found == 2:
                return


def _symbols(whole: Mapping[str, Any]) -> set[Any]:
    """The symbols that sizes are made of, in every expression of the certificate."""

    def within(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            for name, part in value.items():
                yield from parsed(part).free_symbols if name == "size" else within(part)
        elif isinstance(value, list):
            for part in value:
                yield from within(part)

    facts = [parsed(fact) for region in whole["regions"] for fact in region["facts"]]
    asked = set().union(*(fact.free_symbols for fact in facts))
    return asked.union(within([whole["graph"], whole["regions"]]))
