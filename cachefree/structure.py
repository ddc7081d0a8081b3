"""Nested Python values as flat lists of tensors, and back, with no class registered anywhere.

Tuples, lists, named tuples, dicts and their subclasses, dataclasses and plain attribute objects are
taken apart
for the one call only. What is no tensor is kept: sizes (``torch.SymInt``) as expressions, all else
as constants.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["MismatchError", "Structure", "flatten", "is_same_plain", "leaf_paths"]

Leaf = Any


class MismatchError(ValueError):
    """A value is not made as a structure says; the message names the place.

    Attributes:
        classes: The class that was given and the one that is expected, where these differ.
    """

    def __init__(self, text: str, classes: tuple[type[Any], type[Any]] | None = None) -> None:
        super().__init__(text)
        self.classes = classes


class Structure:
    """How a nested value is made of its leaves.

    Attributes:
        kind: ``"leaf"``, ``"constant"``, ``"tuple"``, ``"list"``, ``"namedtuple"``, ``"mapping"``
            or ``"object"``.
        cls: The class to rebuild, where there is one.
        keys: Indices, mapping keys or attribute names of the children.
        children: One structure a key.
        value: The constant, or the emptied template of a mapping or an object.
        leaf_count: The number of leaves below.
    """

    __slots__ = ("_form", "_unlike", "children", "cls", "keys", "kind", "leaf_count", "value")

    def __init__(
        self,
        kind: str,
        *,
        cls: type | None = None,
        keys: tuple[Any, ...] = (),
        children: tuple[Structure, ...] = (),
        value: Any = None,
    ) -> None:
        self.kind = kind
        self.cls = cls
        self.keys = keys
        self.children = children
        self.value = value
        self.leaf_count: int = 1 if kind == "leaf" else sum(child.leaf_count for child in children)
        # what `is_absent` depends on, and the children that differ in it
        self._form: Any = (kind, cls, keys, tuple(child._form for child in children))
        self._unlike = tuple({child._form: child for child in children}.values())

    def rebuild(self, leaves: list[Leaf]) -> Any:
        """The value again, with ``leaves`` in the order of `flatten`."""
        iterator = iter(leaves)
        value = self._rebuild(iterator)
        if next(iterator, self) is not self:
            raise ValueError("more leaves than the structure has")
        return value

    def _rebuild(self, leaves: Iterator[Leaf]) -> Any:
        if self.kind == "leaf":
            return next(leaves)
        if self.kind == "constant":
            return self.value
        parts = [child._rebuild(leaves) for child in self.children]
        if self.kind == "tuple":
            return tuple(parts)
        if self.kind == "list":
            return parts
        assert self.cls is not None
        if self.kind == "namedtuple":
            return self.cls(*parts)
        if self.kind == "mapping":
            if dataclasses.is_dataclass(self.cls):
                return self.cls(**dict(zip(self.keys, parts, strict=True)))
            mapping = copy.copy(self.value)
            mapping.update(zip(self.keys, parts, strict=True))
            return mapping
        new = copy.copy(self.value)
        for key, part in zip(self.keys, parts, strict=True):
            object.__setattr__(new, key, part)
        return new

    def with_constants(self, values: Mapping[int, Any]) -> Structure:
        """This structure with some of its leaves, by their places, made constants."""
        return self._with_constants(values, itertools.count())

    def _with_constants(self, values: Mapping[int, Any], places: Iterator[int]) -> Structure:
        if self.kind == "leaf":
            place = next(places)
            return Structure("constant", value=values[place]) if place in values else self
        children = tuple(child._with_constants(values, places) for child in self.children)
        return Structure(
            self.kind, cls=self.cls, keys=self.keys, children=children, value=self.value
        )

    def take(self, value: Any, path: str = "") -> list[Leaf]:
        """The leaves of a value that is made like this structure; whatever stands at a leaf is one.

        Lists and tuples stand for one another; constants must be equal.

        Raises:
            MismatchError: the value is made differently, with the place.
        """
        leaves: list[Leaf] = []
        self._take(value, path, leaves)
        return leaves

    def _take(self, value: Any, path: str, leaves: list[Leaf]) -> None:
        if self.kind == "leaf":
            if value is None or isinstance(value, (tuple, list, dict)):
                raise MismatchError(f"{path} is {_words(value)} where a tensor is expected")
            leaves.append(value)
            return
        if self.kind == "constant":
            if not _same_constant(self.value, value):
                raise MismatchError(
                    f"{path} is {_words(value)} where {self.describe()} is expected"
                )
            return
        for key, child, part in zip(
            self.keys, self.children, self._parts(value, path), strict=True
        ):
            if child.kind == "leaf" and isinstance(part, torch.Tensor):
                leaves.append(part)
            else:
                child._take(part, path + _step(self.kind, key), leaves)

    def _parts(self, value: Any, path: str) -> list[Any]:
        """The children of a value, in the order of the keys."""
        if self.kind in ("tuple", "list"):
            if not isinstance(value, (tuple, list)):
                raise MismatchError(
                    f"{path} is {_words(value)} where {self.describe()} is expected"
                )
            if len(value) != len(self.children):
                raise MismatchError(
                    f"{path} has {len(value)} entries where {len(self.children)} are expected"
                )
            return list(value)
        expected: type[Any] = self.cls or object
        if self.kind == "object" and type(value) is not expected:
            # a subclass may hold, or count, its tensors otherwise
            is_other = value is not None and not isinstance(
                value, (torch.Tensor, tuple, list, dict, bool, int, float, str)
            )
            raise MismatchError(
                f"{path} is {_words(value)} where {self.describe()} is expected",
                (type(value), expected) if is_other else None,
            )
        if not isinstance(value, expected):
            raise MismatchError(f"{path} is {_words(value)} where {self.describe()} is expected")
        if self.kind == "mapping":
            if set(value.keys()) != set(self.keys):
                missing = [key for key in self.keys if key not in value]
                extra = [key for key in value if key not in self.keys]
                raise MismatchError(
                    f"{path} has other keys: missing {missing}, not expected {extra}"
                )
            return [value[key] for key in self.keys]
        if self.kind == "namedtuple":
            return list(value)
        absent = [key for key in self.keys if not hasattr(value, key)]
        if absent:
            raise MismatchError(f"{path} has no attribute {absent[0]!r}")
        return [getattr(value, key) for key in self.keys]

    def is_absent(self, value: Any) -> bool:
        """Whether a value holds nothing where this structure has leaves.

        None, an empty container, an object whose tensors are yet to be made, a count of 0.
        """
        if self.kind == "constant" or value is None or not self.leaf_count:
            return True
        if self.kind == "leaf":
            if isinstance(value, torch.Tensor):
                return value.dim() == 1 and value.shape[0] == 0
            return type(value) is int and value == 0
        if isinstance(value, (tuple, list, Mapping)):
            if not value:
                return True
            if self.kind == "object" or isinstance(value, Mapping) != (self.kind == "mapping"):
                return False
            if isinstance(value, Mapping):
                parts = [(child, value.get(key)) for key, child in self._items()]
                return set(value) <= set(self.keys) and all(c.is_absent(v) for c, v in parts)
            # empty layers may be counted otherwise: an encoder's number, in a decoder's cache
            return all(map(self._is_absent_part, value))
        if self.kind != "object" or self.cls is None or not isinstance(value, self.cls):
            return False
        return all(child.is_absent(getattr(value, key, None)) for key, child in self._items())

    def _is_absent_part(self, part: Any) -> bool:
        return any(child.is_absent(part) for child in self._unlike)

    def set_otherwise(self, value: Any, path: str = "") -> str | None:
        """Where an object is set up otherwise than this one, in words; None where it is not.

        Numbers, texts and dtypes that no call changes, such as the length of a window. What is
        empty yet, and flags, may well change with the first call.
        """
        if self.kind == "constant":
            if not isinstance(value, (int, float, str, torch.dtype)) or isinstance(value, bool):
                return None
            is_other = bool(value) and not _same_constant(self.value, value)
            return f"{path} is {value!r} where {self.value!r} is expected" if is_other else None
        if isinstance(value, (tuple, list)) and self.kind in ("tuple", "list"):
            parts: list[Any] = list(value)[: len(self.children)]
        elif isinstance(value, Mapping) and self.kind == "mapping":
            parts = [value.get(key) for key in self.keys]
        elif self.kind == "object" and type(value) is self.cls:
            parts = [getattr(value, key, None) for key in self.keys]
        else:
            return None
        for (key, child), part in zip(self._items(), parts, strict=False):
            found = child.set_otherwise(part, path + _step(self.kind, key))
            if found is not None:
                return found
        return None

    def _items(self) -> list[tuple[Any, Structure]]:
        return list(zip(self.keys, self.children, strict=True))

    def difference(self, other: Structure, path: str = "") -> str | None:
        """The first place where another structure differs, in words; None where both are alike."""
        sequences = ("tuple", "list")
        if self.kind != other.kind and not (self.kind in sequences and other.kind in sequences):
            return f"{path} is {other.describe()} where {self.describe()} is expected"
        if self.kind == "constant":
            if _same_constant(self.value, other.value):
                return None
            return f"{path} is {other.describe()} where {self.describe()} is expected"
        if self.keys != other.keys or (self.kind not in sequences and self.cls is not other.cls):
            return f"{path} is {other.describe()} where {self.describe()} is expected"
        pairs = zip(self.keys, self.children, other.children, strict=True)
        found = (
            mine.difference(theirs, path + _step(self.kind, key)) for key, mine, theirs in pairs
        )
        return next((problem for problem in found if problem), None)

    def describe(self) -> str:
        """A few words: what this is."""
        if self.kind == "leaf":
            return "a tensor"
        if self.kind == "constant":
            return "None" if self.value is None else f"{type(self.value).__name__} {self.value!r}"
        name = self.cls.__name__ if self.cls is not None else self.kind
        return f"a {name} of {len(self.children)}"


def _words(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        return "a tensor"
    if isinstance(value, (tuple, list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {value!r}"


def is_same_plain(one: Any, other: Any) -> bool:
    """Whether two plain values are told apart by nothing: 1, 1.0 and True are, and so is −0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (float, complex)):
        return repr(one) == repr(other)
    return bool(one == other)


def _same_constant(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    try:
        return is_same_plain(one, other)
    except Exception:  # noqa: BLE001 - an equality that a user's class does not answer is none
        return False


def _step(kind: str, key: Any) -> str:
    if kind == "object":
        return f".{key}"
    if kind == "namedtuple":
        return f".{key}"
    return f"[{key!r}]"


def _is_leaf(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)


_ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.Size,
    type,
    torch.nn.Module,
    torch.nn.Parameter,
    torch.Generator,
)


def flatten(value: Any, is_leaf: Callable[[Any], bool] = _is_leaf) -> tuple[list[Leaf], Structure]:
    """Takes a nested value apart.

    Args:
        value: Anything.
        is_leaf: What counts as a leaf; by default a tensor that is no parameter.

    Returns:
        The leaves in order, and the structure that puts them together again.
    """
    leaves: list[Leaf] = []
    structure = _flatten(value, is_leaf, leaves, set())
    return leaves, structure


def _flatten(
    value: Any, is_leaf: Callable[[Any], bool], leaves: list[Leaf], above: set[int]
) -> Structure:
    if is_leaf(value):
        leaves.append(value)
        return Structure("leaf")
    if isinstance(value, (*_ATOMS, torch.Tensor)) or callable(value) or id(value) in above:
        return Structure("constant", value=value)
    above = above | {id(value)}

    def below(parts: Any) -> tuple[Structure, ...]:
        return tuple(_flatten(part, is_leaf, leaves, above) for part in parts)

    cls = type(value)
    if isinstance(value, tuple):
        fields = getattr(cls, "_fields", None)
        if fields is not None:
            return Structure("namedtuple", cls=cls, keys=tuple(fields), children=below(value))
        return Structure("tuple", keys=tuple(range(len(value))), children=below(value))
    if isinstance(value, list):
        return Structure("list", keys=tuple(range(len(value))), children=below(value))
    if isinstance(value, Mapping) and hasattr(value, "update"):
        keys = tuple(value.keys())
        return Structure(
            "mapping",
            cls=cls,
            keys=keys,
            children=below(value[key] for key in keys),
            value=_emptied(value),
        )
    attributes = _attributes(value)
    if attributes is None:
        return Structure("constant", value=value)
    children = below(attributes.values())
    if not any(child.leaf_count for child in children):
        return Structure("constant", value=value)
    return Structure(
        "object", cls=cls, keys=tuple(attributes), children=children, value=_bare(value, attributes)
    )


def _emptied(mapping: Any) -> Any:
    if type(mapping) is dict:
        return {}
    if dataclasses.is_dataclass(mapping):
        return None
    template = copy.copy(mapping)
    template.clear()
    return template


def _bare(value: Any, attributes: Mapping[str, Any]) -> Any:
    template = copy.copy(value)
    for name, part in attributes.items():
        if not isinstance(part, _ATOMS):
            object.__setattr__(template, name, None)
    return template


def _attributes(value: Any) -> dict[str, Any] | None:
    """The attributes that hold an object's state; None where it has none to be set."""
    names = list(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    found = {
        name: getattr(value, name)
        for name in names
        if hasattr(value, name) and not name.startswith("__")
    }
    return found or None


def leaf_paths(structure: Structure, prefix: str = "") -> list[str]:
    """One Python-like path a leaf, such as ``past[0].key``; no two are the same.

    Keys of a dict, such as modules, may be written alike: those that follow are numbered.
    """
    paths: dict[str, None] = {}
    for path in _paths(structure, prefix):
        names = itertools.chain([path], (f"{path}#{number}" for number in itertools.count(2)))
        paths[next(name for name in names if name not in paths)] = None
    return list(paths)


def _paths(structure: Structure, prefix: str) -> list[str]:
    if structure.kind == "leaf":
        return [prefix]
    paths: list[str] = []
    for key, child in zip(structure.keys, structure.children, strict=True):
        paths += _paths(child, prefix + _step(structure.kind, key))
    return paths
