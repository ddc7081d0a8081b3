"""What the stages say to one another, and what happens where one of them says nothing more."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cachefree.errors import CacheFreeError, Refusal, StageError

__all__ = ["Failure", "Links"]


@dataclass(frozen=True)
class Failure:
    """What stands for the values that a stage could not compute.

    Attributes:
        stage: Which, from 0.
        reason: The error there.
    """

    stage: int
    reason: str


class Links:
    """The connections between the processes of one pipeline, with a timeout of their own.

    Tensors go through the memory of the host, by gloo, wherever the stages compute.

    Args:
        group: The processes; None for all of them.
        timeout: In seconds: how long to wait for another stage.

    Attributes:
        number: Which stage this process is, from 0.
        count: How many stages there are.
        broken: Why no call can be made any more; None while calls can.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise CacheFreeError(
                Refusal(
                    "No process group was made.",
                    why="A pipeline is the same script in several processes that know one another.",
                    remedy="Start it with torchrun --nproc-per-node 2 script.py, and call "
                    "torch.distributed.init_process_group() in it first.",
                )
            )
        if not timeout > 0:
            raise CacheFreeError(
                Refusal(
                    f"timeout={timeout} is no time to wait.", remedy="Give seconds, such as 60."
                )
            )
        self.ranks: list[int] = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.count = len(self.ranks)
        self.number = self.ranks.index(dist.get_rank())
        self.timeout = timeout
        self.broken: str | None = None
        self.group = dist.new_group(
            self.ranks, timeout=datetime.timedelta(seconds=timeout), backend="gloo"
        )

    def all_told(self, said: Any) -> list[Any]:
        """What every stage says, in order.

        Raises:
            StageError: a stage is gone or says nothing.
        """
        found: list[Any] = [None] * self.count
        with self._guarded("all stages"):
            dist.all_gather_object(found, said, group=self.group)
        return found

    def send(self, stage: int, values: Sequence[Any] | Failure) -> None:
        """Sends values to another stage; tensors and what can be pickled.

        Raises:
            StageError: that stage is gone or does not take them.
        """
        to = self.ranks[stage]
        with self._guarded(self._named(stage)):
            dist.send_object_list([_headers(values)], dst=to, group=self.group)
            for tensor in _tensors(values):
                dist.send(_as_bytes(tensor.detach().cpu().contiguous()), dst=to, group=self.group)

    def receive(self, stage: int, device: torch.device) -> list[Any] | Failure:
        """Takes what another stage sends.

        Raises:
            StageError: that stage is gone or sends nothing.
        """
        at = self.ranks[stage]
        with self._guarded(self._named(stage)):
            said: list[Any] = [None]
            dist.recv_object_list(said, src=at, group=self.group)
            if isinstance(said[0], Failure):
                return said[0]
            return _filled(
                said[0], device, lambda tensor: dist.recv(tensor, src=at, group=self.group)
            )

    def share(self, stage: int, values: Sequence[torch.Tensor], device: torch.device) -> list[Any]:
        """Gives every stage what one of them has; ``values`` of the others are not looked at.

        Raises:
            StageError: a stage is gone or does not take part.
        """
        at = self.ranks[stage]
        is_own = stage == self.number
        with self._guarded(self._named(stage)):
            said: list[Any] = [_headers(values) if is_own else None]
            dist.broadcast_object_list(said, src=at, group=self.group)
            if not is_own:
                take = lambda tensor: dist.broadcast(tensor, src=at, group=self.group)  # noqa: E731
                return _filled(said[0], device, take)
            for tensor in _tensors(values):
                dist.broadcast(
                    _as_bytes(tensor.detach().cpu().contiguous()), src=at, group=self.group
                )
        return list(values)

    def _named(self, stage: int) -> str:
        return f"stage {stage + 1} of {self.count} (rank {self.ranks[stage]})"

    @contextmanager
    def _guarded(self, other: str) -> Iterator[None]:
        """Makes an error of a connection one that says which stage it was, here and ever after."""
        if self.broken is not None:
            raise StageError(self._refusal(self.broken))
        try:
            yield
        except RuntimeError as error:  # gloo's own errors are nothing more special
            first = str(error).strip().split("\n")[0]
            self.broken = f"{self._named(self.number)} heard no more of {other}: {first}"
            raise StageError(self._refusal(self.broken)) from error
        except BaseException:  # an interrupt in the middle of a message
            self.broken = f"{self._named(self.number)} was interrupted while it spoke to {other}"
            raise

    def _refusal(self, why: str) -> Refusal:
        return Refusal(
            f"A stage of the pipeline is gone, or did not answer within {self.timeout:g} seconds.",
            why=why,
            remedy="Start all processes again; the caches of the call are lost. Where a stage only "
            "needs longer, give pipeline(..., timeout=) more seconds.",
        )


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, Failure):
        return []
    return [value for value in values if isinstance(value, torch.Tensor) and value.numel()]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: gloo does not know every dtype."""
    return tensor.reshape(-1).view(torch.uint8)


def _headers(values: Any) -> Any:
    if isinstance(values, Failure):
        return values
    return [
        (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else [value]
        for value in values
    ]


def _filled(
    headers: Sequence[Any], device: torch.device, take: Callable[[torch.Tensor], Any]
) -> list[Any]:
    values: list[Any] = []
    for header in headers:
        if isinstance(header, list):
            values.append(header[0])
            continue
        shape, dtype = header
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            take(_as_bytes(tensor))
        values.append(tensor.to(device))
    return values
