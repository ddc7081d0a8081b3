"""What the body of a loop over tokens asks about a token's place; and loops that only ask."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import sympy

from cachefree.errors import CaptureError, Refusal
from cachefree.loops import Loop
from cachefree.sizes import Question, SizeEnvironment
from cachefree.token_places import TOKEN, is_token, least_of

__all__ = ["refuse_questions"]


def _tokens_of(question: Question) -> list[sympy.Symbol]:
    return [symbol for symbol in question.fact.free_symbols if is_token(symbol)]


def refuse_questions(loops: Sequence[Loop], environment: SizeEnvironment) -> None:
    """Refuses a loop whose body asks which token it is at.

    That a token's place is one of the tokens' is no question.

    Raises:
        CaptureError: it asks; all lines are listed.
    """
    counts = {symbol: loop.count for loop in loops for symbol in loop.symbols}
    refusals = [
        Refusal(
            "The body of a loop over the tokens asks which token it is at.",
            why=f"It is not the same step for each of them: {_in_words(question.fact)}.",
            remedy="Do what is for one token only before or after the loop, or with tensors "
            "(torch.where).",
            where=question.where,
        )
        for question in (
            *environment.questions.values(),
            *environment.operator_questions.values(),
        )
        if _tokens_of(question) and not _is_of_every_place(question.fact, counts)
    ]
    refusals += _while_loops(environment)
    if refusals:
        raise CaptureError(*dict.fromkeys(refusals))
    for asked in (environment.questions, environment.operator_questions):
        for key in [key for key, question in asked.items() if _tokens_of(question)]:
            del asked[key]


def _while_loops(environment: SizeEnvironment) -> list[Refusal]:
    """Refusals of ``while t < n``: as many questions of a line as there are tokens.

    Each would be a region with a path of its own, and there is no end of them.
    """
    numbers: dict[Any, set[Any]] = {}
    for question in environment.questions.values():
        where, fact = question.where, question.fact
        relation = fact.args[0] if isinstance(fact, sympy.Not) else fact
        if where is None or not isinstance(relation, sympy.core.relational.Relational):
            continue
        if where.text.startswith("while ") and len(relation.free_symbols) == 1:
            zero = dict.fromkeys(relation.free_symbols, 0)
            number = abs(sympy.expand(relation.lhs - relation.rhs).subs(zero))
            numbers.setdefault((where, *relation.free_symbols), set()).add(number)
    return [
        Refusal(
            f"A while loop runs as often as {size} says.",
            why="Python counts its rounds, so that the number of them would be frozen.",
            remedy=f"Loop over range of the size: for t in range({size}).",
            where=where,
        )
        for (where, size), asked in numbers.items()
        if len(asked) >= _LEAST_QUESTIONS and _is_evenly_spaced(sorted(asked))
    ]


_LEAST_QUESTIONS = 4


def _is_evenly_spaced(numbers: Sequence[Any]) -> bool:
    return len({after - before for before, after in itertools.pairwise(numbers)}) == 1


def _in_words(fact: Any) -> str:
    return re.sub(rf"{TOKEN}\d+_(\d+)", r"token \1", str(fact))


def _is_of_every_place(fact: Any, counts: Mapping[sympy.Symbol, Any]) -> bool:
    """Whether a fact holds of every place among the tokens."""
    if isinstance(fact, sympy.And):
        return all(_is_of_every_place(part, counts) for part in fact.args)
    if isinstance(fact, sympy.Not):
        inner = fact.args[0]
        if isinstance(inner, sympy.Or):
            return all(_is_of_every_place(sympy.Not(part), counts) for part in inner.args)
        fact = inner.negated if hasattr(inner, "negated") else fact
    if not isinstance(fact, sympy.core.relational.Relational):
        return False
    difference = sympy.expand(fact.lhs - fact.rhs)
    if isinstance(fact, (sympy.Lt, sympy.Le)):
        difference = -difference
    elif not isinstance(fact, (sympy.Gt, sympy.Ge)):
        return False
    least = least_of(sympy.expand(difference), counts)
    if isinstance(fact, (sympy.Gt, sympy.Lt)):
        return bool(least.is_positive)
    return bool(least.is_nonnegative)
