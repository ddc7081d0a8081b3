"""Caches that are kept elsewhere: the model's own calls, on one pure graph."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import numpy
import pytest
import torch

import cachefree
from cachefree import CaptureError, DomainError

from .assertions import Unchanged, graph_is_plain, same, says_what_to_do
from .models import kept
from .models.case import seeded
from .models.kept import IDS, KEPT, KeptCase

LENGTHS = ((4, 1, 1, 5), (1, 3, 1), (7, 1), (2, 2, 2))
on_each_case = pytest.mark.parametrize("case", KEPT, ids=str)


def rewritten_from(case: KeptCase, model: torch.nn.Module) -> cachefree.Rewritten:
    example = case.example(model)
    unchanged = Unchanged(model)
    try:
        return cachefree.rewrite(model, example, **case.options)
    finally:
        unchanged.check()


def equal_sequences(case: KeptCase, model: Any, others: list[Any]) -> int:
    """Sequences of calls on a model and on others, compared call by call; how many."""
    compared = 0
    for batch in case.batches:
        for lengths in LENGTHS:
            ids = torch.randint(
                33, (batch, sum(lengths)), generator=torch.Generator().manual_seed(7)
            )
            with torch.no_grad():
                theirs, their_store = case.begin(model)
                mine = [case.begin(other) for other in others]
                start = 0
                for length in lengths:
                    chunk = ids[:, start : start + length]
                    expected = theirs(chunk, start)
                    for say, store in mine:
                        where = f"batch {batch}, past {start}, query {length}"
                        same(say(chunk, start), expected, where)
                        same(store, their_store, where, "what the caller holds")
                        compared += 1
                    start += length
    return compared


@on_each_case
def test_lifted_model_equals_the_model(case: KeptCase) -> None:
    model = case.build()
    rewritten = rewritten_from(case, model)
    assert rewritten.report.verdict.is_proof, rewritten.report
    graph_is_plain(rewritten.graph_module)
    unchanged = Unchanged(model)
    assert equal_sequences(case, twin_of(case, model), [rewritten]) >= 10
    unchanged.check()
    if rewritten.keeper is not None:
        assert set(case.labels) <= {slot.label for slot in rewritten.keeper.plan.slots}
    with torch.no_grad():
        say, _ = case.begin(model)
        origin = rewritten.__dict__["_origin"]
        is_changed = origin.has_changed()  # where a sequence begins with new hooks
        say(IDS[:, :3], 0)
        say(IDS[:, 3:], 3)
    assert origin.has_changed() is is_changed, "its own calls are no change"


def twin_of(case: KeptCase, model: torch.nn.Module) -> torch.nn.Module:
    """The same model again; itself where its names are drawn and its calls leave it as it is."""
    return model if case.name == "dict_by_uuid" else case.build()


QUICK = ("dict_by_uuid", "rows_at_start_pos")


@pytest.mark.parametrize(
    "case",
    [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in KEPT],
    ids=str,
)
def test_onnx_file_keeps_the_cache_too(case: KeptCase, tmp_path: Any) -> None:
    if case.name in ("dict_by_uuid", "dataclasses", "list_and_flag", "prefill_and_decode"):
        pytest.skip("made of the same parts as the others")
    model = case.build()
    rewritten = rewritten_from(case, model)
    path = cachefree.to_onnx(rewritten, tmp_path / "model.onnx")
    decoder = cachefree.load_onnx(path, like=rewritten)
    if rewritten.keeper is not None:
        assert equal_sequences(case, twin_of(case, model), [decoder]) >= 10
    result = cachefree.verify(model, rewritten, dtypes=(), max_examples=3)
    assert result is not None


def case_of(name: str) -> KeptCase:
    return next(case for case in KEPT if case.name == name)


def lifted(name: str) -> tuple[torch.nn.Module, cachefree.Rewritten]:
    model = case_of(name).build()
    return model, rewritten_from(case_of(name), model)


def refused(call: Any, *says: str) -> None:
    with pytest.raises(DomainError) as caught, torch.no_grad():
        call()
    for text in says:
        assert text in str(caught.value), str(caught.value)
    says_what_to_do(caught.value)


TOKEN = torch.tensor([[2], [6]])


def test_kept_state_is_checked() -> None:
    _, rewritten = lifted("attributes")
    before = rewritten(IDS)
    refused(lambda: rewritten(TOKEN[:1]), "batch", "reset()")
    held = rewritten.keeper.held
    same(rewritten.keeper.held, held)
    after = rewritten(TOKEN)
    rewritten.reset()
    same(rewritten(IDS), before)
    same(rewritten(TOKEN), after)
    rewritten.reset()
    assert rewritten(TOKEN[:1]).shape == (1, 1, 33)


def test_copies_keep_caches_of_their_own() -> None:
    _, rewritten = lifted("attributes")
    rewritten(IDS)
    copied = copy.deepcopy(rewritten)
    pickled = pickle.loads(pickle.dumps(rewritten))
    expected = rewritten(TOKEN)
    same(copied(TOKEN), expected)
    same(pickled(TOKEN), expected)
    copied.reset()
    same(rewritten(TOKEN), pickled(TOKEN))


def test_state_may_be_given_and_taken() -> None:
    _, rewritten = lifted("attributes")
    logits, past = rewritten(IDS, past=None)
    assert rewritten.keeper.held is None
    again, _ = rewritten(TOKEN, past=past)
    same(rewritten(IDS), logits)
    same(rewritten(TOKEN), again)
    neutral = rewritten.empty_cache(2)
    same(rewritten(IDS, past=neutral)[0], logits)


def test_two_threads_are_told() -> None:
    _, rewritten = lifted("attributes")
    entered, leave = threading.Event(), threading.Event()
    run = rewritten.keeper.call

    def slow(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        leave.wait(10)
        return rewritten._pure(*args, **kwargs)

    thread = threading.Thread(target=lambda: run(slow, (IDS,), {}))
    thread.start()
    assert entered.wait(10)
    refused(lambda: rewritten(IDS), "same time")
    leave.set()
    thread.join()
    assert rewritten(TOKEN).shape == (2, 1, 33)


def test_position_has_to_be_the_length() -> None:
    _, rewritten = lifted("rows_at_start_pos")
    first = rewritten(IDS, 0)
    refused(lambda: rewritten(TOKEN, 3), "start_pos is 3", "holds 4")
    assert rewritten(TOKEN, start_pos=4).shape == (2, 1, 33)
    same(rewritten(IDS, 0), first)  # the rows are written from the beginning again
    refused(lambda: rewritten(torch.zeros(2, 61, dtype=torch.int64), 4), "outside the domain")
    refused(lambda: rewritten(torch.zeros(5, 2, dtype=torch.int64), 0), "outside the domain")


def test_dict_is_checked_and_filled_at_the_end_only() -> None:
    _, rewritten = lifted("dict_by_number")
    cache: dict[Any, Any] = {}
    rewritten(IDS, cache)
    partial = {0: cache[0]}
    refused(lambda: rewritten(TOKEN, partial), "missing", "kv_cache[1]")
    assert partial.keys() == {0}
    refused(lambda: rewritten(TOKEN, {**cache, 2: cache[0]}), "entry 2", "another model")
    refused(lambda: rewritten(TOKEN), "'kv_cache' is missing")
    refused(lambda: rewritten(TOKEN, []), "list", "dict")
    before = dict(cache)
    refused(lambda: rewritten(TOKEN[:1], cache), "batch")
    same(cache, before)
    empty = rewritten.empty_cache(2)
    same(rewritten(IDS, empty)[0], rewritten(IDS, {})[0])
    assert empty.keys() == {0, 1}


def test_store_is_checked() -> None:
    _, rewritten = lifted("store")
    store = kept.KeyValueStore()
    rewritten(IDS, store)
    assert (store.seen, len(store.keys)) == (4, 2)
    store.seen = 3
    refused(lambda: rewritten(TOKEN, store), "cache.seen")
    refused(lambda: rewritten(TOKEN, {}), "dict", "KeyValueStore")


def test_methods_are_called_in_their_order() -> None:
    _, rewritten = lifted("prefill_and_decode_keep")
    refused(lambda: rewritten.decode(TOKEN), "decode is called before")
    rewritten.prefill(IDS)
    refused(lambda: rewritten.prefill(IDS), "reset()")
    assert rewritten.decode(TOKEN).shape == (2, 1, 33)


class RingDecoder(kept.RowsDecoder):
    """The buffer is a ring."""

    def forward(self, tokens, start_pos: int):
        return super().forward(tokens, start_pos % 8)


class WholeBufferDecoder(kept.NarrowDecoder):
    """Attention sees all rows, those that were never written too."""

    def forward(self, ids):
        b, n = ids.shape
        q, k, v = self.layers[0].qkv(self.embed(ids, self.length))
        self.k0[:b, :, self.length : self.length + n] = k
        self.v0[:b, :, self.length : self.length + n] = v
        self.length += n
        y = torch.nn.functional.scaled_dot_product_attention(q, self.k0[:b], self.v0[:b])
        return self.head(y.transpose(1, 2).flatten(2))


class CountingDecoder(kept.KeepingDecoder):
    """Every other call is computed otherwise."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, ids):
        self.calls += 1
        return super().forward(ids) * (1 if self.calls % 2 else 2)


class LateDecoder(kept.NumberedDecoder):
    """The second call puts something more into the dict."""

    def forward(self, ids, kv_cache):
        if 0 in kv_cache:
            kv_cache["last"] = ids
        return super().forward(ids, kv_cache)[0]


class IndexedDecoder(kept.FixedDecoder):
    """A Python number says where a buffer of fixed size is written."""

    def forward(self, idx, start_pos: int):
        return super().forward(idx, torch.arange(start_pos, start_pos + idx.shape[1]))


class UsedFixedDecoder(kept.FixedDecoder):
    """The buffers hold what an earlier call wrote."""

    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.kv_cache.k_cache.fill_(1.0)


class RowsInPlace(kept.RowsAttention):
    """What was read of the buffer, or what was written to it, is changed in place afterwards."""

    after = "read"

    def forward(self, x, start_pos):
        b, n, _ = x.shape
        q, k = kept.heads(self.query(x)), self.key(x).view(b, n, kept.HEADS, -1)
        self.cache_k[:b, start_pos : start_pos + n] = k
        keys = self.cache_k[:b, : start_pos + n]
        if self.after == "read":
            keys.mul_(1.5)
        else:
            k.mul_(1.5)
        y = kept.attend(q, keys.transpose(1, 2), keys.transpose(1, 2))
        return self.out(y) + k.flatten(2)


class RowsWrittenThenChanged(RowsInPlace):
    after = "written"


class ReadInPlaceDecoder(kept.RowsDecoder):
    layer = RowsInPlace


class WrittenInPlaceDecoder(kept.RowsDecoder):
    layer = RowsWrittenThenChanged


def test_a_value_that_is_changed_after_it_was_written_is_not_changed_in_the_buffer() -> None:
    model = seeded(WrittenInPlaceDecoder)()
    own, rewritten = copy.deepcopy(model), cachefree.rewrite(model, (IDS, 0))
    assert any("rows written to it" in note for note in rewritten.report.notes)
    for start, tokens in ((0, IDS), (IDS.shape[1], TOKEN), (IDS.shape[1] + 1, TOKEN)):
        torch.testing.assert_close(rewritten(tokens, start), own(tokens, start))


def used() -> torch.nn.Module:
    model = seeded(kept.KeepingDecoder)()
    with torch.no_grad():
        model(IDS)
    return model


REFUSED = (
    ("ring", seeded(RingDecoder), (IDS, 0), ("start_pos",)),
    ("whole_buffer", seeded(WholeBufferDecoder), None, ("preallocated buffer", "test_lifting.py")),
    ("counting", seeded(CountingDecoder), None, ("calls",)),
    ("late", seeded(LateDecoder), None, ("last",)),
    ("indexed", seeded(IndexedDecoder), (IDS, 0), ("start_pos", "counts")),
    ("used_buffers", seeded(UsedFixedDecoder), (IDS, torch.arange(4)), ("zeros", "Reset")),
    ("changed", seeded(ReadInPlaceDecoder), (IDS, 0), ("layers.0.cache_k", "start_pos")),
    ("used", used, None, ("earlier call", "layers.0.cache_k", "Reset")),
    ("no_such_method", seeded(kept.SteppingDecoder), None, ("steps",)),
)


@pytest.mark.parametrize(("name", "build", "example", "says"), REFUSED, ids=lambda v: str(v)[:20])
def test_what_cannot_be_lifted_is_refused(name: str, build: Any, example: Any, says: Any) -> None:
    model = build()
    unchanged = Unchanged(model)
    options = {"method": "steps"} if name == "no_such_method" else {}
    with pytest.raises(cachefree.CacheFreeError) as caught:
        cachefree.rewrite(model, example, **options)
    unchanged.check()
    for text in says:
        assert text in str(caught.value), str(caught.value)
    says_what_to_do(caught.value)


def test_forward_that_raises_leaves_no_trace() -> None:
    class Raising(kept.KeepingDecoder):
        def forward(self, ids):
            super().forward(ids)
            raise RuntimeError("midway")

    model = seeded(Raising)()
    unchanged = Unchanged(model)
    with pytest.raises(CaptureError, match="midway"):
        cachefree.rewrite(model, (IDS,))
    unchanged.check()


class Switchable(torch.nn.Module):
    """Keeps its rows on itself, and reads what may be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rows = torch.nn.Embedding(33, 8), torch.nn.Linear(8, 8)
        self.cache: torch.Tensor | None = None
        self.shift: float | None = None
        self.scales = numpy.ones(1)

    def factor(self) -> float:
        return float(self.scales[0])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        rows = self.rows(x)
        self.cache = rows if self.cache is None else torch.cat([self.cache, rows], dim=1)
        y = x + self.cache.mean(1, keepdim=True) * self.factor()
        return y if self.shift is None else y + self.shift


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "shift", 2.0),
        lambda m: m.scales.fill(3.0),
        lambda m: setattr(m, "factor", lambda: 3.0),
        lambda m: setattr(m.rows, "forward", torch.tanh),
    ],
)
def test_a_model_that_keeps_its_cache_is_watched_too(change: Any) -> None:
    model = seeded(Switchable)()
    rewritten = cachefree.rewrite(model, (IDS,), progress=False)
    change(model)
    with torch.no_grad():
        model(IDS + 1)  # what it holds now is not what the graph starts from
        mine = [rewritten(IDS), rewritten(IDS[:, :1])]
        model.cache = None
        same(mine, [model(IDS), model(IDS[:, :1])])


class MovesItsTable(torch.nn.Module):
    """Puts a plain tensor where its input is, in every call; nothing is kept by that."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rows = torch.nn.Embedding(33, 8), torch.nn.Linear(8, 8)
        self.angles = torch.polar(torch.ones(32, 4), torch.arange(32.0)[:, None] / torch.ones(4))
        self.kept = torch.zeros(4, 32, 8)

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, start_pos: int) -> torch.Tensor:
        batch, length = ids.shape
        x = self.embed(ids)
        self.angles = self.angles.to(x.device)
        turned = torch.view_as_complex(self.rows(x).reshape(batch, length, -1, 2))
        turned = turned * self.angles[start_pos : start_pos + length]
        self.kept = self.kept.to(x)
        self.kept[:batch, start_pos : start_pos + length] = torch.view_as_real(turned).flatten(2)
        return x + self.kept[:batch, : start_pos + length].mean(1, keepdim=True)


def test_a_table_that_is_moved_in_every_call_is_no_state() -> None:
    model = seeded(MovesItsTable)()
    rewritten = cachefree.rewrite(model, (IDS, 0), progress=False)
    assert rewritten.report.verdict.is_proof
    mine = [rewritten(IDS, 0), rewritten(IDS[:, :2], IDS.shape[1])]
    same(mine, [model(IDS, 0), model(IDS[:, :2], IDS.shape[1])])
