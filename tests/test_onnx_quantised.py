"""Weights in eight and four bits, by ONNX Runtime's own tools, on the file as it was written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from onnx import numpy_helper

import cachefree
from cachefree.onnx import OnnxDecoder, load_onnx, to_onnx

from .test_onnx import build, inputs, unproved

PAST, NEW = 5, 3


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(unproved(build()), tmp_path_factory.mktemp("plain") / "model.onnx")


def weights_in_bits(source: Path, target: Path, bits: int) -> None:
    quantizing = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    quantizer = quantizing.MatMulNBitsQuantizer(onnx.load(source), bits=bits, block_size=16)
    quantizer.process()
    quantizer.model.save_model_to_file(os.fspath(target), use_external_data_format=True)


def dense(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its weights as they are after rounding, and plain products."""
    from onnxruntime import InferenceSession

    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        width = next(part.i for part in node.attribute if part.name == "K")
        one = onnx.helper.make_model(
            onnx.helper.make_graph(
                [onnx.helper.make_node(node.op_type, ["x", *node.input[1:]], ["y"],
                                       domain=node.domain)],
                "one",
                [onnx.helper.make_tensor_value_info("x", 1, [width, width])],
                [onnx.helper.make_tensor_value_info("y", 1, None)],
                [found[name] for name in node.input[1:] if name],
            ),
            opset_imports=model.opset_import, ir_version=model.ir_version,
        )  # fmt: skip
        for part, name in zip(node.attribute, [part.name for part in node.attribute], strict=True):
            if name != "accuracy_level":  # in which a product is computed, not what the weight is
                one.graph.node[0].attribute.append(part)
        session = InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"])
        rounded = session.run(None, {"x": numpy.eye(width, dtype=numpy.float32)})[0]
        name = f"{node.name}_rounded"
        model.graph.initializer.append(numpy_helper.from_array(rounded, name))
        bias = [part for part in node.input[5:] if part]
        assert not bias
        node.op_type, node.domain = "MatMul", ""
        del node.attribute[:]
        node.input[:] = [node.input[0], name]
    return model


def calls(decoder: OnnxDecoder, *lengths: int) -> list[Any]:
    """The results of a first call and of later ones, each with what the last one left."""
    names = ("input_ids", "attention_mask", "position_ids")
    given, cache, past = [], {}, 0
    whole = inputs(2, 0, PAST + NEW)
    for new in lengths:
        _, mask, positions = inputs(2, past, new)
        call = (whole[0][:, past : past + new], mask, positions)
        outputs = decoder(**dict(zip(names, call, strict=True)), **cache)
        cache, past = decoder.next_cache(outputs), past + new
        given.append(outputs)
    return given


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_in_few_bits(path: Path, tmp_path: Path, bits: int) -> None:
    target = tmp_path / f"int{bits}.onnx"
    weights_in_bits(path, target, bits)
    model = onnx.load(target)
    assert "MatMulNBits" in {node.op_type for node in model.graph.node}
    assert not {"If", "Loop", "Scan"} & {node.op_type for node in model.graph.node}
    decoder = load_onnx(target)
    whole, (_, later) = calls(decoder, PAST + NEW)[0], calls(decoder, PAST, NEW)
    torch.testing.assert_close(later["logits"], whole["logits"][:, PAST:])
    torch.testing.assert_close(later["present.0.key"], whole["present.0.key"])
    onnx.save(dense(model), tmp_path / "dense.onnx")
    expected = calls(load_onnx(tmp_path / "dense.onnx"), PAST, NEW)
    torch.testing.assert_close(later["logits"], expected[1]["logits"])
    plain = calls(load_onnx(path), PAST, NEW)[1]["logits"]
    assert not torch.equal(later["logits"], plain), "nothing was rounded"


def test_products_in_eight_bits(path: Path, tmp_path: Path) -> None:
    """Activations are rounded too, a call at a time, so calls agree as far as that goes."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    target = tmp_path / "dynamic.onnx"
    # left to itself, the tool takes ONNX's Attention for ONNX Runtime's older one of that name
    quantization.quantize_dynamic(
        path, target, weight_type=quantization.QuantType.QInt8, op_types_to_quantize=["MatMul"]
    )
    graph = onnx.load(target).graph
    assert {"MatMulInteger", "DynamicQuantizeMatMul"} & {node.op_type for node in graph.node}
    decoder = load_onnx(target)
    assert decoder.verdict == load_onnx(path).verdict
    for one, other in zip(
        calls(decoder, PAST, NEW), calls(load_onnx(path), PAST, NEW), strict=True
    ):
        spread = float(other["logits"].std())
        assert float((one["logits"] - other["logits"]).abs().mean()) < spread / 10
    prompt, mask, positions = inputs(1, 0, 4)
    tokens = decoder.generate(prompt, 6, attention_mask=mask, position_ids=positions)
    assert tokens.shape == (1, 10)


def test_a_shared_buffer_keeps_its_kernel(tmp_path: Path) -> None:
    source = to_onnx(unproved(build()), tmp_path / "shared.onnx", kv="shared")
    weights_in_bits(source, tmp_path / "int8.onnx", 8)
    decoder = load_onnx(tmp_path / "int8.onnx")
    assert decoder.kv.kind == "shared"
    assert not decoder.kv.reasons
    whole, (_, later) = calls(decoder, PAST + NEW)[0], calls(decoder, PAST, NEW)
    torch.testing.assert_close(later["logits"], whole["logits"][:, PAST:])
    assert isinstance(decoder, cachefree.onnx.OnnxDecoder)
