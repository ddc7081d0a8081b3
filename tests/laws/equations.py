"""Laws as equations that are tried: each step of a normal form, evaluated on both sides.

An instance is a few lines of torch, captured with symbolic sizes. It is brought into normal form
with its sizes symbolic and with some of them pinned to 0, 1 and 3; wherever the law in question is
applied, the term before and the term after are evaluated by torch at many sizes and must agree.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from hypothesis import strategies as st
from torch import nn

from cachefree.calls import Call, TensorSpec
from cachefree.capture import capture
from cachefree.facts import Facts
from cachefree.laws import LAWS, NO_ELEMENTS, ONES_LAWS, TABLE_LAWS, Law
from cachefree.laws.evaluation import apply
from cachefree.normal import Normaliser, Step
from cachefree.reading import read
from cachefree.sizes import size_symbol
from cachefree.structure import flatten
from cachefree.terms import Table, Term, replace_operands, topological

MORE_LAWS = (*TABLE_LAWS, *ONES_LAWS)
BY_NAME: Mapping[str, Law] = {law.name: law for law in (*LAWS, *MORE_LAWS, NO_ELEMENTS)}
SMALL = (0, 1, 3)
HINTS = (5, 7, 11, 13)

Sizes = Mapping[sympy.Symbol, int]
SPECIAL = (0.0, -0.0, 1.0, -1.5, float("inf"), float("-inf"), float("nan"), 1e-40, 3e38)


@dataclasses.dataclass(frozen=True, eq=False)
class Instance:
    """A few lines of torch in which a law applies, or must not.

    Attributes:
      name: What is special about it.
      inputs: The shape of each input, such as ``"b n 4"``, with a dtype behind a colon.
      function: The lines; or, where `is_term` is set, a function of a table and input terms.
      above: The smallest value of each size, where that is not 0.
      is_term: Whether `function` makes terms itself.
    """

    name: str
    inputs: tuple[str, ...]
    function: Callable[..., Any]
    above: Mapping[str, int] = dataclasses.field(default_factory=dict)
    is_term: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The sizes, in order of first use."""
        words = " ".join(text.partition(":")[0] for text in self.inputs).split()
        return tuple(dict.fromkeys(size_symbol(word) for word in words if not word.isdigit()))

    def sizes(self, choices: Sequence[int] = SMALL) -> Iterator[dict[sympy.Symbol, int]]:
        """All sizes out of the choices."""
        allowed = [
            [size for size in choices if size >= self.above.get(str(symbol), 0)]
            for symbol in self.symbols
        ]
        for values in itertools.product(*allowed):
            yield dict(zip(self.symbols, values, strict=True))


class _Lines(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def specs(inputs: Sequence[str]) -> tuple[TensorSpec, ...]:
    """The specs of inputs such as ``"b n 4:int64"``."""
    found = []
    for place, text in enumerate(inputs):
        shape, _, dtype = text.partition(":")
        sizes = tuple(int(s) if s.isdigit() else size_symbol(s) for s in shape.split())
        kind = getattr(torch, dtype or "float32")
        found.append(TensorSpec(f"x{place}", sizes, kind, torch.device("cpu")))
    return tuple(found)


def program(inputs: Sequence[str], function: Callable[..., Any], table: Table) -> tuple[Term, ...]:
    """The terms of a few lines of torch."""
    tensors = specs(inputs)
    _, structure = flatten((tensors, {}), lambda value: isinstance(value, TensorSpec))
    names = sorted({str(s) for t in tensors for s in t.shape if isinstance(s, sympy.Symbol)})
    hints = dict(zip(names, HINTS, strict=False))
    captured = capture(_Lines(function), Call(structure, tensors), hints)
    return read(captured, table, {}).outputs


@functools.cache
def terms(instance: Instance) -> tuple[Table, tuple[Term, ...]]:
    """The instance as terms."""
    table = Table()
    if not instance.is_term:
        return table, program(instance.inputs, instance.function, table)
    leaves = [table.input(s.path, s.shape, s.dtype, s.device) for s in specs(instance.inputs)]
    found = instance.function(table, *leaves)
    return table, found if isinstance(found, tuple) else (found,)


def steps(instance: Instance, pinned: Sizes | None = None) -> list[Step]:
    """Every application of every law on the way to the normal form."""
    table, outputs = terms(instance)
    facts = Facts(
        sympy.Ge(symbol, instance.above[str(symbol)])
        for symbol in instance.symbols
        if str(symbol) in instance.above and symbol not in (pinned or {})
    )
    normaliser = Normaliser(table, facts, dict(pinned or {}), is_exact=False, more=MORE_LAWS)
    normaliser.normal(outputs)
    return normaliser.steps


@functools.cache
def all_steps(instance: Instance) -> list[tuple[Step, dict[sympy.Symbol, int]]]:
    """The steps with all sizes symbolic, and with one or all of them pinned."""
    found: dict[tuple[Term, Term], tuple[Step, dict[sympy.Symbol, int]]] = {}
    choices: list[dict[sympy.Symbol, int]] = [{}]
    choices += [
        {symbol: size}
        for symbol in instance.symbols
        for size in (0, 1)
        if size >= instance.above.get(str(symbol), 0)
    ]
    choices += list(instance.sizes())
    for pinned in choices:
        for step in steps(instance, pinned):
            found.setdefault((step.before, step.after), (step, pinned))
    return list(found.values())


def fired(instance: Instance) -> set[str]:
    """The names of all laws that apply to an instance, at any sizes."""
    return {step.law.name for step, _ in all_steps(instance)}


def value(term: Term, inputs: Mapping[str, torch.Tensor], sizes: Sizes) -> Any:
    """A term, evaluated by torch."""
    values: dict[Term, Any] = {}

    def given(arg: Any) -> Any:
        if isinstance(arg, Term):
            return values[arg]
        if isinstance(arg, sympy.Basic):
            number = arg.subs(sizes)
            return int(number) if number.is_integer else float(number)
        return arg

    for below in topological([term]):
        if below.op == "input":
            values[below] = inputs[below.args[0]]
        elif below.op in ("attribute", "constant"):
            values[below] = below.payload
        else:
            shape = tuple(map(given, below.shape or ()))
            values[below] = apply(below, replace_operands(below.args, given), shape)
            if below.shape is not None:
                assert values[below].shape == shape, f"{below.text()} is noted as {shape}"
                assert values[below].dtype == below.dtype, f"{below.text()} is {below.dtype}"
    return values[term]


def drawn(instance: Instance, sizes: Sizes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of an instance, with special values among the numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        spec.path: special(tuple(int(sympy.sympify(s).subs(sizes)) for s in spec.shape), spec.dtype,
                           generator)
        for spec in specs(instance.inputs)
    }  # fmt: skip


def special(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Numbers, a third of them −0.0, infinite, NaN, subnormal or the largest."""
    if not dtype.is_floating_point:
        low, high = (0, 2) if dtype in (torch.bool, torch.uint8) else (-3, 4)
        return torch.randint(low, high, shape, generator=generator).to(dtype)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    which = torch.randint(0, 3 * len(SPECIAL), shape, generator=generator)
    for place, number in enumerate(SPECIAL):
        numbers = torch.where(which == place, number, numbers)
    return numbers.to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal shapes, dtypes and bits, where one NaN is as good as another."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.dtype.is_floating_point:
        return bool(torch.equal(one, other))
    numbers = ~one.isnan()
    return bool(
        torch.equal(one.isnan(), other.isnan())
        and torch.equal(one[numbers], other[numbers])
        and torch.equal(one[numbers].signbit(), other[numbers].signbit())
    )


def is_exact(instance: Instance) -> bool:
    """Whether every law that applies, or builds a part of what another one does, is exact."""
    return all(step.law.kind == "exact" for step, _ in all_steps(instance))


def hold(instance: Instance, inputs: Mapping[str, torch.Tensor], sizes: Sizes) -> None:
    """Both sides of every step that may be taken at these sizes agree."""
    exact = is_exact(instance)
    for step, pinned in all_steps(instance):
        if all(sizes[symbol] == size for symbol, size in pinned.items()):
            holds(step, inputs if exact else tame(inputs), sizes, exact=exact)


def holds(
    step: Step, inputs: Mapping[str, torch.Tensor], sizes: Sizes, *, exact: bool = True
) -> None:
    """Both sides of a step agree: bit for bit, or over the reals in float64."""
    if step.before.shape is None:
        return
    before, after = value(step.before, inputs, sizes), value(step.after, inputs, sizes)
    words = f"{step.law.name}: {step.before.text(3)} = {step.after.text(3)} at {dict(sizes)}"
    if exact:
        assert same_bits(before, after), f"{words}\n{before}\n{after}"
    else:
        torch.testing.assert_close(
            after, before, equal_nan=True, msg=lambda text: f"{words}: {text}"
        )


def fires_and_holds(law: str, instance: Instance) -> None:
    """The law applies, and is right at every small size: 0, 1 and 3."""
    assert law in fired(instance), f"{law} does not apply; these do: {sorted(fired(instance))}"
    for sizes in instance.sizes():
        hold(instance, drawn(instance, sizes), sizes)


def tame(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Numbers of a usual size, for laws over the reals."""
    return {
        name: tensor.nan_to_num(0.5, 2.0, -2.0).clamp(-9, 9)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in inputs.items()
    }


@st.composite
def situations(
    draw: st.DrawFn, instance: Instance
) -> tuple[dict[sympy.Symbol, int], dict[str, torch.Tensor]]:
    """Sizes from 0 to 6, and inputs whose every number is drawn."""
    sizes = {
        symbol: draw(st.integers(instance.above.get(str(symbol), 0), 6), label=str(symbol))
        for symbol in instance.symbols
    }
    seed = draw(st.integers(0, 2**16), label="seed")
    inputs = drawn(instance, sizes, seed)
    for spec in specs(instance.inputs):
        tensor = inputs[spec.path]
        if spec.dtype.is_floating_point and tensor.numel():
            number = draw(st.sampled_from(SPECIAL) | st.floats(width=32), label=spec.path)
            tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = number
    return sizes, inputs
