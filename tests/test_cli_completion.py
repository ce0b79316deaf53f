"""Tab completion, by bash itself where it matters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ibxai.cli import COMMANDS
from ibxai.completion import candidates, script


def complete(line: str) -> list[str]:
    return candidates(line, list(COMMANDS))


def test_first_word() -> None:
    assert complete("ibxai r") == ["run ", "report ", "reader-study "]
    assert complete("ibxai ")[:3] == ["run ", "train ", "report "]
    assert complete("ibxai --v") == ["--version "]


def test_words_of_the_other_commands() -> None:
    assert complete("ibxai list me") == ["method ", "metric "]
    assert complete("ibxai completion ") == ["bash "]
    assert complete("ibxai doctor ") == []
    assert complete("ibxai run --c") == ["--cfg ", "--config-dir "]


def test_groups_options_and_keys() -> None:
    assert complete("ibxai run targ") == ["target=", "target."] or complete("ibxai run targ") == ["target.", "target="]
    targets = ["classes", "label", "multilabel", "predicted", "regression"]
    assert complete("ibxai run target=") == [f"target={name}" for name in targets]
    assert complete("ibxai run -m target=l") == ["target=label"]
    assert complete("ibxai run batch") == ["batch_size="]
    assert complete("ibxai run seed=1 lim") == ["limit="]


def test_a_training_has_settings_of_its_own() -> None:
    assert complete("ibxai train dataset=brix") == ["dataset=brixia"]
    assert complete("ibxai train los") == ["loss="]
    assert complete("ibxai train pati") == ["patience="]
    assert complete("ibxai run pati") == []
    assert complete("ibxai train --m") == ["--multirun "]


def test_data_check_takes_a_dataset_alone() -> None:
    assert complete("ibxai data ") == ["check ", "clean ", "phantom "]
    assert complete("ibxai data check dataset=mos") == ["dataset=mosmed"]
    assert complete("ibxai data check met") == []


def test_nothing_that_is_refused_is_offered() -> None:
    assert not [word for word in complete("ibxai run ") if word.startswith("hydra")]
    assert not [word for word in complete("ibxai run target.") if "_target_" in word]


@pytest.mark.parametrize("words", ["target=[", "'x", "nope=", "dataset.root=/us", "--config-dir /nope target="])
def test_half_typed_lines_are_no_error(words: str) -> None:
    assert complete(f"ibxai run {words}") == []


def test_configs_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine.yaml").write_text("# mine\n")
    assert complete(f"ibxai run --config-dir {tmp_path} target=mi") == ["target=mine"]


def test_in_bash(tmp_path: Path) -> None:
    """The script as a user evaluates it, with what bash hands to it at a press of the tab key."""
    command = tmp_path / "ibxai"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m ibxai "$@"\n')
    command.chmod(0o755)
    typed = """
        eval "$(ibxai completion bash)"
        press() { COMP_LINE="$1"; COMP_POINT=${2:-${#1}}; COMPREPLY=(); _ibxai; (IFS='|'; echo "${COMPREPLY[*]}"); }
        press "ibxai comp"
        press "ibxai run target=pre"
        press "ibxai run batch_size=4" 15
        complete -p ibxai
    """
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", typed], capture_output=True, text=True, timeout=60, env=environment, check=True
    )
    # behind "=" bash replaces the value alone
    assert done.stdout.splitlines() == [
        "completion ",
        "predicted",
        "batch_size=",
        "complete -o default -o nospace -F _ibxai ibxai",
    ]
    assert done.stderr == ""


def test_script_is_bash() -> None:
    subprocess.run(["bash", "-n", "-c", script("bash")], check=True)
