"""Whatever a forward pass writes, raises or draws: afterwards all is as it was."""

from __future__ import annotations

import builtins
import random
import sys
import threading
from collections import deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cachefree.errors import CaptureError
from cachefree.isolation import untouched
from cachefree.symbolic_python import sizes_in_builtins

from .assertions import Unchanged, same
from .small import IDS, Small, rewritten_small, small

ORIGINALS = (builtins.min, builtins.max, builtins.len, F.scaled_dot_product_attention)


def patched() -> tuple[Any, ...]:
    return (builtins.min, builtins.max, builtins.len, F.scaled_dot_product_attention)


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.counter = 0
        self.cache: list[Any] = [torch.zeros(1), [1, 2]]
        self.by_name: dict[str, Any] = {"a": {"deep": [1]}}
        self.recent = deque([1, 2, 3], maxlen=3)
        self.seen = {1, 2}
        self.register_buffer("state", torch.zeros(2))


def write_number(model: Writes) -> None:
    model.counter += 1


def write_new_attribute(model: Writes) -> None:
    model.inner.fresh = torch.ones(1)


def delete_attribute(model: Writes) -> None:
    del model.counter


def write_buffer(model: Writes) -> None:
    model.state = torch.ones(2)


def append(model: Writes) -> None:
    model.cache.append(5)


def write_deep(model: Writes) -> None:
    model.cache[1][0] = 9
    model.by_name["a"]["deep"].append(2)


def write_key(model: Writes) -> None:
    model.by_name["b"] = 1
    del model.by_name["a"]


def write_deque_and_set(model: Writes) -> None:
    model.recent.append(4)
    model.seen.discard(1)


def swap_container(model: Writes) -> None:
    model.cache = [1]


def replace_module(model: Writes) -> None:
    model.inner = nn.Linear(3, 3)


def train(model: Writes) -> None:
    model.train()


def clear_everything(model: Writes) -> None:
    model.cache.clear()
    model.by_name.clear()
    model.recent.clear()
    model.seen.clear()


WRITES = (
    write_number,
    write_new_attribute,
    delete_attribute,
    write_buffer,
    append,
    write_deep,
    write_key,
    write_deque_and_set,
    swap_container,
    replace_module,
    train,
    clear_everything,
)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_writes_are_put_back_and_told(write: Any) -> None:
    model = Writes().eval()
    unchanged = Unchanged(model)
    with untouched(model) as trace:
        write(model)
    unchanged.check()
    assert trace.changes
    assert all(change.path for change in trace.changes)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_writes_are_put_back_after_an_error(write: Any) -> None:
    model = Writes().eval()
    unchanged = Unchanged(model)

    def interrupted() -> None:
        with untouched(model):
            write(model)
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        interrupted()
    unchanged.check()


def test_nothing_written_is_nothing_told() -> None:
    model = Writes()
    with untouched(model) as trace:
        assert model.inner(torch.ones(1, 2)).shape == (1, 2)
    assert trace.changes == []


def test_paths_of_changes_are_those_of_the_modules() -> None:
    model = Writes()
    with untouched(model) as trace:
        write_number(model)
        write_new_attribute(model)
    assert {change.path for change in trace.changes} == {"counter", "inner.fresh"}
    (counter,) = [change for change in trace.changes if change.path == "counter"]
    assert (counter.before, counter.after) == (0, 1)


def test_random_states_are_put_back() -> None:
    model = Writes()
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(2), random.random()
    torch.manual_seed(3)
    random.seed(3)
    with untouched(model):
        torch.rand(7)
        random.random()
    assert torch.equal(torch.rand(2), expected[0])
    assert random.random() == expected[1]


def test_builtins_are_patched_inside_only() -> None:
    assert patched() == ORIGINALS
    with sizes_in_builtins():
        assert patched() != ORIGINALS
        with sizes_in_builtins():
            assert min(3, 2) == 2
        assert patched() != ORIGINALS
    assert patched() == ORIGINALS


def test_builtins_are_restored_after_an_error() -> None:
    with pytest.raises(KeyError), sizes_in_builtins():
        raise KeyError
    assert patched() == ORIGINALS


def test_patched_builtins_do_what_the_builtins_do() -> None:
    with sizes_in_builtins():
        assert min([3, 1, 2]) == 1
        assert max(x for x in (1, 5, 3)) == 5
        assert max([], default=7) == 7
        assert min(["aa", "b"], key=len) == "b"
        assert len({1: 2}) == 1
        assert len(torch.zeros(3, 2)) == 3
        with pytest.raises(TypeError):
            len(torch.zeros(()))
        with pytest.raises(TypeError):
            min()
        with pytest.raises(ValueError, match="empty"):
            max([])


def test_other_threads_keep_their_builtins() -> None:
    found: list[Any] = []

    def elsewhere() -> None:
        found.append((min(2, 1), max([1, 2]), len(torch.zeros(4, 1))))

    with sizes_in_builtins():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert found == [(1, 2, 4)]


def test_two_rewrites_at_once_in_two_threads() -> None:
    models = [small(), small()]
    found: list[Any] = [None, None]
    start = threading.Barrier(2)

    def work(place: int) -> None:
        start.wait()
        try:
            found[place] = rewritten_small(models[place])
        except BaseException as error:  # noqa: BLE001 - told in the main thread
            found[place] = error

    unchanged = [Unchanged(model) for model in models]
    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert patched() == ORIGINALS
    for model, rewritten, before in zip(models, found, unchanged, strict=True):
        before.check()
        if isinstance(rewritten, BaseException):
            raise rewritten
        logits, past = rewritten(IDS[:, :2])
        with torch.no_grad():
            same(rewritten(IDS[:, 2:], past), model(IDS[:, 2:], model(IDS[:, :2])[1]))
        assert logits.shape == (3, 2, 12)


def test_int_as_a_dtype_and_as_a_class_stays_the_class() -> None:
    home = sys.modules[Small.__module__]

    class CountsWithIntegers(Small):
        def attend(self, q, k):
            assert isinstance(3, int)
            n, m = q.shape[1], k.shape[1]
            hidden = torch.ones(n, m, dtype=int).triu(int(m - n) + 1) == 1
            return (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1)

    with pytest.raises(CaptureError, match=r"int\(m - n\)"):
        rewritten_small(small(CountsWithIntegers))  # a size frozen, and not a wrong dtype
    assert "int" not in vars(home)
    assert "int" not in vars(sys.modules[__name__])
