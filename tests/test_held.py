"""What may change on a model after it was rewritten: each is noticed."""

from __future__ import annotations

import contextvars
import enum
import functools
import math
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import cachefree
from cachefree.origin import Origin

from .assertions import same

FACTOR = 1.0
SETTINGS = {"by": 1.0}
OBJECTS = {"settings": types.SimpleNamespace(by=1.0)}


def scaled(x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
    return x * by


class Slotted:
    __slots__ = ("by",)

    def __init__(self) -> None:
        self.by = 1.0


class Twice(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Held(nn.Module):
    """Reads what is held in many ways besides parameters."""

    numbers = {"by": 1.0}  # noqa: RUF012 - what instances share is one of these ways

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.rows = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.ones(4))
        self.options = types.SimpleNamespace(by=1.0, inner=types.SimpleNamespace(by=1.0), many=[1])
        self.lists, self.dicts, self.sets = [1.0, [1.0]], {"by": 1.0}, {1}
        self.plain, self.tensors = torch.ones(4), [torch.ones(4)]
        self.function = torch.tanh
        self.idle: Any = torch.zeros(1)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(
        self, ids: torch.Tensor, past: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.rows(self.table(ids))
        if past is not None:
            rows = torch.cat([past, rows], dim=1)
        y = rows.cumsum(1)[:, -ids.shape[1] :] * self.options.by * self.options.inner.by
        y = self.normed(self.function(y)) * self.plain * self.tensors[0] * self.scale.shape[0]
        y = (
            y
            * self.lists[0]
            * self.dicts["by"]
            * SETTINGS["by"]
            * self.numbers["by"]
            * len(self.sets)
        )
        return self.head(y), rows


class Hidden(Held):
    """Reads what no dict of attributes shows, too."""

    level = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.offset = self.dicts["zero"] = 0.0
        self.slotted, self.array = Slotted(), numpy.ones(1)
        self.hidden = [nn.Linear(4, 4)]
        self.partial = functools.partial(scaled, by=1.0)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        x = scaled(x, getattr(self.rows, "gain", 1.0)) * OBJECTS["settings"].by * self.level
        x = x * FACTOR + self.offset + self.dicts["zero"]
        return self.hidden[0](self.partial(x)) * self.slotted.by * float(self.array[0])


class Settings:
    by = 1.0


class Level(enum.IntEnum):
    low = 1
    high = 2


SETTINGS_BY_WEAK_NAME = Settings()
WEAK = weakref.ref(SETTINGS_BY_WEAK_NAME)
CONTEXT = contextvars.ContextVar("CONTEXT", default=1.0)
LOCAL = threading.local()
LOCAL.by = 1.0
ARRAY = numpy.ones(1)
SHOWN_DICT = {"by": 1.0}
PROXY = types.MappingProxyType(SHOWN_DICT)
IN_A_TUPLE = ({"by": 1.0},)
LEVEL = Level.low
LOOKED_UP = 1.0


class Hook:
    def __init__(self) -> None:
        self.by = 1.0

    def __call__(self, module: nn.Module, args: Any, result: torch.Tensor) -> torch.Tensor:
        return result * self.by


def by_keyword(x: torch.Tensor, *, by: float = 1.0) -> torch.Tensor:
    return x * by * by_keyword.gain


by_keyword.gain = 1.0


class Outside(Held):
    """Reads what neither a dict of the model nor a plain global shows."""

    pair = (1.0,)

    def __init__(self) -> None:
        super().__init__()
        self.named = nn.ModuleDict({"one": nn.Linear(4, 4)})
        self.hook = Hook()
        self.named["one"].register_forward_hook(self.hook)
        self.weak = weakref.ref(SETTINGS_BY_WEAK_NAME)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        import tests.small as imported

        x = by_keyword(x) * len([1]) * math.exp(0) * ARRAY[0] * PROXY["by"] * IN_A_TUPLE[0]["by"]
        x = x * WEAK().by * self.weak().by * CONTEXT.get() * LOCAL.by * LEVEL * self.pair[0]
        x = x * globals()["LOOKED_UP"] + getattr(imported, "EXTRA", 0.0)
        return self.named["one"](x) if "one" in self.named else x


Change = Callable[[Any, pytest.MonkeyPatch], Any]
NOTICED: dict[str, Change] = {
    "two tensors that were one": lambda m, p: setattr(m.head, "weight", _weight()),
    "the same, from its other side": lambda m, p: setattr(m.table, "weight", _weight()),
    "another tensor in an attribute": lambda m, p: setattr(m, "plain", torch.zeros(4)),
    "a tensor that is written to": lambda m, p: m.plain.mul_(2),
    "a tensor whose memory is replaced": lambda m, p: setattr(m.plain, "data", torch.zeros(4)),
    "a tensor in a list": lambda m, p: m.tensors.__setitem__(0, torch.zeros(4)),
    "a parameter of another shape": lambda m, p: setattr(m.scale, "data", torch.ones(1)),
    "a number in a list": lambda m, p: m.lists.__setitem__(0, 2.0),
    "a number in a list in a list": lambda m, p: m.lists[1].__setitem__(0, 2.0),
    "a longer list": lambda m, p: m.lists.append(2.0),
    "another list": lambda m, p: setattr(m, "lists", [2.0]),
    "a number in a dict": lambda m, p: m.dicts.update(by=2.0),
    "a set": lambda m, p: m.sets.add(2),
    "an object of settings": lambda m, p: setattr(m, "options", types.SimpleNamespace(by=2.0)),
    "a number of such an object": lambda m, p: setattr(m.options, "by", 2.0),
    "one more entry of it": lambda m, p: setattr(m.options, "more", 2.0),
    "an object inside of it": lambda m, p: setattr(m.options.inner, "by", 2.0),
    "a list inside of it": lambda m, p: m.options.many.append(2),
    "a function": lambda m, p: setattr(m, "function", torch.sigmoid),
    "a global dict": lambda m, p: p.setitem(SETTINGS, "by", 2.0),
    "a dict of a class": lambda m, p: p.setitem(m.numbers, "by", 2.0),
    "a method of a class": lambda m, p: p.setattr(Hidden, "normed", lambda _, x: x * 2),
    "an object with slots": lambda m, p: setattr(m.slotted, "by", 2.0),
    "an array": lambda m, p: m.array.__setitem__(0, 2.0),
    "a weight of a module in a list": lambda m, p: setattr(m.hidden[0], "weight", _square()),
    "a hook of a module in a list": lambda m, p: m.hidden[0].register_forward_hook(_twice),
    "a keyword of a partial": lambda m, p: p.setitem(m.partial.keywords, "by", 2.0),
    "an object in a global dict": lambda m, p: p.setattr(OBJECTS["settings"], "by", 2.0),
    "a default of a function": lambda m, p: p.setattr(scaled, "__defaults__", (2.0,)),
    "a function by its name": lambda m, p: p.setitem(globals(), "scaled", torch.mul),
    "a class of a module": lambda m, p: setattr(m.rows, "__class__", Twice),
    "an attribute of a class that hides one of a base": lambda m, p: p.setattr(
        Hidden, "numbers", {"by": 2.0}
    ),
    "a class that is called otherwise": lambda m, p: p.setattr(
        Hidden, "__call__", lambda self, *args: (), raising=False
    ),
    "an attribute that hides one of the class": lambda m, p: setattr(m, "level", 2.0),
    "an attribute that code asks for": lambda m, p: setattr(m.rows, "gain", 2.0),
    "a number of another kind": lambda m, p: setattr(m, "level", 1),
    "a number of another kind in a list": lambda m, p: m.lists.__setitem__(0, True),
    "a number of another kind in settings": lambda m, p: setattr(m.options, "by", 1),
    "a number of another kind in a global": lambda m, p: p.setitem(globals(), "FACTOR", 1),
    "a number of another kind in slots": lambda m, p: setattr(m.slotted, "by", 1),
    "a zero of another sign": lambda m, p: setattr(m, "offset", -0.0),
    "a zero of another sign in a dict": lambda m, p: m.dicts.update(zero=-0.0),
    "another hook": lambda m, p: m.rows._forward_hooks.__setitem__(_only(m), _twice),
}
NOTICED_OUTSIDE: dict[str, Change] = {
    "a built-in name that a global hides": lambda m, p: p.setitem(globals(), "len", _two),
    "another module by a global's name": lambda m, p: p.setitem(globals(), "math", numpy),
    "an array by its name": lambda m, p: ARRAY.fill(ARRAY[0] + 1),
    "a dict that is shown read-only": lambda m, p: p.setitem(SHOWN_DICT, "by", 2.0),
    "a dict in a tuple": lambda m, p: p.setitem(IN_A_TUPLE[0], "by", 2.0),
    "what is known weakly": lambda m, p: p.setattr(SETTINGS_BY_WEAK_NAME, "by", 2.0),
    "a variable of the context": lambda m, p: CONTEXT.set(2.0),
    "a variable of the thread": lambda m, p: p.setattr(LOCAL, "by", 2.0),
    "another member of an enumeration": lambda m, p: p.setitem(globals(), "LEVEL", Level.high),
    "a name that is looked up by its text": lambda m, p: p.setitem(globals(), "LOOKED_UP", 2.0),
    "a tuple of a class": lambda m, p: p.setattr(Outside, "pair", (2.0,)),
    "a default by keyword": lambda m, p: p.setitem(by_keyword.__kwdefaults__, "by", 2.0),
    "an attribute of a function": lambda m, p: p.setattr(by_keyword, "gain", 2.0),
    "the code of a function": lambda m, p: p.setattr(by_keyword, "__code__", _code()),
    "the code of a method": lambda m, p: p.setattr(
        Outside.normed, "__code__", Held.normed.__code__
    ),
    "what a hook holds": lambda m, p: setattr(m.hook, "by", 2.0),
    "another key of the same module": lambda m, p: m.named.update({"two": m.named.pop("one")}),
    "a class that hides a parameter": lambda m, p: p.setattr(
        Outside, "scale", torch.ones(3), raising=False
    ),
}
NOT_NOTICED: dict[str, Change] = {
    "new values of a parameter": lambda m, p: m.scale.data.mul_(2),
    "another parameter": lambda m, p: setattr(m.rows, "weight", nn.Parameter(torch.ones(4, 4))),
    "an attribute that no path reads": lambda m, p: setattr(m, "idle", torch.ones(1)),
    "an attribute that code only sets": lambda m, p: setattr(m, "seen", torch.ones(1)),
    "an attribute of a class that no code names": lambda m, p: p.setattr(
        Hidden, "noted", 2.0, raising=False
    ),
    "an attribute that no code names": lambda m, p: setattr(m, "noted", 2.0),
    "an equal number": lambda m, p: m.lists.__setitem__(0, float("1.0")),
    "a flag of autograd": lambda m, p: m.requires_grad_(False),
}


def _weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(7, 4))


def _square() -> nn.Parameter:
    return nn.Parameter(torch.ones(4, 4))


def _only(model: Held) -> int:
    return next(iter(model.rows._forward_hooks))


def _twice(*args: Any) -> Any:
    return args[-1] * 2


def _two(value: Any) -> int:
    return 2


def _code() -> types.CodeType:
    def other(x: torch.Tensor, *, by: float = 1.0) -> torch.Tensor:
        return x + by

    return other.__code__


def _origin(model: Held) -> Origin:
    model.rows.register_forward_hook(lambda *args: args[-1])
    return Origin(model, lambda model: None, constants=[model.plain, model.tensors[0]])


@pytest.mark.parametrize("change", NOTICED)
def test_a_change_is_noticed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Hidden().eval()
    origin = _origin(model)
    assert not origin.has_changed()
    NOTICED[change](model, monkeypatch)
    assert origin.has_changed()


@pytest.mark.parametrize("change", NOTICED_OUTSIDE)
def test_a_change_outside_of_the_model_is_noticed(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Outside().eval()
    origin = Origin(model, lambda model: None)
    assert not origin.has_changed()
    contextvars.copy_context().run(_changed, NOTICED_OUTSIDE[change], model, monkeypatch, origin)
    monkeypatch.undo()


def _changed(change: Change, model: nn.Module, patch: pytest.MonkeyPatch, origin: Origin) -> None:
    change(model, patch)
    assert origin.has_changed()


@pytest.mark.parametrize("change", NOT_NOTICED)
def test_what_a_graph_shares_or_never_reads_is_no_change(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Hidden().eval()
    origin = _origin(model)
    NOT_NOTICED[change](model, monkeypatch)
    assert not origin.has_changed()
    assert not origin.has_changed()


def test_a_changed_model_is_rewritten_again() -> None:
    torch.manual_seed(0)
    model = Held().eval()
    rewritten = cachefree.rewrite(model, (torch.zeros(2, 3, dtype=torch.long),), progress=False)
    ids = torch.tensor([[1, 2, 3]])
    for change in (
        "two tensors that were one",
        "a tensor that is written to",
        "a number in a dict",
    ):
        NOTICED[change](model, pytest.MonkeyPatch())
        first = model(ids)
        same(rewritten(ids), first)
        same(rewritten(ids, first[1]), model(ids, first[1]))


def test_exports_are_of_the_model_as_it_is_now(tmp_path: Path) -> None:
    model = Held().eval()
    ids = torch.arange(6).view(2, 3)
    rewritten = cachefree.rewrite(model, (ids,))
    model.dicts["by"] = 2.0
    cachefree.to_onnx(rewritten, tmp_path / "held.onnx")
    decoder = cachefree.load_onnx(tmp_path / "held.onnx", like=rewritten)
    with torch.no_grad():
        same(decoder(ids), model(ids))
    model.dicts["by"] = 3.0
    exported = torch.export.export(rewritten, **rewritten.export_args("torch"))
    same(exported.module()(ids, rewritten.empty_cache(2)), model(ids))
