"""Complex tensors as pairs of reals, on an axis of two behind all others.

ONNX has complex numbers in few operators, and torch.onnx writes few of torch's for them. Every
other operator that meets one is written here over the real and the imaginary parts; what is not in
the table is refused. What an operator would have given is asked of torch's own shape rule: rank and
dtype of the pair have to be its.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cachefree.errors import CacheFreeError, Refusal

if TYPE_CHECKING:
    from cachefree.spec import Interface

__all__ = ["Pairs", "pair_of", "refuse_complex"]

aten = torch.ops.aten
Create = Callable[[Any, tuple[Any, ...], dict[str, Any]], fx.Node]
"""``(operator, arguments, options) → node``."""
Rule = Callable[..., Any]


def pair_of(tensor: torch.Tensor) -> torch.Tensor:
    """The real and imaginary parts of a tensor, (…) → (…, 2)."""
    return torch.view_as_real(tensor.detach().resolve_conj()).contiguous()


def refuse_complex(interface: Interface) -> None:
    """Refuses a complex input or result: a runtime has no tensor for it.

    Raises:
        CacheFreeError: an input, a result or a slot of the cache is complex.
    """
    specs: list[Any] = [*interface.inputs, *interface.outputs]
    for spec in specs:
        if spec.dtype.is_complex:
            raise CacheFreeError(
                Refusal(
                    f"{spec.name!r} holds complex numbers.",
                    why="ONNX Runtime takes and gives none.",
                    remedy="Take and return torch.view_as_real of it in the model, and use "
                    "torch.view_as_complex inside.",
                )
            )


class Pairs:
    """The complex values of a graph that is being written.

    Attributes:
        numbers: The node of a pair → what it stands for, as a complex fake tensor, or a tuple of
            these.
    """

    def __init__(self, mode: Any) -> None:
        self.mode = mode
        self.numbers: dict[fx.Node, Any] = {}

    def is_due(self, target: Any, args: Any, options: Any) -> bool:
        """Whether an operator takes or makes complex numbers."""
        leaves: list[Any] = []
        fx.node.map_aggregate((args, options), leaves.append)
        return target in _MAKERS or any(
            isinstance(leaf, complex)
            or (isinstance(leaf, torch.dtype) and leaf.is_complex)
            or (isinstance(leaf, fx.Node) and leaf in self.numbers)
            for leaf in leaves
        )

    def write(self, create: Create, node: fx.Node, args: Any, options: Any) -> fx.Node:
        """Writes one operator over pairs.

        Raises:
            CacheFreeError: there is no rule for it.
        """
        target: Any = aten.sym_size.int if node.op == "call_method" else node.target
        rule = None if self._has_others(args) else _RULES.get(target)
        with self.mode:
            fakes = fx.node.map_arg((args, options), self._fake)
            expected = target(*fakes[0], **fakes[1]) if rule is not None else None
        made = None if rule is None else rule(_Step(self, create, target, expected), args, options)
        if made is None or not _is_due_result(made.meta["val"], expected):
            raise unwritten(node)
        if _is_complex(expected):
            self.numbers[made] = expected
        return made  # type: ignore[no-any-return]

    def _has_others(self, args: Any) -> bool:
        """Whether a complex operand is no pair: one that torch.onnx writes in its own way."""
        nodes: list[fx.Node] = []
        fx.node.map_arg(args, nodes.append)
        return any(_is_complex(node.meta["val"]) for node in nodes)

    def _fake(self, node: fx.Node) -> Any:
        return self.numbers.get(node, node.meta["val"])


def unwritten(node: fx.Node) -> CacheFreeError:
    """The error of an operator on complex numbers that no rule writes."""
    line = node.meta.get("stack_trace", "").strip().split("\n")[-2:]
    what = "The result" if node.op == "output" else f"{node.target}"
    return CacheFreeError(
        Refusal(
            f"{what} on complex numbers cannot be written to ONNX. "
            f"{' '.join(part.strip() for part in line)}".strip(),
            why="ONNX has real numbers; of complex ones, pairs are written for rotations, "
            "products, sums and shapes.",
            remedy="Write it in the model on real and imaginary parts.",
        )
    )


def _is_complex(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_is_complex, value))
    return isinstance(value, torch.Tensor) and value.is_complex()


def _is_due_result(made: Any, expected: Any) -> bool:
    """Whether a value has the rank and dtype of what torch gives."""
    if isinstance(expected, (tuple, list)):
        return len(made) == len(expected) and all(map(_is_due_result, made, expected))
    if not isinstance(expected, torch.Tensor):
        return True
    dtype = expected.dtype.to_real()
    return bool(made.dtype == dtype and made.dim() == expected.dim() + expected.is_complex())


class _Step:
    """What a rule writes with.

    Attributes:
        target: The operator.
        dtype: Of the parts of its result.
    """

    def __init__(self, pairs: Pairs, create: Create, target: Any, expected: Any) -> None:
        self.pairs, self.create, self.target = pairs, create, target
        first = expected[0] if isinstance(expected, (tuple, list)) else expected
        self.dtype = first.dtype.to_real() if isinstance(first, torch.Tensor) else None

    def call(self, target: Any, *args: Any) -> Any:
        return self.create(target, args, {})

    def is_pair(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self.pairs.numbers

    def rank(self, value: Any) -> int:
        return int(self.pairs._fake(value).dim())

    def cast(self, value: Any) -> Any:
        if not isinstance(value, fx.Node) or value.meta["val"].dtype == self.dtype:
            return value
        return self.call(torch.ops.prims.convert_element_type.default, value, self.dtype)

    def parts(self, value: Any) -> tuple[Any, Any]:
        """Real and imaginary part; None for the latter of what is real."""
        if isinstance(value, complex):
            return value.real, value.imag
        if not self.is_pair(value):
            return self.cast(value), None
        kept = self.cast(value)
        return self.call(aten.select.int, kept, -1, 0), self.call(aten.select.int, kept, -1, 1)

    def joined(self, real: Any, imaginary: Any) -> Any:
        """A pair of two parts of one shape; without the second, of a real tensor."""
        if imaginary is None:
            imaginary = self.call(aten.zeros_like.default, real)
        return self.cast(self.call(aten.stack.default, [real, imaginary], -1))

    def pair(self, value: Any) -> Any:
        return self.cast(value) if self.is_pair(value) else self.joined(*self.parts(value))


def _along(*places: int, more: int = 0) -> Rule:
    """An operator along axes, which are counted from the front."""

    def rule(step: _Step, args: Any, options: Any) -> Any:
        if options:
            return None
        given = list(args)
        if isinstance(given[0], (tuple, list)):
            rank = step.rank(given[0][0]) + more
            given[0] = [step.pair(part) for part in given[0]]
        else:
            rank = step.rank(given[0]) + more
        for place in places:
            if place < len(given):
                axes = given[place]
                one = isinstance(axes, int)
                given[place] = axes % rank if one else [axis % rank for axis in axes]
        return step.create(step.target, tuple(given), {})

    return rule


def _sized(step: _Step, args: Any, options: Any) -> Any:
    """An operator that is given all sizes of its result."""
    return None if options else step.call(step.target, args[0], [*args[1], 2], *args[2:])


def _permute(step: _Step, args: Any, options: Any) -> Any:
    rank = step.rank(args[0])
    return step.call(step.target, args[0], [*(axis % rank for axis in args[1]), rank])


def _turned(step: _Step, args: Any, options: Any) -> Any:
    rank = step.rank(args[0])
    return step.call(aten.transpose.int, args[0], rank - 2, rank - 1)


def _as_it_is(step: _Step, args: Any, options: Any) -> Any:
    return step.create(step.target, args, options)


def _operand(step: _Step, args: Any, options: Any) -> Any:
    return step.call(aten.alias.default, args[0])


def _index(step: _Step, args: Any, options: Any) -> Any:
    return None if step.is_pair(args[1]) else step.create(step.target, args, options)


def _part(number: int) -> Rule:
    def rule(step: _Step, args: Any, options: Any) -> Any:
        return step.parts(args[0])[number]

    return rule


def _conjugate(step: _Step, args: Any, options: Any) -> Any:
    real, imaginary = step.parts(args[0])
    return step.joined(real, step.call(aten.neg.default, imaginary))


def _polar(step: _Step, args: Any, options: Any) -> Any:
    """``r·e^{iθ} = r·cos θ + i·r·sin θ``."""
    waves = (step.call(wave.default, args[1]) for wave in (aten.cos, aten.sin))
    return step.joined(*(step.call(aten.mul.Tensor, args[0], wave) for wave in waves))


def _exp(step: _Step, args: Any, options: Any) -> Any:
    real, imaginary = step.parts(args[0])
    return _polar(step, (step.call(aten.exp.default, real), imaginary), options)


def _complex(step: _Step, args: Any, options: Any) -> Any:
    real, imaginary = args
    shapes = [len(part.meta["val"].shape) for part in args]
    if shapes[0] != shapes[1] or list(map(str, real.meta["val"].shape)) != list(
        map(str, imaginary.meta["val"].shape)
    ):
        zeros = step.call(aten.zeros_like.default, step.call(aten.add.Tensor, real, imaginary))
        real, imaginary = (step.call(aten.add.Tensor, part, zeros) for part in args)
    return step.joined(real, imaginary)


def _converted(step: _Step, args: Any, options: Any) -> Any:
    """To another dtype; complex numbers become real ones only by a choice of part."""
    if step.is_pair(args[0]) and not _is_wanted_complex(args, options):
        return None
    return step.pair(args[0])


def _is_wanted_complex(args: Any, options: Any) -> bool:
    dtypes = [value for value in (*args, *options.values()) if isinstance(value, torch.dtype)]
    return all(dtype.is_complex for dtype in dtypes)


def _converted_like(step: _Step, args: Any, options: Any) -> Any:
    if step.is_pair(args[0]) and not step.is_pair(args[1]):
        return None
    return step.pair(args[0])


def _flattened(step: _Step, args: Any, options: Any) -> Any:
    first = args[1] if len(args) > 1 else 0
    last = args[2] if len(args) > 2 else -1
    return _along(1, 2)(step, (args[0], first, last), options)


def _repeated(step: _Step, args: Any, options: Any) -> Any:
    return step.call(step.target, args[0], [*args[1], 1])


def _size(step: _Step, args: Any, options: Any) -> Any:
    """``|a + bi| = √(a² + b²)``."""
    squares = [step.call(aten.mul.Tensor, part, part) for part in step.parts(args[0])]
    return step.call(aten.sqrt.default, step.call(aten.add.Tensor, *squares))


def _times(step: _Step, times: Any, one: Any, other: Any) -> Any:
    if not isinstance(one, fx.Node):
        one, other = other, one
    return step.call(times, one, other)


def _product(times: Any) -> Rule:
    """``(a + bi)·(c + di) = (ac - bd) + (ad + bc)i``, of elements or of matrices."""

    def rule(step: _Step, args: Any, options: Any) -> Any:
        if options or len(args) != 2:
            return None
        (a, b), (c, d) = map(step.parts, args)
        if b is None or d is None:
            left = (a, b) if d is None else (a, a)
            right = (c, c) if d is None else (c, d)
            return step.joined(
                *(_times(step, times, x, y) for x, y in zip(left, right, strict=True))
            )
        ac, bd, ad, bc = (_times(step, times, x, y) for x, y in ((a, c), (b, d), (a, d), (b, c)))
        return step.joined(step.call(aten.sub.Tensor, ac, bd), step.call(aten.add.Tensor, ad, bc))

    return rule


def _divided(step: _Step, args: Any, options: Any) -> Any:
    """By a real number."""
    if options or step.is_pair(args[1]) or isinstance(args[1], complex):
        return None
    divisor = step.parts(args[1])[0]
    parts = step.parts(args[0])
    return step.joined(*(step.call(aten.div.Tensor, part, divisor) for part in parts))


def _sum_of(plus: Any) -> Rule:
    def rule(step: _Step, args: Any, options: Any) -> Any:
        if options or len(args) != 2 or not isinstance(args[0], fx.Node):
            return None
        (a, b), (c, d) = map(step.parts, args)
        real = step.call(plus, a, c)
        zeros = step.call(aten.zeros_like.default, real)
        imaginary = zeros if b is None else step.call(aten.add.Tensor, zeros, b)
        return step.joined(real, imaginary if d is None else step.call(plus, imaginary, d))

    return rule


def _where(step: _Step, args: Any, options: Any) -> Any:
    condition = step.call(aten.unsqueeze.default, args[0], -1)
    return step.call(aten.where.self, condition, *map(step.pair, args[1:]))


def _table(rule: Rule, *targets: Any) -> dict[Any, Rule]:
    return dict.fromkeys(targets, rule)


_RULES: dict[Any, Rule] = {
    **_table(_as_it_is, operator.getitem, aten.neg.default),
    **_table(_as_it_is, aten.clone.default, aten.detach.default, aten.alias.default),
    **_table(_as_it_is, aten.contiguous.default),
    **_table(_operand, aten.view_as_complex.default, aten.view_as_real.default),
    **_table(_operand, aten.resolve_conj.default, aten.resolve_neg.default),
    **_table(_along(1), aten.squeeze.dim, aten.select.int, aten.slice.Tensor, aten.narrow.default),
    **_table(_along(1), aten.index_select.default, aten.sym_size.int, aten.unbind.int),
    **_table(_along(1), aten.cat.default, aten.flip.default),
    **_table(_along(1, more=1), aten.unsqueeze.default, aten.stack.default),
    **_table(_along(2), aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default),
    **_table(_along(1, 2), aten.transpose.int),
    **_table(_flattened, aten.flatten.using_ints),
    **_table(_along(1), aten.unflatten.int, aten.sum.dim_IntList, aten.mean.dim),
    **_table(_repeated, aten.repeat.default),
    **_table(_size, aten.abs.default),
    **_table(_sized, aten.view.default, aten.reshape.default, aten.expand.default),
    **_table(_sized, aten._unsafe_view.default),
    **_table(_permute, aten.permute.default),
    **_table(_turned, aten.mT.default, aten.t.default),
    **_table(_index, aten.index.Tensor),
    **_table(_part(0), aten.real.default),
    **_table(_part(1), aten.imag.default),
    **_table(_conjugate, aten.conj.default, aten._conj.default, aten.conj_physical.default),
    **_table(_polar, aten.polar.default),
    **_table(_exp, aten.exp.default),
    **_table(_complex, aten.complex.default),
    **_table(_converted, aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout),
    **_table(_converted, aten.to.device),
    **_table(_converted_like, aten.to.other, aten.type_as.default),
    **_table(_converted, torch.ops.prims.convert_element_type.default),
    **_table(_product(aten.mul.Tensor), aten.mul.Tensor, aten.mul.Scalar),
    **_table(_product(aten.matmul.default), aten.matmul.default),
    **_table(_product(aten.mm.default), aten.mm.default),
    **_table(_product(aten.bmm.default), aten.bmm.default),
    **_table(_divided, aten.div.Tensor, aten.div.Scalar),
    **_table(_sum_of(aten.add.Tensor), aten.add.Tensor, aten.add.Scalar),
    **_table(_sum_of(aten.sub.Tensor), aten.sub.Tensor, aten.sub.Scalar),
    **_table(_where, aten.where.self),
}
_MAKERS: Sequence[Any] = (aten.view_as_complex.default, aten.complex.default, aten.polar.default)
