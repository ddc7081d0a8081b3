"""What a capture takes for granted without a trace: flags of the model, and modes of torch.

A Python value that the model's code reads is a constant of the captured path. So is the dtype that
torch gives to numbers, and whether it casts by itself.
"""

from __future__ import annotations

import dis
import itertools
import operator
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cachefree.glances import Readings
from cachefree.held_code import is_installed
from cachefree.reach import PLAIN, get, names_by_text, reached_by
from cachefree.settings import setting, settings_named
from cachefree.structure import flatten, is_same_plain

__all__ = [
    "Flags",
    "Modes",
    "asks_for_devices",
    "floating_dtype",
    "moved_to",
    "names_in_code",
]

_TORCHS_OWN = frozenset(vars(nn.Module())) | {"training"}
_READS = frozenset(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"))
_ENVIRONMENT = frozenset(("environ", "environb", "getenv", "getenvb"))
_NO_STEPS = frozenset(("CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "PUSH_NULL", "RESUME"))
_CPU = torch.device("cpu")
_KINDS = frozenset(("is_cuda", "is_cpu", "is_mps", "is_xpu", "get_device", "current_device"))


class Flags:
    """Booleans, numbers and texts that the model's code may read, as they were.

    Those are attributes of the modules and of objects that they hold, such as a configuration, and
    globals, class attributes and defaults that the code reaches.

    Args:
        model: The model.
        without: Paths of attributes that calls change: what is at them is no flag.
    """

    def __init__(self, model: nn.Module, without: frozenset[str] = frozenset()) -> None:
        self._readings = Readings()
        seen: set[int] = set()
        for namespace, names in _namespaces(model, without):
            if id(namespace) not in seen:
                seen.add(id(namespace))
                self._readings.items(namespace, names)
        for namespace, name in _outside(model):
            if isinstance(namespace, types.CellType):
                self._readings.attributes(namespace, name)
            else:
                self._readings.items(namespace, [name])
        self._known = list(self._readings.now())

    def have_changed(self) -> bool:
        """Whether any of them is another one now."""
        try:
            now = list(self._readings.now())
        except (KeyError, ValueError):
            return True
        if all(map(operator.is_, now, self._known)):
            return False
        return not all(map(is_same_plain, now, self._known))


def _outside(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Flags that the model's code reaches outside of the model, with what they are in."""
    found = reached_by(model)
    steps = [step for code in found.codes for step in dis.get_instructions(code)]
    read = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    read = read.union(*map(names_by_text, found.codes))
    for place in found.places:
        namespace, name, text = place
        is_global = text.startswith("the global ") and "." not in text
        if type(get(place)) in PLAIN and (name in read or not is_global):
            yield (vars(namespace) if isinstance(namespace, type) else namespace), name


def _namespaces(model: nn.Module, without: frozenset[str]) -> Iterator[tuple[dict[str, Any], Any]]:
    for path, module in model.named_modules():
        own = vars(module)
        names = [name for name in own if name not in _TORCHS_OWN]
        names = [name for name in names if not _is_in(f"{path}.{name}".lstrip("."), without)]
        yield own, [name for name in names if type(own[name]) in PLAIN]
        for name in names:
            value = own[name]
            is_object = hasattr(value, "__dict__") and not callable(value)
            if is_object and not isinstance(value, (torch.Tensor, type, types.ModuleType)):
                held = vars(value)
                yield held, [key for key, part in held.items() if type(part) in PLAIN]


def _is_in(path: str, without: frozenset[str]) -> bool:
    return any(other == path or other.startswith((f"{path}.", f"{path}[")) for other in without)


@dataclass(frozen=True)
class Modes:
    """Modes of torch and of the process that a captured path depends on.

    Attributes:
        dtype: The dtype that torch gives to numbers.
        device: Where torch makes tensors.
        casts: Whether torch casts by itself, on which devices and to what.
        fast_path: Whether attention modules may take torch's own fast path.
        environment: The environment's variables that the model's code reads, by the texts that
            stand in that code; with None all variables, where code asks for another one.
        settings: Settings of torch that the model's code names, by their paths in torch.
    """

    dtype: torch.dtype
    device: torch.device
    casts: tuple[tuple[str, torch.dtype], ...]
    fast_path: bool
    environment: Mapping[str | None, str | None] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def now(cls, model: nn.Module | None = None) -> Modes:
        """The modes as they are."""
        read = None if model is None else _variables(model)
        codes = () if model is None else reached_by(model).codes
        names = {name for code in codes for name in code.co_names}
        return cls(
            torch.get_default_dtype(),
            _default_device(),
            _casts(),
            torch.backends.mha.get_fastpath_enabled(),
            None if read is None else {name: name and os.environ.get(name) for name in read},
            {name: setting(name) for name in settings_named(names)},
        )

    def difference(self) -> str | None:
        """Which of them is another one now, in words; None where none is."""
        if torch.get_default_dtype() is not self.dtype:
            return f"torch's default dtype is {torch.get_default_dtype()}, and was {self.dtype}"
        if _default_device() != self.device:
            return f"torch's default device is {torch.get_default_device()}, and was {self.device}"
        if _casts() != self.casts:
            return f"torch.autocast is {_words(_casts())}, and was {_words(self.casts)}"
        if torch.backends.mha.get_fastpath_enabled() is not self.fast_path:
            return f"the fast path of torch.backends.mha was {'on' if self.fast_path else 'off'}"
        was = self.environment or {}
        asked = {*was, *os.environ} - {None} if None in was else was
        names = [name for name in asked if name and os.environ.get(name) != was.get(name)]
        if names:
            return f"the environment's {', '.join(sorted(names))} was another"
        for name, value in self.settings.items():
            if setting(name) != value:
                return f"torch.{name} is {setting(name)!r}, and was {value!r}"
        return None


def _default_device() -> torch.device:
    """Where torch makes tensors; a few steps where no mode and no default says so."""
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    if context is None and not torch._C._len_torch_function_stack():
        return _CPU
    return torch.get_default_device()


def _casts() -> tuple[tuple[str, torch.dtype], ...]:
    if not torch._C._is_any_autocast_enabled():
        return ()
    devices = ("cpu", "cuda", "mps", "xpu")
    on = [device for device in devices if torch.is_autocast_enabled(device)]
    return tuple((device, torch.get_autocast_dtype(device)) for device in on)


def _words(casts: tuple[tuple[str, torch.dtype], ...]) -> str:
    return ", ".join(f"on for {device} ({dtype})" for device, dtype in casts) or "off"


def moved_to(model: nn.Module, example_inputs: Any, before: torch.dtype | None) -> Any:
    """Example inputs on the device that the model is on now, and in the dtype that it has now.

    Args:
        model: The model.
        example_inputs: As they were given.
        before: The `floating_dtype` of the model that they were given for.
    """
    if example_inputs is None:
        return None
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    now = floating_dtype(model)
    leaves, structure = flatten(example_inputs)
    if len(devices) == 1:
        (device,) = devices
        leaves = [leaf.to(device) for leaf in leaves]
    if before is not None and now is not None:
        leaves = [leaf.to(now) if leaf.dtype is before else leaf for leaf in leaves]
    return structure.rebuild(leaves)


def floating_dtype(model: nn.Module) -> torch.dtype | None:
    """The floating-point dtype of all parameters; None where there is none, or are several."""
    dtypes = {tensor.dtype for tensor in model.parameters() if tensor.dtype.is_floating_point}
    return dtypes.pop() if len(dtypes) == 1 else None


def asks_for_devices(model: nn.Module) -> bool:
    """Whether the model's code may go another way on another kind of device."""
    names = {name for code in reached_by(model).codes for name in code.co_names}
    return bool(names & _KINDS) or {"device", "type"} <= names


def _variables(model: nn.Module) -> set[str | None] | None:
    """The variables of the environment that the model's code may read; None where it reads none.

    Those are the texts that it is asked for; all, and None, where code of the user's asks for
    another one.
    """
    reached = reached_by(model)
    ours = [value for name in _ENVIRONMENT if (value := getattr(os, name, None)) is not None]
    names = {name for name, value in reached.loaded if any(value is own for own in ours)}
    names |= _ENVIRONMENT
    codes = [code for code in reached.codes if names & {*code.co_names, *code.co_freevars}]
    if not codes:
        return None
    asked: set[str | None] = set()
    for code in codes:
        texts = {*_asked_for(code, names)}
        if None in texts and is_installed(code.co_filename):  # it names what it may ask for
            texts |= {text for text in code.co_consts if isinstance(text, str)}
            texts -= {None}
        asked |= texts
    return asked if None not in asked else {*os.environ, *asked}


def _asked_for(code: types.CodeType, names: set[str]) -> Iterator[str | None]:
    """The texts by which code asks what these names stand for; None for what is no text in it."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NO_STEPS]
    for place, step in enumerate(steps):
        if step.argval not in names or step.opname.startswith("STORE_"):
            continue
        is_attribute = step.opname in _READS
        before, after = steps[: place - is_attribute], steps[place + 1 :]
        after = after[after[0].argval == "get" :]
        if after[0].opname == "CONTAINS_OP":
            text, is_whole = before[-1], True
        else:
            text, *ends = after[:3]
            is_whole = any(end.opname in ("BINARY_SUBSCR", "CALL") for end in ends)
            is_whole &= ends[0].opname.startswith(("LOAD_", "BINARY_SUBSCR", "CALL"))
        is_text = text.opname == "LOAD_CONST" and isinstance(text.argval, str)
        yield text.argval if is_text and is_whole else None


def names_in_code(model: nn.Module) -> frozenset[str]:
    """The names that the model's own code reads, and the texts in it, which may be names."""
    codes = reached_by(model).codes
    texts = {part for code in codes for part in code.co_consts if isinstance(part, str)}
    steps = itertools.chain.from_iterable(map(dis.get_instructions, codes))
    return frozenset(texts | {step.argval for step in steps if step.opname in _READS})
