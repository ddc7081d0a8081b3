"""A cachefree ONNX file on ONNX Runtime: called like the model, with or without a cache."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from cachefree.call_checks import refuse_no_batch
from cachefree.errors import CacheFreeError, DomainError, Refusal
from cachefree.explaining import foreseen
from cachefree.onnx.attention.shared import LENGTH
from cachefree.onnx.calling import bind_arguments
from cachefree.onnx.domain import check_domain, concrete, read_sizes
from cachefree.onnx.generation import Options, generate
from cachefree.onnx.loops.session import OnnxGenerator
from cachefree.onnx.metadata import FileDescription, generates, read_description, read_loop
from cachefree.onnx.runtime import TensorSession, open_session
from cachefree.onnx.sharing import SharedRun
from cachefree.onnx.staged import StagedSession
from cachefree.onnx.stages import STAGE, is_stage, stage_files
from cachefree.onnx.stepping import take_rows
from cachefree.onnx.storage import check_storage
from cachefree.onnx.writing import DECODER_FILE, ENCODER_FILE, MODEL_FILE
from cachefree.preconditions import refuse_no_path, refuse_not_rewritten

if TYPE_CHECKING:
    from cachefree.spec import Interface

__all__ = ["OnnxDecoder", "load_onnx"]


@foreseen("The ONNX file could not be opened")
def load_onnx(
    path: str | os.PathLike[str],
    *,
    like: Any = None,
    providers: Sequence[Any] | None = None,
    session_options: Any = None,
) -> OnnxDecoder:
    """Opens a file that `to_onnx` wrote.

    Args:
        path: The ``.onnx`` file, or its folder; its ``.data`` file stands beside it, and
            ``encoder_model.onnx`` where the model has an encoder.
        like: The rewritten module that it was exported from: then calls take and give the model's
            own classes. Without it, they take the names in the file or plain containers, and give a
            dict. A file never makes Python import what it names.
        providers: ONNX Runtime's execution providers. None: CUDA where this machine has it, else
            the CPU.
        session_options: An ``onnxruntime.SessionOptions``.

    Returns:
        What is called like the model; an `OnnxGenerator` for a file that generates by itself.

    Raises:
        CacheFreeError: the file, its data file or a provider is missing, it was not written by
            cachefree, ``like`` is another model, or ONNX Runtime cannot run it.
    """
    refuse_no_path(path, "load_onnx")
    if like is not None:
        refuse_not_rewritten(like, "load_onnx(like=…)")
    file, *others = _files(Path(path))
    metadata, uses_bfloat16 = check_storage(file)
    description = read_description(metadata, str(file))
    if generates(metadata):
        session = open_session(file, providers, session_options, uses_bfloat16)
        return cast(OnnxDecoder, OnnxGenerator(session, description, *read_loop(metadata)))
    if like is not None:
        _check_like(like, description.interface, file)
    session = open_session(file, providers, session_options, uses_bfloat16)
    if not others:
        _check_names(session, description, file)
    else:
        session = _staged(session, others, description, providers, session_options)
    encoder = None
    beside = file.with_name(ENCODER_FILE)
    if file.name != ENCODER_FILE and beside.exists():
        encoder = load_onnx(beside, providers=providers, session_options=session_options)
    return OnnxDecoder(session, description, like, encoder)


def _staged(
    first: TensorSession,
    others: Sequence[Path],
    description: FileDescription,
    providers: Sequence[Any] | None,
    session_options: Any,
) -> StagedSession:
    """The sessions of all stages."""
    sessions = [first]
    for number, file in enumerate(others, start=2):
        metadata, uses_bfloat16 = check_storage(file)
        if metadata.get(STAGE) != f"{number} of {len(others) + 1}":
            raise CacheFreeError(
                Refusal(
                    f"{file} is not stage {number} of {len(others) + 1}.",
                    why=f"It says that it is {metadata.get(STAGE, 'no stage')}.",
                    remedy="Export all stages again.",
                )
            )
        sessions.append(open_session(file, providers, session_options, uses_bfloat16))
    names = [spec.name for spec in description.interface.inputs]
    return StagedSession(sessions, [*names, LENGTH])


def _files(path: Path) -> list[Path]:
    """The files of one graph: the path itself, its stages, or in a folder those of its name."""
    if not path.is_dir():
        return [path] if path.exists() and not is_stage(path) else stage_files(path) or [path]
    names = (DECODER_FILE, MODEL_FILE)
    several = (stage_files(path / name) for name in names)
    single = next(([path / name] for name in names if (path / name).exists()), None)
    found = single or next(filter(None, several), None)
    if found is None:
        raise CacheFreeError(
            Refusal(
                f"There is neither {' nor '.join(names)} in {path}.",
                remedy="Give the path of the file that cachefree.to_onnx wrote.",
            )
        )
    return found


class OnnxDecoder:
    """The one graph on ONNX Runtime. Made by `load_onnx`.

    Attributes:
        interface: Inputs, outputs, cache slots and domain; the names are those in the file.
        verdict: The verdict when the file was written.
        session: The ``onnxruntime.InferenceSession``.
        encoder: The encoder's file, where there is one beside: called with what only the encoder
            reads, it gives ``last_hidden_state`` (B, E, C).
        kv: How each slot of the cache grows, and why those do that are joined.
    """

    def __init__(
        self,
        session: TensorSession,
        description: FileDescription,
        like: Any = None,
        encoder: OnnxDecoder | None = None,
    ) -> None:
        self._session = session
        self._description = description
        self._like = like
        keeper = getattr(like, "keeper", None)
        self._keeper = None if keeper is None else keeper.another()
        self.interface: Interface = description.interface
        self.verdict = description.verdict
        self.session = session.session
        self.encoder = encoder
        self.kv = description.cache.report
        has_buffers = bool(description.cache.layouts)
        self._shared = SharedRun(session, description) if has_buffers else None

    def __repr__(self) -> str:
        inputs = ", ".join(spec.name for spec in self.interface.inputs if not spec.is_cache)
        return (
            f"OnnxDecoder({inputs}; {len(self.interface.cache)} cache tensors; {self.verdict}; "
            f"{', '.join(self._session.providers)})"
        )

    @property
    def device(self) -> torch.device:
        """Where results are; inputs are moved there."""
        return self._session.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph once.

        With ``like``, takes and gives what the model does. Without, takes tensors by their names in
        the file, or the model's arguments by position or keyword in plain tuples, lists and dicts;
        and gives a dict of all outputs, in which `next_cache` finds the cache. A cache that is left
        out (or None) is the neutral one.

        Raises:
            DomainError: an input is missing, or has another structure, dtype or size than the graph
                takes.
        """
        if self._keeper is not None and not self._keeper.is_pure(kwargs):
            return self._keeper.call(self._called_alike, args, kwargs)
        if self._like is not None:
            return self._called_alike(*args, **kwargs)
        given = bind_arguments(self.interface, args, kwargs)
        sizes = read_sizes(self.interface, given)
        flat = [
            given[spec.name] if spec.name in given else self._neutral(place, sizes)
            for place, spec in enumerate(self.interface.inputs)
        ]
        is_first = any(spec.name not in given for spec in self.interface.inputs)
        outputs = self._run(flat, sizes, is_first=is_first)
        return dict(zip((spec.name for spec in self.interface.outputs), outputs, strict=True))

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        if self.encoder is None:
            return list(self._like.flatten_call(*args, **kwargs))
        encoder = self.encoder
        run = lambda *tensors: encoder.run_flat(tensors)  # noqa: E731
        return list(self._like.flatten_with(run, args, kwargs))

    def _called_alike(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._flat(args, kwargs)
        result = self._like.unflatten_result(self.run_flat(flat), flat)
        return self._like.refilled(result, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        calling = getattr(self.__dict__.get("_like"), "calling", None)
        if calling is None or name not in calling.methods:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return functools.partial(self._called_as, name)

    def _called_as(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self._keeper is None or self._keeper.is_pure(kwargs):
            return self._called_alike(*args, **kwargs)
        is_first = self._keeper.is_first(method)
        return self._keeper.call(self._called_alike, args, kwargs, is_first=is_first)

    def reset(self) -> None:
        """Makes the next call a first call, where the model keeps its cache on itself."""
        if self._keeper is not None:
            self._keeper.reset()

    def run_flat(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Runs the graph on its flat inputs, in the order of ``interface.inputs``.

        Raises:
            DomainError: a dtype, rank or size is outside the domain.
        """
        names = [spec.name for spec in self.interface.inputs]
        return self._run(
            tensors, read_sizes(self.interface, dict(zip(names, tensors, strict=True)))
        )

    def _run(
        self,
        tensors: Sequence[torch.Tensor],
        sizes: Mapping[str, int],
        *,
        is_first: bool | None = None,
    ) -> list[torch.Tensor]:
        check_domain(self.interface, sizes, is_first=is_first)
        if self._shared is not None:
            return self._shared.run(tensors, sizes)
        names = [spec.name for spec in self.interface.inputs]
        results = {
            spec.name: (concrete(spec.shape, sizes), spec.dtype) for spec in self.interface.outputs
        }
        return self._session.run(dict(zip(names, tensors, strict=True)), results)

    def empty_cache(self, batch_size: int = 1, **sizes: int) -> Any:
        """The neutral cache, in the model's own structure with ``like``, else by name.

        Args:
            batch_size: B.
            sizes: Further sizes that the cache has but that do not grow, by symbol.
        """
        refuse_no_batch(batch_size)
        if self._like is not None:
            return self._like.empty_cache(batch_size)
        known = {"batch": batch_size, **dict.fromkeys(self.interface.past_symbols, 0), **sizes}
        return {
            spec.name: self._neutral(place, known)
            for place, spec in enumerate(self.interface.inputs)
            if spec.is_cache
        }

    def next_cache(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The cache for the next call, by input name, from the outputs of one without ``like``."""
        return {slot.past.name: outputs[slot.present.name] for slot in self.interface.cache}

    def generate(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int = 20,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        pad_token_id: int | None = None,
        seed: int | None = None,
        prefill_chunk: int | None = None,
        streamer: Any = None,
        progress: Callable[[int, int], None] | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Continues token ids, with the cache.

        Args:
            input_ids: Token ids, BS (or SB where the model has time first).
            max_new_tokens: How many tokens to add at most.
            eos_token_id: What ends a row, one id or several; all rows there ends the generation.
            do_sample: Whether to draw tokens; else the likeliest is taken.
            temperature: Divides the scores before a token is drawn.
            top_k: Draw among the K likeliest only.
            top_p: Draw among the likeliest that together have this probability only.
            num_beams: Beams to search, by the rules of transformers; 1 for none.
            length_penalty: The power of its length that a beam's log probability is divided by.
            early_stopping: Whether a search ends as soon as ``num_beams`` beams have ended.
            pad_token_id: What stands behind the end of a row; None: the (first) id that ends one.
            seed: For the same tokens again.
            prefill_chunk: How many tokens of the prompt to run at once; None: all. It bounds the
                memory of long prompts, and is right for a model whose result does not depend on how
                its input is cut.
            streamer: What has ``put(ids)``, called with the prompt and then with each token, and
                ``end()``.
            progress: Called with the number of new tokens and ``max_new_tokens`` after each.
            inputs: The model's other inputs for ``input_ids``, by name. A mask over past and new
                tokens is continued with ones (and is all ones where it is left out), positions
                count on, the rest is passed to each call.

        Returns:
            The ids with the new ones behind them.

        Raises:
            DomainError: the graph takes no token ids or gives no scores, a call is outside the
                domain, or the options contradict one another.
        """
        ends = () if eos_token_id is None else eos_token_id
        options = Options(
            max_new_tokens,
            (ends,) if isinstance(ends, int) else tuple(ends),
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            pad=pad_token_id,
            seed=seed,
            prefill_chunk=prefill_chunk,
            streamer=streamer,
            progress=progress,
        )
        return generate(self._plain(), self._description, input_ids, inputs, options)

    def reordered(
        self, cache: Mapping[str, torch.Tensor], rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Rows of the batch of a cache by input name, some perhaps twice: beams go on from it."""
        if self._shared is not None:
            return self._shared.reordered(cache, rows)
        batch = _batch_of(self.interface, cache)
        return {
            slot.past.name: take_rows(cache[slot.past.name], slot.past, rows, batch)
            for slot in self.interface.cache
        }

    def _plain(self) -> OnnxDecoder:
        return self if self._like is None else OnnxDecoder(self._session, self._description)

    def _neutral(self, place: int, sizes: Mapping[str, int]) -> torch.Tensor:
        spec = self.interface.inputs[place]
        slot = next(
            index for index, slot in enumerate(self.interface.cache) if slot.past.name == spec.name
        )
        unknown = {
            symbol.name for size in spec.shape for symbol in getattr(size, "free_symbols", ())
        } - sizes.keys()
        if unknown:
            raise DomainError(
                f"The sizes {', '.join(sorted(unknown))} of {spec.name} are not known."
            )
        shape = concrete(spec.shape, sizes)
        return self._description.neutral[slot].tensor(shape, spec.dtype, self.device)


def _check_names(session: TensorSession, description: FileDescription, file: Path) -> None:
    """Refuses a graph whose inputs and outputs are not those that the file says it has."""
    further = {LENGTH} if description.cache.layouts else set()
    interface = description.interface
    for kind, has, said in (
        ("inputs", session.session.get_inputs(), {s.name for s in interface.inputs} | further),
        ("outputs", session.session.get_outputs(), {s.name for s in interface.outputs}),
    ):
        if differing := {value.name for value in has} ^ said:
            raise CacheFreeError(
                Refusal(
                    f"{file} was edited: its {kind} are not those that it describes.",
                    why=f"They differ in {', '.join(sorted(differing)[:4])}.",
                    remedy="Export the model again.",
                )
            )


def _batch_of(interface: Interface, cache: Mapping[str, torch.Tensor]) -> int:
    known = {name: tensor for name, tensor in cache.items() if tensor is not None}
    return read_sizes(interface, known)["batch"]


def _check_like(like: Any, interface: Interface, file: Path) -> None:
    """Refuses a module whose inputs and outputs are not those of the file."""
    for kind in ("inputs", "outputs"):
        theirs = [
            (spec.path, spec.dtype, str(spec.shape)) for spec in getattr(like.interface, kind)
        ]
        ours = [(spec.path, spec.dtype, str(spec.shape)) for spec in getattr(interface, kind)]
        if theirs == ours:
            continue
        place = next(
            (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None
        )
        why = (
            f"It has {len(theirs)} {kind}, the file has {len(ours)}."
            if place is None
            else (
                f"{kind.capitalize()[:-1]} {place} is {_said(theirs[place])} there and"
                f" {_said(ours[place])} in the file."
            )
        )
        raise CacheFreeError(
            Refusal(
                f"{file} was not exported from this rewritten module.",
                why=why,
                remedy="Pass the rewritten module that it was exported from, or leave like= out.",
            )
        )


def _said(spec: tuple[str, torch.dtype, str]) -> str:
    return f"{spec[0] or 'the result'} {spec[2]} {str(spec[1]).removeprefix('torch.')}"
