"""The command line, from words to an exit code."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import cachefree
from cachefree import demo
from cachefree.cli import commands, main
from cachefree.cli.completion import script
from cachefree.demo_model import GPT, GPTConfig
from cachefree.onnx import writing
from cachefree.onnx.storage import UnwritableError

from .small import rewritten_small, small

DECODER = """
import torch
from tests.models.encoder_decoder import SpeechTranslator
from tests.small import IDS, Small

print("said by the user's module")


class Loud(Small):
    pass


def make():
    return Small().eval()


def with_inputs():
    return Small(), (IDS[:2, :3],)


def encodes():
    return SpeechTranslator(), {"features": torch.zeros(2, 7, 5), "tokens": IDS[:2, :3]}


def needs_words(words):
    return Small()


def raises():
    raise ValueError("no weights here")


class Refused(Small):
    def forward(self, ids, past=None):
        logits, present = super().forward(ids, past)
        return logits + torch.randn_like(logits), present


NUMBER = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "decoder_of_test.py").write_text(DECODER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("decoder_of_test", None)
    return tmp_path


@pytest.fixture(scope="module")
def one_graph() -> cachefree.Rewritten:
    return rewritten_small(small())


FILE = "decoder_of_test.py"


def test_rewrite_prints_the_report_and_writes_pages(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rewrite", f"{FILE}:make", "--input", "ids=int64[2,3]"]
    assert main([*words, "--html", "report.html", "--svg", "paths.svg"]) == 0
    shown = capsys.readouterr()
    assert "PROVED_EXACT" in shown.out
    assert not shown.err, "quiet where nobody watches"
    assert "<details" in (folder / "report.html").read_text()
    assert (folder / "paths.svg").read_text().startswith("<svg")
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {
        FILE,
        "report.html",
        "paths.svg",
    }


def test_json_is_all_that_stdout_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewrite", "decoder_of_test:with_inputs", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["verdict"] == "PROVED_EXACT"
    assert "said by the user's module" in shown.err


def test_a_refused_model_is_1_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewrite", f"{FILE}:Refused"]) == 1
    shown = capsys.readouterr()
    assert "CaptureError: The path draws random numbers" in shown.err
    assert f"{FILE}:" in shown.err
    assert "cachefree explain" in shown.err
    assert main(["explain", f"{FILE}:Refused", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["error"] == "CaptureError"
    assert told["refusals"][0]["line"] == 1 + DECODER.splitlines().index(
        "        return logits + torch.randn_like(logits), present"
    )
    assert main(["rewrite", f"{FILE}:Refused", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "CaptureError"


@pytest.mark.parametrize(
    "words", [["rewrite", "--html"], ["rewrite", "--svg"], ["export", "-o"]], ids=" ".join
)
@pytest.mark.parametrize("place", ["absent", FILE])
def test_a_path_that_cannot_be_written_is_no_matter_of_the_model(
    words: list[str],
    place: str,
    one_graph: cachefree.Rewritten,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commands, "_rewritten", lambda *_: one_graph)
    command, option = words
    called = [command, f"{FILE}:make", option, f"{place}/decoder.onnx"]
    assert main(called) == 2
    shown = capsys.readouterr().err
    assert f"UnwritableError: {place}/decoder.onnx cannot be written." in shown
    assert "cachefree explain" not in shown
    assert "Traceback" not in shown
    assert main([*called, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["error"] == "UnwritableError"
    assert told["refusals"][0]["what"] == f"{place}/decoder.onnx cannot be written."


@pytest.mark.parametrize("command", ["rewrite", "explain", "export", "verify"])
def test_what_nobody_foresaw_is_told_in_a_sentence_before_the_trace(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(options):
        raise AssertionError("of torch's own")

    monkeypatch.setitem(commands.COMMANDS, command, fails)
    words = [command, FILE, *(["-o", "x.onnx"] if command == "export" else [])]
    assert main(words) == 1
    shown = capsys.readouterr().err
    said = f"`cachefree {command}` failed, for a reason that cachefree does not know."
    assert shown.startswith(f"CacheFreeError: {said}\n")
    assert "AssertionError: of torch's own" in shown.split("Traceback")[0]
    assert 'raise AssertionError("of torch' in shown.split("Traceback")[1]
    assert main([*words, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["refusals"][0]["what"] == said


def test_export_lists_what_it_wrote_and_nothing_else(
    folder: Path,
    one_graph: cachefree.Rewritten,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commands, "_rewritten", lambda *_: one_graph)
    for name in ("decoder.py", "decoder.onnx.bak", "decoder-old.onnx"):
        (folder / name).write_text(DECODER)
    before = set(folder.iterdir())
    words = ["export", "decoder.py:with_inputs", "-o", "decoder.onnx"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == "decoder.onnx"
    assert told["files"] == ["decoder.onnx", "decoder.onnx.data"]
    new = {path.name for path in set(folder.iterdir()) - before} - {"__pycache__"}
    assert new == set(told["files"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rewrite", "absent_module:make"], "no module, file or folder 'absent_module'"),
        (["rewrite", "absent.py:make"], "There is no file absent.py"),
        (["rewrite", f"{FILE}:absent"], "Its models are Loud, Refused"),
        (
            ["rewrite", f"{FILE}:absent"],
            "without arguments are make, with_inputs, encodes, raises",
        ),
        (["rewrite", FILE], "is named without a factory"),
        (["rewrite", FILE], f"Name one: {FILE}:make."),
        (["rewrite", f"{FILE}:needs_words"], "a function without arguments"),
        (["rewrite", f"{FILE}:raises"], "raises ValueError: no weights here"),
        (["rewrite", f"{FILE}:NUMBER"], "is int, and no model"),
        (["rewrite", f"{FILE}:make", "--input", "ids=2,5"], "--input ids=int64[2,5]"),
        (["rewrite", "."], "has no config.json"),
        (["rewrite"], "MODEL"),
        (["rewrote"], "invalid choice"),
        (["verify", f"{FILE}:make", "--examples", "0"], "less than 1"),
        ([], "COMMAND"),
    ],
)
def test_what_cannot_be_loaded_is_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_verify_and_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hypothesis")
    words = [f"{FILE}:with_inputs"]
    assert main(["verify", *words, "--examples", "2", "--backend", "eager", "--dtype", "own"]) == 0
    assert "no difference from the model" in capsys.readouterr().out
    assert main(["export", f"{FILE}:encodes", "-o", "folder", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == "folder/decoder_model_merged.onnx"
    assert set(told["files"]) == {str(path) for path in Path("folder").iterdir()}
    assert "folder/encoder_model.onnx" in told["files"]


def test_check_says_where_there_is_no_checker(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(cachefree._HOMES, "check_certificate", raising=False)
    assert main(["check", f"{FILE}:with_inputs"]) == 3
    assert "no checker of certificates" in capsys.readouterr().err


def test_check_hands_the_proof_to_the_checker(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    checked = []

    def checker(certificate):
        checked.append(certificate)
        return "7 steps replayed"

    monkeypatch.setattr(cachefree, "check_certificate", checker, raising=False)
    (folder / "saved.certificate.json").write_text("{}")
    assert main(["check", "saved.certificate.json"]) == 0
    assert main(["check", f"{FILE}:with_inputs"]) == 0
    assert checked[0] == Path("saved.certificate.json")
    assert isinstance(checked[1], cachefree.Rewritten)
    assert "7 steps replayed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_transformers_folder_is_rewritten_without_weights(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    small = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=64)
    small.save_pretrained(folder / "checkpoint")
    assert main(["rewrite", "checkpoint", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "GPT2LMHeadModel"
    assert told["verdict"].startswith("PROVED")


def _written_by(folder: Path, version: str) -> None:
    (folder / "checkpoint").mkdir()
    told = {"model_type": "llama", "transformers_version": version}
    (folder / "checkpoint" / "config.json").write_text(json.dumps(told))


def test_a_folder_without_transformers_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _written_by(folder, "5.23.0")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["rewrite", "checkpoint"]) != 0
    assert "A folder needs transformers." in capsys.readouterr().err


def test_a_folder_for_a_later_transformers_tells_both_versions(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _written_by(folder, "5.23.0")
    old = types.ModuleType("transformers")
    old.__version__ = "2.1.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", old)
    assert main(["rewrite", "checkpoint"]) != 0
    shown = capsys.readouterr().err
    assert "transformers does not load checkpoint: AttributeError" in shown
    assert "It is version 2.1.1, and the folder was written by 5.23.0." in shown


@pytest.mark.parametrize("words", [["rewrote"], ["rewrite"], ["verify", "a:b", "--seed", "x"]])
def test_wrong_words_are_plain_values_too(words: list[str], capsys) -> None:
    assert main([*words, "--json"]) == 2
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told["error"] == "WrongWordsError"
    assert "cachefree" in told["refusals"][0]["what"]
    assert told["refusals"][0]["remedy"].startswith("usage: cachefree")
    assert shown.err == ""


@pytest.mark.parametrize("command", ["", "rewrite", "export", "check", "completion", "demo"])
def test_help_has_examples_and_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"] if command else ["--help"]) == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert "exit codes:" in shown
    assert "130  interrupted" in shown


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from cachefree.cli import main; code = main(['export', '--help']);"
        "assert code == 0; assert 'torch' not in sys.modules, 'torch was imported'"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=_here())
    assert time.perf_counter() - started < 10


def _here() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(cachefree.__file__).parent.parent)}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_the_shell_reads(shell: str, tmp_path: Path) -> None:
    text = script(shell)
    for word in ("rewrite", "explain", "--svg" if shell != "fish" else "svg", "genai"):
        assert word in text
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(text)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_choices() -> None:
    program = script("bash") + (
        '\nCOMP_WORDS=(cachefree ex); COMP_CWORD=1; _cachefree; echo "${COMPREPLY[@]}"'
        "\nCOMP_WORDS=(cachefree export --names g); COMP_CWORD=3; _cachefree"
        '\necho "${COMPREPLY[@]}"'
    )
    found = subprocess.run(["bash", "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.split("\n")[:2] == ["explain export", "genai"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes_commands_and_choices() -> None:
    for words, expected in (("cachefree ex", "explain"), ("cachefree export --names g", "genai")):
        program = f"{script('fish')}\ncomplete -C '{words}'"
        found = subprocess.run(["fish", "-c", program], check=True, capture_output=True, text=True)
        assert expected in found.stdout.split()


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes_commands_and_choices(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script("zsh"))
    typed = [
        "autoload -U compinit && compinit -u -D\n",
        f"source {tmp_path / 'script'}\n",
        "echo said-$((40 + 2))\n",
        "cachefree expo\t --na\t gen\t",
    ]
    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover
        os.execvpe("zsh", ["zsh", "-f"], {**os.environ, "TERM": "dumb"})
    shown = ""
    try:
        for line, answer in zip(typed, ("", "", "said-42", "--names genai"), strict=True):
            os.write(terminal, line.encode())
            end = time.monotonic() + 30
            while answer not in shown and time.monotonic() < end:
                if select.select([terminal], [], [], 0.1)[0]:
                    shown += os.read(terminal, 4096).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)
    assert "cachefree export --names genai" in shown


def few_steps(large: bool, steps: int) -> tuple[GPT, torch.Tensor, object]:
    model = GPT(GPTConfig(vocabulary=11, context=16, layers=1, heads=2, width=8)).eval()
    return model, torch.zeros(1, 3, dtype=torch.long), str


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "words",
    [
        ["export", f"{FILE}:with_inputs", "-o", "decoder.onnx"],
        ["export", f"{FILE}:with_inputs", "-o", "of/folders"],
        ["demo"],
    ],
    ids=["file", "folder", "demo"],
)
def test_an_interrupt_leaves_nothing_behind(
    words: list[str],
    number: signal.Signals,
    folder: Path,
    one_graph: cachefree.Rewritten,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("nobody was interrupted")

    before = {path.name for path in folder.rglob("*")}
    monkeypatch.setattr(writing, "_write", interrupted)
    monkeypatch.setattr(cachefree, "rewrite", lambda *_, **__: one_graph)
    monkeypatch.setattr(demo, "prepare", few_steps)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        assert main(words) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "interrupted" in capfd.readouterr().err
    after = {path.name for path in folder.rglob("*") if "__pycache__" not in path.parts}
    assert after == before


def test_an_interrupt_leaves_a_folder_that_was_there(
    folder: Path, one_graph: cachefree.Rewritten, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    (folder / "mine").mkdir()
    monkeypatch.setattr(writing, "_write", interrupted)
    for path in ("mine", "mine/new"):
        with pytest.raises(KeyboardInterrupt):
            cachefree.to_onnx(one_graph, path)
    assert list((folder / "mine").rglob("*")) == []


def test_a_file_where_a_folder_has_to_be(folder: Path, one_graph: cachefree.Rewritten) -> None:
    for path in (FILE, f"{FILE}/inside"):
        with pytest.raises(UnwritableError, match=r"decoder_of_test.* cannot be written"):
            cachefree.to_onnx(one_graph, path)
    assert (folder / FILE).read_text() == DECODER
