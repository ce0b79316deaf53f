#!/usr/bin/env python
"""Type wrong command lines by the hundred, and see that each ends as a mistake should.

    python scripts/random_command_lines.py --count 500 --seed 0

Lines of wrong names, wrong types, numbers out of range, broken quotes, odd bytes and attempts to have other code
called (`++method._target_=os.system`) are typed at random into `ibxai`, in this process, with nothing computed where a
line turns out to be right. Each has to end with exit code 2 and at most three lines on stderr, or with 0; nothing may
have been called that is not ours, and nothing may lie outside the outputs folder afterwards. Exit code 0: all did.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from ibxai import pipeline
from ibxai.catalogue import GROUPS, entries
from ibxai.cli import main as ibxai
from ibxai.pipeline import Outcome, Plan

MARK = "touched-by-a-command-line"
KEYS = ("seed", "device", "batch_size", "max_passes", "workers", "limit", "shard", "pictures", "outputs")
CALLS = (
    "os.system", "subprocess.run", "builtins.exec", "builtins.eval", "pathlib.Path.touch", "shutil.rmtree",
    "hydra.utils.call", "ibxai.store.RunStore", "torch.load", "os.remove", "importlib.import_module",
)  # fmt: skip
VALUES = (
    "", "null", "true", "-1", "0", "1e400", "nan", "inf", "-inf", "99999999999999999999", "1.5", "[]", "[1,2]", "{a:1}",
    "a,b", "1,2", "'", '"', "[", "{", "\\", "${seed}", "${oc.env:HOME}", "${now:%Y}", "???", "é", "汉字", "\udcff",
    "x" * 5000, "../../etc/passwd", "/dev/null", f"$(touch {MARK})", f"`touch {MARK}`", f";touch {MARK}", "%s%n", "*",
    "range(1,3)", "choice(1,2)", "glob(*)", "sort(1,2)", "int('x')", "str([)", "json_str(1)", "extend_list(1)", "0/0",
    "cuda:99", "gpu", "5/4", "1//2", "a b", "\t", "=", "==", "@", "+", "~", "-", "--", "..", "<script>",
)  # fmt: skip


def lines(draw: random.Random) -> Iterator[list[str]]:
    """Arguments of `ibxai`, without end."""
    known = entries()
    names = [name for group in GROUPS for name in known[group]]

    def choice() -> str:
        group = draw.choice((*GROUPS, "weights", "hydra/launcher", "hydra/sweeper"))
        near = draw.choice(names)
        wrong = near[: len(near) // 2] + draw.choice("qxz_-") + near[len(near) // 2 :]
        return f"{group}={draw.choice([wrong, near, near, *VALUES])}"

    def setting() -> str:
        group = draw.choice(
            ("method", "dataset", "backbone", "target", "metric.insertion", "study", "attack", "nothing")
        )
        name = draw.choice(("beta", "steps", "layer", "root", "ids", "step", "name", "weights", "split", "tpyo", ""))
        return f"{draw.choice(['', '', '+', '++', '~'])}{group}.{name}={draw.choice(VALUES)}"

    def root() -> str:
        return f"{draw.choice(['', '+', '++', '~'])}{draw.choice(KEYS)}={draw.choice(VALUES)}"

    def attempt() -> str:
        call, sign = draw.choice(CALLS), draw.choice(("", "+", "++"))
        return draw.choice(
            (
                f"{sign}method._target_={call}", f"{sign}method={{_target_:{call},command:'touch {MARK}'}}",
                f"{sign}hydra.launcher._target_={call}", f"{sign}hydra.sweeper._target_={call}",
                f"{sign}hydra.callbacks.x={{_target_:{call}}}", "hydra.searchpath=[file:///tmp]",
                f"hydra.run.dir=/tmp/{MARK}", f"hydra.sweep.dir=/tmp/{MARK}", "hydra.output_subdir=x",
                f"hydra.job.env_set.PATH=/tmp/{MARK}", f"{sign}metric.x={{_target_:{call}}}",
                f"{sign}study._target_={call}", f"hydra.sweeper.custom_search_space={call}",
                f"{sign}dataset@method=sample", "hydra/job_logging=default", f"{sign}seed={{_target_:{call}}}",
                f"outputs=${{oc.env:HOME}}/{MARK}", f"{sign}method._partial_=true", f"{sign}_recursive_=true",
            )
        )  # fmt: skip

    def noise() -> str:
        return "".join(
            draw.choice("abz=+~@,.:/[]{}()'\"\\$ -\t\n\x00\x1bé\udc80") for _ in range(draw.randrange(1, 30))
        )

    kinds: list[Callable[[], str]] = [choice, setting, root, attempt, noise]
    while True:
        command = draw.choice(("run", "run", "run", "train", "data check", "list", "report", "doctorr", "")).split()
        options = draw.choice(
            ([], [], ["-m"], ["--cfg", "job"], ["--config-dir", draw.choice(VALUES)], ["--frobnicate"])
        )
        yield [*command, *options, *(draw.choice(kinds)() for _ in range(draw.randrange(1, 4)))]


def typed(arguments: list[str]) -> tuple[int | str, str]:
    """(exit code, or what escaped; stderr)"""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            return ibxai(arguments), said.getvalue()
        except SystemExit as error:
            return f"SystemExit {error.code}", said.getvalue()
        except BaseException as error:  # whatever escapes is what is looked for
            return f"{type(error).__name__}: {error}", said.getvalue()


def nothing(plan: Plan) -> Outcome:
    """In place of a run: a line that is right costs nothing."""
    return Outcome(plan.outputs, plan.outputs / "report.html", 0, 0, 0, {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, metavar="N", help="lines to type (500)")
    parser.add_argument("--seed", type=int, default=0, help="of the lines (0)")
    options = parser.parse_args()
    wrong: list[str] = []
    ends: Counter[int | str] = Counter()

    def forbidden(*_: object, **__: object) -> None:
        wrong.append("a shell was called")

    with tempfile.TemporaryDirectory(prefix="command-lines-") as place:
        os.chdir(place)
        os.environ["HOME"] = place
        watched = {path: set(path.iterdir()) for path in (Path("/tmp"), Path(place))}
        source = lines(random.Random(options.seed))
        with (
            mock.patch.object(pipeline, "run", nothing),
            mock.patch("ibxai.train.run", side_effect=AssertionError("a training was started")),
            mock.patch.object(os, "system", forbidden),
            mock.patch.object(subprocess, "run", forbidden),
            mock.patch.object(subprocess, "Popen", forbidden),
        ):
            for _ in range(options.count):
                arguments = next(source)
                code, said = typed(arguments)
                ends[code] += 1
                if code not in (0, 2) or len(said.splitlines()) > 3 or "Traceback" in said:
                    wrong.append(f"{arguments}\n  ended with {code}\n  {said[-600:]}")
        for path, before in watched.items():
            new = {
                p
                for p in set(path.iterdir()) - before
                if MARK in p.name or (path == Path(place) and p.name != "outputs")
            }
            wrong += [f"left behind: {entry}" for entry in new]
        os.chdir("/")
    print("\n".join(wrong))
    print(f"{options.count} lines: " + ", ".join(f"{count} ended with {code}" for code, count in ends.most_common()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
