"""Torch tensors through an ONNX Runtime session, without copies: on the CPU and on CUDA alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cachefree.errors import CacheFreeError, Refusal

__all__ = ["TensorSession", "open_session"]

_ELEMENT_TYPES = {  # onnx.TensorProto.DataType
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int16: 5, torch.int32: 6,
    torch.int64: 7, torch.bool: 9, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


class TensorSession:
    """An ``onnxruntime.InferenceSession`` that reads and writes torch tensors in place.

    Attributes:
        session: The session.
        device: Where its tensors are.
    """

    def __init__(self, session: Any, device: torch.device) -> None:
        self.session = session
        self.device = device
        self._nowhere = torch.zeros(
            16, dtype=torch.uint8, device=device
        )  # an address for tensors without elements

    @property
    def providers(self) -> list[str]:
        """The execution providers in use."""
        return list(self.session.get_providers())

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, tuple[tuple[int, ...], torch.dtype] | torch.Tensor],
    ) -> list[torch.Tensor]:
        """Runs the graph once.

        Args:
            inputs: Name → tensor.
            outputs: Name → shape and dtype of the result, or the tensor that it is written to.

        Returns:
            The results in the order of ``outputs``.
        """
        return self.run_between(inputs, {}, outputs, ())[0]

    def run_between(
        self,
        inputs: Mapping[str, torch.Tensor],
        handed: Mapping[str, Any],
        outputs: Mapping[str, tuple[tuple[int, ...], torch.dtype] | torch.Tensor],
        wanted: Sequence[str],
    ) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Runs a graph that takes values of another session, and gives some to a later one.

        Args:
            inputs: Name → tensor.
            handed: Name → ``OrtValue`` that another session gave.
            outputs: As in `run`.
            wanted: The names of outputs that a later session takes.

        Returns:
            The results in the order of ``outputs``, and name → ``OrtValue`` of what was wanted.
        """
        binding = self.session.io_binding()
        held = [tensor.detach().to(self.device).contiguous() for tensor in inputs.values()]
        results = [
            due
            if isinstance(due, torch.Tensor)
            else torch.empty(due[0], dtype=due[1], device=self.device)
            for due in outputs.values()
        ]
        for name, tensor in zip(inputs, held, strict=True):
            binding.bind_input(name, *self._place(tensor))
        for name, value in handed.items():
            binding.bind_ortvalue_input(name, value)
        for name, tensor in zip(outputs, results, strict=True):
            binding.bind_output(name, *self._place(tensor))
        for name in wanted:
            binding.bind_output(name, self.device.type, self.device.index or 0)
        if self.device.type == "cuda":
            torch.cuda.current_stream(
                self.device
            ).synchronize()  # the session has a stream of its own
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
            raise CacheFreeError(
                Refusal(
                    "ONNX Runtime could not run the graph.",
                    why=f"{str(error).splitlines()[0]} The inputs were {shapes}.",
                    remedy="Look for a value that an operator does not take, such as an id beyond "
                    "its table. Where the model itself runs with these inputs "
                    "(cachefree.verify(model, rewritten)), open the file with another provider, or "
                    "write it with another opset= or kv=.",
                )
            ) from error
        given = binding.get_outputs()[len(outputs) :] if wanted else []
        return results, dict(zip(wanted, given, strict=True))

    def _place(self, tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
        address = tensor.data_ptr() if tensor.numel() else self._nowhere.data_ptr()
        return (
            self.device.type,
            self.device.index or 0,
            _ELEMENT_TYPES[tensor.dtype],
            list(tensor.shape),
            address,
        )


def open_session(
    path: Path, providers: Sequence[Any] | None, options: Any, uses_bfloat16: bool
) -> TensorSession:
    """Opens a session.

    Args:
        path: The ONNX file.
        providers: Names, or pairs of a name and its options; None chooses.
        options: An ``onnxruntime.SessionOptions``, or None.
        uses_bfloat16: Whether the graph computes in bfloat16.

    Raises:
        CacheFreeError: ONNX Runtime or a provider is missing, or it cannot run the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise CacheFreeError(
            Refusal(
                "ONNX Runtime is not installed.",
                remedy="pip install onnxruntime (or onnxruntime-gpu)",
            )
        ) from error
    chosen = _choose(providers, onnxruntime.get_available_providers())
    names = [provider if isinstance(provider, str) else provider[0] for provider in chosen]
    if uses_bfloat16 and names[0] == _CPU:
        raise CacheFreeError(
            Refusal(
                f"{path} computes in bfloat16, which ONNX Runtime cannot do on the CPU.",
                why="Its CPU provider has no bfloat16 MatMul.",
                remedy=(
                    "Export the model in float32 (model.float() before cachefree.rewrite), "
                    "or pass providers=['CUDAExecutionProvider']."
                ),
            )
        )
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=list(chosen))
    except Exception as error:
        raise CacheFreeError(
            Refusal(
                f"ONNX Runtime cannot open {path}.",
                why=str(error).split("\n")[0],
                remedy=(
                    f"{names[0]} has no kernel for this operator in this dtype: export the model in"
                    " float32, or choose another provider."
                    if "NOT_IMPLEMENTED" in str(error)
                    else ""
                ),
            )
        ) from error
    if names[0] not in session.get_providers():
        raise CacheFreeError(
            Refusal(
                f"ONNX Runtime could not start {names[0]}.",
                why="It fell back to " + ", ".join(session.get_providers()) + ".",
                remedy="Check the driver and the CUDA libraries, or choose another provider.",
            )
        )
    return TensorSession(session, _device(chosen[0]))


def _choose(providers: Sequence[Any] | None, available: Sequence[str]) -> list[Any]:
    if providers is None:
        return [_CUDA, _CPU] if _CUDA in available and torch.cuda.is_available() else [_CPU]
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    missing = [name for name in names if name not in available]
    if missing or not names:
        raise CacheFreeError(
            Refusal(
                (
                    f"This ONNX Runtime has no {', '.join(missing)}."
                    if missing
                    else "No execution provider was named."
                ),
                why=f"It has {', '.join(available)}.",
                remedy="Choose one of these, or install the ONNX Runtime that has it.",
            )
        )
    return list(providers)


def _device(provider: Any) -> torch.device:
    name, options = (provider, {}) if isinstance(provider, str) else provider
    if name == _CUDA:
        return torch.device("cuda", int(options.get("device_id", 0)))
    return torch.device("cpu")
