"""Another way to call a model: another method, or one for first calls and one for later ones."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

__all__ = ["Facade", "Forward", "in_order"]


class Facade(nn.Module):
    """Another way to call a model: its modules, parameters and names are the model's own.

    Args:
        model: The model.
        methods: Which of its methods is called; two where the first call has one of its own. Then
            an argument that only the second takes is the cache: a call without it is a first call.
    """

    def __init__(self, model: nn.Module, methods: Sequence[str] = ("forward",)) -> None:
        super().__init__()
        # messages name the model by its class
        self.__class__ = type(type(model).__name__, (type(self),), {})
        self.__dict__["model"] = model
        self.__dict__["methods"] = tuple(methods)
        self.__dict__["training"] = model.training
        for name in ("_modules", "_parameters", "_buffers"):
            self.__dict__[name] = model.__dict__[name]
        self.__dict__["own_signature"] = self._own_signature()
        self.__dict__["forward"] = Forward(self._run, self.own_signature, self._method(-1))

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """The model's own modules; this one is none of them."""
        yield from self.model.named_modules(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("model")
        if model is None or name in _NOT_DELEGATED:
            raise AttributeError(name)
        return getattr(model, name)

    def _method(self, place: int) -> Any:
        name = self.methods[place]
        # what torch.compile wraps says what it takes
        compiled = self.model._modules.get("_orig_mod") if name == "forward" else None
        return getattr(self.model if compiled is None else compiled, name)

    def _own_signature(self) -> inspect.Signature:
        """Of the later calls; what first calls do not take may be left out."""
        later = inspect.signature(self._method(-1))
        if len(self.methods) == 1:
            return later
        first = inspect.signature(self._method(0)).parameters
        optional = [
            parameter
            if name in first or parameter.default is not parameter.empty
            else parameter.replace(default=None)
            for name, parameter in later.parameters.items()
        ]
        optional += [p for name, p in first.items() if name not in later.parameters]
        return inspect.Signature(sorted(optional, key=_rank))

    def _run(self, named: dict[str, Any]) -> Any:
        later_only = (
            self.own_signature.parameters.keys()
            - inspect.signature(self._method(0)).parameters.keys()
        )
        return self.invoke(named, is_first=all(named.get(name) is None for name in later_only))

    def invoke(self, named: Mapping[str, Any], *, is_first: bool) -> Any:
        """Calls the method of first or of later calls with what it takes of the arguments."""
        place = 0 if is_first else -1
        own = inspect.signature(self._method(place))
        bound = inspect.BoundArguments(own, in_order(own, named))
        function = self.model if self.methods[place] == "forward" else self._method(place)
        return function(*bound.args, **bound.kwargs)


_NOT_DELEGATED = frozenset(("_compiled_call_impl", "_orig_mod"))


def _rank(parameter: inspect.Parameter) -> tuple[Any, bool]:
    return parameter.kind, parameter.default is not parameter.empty


class Forward:
    """A ``forward`` with a signature of its own.

    Args:
        run: What takes the arguments by name.
        signature: Its signature.
        wrapped: Whose source text is the model's own.
    """

    def __init__(self, run: Any, signature: inspect.Signature, wrapped: Any) -> None:
        self.run = run
        self.__signature__ = signature
        self.__wrapped__ = wrapped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls ``run`` with the arguments by name; the method itself says what does not fit."""
        try:
            named = self.__signature__.bind(*args, **kwargs).arguments
        except TypeError:
            return self.__wrapped__(*args, **kwargs)
        return self.run(dict(named))


def in_order(signature: inspect.Signature, named: Mapping[str, Any]) -> Any:
    """The arguments that a signature has, in its order."""
    return {name: named[name] for name in signature.parameters if name in named}
