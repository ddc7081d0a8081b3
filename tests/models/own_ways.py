"""Decoders whose cache has a form, a limit or a word for none that no other model here has."""

from __future__ import annotations

import math

import torch
from torch import nn

from .case import ModelCase, calls, frames, seeded, time_major, tokens

VOCAB, WIDTH, HEADS = 31, 16, 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def heads(self, x):
        b, t, c = x.shape
        return self.qkv(x).view(b, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, q, k, v):
        t, n = q.shape[2], k.shape[2]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores + torch.full((t, n), float("-inf")).triu(n - t + 1)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.attention = Attention()

    def attended(self, x, past):
        q, k, v = self.attention.heads(x)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return x + self.attention(q, k, v), k, v


class SinksAndWindow(Base):
    """The first rows and the last ones stay, once there are more than both."""

    sinks, window = 2, 12

    def evict(self, rows):
        n = rows.shape[2]
        if n > self.sinks + self.window:
            return torch.cat([rows[:, :, : self.sinks], rows[:, :, n - self.window :]], dim=2)
        return rows

    def forward(self, ids, past_key_values=None):
        x, k, v = self.attended(self.emb(ids), past_key_values)
        return self.head(x), (self.evict(k), self.evict(v))


class CompressedBlocks(Base):
    """Beside the rows themselves, attention sees the mean of each block of them that is full."""

    block = 4

    def means(self, rows):
        count = rows.shape[2] // self.block
        return rows[:, :, : count * self.block].unflatten(2, (count, self.block)).mean(3)

    def forward(self, ids, cache=None):
        x = self.emb(ids)
        x, k, v = self.attended(x, cache)
        q, n = self.attention.heads(x)[0], ids.shape[1]
        keys, values = self.means(k), self.means(v)
        ends = (torch.arange(keys.shape[2]) + 1) * self.block
        seen = ends <= torch.arange(k.shape[2] - n, k.shape[2])[:, None] + 1
        weights = (q @ keys.mT).masked_fill(~seen, -1e9).softmax(-1) * seen
        return self.head(x + (weights @ values).transpose(1, 2).flatten(2)), (k, v)


class Pointers(nn.Module):
    """A pointer network: what was pointed at is left out from then on."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)
        self.keys, self.query, self.score = (nn.Linear(WIDTH, n) for n in (WIDTH, WIDTH, 1))

    def forward(self, x, items, state=None):
        if state is None:
            zeros = x.new_zeros(x.shape[0], WIDTH)
            state = zeros, zeros, x.new_zeros(x.shape[0], items.shape[1])
        h, c, visited = state
        h, c = self.cell(x, (h, c))
        scores = self.score(torch.tanh(self.keys(items) + self.query(h)[:, None])).squeeze(-1)
        weights = (scores - 1e4 * visited).softmax(-1)
        chosen = nn.functional.one_hot(weights.argmax(-1), items.shape[1])
        return weights, (h, c, torch.clamp(visited + chosen, max=1))


class WideWindow(Base):
    """Rows are cut when there are more than any example is likely to have."""

    window = 12

    def forward(self, ids, past=None):
        x, k, v = self.attended(self.emb(ids), past)
        if k.shape[2] > self.window:
            k, v = k[:, :, -self.window :], v[:, :, -self.window :]
        return self.head(x), (k, v)


class FalseForNone(Base):
    def forward(self, ids, cache=False):
        x, k, v = self.attended(self.emb(ids), cache if cache else None)
        return self.head(x), [k, v]


class Interleaved(Base):
    """Three tokens a step: the past is three times as long as the inputs were."""

    def __init__(self):
        super().__init__()
        self.state, self.action = nn.Linear(4, WIDTH), nn.Linear(2, WIDTH)
        self.reward = nn.Linear(1, WIDTH)

    def forward(self, observed, past=None):
        states, actions, rewards = observed.split([4, 2, 1], dim=-1)
        b, t, _ = observed.shape
        parts = (self.reward(rewards), self.state(states), self.action(actions))
        x = torch.stack(parts, 1).permute(0, 2, 1, 3).reshape(b, 3 * t, WIDTH)
        x, k, v = self.attended(x, past)
        return self.head(x.reshape(b, t, 3, WIDTH)[:, :, 1]), (k, v)


class Codebooks(Base):
    """A row of codes for each of several tables, and an offset that is counted in the state."""

    def __init__(self, count=3):
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(VOCAB, WIDTH) for _ in range(count)])
        self.heads = nn.ModuleList([nn.Linear(WIDTH, VOCAB) for _ in range(count)])

    def forward(self, codes, state=None):
        _, count, t = codes.shape
        assert count == len(self.tables), "one row of codes for each table"
        offset = state["offset"] if state else 0
        angles = torch.arange(offset, offset + t)[:, None] / 50 ** torch.linspace(0, 1, WIDTH // 2)
        x = sum(table(codes[:, place]) for place, table in enumerate(self.tables))
        x = x + torch.cat([angles.cos(), angles.sin()], -1)
        x, k, v = self.attended(x, (state["k"], state["v"]) if state else None)
        logits = torch.stack([head(x) for head in self.heads], 1)
        return logits, {"offset": offset + t, "k": k, "v": v}


class Latent(nn.Module):
    """Keys and values are kept as one narrow row each, with a rotated part that all heads share."""

    heads, rank, plain, turned = 2, 6, 4, 4

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.query = nn.Linear(WIDTH, self.heads * (self.plain + self.turned))
        self.down = nn.Linear(WIDTH, self.rank + self.turned)
        self.norm = nn.RMSNorm(self.rank)
        self.up = nn.Linear(self.rank, self.heads * (self.plain + 5), bias=False)
        self.out = nn.Linear(self.heads * 5, WIDTH)

    def rotated(self, x, start):
        at = torch.arange(start, start + x.shape[1])[:, None, None]
        angles = at / 100 ** torch.tensor([0.0, 0.5], dtype=x.dtype)
        one, other = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)

    def forward(self, ids, caches=None):
        b, t = ids.shape
        start = caches["layer_0"]["rows"].size(1) if caches else 0
        x = self.emb(ids)
        q = self.query(x).view(b, t, self.heads, -1)
        q, q_turned = q.split([self.plain, self.turned], dim=-1)
        rows, k_turned = self.down(x).split([self.rank, self.turned], dim=-1)
        rows = self.norm(rows)
        k_turned = self.rotated(k_turned.unsqueeze(2), start).squeeze(2)
        if caches:
            rows = torch.cat([caches["layer_0"]["rows"], rows], 1)
            k_turned = torch.cat([caches["layer_0"]["turned"], k_turned], 1)
        up = self.up.weight.view(self.heads, -1, self.rank)
        scores = torch.einsum("bshd,hdc,btc->bsht", q, up[:, : self.plain], rows)
        scores += torch.einsum("bshr,btr->bsht", self.rotated(q_turned, start), k_turned)
        scores += torch.full((t, start + t), float("-inf")).triu_(start + 1).unsqueeze(1)
        seen = torch.einsum("bsht,btc->bshc", scores.softmax(-1), rows)
        y = torch.einsum("bshc,hdc->bshd", seen, up[:, -5:])
        return self.head(x + self.out(y.flatten(2))), {
            "layer_0": {"rows": rows, "turned": k_turned}
        }


class OverlapAdd(nn.Module):
    """What a transposed convolution leaves over is added to the next chunk's beginning."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(4, 2, kernel_size=6, stride=3, bias=False)

    def forward(self, x, tail=None):
        y = self.up(x.transpose(1, 2))
        if tail is not None:
            y = torch.cat([y[..., :3] + tail, y[..., 3:]], dim=-1)
        return y[..., :-3].unflatten(-1, (-1, 3)).permute(0, 2, 1, 3), y[..., -3:]


class ListOfMems(nn.Module):
    """Time comes first, and the memories come back behind the logits in one list."""

    keep = 6

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.qkv, self.far = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def shifted(self, x):
        padded = torch.cat([torch.zeros((x.size(0), 1) + x.size()[2:]), x], dim=1)
        padded = padded.view(x.size(1) + 1, x.size(0), *x.size()[2:])
        return padded[1:].view_as(x)

    def forward(self, ids, *mems):
        if not mems:
            mems = [torch.empty(0) for _ in range(2)]
        x = self.emb(ids)
        new, past = len(ids), mems[0].size(0)
        whole = past + new
        at = torch.arange(whole - 1, -1, -1.0)[:, None] / 50 ** torch.linspace(0, 1, WIDTH // 2)
        far = self.far(torch.cat([at.sin(), at.cos()], -1).type_as(x))
        q, k, v = self.qkv(torch.cat([mems[0], x], 0) if past else x).chunk(3, dim=-1)
        near = torch.einsum("ibd,jbd->ijb", q[-new:], k)
        scores = near + self.shifted(torch.einsum("ibd,jd->ijb", q[-new:], far))
        hidden = torch.triu(x.new_ones(new, whole), 1 + past).bool()[:, :, None]
        y = x + torch.einsum("ijb,jbd->ibd", scores.masked_fill(hidden, -1e30).softmax(1), v)
        kept = [torch.cat([m, h], 0) if m.numel() else h for m, h in zip(mems, (x, y), strict=True)]
        return [self.head(y)] + [rows[max(0, whole - self.keep) :].detach() for rows in kept]


def _codes(batch, past, query, generator):
    return torch.randint(VOCAB, (batch, 3, 64), generator=generator)[..., past : past + query]


def _mems_calls():
    draw = time_major(tokens(VOCAB))

    def prefill(batch, query, generator):
        return (draw(batch, 0, query, generator),), {}

    def step(outputs, batch, past, query, generator):
        return (draw(batch, past, query, generator), *outputs[1:]), {}

    return {"prefill": prefill, "step": step}


class RowsOneByOne(nn.Module):
    """Each tensor of the cache is an argument, and stands behind the logits in the result."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.projections = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2)])

    def forward(self, ids, mask=None, k0=None, v0=None, k1=None, v1=None):
        x, new = self.embed(ids), []
        for project, (k_0, v_0) in zip(self.projections, ((k0, v0), (k1, v1)), strict=True):
            q, k, v = project(x).chunk(3, dim=-1)
            if k_0 is not None:
                k, v = torch.cat([k_0, k], dim=1), torch.cat([v_0, v], dim=1)
            seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
            seen = seen.tril(k.shape[1] - q.shape[1])
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            new += (k, v)
        return (self.head(x), *new)


def _one_by_one():
    named = calls(tokens(VOCAB))

    def step(outputs, batch, past, query, generator):
        args, _ = named["step"]((None, None), batch, past, query, generator)
        return args, dict(zip(("k0", "v0", "k1", "v1"), outputs[1:], strict=True))

    return {"prefill": named["prefill"], "step": step}


CASES = (
    ModelCase(
        "rows_one_by_one", seeded(RowsOneByOne), **_one_by_one(), patterns=("P1", "P15"),
    ),
    ModelCase(
        "sinks_and_window_beyond_the_examples", seeded(SinksAndWindow),
        **calls(tokens(VOCAB), cache="past_key_values"),
        patterns=("P1", "P5"), chunk_invariant=False,
    ),
    ModelCase(
        "window_beyond_the_examples", seeded(WideWindow), **calls(tokens(VOCAB)),
        patterns=("P1", "P5"), chunk_invariant=False,
    ),
    ModelCase(
        "means_of_full_blocks", seeded(CompressedBlocks), **calls(tokens(VOCAB), cache="cache"),
        patterns=("P1", "P2"),
    ),
    ModelCase(
        "false_for_none", seeded(FalseForNone), **calls(tokens(VOCAB), cache="cache"),
        patterns=("P1", "P18"),
    ),
    ModelCase(
        "three_tokens_a_step", seeded(Interleaved), **calls(frames(7)),
        patterns=("P1", "P2"), example_inputs=(torch.zeros(2, 4, 7),),
    ),
    ModelCase(
        "codes_of_several_tables", seeded(Codebooks), **calls(_codes, cache="state"),
        patterns=("P1", "P2", "P6"),
    ),
    ModelCase(
        "latent_rows", seeded(Latent), **calls(tokens(VOCAB), cache="caches"),
        patterns=("P1", "P2", "P9"),
    ),
    ModelCase(
        "overlap_of_chunks", seeded(OverlapAdd), **calls(frames(4), cache="tail"),
        patterns=("P8",), example_inputs=(torch.zeros(2, 5, 4),),
        rewrite_options={"cache": "tail"},
    ),
    ModelCase(
        "mems_behind_the_logits_in_a_list", seeded(ListOfMems), **_mems_calls(),
        patterns=("P5", "P18"), chunk_invariant=False,
    ),
)  # fmt: skip
