#!/usr/bin/env python
"""Kill a run at random moments, let it go on, and see that it ends where an undisturbed run does.

    python scripts/kill_and_resume.py --kills 20 method=gradcam batch_size=2
    python scripts/kill_and_resume.py --kills 5 --signal INT

Starts `ibxai run` with the given settings, sends it a signal after a random time, starts the same command again, and
so on until it has been killed N times; the last start is left to finish. Whatever finishes is compared with a run that
nobody touched: rows and order identical, numbers within 1e-4. Exit code 0: the same; 1: not.
"""

from __future__ import annotations

import argparse
import csv
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TOLERANCE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="how often the run is killed (10)")
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM", "INT"), help="with what (KILL)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    parser.add_argument("settings", nargs="*", help="settings of the run, as behind `ibxai run`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as place:
        undisturbed, killed = Path(place, "undisturbed"), Path(place, "killed")
        started = time.monotonic()
        finish(undisturbed, options.settings)
        seconds = time.monotonic() - started
        print(f"undisturbed: {seconds:.1f} s")
        moments, differences, kills = random.Random(options.seed), [], 0
        for _ in range(5 * options.kills):  # some starts finish before their moment comes
            after = moments.uniform(0, seconds)
            code = kill_after(after, killed, options.settings, getattr(signal, f"SIG{options.signal}"))
            made = len(list(killed.glob("*/*/*/*/heatmaps/*.npz")))
            print(f"{after:.1f} s: exit code {code}, {made} heatmaps are there", flush=True)
            if code in (0, 3):
                differences += compare(undisturbed, killed)
                shutil.rmtree(killed)
                continue
            kills += 1
            if kills == options.kills:
                break
        finish(killed, options.settings)
        differences += compare(undisturbed, killed)
        print(f"{kills} kills")
        if kills < options.kills:
            differences.append("too few kills: the machine was slower at first than it was later. Try again.")
    print("\n".join(differences) or "the same rows, in the same order, with the same numbers")
    return 1 if differences else 0


def command(outputs: Path, settings: list[str]) -> list[str]:
    return [sys.executable, "-m", "ibxai", "run", f"outputs={outputs}", *settings]


def finish(outputs: Path, settings: list[str]) -> None:
    done = subprocess.run(command(outputs, settings), capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        sys.exit(f"ibxai run failed with exit code {done.returncode}:\n{done.stderr}")


def kill_after(seconds: float, outputs: Path, settings: list[str], number: signal.Signals) -> int:
    process = subprocess.Popen(
        command(outputs, settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    return process.wait()


def compare(one: Path, other: Path) -> list[str]:
    """What differs between the runs of two outputs folders."""
    folders = [sorted(path.parent.relative_to(o) for path in o.glob("*/*/*/*/provenance.json")) for o in (one, other)]
    if folders[0] != folders[1]:
        return [f"run folders: {folders[0]} and {folders[1]}"]
    found = []
    for folder in folders[0]:
        for name in ("samples.csv", "skipped.csv", "metrics.csv", "summary.csv", "studies.csv"):
            found += [f"{folder / name}: {text}" for text in compare_tables(one / folder / name, other / folder / name)]
        names = [{p.name for p in (o / folder / "heatmaps").glob("*.npz")} for o in (one, other)]
        found += [f"{folder}: only one has {name}" for name in sorted(names[0] ^ names[1])]
        for name in sorted(names[0] & names[1]):
            with np.load(one / folder / "heatmaps" / name) as a, np.load(other / folder / "heatmaps" / name) as b:
                apart = np.abs(a["heatmap"] - b["heatmap"]).max() / max(np.abs(a["heatmap"]).max(), 1e-30)
            if not apart <= TOLERANCE:
                found.append(f"{folder / 'heatmaps' / name}: {apart:.2g} apart")
        found += [f"left over: {path}" for path in (other / folder).rglob("*.tmp") if not path.name.startswith(".")]
    return found


def compare_tables(one: Path, other: Path) -> list[str]:
    if not one.exists() and not other.exists():
        return []
    tables = []
    for path in (one, other):
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            tables.append(list(csv.reader(file)))
    if len(tables[0]) != len(tables[1]):
        return [f"{len(tables[0])} and {len(tables[1])} lines"]
    return [
        f"line {place}: {a} and {b}"
        for place, (a, b) in enumerate(zip(*tables, strict=True), start=1)
        if len(a) != len(b) or not all(map(alike, a, b))
    ]


def alike(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return bool(np.isclose(float(one), float(other), rtol=TOLERANCE, atol=1e-12))
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
