"""Random decoder modules with cache branches, as Python source; equal seeds give equal programs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from .containers import Container, container
from .faults import Fault, fault, put_in
from .layers import WIDTH, Layer, layer
from .prelude import PRELUDE

__all__ = ["VOCABULARY", "Program", "program"]

VOCABULARY = 11
_LONGEST = 48


@dataclasses.dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
      seed: What it was drawn from.
      source: A Python file with ``build()``, and ``arguments(outputs, ids, states, past)`` for the
        keyword arguments of a call; ``outputs`` is None on the first.
      tags: What is in it.
      faults: What is wrong with it.
    """

    seed: int
    source: str
    tags: tuple[str, ...]
    faults: tuple[Fault, ...]


def program(seed: int) -> Program:
    """The program of a seed."""
    draw = random.Random(seed)
    count = draw.choice((1, 1, 1, 2))
    has_positions = draw.random() < 0.5
    layers = [layer(draw, i, has_positions=has_positions) for i in range(count)]
    if count == 2 and draw.random() < 0.4:
        layers = [layers[0], _renamed(layers[0])]
    held = container(draw, layers)
    rows = _past_rows(layers)
    position = _position(draw, rows) if has_positions else ()
    result = draw.choice(("tuple", "tuple", "dict", "object"))
    has_start = bool(rows) and not held.is_kept and draw.random() < 0.06
    lines = _model(draw, layers, held, rows, position, result, has_start=has_start)
    number = draw.choices((0, 1, 2), (3, 8, 2))[0]
    faults = [fault(draw, has_past_length=bool(rows)) for _ in range(number)]
    lines = put_in(draw, lines, faults)
    lines += _calls(layers, held, result, has_start=has_start)
    tags = (*(one.kind for one in layers), held.kind, result, *(["start"] if has_start else []))
    return Program(seed, PRELUDE + "\n".join(lines) + "\n", tags, tuple(faults))


def _renamed(one: Layer) -> Layer:
    """The same layer with parameters of its own."""
    init = tuple(line.replace("0 = ", "1 = ", 1) for line in one.init)
    names = [line.partition(" = ")[0].removeprefix("self.") for line in one.init]
    body = one.body
    for name in names:
        body = tuple(line.replace(f"self.{name}", f"self.{name[:-1]}1") for line in body)
    return dataclasses.replace(one, init=init, body=body)


def _past_rows(layers: Sequence[Layer]) -> str:
    """The length of the past, over ``entries``; empty where no state grows."""
    for i, one in enumerate(layers):
        if one.grows is not None:
            return f"entries[{i}][0].shape[{one.grows}]"
    return ""


def _position(draw: random.Random, rows: str) -> tuple[str, ...]:
    if not rows:
        return ()
    ways = (
        "x = x + self.pos({{torch.arange(P, P + n)|torch.arange(n)}})",
        "x = x + self.pos(torch.arange(n) + {{P|P + 1}})",
        "x = x + self.table[P : P + n]",
        "x = x + self.table[P:][:n]",
        "x = x + self.table[torch.arange(P + n)[-n:]]",
        "x = x + sinusoids(P, n)",
        "x = x + sinusoids(0, P + n)[{{P|P - 1}}:]",
        "x = x + self.pos(torch.arange(P, P + n).unsqueeze(0).expand(B, n))",
        "x = x + self.pos((ids >= 0).long().cumsum(1) - 1 + P)",
    )
    return (draw.choice(ways), "#@ x")


_SINUSOIDS = (
    "def sinusoids(start, count):",
    "    angle = torch.arange(start, start + count)[:, None] * 0.7 ** torch.arange(4)",
    "    return torch.cat([angle.sin(), angle.cos()], dim=1)",
    "",
    "",
)


def _model(
    draw: random.Random,
    layers: Sequence[Layer],
    held: Container,
    rows: str,
    position: tuple[str, ...],
    result: str,
    *,
    has_start: bool,
) -> list[str]:
    lines = [*_SINUSOIDS, *held.classes]
    if result == "object":
        lines += ["@dataclasses.dataclass", "class Result:", "    logits: torch.Tensor"]
        lines += ["    past: object = None", "", ""]
    lines += ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += [f"        {line}" for line in _parameters(layers, held)]
    arguments = "ids"
    if any(one.uses_states for one in layers):
        arguments += ", states=None"
    if not held.is_kept:
        arguments += ", past=None"
    if has_start:
        arguments += ", start=0"
    if draw.random() < 0.2:
        arguments += ", use_cache=True"
    lines += ["", f"    def forward(self, {arguments}):"]
    lines += [f"        {line}" for line in held.unpack]
    length = "start" if has_start else f"{rows} if entries[0] is not None else 0" if rows else "0"
    body = ["B, n = ids.shape", f"P = {length}", "x = self.emb(ids)", "#@ x", *position]
    given = "states" if any(one.uses_states for one in layers) else "None"
    for i in range(len(layers)):
        target = "x, present" if i == 0 else f"x, present{i}"
        body.append(f"{target} = self.layer{i}(x, entries[{i}], P, B, n, {given})")
    body.append(f"presents = [{', '.join(['present', 'present1'][: len(layers)])}]")
    last = draw.choice(("x", "x", "x", "x[:, -1:]"))
    body += ["#@ x", f"logits = self.head(self.norm({last}))", "#@ logits"]
    if held.is_kept:
        body += [f"self.kept = {held.pack}", "return logits"]
    else:
        body.append(_returned(held, result))
    lines += [f"        {line}" for line in body]
    for i, one in enumerate(layers):
        lines += ["", f"    def layer{i}(self, x, past, P, B, n, states):"]
        lines += [f"        {line}" for line in one.body]
        lines.append(f"        return x, ({', '.join(one.state)},)")
    return lines


def _parameters(layers: Sequence[Layer], held: Container) -> list[str]:
    lines = [
        f"self.emb = nn.Embedding({VOCABULARY}, {WIDTH})",
        f"self.pos = nn.Embedding({_LONGEST}, {WIDTH})",
        f"self.table = nn.Parameter(torch.randn({_LONGEST}, {WIDTH}))",
        "self.odd = nn.Parameter(torch.tensor(0.5))",
        f"self.register_buffer('tril', torch.ones({_LONGEST}, {_LONGEST}).tril() > 0)",
        "self.register_buffer('buf', torch.zeros(1))",
        f"self.norm = nn.LayerNorm({WIDTH})",
        f"self.head = nn.Linear({WIDTH}, {VOCABULARY})",
    ]
    if held.is_kept:
        lines.append("self.kept = None")
    return lines + [line for one in layers for line in one.init]


def _returned(held: Container, result: str) -> str:
    if result == "dict":
        return f"return {{'logits': logits, 'past': {held.pack}}}"
    if result == "object":
        return f"return Result(logits, {held.pack})"
    return f"return logits, {held.pack}"


_TAKEN = {"tuple": "outputs[1]", "dict": "outputs['past']", "object": "outputs.past"}


def _calls(layers: Sequence[Layer], held: Container, result: str, *, has_start: bool) -> list[str]:
    lines = ["", "", "def build():", "    torch.manual_seed(0)", "    model = Model().eval()"]
    lines += ["    with torch.no_grad():", "        for parameter in model.parameters():"]
    lines += ["            if parameter.dim() >= 2:", "                parameter.normal_(0.0, 0.6)"]
    lines += ["    return model", "", "", "def arguments(outputs, ids, states, past):"]
    lines.append("    given = {'ids': ids}")
    if any(one.uses_states for one in layers):
        lines.append("    given['states'] = states")
    if not held.is_kept:
        if held.first:
            lines += ["    if outputs is None:", f"        given['past'] = {held.first}"]
        lines += ["    if outputs is not None:", f"        given['past'] = {_TAKEN[result]}"]
    if has_start:
        lines.append("    given['start'] = past")
    return [*lines, "    return given"]
