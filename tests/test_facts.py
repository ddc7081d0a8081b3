"""What holds of every size is decided; what fails at one size is not."""

from __future__ import annotations

import itertools

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from cachefree.facts import Facts, translate
from cachefree.sizes import size_symbol

B, N, P = (size_symbol(name) for name in ("b", "n", "p"))
NONE: tuple[sympy.Basic, ...] = ()
SOME = (sympy.Ge(N, 1), sympy.Le(P + N, 64))

DECIDED = [
    (NONE, sympy.Ge(N, 0)),
    (NONE, sympy.Eq(N + P, P + N)),
    (NONE, sympy.Ge(N + P, P)),
    (NONE, sympy.Eq(Max(N, 0), N)),
    (NONE, sympy.Le(Min(N, 4), 4)),
    (NONE, sympy.Le(Max(N - 4, 0), N)),
    (NONE, sympy.Eq(Max(N, P) + Min(N, P), N + P)),
    (NONE, sympy.Eq(FloorDiv(2 * N, 2), N)),
    (NONE, sympy.Lt(Mod(N, 3), 3)),
    (NONE, sympy.Ge(N * N, N)),
    (NONE, sympy.Or(sympy.Ge(N, 5), sympy.Lt(N, 5))),
    (SOME, sympy.Gt(N, 0)),
    (SOME, sympy.Lt(P, 64)),
    (SOME, sympy.Ne(N, 0)),
    (SOME, sympy.And(sympy.Le(N, 64), sympy.Le(P, 63))),
    ((sympy.Le(P, 4), sympy.Ge(N, 5)), sympy.Eq(Min(P + N, 4), 4)),
]

NEARLY = [
    (NONE, sympy.Gt(N, 0)),
    (NONE, sympy.Ne(N, 1)),
    (NONE, sympy.Eq(N, P)),
    (NONE, sympy.Eq(Max(N - 4, 0), N - 4)),
    (NONE, sympy.Lt(Min(N, 4), 4)),
    (NONE, sympy.Gt(N + P, P)),
    (NONE, sympy.Eq(FloorDiv(N, 2) * 2, N)),
    (NONE, sympy.Lt(Mod(N, 3), 2)),
    (NONE, sympy.Gt(N * N, N)),
    (SOME, sympy.Gt(P, 0)),
    (SOME, sympy.Gt(N, 1)),
    (SOME, sympy.Lt(P, 63)),
    (SOME, sympy.Lt(P + N, 64)),
    ((sympy.Le(P, 4), sympy.Ge(N, 5)), sympy.Gt(Min(P + N, 9), 5)),
]


def is_true_everywhere(known: tuple[sympy.Basic, ...], fact: sympy.Basic) -> bool:
    """By trying all sizes up to 70 for one or two symbols."""
    symbols = sorted(fact.free_symbols.union(*(k.free_symbols for k in known)), key=str)
    step = 1 if len(symbols) < 2 else 3
    for values in itertools.product(
        sorted({*range(0, 71, step), 1, 2, 4, 5, 64}), repeat=len(symbols)
    ):
        sizes = dict(zip(symbols, values, strict=True))
        if all(k.subs(sizes) == sympy.true for k in known) and fact.subs(sizes) != sympy.true:
            return False
    return True


@pytest.mark.parametrize(("known", "fact"), DECIDED, ids=str)
def test_what_follows_is_shown(known: tuple[sympy.Basic, ...], fact: sympy.Basic) -> None:
    assert is_true_everywhere(known, fact)
    assert Facts(known).holds(fact)


@pytest.mark.parametrize(("known", "fact"), NEARLY, ids=str)
def test_what_nearly_follows_is_not_shown(
    known: tuple[sympy.Basic, ...], fact: sympy.Basic
) -> None:
    assert not is_true_everywhere(known, fact)
    assert not Facts(known).holds(fact)


def test_what_the_solver_is_not_asked_about_is_not_shown() -> None:
    unknown = sympy.Ge(sympy.sin(N), -1)  # true, but no arithmetic of integers
    assert not Facts().holds(unknown)
    with pytest.raises(NotImplementedError):
        translate(sympy.sin(N))
    with pytest.raises(NotImplementedError):
        translate(FloorDiv(N, P))


def test_more_facts_show_more() -> None:
    assert not Facts().holds(sympy.Ge(N, 3))
    assert Facts().and_also(sympy.Ge(N, 4)).holds(sympy.Ge(N, 3))


def test_equal_and_at_most() -> None:
    facts = Facts(SOME)
    assert facts.equal(N + P, P + N)
    assert facts.equal(3, 3)
    assert not facts.equal(3, 4)
    assert not facts.equal(N, P)
    assert facts.at_most(1, N)
    assert facts.at_most(P, N + P)
    assert not facts.at_most(N, P)
    assert facts.at_most(2, 2)
    assert not facts.at_most(3, 2)


def test_contradictions_are_seen() -> None:
    assert Facts(SOME).is_consistent()
    assert not Facts((sympy.Ge(N, 5), sympy.Le(N, 4))).is_consistent()
    assert not Facts((sympy.Lt(N, 0),)).is_consistent(), "a size is never negative"


def test_simplified_where_the_facts_decide() -> None:
    assert Facts().simplified(Max(N, 0)) == N
    assert Facts((sympy.Ge(N, 4),)).simplified(Max(N - 4, 0)) == N - 4
    assert Facts((sympy.Le(N, 4),)).simplified(Max(N - 4, 0)) == 0
    undecided = Max(N - 4, 0)
    assert Facts().simplified(undecided) == undecided
    assert Facts((sympy.Le(P, N),)).simplified(Min(N, P) + 1) == P + 1
    assert Facts().simplified(7) == 7


def test_witnesses_satisfy_what_is_wanted_near_the_hints() -> None:
    facts = Facts((sympy.Ge(N, 1),))
    found = facts.witness(sympy.Gt(P, 16), hints={"n": 5, "p": 7})
    assert found == {"n": 5, "p": 17}
    assert facts.witness(sympy.Eq(N, 0), hints={"n": 5}) is None
    assert facts.witness(hints={"n": 5, "p": 0}) == {"n": 5, "p": 0}


def test_every_rule_of_translation_is_arithmetic() -> None:
    """Expressions translated for the solver have the values that sympy gives."""
    import z3

    expressions = [
        N + P - 3,
        N * P + 2,
        N**3,
        Max(N, P, 2),
        Min(N, P - 1),
        FloorDiv(N, 3),
        FloorDiv(N - 5, 3),
        Mod(N, 4),
    ]
    for expr in expressions:
        for n, p in itertools.product(range(6), repeat=2):
            expected = expr.subs({N: n, P: p})
            number = z3.simplify(
                z3.substitute(
                    translate(expr), (z3.Int("n"), z3.IntVal(n)), (z3.Int("p"), z3.IntVal(p))
                )
            )
            assert number.as_long() == int(expected), (expr, n, p)
