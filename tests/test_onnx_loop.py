"""A whole generation in one file: equal tokens, one decoder, the weights once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import cachefree
from cachefree.errors import CacheFreeError, DomainError
from cachefree.onnx import load_onnx, to_onnx

from .small import IDS as SMALL_IDS
from .small import Small, rewritten_small, small
from .test_onnx_generate import END, IDS, MASK, model, rewritten, theirs

__all__ = ["model", "rewritten"]

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_beams": 1}, id="greedy"),
        pytest.param({"num_beams": 3, "length_penalty": 2.0}, id="beam", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_the_model(
    model: Any,
    rewritten: cachefree.Rewritten,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    ends = {"eos_token_id": END, "pad_token_id": 0}
    loop = (
        cachefree.Greedy(**ends) if options["num_beams"] == 1 else cachefree.Beam(**ends, **options)
    )
    kv: Any = "concat" if options["num_beams"] > 1 else "attention"
    path = to_onnx(rewritten, tmp_path / "m.onnx", loop=loop, kv=kv)
    generator: Any = load_onnx(path)
    assert torch.equal(
        generator.generate(IDS, 9, attention_mask=MASK), theirs(model, do_sample=False, **options)
    )
    alone = model.generate(IDS[:1], max_new_tokens=6, pad_token_id=0, do_sample=False, **options)
    assert torch.equal(generator.generate(IDS[:1], 6), alone)
    assert torch.equal(generator.generate(IDS, 0), IDS)
    file = onnx.load(path)
    loops = [node for node in file.graph.node if node.op_type == "Loop"]
    assert len(loops) == 1
    assert not loops[0].attribute[0].g.initializer  # the weights stand outside, once
    sizes = [tensor.dims for tensor in file.graph.initializer]
    assert sizes.count([16, 48]) == 1  # queries, keys and values of the one layer
    assert sizes.count([20, 16]) == 1
    with pytest.raises(DomainError, match="with a token in each row at least"):
        generator.generate(IDS, 2, attention_mask=MASK[:, :2])
    with pytest.raises(DomainError, match=r"input_ids is torch.int32"):
        generator.generate(IDS.int(), 2)


def test_what_no_loop_can_do_is_refused(
    rewritten: cachefree.Rewritten,
    tmp_path: Path,
) -> None:
    with pytest.raises(CacheFreeError, match="takes no shared buffers"):
        to_onnx(rewritten, tmp_path / "m.onnx", loop=cachefree.Greedy(), kv="shared")
    with pytest.raises(CacheFreeError, match="A search with 1 beams is none"):
        cachefree.Beam(num_beams=1)


class Forgetful(Small):
    """Sees nothing of what it is given beyond eight tokens, and on prompts of one token."""

    def forward(self, ids: torch.Tensor, past: Any = None) -> Any:
        logits, cache = super().forward(ids, past)
        if past is None and ids.shape[1] == 1:
            logits = -logits
        if past is not None and past[0].shape[1] > 7:
            logits = -logits
        return logits, cache


@pytest.fixture(scope="module")
def forgetful() -> cachefree.Rewritten:
    return rewritten_small(small(Forgetful))


def steps(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    new, past = ids, None
    for _ in range(count):
        with torch.no_grad():
            logits, past = model(new) if past is None else model(new, past)
        new = logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], 1)
    return ids


def test_a_generation_ends_where_the_domain_does(
    forgetful: cachefree.Rewritten, tmp_path: Path
) -> None:
    prompt = SMALL_IDS[:, :4]
    due = steps(small(Forgetful), prompt, 9)
    loop = cachefree.Greedy(eos_token_id=[int(row) for row in due[:, 8]])
    generator: Any = load_onnx(to_onnx(forgetful, tmp_path / "m.onnx", loop=cachefree.Greedy()))
    assert torch.equal(generator.generate(prompt, 5), due[:, :9])  # the last call has a past of 7
    for outside in (prompt, prompt[:1]):
        with pytest.raises(DomainError, match="past = 8 is outside the domain"):
            generator.generate(outside, 6)
    with pytest.raises(DomainError, match="query = 1, past = 0 is outside the domain"):
        generator.generate(prompt[:, :1], 2)
    ending: Any = load_onnx(to_onnx(forgetful, tmp_path / "e.onnx", loop=loop))
    assert ending.generate(prompt, 50).shape[1] <= 9  # every row has ended before the limit
    with pytest.raises(DomainError, match="There is padding, and the model takes no mask"):
        generator.generate(prompt, 2, attention_mask=(prompt > 1).long())


@pytest.mark.slow
def test_a_search_ends_where_the_domain_does(
    forgetful: cachefree.Rewritten, tmp_path: Path
) -> None:
    prompt = SMALL_IDS[:1, :4]
    loop = cachefree.Beam(num_beams=2)
    generator: Any = load_onnx(to_onnx(forgetful, tmp_path / "b.onnx", loop=loop))
    assert generator.generate(prompt, 5).shape == (1, 9)
    with pytest.raises(DomainError, match="past = 8 is outside the domain"):
        generator.generate(prompt, 6)
