"""Random programs: a few of them here, all that once failed, and many more behind ``slow``."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from .fuzz.mutants import judge_mutant, mutant
from .fuzz.oracle import judge_file, judge_source
from .fuzz.programs import program

CORPUS = tuple(sorted((Path(__file__).parent / "corpus").glob("*.py")))
FEW_CALLS = (
    (1, (1,) * 12),
    (2, (2, 1, 9)),
    (2, (9, 3)),
    (2, (8, 2)),
    (3, (3, 4)),
    (5, (2, 1)),
    (4, (1, 1, 5)),
)
# Chosen for variety: layers, containers, faults on sizes, on paths and on state.
SEEDS = (2, 5, 10, 13, 14, 18, 20, 22)


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.stem)
def test_what_once_failed(file: Path) -> None:
    outcome = judge_file(file, FEW_CALLS)
    assert outcome.kind in ("refused", "equal"), outcome.text


@pytest.mark.parametrize("seed", SEEDS)
def test_random_program(seed: int) -> None:
    one = program(seed)
    outcome = judge_source(one.source, FEW_CALLS)
    assert outcome.kind in ("refused", "equal"), f"{outcome.text}\n{one.source}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_more_random_programs(seed: int) -> None:
    one = program(seed)
    assert not judge_source(one.source).is_failure, one.source


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_mutants(seed: int) -> None:
    outcome = judge_mutant(mutant(seed))
    assert not outcome.is_failure, outcome.text


def test_programs_are_python_and_equal_by_seed() -> None:
    for seed in range(300):
        one = program(seed)
        ast.parse(one.source)
        assert one == program(seed)
    assert len({program(seed).source for seed in range(300)}) == 300


def test_the_oracle_tells_a_wrong_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewritten module that forgets its past is found, and so is an error that is no refusal."""
    import cachefree

    source = program(10).source
    right = cachefree.rewrite

    def forgetful(*args: object, **kwargs: object) -> object:
        rewritten = right(*args, **kwargs)
        flatten = rewritten.flatten_call
        rewritten.__dict__["flatten_call"] = lambda *a, **k: [
            torch.zeros_like(t) if t.is_floating_point() else t for t in flatten(*a, **k)
        ]
        return rewritten

    monkeypatch.setattr(cachefree, "rewrite", forgetful)
    assert judge_source(source, FEW_CALLS).kind == "wrong"

    def broken(*args: object, **kwargs: object) -> object:
        raise KeyError("broken")

    monkeypatch.setattr(cachefree, "rewrite", broken)
    assert judge_source(source, FEW_CALLS).kind == "crash"
