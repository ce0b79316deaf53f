"""`ibxai run` and `ibxai train` behind their command lines: Hydra composes the jobs, and each job is a plan.

A job never raises through Hydra, which would drop the jobs behind it and report the first failure alone. It leaves a
record; a job of a sweep as a small file in the sweep's temporary folder, whatever process it ran in. The records give
the summary, the sweep's page and the exit code, also when the launcher itself broke down in the middle.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ibxai.catalogue import entries, hints
from ibxai.config import make_plan, make_training
from ibxai.errors import UserError
from ibxai.overrides import as_hydra_takes, as_typed, check, explained, for_sweep, searches

if TYPE_CHECKING:
    from ibxai.pipeline import Outcome

DONE, BUG, USER_ERROR, SKIPPED = 0, 1, 2, 3
TERMINATED = 128 + signal.SIGTERM
_WORST_LAST = (DONE, SKIPPED, USER_ERROR, BUG)


@dataclass(frozen=True)
class Record:
    """What came of a job. summary: one line. folder: where its results are, "" when it has none. outputs: the folder
    that it was given for them. cost: what a sweeper that searches makes small, see `report.sweeps.cost`.
    """

    overrides: list[str]
    exit_code: int
    summary: str
    folder: str = ""
    outputs: str = ""
    cost: float | None = None


@dataclass(frozen=True)
class _Done:
    """A job that went well. lines: for its user; of the rest see `Record`."""

    lines: Sequence[str]
    summary: str
    folder: Path
    exit_code: int = DONE
    cost: float | None = None


class _ReaderGone(BaseException):
    """Nobody reads stdout any more. Like Ctrl-C it is no Exception, which Hydra would print, and go on."""


def run_jobs(overrides: Sequence[str], multirun: bool, config_dir: Path | None, command: str = "run") -> int:
    """Do what the overrides describe, and return the worst exit code. Raises UserError before the first job.

    command: "run" or "train", whose root config is conf/<command>.yaml.
    """
    check(overrides, multirun, command)
    launcher = next((text for text in overrides if text.startswith("hydra")), None)
    if launcher is not None and not multirun:  # Hydra would run it here, and not say so
        raise UserError(f"{launcher} is about sweeps: add -m.")
    with _stopped_by_sigterm():
        if multirun:
            return _run_sweep(overrides, config_dir, command)
        records: list[Record] = []
        try:
            call_hydra(overrides, config_dir, command, lambda cfg: records.append(_attempt(cfg)))
        except _ReaderGone as gone:
            raise BrokenPipeError from gone
        return records[0].exit_code


def _run_sweep(overrides: Sequence[str], config_dir: Path | None, command: str) -> int:
    broken: Exception | None = None
    with tempfile.TemporaryDirectory(prefix="ibxai-") as place:
        # quoted, since Hydra reads some characters of a path in its own way
        own = "hydra.sweep.dir='" + place.replace("\\", "\\\\").replace("'", "\\'") + "'"
        try:
            call_hydra(["--multirun", *for_sweep(overrides), own], config_dir, command)
        except _ReaderGone as gone:
            raise BrokenPipeError from gone
        except Exception as error:  # of the launcher: a worker was killed, a cluster refused
            broken = error
        records = _records(Path(place))
    if broken is not None and not records:
        raise broken
    if not records:
        raise UserError(
            "No job reported back.\nA launcher that uses other machines needs a TMPDIR which those machines share."
        )
    print("\n" + sweep_summary(records))
    judged = [record for record in records if record.cost is not None]
    if searches(overrides) and judged:
        print(f"best: {' '.join(min(judged, key=lambda record: record.cost or 0.0).overrides)}")
    if (page := _sweep_page(records)) is not None:
        print(f"sweep: {page}")
    if broken is not None:
        print(f"ibxai: the launcher failed, {type(broken).__name__}: {_first_line(broken)}\n"
              "Jobs without a line above may not have run. The same command goes on.", file=sys.stderr)  # fmt: skip
        return BUG
    return max((r.exit_code for r in records), key=_WORST_LAST.index)


def _records(folder: Path) -> list[Record]:
    return [Record(**json.loads(path.read_text())) for path in sorted(folder.glob("job-*.json"))]


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """A cluster's word that time is up ends the block as Ctrl-C does: the batch in flight is dropped."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread, which alone gets signals
        yield
        return
    try:
        yield
    except SystemExit as leaving:
        if leaving.code == TERMINATED:
            print(
                "\nibxai: stopped by SIGTERM. The batch in flight is dropped, what is finished is kept: "
                "the same command continues from there.",
                file=sys.stderr,
            )
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def show_config(
    overrides: Sequence[str], what: str, resolve: bool, config_dir: Path | None, command: str = "run"
) -> None:
    """Print the composed config as YAML, and run nothing."""
    check(overrides, multirun=False, command=command)
    call_hydra(["--cfg", what, *(["--resolve"] if resolve else []), *overrides], config_dir, command)


def call_hydra(
    arguments: Sequence[str],
    config_dir: Path | None,
    command: str = "run",
    job: Callable[[DictConfig], object] | None = None,
) -> None:
    """Hydra's own command line, with its errors turned into a UserError where they are a user's mistake."""
    catalogue = entries(config_dir)
    typed = [*(["--config-dir", str(config_dir)] if config_dir else []), *map(as_hydra_takes, arguments)]
    main = hydra.main(config_path="pkg://ibxai.conf", config_name=command, version_base="1.3")(job or _job)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on, rather than printing them and exiting
    try:
        with _command_line(typed):
            main()
    except Exception as error:
        explanation = explained(error, catalogue, command)
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


def _job(cfg: DictConfig) -> float | None:
    """A job of a sweep, in whatever process; its cost."""
    job = HydraConfig.get()
    try:
        print(f"\njob {job.job.num}: {' '.join(_overrides()) or 'the defaults'}", flush=True)
    except BrokenPipeError as error:
        raise _ReaderGone from error
    record, path = _attempt(cfg), Path(job.sweep.dir, f"job-{job.job.num:06d}.json")
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(asdict(record)))
    written.replace(path)
    return record.cost


def _overrides() -> list[str]:
    """Unresolved: "seed=${x}" is a text here, and not to be filled in."""
    return [as_typed(str(text)) for text in OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)]  # type: ignore[union-attr]


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


def _attempt(cfg: DictConfig) -> Record:
    overrides, config_dir, outputs = _overrides(), _config_dir(), str(cfg.get("outputs"))
    directory = ["--config-dir", str(config_dir)] if config_dir else []
    name = HydraConfig.get().job.config_name
    command = shlex.join(["ibxai", str(name), *directory, *overrides])
    # Hydra notes no choice where a list was chosen; a metric's settings stand under its name
    choices = {**HydraConfig.get().runtime.choices, "metric": list(cfg.get("metric") or ())}
    try:
        _check_mode()
        work = {"run": _explain, "train": _train}[str(name)]
        done = work(cfg, choices, hints(entries(config_dir), choices), command)
    except UserError as error:
        print(f"ibxai: {error}", file=sys.stderr)
        return Record(overrides, USER_ERROR, f"failed: {_first_line(error)}", outputs=outputs)
    except BrokenPipeError as error:
        raise _ReaderGone from error
    except Exception as error:
        traceback.print_exc()
        return Record(overrides, BUG, f"failed: {type(error).__name__}: {_first_line(error)}", outputs=outputs)
    print("\n".join(done.lines), flush=True)
    return Record(overrides, done.exit_code, f"done: {done.summary}", str(done.folder), outputs, done.cost)


def _explain(cfg: DictConfig, choices: Mapping[str, Any], meanings: Mapping[str, str], command: str) -> _Done:
    """A job of `ibxai run`."""
    plan = make_plan(cfg, choices, meanings, command)
    from ibxai import pipeline
    from ibxai.report.sweeps import cost

    outcome = pipeline.run(plan)
    number = cost(outcome.folder, outcome.metrics[0]) if outcome.metrics else None
    page = f"report: {outcome.report}"
    if outcome.missing:
        rows = _count(outcome.missing, "row")
        page = f"{rows} of other shards not there yet: the last one makes the page. The folder: {outcome.folder}"
    if not outcome.skipped:
        return _Done([told(outcome), page], told(outcome), outcome.folder, cost=number)
    skipped = f"{_count(len(outcome.skipped), 'sample')} skipped"
    why = f"{skipped}: {outcome.folder / 'skipped.csv'} says why"
    return _Done([told(outcome), why, page], f"{told(outcome)}, {skipped}", outcome.folder, SKIPPED, number)


def _train(cfg: DictConfig, choices: Mapping[str, Any], meanings: Mapping[str, str], command: str) -> _Done:
    """A job of `ibxai train`."""
    plan = make_training(cfg, choices, meanings, command)
    from ibxai import train

    trained = train.run(plan)
    return _Done([*trained.table, f"checkpoint: {trained.weights}"], trained.summary, trained.weights.parent)


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


def _sweep_page(records: Sequence[Record]) -> Path | None:
    """The page of a sweep; None where its jobs have no scores, or the folder refuses."""
    from ibxai.report.sweeps import Job, Sweep, write_sweep

    jobs = [
        Job(
            settings=dict(override.lstrip("+~").partition("=")[::2] for override in record.overrides),
            failed=record.exit_code in (USER_ERROR, BUG),
            told=record.summary,
            folder=Path(record.folder) if record.folder else None,
        )
        for record in records
    ]
    try:
        return write_sweep(Sweep(jobs), Path(os.path.expanduser(records[0].outputs)))
    except UserError as error:
        print(f"ibxai: {error}", file=sys.stderr)
        return None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
