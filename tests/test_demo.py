"""The demo, from training to equal tokens, with next to no training."""

from pathlib import Path

import pytest
import torch

from cachefree.demo import main
from cachefree.demo_model import GPT, GPTConfig


def test_its_model_gives_in_chunks_what_it_gives_at_once() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocabulary=11, context=16, layers=2, heads=2, width=8)).eval()
    ids = torch.randint(11, (2, 9))
    with torch.no_grad():
        at_once, _ = model(ids)
        first, past = model(ids[:, :4])
        second, past = model(ids[:, 4:5], past)
        third, _ = model(ids[:, 5:], past)
    torch.testing.assert_close(torch.cat([first, second, third], dim=1), at_once)


@pytest.mark.slow
def test_it_runs_from_training_to_equal_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--steps", "2", "--tokens", "8", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "The tokens of torch and of ONNX Runtime are equal." in shown
    assert (tmp_path / "gpt-small.onnx").exists()
