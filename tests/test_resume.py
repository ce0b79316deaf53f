"""Real processes that are killed, stopped and doubled: the same command afterwards ends where an undisturbed run does.

`scripts/kill_and_resume.py` does the same more often and at random moments.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from test_bad_input import tiny_config
from test_pipeline import assert_same_results, files_of_run, write_pictures

from ibxai.cli import main

IBXAI = [sys.executable, "-m", "ibxai"]
# the default dataset, network and method, with fewer steps, in batches of two
DEFAULT = ["method.steps=2", "method.draws=2", "metric=[insertion]", "metric.insertion.step=0.25", "batch_size=2"]


def start(outputs: Path, *settings: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    return subprocess.Popen(
        [*IBXAI, "run", f"outputs='{outputs}'", *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def undisturbed_run(outputs: Path, *settings: str) -> str:
    """A run that nobody stops, in this process, which saves a start of Python and torch; what it prints."""
    said = io.StringIO()
    with redirect_stdout(said):
        assert main(["run", f"outputs='{outputs}'", *settings]) == 0
    return said.getvalue()


def folder_of(outputs: Path) -> Path:
    [folder] = [path.parent for path in outputs.glob("*/*/*/*/provenance.json")]
    return folder


def stop_when(process: subprocess.Popen[str], number: signal.Signals, reached: Callable[[], bool]) -> tuple[str, str]:
    while not reached():
        assert process.poll() is None, f"it ended before it was killed: {process.communicate()[1]}"
        time.sleep(0.005)
    process.send_signal(number)
    return process.communicate(timeout=30)


def made(outputs: Path, pattern: str, count: int) -> Callable[[], bool]:
    return lambda: len(list(outputs.glob(f"*/*/*/*/{pattern}"))) >= count


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("undisturbed")
    assert "7 rows: 7 heatmaps and 7 scores made" in undisturbed_run(outputs, *DEFAULT)
    return folder_of(outputs)


def test_killed_four_times_and_still_right(undisturbed: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    moments = [
        (signal.SIGKILL, made(outputs, "provenance.json", 1)),
        (signal.SIGKILL, made(outputs, "heatmaps/*.npz", 1)),
        (signal.SIGTERM, made(outputs, "heatmaps/*.npz", 4)),
        (signal.SIGKILL, made(outputs, "scores/*/*.npz", 3)),
    ]
    for number, reached in moments:
        process = start(outputs, *DEFAULT)
        stop_when(process, number, reached)
        assert process.returncode == (143 if number == signal.SIGTERM else -number)
        assert not (folder_of(outputs) / "report.html").exists()
    assert "heatmaps there already" in undisturbed_run(outputs, *DEFAULT)
    assert folder_of(outputs).name == undisturbed.name
    assert_same_results(undisturbed, folder_of(outputs))
    assert lasting_files(folder_of(outputs)) == lasting_files(undisturbed)


def lasting_files(folder: Path) -> set[str]:
    """Without score files, whose names tell where batches were cut, sessions, and what a kill left half-written."""
    return {
        name
        for name in files_of_run(folder)
        if not name.endswith(".tmp")
        and not name.startswith("sessions/")
        and not (name.startswith("scores/") and name.endswith(".npz"))
    }


# tiny runs from here on: a start of Python and torch each, and little else


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("tiny")
    root = write_pictures(place / "pictures")
    return [*tiny_config(place / "conf", root), "method=slowspy", "metric=[mean]", "batch_size=1"]


@pytest.fixture(scope="module")
def undisturbed_tiny(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("undisturbed tiny")
    undisturbed_run(outputs, *tiny)
    return folder_of(outputs)


def test_ctrl_c(tiny: list[str], undisturbed_tiny: Path, tmp_path: Path) -> None:
    outputs, tiny = tmp_path / "outputs", [*tiny, "method.seconds=0.5"]
    process = start(outputs, *tiny)
    out, err = stop_when(process, signal.SIGINT, made(outputs, "heatmaps/*.npz", 2))
    assert process.returncode == 130
    assert out == ""
    told = [line for line in err.splitlines() if line.startswith("ibxai:")]
    assert told == ["ibxai: stopped. What is finished is kept: the same command continues from there."]
    assert "Traceback" not in err
    out = undisturbed_run(outputs, *tiny)
    assert "7 rows: " in out
    assert "heatmaps there already" in out
    assert_same_results(undisturbed_tiny, folder_of(outputs))


def test_ctrl_c_of_a_terminal_reaches_the_decoders_too(tiny: list[str], tmp_path: Path) -> None:
    """A terminal sends the signal to the whole group: the workers must not answer with tracebacks of their own."""
    outputs = tmp_path / "outputs"
    process = start(outputs, *tiny, "workers=2", "method.seconds=0.5")
    while not made(outputs, "heatmaps/*.npz", 1)():
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_two_processes_on_one_run(tiny: list[str], undisturbed_tiny: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    both = [start(outputs, *tiny) for _ in range(2)]
    for process in both:
        finish(process)
    assert_same_results(undisturbed_tiny, folder_of(outputs))
    assert not list(outputs.rglob("*.tmp"))
