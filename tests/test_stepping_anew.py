"""First calls that loop over the tokens, and later ones that go on for one token alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cachefree

from .small import small

KERNEL = 4
State = tuple[torch.Tensor, torch.Tensor]


class Selective(nn.Module):
    """Rows before the tokens are padded; several tokens start from zeros, whatever the state is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.kernel = nn.Parameter(torch.linspace(-1, 1, 6 * KERNEL).view(6, 1, KERNEL))
        self.rate = nn.Parameter(torch.linspace(-1, 0, 6))
        self.scale = nn.Parameter(torch.linspace(0.5, 1, 6))

    def step(self, state: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        state.copy_((state.float() * torch.exp(self.rate) + row * self.scale).to(state.dtype))
        return state

    def forward(self, ids: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        x = self.embed(ids).transpose(1, 2)
        new = x.shape[2]
        if state is not None and new == 1:
            rows = torch.cat([state[0], x], -1)
            y = F.silu(F.conv1d(rows, self.kernel, groups=6)[..., -1:])
            hidden = self.step(state[1], y[..., 0])
            return (hidden + y[..., 0]).unsqueeze(1), (rows[..., -KERNEL:], hidden)
        rows = x if state is None else torch.cat([state[0], x], -1)
        if rows.shape[-1] < KERNEL:
            rows = F.pad(rows, (KERNEL - rows.shape[-1], 0))
        y = F.conv1d(rows, self.kernel, padding=KERNEL - 1, groups=6)[..., : rows.shape[-1]]
        y = F.silu(y)[..., -new:]
        decay = torch.exp(self.rate[None, :, None])
        inner = y * self.scale[None, :, None]
        hidden, outputs = torch.zeros(x.shape[0], 6), []
        for t in range(new):
            hidden = decay[:, :, 0] * hidden + inner[:, :, t]
            outputs.append(hidden)
        whole = torch.stack(outputs, -1) + y
        return whole.transpose(1, 2), (rows[..., -KERNEL:], hidden)


class Forgetful(Selective):
    """Its step takes more of each row than the loop does."""

    def step(self, state: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return super().step(state, row * 1.5)


class WrittenBack(Selective):
    """What its loop has carried is written to the place where the state is kept."""

    def forward(self, ids: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        y, (rows, hidden) = super().forward(ids, state)
        kept = torch.zeros_like(hidden) if state is None else state[1]
        kept.copy_(hidden)
        return y, (rows, kept)


@pytest.mark.slow
@pytest.mark.parametrize("build", [Selective, WrittenBack])
def test_the_loop_goes_on_from_the_cache_for_one_token(build: type[Selective]) -> None:
    model = small(build)
    rewritten = cachefree.rewrite(model, (torch.randint(17, (2, 3)),))
    assert rewritten.report.verdict.name == "PROVED_REAL"
    regions = [str(region) for region in rewritten.report.domain.regions]
    assert regions == ["first call: every size", "later calls: Eq(query, 1)"]
    ids = torch.randint(17, (2, 9))
    for length in (1, 2, 3, 6):
        mine, own = rewritten(ids[:, :length]), model(ids[:, :length])
        for at in range(length, 9):
            torch.testing.assert_close(mine, own)
            mine, own = (run(ids[:, at : at + 1], at_end(past)) for run, past in
                         ((rewritten, mine[1]), (model, own[1])))  # fmt: skip


def at_end(state: Any) -> Any:
    return tuple(part.clone() for part in state)


class Windowed(Selective):
    """The convolution alone: its later calls of one token leave out the tokens' dimension."""

    def forward(  # type: ignore[override]
        self, ids: torch.Tensor, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(ids).transpose(1, 2)
        new = x.shape[2]
        if state is not None and new == 1:
            rows = torch.cat([state, x], -1)
            y = F.silu(F.conv1d(rows, self.kernel, groups=6)[..., -1])
            return (y * self.scale).unsqueeze(1), rows[..., -KERNEL:]
        rows = x if state is None else torch.cat([state, x], -1)
        if rows.shape[-1] < KERNEL:
            rows = F.pad(rows, (KERNEL - rows.shape[-1], 0))
        y = F.conv1d(rows, self.kernel, padding=KERNEL - 1, groups=6)[..., : rows.shape[-1]]
        y = F.silu(y)[..., -new:] * self.scale[None, :, None]
        return y.transpose(1, 2), rows[..., -KERNEL:]


@pytest.mark.slow
def test_a_part_of_an_activation_is_replayed() -> None:
    rewritten = cachefree.rewrite(small(Windowed), (torch.randint(17, (2, 3)),))
    assert "slice-of-activation" in {*rewritten.report.laws}
    replayed = cachefree.check_certificate(rewritten.certificate, rewritten)
    assert "slice-of-activation" not in replayed.trusted


@pytest.mark.slow
def test_a_step_that_is_no_round_of_the_loop_is_refused() -> None:
    with pytest.raises(cachefree.CacheFreeError, match="compute different things"):
        cachefree.rewrite(small(Forgetful), (torch.randint(17, (2, 3)),))
