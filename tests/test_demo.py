"""The demo, from training to equal tokens, with next to no training."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import cachefree
from cachefree.demo import SMALL, main
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


def test_the_readme_shows_the_report_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = Path(__file__).parent.parent / "README.md"
    monkeypatch.chdir(readme.parent)  # lines of code are told from there
    after = readme.read_text().split("What `make demo` prints for its GPT", 1)[1]
    shown = after.split("```\n", 2)[1]
    model = GPT(dataclasses.replace(SMALL, vocabulary=97)).eval()
    printed = str(cachefree.rewrite(model).report)
    took = re.compile(r"(?<=took ) +[\d.]+ s")
    assert took.sub(" …", shown.rstrip()) == took.sub(" …", printed)


@pytest.mark.slow
def test_it_runs_from_training_to_equal_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--steps", "2", "--tokens", "8", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "The tokens of torch and of ONNX Runtime are equal." in shown
    assert (tmp_path / "gpt-small.onnx").exists()
