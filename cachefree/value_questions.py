"""Questions that a model's code asks about the values of an input: ``if torch.all(mask == 1)``.

A path that is chosen by values is no path of sizes, and is refused, with one exception: where one
of the two answers tells what every element of the input is, say 1. The path of the other answer is
taken as the general one. The path of this answer is captured too, and has to be the one graph with
ones put in for the input: then the graph is right whatever the answer is. Where the answer tells
only that no element is 0, ones are put in for its zeros. Of a tensor that the code
itself has filled with one number the answer is known; of one that it computes of sizes alone it is
a question about sizes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from cachefree.errors import SourceLine
from cachefree.sizes import user_line

__all__ = ["ANSWERS", "NONZERO", "Answering", "Answers", "OfSizes", "ValueQuestion"]

NONZERO = "nonzero"
"""In place of a number: any but 0, which is all that ``mask.all()`` of integers tells."""
_OTHERS: dict[int | str, int | str] = {0: NONZERO, NONZERO: 0}
_LARGEST = 127  # held by every integer dtype, and told from its neighbours in every other one
_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_T = torch.Tensor
_EQUAL = {_T.__eq__, _T.eq, torch.eq}
_UNEQUAL = {_T.__ne__, _T.ne, torch.ne}
_NOT = {_T.__invert__, _T.logical_not, torch.logical_not, _T.bitwise_not, torch.bitwise_not}
_ALL, _ANY = {_T.all, torch.all}, {_T.any, torch.any}
_COMPARED, _JOINED = _EQUAL | _UNEQUAL, _ALL | _ANY
_LOGICAL_NOT = {_T.logical_not, torch.logical_not}
_TRUTH = {_T.__bool__, _T.__int__, _T.item}
_MADE: dict[Any, int | None] = {
    **dict.fromkeys((torch.ones, torch.ones_like, _T.new_ones), 1),
    **dict.fromkeys((torch.zeros, torch.zeros_like, _T.new_zeros), 0),
    **dict.fromkeys((torch.full, torch.full_like, _T.new_full)),
}
_SAME_ELEMENTS = {
    *(_T.view, _T.reshape, torch.reshape, _T.unsqueeze, torch.unsqueeze, _T.contiguous),
    *(_T.permute, torch.permute, _T.transpose, torch.transpose, _T.flatten, torch.flatten),
}
# what hands out a tensor's memory in a way that counts no writes: ``x.data``
_UNCOUNTED = {
    *(_T.data.__get__, _T.data.__set__),  # type: ignore[attr-defined]
    *(_T.untyped_storage, _T.storage, _T._typed_storage),
}
_HEARD = {_T.bool, *_TRUTH, *_MADE, *_COMPARED, *_JOINED, *_NOT, *_SAME_ELEMENTS, *_UNCOUNTED}
_HEARD |= {_T.__getitem__, _T.__contains__}
OfSizes = Callable[[torch.Tensor], Any]
"""The number or truth that a tensor of one element is; None where it is not known."""


@dataclass(frozen=True)
class ValueQuestion:
    """Whether every element of an input is one number.

    Attributes:
        path: The input.
        number: The number, or `NONZERO`.
        where: The user's line.
    """

    path: str
    number: int | str
    where: SourceLine | None


class Answers:
    """How such questions are answered while a model runs.

    Attributes:
        uniform: Inputs of which the answer is yes.
        asked: What was asked, by the input's path.
        of_sizes: What a value is that is made of sizes alone; None where this is not looked into.
        is_left: Whether a question was left unanswered, though one about sizes may be in it.
    """

    def __init__(self) -> None:
        self.uniform: frozenset[str] = frozenset()
        self.asked: dict[str, ValueQuestion] = {}
        self.of_sizes: OfSizes | None = None
        self.is_left = False

    @contextlib.contextmanager
    def following(self, of_sizes: OfSizes | None) -> Iterator[None]:
        """Answers what is asked of values that are made of sizes alone, or leaves it.

        Args:
            of_sizes: What such a value is while a path is captured.
        """
        before, self.of_sizes, self.is_left = self.of_sizes, of_sizes, False
        try:
            with self.recorded():
                yield
        finally:
            self.of_sizes = before

    @contextlib.contextmanager
    def of(self, uniform: frozenset[str]) -> Iterator[None]:
        """Answers yes for some inputs, no for all others."""
        before, self.uniform = self.uniform, uniform
        try:
            yield
        finally:
            self.uniform = before

    @contextlib.contextmanager
    def recorded(self) -> Iterator[dict[str, ValueQuestion]]:
        """Gives what is asked in the meantime."""
        before, self.asked = self.asked, {}
        try:
            yield self.asked
        finally:
            self.asked = before


ANSWERS = Answers()
"""One for the process: one model is rewritten at a time."""


@dataclass(frozen=True)
class _Claim:
    """What each element of a tensor of truths says of an input's: that it is a number, or not."""

    tensor: torch.Tensor
    version: int
    path: str
    number: int | str
    is_equal: bool
    is_bool: bool

    def whole(self, *, is_equal: bool) -> _Claim | None:
        """The same claim in other words: what is not 0 is true, or nonzero."""
        if self.is_equal == is_equal:
            return self
        others: dict[int | str, int | str] = {0: 1, 1: 0} if self.is_bool else _OTHERS
        if self.number not in others:
            return None
        return replace(self, number=others[self.number], is_equal=is_equal)


class Answering(TorchFunctionMode):
    """Answers questions about inputs, and leaves all others as they are.

    Args:
        inputs: Path and tensor of each input of a call.
        of_sizes: What a value is that is made of sizes alone.
    """

    def __init__(
        self, inputs: Iterable[tuple[str, torch.Tensor]], of_sizes: OfSizes | None = None
    ) -> None:
        super().__init__()
        self._of_sizes = of_sizes
        self._inputs = {
            id(tensor): (tensor, _version(tensor), path)
            for path, tensor in inputs
            if tensor.dtype in _DTYPES and _tells_writes(tensor)
        }
        self._made: dict[str, int] = {}
        self._claims: dict[int, _Claim] = {}
        self._truths: dict[int, tuple[_Claim, bool]] = {}
        self._memories: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in _HEARD:
            return func(*args, **(kwargs or {}))
        if func is _T.__contains__ and isinstance(args[1], (int, float)):
            return self._is_in(*args)
        if func in _TRUTH and len(args) == 1:
            truth = self._truths.get(id(args[0]))
            answer = None if truth is None else self._answer(*truth, args[0])
            if answer is None:
                answer = self._of_numbers(args[0])
            if answer is not None:
                return bool(answer) if func is _T.__bool__ else answer
        if func in _UNCOUNTED and isinstance(args[0], torch.Tensor):
            self._memories.add(_memory(args[0]))
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor):
            return result
        if func in _MADE:
            self._note_made(func, args, kwargs or {}, result)
        elif args and isinstance(args[0], torch.Tensor):
            self._note(func, args, kwargs, result)
        return result

    def _is_in(self, tensor: torch.Tensor, number: float) -> Any:
        """``number in tensor``, which torch asks in Python where it is not heard."""
        equal = self.__torch_function__(_T.eq, (), (tensor, number))
        is_any = self.__torch_function__(_T.any, (), (equal,))
        return self.__torch_function__(_T.__bool__, (), (is_any,))

    def _of_numbers(self, tensor: torch.Tensor) -> Any:
        """The answer about what is made of sizes alone; None where it is not known."""
        if self._of_sizes is None:
            ANSWERS.is_left = True
            return None
        is_one = all(type(size) is int and size == 1 for size in tensor.shape)
        is_one = is_one and tensor.dtype in _DTYPES
        return self._of_sizes(tensor) if is_one and not self._memories else None

    def _note_made(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor
    ) -> None:
        """A tensor of one number that the code makes: what is asked about it is known."""
        number = _MADE[func]
        if number is None:
            place = 2 if func is _T.new_full else 1
            number = kwargs.get("fill_value", args[place] if len(args) > place else None)
        if isinstance(number, int) and 0 <= number <= 1 and _tells_writes(result):
            path = f"made {id(result)}"
            self._inputs[id(result)] = (result, _version(result), path)
            self._made[path] = int(number)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: torch.Tensor) -> None:
        source = args[0]
        known = self._inputs.get(id(source))
        if (known is None and id(source) not in self._claims) or not _tells_writes(result):
            return
        if known is not None and _is_view_of_all(func, args, kwargs):
            if result is not source and result.dtype == source.dtype:
                self._inputs[id(result)] = (result, known[1], known[2])
            return
        if kwargs:
            return
        if func in _COMPARED and known is not None and len(args) == 2:
            number = args[1]
            most = 1 if source.dtype == torch.bool else _LARGEST
            if type(number) in (int, float, bool) and 0 <= number <= most and number % 1 == 0:
                self._claim(result, known[2], int(number), source, is_equal=func in _EQUAL)
        elif func is _T.bool and known is not None and len(args) == 1:
            self._claim(result, known[2], NONZERO, source, is_equal=True)
        elif func in _NOT:
            claim = self._claim_of(source, as_truth=func in _LOGICAL_NOT)
            if claim is not None:
                self._claim(result, claim.path, claim.number, claim, is_equal=not claim.is_equal)
        elif func in _JOINED and len(args) == 1:
            claim = self._claim_of(source, as_truth=True)
            said = claim and claim.whole(is_equal=func in _ALL)
            if said is not None:
                self._truths[id(result)] = said, func in _ALL
                self._claims[id(result)] = _Claim(  # keeps the tensor, and tells if it is written
                    result, _version(result), said.path, said.number, said.is_equal, said.is_bool
                )

    def _claim(
        self, result: torch.Tensor, path: str, number: int | str, of: Any, *, is_equal: bool
    ) -> None:
        is_bool = of.is_bool if isinstance(of, _Claim) else of.dtype == torch.bool
        self._claims[id(result)] = _Claim(result, _version(result), path, number, is_equal, is_bool)

    def _claim_of(self, tensor: torch.Tensor, *, as_truth: bool) -> _Claim | None:
        """What a tensor of truths says; an input says that it is true, or nonzero."""
        known = self._inputs.get(id(tensor))
        if known is not None and tensor.dtype == torch.bool:
            return _Claim(tensor, known[1], known[2], 1, True, True)
        if known is not None and as_truth:
            return _Claim(tensor, known[1], known[2], NONZERO, True, False)
        claim = self._claims.get(id(tensor))
        if claim is None or id(tensor) in self._truths or _version(tensor) != claim.version:
            return None
        return None if self._is_handed_out(tensor) else claim

    def _is_handed_out(self, *tensors: torch.Tensor) -> bool:
        """Whether the memory of one can have been written to without its tensor being told."""
        return bool(self._memories) and any(_memory(each) in self._memories for each in tensors)

    def _answer(self, claim: _Claim, is_all: bool, truth: torch.Tensor) -> bool | None:
        """The answer, where nothing was written in between; None where it is not known."""
        inputs = [known for known in self._inputs.values() if known[2] == claim.path]
        if any(_version(tensor) != version for tensor, version, _ in inputs):
            return None
        if self._is_handed_out(truth, *(tensor for tensor, _, _ in inputs)):
            return None
        if _version(truth) != self._claims[id(truth)].version:
            return None
        if claim.path in self._made:
            is_so = self._made[claim.path] == claim.number
            is_so |= claim.number == NONZERO and self._made[claim.path] != 0
            return is_all if is_so else None
        question = ValueQuestion(claim.path, claim.number, user_line(sys._getframe(2)))
        earlier = ANSWERS.asked.setdefault(claim.path, question)
        if earlier.number != claim.number:
            return None
        is_uniform = claim.path in ANSWERS.uniform
        return is_uniform if is_all else not is_uniform


def _is_view_of_all(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether a function gives every element of its operand, and no other ones."""
    if func in _SAME_ELEMENTS:
        return True
    if func is not _T.__getitem__ or kwargs:
        return False
    places = args[1] if isinstance(args[1], tuple) else (args[1],)
    return all(
        place is None or place is ... or (type(place) is slice and place == slice(None))
        for place in places
    )


def _tells_writes(tensor: torch.Tensor) -> bool:
    """Whether a tensor counts what is written to it; one that was made for inference does not."""
    with torch._C.DisableTorchFunction():
        return not tensor.is_inference()


def _memory(tensor: torch.Tensor) -> int:
    """What tells a tensor's memory from that of others, while the tensor lives."""
    with torch._C.DisableTorchFunction():
        return int(tensor.untyped_storage()._cdata)


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor's memory was written to."""
    with torch._C.DisableTorchFunction():
        return tensor._version
