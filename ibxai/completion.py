"""Tab completion: the script for bash, and the words that fit where the cursor stands.

Hydra completes groups, options and keys, but knows no subcommand and finds its config folder by the arguments of the
call, not by those on the line being typed: both are put right here before it is asked.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

from ibxai.catalogue import COMMANDS, GROUPS
from ibxai.errors import UserError

# bash breaks words at "=" and ":" and replaces the last piece alone, so what stands before it is cut from the answers
SCRIPT = """\
_ibxai() {
    local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}"
    local word="${line##* }"
    local before="${word%"${word##*[=:]}"}"
    COMPREPLY=($(COMP_LINE="$line" ibxai completion query 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
}
complete -o nospace -o default -F _ibxai ibxai"""

OPTIONS = ("--cfg", "--config-dir", "--help", "--multirun", "--resolve")


def candidates(line: str, commands: Sequence[str]) -> list[str]:
    """The words that the last word of a command line, up to the cursor, may become. line: begins with "ibxai"."""
    words = line.split()
    last = "" if not words or line[-1:].isspace() else words.pop()
    before = words[1:]
    if not before:
        return _fitting(last, [*commands, "--help", "--version"])
    if before[0] in COMMANDS:
        return _fitting(last, OPTIONS) if last.startswith("-") else _hydras(before[1:], last, before[0])
    if before[:2] in (["data", "check"], ["data", "clean"]):
        return [word for word in _hydras(before[2:], last) if word.startswith("dataset")]
    known = {"list": GROUPS, "completion": ("bash",), "data": ("check", "clean", "phantom")}.get(before[0], ())
    return _fitting(last, known) if len(before) == 1 else []


def _fitting(word: str, known: Sequence[str]) -> list[str]:
    # the blank ends the word; Hydra's own, such as "method=", go on
    return [f"{k} " for k in known if k.startswith(word)]


def _hydras(before: list[str], last: str, command: str = "run") -> list[str]:
    """Hydra's answer. A line that cannot be read, or composes to nothing, has none: the user is still typing."""
    from ibxai.jobs import call_hydra

    if last.partition("=")[2][:1] in tuple("/.~"):
        return []  # bash completes paths better
    config_dir = None
    for option in ("--config-dir", "-cd"):
        if option in before[:-1]:
            place = before.index(option)
            config_dir = Path(before[place + 1])
            del before[place : place + 2]
    answer = io.StringIO()
    os.environ["COMP_LINE"] = " ".join(["ibxai", *before, last])
    with contextlib.redirect_stdout(answer), contextlib.suppress(Exception):
        call_hydra(["--shell-completion", "query=bash"], config_dir, command)
    words = answer.getvalue().split()
    return [w for w in words if not w.startswith("hydra") and "_target_" not in w]


def script(shell: str) -> str:
    """The text for `eval "$(ibxai completion bash)"`."""
    if shell != "bash":
        raise UserError(f"There is no completion for {shell!r}, only for bash.")
    return SCRIPT
