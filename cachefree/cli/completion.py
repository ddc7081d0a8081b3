"""Scripts that complete the command in a shell, written from the parser itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from cachefree.cli.parser import make_parser

__all__ = ["script"]


def script(shell: str) -> str:
    """The script for ``bash``, ``zsh`` or ``fish``."""
    commands = dict(_commands())
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def _commands() -> Iterator[tuple[str, list[argparse.Action]]]:
    (subparsers,) = [
        action
        for action in make_parser("")._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    for name, parser in subparsers.choices.items():
        yield (
            name,
            [action for action in parser._actions if action.option_strings or action.choices],
        )


def _options(actions: list[argparse.Action]) -> list[str]:
    return [option for action in actions for option in action.option_strings]


def _bash(commands: dict[str, list[argparse.Action]]) -> str:
    lines = [
        "_cachefree() {",
        '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
        '    local command="${COMP_WORDS[1]}"',
        "    if [ $COMP_CWORD -eq 1 ]; then",
        f'        COMPREPLY=($(compgen -W "{" ".join(commands)} --help --version" -- "$word"))',
        "        return",
        "    fi",
        '    case "$command $before" in',
    ]
    for name, actions in commands.items():
        for action in actions:
            for option in action.option_strings if action.choices else ():
                words = " ".join(map(str, action.choices or ()))
                lines.append(
                    f'        "{name} {option}") '
                    f'COMPREPLY=($(compgen -W "{words}" -- "$word")); return;;'
                )
    lines += ["    esac", '    case "$command" in']
    for name, actions in commands.items():
        words = " ".join([*_options(actions), *_positional(actions)])
        lines.append(
            f'        {name}) COMPREPLY=($(compgen -W "{words}" -- "$word") '
            '$(compgen -f -- "$word"));;'
        )
    lines += ["    esac", "}", "complete -o filenames -F _cachefree cachefree", ""]
    return "\n".join(lines)


def _positional(actions: list[argparse.Action]) -> list[str]:
    return [
        str(choice)
        for action in actions
        if not action.option_strings
        for choice in action.choices or ()
    ]


def _zsh(commands: dict[str, list[argparse.Action]]) -> str:
    return f"#compdef cachefree\nautoload -U +X bashcompinit && bashcompinit\n{_bash(commands)}"


def _fish(commands: dict[str, list[argparse.Action]]) -> str:
    lines = [f"complete -c cachefree -n __fish_use_subcommand -f -a {name}" for name in commands]
    for name, actions in commands.items():
        inside = f'complete -c cachefree -n "__fish_seen_subcommand_from {name}"'
        for action in actions:
            names = "".join(
                f" -l {option[2:]}" if option.startswith("--") else f" -s {option[1:]}"
                for option in action.option_strings
            )
            told = (action.help or "").replace("'", "’")
            choices = f" -x -a '{' '.join(map(str, action.choices))}'" if action.choices else ""
            lines.append(f"{inside}{names}{choices} -d '{told}'")
    return "\n".join([*lines, ""])
