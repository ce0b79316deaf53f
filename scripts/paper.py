"""A paper's tables and figures, computed, beside the published numbers on one page.

    python scripts/paper.py igospp                               # smoke: minutes, with what is in the repository
    IBXAI_IMAGENET=/data/imagenet python scripts/paper.py igospp --scale full device=cuda
    python scripts/paper.py igospp --scale full --only table1 shard=1/4      # settings go to every run and training
    python scripts/paper.py --coverage                           # renew the tables of docs/papers.md

What is computed stands in scripts/papers/<paper>.yaml. Its `commands` are command lines of `ibxai`: what both scales
share, then what each adds; ${IBXAI_...} comes from the environment, ${outputs} is the folder that all of them share, so
the same call goes on where it stopped. A command that fails is named, and the others go on, but for those `after` it.
Of an `item`, a table or a figure, a cell is what its row and its column say together:

    from: the command, or one a column      job: settings that pick one run of a sweep
    metric: of summary.csv; with label: of the samples of that class
    diagnostic: of the heatmaps | seconds: a heatmap | test: of test.csv | study: of studies.csv

Left in outputs/papers/<paper>-<scale>/: paper.html, paper.csv, and the runs.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import yaml

from ibxai.errors import UserError, nearest
from ibxai.report import write_leaderboard
from ibxai.report.render import render
from ibxai.report.statistics import mean_intervals
from ibxai.store import RunStore, find_runs, write_atomically, write_rows

ROOT = Path(__file__).parent.parent
PAPERS = {path.stem: path for path in sorted((ROOT / "scripts/papers").glob("*.yaml"))}
SCALES = ("smoke", "full")
SHOWN = 3  # pictures of a run
_LEFT = re.compile(r"(?:report: |checkpoint: |.*The folder: )(.+?)(?:/report\.html|/weights\.safetensors)?")
_CHANGES_MAP = re.compile(r"\+*(method|attack|backbone|target)\b")
_JOB = re.compile(r"  \d+  (.+?) +(done|failed): (.*)")  # of a sweep's summary; the line behind it is its folder


@dataclass(frozen=True)
class Job:
    """One run or training. settings: what was typed for it; folder: None when it failed, and `told` says why."""

    settings: frozenset[str]
    folder: Path | None
    told: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of a command. problem: why something is missing, in the words of who knows; "" when nothing is. said:
    the lines of a command that leaves no run.
    """

    command: str
    jobs: Sequence[Job] = ()
    problem: str = ""
    said: Sequence[str] = ()


@dataclass(frozen=True)
class Value:
    value: float
    low: float = np.nan
    high: float = np.nan
    n: int | None = None


@dataclass
class Item:
    """A table or a figure as the page shows it. lines: (row, [(published, Value or None), ...])."""

    told: Mapping[str, Any]
    outcomes: Mapping[str, Outcome]
    lines: list[tuple[str, list[tuple[Any, Value | None]]]] = field(default_factory=list)
    pictures: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return list(dict.fromkeys(o.problem for o in self.outcomes.values() if o.problem))

    @property
    def networks(self) -> list[str]:
        """What the numbers come from, if any are there: a run or training lies in <dataset>/<network>/<method>/<id>."""
        if self.lines and not self.pictures and all(value is None for _, cells in self.lines for _, value in cells):
            return []
        folders = [job.folder for outcome in self.outcomes.values() for job in outcome.jobs if job.folder is not None]
        return list(dict.fromkeys(f"{folder.parts[-3]} on {folder.parts[-4]}" for folder in folders))


def read(paper: str) -> dict[str, Any]:
    return yaml.safe_load(PAPERS[paper].read_text(encoding="utf-8"))


def words_of(command: Mapping[str, str], scale: str, outputs: Path) -> list[str]:
    """The command line; empty when this scale does without it. Raises UserError when it is left out, with the reason,
    and when a variable of the environment is not set.
    """
    if scale not in command and "why" in command:
        raise UserError(f"Computed at SCALE=full only: {command['why']}")
    if scale not in command:
        return []
    text = Template(f"{command['all']} {command[scale]}")
    for variable in text.get_identifiers():
        if variable != "outputs" and not os.environ.get(variable):
            key = re.search(rf"(\S+)=\$\{{{variable}\}}", text.template)
            dataset = re.search(r"dataset=(\S+)", text.template)
            what = f"{key[1]} of {dataset[1]}" if key and dataset else variable
            raise UserError(f"{what} is not set: {variable}=/path/to/it is expected in the environment.")
    return shlex.split(text.substitute({**os.environ, "outputs": str(outputs)}))


def run_command(words: Sequence[str]) -> Outcome:
    """Run `ibxai` in a process of its own, so that nothing that happens to it ends the others; its lines are shown."""
    command, lines = shlex.join(["ibxai", *words]), []
    print(f"\n$ {command}", flush=True)
    with subprocess.Popen(
        [sys.executable, "-m", "ibxai", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    jobs = jobs_in(lines, words)
    mistakes = [line.removeprefix("ibxai: ") for line in lines if line.startswith("ibxai: ")]
    problem = "; ".join(dict.fromkeys([*mistakes, *(job.told for job in jobs if job.folder is None)]))
    if process.returncode not in (0, 3) and not problem:
        problem = f"ended with exit code {process.returncode}: {next((x for x in reversed(lines) if x), 'no word')}"
    return Outcome(command, jobs, problem, [] if jobs else lines)


def jobs_in(lines: Sequence[str], words: Sequence[str]) -> list[Job]:
    """What a command says of its runs: one, or those of a sweep's summary."""
    typed = frozenset(words)
    if "-m" not in words:
        found = [match[1] for line in lines if (match := _LEFT.fullmatch(line))]
        return [Job(typed, Path(found[-1]))] if found else []
    jobs = []
    for line, behind in zip(lines, [*lines[1:], ""], strict=True):
        if match := _JOB.fullmatch(line):
            swept, done, told = match.groups()
            folder = Path(behind.strip()) if done == "done" else None
            own = {word.partition("=")[0]: word for word in [*words, *swept.split()]}  # not the list that it is one of
            jobs.append(Job(frozenset(own.values()), folder, told))
    return jobs


def measured(cell: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> Value | None:
    """The number of a cell, None when it is not there."""
    wanted = set(str(cell.get("job", "")).split())
    jobs = [job for job in outcomes[cell["from"]].jobs if wanted <= job.settings and job.folder is not None]
    if len(jobs) != 1:
        return None
    folder = jobs[0].folder
    assert folder is not None
    if "label" in cell:
        return _of_label(RunStore(folder), cell["metric"], cell["label"])
    if "metric" in cell:
        return _line(folder / "summary.csv", "mean", {"metric": cell["metric"]})
    if "test" in cell:
        score = _line(folder / "test.csv", "value", {"output": "all", **cell["test"]})
        return score and replace(score, n=json.loads((folder / "weights.json").read_bytes()).get("tested"))
    if "study" in cell:
        return _line(folder / "studies.csv", "value", cell["study"])
    store = RunStore(folder)
    finished = sorted(store.finished(row.row_id for row in store.rows()))
    if not finished:
        return None
    if "seconds" in cell:
        return Value(store.provenance()["seconds"] / len(finished), n=len(finished))
    values = [float(store.read_heatmap(row).diagnostics[cell["diagnostic"]]) for row in finished]
    return Value(float(np.mean(values)), n=len(values))


def _line(table: Path, column: str, wanted: Mapping[str, Any]) -> Value | None:
    """The only line of a CSV file that has these entries."""
    if not table.is_file():
        return None
    lines = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")))
    found = [line for line in lines if all(line.get(key) == str(value) for key, value in wanted.items())]
    if len(found) != 1:
        return None
    low, high, n = (float(found[0].get(key) or "nan") for key in ("low", "high", "n"))
    return Value(float(found[0][column]), low, high, None if np.isnan(n) else int(n))


def _of_label(store: RunStore, metric: str, label: int) -> Value | None:
    """The mean of a metric over the samples of one class, with its interval."""
    group_of = {row.sample_id: row.group_id for row in store.rows() if row.label == label}
    lines = csv.DictReader(io.StringIO((store.path / "metrics.csv").read_text(encoding="utf-8")))
    found = [(line["sample"], float(line["value"] or "nan")) for line in lines if line["metric"] == metric]
    own = [(group_of[sample], value) for sample, value in found if sample in group_of and np.isfinite(value)]
    if not own:
        return None
    values = np.array([value for _, value in own])
    low, high = mean_intervals(values[:, None], [group for group, _ in own])
    return Value(float(values.mean()), float(low[0]), float(high[0]), len(values))


def cells_of(told: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """(row, column, published, where the measured number is) of all cells that the paper has; a row's word counts."""
    for row, own in told.get("rows", {}).items():
        for place, (column, shared) in enumerate(told["columns"].items()):
            if (published := own["values"][place]) is not None:
                cell = {**shared, **own, "job": f"{shared.get('job', '')} {own.get('job', '')}"}
                if isinstance(cell["from"], list):
                    cell["from"] = cell["from"][place]
                yield row, column, published, cell


def commands_of(told: Mapping[str, Any]) -> list[str]:
    """The commands that an item needs, each once."""
    needed = [*told.get("needs", ()), *told.get("pictures", ()), *(cell["from"] for *_, cell in cells_of(told))]
    return list(dict.fromkeys(needed))


def filled(told: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> Item:
    item = Item(told, {name: outcomes[name] for name in commands_of(told)})
    found = {(row, column): (published, measured(cell, outcomes)) for row, column, published, cell in cells_of(told)}
    for row in told.get("rows", {}):
        item.lines.append((row, [found.get((row, column), (None, None)) for column in told["columns"]]))
    jobs = [job for name in told.get("pictures", ()) for job in outcomes[name].jobs]
    for job, name in zip(jobs, names_of(jobs), strict=True):
        shown = sorted((job.folder / "overlays").glob("*.png"))[:SHOWN] if job.folder else []
        if shown:
            item.pictures.append((name, [base64.b64encode(path.read_bytes()).decode() for path in shown]))
    return item


def names_of(jobs: Sequence[Job]) -> list[str]:
    """What sets each job apart from the others, in the settings that change a map; of one alone its method."""
    maps = [{word.lstrip("+") for word in job.settings if _CHANGES_MAP.match(word)} for job in jobs]
    shared = set.intersection(*maps) if len(maps) > 1 else set()
    return [" ".join(sorted(own - shared, key=lambda word: word.partition("=")[0])) or "the defaults" for own in maps]


def runs_in(outcomes: Mapping[str, Outcome], outputs: Path) -> Iterator[dict[str, Any]]:
    """What was run on what, of all jobs that are runs."""
    for folder in dict.fromkeys(job.folder for outcome in outcomes.values() for job in outcome.jobs):
        if folder is not None and (folder / "provenance.json").is_file():
            page = Path(os.path.relpath(folder / "report.html", outputs)).as_posix()
            yield {**RunStore(folder).provenance(), "page": page if (folder / "report.html").is_file() else None}


def compute(paper: str, scale: str, only: Sequence[str], outputs: Path, settings: Sequence[str]) -> Path:
    """Run the commands of the items and write the page; its path."""
    told, started = read(paper), time.perf_counter()
    chosen = ["--outputs", str(outputs), *(["--only", ",".join(only)] if only else [])]
    items = [item for item in told["items"] if not only or item["id"] in only]
    needed = with_those_before(told["commands"], {name for item in items for name in commands_of(item)})
    outcomes: dict[str, Outcome] = {}
    for name, command in told["commands"].items():
        if name in needed:
            before = [outcomes[other].problem for other in command.get("after", ())]
            outcomes[name] = attempt(command, scale, outputs, settings, next(filter(None, before), ""))
    shown = [filled(item, outcomes) for item in items]
    write_rows(outputs / "paper.csv", list(_long(shown)))
    if find_runs(outputs):
        write_leaderboard(outputs)
    context = {
        "paper": told,
        "scale": scale,
        "items": shown,
        "runs": {item.told["id"]: list(runs_in(item.outcomes, outputs)) for item in shown},
        "seconds": time.perf_counter() - started,
        "leaderboard": (outputs / "report.html").is_file(),
        "again": shlex.join(["python", "scripts/paper.py", paper, "--scale", scale, *chosen, *settings]),
    }
    write_atomically(outputs / "paper.html", render("paper.html", context))
    for item in shown:
        for problem in item.problems:
            print(f"{item.told['title']}: {problem}", file=sys.stderr)
    return outputs / "paper.html"


def with_those_before(commands: Mapping[str, Any], needed: set[str]) -> set[str]:
    """The commands and all that have to be done before them."""
    more = {other for name in needed for other in commands[name].get("after", ())} - needed
    return with_those_before(commands, needed | more) if more else needed


def attempt(
    command: Mapping[str, Any], scale: str, outputs: Path, settings: Sequence[str], missing: str = ""
) -> Outcome:
    """Run a command, unless something that it needs is missing."""
    typed = f"ibxai {command['all']} {command.get(scale, command.get('full', ''))}"
    if missing:
        return Outcome(typed, problem=missing)
    try:
        words = words_of(command, scale, outputs)
    except UserError as error:
        return Outcome(typed, problem=str(error))
    if not words:
        return Outcome("")
    if words[0] != "data":
        own = [] if any(word.startswith("outputs=") for word in words) else [f"outputs={outputs}"]
        # a training is not parted: it is whole in every shard, and found finished by all but the first
        words += own + [word for word in settings if words[0] == "run" or not word.startswith("shard=")]
    return run_command(words)


def _long(items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """paper.csv: a line a cell."""
    for item in items:
        for row, cells in item.lines:
            for column, (published, value) in zip(item.told["columns"], cells, strict=True):
                if published is not None:
                    own = vars(value) if value else dict.fromkeys(("value", "low", "high", "n"), "")
                    yield {"item": item.told["id"], "row": row, "column": column, "published": published, **own}


def coverage() -> str:
    """The tables of docs/papers.md: of each table and figure what fills it, or why nothing does."""
    parts = []
    for paper in PAPERS:
        told = read(paper)
        lines = ["| in the paper | shows | filled by | full scale, estimated |", "|---|---|---|---|"]
        for item in told["items"]:
            needed = with_those_before(told["commands"], set(commands_of(item)))
            whole = [command for name, command in told["commands"].items() if name in needed and "full" in command]
            commands = [" ".join(f"ibxai {command['all']} {command['full']}".split()) for command in whole]
            by = "<br>".join([*(f"`{command}`".replace("|", r"\|") for command in commands), *_texts(item.get("none"))])
            lines.append(f"| {item['title']} | {item['shows']} | {by} | {item.get('cost', '')} |")
        parts.append(f"### {told['title']}\n\n`make paper-{paper}` · {told['source']}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _texts(text: str | None) -> list[str]:
    return [text] if text else []


def main() -> None:
    parser = argparse.ArgumentParser(description="A paper's tables and figures beside the published numbers.")
    parser.add_argument("paper", nargs="?", help=", ".join(PAPERS))
    parser.add_argument("settings", nargs="*", help="settings for every command: device=cuda shard=1/4")
    parser.add_argument("--scale", choices=SCALES, default="smoke")
    parser.add_argument("--only", default="", metavar="ITEM,ITEM", help="ids of items: table1,fig4")
    parser.add_argument("--outputs", type=Path, help="outputs/papers/<paper>-<scale>")
    parser.add_argument("--coverage", action="store_true", help="renew the tables of docs/papers.md")
    options = parser.parse_intermixed_args()
    if options.coverage:
        page = ROOT / "docs/papers.md"
        kept, _, rest = page.read_text(encoding="utf-8").partition("<!-- coverage: begin -->\n")
        after = rest.partition("<!-- coverage: end -->")[2]
        text = f"{kept}<!-- coverage: begin -->\n{coverage()}\n<!-- coverage: end -->{after}"
        write_atomically(page, text.encode())
        return
    if options.paper not in PAPERS:
        raise UserError(f"There is no paper {options.paper!r}. {nearest(options.paper or '', PAPERS)}")
    ids = [item["id"] for item in read(options.paper)["items"]]
    only = [name for name in options.only.split(",") if name]
    if unknown := sorted(set(only) - set(ids)):
        raise UserError(f"{options.paper} has no item {unknown[0]!r}. {nearest(unknown[0], ids)}")
    outputs = options.outputs or Path("outputs/papers") / f"{options.paper}-{options.scale}"
    print(f"\npage: {compute(options.paper, options.scale, only, outputs, options.settings)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"paper.py: {error}")
