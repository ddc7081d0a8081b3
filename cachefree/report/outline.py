"""The two paths and the one graph line by line of the user's code, equal layers folded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

__all__ = ["COLUMNS", "Block", "Outline", "Row", "blocks_of"]

COLUMNS = ("first call", "later calls", "the one graph")

Operators = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A line of the user's code with the operators that it runs.

    Attributes:
        module: The module that was running: ``blocks.0.attention``.
        file: The file.
        line: The line's number; 0 where no line is known.
        text: The line.
        operators: Of the first path, of the later path, of the one graph.
        reads_cache: Whether an operator of the line reads the cache, for each of the three.
    """

    module: str
    file: str
    line: int
    text: str
    operators: tuple[Operators, Operators, Operators]
    reads_cache: tuple[bool, bool, bool] = (False, False, False)

    @property
    def is_same(self) -> bool:
        """Whether both paths run the same operators here, and the one graph no other."""
        first, later, one = self.operators
        return first == later and not (Counter(one) - Counter(later)) and not any(self.reads_cache)


@dataclass(frozen=True)
class Block:
    """Rows that belong together: a layer, or what is outside of layers.

    Attributes:
        names: The modules that it stands for: ``("blocks.0", "blocks.1")``; empty outside.
        rows: The rows of one of them.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Its name, with how often it is there."""
        if len(self.names) < 2:
            return "".join(self.names)
        return f"{_range(self.names)}  × {len(self.names)}"


@dataclass(frozen=True)
class Outline:
    """The three graphs side by side.

    Attributes:
        rows: Every line, in the order in which it runs.
        blocks: The same with equal layers folded.
    """

    rows: tuple[Row, ...]
    blocks: tuple[Block, ...]

    def count(self, column: int) -> int:
        """The number of operators of one of the three graphs."""
        return sum(len(row.operators[column]) for row in self.rows)

    @property
    def differing(self) -> Iterator[tuple[Block, Row]]:
        """The lines where the two paths differ, one layer of each kind."""
        return (
            (block, row)
            for block in self.blocks
            for row in block.rows
            if row.operators[0] != row.operators[1]
        )


def layer_of(module: str) -> str:
    """The layer that a module is in: ``blocks.3`` for ``blocks.3.mlp.0``; empty outside."""
    parts = module.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return ""


def blocks_of(rows: Sequence[Row]) -> tuple[Block, ...]:
    """Rows parted by layers; layers whose lines run the same operators are one block."""
    parted: dict[str, list[Row]] = {}
    order: list[tuple[str, list[Row]]] = []
    for row in rows:
        layer = layer_of(row.module)
        if layer:
            if layer not in parted:
                parted[layer] = []
                order.append((layer, parted[layer]))
            parted[layer].append(row)
        elif order and not order[-1][0]:
            order[-1][1].append(row)
        else:
            order.append(("", [row]))
    blocks: list[Block] = []
    places: dict[tuple[object, ...], int] = {}
    for layer, own in order:
        joined = _joined(own)
        key = (
            layer.rpartition(".")[0] if layer else len(blocks),
            *((row.file, row.line, row.operators[:2]) for row in joined),
        )
        if layer and key in places:
            at = places[key]
            blocks[at] = replace(blocks[at], names=(*blocks[at].names, layer))
        else:
            places[key] = len(blocks)
            blocks.append(Block((layer,) if layer else (), joined))
    return tuple(blocks)


def _joined(rows: Sequence[Row]) -> tuple[Row, ...]:
    """One row a line: what submodules run belongs to the line of the user's that calls them."""
    joined: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row.file, row.line)
        before = joined.get(key)
        if before is None:
            joined[key] = row
            continue
        first, later, one = (
            mine + theirs for mine, theirs in zip(before.operators, row.operators, strict=True)
        )
        reads = [a or b for a, b in zip(before.reads_cache, row.reads_cache, strict=True)]
        joined[key] = replace(
            before, operators=(first, later, one), reads_cache=(reads[0], reads[1], reads[2])
        )
    return tuple(joined.values())


def _range(names: Sequence[str]) -> str:
    """``blocks.0 – blocks.11``, or the first of them where they do not follow one another."""
    stack = names[0].rpartition(".")[0]
    numbers = [int(name.rpartition(".")[2]) for name in names]
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{names[0]} – {names[-1]}"
    return f"{stack}.{', '.join(map(str, numbers[:3]))}, …"
