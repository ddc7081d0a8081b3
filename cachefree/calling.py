"""How the model's own call becomes flat tensors, and flat tensors the model's own result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from cachefree.call_checks import (
    Check,
    check_numbers,
    check_type,
    is_told_twice,
    mismatch,
    mismatch_of,
    missing,
    missing_flag,
    solved,
    unlike,
    wrong_count,
    wrong_size,
)
from cachefree.calls import SizeSpec, TensorSpec
from cachefree.errors import DomainError, Refusal
from cachefree.first_only import argument_of
from cachefree.recipes import Recipe
from cachefree.sizes import compiled, symbols_of
from cachefree.spec import FIRST_CALL, LATER_CALLS, Interface, Region
from cachefree.structure import MismatchError, Structure, is_same_plain

__all__ = ["NEUTRAL", "CachePlace", "Calling", "is_tracing"]

Sizes = dict[str, int]
NEUTRAL: Any = object()  # stands for a leaf of the neutral cache until the sizes are known
SPARE: Any = object()  # stands for a leaf that is left out and not read


def is_tracing() -> bool:
    """Whether a compiler or an exporter runs the call, so that sizes are not to be asked for."""
    return torch.compiler.is_compiling() or bool(torch._C._get_tracing_state())


def _no_attribute(name: str) -> torch.Tensor:
    raise LookupError(name)


@dataclass
class CachePlace:
    """Where the call takes a part of the cache.

    Attributes:
        parameter: The argument; a variadic one as ``*name``.
        steps: The entry inside it, where the argument is a container.
        structure: Of the cache there.
        leaves: One spec a leaf.
    """

    parameter: str
    steps: tuple[Any, ...]
    structure: Structure
    leaves: tuple[TensorSpec | SizeSpec, ...]

    @property
    def path(self) -> str:
        """As Python writes it."""
        return self.parameter.lstrip("*") + "".join(f"[{step!r}]" for step in self.steps)


@dataclass
class Calling:
    """The model's call and its result, taken apart.

    Attributes:
        parameters: The arguments that the graph was captured with, by name, in order.
        signature: Of the model's ``forward``.
        structure: The structure of the dict of these arguments on a later call.
        leaves: One spec a leaf of it; its tensors are the graph's inputs, in order.
        caches: Where the call takes the cache.
        results: The structure of the result.
        result_leaves: One spec a leaf of it.
        interface: The graph's inputs, outputs and domain.
        mode_matters: Why another mode would compute something else; empty where it would not.
        was_training: Whether the model was in training mode when it was captured.
        neutrals: The neutral values of cache tensors of fixed size, by path, where they are not
            zeros.
        attribute: A parameter or buffer by its name, for these.
        methods: The names of the model's methods that the call stands for, other than forward.
        first_only: Arguments that later calls leave out.
        absent: Sizes of these, by symbol, where they are left out.
        present: Sizes of what is computed of them, where they are given.
        spare: The arguments that later calls may leave out, since they do not read them.
        usual: Sizes of these where no other size tells them: those of the example.
        rowless: The arguments that calls may leave out, all or none, since they then have no rows.
        rowless_sizes: Sizes of these, by symbol, where they are left out.
        rowless_regions: The calls that may leave them out.
        needed: Flags that a call may not leave out.
        counts: The arguments that are the number of past tokens.
    """

    parameters: tuple[str, ...]
    signature: inspect.Signature
    structure: Structure
    leaves: tuple[TensorSpec | SizeSpec, ...]
    caches: tuple[CachePlace, ...]
    results: Structure
    result_leaves: tuple[TensorSpec | SizeSpec, ...]
    interface: Interface
    mode_matters: str = ""
    was_training: bool = False
    neutrals: Mapping[str, Recipe] = field(default_factory=dict)
    attribute: Callable[[str], torch.Tensor] = _no_attribute
    methods: tuple[str, ...] = ()
    first_only: tuple[str, ...] = ()
    absent: Mapping[str, int] = field(default_factory=dict)
    present: Mapping[str, Any] = field(default_factory=dict)
    spare: tuple[str, ...] = ()
    usual: Mapping[str, int] = field(default_factory=dict)
    rowless: tuple[str, ...] = ()
    rowless_sizes: Mapping[str, int] = field(default_factory=dict)
    rowless_regions: tuple[Region, ...] = ()
    needed: tuple[str, ...] = ()
    counts: frozenset[str] = field(default=frozenset(), init=False)
    _functions: dict[Any, Callable[[Mapping[str, int]], Any]] = field(default_factory=dict)
    _regions: dict[bool, list[list[Callable[[Mapping[str, int]], Any]]]] = field(
        default_factory=dict
    )
    _checks: list[Check] = field(default_factory=list)
    _past: tuple[str, ...] = ()
    _all: tuple[str, ...] = ()
    _positional: tuple[str, ...] = ()
    _by_keyword: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._checks = [
            Check.of(place, spec)
            for place, spec in enumerate(self.leaves)
            if isinstance(spec, TensorSpec)
        ]
        kinds: dict[Any, int] = {}
        for check in self._checks:
            made = argument_of(check.spec.path), check.spec.shape, check.spec.dtype
            check.kind = kinds.setdefault(made, len(kinds))
        numbers = {spec.path for spec in self.leaves if isinstance(spec, SizeSpec)}
        caches = {cache.parameter for cache in self.caches}
        self.counts = frozenset(numbers.intersection(self.parameters) - caches)
        self._past, self._all = self.interface.past_symbols, self.interface.symbols
        kinds_of = {name: p.kind for name, p in self.signature.parameters.items()}
        plain, by_keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        if set(kinds_of.values()) <= {plain, by_keyword}:
            self._positional = tuple(name for name, kind in kinds_of.items() if kind is plain)
            self._by_keyword = frozenset(kinds_of)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_functions": {}, "_regions": {}, "attribute": _no_attribute}

    def leave_out(
        self, names: tuple[str, ...], sizes: Mapping[str, int], regions: tuple[Region, ...]
    ) -> None:
        """Lets calls of some regions leave out arguments, which then have these sizes."""
        self.rowless, self.rowless_sizes, self.rowless_regions = names, sizes, regions

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The model's own call as flat tensors, the neutral cache put in where none is given.

        Raises:
            DomainError: an argument, a structure, a dtype or a size is not one that the graph was
                captured for.
        """
        named = self._named(args, kwargs)
        is_first = self._put_markers(named)
        self._put_spare(named, is_first)
        try:
            leaves = self.structure.take(named, "")
        except MismatchError as error:
            raise DomainError(mismatch_of(error)) from None
        has_markers = any(leaf is NEUTRAL or leaf is SPARE for leaf in leaves)
        sizes = self._sizes(leaves, is_first, has_markers=has_markers)
        if has_markers:
            self._put_neutral(leaves, sizes)
            self._put_zeros(leaves, sizes)
        if len(self._checks) == len(self.leaves):
            return leaves
        return [leaf for leaf, spec in self._counted(leaves, sizes) if isinstance(spec, TensorSpec)]

    def _counted(
        self, leaves: list[Any], sizes: Sizes
    ) -> Iterator[tuple[Any, TensorSpec | SizeSpec]]:
        """The leaves with what they have to be; numbers are those that follow from the sizes.

        Raises:
            DomainError: they are not.
        """
        for leaf, spec in zip(leaves, self.leaves, strict=True):
            if (
                isinstance(spec, SizeSpec)
                and leaf is not NEUTRAL
                and not is_tracing()
                and leaf != self.value(spec.expr, sizes)
            ):
                due = self.value(spec.expr, sizes)
                if spec.path in self.counts:
                    raise DomainError(wrong_count(spec.path, leaf, due))
                raise DomainError(
                    mismatch(f"{spec.path} is {leaf!r} where {due!r} follows from the sizes")
                )
            yield leaf, spec

    def unflatten(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor] | Sizes
    ) -> Any:
        """The graph's flat outputs in the model's own structure and classes.

        Args:
            outputs: The outputs.
            inputs: The flat inputs, which tell the sizes; or these.
        """
        tensors = iter(outputs)
        sizes: Sizes | None = inputs if isinstance(inputs, dict) else None
        leaves: list[Any] = []
        for spec in self.result_leaves:
            if isinstance(spec, TensorSpec):
                leaves.append(next(tensors))
            else:
                if sizes is None:
                    assert not isinstance(inputs, dict)
                    sizes = self.sizes_of(inputs)
                leaves.append(self.value(spec.expr, sizes))
        return self.results.rebuild(leaves)

    def sizes_of(self, inputs: Sequence[torch.Tensor]) -> Sizes:
        """The size of each symbol in a flat call."""
        sizes: Sizes = {}
        for check, tensor in zip(self._checks, inputs, strict=True):
            for axis, name in check.symbols:
                sizes.setdefault(name, tensor.shape[axis])
        self._solve(sizes, list(zip(self._checks, inputs, strict=True)))
        return sizes

    def neutral(
        self,
        spec: TensorSpec,
        sizes: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        attribute: Callable[[str], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The neutral element of a cache tensor."""
        kind = dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype
        recipe = self.neutrals.get(spec.path)
        if recipe is None:
            shape = [self.value(size, sizes) for size in spec.shape]
            return torch.zeros(shape, dtype=kind, device=device)
        own = attribute or self.attribute
        found = recipe.value(lambda size: self.value(size, sizes), own, device)
        return found.to(kind)

    def value(self, expr: Any, sizes: Mapping[str, int]) -> Any:
        """An expression of sizes as a number."""
        if not isinstance(expr, sympy.Basic):
            return expr
        function = self._functions.get(expr)
        if function is None:
            function = self._functions[expr] = compiled(expr)
        return function(sizes)

    # Arguments.

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments that the graph was captured with, by name."""
        given = dict(self._bound(args, kwargs))
        for name, value in given.items():
            if name not in self.parameters and not self._is_default(name, value):
                self._refuse_other_caches(given)  # what a cache's class is may be the reason
                raise DomainError(
                    Refusal(
                        f"The argument {name!r} was given, but the graph was captured without it.",
                        why="A graph cannot take what it was captured without: the argument "
                        "would be ignored.",
                        remedy=f"Rewrite again with {name!r} in example_inputs.",
                    )
                )
        self._refuse_parts(given)
        given |= {name: NEUTRAL for name in self.counts if name in given and given[name] is None}
        return {
            name: given[name]
            if name in given
            and not (name in (*self.first_only, *self.rowless) and given[name] is None)
            else self._left_out(place, name)
            for place, name in enumerate(self.parameters)
        }

    def _refuse_parts(self, given: Mapping[str, Any]) -> None:
        """Refuses a part of what only first calls take."""
        for together in (self.first_only, self.rowless):
            own = [name for name in together if given.get(name) is not None]
            if own and len(own) != len(together):
                left = ", ".join(name for name in together if name not in own)
                raise DomainError(mismatch(f"{', '.join(own)} is given without {left}"))

    def _refuse_other_caches(self, given: Mapping[str, Any]) -> None:
        """Refuses a cache of a class that the graph does not take."""
        for cache in self.caches:
            value = given.get(cache.parameter)
            if cache.steps or value is None or self._is_neutral(cache, value):
                continue
            try:
                cache.structure.take(value, cache.path)
            except MismatchError as error:
                if error.classes is not None:
                    raise DomainError(mismatch_of(error)) from None

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        if self._is_plain(len(args), kwargs):
            yield from zip(self._positional, args, strict=False)
            yield from kwargs.items()
            return
        try:
            bound = self.signature.bind_partial(*args, **kwargs)
        except TypeError as error:
            raise DomainError(mismatch(str(error))) from None
        for name, value in bound.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                yield f"*{name}", value
            elif kind is inspect.Parameter.VAR_KEYWORD:
                yield from value.items()
            else:
                yield name, value

    def _is_plain(self, count: int, kwargs: dict[str, Any]) -> bool:
        """Whether arguments are bound as they stand: the signature's own binding takes its time."""
        if count > len(self._positional):
            return False
        names = kwargs.keys()
        return not names or (
            names <= self._by_keyword and names.isdisjoint(self._positional[:count])
        )

    def _is_default(self, name: str, value: Any) -> bool:
        if value is None:
            return True
        parameter = self.signature.parameters.get(name.lstrip("*"))
        if parameter is None:
            return False
        if parameter.kind is parameter.VAR_POSITIONAL:
            return bool(value == ())
        default = parameter.default
        is_plain = isinstance(value, (bool, int, float, str))
        return default is value or (is_plain and is_same_plain(value, default))

    def _left_out(self, place: int, name: str) -> Any:
        """What stands for an argument that a call leaves out."""
        child = self.structure.children[place]
        if child.leaf_count == 0 and child.kind == "constant":
            if name in self.needed:
                raise DomainError(missing_flag(name, child.value))
            return child.value  # a flag: the value that the graph was captured with
        if name in self.counts:
            default = self.signature.parameters[name].default
            return NEUTRAL if default is inspect.Parameter.empty else default
        if any(cache.parameter == name and not cache.steps for cache in self.caches):
            return None
        if name in self.first_only or name in self.rowless:
            return child.rebuild([NEUTRAL] * child.leaf_count)
        if name in self.spare:
            return SPARE
        raise DomainError(missing(name))

    def _put_spare(self, named: dict[str, Any], is_first: bool) -> None:
        """Puts markers for what a later call leaves out and does not read."""
        for name in self.spare:
            if named[name] is None or named[name] is SPARE:
                if is_first:
                    raise DomainError(missing(name))
                child = self.structure.children[self.parameters.index(name)]
                named[name] = child.rebuild([SPARE] * child.leaf_count)

    def _put_zeros(self, leaves: list[Any], sizes: Sizes) -> None:
        """Zeros for what is not read, of sizes at which the call is inside the domain."""
        device = next((x.device for x in leaves if isinstance(x, torch.Tensor)), None)
        for check in self._checks:
            if leaves[check.place] is SPARE:
                shape = [self.value(size, sizes) for size in check.spec.shape]
                leaves[check.place] = torch.zeros(shape, dtype=check.spec.dtype, device=device)

    def _put_sizes(self, sizes: Sizes) -> None:
        """Sizes that nothing that is given tells: as the domain ties them to others."""
        facts = [c.fact for region in self.interface.domain.regions for c in region.conditions]
        ties = [fact for fact in facts if isinstance(fact, sympy.Eq)]
        for name in self._all:
            symbol = sympy.Symbol(name, integer=True, nonnegative=True)
            for tie in ties if name not in sizes else ():
                for one, other in ((tie.lhs, tie.rhs), (tie.rhs, tie.lhs)):
                    if {str(s) for s in one.free_symbols} <= sizes.keys() and symbol in (
                        other.free_symbols
                    ):
                        found = solved(other, symbol, sizes, self.value(one, sizes))
                        if found is not None and one.free_symbols:
                            sizes[name] = found
            sizes.setdefault(name, self.usual.get(name, 1))

    def _put_markers(self, named: dict[str, Any]) -> bool:
        """Puts markers for the neutral cache where none is given; whether that is everywhere."""
        given = [
            cache
            for cache in self.caches
            if not self._is_neutral(cache, _inside(named[cache.parameter], cache.steps))
        ]
        if given and len(given) != len(self.caches):
            names = ", ".join(cache.path for cache in given)
            raise DomainError(mismatch(f"Only a part of the cache is given: {names}"))
        if given:
            return False
        for cache in self.caches:
            own = _inside(named[cache.parameter], cache.steps)
            other = cache.structure.set_otherwise(own, cache.path)
            if other is not None:
                raise DomainError(
                    Refusal(
                        f"The call does not fit: {other}.",
                        why="It was a constant of the model's code when the graph was captured.",
                        remedy="Pass an empty cache that is set up as the model's own; or rewrite "
                        "a model that makes such caches.",
                    )
                )
            value = cache.structure.rebuild([NEUTRAL] * len(cache.leaves))
            named[cache.parameter] = _with(named[cache.parameter], cache.steps, value)
        return True

    def _is_neutral(self, cache: CachePlace, value: Any) -> bool:
        if value is False:  # the argument's own word for none
            parameter = self.signature.parameters.get(cache.parameter)
            return parameter is not None and parameter.default is False
        return _is_empty(value) or cache.structure.is_absent(value)

    def _put_neutral(self, leaves: list[Any], sizes: Sizes) -> None:
        device = next((x.device for x in leaves if isinstance(x, torch.Tensor)), None)
        for check in self._checks:
            if leaves[check.place] is NEUTRAL:
                where = device if device is not None else check.spec.device
                leaves[check.place] = self.neutral(check.spec, sizes, where)

    # Sizes.

    def _sizes(self, leaves: Sequence[Any], is_first: bool, *, has_markers: bool) -> Sizes:
        """The size of each symbol, after checking types, sizes and the domain."""
        sizes: Sizes = dict.fromkeys(self._past, 0) if is_first else {}
        is_checked = not is_tracing()
        pairs = [(check, leaves[check.place]) for check in self._checks]
        if has_markers:
            sizes.update(self._absent_sizes(leaves))
            pairs = [pair for pair in pairs if pair[1] is not NEUTRAL and pair[1] is not SPARE]
        if is_checked:
            pairs = unlike(pairs)
        for check, leaf in pairs:
            check_type(leaf, check.spec)
            shape = leaf.shape
            if is_checked:
                check_numbers(check, shape)
            for axis, name in check.symbols:
                known = sizes.setdefault(name, shape[axis])
                if is_checked and known != shape[axis]:
                    raise DomainError(
                        wrong_size(check.spec, axis, shape[axis], f"{name} = {known}")
                    )
        self._solve(sizes, pairs)
        for name, size in self.present.items():
            if name not in sizes:
                sizes[name] = self.value(size, sizes)
        if has_markers and any(leaf is SPARE for leaf in leaves):
            self._put_sizes(sizes)
            if any(sizes[name] == 0 for name in self._past):  # an empty cache: a first call
                place = next(place for place, leaf in enumerate(leaves) if leaf is SPARE)
                raise DomainError(missing(self.leaves[place].path))
        if is_checked:
            self._check_sizes(pairs, sizes, is_first)
        return sizes

    def _absent_sizes(self, leaves: Sequence[Any]) -> Sizes:
        """The sizes of what only first calls take, where a call leaves it out."""
        own_arguments = (*self.first_only, *self.rowless)
        absent = [
            check.spec
            for check in self._checks
            if leaves[check.place] is NEUTRAL and argument_of(check.spec.path) in own_arguments
        ]
        if not absent:
            return {}
        given = [c.spec for c in self._checks if c.spec not in absent]
        beside = symbols_of(size for spec in given for size in spec.shape)
        own = symbols_of(size for spec in absent for size in spec.shape) - beside
        return {**dict.fromkeys(map(str, own), 0), **self.absent, **self.rowless_sizes}

    def _check_sizes(self, pairs: list[tuple[Check, Any]], sizes: Sizes, is_first: bool) -> None:
        device = pairs[0][1].device if pairs else None
        for check, leaf in pairs:
            if leaf.device != device:
                first = pairs[0][0].spec.path
                raise DomainError(
                    mismatch(f"{check.spec.path} is on {leaf.device} where {first} is on {device}")
                )
            for axis, expr in check.expressions:
                due = self.value(expr, sizes)
                if leaf.shape[axis] != due:
                    raise DomainError(
                        wrong_size(check.spec, axis, leaf.shape[axis], f"{expr} = {due}")
                    )
        if self.rowless and not any(argument_of(c.spec.path) in self.rowless for c, _ in pairs):
            is_empty = is_first or any(sizes[name] == 0 for name in self._past)
            kind = FIRST_CALL if is_empty else LATER_CALLS
            named = [region for region in self.rowless_regions if region.name == kind]
            if any(region.holds(sizes) for region in named):
                return
            raise DomainError(missing(self.rowless[0]))
        if self._is_inside(sizes, is_first):
            return
        regions = self.interface.domain.regions_of(is_first)
        told = ", ".join(f"{name} = {size}" for name, size in sorted(sizes.items()))
        lines = [c.where for region in regions for c in region.conditions if c.where]
        implied = [[str(c) for c in region.conditions if c.is_implied] for region in regions]
        failed = [
            str(c) for c in regions[0].conditions if c.is_implied and not self.value(c.fact, sizes)
        ]
        failed = [told for told in failed if all(told in others for others in implied)]
        least = f" In all of these, {' and '.join(failed)}." if failed else ""
        raise DomainError(
            Refusal(
                f"A call with {told} is outside the domain.",
                why=f"{self._unfilled(pairs, sizes)}The graph was shown to equal the model where: "
                f"{'; '.join(map(str, regions))}.{least}",
                remedy="Call inside the domain, or rewrite with examples of these sizes.",
                where=lines[0] if lines else None,
            )
        )

    def _is_inside(self, sizes: Sizes, is_first: bool) -> bool:
        regions = self._regions.get(is_first)
        if regions is None:
            regions = self._regions[is_first] = [
                [compiled(condition.fact) for condition in region.conditions]
                for region in self.interface.domain.regions_of(is_first)
            ]
        return any(all(holds(sizes) for holds in region) for region in regions)

    def _unfilled(self, pairs: list[tuple[Check, Any]], sizes: Sizes) -> str:
        """Which tensor of the cache is filled in part, where first calls fill it for good."""
        later = [r for r in self.interface.domain.regions if r.name == LATER_CALLS]
        for fact in (condition.fact for region in later for condition in region.conditions):
            if not isinstance(fact, sympy.Eq) or self.value(fact, sizes):
                continue
            for past, rows in (fact.args, fact.args[::-1]):
                holders = [check.spec.path for check, _ in pairs if past in check.spec.shape]
                if holders and str(past) in self._past and not (rows.free_symbols & {past}):
                    due = self.value(rows, sizes)
                    return (
                        f"{holders[0]} holds {sizes[str(past)]} rows where a later call has "
                        f"{due} and a first call none. "
                    )
        return ""

    def another_mode(self, what: str, *, is_training: bool) -> Refusal | None:
        """Why a mode is refused in which the model computes something else; None where it is not.

        Args:
            what: What is in the mode: ``"model"`` or ``"rewritten"``.
            is_training: Whether the mode is that of training.
        """
        if not self.mode_matters or is_training is self.was_training:
            return None
        modes = {True: ("training", "train()"), False: ("evaluation", "eval()")}
        return Refusal(
            f"The {what.replace('rewritten', 'rewritten model')} is in {modes[is_training][0]} "
            "mode.",
            why=f"The graph was captured in {modes[self.was_training][0]} mode, and "
            f"{self.mode_matters}.",
            remedy=f"Call {what}.{modes[self.was_training][1]}; or rewrite the model in the mode "
            "that you want.",
        )

    def _solve(self, sizes: Sizes, pairs: Sequence[tuple[Check, Any]]) -> None:
        """Symbols that occur inside expressions only, from one size each."""
        for name in self._all:
            if name in sizes:
                continue
            symbol = sympy.Symbol(name, integer=True, nonnegative=True)
            for check, leaf in pairs:
                for axis, expr in check.expressions:
                    others = {str(s) for s in expr.free_symbols} - {name}
                    if symbol in expr.free_symbols and others <= sizes.keys():
                        if not sympy.diff(expr, symbol).is_Integer and is_told_twice(pairs, symbol):
                            continue
                        found = solved(expr, symbol, sizes, leaf.shape[axis])
                        if found is not None:
                            sizes.setdefault(name, found)


def _inside(value: Any, steps: tuple[Any, ...]) -> Any:
    for step in steps:
        if value is None or (isinstance(value, Mapping) and step not in value):
            return None
        value = value[step]
    return value


def _with(container: Any, steps: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested containers with another entry."""
    if not steps:
        return value
    step, *rest = steps
    if isinstance(container, tuple):
        parts = list(container)
        parts[step] = _with(parts[step], tuple(rest), value)
        return tuple(parts)
    copied = container.copy()
    before = copied.get(step) if isinstance(copied, Mapping) else copied[step]
    copied[step] = _with(before, tuple(rest), value)
    return copied


def _is_empty(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, torch.Tensor):
        return value.dim() == 1 and value.shape[0] == 0
    if isinstance(value, (tuple, list)):
        return all(map(_is_empty, value))
    return isinstance(value, Mapping) and not value
