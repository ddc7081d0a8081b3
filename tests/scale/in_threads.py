"""The stages of a pipeline in threads of one process, with queues for connections."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from cachefree.scale.loading import load
from cachefree.scale.parts import parted
from cachefree.scale.pipeline import PipelinedDecoder

WAIT = 60


class QueuedLinks:
    """What `cachefree.scale.links.Links` is, between threads."""

    def __init__(self, number: int, count: int, between: dict[Any, Any]) -> None:
        self.number, self.count, self.between = number, count, between

    def send(self, stage: int, values: Any) -> None:
        self.between[self.number, stage].put(values)

    def receive(self, stage: int, device: torch.device) -> Any:
        return self.between[stage, self.number].get(timeout=WAIT)

    def all_told(self, said: Any) -> list[Any]:
        for stage in range(self.count):
            self.between["all", self.number, stage].put(said)
        return [self.between["all", s, self.number].get(timeout=WAIT) for s in range(self.count)]

    def share(self, stage: int, values: Any, device: torch.device) -> Any:
        return self.all_told(values)[stage]


def decoders(rewritten: Any, stages: Any, weights: Any = None) -> list[PipelinedDecoder]:
    """One for each stage."""
    count = stages if isinstance(stages, int) else len(stages) + 1
    pairs = [(a, b) for a in range(count) for b in range(count)]
    between: dict[Any, Any] = {pair: queue.Queue() for pair in pairs}
    between |= {("all", *pair): queue.Queue() for pair in pairs}
    device = torch.device("cpu")
    made = []
    for number in range(count):
        part = parted(rewritten.graph_module, rewritten.interface, stages, number, device)
        slots = [rewritten.interface.cache[slot] for slot in part.slots]
        neutral = load(part, rewritten, slots, weights, device)
        links: Any = QueuedLinks(number, count, between)
        made.append(PipelinedDecoder(part, links, rewritten, neutral, device))
    return made


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """What calls give that wait for one another."""
    with ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(call) for call in calls]
        return [one.result(timeout=WAIT) for one in running]
