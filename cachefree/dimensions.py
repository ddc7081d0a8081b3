"""Which dimensions of a call's inputs vary, which vary together, and which are constant.

Found by behaviour, on fake tensors: a dimension varies if the model runs when it has another size.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from cachefree.calls import Call, TensorSpec
from cachefree.fake_runs import run_on_fakes

__all__ = ["DECODERS", "Dimension", "find_dimensions", "resized"]

Dimension = tuple[int, int]  # the input's place among the call's leaves, and its axis


def resized(call: Call, sizes: dict[Dimension, Any]) -> Call:
    """The call with some dimensions of another size, told in their units."""
    leaves = tuple(
        TensorSpec(
            leaf.path,
            tuple(
                sizes[place, axis] * call.units.get((place, axis), 1)
                if (place, axis) in sizes
                else size
                for axis, size in enumerate(leaf.shape)
            ),
            leaf.dtype,
            leaf.device,
        )
        if isinstance(leaf, TensorSpec)
        else leaf
        for place, leaf in enumerate(call.leaves)
    )
    return replace(call, leaves=leaves)


def find_dimensions(model: nn.Module, call: Call) -> tuple[Call, list[list[Dimension]]]:
    """Finds the dimensions that vary.

    Args:
        model: Any module.
        call: A call that runs, with sizes that are numbers.

    Returns:
        The call with every varying dimension at least 2 long, and the groups of dimensions that
        vary together.
    """

    def runs(sizes: dict[Dimension, int]) -> bool:
        try:
            run_on_fakes(model, resized(call, sizes), {})
        except Exception:  # noqa: BLE001 - a size that the model does not take is what is asked
            return False
        return True

    given = call
    call = _without_ones(call, runs)
    several = {size: dims for size, dims in _by_size(call).items() if size >= 2}
    alone = [[dim] for dims in several.values() for dim in dims]
    if len(alone) <= _FEW and runs(_all_different(alone)):
        return _with_constants_of(given, call, alone), alone
    groups: list[list[Dimension]] = []
    for dims in several.values():
        groups += _independent(dims, _fresh_size(call), runs)
    groups = _independent_at_once(call, _with_followers(call, groups, runs), runs)
    return _with_constants_of(given, call, groups), groups


DECODERS = re.compile(r"dec|tgt|target|trg")
_FOLLOWS = re.compile(r"mask|position", re.IGNORECASE)
_PRIMES = (5, 7, 11, 13, 17, 19, 23)
_FEW = 3  # dimensions that are tried all at once before each is tried alone


def _all_different(
    groups: list[list[Dimension]], primes: Sequence[int] = _PRIMES
) -> dict[Dimension, int]:
    pairs = zip(groups, primes, strict=False)
    return {dim: prime for group, prime in pairs for dim in group}


def _with_followers(
    call: Call,
    groups: list[list[Dimension]],
    runs: Callable[[dict[Dimension, int]], bool],
) -> list[list[Dimension]]:
    """The groups, with every dimension in that of its axis and size, where it may vary with it.

    A mask that is read by index takes a batch of its own: it is the batch all the same. So does a
    mask or a position that is cut or padded to the tokens.
    """
    kept = [list(group) for group in groups]

    def follows(dim: Dimension) -> bool:
        return _FOLLOWS.search(call.leaves[dim[0]].path) is not None

    grouped = {dim for group in groups for dim in group}
    dims = [dim for size, dims in _by_size(call).items() if size >= 2 for dim in dims]
    # one that may be longer than the tokens, not shorter, is in no group yet
    kept += [[dim] for dim in dims if dim not in grouped and follows(dim)]
    kept.sort(key=lambda group: all(map(follows, group)))
    paths = [leaf.path for leaf in call.leaves]
    for group in kept[:]:
        if group not in kept or all(map(follows, group)):
            continue
        kinds = {(axis, call.leaves[place].shape[axis]) for place, axis in group}  # type: ignore[union-attr]
        for other in list(kept):
            place, axis = other[0]
            is_alike = (axis, call.leaves[place].shape[axis]) in kinds  # type: ignore[union-attr]
            if other is group or len(other) > 1 or not is_alike:
                continue
            if len(group) == 1 and not follows(other[0]):
                continue
            if (
                axis
                and DECODERS.search(paths[place])
                and not all(DECODERS.search(paths[own]) for own, _ in group)
            ):
                continue  # a decoder's tokens are as many as the encoder's by chance
            if runs(dict.fromkeys([*group, *other], _fresh_size(call))):
                group += other
                kept.remove(other)
    return [group for group in kept if len(group) > 1 or group[0] in grouped]


def _independent_at_once(
    call: Call,
    groups: list[list[Dimension]],
    runs: Callable[[dict[Dimension, int]], bool],
) -> list[list[Dimension]]:
    """The groups, those of one axis and size joined where they do not vary all at once.

    A ``view(batch, -1)`` takes any number of rows that divides; primes do not.
    """

    def run_at_once(groups: list[list[Dimension]]) -> bool:
        orders = (_PRIMES, _PRIMES[: len(groups)][::-1])
        return any(runs(_all_different(groups, primes)) for primes in orders)

    if not 1 < len(groups) <= len(_PRIMES) or run_at_once(groups):
        return groups
    alike: dict[tuple[int, int], list[list[Dimension]]] = {}
    for group in groups:
        place, axis = group[0]
        alike.setdefault((axis, call.leaves[place].shape[axis]), []).append(group)  # type: ignore[union-attr]
    for several in alike.values():
        if len(several) > 1:
            rest = [group for group in groups if group not in several]
            joined = [*rest, [dim for group in several for dim in group]]
            if run_at_once(joined):
                return joined
    return groups


def _with_constants_of(given: Call, call: Call, groups: list[list[Dimension]]) -> Call:
    """The call with every size of 1 that was made larger and does not vary as it was given."""
    varying = {dim for group in groups for dim in group}
    ones = {
        (place, axis): size
        for place, leaf in enumerate(given.leaves)
        if isinstance(leaf, TensorSpec)
        for axis, size in enumerate(leaf.shape)
        if size == 1 and (place, axis) not in varying
    }
    return resized(call, ones)


def _by_size(call: Call) -> dict[int, list[Dimension]]:
    found: dict[int, list[Dimension]] = {}
    for place, leaf in enumerate(call.leaves):
        if isinstance(leaf, TensorSpec):
            for axis, size in enumerate(leaf.shape):
                found.setdefault(size, []).append((place, axis))
    return found


def _fresh_size(call: Call) -> int:
    used = {size for leaf in call.tensors for size in leaf.shape}
    return next(size for size in itertools.count(3) if size not in used)


def _without_ones(call: Call, runs: Callable[[dict[Dimension, int]], bool]) -> Call:
    """Sizes 0 and 1 that may be larger are made so.

    A broadcast would hide which dimensions belong together. A size of 1 beside larger ones on its
    axis is a broadcast that is meant.
    """
    sizes = _by_size(call)
    large = {axis for size, dims in sizes.items() if size >= 2 for _, axis in dims}
    small = [
        dim
        for size, dims in sizes.items()
        if size < 2
        for dim in dims
        if size == 0 or dim[1] not in large
    ]
    by_axis = [
        list(group)
        for _, group in itertools.groupby(sorted(small, key=lambda d: d[1]), key=lambda d: d[1])
    ]
    for group in itertools.chain(by_axis, [[dim] for dim in small]):
        left = [dim for dim in group if call.leaves[dim[0]].shape[dim[1]] < 2]  # type: ignore[union-attr]
        larger = dict.fromkeys(left, 2)
        if left and runs(larger):
            call = resized(call, larger)
    return call


def _independent(
    dims: Sequence[Dimension], size: int, runs: Callable[[dict[Dimension, int]], bool]
) -> list[list[Dimension]]:
    """The smallest groups among ``dims`` that can change alone."""
    left = list(dims)
    found: list[list[Dimension]] = []
    for group in _subsets(dims):
        if all(dim in left for dim in group) and runs(dict.fromkeys(group, size)):
            found.append(list(group))
            left = [dim for dim in left if dim not in group]
    for several in found:  # an operator may take fewer rows of one input than there are of another
        for dim in list(left):
            joined = [*several, dim]
            if dim[1] in {axis for _, axis in several} and runs(dict.fromkeys(joined, size)):
                several.append(dim)
                left.remove(dim)
    return [sorted(several) for several in found]


def _subsets(dims: Sequence[Dimension]) -> Iterable[tuple[Dimension, ...]]:
    """Single dimensions, then those of one axis, then all, then any others of few."""
    yield from ((dim,) for dim in dims)
    axes = sorted({axis for _, axis in dims})
    for axis in axes:
        group = tuple(dim for dim in dims if dim[1] == axis)
        if len(group) > 1:
            yield group
    if len(dims) > 1:
        yield tuple(dims)
    for count in range(2, min(len(dims), 4)):
        yield from itertools.combinations(dims, count)
