"""What `cachefree.rewrite` gives back: a module that is called as the model is, over one graph."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx, nn

from cachefree.baked import Modes
from cachefree.call_checks import refuse_no_batch
from cachefree.calling import Calling, is_tracing
from cachefree.calls import TensorSpec
from cachefree.certificate import Certificate, Evidence
from cachefree.copies import Copied, kinds_of
from cachefree.encoder_call import EncoderCall
from cachefree.errors import CacheFreeError, DomainError, Refusal
from cachefree.graph import assemble, bodies, mirror
from cachefree.hoisting import HoistedCall
from cachefree.lifting.keeping import Keeper
from cachefree.origin import Origin
from cachefree.refills import Refill
from cachefree.report import Report
from cachefree.spec import Interface

__all__ = ["Rewritten"]

_CHANGED = Refusal(
    "The model was changed after it was rewritten, and cannot be rewritten as it is now.",
    why="The one graph is computed with what the model holds at each call; what is in the way now "
    "follows.",
    remedy="Undo the change, or go on with a copy from before it (copy.deepcopy(rewritten)).",
)


class Rewritten(nn.Module):
    """One graph, called as the model is.

    A cache argument takes the model's own structure of tensors; ``None``, or leaving it out, means
    the neutral cache. Parameters and buffers are the model's own objects under the model's own
    names.

    Where the model keeps its cache elsewhere, so does this module: it is kept here between calls,
    or in the dict or object that the caller passes. Giving it by keyword, under the name that the
    interface has for it, makes a call ``(result, new cache)`` that keeps nothing.

    Attributes:
        graph_module: The ``torch.fx.GraphModule``: flat tensors in and out, no control flow, no
            ``None``.
        interface: Its inputs, outputs and cache slots.
        report: What was done and shown.
        keeper: What keeps the cache between calls; None where it is an argument.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        interface: Interface,
        calling: Calling,
        report: Report,
        origin: Origin | None = None,
        encoder: fx.GraphModule | None = None,
        encoder_call: EncoderCall | None = None,
        keeper: Keeper | None = None,
        hoisted_call: HoistedCall | None = None,
        projection: fx.GraphModule | None = None,
        evidence: Evidence | None = None,
        modes: Modes | None = None,
        refills: tuple[Refill, ...] = (),
    ) -> None:
        super().__init__()
        self.modes = modes
        self.refills = refills
        self.__dict__["_graph_module"] = graph_module
        self.interface = interface
        self.calling = calling
        self.report = report
        self.keeper = keeper
        self.__dict__["_origin"] = origin
        self.__dict__["_evidence"] = evidence
        self._copied: Copied | None = None
        self.__dict__["_encoder"] = encoder
        self.__dict__["_projection"] = projection
        self.encoder_call = encoder_call
        self.hoisted_call = hoisted_call
        model = None if origin is None else origin.model
        self.__dict__["_signatures"] = {
            name: inspect.signature(getattr(model, name)) for name in calling.methods if model
        }
        self._share(graph_module)
        self.training = calling.was_training and bool(calling.mode_matters)

    def _share(self, graph_module: fx.GraphModule) -> None:
        self.__dict__["_graph_module"] = graph_module
        self.calling.attribute = functools.partial(_attribute, graph_module)
        self.__dict__["_modules"].clear()
        self.__dict__["_parameters"] = graph_module._parameters
        self.__dict__["_buffers"] = graph_module._buffers
        self._non_persistent_buffers_set = graph_module._non_persistent_buffers_set
        # not add_module: it refuses names that this class has, such as encoder
        self.__dict__["_modules"].update(graph_module.named_children())
        self._kinds = kinds_of(self)
        self.__dict__["_first"] = _first_weight(graph_module)
        self.__dict__["__signature__"] = self._own_signature()

    def _own_signature(self) -> inspect.Signature:
        """Of the model's own call: what ``inspect.signature`` gives."""
        if self.keeper is not None:
            return self.keeper.signature
        return (self.encoder_call.whole if self.encoder_call else self.calling).signature

    @property
    def graph_module(self) -> fx.GraphModule:
        """The one graph, flat: ``interface.inputs`` in, ``interface.outputs`` out, in order."""
        return self.__dict__["_graph_module"]  # type: ignore[no-any-return]

    @property
    def encoder(self) -> Any:
        """The encoder as a graph of its own, where the model has one inside.

        It takes what only the encoder reads, flat, and returns a tuple of its states (B, E, C).
        With ``cross_attention="hoist"`` the keys and values that the decoder takes follow them; so
        a decoder whose encoder is elsewhere has such a graph too, which projects its states.
        """
        encoder = self.__dict__["_encoder"]
        return encoder if encoder is not None else self._child("encoder")

    @property
    def encoder_interface(self) -> Interface | None:
        """The inputs and outputs of the encoder's graph; None where there is none."""
        if self.hoisted_call is not None:
            return self.hoisted_call.encoder_interface
        return None if self.encoder_call is None else self.encoder_call.encoder_interface

    @property
    def certificate(self) -> Certificate:
        """The proof, step by step, for `cachefree.check_certificate`; written when asked for.

        Raises:
            CacheFreeError: nothing was proved, this is a copy of what was rewritten, or the graph
                has a loop over the tokens.
        """
        evidence: Evidence | None = self.__dict__["_evidence"]
        if self.hoisted_call is not None:
            raise CacheFreeError(
                Refusal(
                    "A graph whose cross-attention was hoisted has no certificate.",
                    why="What was proved is the graph before keys and values were moved out of it.",
                    remedy='Take the certificate of rewrite(model, cross_attention="reuse").',
                )
            )
        if self.report.loops:
            raise CacheFreeError(
                Refusal(
                    "A graph with a loop over the tokens has no certificate.",
                    why="That the rounds of a loop are alike is shown by the prover alone; the "
                    "checker does not state it a second time.",
                    remedy="Compare the two with cachefree.verify(model, rewritten).",
                )
            )
        if evidence is None:
            raise CacheFreeError(
                Refusal(
                    "A copy of a rewritten model has no certificate.",
                    why="What was proved is remembered by the object that rewrite gave back.",
                    remedy="Take its certificate, or save it: certificate.save(path).",
                )
            )
        if evidence.domain != self.interface.domain:
            raise CacheFreeError(
                Refusal(
                    "A graph that takes what was computed of a first call's input has no "
                    "certificate.",
                    why="What was proved is the graph with that input, whose sizes the decoder "
                    "alone does not see.",
                    remedy="Compare the two with cachefree.verify(model, rewritten).",
                )
            )
        return evidence.written(self.report)

    def _child(self, name: str) -> Any:
        if name in self._modules:
            return self._modules[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call.

        Raises:
            DomainError: the call is outside the domain of the verdict.
        """
        self._refresh()
        if self.keeper is None or self.keeper.is_pure(kwargs):
            return self._pure(*args, **kwargs)
        return self.keeper.call(self._pure, args, kwargs)

    def _called_as(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self._refresh()
        if self.keeper is None or self.keeper.is_pure(kwargs):
            return self._pure(*args, **kwargs)
        return self.keeper.call(self._pure, args, kwargs, is_first=self.keeper.is_first(method))

    def _pure(self, *args: Any, **kwargs: Any) -> Any:
        flat = self.flatten_call(*args, **kwargs)
        self._refuse_other_device(flat)
        return self.refilled(self.unflatten_result(self.graph_module(*flat), flat), args, kwargs)

    def _refuse_other_device(self, flat: Sequence[torch.Tensor]) -> None:
        """Refuses a call beside weights that are all on another device, where that is no move.

        Raises:
            DomainError: they are.
        """
        if is_tracing() or self._first is None or not flat:
            return
        namespace, name = self._first
        weight, given = namespace.get(name), flat[0]
        if weight is None or given.device == weight.device:
            return
        captured = next(s.device for s in self.calling.leaves if isinstance(s, TensorSpec))
        is_on_one = all(other.device == weight.device for other in self.parameters())
        if is_on_one and captured == weight.device and given.dim():
            raise DomainError(
                Refusal(
                    f"The call is on {given.device} where the parameters are on {weight.device}.",
                    why="The graph was captured with both on one device.",
                    remedy=f"Move what is given: x.to({str(weight.device)!r}); or the model.",
                )
            )

    def refilled(self, result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result, with the caller's own containers filled where the model fills them."""
        if torch.compiler.is_exporting() or torch._C._get_tracing_state():
            return result
        for refill in self.refills:
            result = refill.filled(result, args, kwargs)
        return result

    def __getattr__(self, name: str) -> Any:
        calling = self.__dict__.get("calling")
        if calling is not None and name in calling.methods:
            method: Any = functools.partial(self._called_as, name)
            method.__signature__ = self.__dict__["_signatures"].get(name)
            return method
        return super().__getattr__(name)

    def reset(self) -> None:
        """Makes the next call a first call, where the model keeps its cache on itself.

        Raises:
            DomainError: another thread is in a call.
        """
        if self.keeper is not None:
            self.keeper.reset()

    def flatten_call(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """The model's own call as the graph's flat inputs, the neutral cache put in where none is.

        Raises:
            DomainError: an argument, a structure, a dtype or a size is not one that the graph was
                captured for.
        """
        return self.flatten_with(self.__dict__["_encoder"], args, kwargs)

    def flatten_with(
        self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[torch.Tensor]:
        """The same with another runner of the encoder, which takes and gives flat tensors."""
        whole = self.encoder_call
        if self.hoisted_call is not None:
            graphs = encoder, self.__dict__["_projection"]
            return self.hoisted_call.flatten(self.calling, whole, graphs, args, kwargs)
        if whole is None:
            return self.calling.flatten(args, kwargs)
        if whole.is_decoders(kwargs):
            return self.calling.flatten((), whole.decoders(args, kwargs))
        return whole.tensors(args, kwargs, encoder)

    def unflatten_result(
        self, flat_outputs: Sequence[torch.Tensor], flat_inputs: Sequence[torch.Tensor]
    ) -> Any:
        """The graph's flat outputs in the model's own structure and classes."""
        call = self.hoisted_call
        if call is not None:
            flat_outputs = call.full_outputs(flat_outputs, flat_inputs)
            return self.calling.unflatten(flat_outputs, call.sizes_of(flat_inputs))
        return self.calling.unflatten(flat_outputs, flat_inputs)

    def sizes_of(self, flat_inputs: Sequence[torch.Tensor]) -> dict[str, int]:
        """The size of each symbol in a flat call."""
        return self.calling.sizes_of(flat_inputs)

    def empty_cache(
        self,
        batch_size: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The neutral cache, in the model's own structure.

        Args:
            batch_size: B.
            device: Where; by default where the parameters are.
            dtype: Of its floating-point tensors; by default the model's.

        Returns:
            What the cache argument takes. A dict by argument where there are several.

        Raises:
            DomainError: the batch is no size.
        """
        refuse_no_batch(batch_size)
        sizes = {**dict.fromkeys(self.interface.symbols, 0), "batch": batch_size}
        where = torch.device(device) if device is not None else self._device()
        calling = self.calling
        values = {
            place.path: place.structure.rebuild(
                [
                    calling.neutral(spec, sizes, where, dtype)
                    if isinstance(spec, TensorSpec)
                    else calling.value(spec.expr, sizes)
                    for spec in place.leaves
                ]
            )
            for place in calling.caches
        }
        only = next(iter(values.values())) if len(values) == 1 else values
        if self.keeper is not None and self.keeper.plan.arguments:
            return self.keeper.container_with(only)
        return only

    def neutral_slots(
        self,
        sizes: Mapping[str, int],
        *,
        device: torch.device | None = None,
        attribute: Callable[[str], torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """The neutral cache as flat tensors, in the order of ``interface.cache``.

        Args:
            sizes: The size of each symbol.
            device: Where; by default where the parameters are.
            attribute: Gives a parameter or buffer by its name; by default the model's own.
        """
        known = {**dict.fromkeys(self.interface.symbols, 0), **sizes}
        known.update(dict.fromkeys(self.interface.past_symbols, 0))
        own = {slot.past.path for slot in self.interface.cache}
        return [
            self.calling.neutral(spec, known, device or self._device(), attribute=attribute)
            for place in self.calling.caches
            for spec in place.leaves
            if isinstance(spec, TensorSpec) and spec.path in own
        ]

    def export_args(
        self,
        exporter: str = "onnx",
        *,
        names: Literal["optimum", "genai", "model"] = "optimum",
        flat: bool = False,
    ) -> dict[str, Any]:
        """Keyword arguments for an exporter.

        Args:
            exporter: ``"onnx"`` for ``torch.onnx.export``, ``"torch"`` for ``torch.export.export``,
                ``"trace"`` for ``torch.jit.trace``, ``"torchscript"``, ``"openvino"``.
            names: The scheme of the input and output names.
            flat: Whether they are for ``graph_module`` rather than for this module.
        """
        from cachefree.onnx.export import export_arguments

        return export_arguments(self, exporter, names, flat=flat)

    def _device(self) -> torch.device:
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    def _refresh(self) -> None:
        """Refuses another mode where it matters, and captures a changed model again."""
        if is_tracing():
            return
        different = self.modes.difference() if self.modes is not None else None
        if different is not None:
            raise DomainError(
                Refusal(
                    "The rewritten model was called in another mode than it was captured in.",
                    why=f"Now {different}; what was captured is a constant of the graph.",
                    remedy="Call it as it was captured, or rewrite again in this mode.",
                )
            )
        self.refresh()
        other = self.calling.another_mode("rewritten", is_training=self.training)
        if other is not None:
            raise DomainError(other)

    def refresh(self) -> None:
        """Rewrites the model again where it was changed since, as calls and exports do first.

        Raises:
            CacheFreeError: it cannot be rewritten as it is now.
        """
        if self._copied is not None and self._copied.has_changed():
            raise self._copied.refusal()
        origin: Origin | None = self.__dict__["_origin"]
        if origin is not None and origin.has_changed():
            try:
                fresh = origin.rewritten()
            except CacheFreeError as error:
                raise type(error)(_CHANGED, *error.refusals) from error
            if self.keeper is not None and fresh.keeper is not None:
                fresh.keeper.held = self.keeper.held
            (
                self.interface,
                self.calling,
                self.report,
                self.encoder_call,
                self.hoisted_call,
                self.keeper,
                self.modes,
                self.refills,
            ) = (
                fresh.interface,
                fresh.calling,
                fresh.report,
                fresh.encoder_call,
                fresh.hoisted_call,
                fresh.keeper,
                fresh.modes,
                fresh.refills,
            )
            for name in ("_origin", "_encoder", "_evidence", "_projection"):
                self.__dict__[name] = fresh.__dict__[name]
            training = self.training
            self._share(fresh.graph_module)
            self.train(training)

    def __getstate__(self) -> dict[str, Any]:
        graphs = ("_graph_module", "_encoder", "_projection")
        skipped = (*graphs, "_origin", "_evidence", "_copied", "_first", "__signature__")
        state = {name: value for name, value in self.__dict__.items() if name not in skipped}
        return {**state, "_graphs": tuple(self.__dict__[name] for name in graphs)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        copied, *beside = state.pop("_graphs")
        kinds = state["_kinds"]
        self.__dict__.update(state)
        self.__dict__["_origin"] = None
        self.__dict__["_evidence"] = None
        holder = nn.Module()
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            holder.__dict__[name] = self.__dict__[name]
        self._share(
            assemble(copied.graph, {**mirror(holder), **bodies(copied)}, _constants(copied))
        )
        for name, graph in zip(("_encoder", "_projection"), beside, strict=True):
            self.__dict__[name] = graph and assemble(graph.graph, mirror(holder), _constants(graph))
        self._copied, self._kinds = Copied(self, kinds), kinds


def _first_weight(module: nn.Module) -> tuple[dict[str, Any], str] | None:
    """Where the first parameter stands."""
    for part in module.modules():
        for name in part._parameters:
            if part._parameters[name] is not None:
                return part._parameters, name
    return None


def _attribute(graph_module: fx.GraphModule, name: str) -> torch.Tensor:
    """A parameter or buffer as the model has it now."""
    path, _, last = name.rpartition(".")
    found: torch.Tensor = getattr(graph_module.get_submodule(path), last)
    return found


def _constants(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    holder = graph_module._modules.get("_constants")
    return dict(holder.named_buffers()) if holder is not None else {}
