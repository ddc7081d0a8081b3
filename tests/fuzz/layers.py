"""Layers of random decoders, as source text: each with a state and a branch on its absence.

Two marks are left in the text for faults. ``{{a|b}}`` is an expression, ``a`` where nothing is
wrong; a line ``#@ name`` is a place where the tensor of that name may be disturbed. In scope are
``past`` (the layer's own state or None), ``P`` (rows of the past, where any state grows), ``n``
(new tokens) and ``B``.
"""

from __future__ import annotations

import dataclasses
import random

__all__ = ["WIDTH", "Layer", "layer"]

WIDTH = 8


@dataclasses.dataclass(frozen=True)
class Layer:
    """The source of a layer.

    Attributes:
      kind: Its name.
      init: Lines of ``__init__``.
      body: Lines of ``def layer(self, x, past, P, B, n, states)`` before its ``return``.
      state: The names of the tensors of the state, in order.
      grows: The axis on which the first of them grows; None where it does not.
      uses_states: Whether it reads the states of an encoder.
    """

    kind: str
    init: tuple[str, ...]
    body: tuple[str, ...]
    state: tuple[str, ...]
    grows: int | None = None
    uses_states: bool = False


def layer(draw: random.Random, index: int, *, has_positions: bool) -> Layer:
    """A random layer; `index` makes the names of its parameters."""
    kinds = [
        (_attention, 5),
        (_pool, 4),
        (_history, 2),
        (_convolution, 2),
        (_sums, 2),
        (_shift, 1),
        (_gru, 1),
        (_cross, 2),
        (_maximum, 1),
        (_average, 1),
    ]
    make = draw.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]
    return make(draw, index, has_positions)


def _attention(draw: random.Random, i: int, has_positions: bool) -> Layer:
    has_heads = draw.random() < 0.6
    rows = draw.choice((1, 2)) if has_heads else 1
    init = [f"self.qkv{i} = nn.Linear({WIDTH}, {3 * WIDTH}, bias={draw.random() < 0.5})"]
    init.append(f"self.out{i} = nn.Linear({WIDTH}, {WIDTH})")
    body = [f"q, k, v = self.qkv{i}(x).chunk(3, dim=-1)", "#@ q", "#@ k", "#@ v"]
    size = WIDTH
    if has_heads:
        size = WIDTH // 2
        split = f".view(B, n, 2, {size})" + (".transpose(1, 2)" if rows == 2 else "")
        body.append("q, k, v = (part" + split + " for part in (q, k, v))")
    if draw.random() < 0.4 or not has_positions:
        style = draw.choice(("half", "pairs"))
        body += [
            f"k = rotate_{style}(k, {{{{P|P + 1}}}}, {rows})",
            f"q = rotate_{style}(q, {{{{P|P + 2}}}}, {rows})",
        ]
    cut = draw.choice((None, None, None, 4, 6))
    body += _join(draw, rows, "k", "v")
    if cut is not None:
        where = ":, " * rows
        body += [f"k = k[{where}{{{{-{cut}|-{cut + 1}}}}}:]", f"v = v[{where}-{cut}:]"]
    body.append("state = (k, v)")
    if rows == 1 and has_heads:
        body.append("q, k, v = (part.transpose(1, 2) for part in (q, k, v))")
    body += _weights(draw, size, has_heads, is_cut=cut is not None)
    body.append("#@ y")
    if has_heads:
        body.append(f"y = y.transpose(1, 2).reshape(B, n, {WIDTH})")
    body.append(f"x = x + self.out{i}(y)")
    return Layer("attention", tuple(init), tuple(body), ("state[0]", "state[1]"), rows)


def _join(draw: random.Random, axis: int, *names: str) -> list[str]:
    """The branch itself, in one of the ways people write it."""
    style = draw.choice(("if", "if", "ternary", "early", "list", "empty"))
    lines = []
    for place, name in enumerate(names):
        joined = f"torch.cat({{{{[past[{place}], {name}]|[{name}, past[{place}]]}}}}, dim={axis})"
        if style == "ternary":
            lines.append(f"{name} = {name} if past is None else {joined}")
        elif style == "list":
            parts = f"([past[{place}]] if past is not None else []) + [{name}]"
            lines.append(f"{name} = torch.cat({parts}, dim={axis})")
        elif style == "early":
            lines += ["if past is None:", "    pass", "else:", f"    {name} = {joined}"]
        elif style == "empty":
            empty = f"{name}.narrow({axis}, 0, 0)"
            lines.append(f"old = {empty} if past is None else past[{place}]")
            lines.append(f"{name} = torch.cat([old, {name}], dim={axis})")
        else:
            lines += ["if past is not None:", f"    {name} = {joined}"]
    return lines


def _weights(draw: random.Random, size: int, has_heads: bool, *, is_cut: bool) -> list[str]:
    """``y`` of ``q``, ``k`` and ``v``, with a mask in one of many styles."""
    lines = ["m = k.shape[-2]"]
    styles = ["triu", "compare", "always", "several", "none", "window"]
    if not is_cut:
        styles += ["buffer", "causal"]
    style = draw.choice(styles)
    scale = f"{{{{{size**-0.5!r}|0.5}}}}"
    if style == "causal":
        flag = draw.choice(("{{past is None|False}}", "n > 1"))
        lines.append(f"y = F.scaled_dot_product_attention(q, k, v, is_causal={flag})")
        return lines
    mask = {
        "triu": "torch.ones(n, m, dtype=torch.bool).triu({{m - n|m - n - 1}} + 1)",
        "compare": "torch.arange(m)[None] > torch.arange(m - n, {{m|m}})[:, None]",
        "always": "torch.arange(m) > torch.arange(n)[:, None] + ({{m - n|m - n + 1}})",
        "several": "torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)",
        "buffer": "~self.tril[m - n : m, :m]",
        "window": "window_mask(n, m, {{5|4}})",
    }.get(style)
    if mask is not None and draw.random() < 0.25:
        lines.append(f"seen = ~({mask})")
        lines.append(f"y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale={scale})")
        return lines
    lines.append(f"scores = q @ k.transpose(-1, -2) * {scale}")
    if draw.random() < 0.25:
        distance = "(torch.arange(m - n, m)[:, None] - torch.arange(m)[None])"
        lines.append(f"scores = scores - {{{{0.3|0.4}}}} * {distance}.abs()")
    lines.append("#@ scores")
    low = draw.choice(("-torch.inf", "-1e9", "torch.finfo(scores.dtype).min"))
    if style == "several":
        lines += ["if n > 1:", f"    scores = scores.masked_fill({mask}, {low})"]
    elif mask is not None:
        lines.append(f"scores = scores.masked_fill({mask}, {low})")
    soft = draw.choice(
        ("softmax(-1)", "softmax(-1)", "softmax(dim=-1, dtype=torch.float64).float()")
    )
    lines.append(f"y = scores.{soft} @ v")
    return lines


def _pool(draw: random.Random, i: int, has_positions: bool) -> Layer:
    """All rows are averaged: the cheapest layer whose state grows."""
    init = (f"self.lin{i} = nn.Linear({WIDTH}, {WIDTH})",)
    rows = draw.choice(
        (("mean(1, keepdim=True)",), ("cumsum(1)[:, P:]",), ("amax(1, keepdim=True)",))
    )
    body = [f"rows = self.lin{i}(x)", "#@ rows", *_join(draw, 1, "rows")]
    body += [f"y = rows.{rows[0]}", "#@ y", "x = x + y * {{0.5|0.25}}"]
    return Layer("pool", init, tuple(body), ("rows",), 1)


def _history(draw: random.Random, i: int, has_positions: bool) -> Layer:
    """The hidden rows themselves are kept, and projected again on each call."""
    keep = draw.choice((None, None, 5))
    init = (
        f"self.q{i} = nn.Linear({WIDTH}, {WIDTH})",
        f"self.kv{i} = nn.Linear({WIDTH}, {2 * WIDTH})",
    )
    body = ["history = x", "#@ history", *_join(draw, 1, "history")]
    body += [f"k, v = self.kv{i}(history).chunk(2, dim=-1)", f"q = self.q{i}(x)"]
    body += _weights(draw, WIDTH, has_heads=False, is_cut=False)
    if keep is not None:
        cut = draw.choice((f"history[:, -{keep}:]", f"history[:, max(0, P + n - {keep}):]"))
        body.append(f"history = {{{{{cut}|history[:, -{keep + 1}:]}}}}")
    body += ["#@ y", "x = x + y"]
    return Layer("history", init, tuple(body), ("history",), 1)


def _convolution(draw: random.Random, i: int, has_positions: bool) -> Layer:
    taps = draw.choice((2, 3, 4))
    groups = draw.choice((1, WIDTH))
    init = (f"self.conv{i} = nn.Conv1d({WIDTH}, {WIDTH}, {taps}, groups={groups})",)
    first = draw.choice(
        (
            f"c = F.pad(c, ({taps - 1}, 0))",
            f"c = torch.cat([torch.zeros(B, {WIDTH}, {taps - 1}), c], dim=2)",
            f"c = F.pad(c, ({taps - 1}, 0), value={{{{0.0|0.5}}}})",
        )
    )
    body = (
        "c = x.transpose(1, 2)",
        "#@ c",
        "if past is None:",
        f"    {first}",
        "else:",
        "    c = torch.cat([past[0], c], dim=2)",
        f"state = c[:, :, {{{{-{taps - 1}|-{taps}}}}}:]",
        f"y = self.conv{i}(c).transpose(1, 2)",
        "#@ y",
        "x = x + y",
    )
    return Layer("convolution", init, body, ("state",))


def _sums(draw: random.Random, i: int, has_positions: bool) -> Layer:
    joined = draw.choice(("y + past[0]", "past[0] + y"))
    init = (f"self.lin{i} = nn.Linear({WIDTH}, {WIDTH})",)
    body = (
        f"y = self.lin{i}(x).cumsum({{{{1|0}}}})",
        "#@ y",
        "if past is not None:",
        f"    y = {joined}",
        "state = y[:, {{-1|-2}} :][:, :1]",
        "x = x + y * {{0.1|0.2}}",
    )
    return Layer("sums", init, body, ("state",))


def _shift(draw: random.Random, i: int, has_positions: bool) -> Layer:
    """Each token is mixed with the one before it."""
    init = (f"self.mix{i} = nn.Parameter(torch.randn({WIDTH}))",)
    start = draw.choice(
        ("torch.zeros(B, 1, 8)", "torch.zeros_like(x[:, :1])", f"self.mix{i}.expand(B, 1, 8)")
    )
    body = (
        f"before = {start} if past is None else past[0]",
        "#@ before",
        "shifted = torch.cat([before, x[:, :-1]], dim=1)",
        "state = x[:, -1:]",
        f"x = x + (shifted - x) * self.mix{i}",
    )
    return Layer("shift", init, body, ("state",))


def _gru(draw: random.Random, i: int, has_positions: bool) -> Layer:
    init = (f"self.gru{i} = nn.GRU({WIDTH}, {WIDTH}, batch_first=True)",)
    start = draw.choice(
        ("None", f"torch.zeros(1, B, {WIDTH})", f"torch.full((1, B, {WIDTH}), 0.5)")
    )
    body = (
        f"start = {start} if past is None else past[0]",
        f"y, state = self.gru{i}(x, start)",
        "#@ y",
        "x = x + y",
    )
    return Layer("gru", init, body, ("state",))


def _cross(draw: random.Random, i: int, has_positions: bool) -> Layer:
    init = (
        f"self.q{i} = nn.Linear({WIDTH}, {WIDTH})",
        f"self.kv{i} = nn.Linear({WIDTH}, {2 * WIDTH})",
    )
    body = (
        "if past is None:",
        f"    k, v = self.kv{i}(states).chunk(2, dim=-1)",
        "else:",
        "    k, v = past",
        "    k = {{k|k * 1.5}}",
        "#@ v",
        "state = (k, v)",
        f"y = (self.q{i}(x) @ k.mT * {{{{0.4|0.8}}}}).softmax(-1) @ v",
        "#@ y",
        "x = x + y",
    )
    return Layer("cross", init, body, ("state[0]", "state[1]"), None, uses_states=True)


def _maximum(draw: random.Random, i: int, has_positions: bool) -> Layer:
    init = (f"self.lin{i} = nn.Linear({WIDTH}, {WIDTH})",)
    body = (
        f"y = self.lin{i}(x).cummax(dim=1)[0]",
        "if past is not None:",
        "    y = torch.maximum(y, past[0])",
        "#@ y",
        "state = y[:, -1:]",
        "x = x + y",
    )
    return Layer("maximum", init, body, ("state",))


def _average(draw: random.Random, i: int, has_positions: bool) -> Layer:
    """A sum over all rows by a count of rows that is itself a tensor of the cache."""
    init = (f"self.lin{i} = nn.Linear({WIDTH}, {WIDTH})",)
    body = (
        f"total = self.lin{i}(x).cumsum(1)",
        "count = torch.arange(1, n + 1)[None, :, None].expand(B, n, 1)",
        "if past is not None:",
        "    total = total + past[0]",
        "    count = count + {{past[1]|past[1] + 1}}",
        "state = (total[:, -1:], count[:, -1:])",
        "y = total / count",
        "#@ y",
        "x = x + y",
    )
    return Layer("average", init, body, ("state[0]", "state[1]"))
