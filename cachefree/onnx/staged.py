"""The stages of one graph on ONNX Runtime, run one after the other as if they were one session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cachefree.errors import CacheFreeError, Refusal
from cachefree.onnx.runtime import TensorSession

__all__ = ["StagedSession"]


class StagedSession(TensorSession):
    """Several sessions; what one gives that a later one takes goes there without a copy.

    Attributes:
        session: The first stage's ``onnxruntime.InferenceSession``.
        sessions: All stages, in order.

    Raises:
        CacheFreeError: a stage takes what no earlier stage gives.
    """

    def __init__(self, stages: Sequence[TensorSession], inputs: Sequence[str]) -> None:
        super().__init__(stages[0].session, stages[0].device)
        self.stages = tuple(stages)
        self.sessions = tuple(stage.session for stage in stages)
        known = set(inputs)
        for number, session in enumerate(self.sessions, start=1):
            missing = sorted({value.name for value in session.get_inputs()} - known)
            if missing:
                raise CacheFreeError(
                    Refusal(
                        f"Stage {number} of {len(stages)} takes {', '.join(missing)}, which no "
                        "earlier stage gives.",
                        why="The files are stages of different exports.",
                        remedy="Export all of them again.",
                    )
                )
            known |= {value.name for value in session.get_outputs()}
        self.passed = [self._passed(number) for number in range(len(self.sessions))]

    def _passed(self, number: int) -> list[str]:
        """What a stage gives that a later one takes."""
        taken = {
            value.name for later in self.sessions[number + 1 :] for value in later.get_inputs()
        }
        given = [value.name for value in self.sessions[number].get_outputs()]
        return [name for name in given if name in taken]

    def run(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, Any]
    ) -> list[torch.Tensor]:
        """Runs every stage once; see `TensorSession.run`."""
        tensors, crossing = dict(inputs), dict[str, Any]()
        results: dict[str, torch.Tensor] = {}
        for stage, passed in zip(self.stages, self.passed, strict=True):
            names = [value.name for value in stage.session.get_inputs()]
            due = {
                value.name: outputs[value.name]
                for value in stage.session.get_outputs()
                if value.name in outputs
            }
            given = {name: tensors[name] for name in names if name in tensors}
            handed = {name: crossing[name] for name in names if name not in tensors}
            wanted = [name for name in passed if name not in due]
            found, more = stage.run_between(given, handed, due, wanted)
            results |= zip(due, found, strict=True)
            tensors |= {name: results[name] for name in passed if name in due}
            crossing |= more
        return [results[name] for name in outputs]
