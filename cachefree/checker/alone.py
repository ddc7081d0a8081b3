"""What the laws of elements that are computed alone say, a second time; nothing is the prover's."""

from __future__ import annotations

from typing import Any

from cachefree.checker.shapes import Rights, operators
from cachefree.checker.terms import Term, Terms

__all__ = ["ALONE"]

EACH_ALONE = operators(
    "abs add.Scalar add.Tensor clamp clamp_min div.Scalar div.Tensor exp gelu log mul.Scalar "
    "mul.Tensor neg pow.Tensor_Scalar reciprocal relu rsqrt rsub.Scalar sigmoid silu softplus sqrt "
    "square sub.Scalar sub.Tensor tanh"
)
CONVOLUTIONS = operators("conv1d conv2d conv3d")
_CHANNELS = 1


def slice_of_activation(m: Terms, t: Term) -> Rights:
    whole, dim, start, end, _ = t.args
    if whole.op not in EACH_ALONE or any(isinstance(arg, (Term, tuple)) for arg in whole.args[1:]):
        return
    x = whole.args[0]
    below = x.args[0] if x.op == "slice" and x.args[1] == dim else x
    if below.op in CONVOLUTIONS and dim > _CHANNELS and x.shape == whole.shape:
        part = m.slice(x, dim, start, end)
        yield m.make(whole.op, (part, *whole.args[1:]), t.shape, t.dtype, t.device)


def ones_of_elements(m: Terms, t: Term) -> Rights:
    if any(x.dtype.is_complex for x in (t, *t.args) if isinstance(x, Term)):
        return
    kept = [size != 1 for size in t.shape]

    def bare(arg: Any) -> Any:
        if not isinstance(arg, Term):
            return arg
        lead = len(t.shape) - len(arg.shape)
        shape = [size for size, is_kept in zip(arg.shape, kept[lead:], strict=True) if is_kept]
        while shape and shape[0] == 1:
            del shape[0]
        return m.reshape(arg, shape) if tuple(shape) != arg.shape else arg

    args = [bare(arg) for arg in t.args]
    became_numbers = any(
        isinstance(new, Term) and new.shape == () != old.shape
        for new, old in zip(args, t.args, strict=True)
    )
    if became_numbers and len({arg.dtype for arg in args if isinstance(arg, Term)}) > 1:
        return
    shape = [size for size in t.shape if size != 1]
    yield m.reshape(m.make(t.op, args, shape, t.dtype, t.device), t.shape)


ALONE = {
    "slice-of-activation": ({"slice"}, slice_of_activation),
    "ones-of-elements": (EACH_ALONE | {"cast"}, ones_of_elements),
}
