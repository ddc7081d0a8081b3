"""ONNX.

One file that serves the first call and every later one, and ONNX Runtime called like the model.
"""

from cachefree.onnx.loops.choices import Beam, Greedy
from cachefree.onnx.session import OnnxDecoder, load_onnx
from cachefree.onnx.weights import Weights
from cachefree.onnx.writing import to_onnx

__all__ = ["Beam", "Greedy", "OnnxDecoder", "Weights", "load_onnx", "to_onnx"]
