"""What stands behind ``*args`` and ``**kwargs``."""

from __future__ import annotations

import torch
from torch import nn

import cachefree
from cachefree.signatures import signature_of

from .small import IDS, Small, small


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Small()

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wrapped = Wrapper()

    def forward(self, ids, scale: float = 2.0, **kwargs):
        logits, past = self.wrapped(ids, **kwargs)
        return logits * scale, past


class Keywords(Small):
    def forward(self, **kwargs):
        logits, present = super().forward(kwargs["input_ids"], kwargs.get("past_key_values"))
        return {"logits": logits, "past_key_values": present}


class Unread(nn.Module):
    def forward(self, ids, **kwargs):
        return ids


def test_the_parameters_behind() -> None:
    assert list(signature_of(Wrapper()).parameters) == ["ids", "past", "kwargs"]
    assert list(signature_of(Scaled()).parameters) == ["ids", "scale", "past", "kwargs"]
    assert signature_of(Scaled()).parameters["past"].kind.name == "KEYWORD_ONLY"
    keywords = signature_of(Keywords()).parameters
    assert list(keywords) == ["input_ids", "past_key_values", "kwargs"]
    assert keywords["past_key_values"].default is None
    assert keywords["input_ids"].default is keywords["input_ids"].empty
    assert list(signature_of(Unread()).parameters) == ["ids", "kwargs"]
    assert list(signature_of(Small()).parameters) == ["ids", "past"]
    assert list(signature_of(torch.compile(Small())).parameters) == ["ids", "past"]


def test_wrappers_are_rewritten_without_examples() -> None:
    for build, take in ((Wrapper, "past"), (Scaled, "past"), (Keywords, "past_key_values")):
        model = small(build)
        rewritten = cachefree.rewrite(model)
        name = "input_ids" if build is Keywords else "ids"
        first = model(**{name: IDS[:, :3]})
        past = first["past_key_values"] if build is Keywords else first[1]
        later = {name: IDS[:, 3:], take: past}
        expected, found = model(**later), rewritten(**later)
        if build is Keywords:
            expected, found = tuple(expected.values()), tuple(found.values())
        torch.testing.assert_close(found[0], expected[0])
