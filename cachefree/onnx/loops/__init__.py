"""A whole generation in one file: the one decoder as the body of a single ``Loop``."""

from cachefree.onnx.loops.choices import Beam, Greedy

__all__ = ["Beam", "Greedy"]
