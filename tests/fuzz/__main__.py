"""Runs random programs, or mutants of the test models, and prints each that fails.

``python -m tests.fuzz programs 1000`` and ``python -m tests.fuzz mutants 1000``.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from .oracle import FAILURES, Outcome

__all__ = ["main"]

Found = tuple[int, Outcome, str, str]


def _program(seed: int) -> Found:
    from .oracle import judge_source
    from .programs import program

    one = program(seed)
    told = ", ".join((*one.tags, *map(str, one.faults)))
    return seed, judge_source(one.source), told, one.source


def _mutant(seed: int) -> Found:
    from .mutants import judge_mutant, mutant

    one = mutant(seed)
    return seed, judge_mutant(one), str(one), one.source


_KINDS: dict[str, Callable[[int], Found]] = {"programs": _program, "mutants": _mutant}


def _ready() -> None:
    import torch

    torch.set_num_threads(1)


def _outcomes(kind: str, seeds: range, processes: int) -> Iterator[Found]:
    if processes == 1:
        _ready()
        yield from map(_KINDS[kind], seeds)
        return
    context = multiprocessing.get_context("spawn")
    # torch keeps what it compiled and cached: a fresh process now and then
    with context.Pool(processes, _ready, maxtasksperchild=200) as pool:
        yield from pool.imap_unordered(_KINDS[kind], seeds)


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kind", choices=tuple(_KINDS))
    parser.add_argument("count", type=int, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for the source of each failure")
    parser.add_argument("--log", type=Path, help="a file with a line for each")
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    counts: collections.Counter[str] = collections.Counter()
    compared = 0
    seeds = range(given.seed, given.seed + given.count)
    with tqdm(total=given.count, unit=given.kind[:-1], file=sys.stderr) as bar:
        for seed, outcome, told, source in _outcomes(given.kind, seeds, given.processes):
            counts[outcome.kind] += 1
            compared += outcome.compared
            bar.set_postfix(counts)
            bar.update()
            if given.log:
                first = outcome.text.partition("\n")[0]
                with given.log.open("a") as log:
                    log.write(f"{seed} {outcome.kind} {outcome.compared} {told} | {first}\n")
            if outcome.is_failure:
                _show(seed, outcome, told, source, given.keep)
    failures = sum(counts[kind] for kind in FAILURES)
    print(
        f"{given.count} {given.kind} from seed {given.seed}: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        + f"; {compared} calls compared, {time.monotonic() - started:.0f} s"
    )
    return bool(failures)


def _show(seed: int, outcome: Outcome, told: str, source: str, keep: Path | None) -> None:
    tqdm.write(f"{'=' * 80}\nseed {seed}: {outcome.kind}: {told}\n{outcome.text}\n{'-' * 80}")
    tqdm.write(source)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{outcome.kind}_{seed}.py").write_text(source)
        (keep / f"{outcome.kind}_{seed}.txt").write_text(f"{told}\n{outcome.text}\n")


if __name__ == "__main__":
    sys.exit(main())
