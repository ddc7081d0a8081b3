"""Arguments that the first call alone reads: later calls may leave them out, or pass None."""

from __future__ import annotations

import pytest
import torch

import cachefree

from .assertions import says_what_to_do
from .models.case import seeded
from .models.first_call import FEATURES, IDS, AsksAgain, Captioner, Translator, source_ids
from .small import Small, small

EXAMPLE = (IDS, torch.zeros(2, 5, dtype=torch.long))
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def model():
    return seeded(Translator)()


@pytest.fixture(scope="module")
def rewritten(model):
    return cachefree.rewrite(model, EXAMPLE)


@pytest.mark.parametrize(
    "later", [(), (None,), (source_ids(2),)], ids=["left out", "None", "given"]
)
def test_a_later_call_without_it(model, rewritten, later) -> None:
    source = source_ids(2)
    own = model(TOKENS[:, :3], source)[1]
    cache = rewritten(TOKENS[:, :3], source)[1]
    due, _ = model(TOKENS[:, 3:], past=own)
    logits, _ = rewritten(TOKENS[:, 3:], *later, past=cache)
    torch.testing.assert_close(logits, due)


def test_a_first_call_has_to_give_it(rewritten) -> None:
    empty = rewritten.empty_cache(batch_size=2)
    calls = (
        lambda: rewritten(TOKENS),
        lambda: rewritten(TOKENS, None),
        lambda: rewritten(TOKENS, None, empty),
    )
    for call in calls:
        with pytest.raises(cachefree.DomainError, match="The argument 'source' is missing"):
            call()


def test_what_chooses_a_later_path_is_not_left_out() -> None:
    model = seeded(AsksAgain)()
    rewritten = cachefree.rewrite(model, EXAMPLE)
    source = source_ids(2)
    cache = rewritten(TOKENS[:, :3], source)[1]
    with pytest.raises(cachefree.DomainError, match="The argument 'source' is missing"):
        rewritten(TOKENS[:, 3:], past=cache)
    own = model(TOKENS[:, :3], source)[1]
    due = model(TOKENS[:, 3:], source, own)[0]
    torch.testing.assert_close(rewritten(TOKENS[:, 3:], source, cache)[0], due)


def test_an_empty_state_is_no_reason_to_leave_it_out() -> None:
    rewritten = cachefree.rewrite(seeded(Captioner)(), (IDS, torch.zeros(2, 5, FEATURES)))
    with pytest.raises(cachefree.DomainError, match="The argument 'features' is missing"):
        rewritten(TOKENS, None, rewritten.empty_cache(batch_size=2))


class Scaled(Small):
    def forward(self, ids, past=None, scale=1.0, use_cache=False):
        logits, cache = super().forward(ids, past)
        return logits * scale, cache if use_cache else None


def test_a_number_that_is_no_default_is_not_left_out() -> None:
    model = small(Scaled)
    example = {"ids": TOKENS[:, :3], "scale": 2.0, "use_cache": True}
    rewritten = cachefree.rewrite(model, example)
    says = r"(?s)'scale' is missing.*Give scale=2\.0"
    with pytest.raises(cachefree.DomainError, match=says) as raised:
        rewritten(TOKENS)
    says_what_to_do(raised.value)
    with pytest.raises(cachefree.DomainError, match=r"scale is float 1\.0 where float 2\.0"):
        rewritten(TOKENS, scale=1.0)
    torch.testing.assert_close(rewritten(TOKENS, scale=2.0)[0], model(TOKENS, scale=2.0)[0])


def test_the_flag_that_gives_the_cache_is_left_out() -> None:
    model = small(Scaled)
    rewritten = cachefree.rewrite(model, {"ids": TOKENS[:, :3], "use_cache": True})
    logits, cache = rewritten(TOKENS)
    due, own = model(TOKENS, use_cache=True)
    torch.testing.assert_close((logits, cache), (due, own))


class PictureFirst(torch.nn.Module):
    """A state that starts from a picture, which a convolution without padding sees."""

    def __init__(self):
        super().__init__()
        self.see = torch.nn.Sequential(
            torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
        )
        self.embed, self.rnn = torch.nn.Embedding(11, 6), torch.nn.GRU(6, 6, batch_first=True)

    def forward(self, caption, picture=None, state=None):
        if state is None:
            state = self.see(picture).flatten(1)[None]
        return self.rnn(self.embed(caption), state)


def test_a_picture_that_is_left_out_is_as_large_as_the_example() -> None:
    """A picture of one pixel would be too small for the convolution, which later calls run too."""
    model = seeded(PictureFirst)().double()
    caption, picture = torch.zeros(2, 4, dtype=torch.long), torch.rand(2, 3, 8, 9).double()
    rewritten = cachefree.rewrite(model, {"caption": caption, "picture": picture})
    assert rewritten.report.verdict.name == "PROVED_EXACT"
    for pixels in (3, 7):
        seen = torch.rand(3, 3, pixels, pixels + 1).double()
        ids = torch.arange(6).view(3, 2)
        one, other = rewritten(ids, picture=seen), model(ids, picture=seen)
        torch.testing.assert_close(one, other)
        one, other = (call(ids + 1, state=other[1]) for call in (rewritten, model))
        torch.testing.assert_close(one, other)
    with pytest.raises(cachefree.DomainError):
        rewritten(ids, picture=torch.rand(3, 3, 2, 5).double())
