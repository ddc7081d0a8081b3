"""What the code of classes reaches outside of its objects: globals, defaults, closures, classes."""

from __future__ import annotations

import dis
import functools
import importlib.util
import itertools
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cachefree.held_code import held_code, is_installed, wraps_dataclass
from cachefree.looked_up import once
from cachefree.sizes import is_users

__all__ = [
    "ABSENT",
    "CONTAINERS",
    "PLAIN",
    "Memoised",
    "Place",
    "Reached",
    "get",
    "is_generator",
    "is_iterator",
    "names_by_text",
    "put",
    "reached_by",
]

Memoised = type(functools.lru_cache(lambda: None))
CONTAINERS = (dict, list, set, deque)
PLAIN = (bool, int, float, str, type(None))
ABSENT: Any = object()
_FROM_GLOBALS = frozenset(("LOAD_GLOBAL", "LOAD_NAME"))
_BY_TEXT = frozenset(("globals", "vars", "getattr", "hasattr", "eval", "exec", "attrgetter"))
_BY_PATH = frozenset(("modules", "import_module", "__import__", "__globals__", "__dict__"))
Place = tuple[Any, str, str]
"""A namespace (a dict, a class or a closure's cell), a name in it, and how it is called."""


@dataclass(frozen=True)
class Reached:
    """What was found: names, classes, the code that uses them, and what else has a memory."""

    places: tuple[Place, ...]
    classes: tuple[type, ...]
    codes: tuple[types.CodeType, ...]
    others: tuple[tuple[str, Any], ...] = ()
    named: tuple[Place, ...] = ()
    """Functions, classes and objects, by the names that the user's code has for them."""
    loaded: tuple[tuple[str, Any], ...] = ()
    """Everything that code reaches by a name, once for each name."""
    unbound: tuple[tuple[dict[str, Any], frozenset[str]], ...] = ()
    """Globals, and the names in them that the user's code loads from elsewhere: built-in ones."""


@once
def reached_by(model: torch.nn.Module) -> Reached:
    """What a model's methods and the code that it holds reach."""
    code = held_code(model)
    classes = dict.fromkeys(type(module) for module in model.modules())
    held = itertools.chain.from_iterable(vars(module).values() for module in model.modules())
    modules = [value for value in held if isinstance(value, types.ModuleType)]
    methods = vars(model).get("methods")  # of a model that is called otherwise than by forward
    names = filter(_is_text, methods) if isinstance(methods, tuple) else ()
    return _reached((*classes, *code.classes), tuple(code.functions), modules, frozenset(names))


def _reached(
    classes: tuple[type, ...],
    functions: tuple[types.FunctionType, ...],
    modules: Iterable[types.ModuleType],
    methods: frozenset[str],
) -> Reached:
    walk = _Walk({cls.__module__.partition(".")[0] for cls in classes} - {"torch"}, methods)
    for cls in classes:
        walk.add(cls)
    for function in functions:
        walk.add(function)
        walk.others.setdefault(id(function), (function.__qualname__, function))
    for module in modules:
        walk._module(module)
    walk.run()
    places, others = tuple(walk.places.values()), tuple(walk.others.values())
    named = tuple(walk.named.values())
    loaded = tuple(walk.loaded.values())
    unbound = tuple((space, frozenset(names)) for space, names in walk.unbound.values())
    return Reached(places, tuple(walk.classes), tuple(walk.codes), others, named, loaded, unbound)


class _Walk:
    """The names that code reaches: of its functions, of those it calls, of their classes.

    What is installed is looked into only where it is of the packages that define the model.
    """

    def __init__(self, packages: set[str], methods: frozenset[str]) -> None:
        self.packages = packages
        self.methods = methods
        self.places: dict[tuple[int, str], Place] = {}
        self.classes: dict[type, None] = {}
        self.codes: list[types.CodeType] = []
        self.others: dict[int, tuple[str, Any]] = {}
        self.named: dict[tuple[int, str], Place] = {}
        self.loaded: dict[tuple[str, int], tuple[str, Any]] = {}
        self.unbound: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self.is_installed = False
        self.pending: list[Any] = []
        self.seen: set[int] = set()
        self.within: dict[int, Any] = {}
        self.modules: dict[int, types.ModuleType] = {}
        self.entered: set[tuple[int, str]] = set()
        self.imports: list[tuple[types.CodeType, str]] = []
        self.by_own_name: set[str] = set()

    def add(self, value: Any) -> None:
        if id(value) not in self.seen:
            self.seen.add(id(value))
            self.pending.append(value)

    def run(self) -> None:
        while self.pending or self._of_modules():
            value = self.pending.pop()
            if isinstance(value, type):
                self._class(value)
            elif isinstance(value, types.FunctionType):
                self._function(value)

    def _module(self, value: types.ModuleType) -> None:
        """Notes a module that is not known by a global's name: in a table, imported by a call."""
        if self._is_ours(value) and not _is_installed(value):
            self.modules[id(value)] = value

    def _import(self) -> None:
        """Imports what a call may import: what it finds there is known before it runs.

        A function that only has a name of its own, which nothing that a call reaches uses, is not
        called: what it imports may be a script.
        """
        names = {code: _names_in(code) for code in self.codes} if self.imports else {}
        called = {"forward", *self.methods}
        known: set[str] = set()
        while called != known:
            known = {*called}
            for code, used in names.items():
                if self._is_called(code, known):
                    called |= used
        for code, path in self.imports:
            if self._is_called(code, called):
                for module in _modules_on(path):
                    self._module(module)

    def _is_called(self, code: types.CodeType, called: set[str]) -> bool:
        name = code.co_name
        return name in called or name not in self.by_own_name or name.startswith("__")

    def _of_modules(self) -> bool:
        """Follows what any code may use of such modules; whether there is more to look at."""
        self.is_installed = False
        self._import()
        names = set().union(*(code.co_names for code in self.codes)) if self.modules else set()
        for module in list(self.modules.values()):
            held = vars(module)
            for name in names & held.keys():
                if (id(held), name) not in self.entered:
                    self.entered.add((id(held), name))
                    self._global(held, name, f"{module.__name__}.{name}", names, {id(held)})
        return bool(self.pending)

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            home = sys.modules.get(base.__module__)
            if not self._is_ours(home):
                continue
            self.classes[base] = None
            self.is_installed = _is_installed(home)
            self._metaclass(base)
            for name, value in vars(base).items():
                if not self._is_pythons_own(base, name):
                    self._named(base, name, f"{base.__name__}.{name}", value)

    def _metaclass(self, cls: type) -> None:
        if type(cls) is not type and not self.is_installed:
            self.add(type(cls))

    def _is_pythons_own(self, cls: type, name: str) -> bool:
        """Whether no call reaches what a class has under a name; ``len(x)`` does reach one."""
        if not (name.startswith("__") and name.endswith("__")) or name == "__call__":
            return False
        is_module = issubclass(cls, torch.nn.Module) and name in ("__init__", "__new__")
        is_code = isinstance(
            vars(cls)[name], (types.FunctionType, staticmethod, classmethod, property)
        )
        return self.is_installed or is_module or not is_code

    def _named(self, namespace: Any, name: str, text: str, value: Any) -> None:
        self._loaded(namespace, name, text, value)
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            for part in filter(None, (value.fset, value.fdel)):
                self.add(part)
            value = value.fget
        if isinstance(value, Memoised):
            self.places[id(namespace), name] = (namespace, name, text)
            self.add(value.__wrapped__)
        elif isinstance(value, (types.FunctionType, type)):
            self.add(value)
        elif (
            type(value) in CONTAINERS
            or isinstance(value, PLAIN)
            or is_generator(value)
            or is_iterator(value)
        ):
            self.places[id(namespace), name] = (namespace, name, text)
        elif self._is_object(value) and id(value) not in self.seen:
            self.seen.add(id(value))
            self.add(type(value))
            for attribute, part in vars(value).items():
                self._named(vars(value), attribute, f"{text}.{attribute}", part)
        if self.is_installed or type(value) in PLAIN or isinstance(value, types.ModuleType):
            return
        if not isinstance(value, type):
            self.others.setdefault(id(value), (text, value))
        if isinstance(namespace, dict) and not (is_iterator(value) or type(value) in CONTAINERS):
            self.named[id(namespace), name] = (namespace, name, text)

    def _loaded(self, namespace: Any, name: str, text: str, value: Any) -> None:
        own = text.split("'")[1] if isinstance(namespace, types.CellType) else name
        if isinstance(value, types.FunctionType) and value.__code__.co_name == own:
            self.by_own_name.add(own)
        self.loaded.setdefault((own, id(value)), (own, value))
        if not self.is_installed:
            self._code_in(value, text)

    def _code_in(self, value: Any, text: str) -> None:
        """What is called through a value: functions in a table, a partial call, a bound method."""
        if isinstance(value, types.ModuleType):
            self._module(value)
        if isinstance(value, (*PLAIN, type, types.FunctionType)) or id(value) in self.within:
            return
        self.within[id(value)] = value
        if isinstance(value, functools.partial):
            parts: Any = (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, types.MethodType):
            parts = (value.__func__, value.__self__)
        elif isinstance(value, (*CONTAINERS, tuple, frozenset)):
            parts = list(dict.values(value) if isinstance(value, dict) else value)
        else:
            return
        for part in parts:
            if isinstance(part, (types.FunctionType, type)):
                self.add(part)
            elif self._is_object(part):
                self._named({text: part}, text, text, part)
            else:
                self._code_in(part, text)

    def _is_ours(self, home: types.ModuleType | None) -> bool:
        """Whether a module is the user's: of a file of theirs, or a notebook's, which has none."""
        if home is None:
            return True  # code that was run under a name of its own
        if home.__name__.partition(".")[0] == "torch":
            return False  # its namespaces of operators have files that are none
        file = getattr(home, "__file__", None) or _folder_of(home)
        if file is None:
            # what is built in has a spec
            return home.__name__ == "__main__" or getattr(home, "__spec__", None) is None
        if is_installed(file):
            return home.__name__.partition(".")[0] in self.packages
        return is_users(file)

    def _is_object(self, value: Any) -> bool:
        """Whether a value is an object of a class of the user's, with attributes."""
        if isinstance(value, (type, torch.nn.Module, torch.Tensor, types.ModuleType)):
            return False
        home = sys.modules.get(type(value).__module__)
        return self._is_ours(home) and hasattr(value, "__dict__")

    def _function(self, function: types.FunctionType) -> None:
        code = function.__code__
        home = sys.modules.get(function.__module__)
        if not self._is_ours(home) or wraps_dataclass(code):
            self._wrapper(function)
            return
        self.is_installed = _is_installed(home)
        self.codes += _codes(code)
        defaults = {**(function.__kwdefaults__ or {})}
        names = code.co_varnames[: code.co_argcount]
        values = function.__defaults__ or ()
        defaults |= dict(zip(names[len(names) - len(values) :], values, strict=True))
        for name, value in defaults.items():
            if not isinstance(value, PLAIN):
                text = f"the default {name!r} of {function.__qualname__}"
                self._named(defaults, name, text, value)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__" and _is_filled(cell):
                text = f"the variable {name!r} of {function.__qualname__}"
                self._named(cell, "cell_contents", text, cell.cell_contents)
        space = function.__globals__
        used = _names_in(code).union(*map(names_by_text, _codes(code)))
        if not self.is_installed:
            own = self.unbound.setdefault(id(space), (space, set()))[1]
            own |= _globals_in(code) - space.keys()
        if not self.is_installed:
            self.imports += ((code, path) for path in _imported_in(function))
        for name in used & space.keys():
            self._global(space, name, f"the global {name}", used, {id(space)})

    def _global(
        self, space: dict[str, Any], name: str, text: str, names: set[str], above: set[int]
    ) -> None:
        """What a name stands for; of a module of the user's, what code with these names may use."""
        value = space[name]
        if not isinstance(value, types.ModuleType):
            self._named(space, name, text, value)
            return
        if not self.is_installed:
            self.named[id(space), name] = (space, name, text)
        held = vars(value)
        if self._is_ours(value) and id(held) not in above:
            for other in names & held.keys():
                self._global(held, other, f"{value.__name__}.{other}", names, above | {id(held)})

    def _wrapper(self, function: types.FunctionType) -> None:
        """The user's functions that another's function calls, such as ``singledispatch`` makes."""
        for cell in function.__closure__ or ():
            if _is_filled(cell):
                part = cell.cell_contents
                if isinstance(part, types.FunctionType):
                    self.add(part)
                else:
                    self._code_in(part, function.__qualname__)


def _is_installed(home: types.ModuleType | None) -> bool:
    return is_installed(getattr(home, "__file__", None) or "")


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


def _codes(code: types.CodeType) -> list[types.CodeType]:
    """Code, and the code of the functions inside it."""
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return [code, *(below for part in inner for below in _codes(part))]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _names_in(code: types.CodeType) -> set[str]:
    """The names that code uses, in the functions inside it too."""
    return {name for part in _codes(code) for name in part.co_names}


def _globals_in(code: types.CodeType) -> set[str]:
    """The names that code looks up among globals, and then among what is built in."""
    codes = _codes(code)
    steps = itertools.chain.from_iterable(map(dis.get_instructions, codes))
    names = {step.argval for step in steps if step.opname in _FROM_GLOBALS}
    return names.union(*map(names_by_text, codes))


def names_by_text(code: types.CodeType) -> set[str]:
    """The names that code may ask for otherwise than by loading them: as texts, of a module."""
    names = {*code.co_names}
    if not names & (_BY_TEXT | _BY_PATH):
        return set()
    return names | {part for part in code.co_consts if isinstance(part, str)}


def _imported_in(function: types.FunctionType) -> Iterator[str]:
    """The modules that a function may import, or look up by a text."""
    code, space = function.__code__, function.__globals__
    for part in _codes(code):
        steps = list(dis.get_instructions(part))
        paths = {step.argval for step in steps if step.opname == "IMPORT_NAME"}
        if _BY_PATH & {*part.co_names}:
            paths |= {text for text in part.co_consts if isinstance(text, str)}
        package = space.get("__package__") or ""
        for level in range(package.count(".") + 2 if package and paths else 1):
            above = package.rsplit(".", level - 1)[0] if level else ""
            yield from filter(None, (f"{above}.{path}".strip(".") for path in paths))


def _modules_on(path: str) -> Iterator[types.ModuleType]:
    """A module and those that it is in; it is imported now if it is to be found beside them."""
    names = path.split(".")
    for end in range(1, len(names) + 1):
        name = ".".join(names[:end])
        if name not in sys.modules and not _is_found(name):
            return
        try:
            yield sys.modules.get(name) or importlib.import_module(name)
        except Exception:  # noqa: BLE001 - a call that comes there will raise it
            return


def _is_found(name: str) -> bool:
    """Whether a module of that name is in a file of the user's."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):
        return False
    file = None if spec is None else spec.origin or _folder_of(spec)
    return file is not None and not is_installed(file) and is_users(file)


def _folder_of(package: Any) -> str | None:
    """The folder of a package without a file of its own; None where there is none."""
    paths = getattr(package, "__path__", None) or getattr(package, "submodule_search_locations", ())
    return next(iter(paths or ()), None)


def is_generator(value: Any) -> bool:
    """Whether a value is a generator of random numbers, told by what it can do."""
    if isinstance(value, (type, torch.nn.Module, torch.Tensor)):
        return False
    return any(
        hasattr(type(value), name) for name in ("getstate", "get_state", "bit_generator")
    ) and not isinstance(value, types.ModuleType)


def is_iterator(value: Any) -> bool:
    """Whether a value gives another object each time that it is asked: it remembers where it is."""
    return hasattr(type(value), "__next__") and not isinstance(value, torch.nn.Module)


def get(place: Place) -> Any:
    """What is at a place; `ABSENT` where nothing is."""
    namespace, name, _ = place
    if isinstance(namespace, types.CellType):
        return namespace.cell_contents
    held = namespace if isinstance(namespace, Mapping) else vars(namespace)
    return held.get(name, ABSENT)


def put(place: Place, value: Any) -> None:
    """Puts a value at a place."""
    namespace, name, _ = place
    if isinstance(namespace, dict):
        if value is ABSENT:
            namespace.pop(name, None)
        else:
            namespace[name] = value
    elif value is ABSENT:
        delattr(namespace, name)
    else:
        setattr(namespace, name, value)
