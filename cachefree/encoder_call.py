"""A call of the whole model as one of its decoder: the encoder runs where it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cachefree.calling import Calling, is_tracing
from cachefree.errors import DomainError, Refusal
from cachefree.sizes import size_symbol, substitute
from cachefree.spec import Domain, InputSpec, Interface, OutputSpec, Region
from cachefree.structure import flatten

__all__ = ["EncoderCall", "PrefixCall"]

Encode = Callable[..., Sequence[torch.Tensor]]


@dataclass
class EncoderCall:
    """How a call of the whole model becomes one of the decoder.

    Attributes:
        whole: How the whole model is called.
        taken: Places, among the whole call's tensors, of what the encoder takes.
        kept: Places of what the decoder takes, in its order; None for the encoder's states.
        states: The decoder's input for the encoder's states.
        is_needed_whole: Whether later calls read the states.
        dropped: Arguments that only the encoder reads.
        argument: The model's own argument for the encoder's output; empty where it has none.
    """

    whole: Calling
    taken: tuple[int, ...]
    kept: tuple[int | None, ...]
    states: InputSpec
    is_needed_whole: bool
    dropped: tuple[str, ...]
    argument: str = ""

    @property
    def encoder_interface(self) -> Interface:
        """Of the encoder's own graph."""
        states = self.states
        present = {size_symbol(name): size for name, size in self.whole.present.items()}
        shape = tuple(substitute(size, present) for size in states.shape)
        output = OutputSpec("last_hidden_state", "last_hidden_state", shape, states.dtype)
        inputs = tuple(self.whole.interface.inputs[place] for place in self.taken)
        return Interface(inputs, (output,), (), Domain((Region("encoder"),)))

    def is_decoders(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call gives the encoder's states itself."""
        return any(kwargs.get(name) is not None for name in (self.states.path, self.argument))

    def decoders(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call that gives the encoder's states, as keyword arguments of the decoder.

        Raises:
            DomainError: the encoder's output holds no tensor.
        """
        bound = self.whole.signature.bind_partial(*args)
        named = {**bound.arguments, **kwargs}
        states = named.pop(self.states.path, None)
        output = named.pop(self.argument, None) if self.argument else None
        if states is None:
            leaves, _ = flatten(output)
            states = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
        if states is None:
            raise DomainError(
                Refusal(
                    f"The argument {self.argument!r} holds no tensor.",
                    remedy="Give what rewritten.encoder returns.",
                )
            )
        return {
            self.states.path: states,
            **{name: value for name, value in named.items() if name not in self.dropped},
        }

    def tensors(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], encoder: Encode
    ) -> list[torch.Tensor]:
        """A call of the whole model as the decoder's flat inputs.

        The encoder runs on the first call, and on later calls only where its states are read.

        Raises:
            DomainError: the call is outside the domain.
        """
        flat = self.whole.flatten(args, kwargs)
        states = self._states(flat, encoder)
        return [states if place is None else flat[place] for place in self.kept]

    def _states(self, flat: Sequence[torch.Tensor], encoder: Encode) -> torch.Tensor:
        sizes = self.whole.sizes_of(flat)
        slots = self.whole.interface.past_symbols
        if is_tracing() or self.is_needed_whole or any(sizes[name] == 0 for name in slots):
            found: torch.Tensor = encoder(*[flat[place] for place in self.taken])[0]
            return found
        shape = [self.whole.value(size, sizes) for size in self.states.shape]
        device = flat[0].device
        return torch.zeros((), dtype=self.states.dtype, device=device).expand(shape)


class PrefixCall(EncoderCall):
    """How a call becomes one of the graph that takes what was computed of the first call's inputs.

    A call that leaves these out has no rows of it.
    """

    def tensors(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], encoder: Encode
    ) -> list[torch.Tensor]:
        """A call of the whole model as the graph's flat inputs; the encoder runs where it is read.

        Raises:
            DomainError: the call is outside the domain.
        """
        named = {**self.whole.signature.bind_partial(*args).arguments, **kwargs}
        flat = self.whole.flatten(args, kwargs)
        if any(named.get(name) is not None for name in self.dropped):
            sizes = self.whole.sizes_of(flat)
            if any(sizes[name] for name in self.whole.interface.past_symbols):
                raise DomainError(
                    Refusal(
                        f"A later call is given {' and '.join(self.dropped)}.",
                        why="The graph was compared with later calls that leave it out.",
                        remedy="Give it on the first call alone.",
                    )
                )
            states: torch.Tensor = encoder(*[flat[place] for place in self.taken])[0]
        else:
            sizes = {**self.whole.sizes_of(flat), **self.whole.absent}
            shape = [self.whole.value(size, sizes) for size in self.states.shape]
            states = torch.zeros(shape, dtype=self.states.dtype, device=flat[0].device)
        return [states if place is None else flat[place] for place in self.kept]
