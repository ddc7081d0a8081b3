"""Operators that compute each element of their result from one element of each operand."""

from __future__ import annotations

import torch

__all__ = ["EACH_ALONE"]

aten = torch.ops.aten
EACH_ALONE = (
    aten.abs.default,
    aten.add.Scalar,
    aten.add.Tensor,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.div.Scalar,
    aten.div.Tensor,
    aten.exp.default,
    aten.gelu.default,
    aten.log.default,
    aten.mul.Scalar,
    aten.mul.Tensor,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.reciprocal.default,
    aten.relu.default,
    aten.rsqrt.default,
    aten.rsub.Scalar,
    aten.sigmoid.default,
    aten.silu.default,
    aten.softplus.default,
    aten.sqrt.default,
    aten.square.default,
    aten.sub.Scalar,
    aten.sub.Tensor,
    aten.tanh.default,
)
