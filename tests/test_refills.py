"""Caches that a call changes in the caller's hands: lists, dicts, objects with `update()`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import cachefree

from .models.case import seeded

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.keys = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def mixed(self, x, k):
        return x + k.cumsum(1)[:, -x.shape[1] :]


class ListInPlace(Layers):
    def forward(self, ids, past=None):
        x = self.emb(ids)
        if past is None:
            past = [None] * len(self.keys)
        for place, keys in enumerate(self.keys):
            k = keys(x)
            past[place] = k if past[place] is None else torch.cat([past[place], k], 1)
            x = self.mixed(x, past[place])
        return x, past


class DictInPlace(Layers):
    def forward(self, ids, past=None):
        x = self.emb(ids)
        past = {} if past is None else past
        for place, keys in enumerate(self.keys):
            k = keys(x)
            past[place] = torch.cat([past[place], k], 1) if place in past else k
            x = self.mixed(x, past[place])
        return x, past


class ForgetsAnEmptyDict(DictInPlace):
    """``past or {}``: an empty dict is not the one that is filled, a full one is."""

    def forward(self, ids, past=None):
        return super().forward(ids, past or None)


class InnerDicts(Layers):
    """The list is new, the dicts in it are the caller's."""

    def forward(self, ids, past=None):
        x, present = self.emb(ids), []
        for keys, own in zip(self.keys, past or [{} for _ in self.keys], strict=True):
            own["k"] = torch.cat([own["k"], keys(x)], 1) if "k" in own else keys(x)
            x = self.mixed(x, own["k"])
            present.append(own)
        return x, present


class Store:
    def __init__(self, layers=2):
        self.keys = [None] * layers

    def __len__(self):
        return 0 if self.keys[0] is None else self.keys[0].shape[1]

    def update(self, place, k):
        before = self.keys[place]
        self.keys[place] = k if before is None else torch.cat([before, k], 1)
        return self.keys[place]


class StoreInPlace(Layers):
    def forward(self, ids, cache=None):
        cache = Store(len(self.keys)) if cache is None else cache
        x = self.emb(ids)
        for place, keys in enumerate(self.keys):
            x = self.mixed(x, cache.update(place, keys(x)))
        return x, cache


@dataclasses.dataclass
class Row:
    k: torch.Tensor | None = None


class PureRows(Layers):
    """Nothing that is given changes."""

    def forward(self, ids, past=None):
        x, present = self.emb(ids), []
        for keys, own in zip(self.keys, past or [Row() for _ in self.keys], strict=True):
            k = keys(x) if own.k is None else torch.cat([own.k, keys(x)], 1)
            x = self.mixed(x, k)
            present.append(Row(k))
        return x, present


def told(value):
    """Tensors in order, of lists, dicts and objects."""
    if isinstance(value, torch.Tensor):
        return [value.tolist()]
    if isinstance(value, dict):
        return [part for key in sorted(value, key=str) for part in told(value[key])]
    if isinstance(value, (list, tuple)):
        return [part for inner in value for part in told(inner)]
    return told(vars(value)) if hasattr(value, "__dict__") else [value]


def kept_in_hand(function, first):
    """The caller holds on to one object, and looks at what calls return for nothing else."""
    outputs = []
    cache = first()
    for begin, end in ((0, 3), (3, 4), (4, 8)):
        result = function(IDS[:, begin:end], cache) if cache is not None else function(IDS[:, :3])
        outputs.append((told(result), cache is result[1], told(cache)))
        cache = result[1] if cache is None else cache
    return outputs


@pytest.mark.parametrize(
    ("build", "first"),
    [
        (ListInPlace, lambda: None),
        (ListInPlace, lambda: [None, None]),
        (DictInPlace, lambda: None),
        (DictInPlace, dict),
        (ForgetsAnEmptyDict, lambda: None),
        (ForgetsAnEmptyDict, dict),
        (InnerDicts, lambda: None),
        (InnerDicts, lambda: [{}, {}]),
        (StoreInPlace, lambda: None),
        (StoreInPlace, Store),
        (PureRows, lambda: None),
        (PureRows, lambda: [Row(), Row()]),
    ],
)
def test_the_callers_object_is_filled_as_the_model_fills_it(build, first):
    model = seeded(build)()
    rewritten = cachefree.rewrite(model)
    with torch.no_grad():
        for mine, theirs in zip(
            kept_in_hand(rewritten, first), kept_in_hand(model, first), strict=True
        ):
            assert mine[1] == theirs[1]
            for one, other in zip(mine[::2], theirs[::2], strict=True):
                assert len(one) == len(other)
                for a, b in zip(one, other, strict=True):
                    assert type(a) is type(b)
                    if a is not None:
                        torch.testing.assert_close(torch.tensor(a), torch.tensor(b))


class Window(Store):
    def __init__(self, rows=4):
        super().__init__(1)
        self.rows = rows

    def update(self, place, k):
        whole = super().update(place, k)
        self.keys[place] = whole[:, -self.rows :]
        return whole


class WindowInPlace(Layers):
    def forward(self, ids, cache=None):
        cache = Window() if cache is None else cache
        x = self.emb(ids)
        return self.mixed(x, cache.update(0, self.keys[0](x))), cache


def test_an_empty_cache_that_is_set_up_otherwise_is_refused():
    rewritten = cachefree.rewrite(seeded(WindowInPlace)())
    _, cache = rewritten(IDS, Window(4))
    assert cache.keys[0].shape == (1, 4, 6)
    with pytest.raises(cachefree.DomainError) as caught:
        rewritten(IDS, Window(6))
    assert "cache.rows is 6 where 4 is expected" in str(caught.value)


def test_an_empty_cache_in_an_argument_is_refused_too():
    class Filled(WindowInPlace):
        def forward(self, ids, cache):
            return super().forward(ids, cache)[0]

    rewritten = cachefree.rewrite(seeded(Filled)(), (IDS, Window(4)))
    rewritten(IDS, Window(4))
    with pytest.raises(cachefree.DomainError, match=r"cache\.rows is 6 where 4 is expected"):
        rewritten(IDS, Window(6))


def test_a_decorated_forward_is_no_memory():
    class Decorated(ListInPlace):
        forward = torch.no_grad()(ListInPlace.forward)

    assert cachefree.rewrite(seeded(Decorated)()).report.verdict.is_proof
