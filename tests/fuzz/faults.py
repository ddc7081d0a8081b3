"""Faults: what is wrong on one path, at one size, on one call, as source text."""

from __future__ import annotations

import dataclasses
import random
import re

__all__ = ["Fault", "condition", "fault", "put_in"]

_MARK = re.compile(r"\{\{((?:[^{}|]|\{[^{}]*\})*)\|((?:[^{}|]|\{[^{}]*\})*)\}\}")
_PLACE = re.compile(r"^( *)#@ (\w+)$")


@dataclasses.dataclass(frozen=True)
class Fault:
    """A condition, and what a disturbed tensor is where it holds.

    Attributes:
      condition: An expression; ``True`` where the fault is everywhere.
      effect: An expression over ``V``, the tensor.
      kind: ``"place"`` or ``"expression"``: where it is put.
    """

    condition: str
    effect: str
    kind: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.effect} if {self.condition}"


# `S` is an expression of a size, `T` a number that the example sizes do not reach.
_ON_SIZES = (
    "S > T",
    "S >= T",
    "S == T",
    "S != T",
    "not S < T",
    "S == 1",
    "S <= 1",
    "S == 2",
    "S > T and n == 1",
    "S > T or S == 2",
    "T < S < T + 4",
    "S % 4 == 3",
    "S // T",
    "bool(S // T)",
    "S & 8",
    "S >> 3",
    "S is ONE",
    "S is T",
    "str(S) == 'T'",
    "f'{S}' == 'T'",
    "'%d' % S == 'T'",
    "repr(S) == '1'",
    "format(S, 'd') == 'T'",
    "len(str(S)) > 1",
    "hash(S) == T",
    "S in {T, T + 2}",
    "S in (T, 1)",
    "S in [1, T]",
    "S in range(T, 40)",
    "S in range(0, 40, 7)",
    "S not in range(T)",
    "{T: True}.get(S, False)",
    "{1: True}.get(S)",
    "len({S, T}) == 1",
    "divmod(S, T)[0]",
    "divmod(S, 5)[1] == 4",
    "S.bit_length() > 3",
    "sorted((S, T))[0] == T",
    "sorted([T, S]) == [T, S]",
    "max(S, T) != T",
    "min(S, T) == T",
    "max(S - T, 0)",
    "max([S, T]) > T",
    "abs(S - T) < 1",
    "float(S) > T + 0.5",
    "S / T > 1",
    "S * S > T * T",
    "S ** 2 >= T * T",
    "int(S / T) == 1",
    "int(S > T)",
    "round(S / T) == 1",
    "math.floor(S / T)",
    "math.ceil(S / T) > 1",
    "math.log2(S + 1) > 3",
    "math.sqrt(S) > 3",
    "math.gcd(S, 6) == 3",
    "math.isclose(S, T)",
    "bisect.bisect((T, 30), S)",
    "len(range(S)) > T",
    "len([0] * S) > T",
    "('a' * S) == 'aaaa'",
    "len(list(range(S))) == T",
    "any(size > T for size in x.shape[:2])",
    "all(size != T for size in x.shape[:2])",
    "sum(x.shape[:2]) > T + 2",
    "x.shape[:2] == (1, 1)",
    "tuple(x.shape)[:2] == (2, T)",
    "x.shape[1] == T",
    "x.size(0) == 1",
    "x.size(1) == 1",
    "len(x) == 1",
    "len(x) > 3",
    "x.numel() > T * 8 * 2",
    "x.numel() == 8",
    "x.nelement() == 16",
    "x[0].numel() == 8",
    "x.shape.numel() == 8",
    "x.stride(0) == 8",
    "x.is_contiguous()",
    "x.squeeze(1).dim() == 2",
    "x.squeeze().dim() < 3",
    "x.squeeze(0).dim() == 2",
    "x[:, T:].shape[1]",
    "x[:, T:].numel() > 0",
    "x[:, 1:].shape[1] == 0",
    "torch.equal(torch.arange(S), torch.arange(T))",
    "torch.Size([S]) == torch.Size([T])",
    "raised(lambda: TABLE[S])",
    "raised(lambda: [0] * (1 // S))",
    "raised(lambda: hash(S))",
    "raised(lambda: operator.index(S) and None)",
    "TABLE[min(S, 12)]",
    "TABLE[-1 if S > 12 else 0]",
    "TABLE[S % 13]",
    "isinstance(S, int) and S > T",
    "type(S) is int and S == T",
    "type(S).__name__ == 'int' and S > T",
    "(S or T) == T",
    "(S and T) == 0",
    "S == True",
    "matches(S)",
    "remembered(S, T)",
    "next((size for size in (S,) if size > T), None)",
    "operator.gt(S, T)",
    "operator.eq(S, 1)",
    "S.__gt__(T)",
    "int.__eq__(S, T)",
    "S.__class__ is int and S == 1",
    "Decimal(S) > T",
    "Fraction(S, T) > 1",
    "slice(S).indices(T)[1] == T",
    "any(True for _ in range(S - T))",
    "[step for step in range(T)][S:] == []",
    "random.Random(S).random() > 0.5",
    "(lambda size: size > T)(S)",
    "x.new_zeros(S).sum().shape == () and S > T",
    "np.arange(S).size == T",
    "S != S // 1 or S == T",
    "S - T == 0",
    "not S - 1",
    "S ^ 1 == 0",
    "-S < -T",
    "~S < -T",
    "pow(S, 2) == 1",
    "S.real > T",
    "complex(S).real > T",
    "list(map(int, [S])) == [1]",
    "set(x.shape[:2]) == {1}",
    "x.shape[0] == x.shape[1]",
    "B == n",
    "P == n",
    "n > P > 0",
    "P % n == 0",
    "n in (P, 1)",
    "P > 0",
    "P == 0",
    "P",
    "not P",
)
_ON_STATE = (
    "counted(self)",
    "counted(Model)",
    "next(COUNTER) > 5",
    "KEPT.append(n) or len(KEPT) > 6",
    "KEPT.append(x) or len(KEPT) % 2",
    "remembers(n)",
    "defaulted()",
    "time.time() % 2 > 1",
    "random.random() > 0.5",
    "np.random.rand() > 0.5",
    "x.max() > 1.5",
    "x.max().item() > 1.5",
    "bool((x > 2).any())",
    "float(x.sum()) > 0",
    "x.flatten().tolist()[0] > 0",
    "torch.rand(()) > 0.5",
    "torch.rand(()).item() > 0.5",
    "os.environ.get('CACHEFREE_FUZZ') == '1'",
    "torch.is_grad_enabled()",
    "self.training",
    "x.requires_grad",
    "id(x) % 32 == 0",
    "x.data_ptr() % 128 == 0",
    "torch.get_default_dtype() == torch.float64",
    "hasattr(x, 'fake_mode')",
    "type(x) is torch.Tensor",
    "isinstance(x, torch._subclasses.FakeTensor)",
    "x.is_meta",
    "torch.compiler.is_exporting()",
    "torch.overrides._get_current_function_mode() is not None",
    "TENSOR.add_(1).item() > 4",
    "self.buf.add_(1).sum() > 3",
    "x.add_(0.5) is None",
    "past is not None and past[0].mul_(1.5) is None",
    "x._version > 0",
    "sys.getrefcount(x) > 5",
    "len(inspect.stack()) > 40",
)
_ON_PATHS = (
    "past is None",
    "past is not None",
    "past is None and n > T",
    "past is not None and n > T",
)
_EFFECTS = (
    "V * 1.5",
    "V + 0.25",
    "-V",
    "V.flip(-1)",
    "V.roll(1, -1)",
    "V.roll(1, 1)",
    "V.to(torch.bfloat16).float()",
    "torch.zeros_like(V)",
    "V.relu()",
    "V + self.odd",
    "V * (V.shape[1] + 1)",
    "V * n",
    "V * B",
    "V / (P + 1)",
    "V + torch.arange(V.shape[1]).float().view(-1, *([1] * (V.dim() - 2)))",
    "V - V.mean(1, keepdim=True)",
    "V - V.mean(0, keepdim=True)",
    "V / V.abs().max()",
    "F.layer_norm(V, V.shape[-1:], eps=0.1)",
    "F.dropout(V, 0.5, training=False)",
    "V + V.sum() * 0.1",
    "V.sort(1)[0]",
    "V.cumsum(1)",
    "V.clamp(max=0.5)",
    "V.contiguous() * 2",
    "V.clone().mul_(2)",
    "torch.where(torch.isnan(V), V, V * 3)",
    "V * 1.00001",
)


def condition(draw: random.Random, *, has_past_length: bool) -> str:
    """A random condition: on sizes, on state, on the path, or none."""
    kind = draw.choices(("sizes", "state", "path", "always"), (12, 3, 3, 1))[0]
    if kind == "always":
        return "True"
    text = draw.choice({"sizes": _ON_SIZES, "state": _ON_STATE, "path": _ON_PATHS}[kind])
    sizes = ["n", "n", "B"] + (["P", "P", "(P + n)"] if has_past_length else [])
    size = draw.choice(sizes)
    number = draw.randint(3, 6) if size == "B" else draw.randint(4, 13)
    return re.sub(r"\bT\b", str(number), re.sub(r"\bS\b", size, text))


def fault(draw: random.Random, *, has_past_length: bool) -> Fault:
    """A random fault."""
    kind = draw.choices(("place", "expression"), (3, 1))[0]
    return Fault(condition(draw, has_past_length=has_past_length), draw.choice(_EFFECTS), kind)


def put_in(draw: random.Random, lines: list[str], faults: list[Fault]) -> list[str]:
    """The source with the faults in it, each at a random mark of its kind, and no mark left."""
    places = [row for row, line in enumerate(lines) if _PLACE.match(line)]
    marks = [row for row, line in enumerate(lines) if _MARK.search(line)]
    chosen: dict[int, Fault] = {}
    for one in faults:
        rows = places if one.kind == "place" or not marks else marks
        chosen[draw.choice(rows or places)] = one
    found: list[str] = []
    for row, line in enumerate(lines):
        place = _PLACE.match(line)
        if place is None:
            found.append(_filled(line, chosen.get(row)))
        elif row in chosen:
            found += _disturbed(draw, place[1], place[2], chosen[row])
    return found


def _filled(line: str, one: Fault | None) -> str:
    if one is not None:
        line = _MARK.sub(lambda m: f"({m[2]} if {one.condition} else {m[1]})", line, count=1)
    return _MARK.sub(lambda m: m[1], line)


def _disturbed(draw: random.Random, indent: str, name: str, one: Fault) -> list[str]:
    effect = re.sub(r"\bV\b", name, one.effect)
    style = draw.choice(("if", "ternary", "lambda", "table"))
    if style == "if":
        return [f"{indent}if {one.condition}:", f"{indent}    {name} = {effect}"]
    if style == "ternary":
        return [f"{indent}{name} = {effect} if {one.condition} else {name}"]
    if style == "lambda":
        chosen = f"(lambda {name}: {effect}) if {one.condition} else (lambda {name}: {name})"
        return [f"{indent}{name} = ({chosen})({name})"]
    return [f"{indent}{name} = ({name}, {effect})[bool({one.condition})]"]
