"""Twenty frequent mistakes, and what is said to each: read it as a page.

Each mistake is the code of a user, and below it words of the message, in order. A message names the
line, says why, and says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cachefree

from .small import IDS, Small, rewritten_small, small

EXAMPLE = (IDS[:2, :3],)
MISTAKES: list[tuple[str, Callable[[], Any], str, tuple[str, ...]]] = []


def mistake(error: str, *says: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Puts a mistake on the page, with the error and words of its message."""

    def put(code: Callable[[], Any]) -> Callable[[], Any]:
        MISTAKES.append((code.__name__, code, error, says))
        return code

    return put


# ---------------------------------------------------------------- the call


@mistake(
    "CaptureError",
    "rewrite takes an nn.Module, not the class Small.",
    "do:",
    "Pass a model: cachefree.rewrite(Small(...)).",
)
def the_class_instead_of_a_model():
    cachefree.rewrite(Small)


@mistake(
    "CaptureError",
    "not TopLevelTracedModule of TorchScript",
    "Its Python code is gone",
    "Pass the model that was scripted or traced.",
)
def a_traced_model():
    cachefree.rewrite(torch.jit.trace(small(), EXAMPLE))


@mistake(
    "CacheNotFoundError",
    "The example inputs hold a cache already: past.",
    "Leave past out of example_inputs.",
)
def examples_with_a_cache():
    _, past = small()(*EXAMPLE)
    cachefree.rewrite(small(), (IDS[:2, 3:4], past))


@mistake(
    "CaptureError",
    "The model does not run with the example inputs.",
    "x = self.emb(ids)",
    "must be Tensor, not list",
    "A tensor is needed here, and this is list",
)
def lists_for_tensors():
    cachefree.rewrite(small(), ([[1, 2, 3]],))


@mistake(
    "CaptureError",
    "The model does not run with the example inputs.",
    "x = self.emb(ids)",
    "got torch.float32 instead",
)
def floats_for_token_numbers():
    cachefree.rewrite(small(), (torch.rand(2, 5),))


@mistake(
    "CacheNotFoundError",
    "The model's forward has no argument 'past_key_values'.",
    "the arguments are ids, past",
    "Name one of them.",
)
def another_name_for_the_cache():
    cachefree.rewrite(small(), EXAMPLE, cache="past_key_values")


@mistake("CaptureError", "Small has no method 'step'.", "do:    Name one method")
def a_method_that_is_not_there():
    cachefree.rewrite(small(), EXAMPLE, method="step")


@mistake(
    "CacheFreeError", "to_onnx takes what cachefree.rewrite gives, not Small.", "Rewrite first"
)
def export_of_the_model_itself():
    cachefree.to_onnx(small(), "decoder.onnx")


@mistake("CacheFreeError", "verify takes what cachefree.rewrite gives, not Small.", "Rewrite first")
def verify_with_the_model_itself():
    cachefree.verify(small(), small())


# ---------------------------------------------------------------- the model


@mistake(
    "CaptureError",
    "draws random numbers (aten.dropout.default)",
    "return F.dropout(super().attend(q, k), training=self.training)",
    "call model.eval()",
)
def training_mode():
    class Drops(Small):
        def attend(self, q, k):
            return F.dropout(super().attend(q, k), training=self.training)

    rewritten_small(small(Drops).train())


@mistake(
    "CacheNotFoundError",
    "No argument of Forgets.forward carries a cache.",
    "The arguments are ids, past.",
    "Name the argument with cache=",
    "return it from forward",
)
def a_cache_that_is_not_returned():
    class Forgets(Small):
        def forward(self, ids, past=None):
            return super().forward(ids, past)[0]

    rewritten_small(small(Forgets))


@mistake(
    "CaptureError",
    "The model's Python code depends on the values of a tensor.",
    "in forward",
    "n = int((ids > 0).sum(1).max().item())",
    "Compute it with tensor operators",
)
def a_length_from_values():
    class Cuts(Small):
        def forward(self, ids, past=None):
            n = int((ids > 0).sum(1).max().item())
            return super().forward(ids[:, :n], past)

    rewritten_small(small(Cuts))


@mistake(
    "CaptureError",
    "leaves torch: it makes an array of a tensor",
    "self.out.bias.detach().numpy()",
    "Compute it with torch.",
)
def numpy_in_forward():
    class Leaves(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            return logits * float(self.out.bias.detach().numpy().max()), present

    rewritten_small(small(Leaves))


@mistake(
    "CaptureError",
    "A size is turned into a Python number: query is frozen as",
    "for t in range(0, ids.shape[1], 2)",
    "loop over all tokens in steps of 1",
)
def a_loop_over_tokens():
    class Loops(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            rows = [logits[:, t] for t in range(0, ids.shape[1], 2)]
            return torch.stack(rows, dim=1), present

    rewritten_small(small(Loops))


@mistake(
    "CaptureError",
    "The model writes in place to 'past[0]'.",
    "past[0].mul_(0.5)",
    "Return the new value instead.",
)
def a_write_to_the_cache():
    class Writes(Small):
        def forward(self, ids, past=None):
            if past is not None:
                past[0].mul_(0.5)
            return super().forward(ids, past)

    rewritten_small(small(Writes))


@mistake(
    "CaptureError",
    "The model keeps state on itself",
    "'calls'",
    "Pass it in and return it",
)
def a_count_of_calls():
    class Counts(Small):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, ids, past=None):
            self.calls += 1
            logits, present = super().forward(ids, past)
            return (logits if self.calls < 90 else 2 * logits), present

    rewritten_small(small(Counts))


@mistake(
    "UnsupportedBranchError",
    "The later calls and the general path compute different things.",
    "logits = logits * 2",
    "the size is asked for at",
    "if ids.shape[1] == 1:",
)
def another_path_for_one_token():
    class OneToken(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            if ids.shape[1] == 1:
                logits = logits * 2
            return logits, present

    rewritten_small(small(OneToken))


@mistake(
    "UnsupportedBranchError",
    "The first call and later calls compute different things.",
    "logits = logits[:, -1:]",
    "first call: slice(",
    "Make the two paths compute the same where the cache is empty",
)
def the_last_row_of_the_first_call():
    class LastRow(Small):
        def forward(self, ids, past=None):
            logits, present = super().forward(ids, past)
            if past is None:
                logits = logits[:, -1:]
            return logits, present

    rewritten_small(small(LastRow))


@mistake(
    "CacheNotFoundError",
    "Several arguments could carry the cache: offset, total.",
    "Name the one with cache=.",
)
def states_with_names_of_their_own():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, total=None, offset=None):
            y = self.linear(x).cumsum(dim=1)
            y = y if total is None else y + total
            y = y if offset is None else y - offset
            return y, y[:, -1:]

    cachefree.rewrite(Sums().eval(), (torch.zeros(2, 5, 3),))


@mistake(
    "CaptureError",
    "The model holds tensors of an earlier call: k.",
    "A first call starts from what the model is when it is rewritten.",
    "Reset the model before it is rewritten.",
)
def a_model_that_was_called_before():
    class Keeps(Small):
        def __init__(self):
            super().__init__()
            self.k = None

        def forward(self, ids):
            x = self.emb(ids)
            self.k = x if self.k is None else torch.cat([self.k, x], dim=1)
            return self.out(self.k.cumsum(dim=1)[:, -ids.shape[1] :])

    model = small(Keeps)
    model(IDS)
    rewritten_small(model)


# ---------------------------------------------------------------- the rewritten model


@pytest.fixture(scope="module")
def rewritten() -> cachefree.Rewritten:
    return rewritten_small(small())


CALLS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "the cache of another batch": (
        lambda decoder: decoder(IDS[:1], decoder(IDS)[1]),
        ("past[0] has size 3 on axis 0 where batch = 1 is expected", "(batch, past, 6)"),
    ),
    "half of the cache": (
        lambda decoder: decoder(IDS, decoder(IDS)[1][:1]),
        ("past has 1 entries where 2 are expected",),
    ),
    "another dtype": (
        lambda decoder: decoder(IDS.float()),
        ("ids is torch.float32 where torch.int64 is expected",),
    ),
    "an argument that was not there": (
        lambda decoder: decoder(IDS, mask=IDS),
        ("unexpected keyword argument 'mask'", "rewrite again with such inputs"),
    ),
    "no input": (lambda decoder: decoder(), ("The argument 'ids' is missing.",)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_outside_the_domain(name: str, rewritten: cachefree.Rewritten) -> None:
    call, says = CALLS[name]
    with pytest.raises(cachefree.DomainError) as caught:
        call(rewritten)
    assert_says(str(caught.value), says)


@pytest.mark.parametrize(
    ("name", "code", "error", "says"), MISTAKES, ids=[name for name, *_ in MISTAKES]
)
def test_what_is_said(
    name: str,
    code: Callable[[], Any],
    error: str,
    says: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cachefree.CacheFreeError) as caught:
        code()
    assert type(caught.value).__name__ == error, str(caught.value)
    assert_says(str(caught.value), says)
    assert not list(tmp_path.iterdir())


def assert_says(message: str, says: tuple[str, ...]) -> None:
    at = 0
    for words in says:
        assert words in message[at:], f"{words!r} is not said, or not there, in:\n{message}"
        at = message.index(words, at)
    first, *_ = message.splitlines()
    assert not re.search(r"Proxy|SymInt|FakeTensor|aten\._local|s\d\d", first), message
    assert "do:" in message or len(says) < 2, message


def test_there_are_twenty() -> None:
    assert len(MISTAKES) >= 20


def test_what_nobody_foresaw_has_a_sentence_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    def fails(*args: Any, **kwargs: Any) -> None:
        raise KeyError("deep inside of torch")

    small_model = small()
    cachefree.rewrite  # noqa: B018 - the import of its file
    monkeypatch.setattr(sys.modules["cachefree.paths"], "find_subject", fails)
    with pytest.raises(cachefree.CaptureError) as caught:
        cachefree.rewrite(small_model, EXAMPLE)
    assert_says(
        str(caught.value),
        ("could not be rewritten", "KeyError: 'deep inside of torch'", "do:"),
    )
    assert isinstance(caught.value.__cause__, KeyError)
