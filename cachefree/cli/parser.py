"""What the command line takes. Nothing here imports torch, so that ``--help`` is there at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

__all__ = ["DIFFERENT", "INTERRUPTED", "MISSING", "OK", "WRONG", "WrongWordsError", "make_parser"]

OK, DIFFERENT, WRONG, MISSING, INTERRUPTED = 0, 1, 2, 3, 130

_CODES = """\
exit codes:
  0    done
  1    the model was refused, something differs, or the command failed
  2    the arguments are wrong, the model could not be loaded, or a path cannot be written
  3    a package or a part that the command needs is not installed
  130  interrupted; nothing half-written is left
"""

_SOURCE = """\
MODEL is one of
  package.module:factory     a function that makes the model, its class, or the model itself
  path/to/file.py:factory    the same in a file
  path/to/folder             a folder with transformers' config.json, with or without weights
A factory may also return (model, example_inputs).
"""

_EXAMPLES = {
    "demo": "cachefree demo\ncachefree demo --large",
    "explain": "cachefree explain decoder.py:make_model\n"
    "cachefree explain my_package.models:Decoder --html why.html",
    "rewrite": "cachefree rewrite decoder.py:make_model\n"
    "cachefree rewrite decoder.py:make_model --input ids=int64[2,5] --svg paths.svg\n"
    "cachefree rewrite ./my-checkpoint --json | jq .verdict",
    "verify": "cachefree verify decoder.py:make_model\n"
    "cachefree verify ./my-checkpoint --examples 20 --backend eager",
    "export": "cachefree export decoder.py:make_model -o decoder.onnx\n"
    "cachefree export ./my-checkpoint -o onnx-folder --names genai",
    "check": "cachefree check decoder.py:make_model\ncachefree check decoder.onnx.certificate.json",
    "completion": 'eval "$(cachefree completion bash)"\n'
    "cachefree completion fish > ~/.config/fish/completions/cachefree.fish",
}


class WrongWordsError(Exception):
    """The parser does not know a word, misses one, or does not take a value."""

    def __init__(self, usage: str, message: str) -> None:
        super().__init__(message)
        self.usage = usage


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WrongWordsError(self.format_usage(), f"{self.prog}: error: {message}")


def make_parser(version: str) -> argparse.ArgumentParser:
    """The parser of all commands; it raises `WrongWordsError`."""
    parser = _Parser(
        prog="cachefree",
        description="One graph for a decoder's first call and for every call with a cache.",
        epilog=f"examples:\n{_indented(_EXAMPLES['rewrite'])}\n\n{_SOURCE}\n{_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cachefree {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"examples:\n{_indented(_EXAMPLES[name])}\n\n"
            f"{'' if name in ('demo', 'completion') else _SOURCE + chr(10)}{_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name != "completion":
            added.add_argument("--json", action="store_true", help="plain values on stdout")
        return added

    _demo(command("demo", "train a small GPT, rewrite it, export it, generate text twice"))
    _explain(command("explain", "say what differs between a model's paths, or why it is refused"))
    _rewrite(command("rewrite", "rewrite a model and print the report"))
    _verify(command("verify", "compare a model, its one graph and ONNX Runtime on random calls"))
    _export(command("export", "rewrite a model and write it as ONNX"))
    _check(command("check", "replay the steps of a proof with an independent checker"))
    completion = command("completion", "print a script that completes this command in a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="where the model is, see below")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=DTYPE[SIZES]",
        help="an input of the first call, such as ids=int64[2,5]; found by itself where left out",
    )
    parser.add_argument(
        "--cache", action="append", metavar="NAME", help="the argument that carries the cache"
    )
    parser.add_argument(
        "--method",
        default="forward",
        metavar="NAME[,NAME]",
        help="the method that is called; two where the first call has one of its own",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python files of a transformers folder",
    )


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--large", action="store_true", help="124 million random weights instead")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="where the file goes")
    parser.add_argument("--steps", type=_positive(int), default=350, help="steps of training")


def _explain(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _pages(parser)


def _rewrite(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _pages(parser)
    parser.add_argument("--details", action="store_true", help="every branch, slot and step")
    _how_to_check(parser)


def _verify(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _how_to_check(parser)
    parser.add_argument(
        "--examples", type=_positive(int), default=100, metavar="N", help="generations to draw"
    )
    parser.add_argument("--seed", type=int, help="for the same generations again")
    parser.add_argument(
        "--backend",
        action="append",
        choices=("eager", "onnxruntime"),
        help="what to compare with the model; both where left out",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=("own", "float64", "float32", "float16", "bfloat16"),
        help="what the model is cast to as well, beside its own dtype; all where left out",
    )


def _export(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _how_to_check(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="a file that ends in .onnx, or a folder"
    )
    parser.add_argument("--names", choices=("optimum", "genai", "model"), default="optimum")
    parser.add_argument("--opset", type=int, help="the ONNX opset")


def _check(parser: argparse.ArgumentParser) -> None:
    _model(parser)


def _pages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", type=Path, metavar="FILE", help="the report as a page")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="both paths side by side")


def _how_to_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accept",
        choices=("prove", "test", "off"),
        default="prove",
        help="what is enough: a proof (default), random tests, or nothing",
    )


def _positive(kind: Callable[[str], int]) -> Callable[[str], int]:
    def positive(text: str) -> int:
        number = kind(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"{number} is less than 1")
        return number

    return positive


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
