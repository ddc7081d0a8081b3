"""A model that reads its own attributes by a function which its file knows by another name."""

from __future__ import annotations

import operator

from tests.small import Small

asked = operator.attrgetter


class AskedByAnotherName(Small):
    def __init__(self):
        super().__init__()
        self.held = store = {}

        def hook(*_):
            store["last"] = 1

        self.emb.register_forward_hook(hook)

    def forward(self, ids, past=None):
        was_called = bool(asked("he{}".format("ld"))(self))
        logits, present = super().forward(ids, past)
        return (logits * 2 if was_called else logits), present
