"""A decoder that several processes run together: the same call in each, the same result in each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cachefree.calls import TensorSpec
from cachefree.errors import DomainError
from cachefree.onnx.calling import bind_arguments
from cachefree.onnx.domain import check_domain, read_sizes
from cachefree.onnx.generation import Options, generate
from cachefree.onnx.metadata import FileDescription
from cachefree.onnx.names import name_interface
from cachefree.onnx.stepping import take_rows
from cachefree.scale.agreement import Said, agreed
from cachefree.scale.links import Links
from cachefree.spec import Interface
from cachefree.vocabulary import vocabulary_sizes

__all__ = ["JointDecoder", "last_token"]


class JointDecoder:
    """One process's part of the one graph; a call of it is a call of all processes.

    Every process calls it with the same inputs, and gets the same outputs; the cache is each
    one's own. Whatever is refused or fails in one process is an error in all of them.

    Attributes:
        interface: The inputs, outputs and cache slots that this process has.
        device: Where it computes.
    """

    def __init__(
        self,
        rewritten: Any,
        interface: Interface,
        links: Links,
        neutral: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        self.interface = interface
        self.device = device
        self._links, self._neutral = links, neutral
        self._whole: Interface = rewritten.interface
        self._calling = copy.copy(rewritten.calling)  # which does not hold on to the model
        self._description = _description(rewritten, interface)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Runs the graph once.

        Args:
            args: The model's arguments by position, in plain tuples, lists and dicts.
            kwargs: The same by name, or tensors by their names in ``interface``. A cache is this
                process's: what `next_cache` gave. Left out (or None), it is the neutral one.

        Returns:
            Output name → tensor: the outputs beside the cache, and this process's cache.

        Raises:
            DomainError: in every process: an input is missing, of another dtype or size than the
                graph takes, or not the same in all of them.
            StageError: a process is gone, does not answer, or could not compute its part.
        """
        return self._call(args, kwargs, None)

    def next_cache(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's cache for the next call, by input name, from the outputs of one."""
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
        seed: int | None = None,
        prefill_chunk: int | None = None,
        streamer: Any = None,
        progress: Callable[[int, int], None] | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Continues token ids, with the cache; the arguments are those of `OnnxDecoder.generate`.

        Every process gives the same arguments and gets the same ids. Without a ``seed`` the first
        process draws one for all.

        Raises:
            DomainError: the graph takes no token ids or gives no scores, a call is outside the
                domain, or the options contradict one another.
            StageError: a process is gone, does not answer, or could not compute its part.
        """
        ends = () if eos_token_id is None else eos_token_id
        if do_sample and seed is None:
            seed = self._links.all_told(torch.Generator().seed() >> 1)[0]
        options = Options(
            max_new_tokens,
            (ends,) if isinstance(ends, int) else tuple(ends),
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_beams=num_beams,
            seed=seed,
            prefill_chunk=prefill_chunk,
            streamer=streamer,
            progress=progress,
        )
        return generate(_LastScores(self), self._description, input_ids, inputs, options)

    def reordered(
        self, cache: Mapping[str, torch.Tensor], rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Rows of the batch of this process's cache, some perhaps twice."""
        batch = read_sizes(self.interface, cache).get("batch", 1) if cache else 1
        return {
            slot.past.name: take_rows(cache[slot.past.name], slot.past, rows, batch)
            for slot in self.interface.cache
        }

    def _call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], last_of: str | None
    ) -> dict[str, torch.Tensor]:
        given: dict[str, torch.Tensor] = {}
        try:
            given = bind_arguments(self.interface, args, kwargs)
            said = Said.of_call(self.interface, given)
        except DomainError as error:
            said = Said(refusals=error.refusals)
        sizes, is_first = agreed(self._links.all_told(said), self._whole)
        check_domain(self._whole, sizes, is_first=is_first)
        with torch.no_grad():
            return self._run(given, sizes, last_of)

    def _run(
        self, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int], last_of: str | None
    ) -> dict[str, torch.Tensor]:
        """Computes a call that all agreed on.

        Args:
            given: Input name → tensor, of the inputs that were given to this process.
            sizes: Symbol → size.
            last_of: The output of which only the last token is wanted.
        """
        raise NotImplementedError

    def _input(
        self, name: str, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> torch.Tensor:
        """An input of the graph, the neutral one where none was given."""
        if name in given:
            return given[name].to(self.device)
        path = next(spec.path for spec in self._whole.inputs if spec.name == name)
        spec = next(
            leaf
            for place in self._calling.caches
            for leaf in place.leaves
            if isinstance(leaf, TensorSpec) and leaf.path == path
        )
        known = {**dict.fromkeys(self._whole.symbols, 0), **sizes}
        own: torch.Tensor = self._calling.neutral(
            spec, known, self.device, attribute=self._neutral.__getitem__
        )
        return own


class _LastScores:
    """A decoder whose scores are those of the last token: no more of them are sent around."""

    def __init__(self, decoder: JointDecoder) -> None:
        self.decoder = decoder
        self.next_cache, self.reordered = decoder.next_cache, decoder.reordered

    def __call__(self, **inputs: Any) -> dict[str, torch.Tensor]:
        return self.decoder._call((), inputs, self.decoder._description.logits)


def last_token(scores: torch.Tensor, shape: Sequence[Any]) -> torch.Tensor:
    """What an output is for the last token; all of it where it has no axis of tokens."""
    axis = next((axis for axis, size in enumerate(shape) if str(size) == "query"), None)
    return scores if axis is None else scores.narrow(axis, -1, 1)


def _description(rewritten: Any, interface: Interface) -> FileDescription:
    """Which input takes the tokens, and which output scores them."""
    whole: Interface = rewritten.interface
    rows = zip(whole.inputs, vocabulary_sizes(rewritten.graph_module), strict=True)
    vocabulary = {spec.name: size for spec, size in rows if size is not None}
    names = name_interface(whole, "model", vocabulary)
    inputs = dict(zip(names.inputs, whole.inputs, strict=True))
    outputs = dict(zip(names.outputs, whole.outputs, strict=True))
    return FileDescription(
        interface,
        (),
        str(rewritten.report.verdict),
        None if names.tokens is None else inputs[names.tokens].name,
        None if names.logits is None else outputs[names.logits].name,
    )
