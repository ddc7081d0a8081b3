"""What is refused before a proof is tried: what no graph can be."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from cachefree.calls import TensorSpec
from cachefree.discover import Discovery
from cachefree.errors import (
    CacheFreeError,
    CaptureError,
    Refusal,
    SourceLine,
    UnsupportedBranchError,
)
from cachefree.held_code import is_installed
from cachefree.reach import reached_by
from cachefree.reading import Program
from cachefree.scripted import of_a_script, scripted_at
from cachefree.sizes import Question
from cachefree.terms import Term, topological

__all__ = [
    "next_values",
    "refuse_frozen_sizes",
    "refuse_independence",
    "refuse_no_module",
    "refuse_no_path",
    "refuse_not_rewritten",
    "refuse_other_results",
    "refuse_questions_of_tracing",
    "refuse_shared_state",
    "refuse_unusual_parameters",
    "refuse_writes",
    "rewritten_inside",
]


def refuse_no_module(model: object) -> None:
    """Refuses what is no module, and modules whose Python code is gone.

    Raises:
        CaptureError: it is one of these.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise CaptureError(
            Refusal(
                f"rewrite takes an nn.Module, not the class {model.__name__}.",
                remedy=f"Pass a model: cachefree.rewrite({model.__name__}(...)).",
            )
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(
            Refusal(
                f"rewrite takes an nn.Module, not {type(model).__name__}.",
                remedy="Pass the model itself.",
            )
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            Refusal(
                f"rewrite takes Python modules, not {type(model).__name__} of TorchScript.",
                why="Its Python code is gone; a traced module has one path only.",
                remedy="Pass the model that was scripted or traced. The one graph can be: "
                "torch.jit.trace(rewritten.graph_module, "
                '**rewritten.export_args("trace", flat=True)).',
            )
        )


def refuse_not_rewritten(value: object, function: str) -> None:
    """Refuses what `cachefree.rewrite` did not give.

    Raises:
        CacheFreeError: it did not.
    """
    if not isinstance(value, nn.Module) or not hasattr(value, "graph_module"):
        raise CacheFreeError(
            Refusal(
                f"{function} takes what cachefree.rewrite gives, not {type(value).__name__}.",
                remedy="Rewrite first: rewritten = cachefree.rewrite(model).",
            )
        )


def refuse_no_path(value: object, function: str) -> None:
    """Refuses what is no path of a file.

    Raises:
        CacheFreeError: it is none.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise CacheFreeError(
            Refusal(
                f"{function} takes the path of a file or a folder, not {type(value).__name__}.",
                remedy='Give a path: "model.onnx".',
            )
        )


def rewritten_inside(model: nn.Module) -> Refusal | None:
    """What is told of a refused model that holds a rewritten one."""
    for name, module in model.named_modules():
        if name and module.__dict__.get("_origin") is not None and hasattr(module, "graph_module"):
            return Refusal(
                f"The module {name!r} is what cachefree.rewrite gave.",
                why="It captures its model again when that is changed, and tensors without values "
                "in place of the weights are such a change.",
                remedy="Put the model that it was made of in its place, and rewrite the whole.",
            )
    return None


def refuse_unusual_parameters(model: nn.Module) -> None:
    """Refuses sparse and quantized parameters, and submodules whose Python code is gone.

    Raises:
        CaptureError: there are such, all listed.
    """
    refusals = []
    tensors = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in tensors:
        if tensor.layout is not torch.strided:
            what = f"The parameter {name!r} is sparse ({tensor.layout})."
            refusals.append(_not_traceable(what, "Sparse tensors", "Make it dense."))
        elif tensor.is_quantized:
            what = f"The parameter {name!r} is quantized ({tensor.dtype})."
            refusals.append(_not_traceable(what, "Quantized tensors", _QUANTIZE_LATER))
    quantized, scripted = [], []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            scripted.append((name, module))
        elif type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            quantized.append((name, module))
    if quantized:
        what = f"{_told(quantized)} quantized ({type(quantized[0][1]).__name__})."
        refusals.append(_not_traceable(what, "Quantized operators", _QUANTIZE_LATER))
    if scripted:
        refusals.append(
            Refusal(
                f"{_told(scripted)} TorchScript ({type(scripted[0][1]).__name__}).",
                why="Its Python code is gone: what it asks about sizes, and what it keeps, cannot "
                "be heard.",
                remedy="Put the module that was scripted or traced in its place. The one graph can "
                "be traced: torch.jit.trace(rewritten.graph_module, "
                '**rewritten.export_args("trace", flat=True)).',
            )
        )
    if refusals:
        raise CaptureError(*refusals)


_TRACING = {
    "FakeTensor",
    "FakeTensorMode",
    "fake_mode",
    "fake_device",
    "real_tensor",
    "is_fake",
    "detect_fake_mode",
    "get_proxy_mode",
    "ProxyTorchDispatchMode",
    "is_fx_tracing",
    "_get_current_function_mode",
    "_get_current_dispatch_mode",
    "_len_torch_function_stack",
    "_len_torch_dispatch_stack",
}


def refuse_questions_of_tracing(model: nn.Module) -> None:
    """Refuses code that asks how it is captured: it may go another way than it goes when it runs.

    What is installed is trusted to give the same either way.

    Raises:
        CaptureError: it asks, all lines are listed.
    """
    refusals = []
    for code in reached_by(model).codes:
        used = {*code.co_names, *(part for part in code.co_consts if isinstance(part, str))}
        if used & _TRACING and not is_installed(code.co_filename):
            name = sorted(used & _TRACING)[0]
            refusals.append(
                Refusal(
                    f"The model's code asks whether it is being captured ({name}).",
                    why="It may go another way then than when it runs, and the graph would be of "
                    "that way.",
                    remedy="Compute the same in both cases, without asking.",
                    where=SourceLine(code.co_filename, code.co_firstlineno, code.co_name),
                )
            )
    if refusals:
        raise CaptureError(*dict.fromkeys(refusals))


_QUANTIZE_LATER = (
    "Rewrite the model as it was, and quantize the exported file; or keep the weights as ordinary "
    "tensors in modules of your own, which compute with torch's operators."
)
_MOST_TOLD = 3


def _told(found: Sequence[tuple[str, nn.Module]]) -> str:
    """Modules by name, without those inside others of them, as the beginning of a sentence."""
    outermost = [
        name
        for name, _ in found
        if not any(name.startswith(f"{other}.") for other, _ in found if other != name)
    ]
    names = ", ".join(map(repr, outermost[:_MOST_TOLD]))
    if len(outermost) == 1:
        return f"The module {names} is"
    more = len(outermost) - _MOST_TOLD
    return f"The modules {names}{f' and {more} more' if more > 0 else ''} are"


def _not_traceable(what: str, kind: str, remedy: str) -> Refusal:
    return Refusal(what, why=f"{kind} cannot be traced with symbolic sizes.", remedy=remedy)


def refuse_writes(discovery: Discovery, first: Program, later: Program) -> None:
    """Refuses a model that keeps state on itself or writes to its inputs.

    What is written to a tensor of the cache is returned as its next value: there the write is no
    more than that value, and whoever goes on with what was returned sees no difference.

    Raises:
        CaptureError: it does; all places are listed.
    """
    refusals = [
        Refusal(
            f"The model keeps state on itself: forward sets {change.path!r}.",
            why="What a call leaves on the module changes the next call; a graph has no memory.",
            remedy="Pass it in and return it, as an argument of forward.",
        )
        for program in (first, later)
        for change in program.captured.changes
    ]
    refusals += [
        Refusal(
            f"The model writes in place to {term.args[0]!r}.",
            why="A graph neither changes its inputs nor its buffers.",
            remedy="Return the new value instead.",
            where=value.line,
        )
        for program in (first, later)
        for term, value in program.written.items()
        if not (program is later and value in next_values(discovery, later, term))
    ]
    if refusals:
        raise CaptureError(*dict.fromkeys(refusals))


def refuse_shared_state(
    discovery: Discovery, first: Program, later: Program, *, is_written: bool
) -> None:
    """Refuses calls that write to a part of the cache which shares memory with another part.

    The graph is given each part as a tensor of its own, so that the write would be in one alone.

    Args:
        discovery: How the model is called.
        first: The first path.
        later: The later path.
        is_written: Whether later calls write to the cache where the path does not show it.

    Raises:
        CaptureError: they do.
    """
    for place, output in zip(discovery.cache_leaves, discovery.carried, strict=True):
        past = later.inputs[place]
        if not is_written and past not in later.written:
            continue
        for program in (first, later):
            other = next(
                (
                    other
                    for other in program.shared.get(output, ())
                    if other in discovery.carried or (isinstance(other, Term) and other is not past)
                ),
                None,
            )
            if other is not None:
                what = program.captured.output_leaves
                name = other.args[0] if isinstance(other, Term) else f"the result{what[other].path}"
                raise CaptureError(
                    Refusal(
                        f"Later calls write in place to {past.args[0]!r}, which shares memory with "
                        f"{name}.",
                        why="The write changes both; in a graph each is a tensor of its own.",
                        remedy="Return tensors that share no memory: x.clone(); or do not write to "
                        "the cache in place.",
                        where=program.outputs[output].line,
                    )
                )


def next_values(discovery: Discovery, later: Program, term: Term) -> list[Term]:
    """The next values of a tensor of the cache, as a later call returns them."""
    return [
        later.outputs[output]
        for place, output in zip(discovery.cache_leaves, discovery.carried, strict=True)
        if later.inputs[place] is term
    ]


def refuse_frozen_sizes(*programs: Program) -> None:
    """Refuses paths in which a size became a number.

    Raises:
        CaptureError: there are such, with their lines.
    """
    refusals = [
        _frozen(question)
        for program in programs
        for question in program.captured.questions
        if question.froze
    ]
    if refusals:
        raise CaptureError(*dict.fromkeys(refusals))


def _frozen(question: Question) -> Refusal:
    function = scripted_at(question.where)
    if function is not None:
        return of_a_script(function, "It reads a size.", question.where)
    return Refusal(
        f"A size is turned into a Python number: {question.fact.lhs} is frozen as "
        f"{question.fact.rhs}.",
        why="The graph would be right at this one size only.",
        remedy="Compute with the size itself; loop over all tokens in "
        "steps of 1. Where the loop steps a state from token to token, rewrite the method that "
        "takes one token (method=), and call it for each.",
        where=question.where,
    )


def refuse_other_results(first: Program, later: Program) -> None:
    """Refuses paths that return different structures.

    Raises:
        UnsupportedBranchError: they do.
    """
    problem = first.captured.outputs.difference(later.captured.outputs, "the result")
    if problem is None:
        ranks = [
            (a.path, a, b)
            for a, b in zip(first.captured.output_leaves, later.captured.output_leaves, strict=True)
            if type(a) is not type(b)
            or (
                isinstance(a, TensorSpec)
                and isinstance(b, TensorSpec)
                and (len(a.shape) != len(b.shape) or a.dtype != b.dtype)
            )
        ]
        if ranks:
            problem = f"the result{ranks[0][0]} has another rank or dtype on later calls"
    if problem is not None:
        raise UnsupportedBranchError(
            Refusal(
                f"The first call and later calls return different structures: {problem}.",
                why="One graph has one list of outputs.",
                remedy="Return the same structure from both paths.",
            )
        )


def refuse_independence(discovery: Discovery, later: Program) -> None:
    """Refuses a later path that does not use the cache.

    Raises:
        UnsupportedBranchError: it does not.
    """
    used = set(topological(later.outputs))
    idle = [
        later.inputs[place] for place in discovery.cache_leaves if later.inputs[place] not in used
    ]
    if len(idle) == len(discovery.cache_leaves):
        names = ", ".join(str(term.args[0]) for term in idle[:3])
        raise UnsupportedBranchError(
            Refusal(
                f"The later path does not depend on the cache ({names}).",
                why="No output of a later call uses it.",
                remedy="Name the argument that carries the cache with cache=.",
            )
        )
