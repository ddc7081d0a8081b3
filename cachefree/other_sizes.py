"""Sizes at which a captured path is compared with the model once more, where code is hard to hear.

A clause that catches exceptions, a pattern that asks for a class, or ``type`` handed to another
function can tell a symbolic size from a number and hide that it did: nothing is asked, and at the
example sizes both ways give the same. Such code is rare. Where there is any, the path is run with
plain numbers around every number that the code names.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType

import torch

from cachefree.held_code import is_installed, is_of_dataclass
from cachefree.reach import reached_by
from cachefree.sizes import SizeEnvironment, compiled, is_standard

__all__ = ["many_rounds", "other_sizes"]

_MOST = 32
_MANY_ROUNDS = 41
_MOST_ROUNDS_OF_ATTRIBUTES = 300
_LARGEST = 1024


def other_sizes(
    model: torch.nn.Module, environment: SizeEnvironment, sizes: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Sizes for which a captured path should stand, if the model's code is hard to hear.

    Args:
        model: The model.
        environment: Of the captured path.
        sizes: The example size of each symbol.
    """
    codes = [
        code
        for code in reached_by(model).codes
        if not is_installed(code.co_filename) and not _is_of_python(code)
    ]
    if not any(map(_is_hard_to_hear, codes)):
        return
    numbers = sorted({n + more for code in codes for n in _numbers(code) for more in (0, 1)})
    facts = [compiled(question.fact) for question in environment.questions.values()]
    count = 0
    for number in numbers:
        for name in environment.sizes:
            point = {**sizes, name: number}
            if sizes[name] != number and all(fact(point) for fact in facts):
                count += 1
                yield point
                if count == _MOST:
                    return


def many_rounds(model: torch.nn.Module) -> int:
    """How often to run loops over tokens once more: beyond the numbers that the code names.

    Attributes that it reads count too, but for large ones, which are widths.
    """
    codes = [
        code
        for code in reached_by(model).codes
        if not is_installed(code.co_filename) and code.co_name != "__init__"
    ]
    held = [value for module in model.modules() for value in vars(module).values()]
    codes += [value.__code__ for value in held if isinstance(value, FunctionType)]
    numbers = [n for code in codes for n in _numbers(code)]
    read = {name for code in codes for name in code.co_names}
    for module in model.modules():
        numbers += [
            value
            for name, value in vars(module).items()
            if type(value) is int and name in read and value <= _MOST_ROUNDS_OF_ATTRIBUTES
        ]
    return max([_MANY_ROUNDS, *(number + 3 for number in numbers)])


def _is_of_python(code: CodeType) -> bool:
    """Whether code is the standard library's, or what ``dataclass`` writes: no size comes there."""
    return is_standard(code.co_filename) or is_of_dataclass(code)


@functools.lru_cache(maxsize=4096)
def _is_hard_to_hear(code: CodeType) -> bool:
    steps = list(dis.get_instructions(code))
    names = {"MATCH_CLASS", "CHECK_EXC_MATCH", "POP_EXCEPT"}
    return any(step.opname in names for step in steps) or any(
        step.argval == "type" and step.opname in ("LOAD_GLOBAL", "LOAD_NAME") for step in steps
    )


def _numbers(code: CodeType) -> Iterator[int]:
    for constant in code.co_consts:
        parts = constant if isinstance(constant, (tuple, frozenset)) else (constant,)
        for part in parts:
            if type(part) in (int, float) and 2 <= part <= _LARGEST:
                yield int(part)
