"""What is given in place of what a function takes: each is told in a sentence, with what to do."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cachefree
from cachefree import CacheFreeError, CaptureError, CertificateError, DomainError
from cachefree.explaining import foreseen

from .models import kept
from .models.case import seeded
from .small import IDS, Small, rewritten_small, small

EXAMPLE = (IDS[:2, :3],)


@pytest.fixture(scope="module")
def rewritten() -> Any:
    return rewritten_small(small())


@pytest.fixture(scope="module")
def file(rewritten: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cachefree.to_onnx(rewritten, tmp_path_factory.mktemp("written") / "model.onnx")


def told(call: Callable[[], Any], error: type[CacheFreeError], *says: str) -> None:
    with pytest.raises(error) as caught:
        call()
    for text in says:
        assert text in str(caught.value), str(caught.value)
    assert "does not know" not in str(caught.value)
    assert all(refusal.remedy for refusal in caught.value.refusals)


# ---------------------------------------------------------------- rewrite


def test_arguments_of_another_kind() -> None:
    for name, value, takes in (
        ("cache", 3, "the name of the argument that carries the cache"),
        ("cache", ("past", 3), "the name of the argument that carries the cache"),
        ("carry", 3, "a function (outputs, inputs)"),
        ("method", 3, "the name of a method, or two"),
    ):
        options: Any = {name: value}
        told(
            lambda options=options: cachefree.rewrite(small(), EXAMPLE, **options),
            CaptureError,
            f"{name}={value!r} is not what {name}= takes.",
            takes,
        )


def test_carry_that_raises_is_told_with_its_line() -> None:
    def carry(outputs: Any, inputs: Any) -> Any:
        return {"past": outputs["past"]}

    told(
        lambda: cachefree.rewrite(small(), EXAMPLE, carry=carry),
        CaptureError,
        "carry= raised an error.",
        'return {"past": outputs["past"]}',
        "TypeError: tuple indices must be integers",
        "carry takes (outputs, inputs)",
    )


def test_carry_with_other_arguments_is_told() -> None:
    told(
        lambda: cachefree.rewrite(small(), EXAMPLE, carry=lambda outputs: outputs),
        CaptureError,
        "carry= raised an error.",
        "test_wrong_arguments.py",
        "takes 1 positional argument but 2 were given",
    )


def test_carry_that_gives_nothing_is_told() -> None:
    told(
        lambda: cachefree.rewrite(small(), EXAMPLE, carry=lambda outputs, inputs: None),
        CaptureError,
        "carry= gave None, which is no inputs of a call.",
        "test_wrong_arguments.py",
    )


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor, past: Any = None) -> Any:
        return self.inner(ids, past)


def test_model_that_holds_a_rewritten_one(rewritten: Any) -> None:
    told(
        lambda: cachefree.rewrite(Outer(rewritten).eval(), EXAMPLE),
        CaptureError,
        "The module 'inner' is what cachefree.rewrite gave.",
        "Put the model that it was made of in its place",
    )


@torch.jit.script
def fraction(n: int) -> float:
    return (n * 0.1) % 0.3


class Fractions(nn.Module):
    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        k = x if past is None else torch.cat([past, x], dim=1)
        return x * fraction(k.shape[1]), k


def test_remainder_of_fractions() -> None:
    told(
        lambda: cachefree.rewrite(Fractions().eval(), (torch.zeros(2, 3, 4),)),
        CaptureError,
        "computes a number of sizes that torch has no rule for",
        "Compute it with whole numbers",
    )


class Keys(nn.Module):
    """Looks ids up, under a name that says nothing of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.keys = nn.Embedding(12, 6), nn.Linear(6, 6)

    def forward(self, given: Any, past: Any = None) -> Any:
        k = self.keys(self.table(given))
        if past is not None:
            k = torch.cat([past, k], dim=1)
        return k.cumsum(dim=1)[:, -given.shape[1] :], k


class WithExample(Keys):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = (IDS[:2, :4].int(),)


def test_inputs_of_the_models_own_example() -> None:
    one = cachefree.rewrite(small(WithExample))
    assert one.report.verdict is cachefree.Verdict.PROVED_EXACT
    assert [str(spec.dtype) for spec in one.interface.inputs][:1] == ["torch.int32"]


class Counting(Keys):
    def forward(self, given: Any, times: int, past: Any = None) -> Any:  # type: ignore[override]
        result, k = super().forward(given, past)
        return result * (1 + times), k


def test_inputs_probed_by_annotation() -> None:
    one = cachefree.rewrite(small(Counting))
    assert one.report.verdict is cachefree.Verdict.PROVED_EXACT
    assert not any("times" in spec.path for spec in one.interface.inputs)


# ---------------------------------------------------------------- files


def test_paths_that_are_none(rewritten: Any) -> None:
    told(
        lambda: cachefree.to_onnx(rewritten, 3),  # type: ignore[arg-type]
        CacheFreeError,
        "to_onnx takes the path of a file or a folder, not int.",
    )
    told(
        lambda: cachefree.load_onnx(None),  # type: ignore[arg-type]
        CacheFreeError,
        "load_onnx takes the path of a file or a folder, not NoneType.",
    )


def test_like_that_is_not_rewritten(file: Path) -> None:
    told(
        lambda: cachefree.load_onnx(file, like=small()),
        CacheFreeError,
        "load_onnx(like=…) takes what cachefree.rewrite gives, not Small.",
    )


def test_prompts(file: Path) -> None:
    decoder = cachefree.load_onnx(file)
    expected = decoder.generate(IDS[:2], 3)
    assert torch.equal(decoder.generate(IDS[:2].tolist(), 3), expected)
    assert torch.equal(decoder.generate(IDS[:2].numpy(), 3), expected)
    for prompt in ("hello", [[1, 2], [3]], [["a"]], [[1.5]], [[True]], None):
        kind = type(prompt).__name__
        told(
            lambda prompt=prompt: decoder.generate(prompt),
            DomainError,
            f"The prompt is {kind}, which holds no token ids.",
            "shape (batch, tokens)",
        )
    told(lambda: decoder.generate([1, 2]), DomainError, "The prompt has shape (2,)")


def test_failing_run_of_a_file_says_what_to_look_for(file: Path) -> None:
    told(
        lambda: cachefree.load_onnx(file)(torch.tensor([[99]])),
        CacheFreeError,
        "ONNX Runtime could not run the graph.",
        "The inputs were input_ids (1, 1)",
        "do:    Look for a value that an operator does not take",
    )


# ---------------------------------------------------------------- verify and certificates


def test_verify_takes_one_backend_by_its_name(rewritten: Any) -> None:
    found = cachefree.verify(small(), rewritten, backends="eager", max_examples=1, dtypes=())
    assert "eager" in str(found)
    told(
        lambda: cachefree.verify(small(), rewritten, backends="tpu"),
        CacheFreeError,
        "Unknown backends: tpu.",
    )


def test_verify_with_other_kinds(rewritten: Any) -> None:
    for number in (0, -1, "many"):
        told(
            lambda number=number: cachefree.verify(small(), rewritten, max_examples=number),
            CacheFreeError,
            f"max_examples={number!r} is no number of generations.",
        )
    told(
        lambda: cachefree.verify(3, rewritten),  # type: ignore[arg-type]
        CacheFreeError,
        "verify takes the model and what rewrite gave, not int.",
    )


def test_certificate_of_something_else(rewritten: Any) -> None:
    for given in ((small(),), (3,), (rewritten.certificate, small())):
        kind = type(given[-1]).__name__
        told(
            lambda given=given: cachefree.check_certificate(*given),
            CertificateError,
            f"check_certificate does not take {kind}.",
            "It takes what rewrite gave, its certificate, or the path of a saved one",
        )


def test_what_nobody_foresaw_is_told_and_what_the_user_raises_is_left(
    rewritten: Any, tmp_path: Path
) -> None:
    with (
        pytest.raises(CacheFreeError, match="The file could not be read, for a reason"),
        foreseen("The file could not be read"),
    ):
        re.compile("(")

    def stop(step: str) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        cachefree.to_onnx(rewritten, tmp_path / "m.onnx", progress=stop)


# ---------------------------------------------------------------- the module


def test_branch_tells_its_file_and_line(rewritten: Any) -> None:
    branches = rewritten.report.branches
    assert branches
    for branch in branches:
        assert (branch.file, branch.line) == (branch.where.file, branch.where.line)
        assert branch.file.endswith("small.py")


def test_size_of_a_batch(rewritten: Any, file: Path) -> None:
    for one in (rewritten, cachefree.load_onnx(file)):
        for size in (-1, "2", True):
            told(
                lambda one=one, size=size: one.empty_cache(size),
                DomainError,
                f"batch_size={size!r} is no size of a batch.",
            )
    assert rewritten.empty_cache(0)[0].shape == (0, 0, 6)


def test_call_on_another_device_than_the_parameters(rewritten: Any) -> None:
    told(
        lambda: rewritten(IDS.to("meta")),
        DomainError,
        "The call is on meta where the parameters are on cpu.",
        "x.to('cpu')",
    )
    with pytest.raises(DomainError, match="is on meta where"):
        copy.deepcopy(rewritten)(IDS.to("meta"))


def test_signature_is_the_models_own(rewritten: Any) -> None:
    due = inspect.signature(small().forward)
    compiled = torch.compile(rewritten, backend="eager")
    copies = (copy.deepcopy(rewritten), pickle.loads(pickle.dumps(rewritten)))
    for one in (rewritten, *copies, compiled):
        assert inspect.signature(one) == due
    assert compiled(IDS)[0].shape == (3, 5, 12)
    assert list(inspect.signature(cachefree.Rewritten).parameters)[:2] == [
        "graph_module",
        "interface",
    ]


class Named(Small):
    """Called by two methods of other names."""

    def prefill(self, ids: torch.Tensor) -> Any:
        return super().forward(ids)

    def step(self, ids: torch.Tensor, past: Any) -> Any:
        return super().forward(ids, past)


def test_signature_of_methods() -> None:
    model = small(Named)
    one = rewritten_small(model, method=("prefill", "step"))
    for each in (one, copy.deepcopy(one)):
        for name in ("prefill", "step"):
            assert inspect.signature(getattr(each, name)) == inspect.signature(getattr(model, name))


def test_signature_of_a_model_that_keeps_its_cache() -> None:
    keeping = seeded(kept.KeepingDecoder)()
    kept_one = cachefree.rewrite(keeping, (kept.IDS,))
    assert inspect.signature(kept_one) == inspect.signature(keeping.forward)
