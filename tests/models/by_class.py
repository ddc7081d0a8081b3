"""Every class of cache code with models that are taken and models that are rightly refused."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .case import seeded
from .kept import IDS, KeptCase, Say

VOCABULARY, WIDTH, HEADS, LONGEST = 33, 8, 2, 64


class Attention(nn.Module):
    """Self-attention over what is given as keys and values."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def heads(self, x):
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q, k, v, mask=None):
        n, m = q.shape[2], k.shape[2]
        visible = torch.ones(n, m, dtype=torch.bool).tril(m - n) if mask is None else mask
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -1e9)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Base(nn.Module):
    layers = 1

    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList([Attention() for _ in range(self.layers)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def embed(self, ids, start):
        return self.emb(ids) + self.pos(torch.arange(start, start + ids.shape[1]))


def join(past, k, v):
    return torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)


# Taken.


class AllTokens(Base):
    """The caller passes all tokens; positions are those of all, and one token is computed."""

    def forward(self, ids, cache=None):
        x = self.embed(ids, 0)
        if cache is None:
            cache = [None] * len(self.blocks)
        new = []
        for block, c in zip(self.blocks, cache, strict=True):
            q, k, v = block.heads(x)
            if c is not None:
                assert c.shape[1] == x.shape[1] - 1
                q, x = q[:, :, -1:], x[:, -1:]
            y = x + block.attend(q, k, v)
            x = y if c is None else torch.cat([c, y], dim=1)
            new.append(x)
        return self.head(x[:, -1]), new


class Queue(Base):
    """What is past waits in a deque, which is empty at first."""

    def __init__(self):
        super().__init__()
        self.waiting = collections.deque(maxlen=1)

    def reset(self):
        self.waiting.clear()

    def forward(self, ids):
        past = self.waiting[0] if len(self.waiting) else None
        q, k, v = self.blocks[0].heads(self.embed(ids, past[0].shape[2] if past else 0))
        if past is not None:
            k, v = join(past, k, v)
        self.waiting.append((k, v))
        return self.head(self.blocks[0].attend(q, k, v))


class FlaggedFirstFrame(nn.Module):
    """The first frame stands for those before it, told by a flag that is a part of the state."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3)

    def forward(self, x, state=None):
        if state is None:
            state = (x.new_zeros(x.shape[0], WIDTH, 2), torch.zeros(x.shape[0], 1, 1))
        y = x.transpose(1, 2)
        window, started = state
        window = torch.where(started > 0, window, y[:, :, :1].expand(-1, -1, 2))
        y = torch.cat([window, y], 2)
        return self.conv(y).transpose(1, 2), (y[:, :, -2:], torch.ones_like(started))


class Remarks(Base):
    """Each attention leaves its weights to be looked at, beside a cache that is an argument."""

    def forward(self, ids, past=None):
        q, k, v = self.blocks[0].heads(self.embed(ids, past[0].shape[2] if past else 0))
        if past is not None:
            k, v = join(past, k, v)
        self.blocks[0].scores = q @ k.mT
        return self.head(self.blocks[0].attend(q, k, v)), (k, v)


BACKENDS: dict[Any, Any] = {}


class Backend:
    def __init__(self):
        self.torch = torch

    def join(self, one, other):
        return self.torch.cat([one, other], 2)


def backend_of(tensor):
    if type(tensor) not in BACKENDS:
        BACKENDS[type(tensor)] = Backend()
    return BACKENDS[type(tensor)]


class Registry(Base):
    """A registry outside of the model is filled when a type is first seen."""

    def forward(self, ids, past=None):
        q, k, v = self.blocks[0].heads(self.embed(ids, past[0].shape[2] if past else 0))
        if past is not None:
            k, v = backend_of(k).join(past[0], k), backend_of(v).join(past[1], v)
        else:
            backend_of(k)
        return self.head(self.blocks[0].attend(q, k, v)), (k, v)


class StatesAndWindows(nn.Module):
    """One step at a time; each layer has a state that is None at first and a window of zeros."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ModuleList([nn.Conv1d(WIDTH, WIDTH, 3, padding=2) for _ in range(2)])
        self.gate = nn.ModuleList([nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2)])

    def step(self, x, caches):
        for i, (conv, gate) in enumerate(zip(self.conv, self.gate, strict=True)):
            state, window = caches[i]
            window = torch.cat([window, x[:, :, None]], 2)
            y = F.silu(conv(window)[:, :, 2])
            decay, new = gate(y).sigmoid().chunk(2, -1)
            if state is None:
                state = torch.zeros_like(x)
            state = decay * state + new
            caches[i] = (state, window[:, :, 1:])
            x = x + state
        return x, caches


class SinglePrecision(Base):
    """Positions are turned with automatic casts switched off."""

    def forward(self, ids, past=None):
        start = past[0].shape[2] if past is not None else 0
        with torch.autocast("cpu", enabled=False):
            angles = torch.outer(
                torch.arange(start, start + ids.shape[1]).float(), self.pos.weight[0]
            )
        q, k, v = self.blocks[0].heads(self.emb(ids) + angles.cos())
        if past is not None:
            k, v = join(past, k, v)
        return self.head(self.blocks[0].attend(q, k, v)), (k, v)


class CountsInPlace(Base):
    """A dict on the model with a tensor that counts, in place; the mask is narrowed in place."""

    def __init__(self):
        super().__init__()
        self.state: dict[str, torch.Tensor] = {}

    def reset(self):
        self.state.clear()

    def forward(self, ids):
        start = self.state["keys"].shape[2] if self.state else 0
        q, k, v = self.blocks[0].heads(self.embed(ids, start))
        if self.state:
            k, v = join((self.state["keys"], self.state["values"]), k, v)
        self.state["keys"], self.state["values"] = k, v
        if "count" in self.state:
            self.state["count"] += ids.shape[1]
        else:
            self.state["count"] = torch.zeros(1) + ids.shape[1]
        at = torch.arange(k.shape[2])
        valid = at[start:, None] >= at
        valid &= at[start:, None] - at <= 5
        return self.head(self.blocks[0].attend(q, k, v, valid)) / self.state["count"]


# Refused.


class ProjectsAnew(Base):
    """Later calls read the encoder's keys as they were, and other values."""

    def __init__(self):
        super().__init__()
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids, memory, past=None):
        x = self.emb(ids)
        if past is None:
            k, v = self.key(memory), self.value(memory)
        else:
            k, v = past[0], past[1] * 0.5
        return self.head(torch.softmax(x @ k.mT, -1) @ v), (k, v)


class ForgetsTheNewest(nn.Module):
    """The first call keeps the last rows, later ones the first rows of past and new."""

    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, mems=None):
        x = self.emb(ids)
        rows = x if mems is None else torch.cat([mems, x], 1)
        y = torch.softmax(x @ rows.mT, -1) @ rows
        return self.head(y), x[:, -4:] if mems is None else rows[:, :4]


class CachedIsOtherwise(Base):
    """With ``use_cache`` the first call leaves the attention out."""

    def forward(self, ids, past=None, use_cache=True):
        q, k, v = self.blocks[0].heads(self.embed(ids, past[0].shape[2] if past else 0))
        y = v.transpose(1, 2).flatten(2)
        if past is not None:
            k, v = join(past, k, v)
        if past is not None or not use_cache:
            y = self.blocks[0].attend(q, k, v)
        return self.head(y), (k, v) if use_cache else None


class LaterBias(Base):
    """``if offset > 0`` adds what the first call does not."""

    def forward(self, ids, past=None):
        offset = past[0].shape[2] if past is not None else 0
        q, k, v = self.blocks[0].heads(self.embed(ids, offset))
        if past is not None:
            k, v = join(past, k, v)
        y = self.blocks[0].attend(q, k, v)
        if past is not None and offset > 0:
            y = y + self.pos.weight[0]
        return self.head(y), (k, v)


class CountingHooks(Base):
    """A hook counts the calls, and what it joins depends on the count."""

    def __init__(self):
        super().__init__()
        held = {"calls": 0, "keys": None}

        def remember(module, given, result):
            held["calls"] += 1
            if held["keys"] is not None:
                result = torch.cat([held["keys"], result], 1) * (1 + held["calls"] % 2)
            held["keys"] = result
            return result

        self.key = nn.Linear(WIDTH, WIDTH)
        self.key.register_forward_hook(remember)

    def forward(self, ids):
        x = self.emb(ids)
        keys = self.key(x)
        return self.head(torch.softmax(x @ keys.mT, -1) @ keys)


class Averages:
    def __init__(self):
        self.calls, self.mean = 0, None

    def update(self, row):
        self.calls += 1
        if self.mean is None:
            self.mean = row
        else:
            self.mean = self.mean + (row - self.mean) / self.calls
        return self.mean


class AveragingCalls(Base):
    """An object divides by the number of its calls, which no tensor's size tells."""

    def forward(self, ids, cache: Averages):
        x = self.emb(ids)
        return self.head(x + cache.update(x.mean(1, keepdim=True)))


class OtherWindows(Base):
    """A first call sees two tokens back, a later one four."""

    def forward(self, ids, past=None):
        q, k, v = self.blocks[0].heads(self.embed(ids, past[0].shape[2] if past else 0))
        if past is not None:
            k, v = join(past, k, v)
        n, m = q.shape[2], k.shape[2]
        back = torch.arange(m - n, m)[:, None] - torch.arange(m)
        mask = (back >= 0) & (back <= (2 if past is None else 4))
        return self.head(self.blocks[0].attend(q, k, v, mask)), (k, v)


class CutByTwo(AllTokens):
    """Two rows of all tokens are computed again, and joined behind what is past."""

    def forward(self, ids, cache=None):
        x = self.embed(ids, 0)
        q, k, v = self.blocks[0].heads(x)
        if cache is not None:
            q, x = q[:, :, -2:], x[:, -2:]
        y = x + self.blocks[0].attend(q, k, v)
        y = y if cache is None else torch.cat([cache, y], 1)
        return self.head(y[:, -1]), y


class FirstOfMany(Base):
    """Takes the next of an iterator that it keeps: each call another one."""

    def __init__(self):
        super().__init__()
        self.scales = iter([1.0, 0.5, 2.0] * 100)

    def forward(self, ids, past=None):
        q, k, v = self.blocks[0].heads(self.embed(ids, past[0].shape[2] if past else 0))
        if past is not None:
            k, v = join(past, k, v)
        return self.head(self.blocks[0].attend(q, k, v)) * next(self.scales), (k, v)


class EmptyIsAnother(Base):
    """``numel() == 0`` stands for a first call, on which keys are not turned."""

    def forward(self, ids, past=None):
        past = torch.zeros(2, ids.shape[0], HEADS, 0, WIDTH // HEADS) if past is None else past
        q, k, v = self.blocks[0].heads(self.embed(ids, past.shape[3]))
        if past.numel() != 0:
            k, v = join(past, k * 2, v)
        return self.head(self.blocks[0].attend(q, k, v)), torch.stack([k, v])


class SaysStart(nn.Module):
    """A string on the first call, whose output is shorter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3)

    def forward(self, x, state="start"):
        y = x.transpose(1, 2)
        if state != "start":
            y = torch.cat([state, y], 2)
        return self.conv(y).transpose(1, 2), y[:, :, -2:]


class SomeNones(Base):
    """Of two layers one has keys, the other None, also later."""

    layers = 2

    def forward(self, ids, past=None):
        x = self.emb(ids)
        past = [None, None] if past is None else past
        present = []
        for i, (block, kept) in enumerate(zip(self.blocks, past, strict=True)):
            q, k, v = block.heads(x)
            if kept is not None:
                k, v = join(kept, k, v)
            elif i == 1 and past[0] is not None:
                v = v * 0
            present.append((k, v) if i == 0 else None)
            x = x + block.attend(q, k, v)
        return self.head(x), present


class AttendedZeroRow(Base):
    """Attention sees a row of zeros before the first token, on the first call alone."""

    def forward(self, x, states=None):
        first = torch.zeros_like(x[:, :1]) if states is None else states
        rows = torch.cat([first, x], 1)
        n, m = x.shape[1], rows.shape[1]
        visible = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        scores = (x @ rows.mT).masked_fill(~visible, -torch.inf)
        return scores.softmax(-1) @ rows, rows[:, 1:] if states is None else rows


SEEN: dict[Any, Any] = {}


class RegistryThatMatters(Base):
    """What a later call finds in the registry is what makes it another call."""

    def forward(self, ids, past=None):
        q, k, v = self.blocks[0].heads(self.embed(ids, past[0].shape[2] if past else 0))
        if past is not None:
            k, v = join(past, k, v)
            if "later" in SEEN:
                k = k * 2
        SEEN["first" if past is None else "later"] = Backend
        return self.head(self.blocks[0].attend(q, k, v)), (k, v)


class RegistryHalfFilled(Base):
    """A later call tells the first one before it from a later one by what they left."""

    def forward(self, ids, past=None):
        q, k, v = self.blocks[0].heads(self.embed(ids, past[0].shape[2] if past else 0))
        if past is not None:
            k, v = join(past, k, v)
            if "first" in SEEN and "later" not in SEEN:
                k = k * 2
        SEEN["first" if past is None else "later"] = Backend
        return self.head(self.blocks[0].attend(q, k, v)), (k, v)


class RemarkThatIsRead(Remarks):
    """The weights that the last call left decide, by their size, what the next one does."""

    def forward(self, ids, past=None):
        last = getattr(self.blocks[0], "scores", None)
        logits, present = super().forward(ids, past)
        return (logits * 2 if last is not None and last.shape[-1] > 40 else logits), present


class HalfPrecision(SinglePrecision):
    """A part of the model runs with automatic casts."""

    def forward(self, ids, past=None):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(ids, past)


class Retention(nn.Module):
    """The first call computes all tokens in parallel, later ones step a state."""

    def __init__(self):
        super().__init__()
        self.emb, self.qkv = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, ids, state=None):
        q, k, v = self.qkv(self.emb(ids)).chunk(3, -1)
        if state is not None:
            assert ids.shape[1] == 1
            state = 0.9 * state + k.mT @ v
            return q @ state, state
        at = torch.arange(ids.shape[1])
        decay = torch.where(at[:, None] >= at, 0.9 ** (at[:, None] - at).float(), 0.0)
        y = (q @ k.mT * decay) @ v
        return y, (k * decay[-1][:, None]).mT @ v


# How they are called.


def passed(name: str, at: int = 1) -> Callable[[Any], tuple[Say, Any]]:
    def begin(model: Any) -> tuple[Say, Any]:
        held: dict[str, Any] = {}

        def say(ids: torch.Tensor, start: int) -> torch.Tensor:
            result = model(ids, **held)
            held[name] = result[at]
            return result[0]

        return say, None

    return begin


def _frames(ids: torch.Tensor) -> torch.Tensor:
    return torch.sin(ids[..., None] * torch.arange(1, WIDTH + 1) / 3.0)


def _passed_frames(model: Any) -> tuple[Say, Any]:
    say, _ = passed("state")(model)
    return lambda ids, start: say(_frames(ids), start), None


def _all_tokens(model: Any) -> tuple[Say, Any]:
    held: dict[str, Any] = {}
    whole = [torch.empty(0, 0, dtype=torch.int64)]

    def say(ids: torch.Tensor, start: int) -> torch.Tensor:
        results = []
        for chunk in ids.split(1, 1) if start else (ids,):
            whole[0] = torch.cat([whole[0], chunk], 1) if held else chunk
            result, held["cache"] = model(whole[0], **held)
            results.append(result)
        return torch.stack(results)

    return say, None


def _windows(batch: int) -> list[Any]:
    return [(None, torch.zeros(batch, WIDTH, 2)) for _ in range(2)]


def _steps(model: Any) -> tuple[Say, Any]:
    held: list[Any] = [None]

    def say(ids: torch.Tensor, start: int) -> torch.Tensor:
        results = []
        for frame in _frames(ids).unbind(1):
            result, held[0] = model.step(frame, held[0] or _windows(len(ids)))
            results.append(result)
        return torch.stack(results)

    return say, None


def _alone(model: Any) -> tuple[Say, Any]:
    model.reset()
    return lambda ids, start: model(ids), None


TAKEN: tuple[KeptCase, ...] = (
    KeptCase("all_tokens", seeded(AllTokens), _all_tokens, lambda model: (IDS,)),
    KeptCase("deque", seeded(Queue), _alone),
    KeptCase(
        "first_frame_by_a_flag", seeded(FlaggedFirstFrame), _passed_frames,
        lambda model: (_frames(IDS),),
    ),
    KeptCase("weights_to_look_at", seeded(Remarks), passed("past")),
    KeptCase("registry", seeded(Registry), passed("past")),
    KeptCase(
        "states_and_windows", seeded(StatesAndWindows), _steps,
        lambda model: (_frames(IDS)[:, 0], _windows(2)), {"method": "step"},
    ),
    KeptCase("counted_in_place", seeded(CountsInPlace), _alone),
    KeptCase("casts_off", seeded(SinglePrecision), passed("past")),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Refused:
    """A model that must be refused, with what the message says."""

    name: str
    build: Callable[[], nn.Module]
    says: tuple[str, ...]
    example: Any = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


REFUSED: tuple[Refused, ...] = (
    Refused("other_values_of_the_encoder", seeded(ProjectsAnew), ("past[1] * 0.5",),
            (IDS, torch.zeros(2, 5, WIDTH))),
    Refused("newest_forgotten", seeded(ForgetsTheNewest), ("by_class.py",)),
    Refused("cached_is_otherwise", seeded(CachedIsOtherwise), ("by_class.py",)),
    Refused("bias_of_later_calls", seeded(LaterBias), ("self.pos.weight[0]",)),
    Refused("hooks_that_count", seeded(CountingHooks), ("calls",)),
    Refused("average_over_calls", seeded(AveragingCalls), ("cache.calls",), (IDS, Averages())),
    Refused("windows_of_two_lengths", seeded(OtherWindows), ("by_class.py",)),
    Refused("cut_by_two", seeded(CutByTwo), ("cache",), (IDS,)),
    Refused("next_of_an_iterator", seeded(FirstOfMany), ("outside of itself", "scales")),
    Refused("empty_is_another", seeded(EmptyIsAnother), ("by_class.py",)),
    Refused("a_string_at_first", seeded(SaysStart), ("state",), (torch.zeros(2, 5, WIDTH),)),
    Refused("some_nones", seeded(SomeNones), ("by_class.py",)),
    Refused("attended_zero_row", seeded(AttendedZeroRow), ("by_class.py",),
            (torch.zeros(2, 5, WIDTH),)),
    Refused("registry_that_matters", seeded(RegistryThatMatters), ("outside of itself", "SEEN")),
    Refused("registry_half_filled", seeded(RegistryHalfFilled), ("outside of itself", "SEEN")),
    Refused("weights_that_are_read", seeded(RemarkThatIsRead), ("scores",)),
    Refused("casts_on", seeded(HalfPrecision), ("autocast", "by_class.py")),
    Refused("retention", seeded(Retention), ("by_class.py",)),
)  # fmt: skip
