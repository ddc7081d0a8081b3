"""The original, the rewritten module and ONNX Runtime, called alike, each with its own cache."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cachefree.calls import TensorSpec
from cachefree.onnx.domain import concrete
from cachefree.onnx.export import positional
from cachefree.structure import Structure, flatten

__all__ = ["OwnCall", "Runner", "double_copy", "onnx_runner"]

Model = Callable[..., Any]
FORMS = ("left out", "nones", "empty tuple")


class OwnCall:
    """The model's own calls, made of flat tensors.

    Args:
        rewritten: What ``cachefree.rewrite`` gave.

    Attributes:
        form: How a first call says that it has no cache, one of `FORMS`.
    """

    def __init__(self, rewritten: Any) -> None:
        encoder = rewritten.encoder_call
        # the original has its encoder inside: only the whole call is a call of its own
        self.calling = rewritten.calling if encoder is None else encoder.whole
        self.interface = self.calling.interface
        self.is_lifted = rewritten.keeper is not None
        self.form = FORMS[0]

    def arguments(
        self,
        tensors: Mapping[str, torch.Tensor],
        cache: Sequence[torch.Tensor] | None,
        sizes: Mapping[str, int],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments.

        Args:
            tensors: Input name → tensor, for what is no cache.
            cache: One tensor a cache slot; None for the first call, which leaves the cache out.
            sizes: Of the call, for Python integers among the arguments.
        """
        past = (
            {}
            if cache is None
            else {s.past.name: t for s, t in zip(self.interface.cache, cache, strict=True)}
        )
        flat = iter([tensors.get(spec.name, past.get(spec.name)) for spec in self.interface.inputs])
        leaves = [
            next(flat) if isinstance(spec, TensorSpec) else concrete((spec.expr,), sizes)[0]
            for spec in self.calling.leaves
        ]
        named: dict[str, Any] = self.calling.structure.rebuild(leaves)
        for name in self.calling.first_only if cache is not None else ():
            del named[name]
        if cache is None:
            for place in self.calling.caches:
                self._leave_out(named, place)
        return positional(self.calling.signature, named)

    def _leave_out(self, named: dict[str, Any], place: Any) -> None:
        """Puts into a call what says that there is no cache yet."""
        if self.form == "nones":
            nones = place.structure.rebuild([None] * len(place.leaves))
            _put(named, (place.parameter, *place.steps), nones)
        elif self.form == "empty tuple":
            _put(named, (place.parameter, *place.steps), ())
        elif place.steps:
            _put(named, (place.parameter, *place.steps), None)
        elif not self.is_lifted and self._has_default(place.parameter):
            del named[place.parameter]
        else:
            named[place.parameter] = None

    def _has_default(self, parameter: str) -> bool:
        declared = self.calling.signature.parameters.get(parameter)
        return declared is None or declared.default is not declared.empty


def _put(container: Any, steps: tuple[Any, ...], value: Any) -> None:
    """Sets an entry of nested containers; those on the way are copied."""
    for step in steps[:-1]:
        container[step] = copy.copy(container[step])
        container = container[step]
    container[steps[-1]] = value


class Runner:
    """One implementation and its cache.

    Args:
        name: For messages.
        model: What is called.
        own_call: How.
        dtype: What floating-point inputs are cast to; None for as they are.
    """

    def __init__(
        self, name: str, model: Model, own_call: OwnCall, dtype: torch.dtype | None = None
    ) -> None:
        self.name = name
        self.model = model
        self.own_call = own_call
        self.dtype = dtype
        self.cache: list[torch.Tensor] | None = None
        self.result: Structure | None = None

    def start(self) -> None:
        """Forgets the cache."""
        self.cache = None

    def call(
        self, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> list[torch.Tensor]:
        """Calls once, keeps the cache that comes out, and gives all outputs, flat."""
        cast = {name: self._cast(tensor) for name, tensor in tensors.items()}
        args, kwargs = self.own_call.arguments(cast, self.cache, sizes)
        with torch.no_grad():
            value = self.model(*args, **kwargs)
        leaves, self.result = flatten(value)
        outputs = [leaf.detach() for leaf in leaves]
        interface = self.own_call.interface
        if len(outputs) != len(interface.outputs):
            raise ValueError(
                f"{len(outputs)} tensors came out; {len(interface.outputs)} are expected"
            )
        by_name = dict(zip((spec.name for spec in interface.outputs), outputs, strict=True))
        self.cache = [by_name[slot.present.name].clone() for slot in interface.cache]
        return outputs

    def find_form(self, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
        """Finds out how the model is called without a cache.

        Raises:
            Exception: what the model raises where the cache is simply left out; no form suits it.
        """
        reason: Exception | None = None
        for form in FORMS:
            self.own_call.form = form
            self.start()
            try:
                self.call(tensors, sizes)
                return
            except Exception as error:  # noqa: BLE001
                reason = reason or error
        self.own_call.form = FORMS[0]
        assert reason is not None
        raise reason

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.dtype is None or not tensor.dtype.is_floating_point:
            return tensor.clone()
        return tensor.to(self.dtype)


def double_copy(model: nn.Module) -> nn.Module | None:
    """The model in float64; None where it cannot be copied, or is float64 already."""
    floating = {tensor.dtype for tensor in model.parameters() if tensor.dtype.is_floating_point}
    if floating <= {torch.float64}:
        return None
    try:
        exact = copy.deepcopy(model).double()
        for module in exact.modules():
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
                    vars(module)[name] = value.double()
        return exact
    except Exception:  # noqa: BLE001
        # a model may hold anything, and whatever it holds may refuse a copy
        return None


def onnx_runner(
    rewritten: Any, own_call: OwnCall, directory: Path, providers: Sequence[Any] | None
) -> Runner:
    """The model exported to ``directory`` and opened with ONNX Runtime."""
    from cachefree.onnx import load_onnx, to_onnx

    path = to_onnx(rewritten, directory / "model.onnx")
    decoder = load_onnx(path, like=rewritten, providers=providers, session_options=_idle_options())
    return Runner("onnxruntime", decoder, own_call)


def _idle_options() -> Any:
    """Threads that sleep between runs.

    They would take the processor from torch, whose turn it is then.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def temporary_directory() -> tempfile.TemporaryDirectory[str]:
    """Where the ONNX file is for as long as it is needed."""
    return tempfile.TemporaryDirectory(prefix="cachefree-", ignore_cleanup_errors=True)
