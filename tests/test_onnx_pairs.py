"""Complex numbers as pairs of reals: each operator in eager mode and on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cachefree

from .small import small

pytest.importorskip("onnxruntime")

Turn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Turned(nn.Module):
    """Rows that are turned by a table of complex angles, sliced by the length of the past."""

    turn: Turn

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        angles = torch.outer(torch.arange(64.0), 1 / 10 ** (torch.arange(4) / 4))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))

    def forward(self, ids: Any, past: Any = None) -> Any:
        start = 0 if past is None else past.shape[1]
        x = torch.view_as_complex(self.emb(ids).unflatten(-1, (4, 2)))
        turned = type(self).turn(x, self.freqs_cis[start : start + ids.shape[1]])
        k = torch.view_as_real(turned).flatten(2) if turned.is_complex() else turned.flatten(2)
        if past is not None:
            k = torch.cat([past, k], 1)
        return k.cumsum(1)[:, -ids.shape[1] :], k


TURNS: dict[str, Turn] = {
    "product": lambda x, f: x * f,
    "conjugate": lambda x, f: x * f.conj(),
    "parts": lambda x, f: (x * f).real + 2 * x.imag,
    "wave": lambda x, f: x * torch.exp(1j * f.real),
    "exponential": lambda x, f: torch.exp(x * 0.1) - f,
    "polar": lambda x, f: x * torch.polar(f.real, f.imag),
    "made": lambda x, f: torch.complex(x.real, f.imag.expand_as(x.real)) * f,
    "real factor": lambda x, f: x * f.real / 3.0 + 2.0,
    "sums": lambda x, f: (x + f) - (f.real - x) + (1 + 2j),
    "axes": lambda x, f: (x.unsqueeze(-2).transpose(-1, -3) * f.mT[None, :, None]).permute(
        0, 3, 2, -3
    ),
    "cut and joined": lambda x, f: torch.cat([x[..., 2:] * f[:, :2], x[..., :2]], -1),
    "stacked": lambda x, f: torch.stack([x, x * f], -1)[..., 1] * f.select(-1, -1)[:, None],
    "sizes": lambda x, f: (x.reshape(-1, 4) * 1j).view(x.shape[0], -1, 4) * f.expand(x.shape),
    "chosen": lambda x, f: torch.where(x.real > 0, x, x * f),
    "matrices": lambda x, f: x @ (f.mT @ f),
    "doubled": lambda x, f: (x.to(torch.complex128) * f).to(torch.complex64),
    "looked up": lambda x, f: x * f[torch.arange(f.shape[0])],
    "moved": lambda x, f: (x.to("cpu", copy=True) * f.to(x.device)).to(f).type_as(f),
    "flat": lambda x, f: x.unflatten(-1, (2, 2)).flatten(2).repeat(1, 1, 2)[..., 2:6] * f,
    "sizes of numbers": lambda x, f: (x * f).abs() + 0.5,
    "sums along": lambda x, f: x * f + (x * f).sum(-1, keepdim=True) - x.mean(-1, keepdim=True),
    "flipped": lambda x, f: -x.flip(-1) * f,
}


def turned_by(turn: Turn) -> nn.Module:
    return small(type("Turned", (Turned,), {"turn": staticmethod(turn)}))


QUICK = ("product",)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TURNS],
)
def test_an_operator_is_what_it_is_in_eager_mode(name: str, tmp_path: Path) -> None:
    model = turned_by(TURNS[name])
    rewritten = cachefree.rewrite(model, (torch.tensor([[3, 1, 4], [9, 2, 6]]),))
    decoder = cachefree.load_onnx(cachefree.to_onnx(rewritten, tmp_path / "m.onnx"), like=rewritten)
    generator = torch.Generator().manual_seed(1)
    for batch, chunks in ((2, (3, 1, 4)), (1, (1, 1))):
        own = past = None
        for chunk in chunks:
            ids = torch.randint(20, (batch, chunk), generator=generator)
            expected, own = model(ids, own)
            given, past = decoder(ids, past)
            torch.testing.assert_close(given, expected, rtol=1.3e-6, atol=1e-5)
            torch.testing.assert_close(past, own, rtol=1.3e-6, atol=1e-5)


def test_what_no_rule_writes_is_refused(tmp_path: Path) -> None:
    model = turned_by(lambda x, f: torch.tanh(x) * f)
    rewritten = cachefree.rewrite(model, (torch.tensor([[3, 1, 4], [9, 2, 6]]),))
    with pytest.raises(cachefree.CacheFreeError, match=r"tanh\.default on complex numbers cannot"):
        cachefree.to_onnx(rewritten, tmp_path / "m.onnx")


class ComplexCache(nn.Module):
    """A cache of complex rows."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)

    def forward(self, ids: Any, past: Any = None) -> Any:
        x = torch.view_as_complex(self.emb(ids).unflatten(-1, (4, 2)))
        if past is not None:
            x = torch.cat([past, x], 1)
        return x.real.cumsum(1)[:, -ids.shape[1] :], x


def test_a_complex_cache_is_refused(tmp_path: Path) -> None:
    rewritten = cachefree.rewrite(small(ComplexCache), (torch.tensor([[3, 1, 4], [9, 2, 6]]),))
    with pytest.raises(cachefree.CacheFreeError, match="'past' holds complex numbers"):
        cachefree.to_onnx(rewritten, tmp_path / "m.onnx")
