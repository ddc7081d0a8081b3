"""Example inputs of a first call: given, offered by the model, or probed on fake tensors."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cachefree.calls import Call, TensorSpec
from cachefree.errors import CacheFreeError, CaptureError, Refusal
from cachefree.explaining import depends_on_values, explained
from cachefree.fake_runs import run_on_fakes
from cachefree.fakes import device_of
from cachefree.offered import completions, main_inputs, resized_as_told
from cachefree.signatures import signature_of
from cachefree.structure import Structure, flatten, leaf_paths

__all__ = ["CACHE_NAMES", "FirstCall", "call_of", "find_first_call", "model_device", "plainer_call"]

log = logging.getLogger(__name__)

CACHE_NAMES = re.compile(
    r"past|cache|mem(s|ory|ories)?(_|$|\d)|state|hidden|(^|_)kvs?(_|$)|incremental|prev|hist|"
    r"present|context_window|buffer|presents|^last_(?!token|only|log|layer)|"
    r"^(h|c|hx|cx|h_?0|hc|carry|last)$",
    re.IGNORECASE,
)
BUFFER_NAMES = re.compile(r"cache|past|buffer|(^|_)kvs?(_|$)", re.IGNORECASE)
HELD_BY_CALLER = (
    "Let {} be None on the first call (an argument with that default), and return what is past "
    "with the new rows joined to it; or keep the buffers on the model (register_buffer), which is "
    "rewritten as it is."
)
BATCH, QUERY, FEATURES = 3, 5, 4
_MOST_RESIZED = 6
_MOST_KINDS = 12


@dataclass
class FirstCall:
    """How the model is called first.

    Attributes:
        args: Positional arguments; tensors stand for their shape and dtype only.
        kwargs: Keyword arguments.
        assumed: What was assumed to find them, in words.
        is_given: Whether the user gave them.
        plainer: The same call without the inputs that were added to it, if any were; or of one
            token without an axis for tokens.
        result: The leaves and the structure of what it returned on fake tensors, once it ran.
        leaves_nothing: Whether it is known to leave nothing behind on the model or its arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    assumed: tuple[str, ...] = ()
    is_given: bool = True
    plainer: FirstCall | None = None
    result: tuple[list[Any], Structure] | None = None
    leaves_nothing: bool = False


def model_device(model: nn.Module) -> torch.device:
    """The device that a model is captured on: that of its weights, the CPU where they have none."""
    return device_of(model)


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter, or torch's default."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.dtype.is_floating_point:
            return tensor.dtype
    return torch.get_default_dtype()


def call_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Mapping[int, str]
) -> Call:
    """A call taken apart; sizes are those of the tensors.

    Args:
        model: What is called; tensors on the meta device are taken to be where it is.
        args: Positional arguments.
        kwargs: Keyword arguments.
        names: Position → parameter name, for readable paths.
    """
    leaves, structure = flatten((args, dict(kwargs)))
    home = model_device(model)
    specs = tuple(
        TensorSpec(
            _readable(path, names),
            tuple(leaf.shape),
            leaf.dtype,
            home if leaf.is_meta else leaf.device,
        )
        for leaf, path in zip(leaves, leaf_paths(structure), strict=True)
    )
    return Call(structure, specs)


def _readable(path: str, names: Mapping[int, str]) -> str:
    positional = re.match(r"\[0\]\[(\d+)\](.*)", path)
    if positional:
        return names.get(int(positional[1]), f"args[{positional[1]}]") + positional[2]
    keyword = re.match(r"\[1\]\['(\w+)'\](.*)", path)
    return keyword[1] + keyword[2] if keyword else path


def find_first_call(model: nn.Module, example_inputs: Any = None) -> FirstCall:
    """The inputs of a first call.

    Args:
        model: Any module.
        example_inputs: A tuple of positional inputs, a dict of keyword inputs, one tensor, a
            `FirstCall` that was found before, or None.

    Raises:
        CaptureError: the given inputs do not run, or none were found.
    """
    if isinstance(example_inputs, FirstCall):
        return example_inputs
    if example_inputs is not None:
        call = _given(example_inputs)
        _must_run(model, call)
        return call
    failures: list[str] = []
    for attribute in ("dummy_inputs", "example_input_array"):
        offered = getattr(model, attribute, None)
        if offered is not None and not callable(offered):
            call = _given(offered)
            call = FirstCall(
                call.args,
                _on(_own(model, call.kwargs), model_device(model)),
                (f"inputs taken from model.{attribute}",),
                False,
            )
            error = _runs(model, call)
            completed = _completed(model, call, does_run=error is None)
            if error is None or completed is not call:
                return completed
            failures.append(f"model.{attribute}: {type(error).__name__}: {_first_line(error)}")
    call_with_numbers = _from_main_input(model)
    if call_with_numbers is not None:
        return call_with_numbers
    return _probe(model, failures)


def plainer_call(
    model: nn.Module, example_inputs: Any, method: Any, error: CacheFreeError
) -> FirstCall | None:
    """The call without the inputs that were added to it, after a refusal with them.

    Where a path is chosen by the number of tokens, and a mask is left out on one of them, both are
    the same without a mask. A graph that takes none refuses one when it is called.

    Args:
        model: Any module.
        example_inputs: What the user gave.
        method: The method that is rewritten.
        error: The refusal.

    Returns:
        None where the inputs are the user's own, or nothing was added to them.
    """
    if example_inputs is not None or method != "forward":
        return None
    first = find_first_call(model)
    plainer = first.plainer
    added = [name for name in first.kwargs if plainer and name not in plainer.kwargs]
    if plainer is None or not added:
        return None
    note = f"{' and '.join(added)} left out: with it, {str(error.refusals[0].what).rstrip('.')}"
    return replace(plainer, assumed=(*plainer.assumed, note))


def _first_line(error: Exception | None) -> str:
    return str(error).splitlines()[0] if error and str(error) else ""


def _own(model: nn.Module, offered: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is offered under names that forward has.

    A class may offer its inputs to subclasses that take fewer: `**kwargs` would swallow the others.
    """
    names = inspect.signature(model.forward).parameters
    own = {name: value for name, value in offered.items() if name in names}
    return own if own and _runs(model, FirstCall((), own)) is None else offered


def _on(kwargs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: torch.empty_like(value, device=device) if isinstance(value, torch.Tensor) else value
        for name, value in kwargs.items()
    }


def _completed(model: nn.Module, first: FirstCall, *, does_run: bool) -> FirstCall:
    """The call with what the model takes besides what it offers, where it runs."""
    for inputs, added in completions(model, first.kwargs):
        call = FirstCall(
            first.args,
            inputs,
            (*first.assumed, added),
            False,
            first if does_run else None,
        )
        if added and _runs(model, call) is None:
            return call
    return first


def _from_main_input(model: nn.Module) -> FirstCall | None:
    """A call with sounds or pictures, and with the decoder's tokens."""
    for inputs in main_inputs(model, model_device(model), model_dtype(model)):
        told = next(iter(completions(model, inputs)), (inputs, ""))[0]
        assumed = tuple(f"{name}: {_words(value)}" for name, value in told.items())
        first = FirstCall((), told, assumed, False)
        error = _runs(model, first)
        if error is None:
            return first
        for other in itertools.islice(resized_as_told(told, str(error)), _MOST_RESIZED):
            assumed = tuple(f"{name}: {_words(value)}" for name, value in other.items())
            first = FirstCall((), other, assumed, False)
            if _runs(model, first) is None:
                return first
    return None


def _given(example_inputs: Any) -> FirstCall:
    if isinstance(example_inputs, Mapping):
        return FirstCall((), dict(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        return FirstCall(tuple(example_inputs), {})
    return FirstCall((example_inputs,), {})


def _runs(model: nn.Module, first: FirstCall) -> Exception | None:
    """None where the call runs on fake tensors, else what it raised."""
    try:
        first.result = run_on_fakes(model, call_of(model, first.args, first.kwargs, {}), {})
    except Exception as error:  # noqa: BLE001 - the model may raise anything
        return error
    return None


def _must_run(model: nn.Module, first: FirstCall) -> None:
    error = _runs(model, first)
    if error is not None:
        raise explained(error, "The model does not run with the example inputs.") from error


def _probe(model: nn.Module, failures: Sequence[str] = ()) -> FirstCall:
    parameters = list(signature_of(model).parameters.values())
    required = [
        parameter
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind
        in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    wanted = required or [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][:1]
    source = _source(model)
    choices = [list(_choices(model, parameter, source)) for parameter in wanted]
    several = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    tried = 0
    last: Exception | None = None
    for values in itertools.islice(itertools.product(*choices), 200):
        tried += 1
        named = dict(zip((parameter.name for parameter in wanted), values, strict=True))
        if all(value is None for value in named.values()):
            continue
        by_position = [
            named.pop(parameter.name)
            for parameter in wanted
            if parameter.kind is parameter.POSITIONAL_ONLY
            or (several and parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
        ]
        words = zip((parameter.name for parameter in wanted), values, strict=True)
        first = FirstCall(
            tuple(by_position),
            named,
            tuple(f"{name}: {_words(value)}" for name, value in words),
            False,
        )
        last = _runs(model, first)
        if last is None:
            first = dataclasses.replace(first, plainer=_of_one_token(first))
            log.info("example inputs assumed: %s", "; ".join(first.assumed))
            return first
        if depends_on_values(last):
            raise explained(last, "The model could not be traced.") from last
    buffers = [p.name for p in wanted if p.default is p.empty and BUFFER_NAMES.search(p.name)]
    remedy = "Pass example_inputs: the inputs of a first call, as a tuple or as a dict."
    if buffers:
        remedy = HELD_BY_CALLER.format(" and ".join(buffers))
    names = ", ".join(parameter.name for parameter in wanted)
    offered = "".join(f"; {failure}" for failure in failures)
    raise CaptureError(
        Refusal(
            f"No example inputs were found for {type(model).__name__}.forward({names}).",
            why=f"{tried} guesses from its signature and its first layers did not run; "
            f"the last raised {type(last).__name__}: {_first_line(last)}{offered}",
            remedy=remedy,
        )
    )


def _of_one_token(first: FirstCall) -> FirstCall | None:
    """The call without an axis for tokens: what a model takes that makes a step for each."""
    values = {
        name: torch.empty((BATCH, *value.shape[2:]), dtype=value.dtype, device=value.device)
        if isinstance(value, torch.Tensor) and value.shape[:2] == (BATCH, QUERY)
        else value
        for name, value in first.kwargs.items()
    }
    if first.args or all(values[name] is value for name, value in first.kwargs.items()):
        return None
    assumed = tuple(f"{name}: {_words(value)}" for name, value in values.items())
    return FirstCall((), values, assumed, False)


def _words(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return repr(value)


def _source(model: nn.Module) -> str:
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    try:
        return inspect.getsource(inspect.unwrap(model.forward))
    except (OSError, TypeError):
        return ""


def _choices(model: nn.Module, parameter: inspect.Parameter, source: str) -> Iterator[Any]:
    """What a parameter could take, likeliest first."""
    name = parameter.name
    device, dtype = model_device(model), model_dtype(model)
    ids = torch.empty((BATCH, QUERY), dtype=torch.int64, device="meta")
    tests_none = re.search(
        rf"\b{name}\s+is\s+(not\s+)?None\b|\bnot\s+{name}\b|\bif\s+{name}\b", source
    )
    if CACHE_NAMES.search(name) or tests_none:
        yield None
        yield from ((), [], {})
    if "mask" in name:
        for kind in (torch.int64, torch.bool, dtype):
            yield torch.empty((BATCH, QUERY), dtype=kind, device=device)
        for kind in (dtype, torch.bool, torch.int64):
            yield torch.empty((BATCH, 1, QUERY, QUERY), dtype=kind, device=device)
            yield torch.empty((QUERY, QUERY), dtype=kind, device=device)
    kinds = _layer_inputs(model, dtype)[:_MOST_KINDS]
    if re.search(r"ids|tokens?|idx|input_ids", name):
        kinds.sort(key=lambda kind: kind[0] != torch.int64)
    if parameter.annotation in (int, "int"):
        yield 0
    for kind, shape in kinds:
        yield torch.empty(shape, dtype=kind, device=device)
    for kind, shape in kinds:
        if shape[:2] == (BATCH, QUERY):
            yield torch.empty((BATCH, *shape[2:]), dtype=kind, device=device)
            yield torch.empty((BATCH, 1, *shape[2:]), dtype=kind, device=device)
    if not kinds:
        yield torch.empty((BATCH, QUERY, FEATURES), dtype=dtype, device=device)
        yield torch.empty((BATCH, FEATURES, QUERY, FEATURES), dtype=dtype, device=device)
        yield torch.empty(ids.shape, dtype=torch.int64, device=device)
    if not (CACHE_NAMES.search(name) or tests_none):
        yield None


def _layer_inputs(
    model: nn.Module, dtype: torch.dtype
) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """The dtypes and shapes that the model's layers take, in the order of the layers."""
    shapes: dict[tuple[torch.dtype, tuple[int, ...]], None] = {}
    for module in model.modules():
        tables = list(module) if isinstance(module, nn.ModuleList) else []
        if len(tables) > 1 and all(isinstance(table, nn.Embedding) for table in tables):
            # one row of tokens for each table
            shapes[(torch.int64, (BATCH, len(tables), QUERY))] = None
            shapes[(torch.int64, (BATCH, QUERY, len(tables)))] = None
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            shapes[(torch.int64, (BATCH, QUERY))] = None
        elif isinstance(module, nn.RNNCellBase):
            shapes[(dtype, (BATCH, QUERY, module.input_size))] = None
        elif isinstance(module, nn.Linear):
            shapes[(dtype, (BATCH, QUERY, module.in_features))] = None
        elif isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            shapes[(dtype, (BATCH, module.in_channels, QUERY + 2))] = None
        elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            shapes[(dtype, (BATCH, QUERY, module.normalized_shape[0]))] = None
    return list(shapes)
