"""`ibxai run` behind its command line: Hydra composes the jobs, and each job is a Plan for the pipeline.

A job never raises through Hydra, which would drop the jobs behind it and report the first failure alone. It leaves a
record, a small file in the sweep's temporary folder, whatever process it ran in; the records give the summary and the
exit code.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ibxai.catalogue import entries, hints
from ibxai.config import make_plan
from ibxai.errors import UserError
from ibxai.overrides import check, explained

if TYPE_CHECKING:
    from ibxai.pipeline import Outcome

DONE, BUG, USER_ERROR, SKIPPED = 0, 1, 2, 3
_WORST_LAST = (DONE, SKIPPED, USER_ERROR, BUG)


@dataclass(frozen=True)
class Record:
    """What came of a job. summary: one line. folder: where its results are, "" when it has none."""

    overrides: list[str]
    exit_code: int
    summary: str
    folder: str = ""


class _ReaderGone(BaseException):
    """Nobody reads stdout any more. Like Ctrl-C it is no Exception, which Hydra would print, and go on."""


def run_jobs(overrides: Sequence[str], multirun: bool, config_dir: Path | None) -> int:
    """Run what the overrides describe, and return the worst exit code. Raises UserError before the first job."""
    check(overrides, multirun)
    with tempfile.TemporaryDirectory(prefix="ibxai-") as place:
        # quoted, since Hydra reads some characters of a path in its own way
        own = "hydra.sweep.dir='" + place.replace("\\", "\\\\").replace("'", "\\'") + "'"
        try:
            call_hydra([*(["--multirun"] if multirun else []), *overrides, own], config_dir)
        except _ReaderGone as gone:
            raise BrokenPipeError from gone
        records = [Record(**json.loads(p.read_text())) for p in sorted(Path(place).glob("job-*.json"))]
    if not records:
        raise UserError(
            "No job reported back.\nA launcher that uses other machines needs a TMPDIR which those machines share."
        )
    if multirun:
        print("\n" + sweep_summary(records))
    return max((r.exit_code for r in records), key=_WORST_LAST.index)


def show_config(overrides: Sequence[str], what: str, resolve: bool, config_dir: Path | None) -> None:
    """Print the composed config as YAML, and run nothing."""
    check(overrides, multirun=False)
    call_hydra(["--cfg", what, *(["--resolve"] if resolve else []), *overrides], config_dir)


def call_hydra(arguments: Sequence[str], config_dir: Path | None) -> None:
    """Hydra's own command line, with its errors turned into a UserError where they are a user's mistake."""
    catalogue = entries(config_dir)
    typed = [*(["--config-dir", str(config_dir)] if config_dir else []), *arguments]
    main = hydra.main(config_path="pkg://ibxai.conf", config_name="run", version_base="1.3")(_job)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on, rather than printing them and exiting
    try:
        with _command_line(typed):
            main()
    except Exception as error:
        explanation = explained(error, catalogue)
        if explanation is None:
            raise
        raise explanation from error


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """hydra.main reads its arguments from sys.argv, and from nowhere else."""
    typed, sys.argv = sys.argv, ["ibxai", *arguments]
    try:
        yield
    finally:
        sys.argv = typed


def _job(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    many = job.mode is RunMode.MULTIRUN
    number = job.job.num if many else 0
    # unresolved: "seed=${x}" is a text here, and not to be filled in
    overrides = [str(text) for text in OmegaConf.to_container(job.overrides.task, resolve=False)]  # type: ignore[union-attr]
    if many:
        try:
            print(f"\njob {number}: {' '.join(overrides) or 'the defaults'}", flush=True)
        except BrokenPipeError as error:
            raise _ReaderGone from error
    record = _attempt(cfg, overrides, _config_dir())
    Path(job.sweep.dir, f"job-{number:06d}.json").write_text(json.dumps(asdict(record)))


def _config_dir() -> Path | None:
    """The user's --config-dir. Modules of their own inside it can be imported from here on.

    It goes last in the search, so that a `random.py` in it hides nothing.
    """
    for source in HydraConfig.get().runtime.config_sources:
        if source.provider == "command-line":
            if source.path not in sys.path:
                sys.path.append(source.path)
            return Path(source.path)
    return None


def _attempt(cfg: DictConfig, overrides: list[str], config_dir: Path | None) -> Record:
    directory = ["--config-dir", str(config_dir)] if config_dir else []
    command = shlex.join(["ibxai", "run", *directory, *overrides])
    # Hydra notes no choice where a list was chosen; a metric's settings stand under its name
    choices = {**HydraConfig.get().runtime.choices, "metric": list(cfg.metric)}
    try:
        _check_mode()
        plan = make_plan(cfg, choices, hints(entries(config_dir), choices), command)
        from ibxai import pipeline

        outcome = pipeline.run(plan)
    except UserError as error:
        print(f"ibxai: {error}", file=sys.stderr)
        return Record(overrides, USER_ERROR, f"failed: {_first_line(error)}")
    except BrokenPipeError as error:
        raise _ReaderGone from error
    except Exception as error:
        traceback.print_exc()
        return Record(overrides, BUG, f"failed: {type(error).__name__}: {_first_line(error)}")
    skipped = f"{_count(len(outcome.skipped), 'sample')} skipped"
    print(told(outcome))
    if outcome.skipped:
        print(f"{skipped}: {outcome.folder / 'skipped.csv'} says why")
    print(f"report: {outcome.report}", flush=True)
    summary = f"done: {told(outcome)}" + (f", {skipped}" if outcome.skipped else "")
    return Record(overrides, SKIPPED if outcome.skipped else DONE, summary, str(outcome.folder))


def _check_mode() -> None:
    """A preset that holds a sweep would without -m run once, with none of its values, and not say so."""
    job = HydraConfig.get()
    swept = job.sweeper.get("params") if job.mode is RunMode.RUN else None
    if swept:
        values = " ".join(f"{name}={value}" for name, value in swept.items())
        raise UserError(f"This experiment is a sweep over {values}.\nRun it with -m.")


def told(outcome: Outcome) -> str:
    """What a run did, for its user, in one line."""
    rows, present = _count(outcome.rows, "row"), outcome.rows - outcome.new_heatmaps
    if not outcome.new_heatmaps and not outcome.new_scores and not outcome.new_cells:
        return f"nothing left to do: {rows} there already"
    made = f"{rows}: {_count(outcome.new_heatmaps, 'heatmap')} and {_count(outcome.new_scores, 'score')} made"
    if outcome.new_cells:
        made += f", {_count(outcome.new_cells, 'cell')} of the study"
    return f"{made}, {_count(present, 'heatmap')} there already" if present else made


def sweep_summary(records: Sequence[Record]) -> str:
    """One line a job, named by the overrides in which the jobs differ."""
    shared = set.intersection(*(set(r.overrides) for r in records)) if len(records) > 1 else set()
    names = [" ".join(o for o in r.overrides if o not in shared) or "the defaults" for r in records]
    failed = sum(r.exit_code in (USER_ERROR, BUG) for r in records)
    lines = [f"{_count(len(records), 'job')}: {len(records) - failed} done, {failed} failed"]
    width = max(map(len, names))
    for number, (name, record) in enumerate(zip(names, records, strict=True)):
        lines.append(f"  {number}  {name:{width}}  {record.summary}")
        if record.folder:
            lines.append(f"     {'':{width}}  {record.folder}")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
