"""A sweep over the architectures of transformers: which of them become one graph, and whether it is
equal to the model's own cache in eager mode and on ONNX Runtime.
"""
