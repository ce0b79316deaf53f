"""The `ibxai` command. It answers at once: Hydra and torch are imported by the commands that need them, and not here.

Exit codes: 0 fine; 2 a user's mistake, in one or two lines; 3 finished, but samples were skipped; 1 a bug, with its
traceback; 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ibxai.errors import UserError, nearest

HELP = """\
ibxai explains image classifiers: it computes heatmaps of what a network looked at, with the method you name,
judges them with every metric you name, and leaves heatmaps, tables and a page to look at.

usage: ibxai COMMAND ...

  run           compute heatmaps, scores and a report (`ibxai run --help`: all settings)
  train         train a network on a dataset, for `ibxai run` to explain (`ibxai train --help`)
  report        put all runs of a folder on one page (--verify: look for damaged heatmaps first)
  list          show what can be chosen: datasets, backbones, methods, targets, metrics, studies, losses
  data          check a dataset's files; clean its pictures of burned-in letters; make phantoms (`ibxai data --help`)
  reader-study  a blinded page on which experts compare runs; `reader-study score` counts what they said
  doctor        check that this machine has what a run needs
  completion    tab completion: eval "$(ibxai completion bash)"

examples
  ibxai run                                     a first run: pictures and network are built in, nothing is downloaded
  ibxai run method=gradcam limit=3              another method, the first three samples
  ibxai run -m method=iba,gradcam,random        three methods, one after the other
  ibxai run dataset=imagenet dataset.root=/data/imagenet backbone=resnet50 device=cuda
  ibxai run study=parameter_randomization       does the map change when the network forgets what it learnt?
  ibxai data check dataset=mosmed dataset.root=/data/mosmed
  ibxai train dataset=mnist dataset.root=/data/mnist     then: ibxai run dataset=mnist dataset.root=/data/mnist
  ibxai report                                  compare everything that was run so far

Results land in outputs/<dataset>/<backbone>/<method>/<identity>/, and every run ends by naming its report.html.
The same command again continues where it stopped.
"""

RUN_HELP = """\
usage: ibxai run [-m] [--config-dir DIR] [--cfg job] [name=value ...]

Computes the heatmaps and scores that are not there yet, and writes the report. Hydra reads the settings, so its
syntax holds: metric=[insertion], 'outputs="my results"', method.beta=5.

parts, chosen by name (* without choosing; `ibxai list PART` describes them, `ibxai list PART NAME` their settings)
{groups}

settings
{settings}

settings of a chosen part
  PART.setting=value: method.beta=5, dataset.root=/data/imagenet, metric.insertion.step=0.05

options
  -m, --multirun        several values of a setting (method=iba,gradcam seed=0,1) make a run each
  --config-dir DIR      YAMLs of your own, DIR/method/mine.yaml; Python modules in DIR are found too
  --cfg job             print the settings as YAML, run nothing; --resolve fills in ${{...}}
  -h, --help            this text

examples
  ibxai run method=iba method.beta=5 limit=3
  ibxai run metric=[] outputs=/tmp/heatmaps-only
  ibxai run target=classes target.ids=[281,285]
  ibxai run -m method=iba,gradcam,random seed=0,1
  ibxai run --config-dir my_conf method=mine

exit codes: 0 all done, 2 a mistake in the command, 3 done but samples were skipped (skipped.csv), 1 a bug
"""


TRAIN_HELP = """\
usage: ibxai train [-m] [--config-dir DIR] [--cfg job] dataset=NAME [name=value ...]

Trains a network on a dataset's train split and tests it on the test split; no patient or study is in both. It leaves a
checkpoint (safetensors, and JSON beside it), curves and a test report under outputs/<dataset>/<backbone>/training/.
`ibxai run dataset=NAME` then takes the newest one. Killed, the same command goes on behind the last finished epoch.

parts, chosen by name (* without choosing; a dataset may bring its own backbone and target: `ibxai list dataset NAME`)
{groups}

settings
{settings}

settings of a chosen part
  PART.setting=value: dataset.root=/data/mnist, backbone.weights=none (from scratch), backbone.training.weight_decay=0.1

options
  -m, --multirun        several values of a setting (loss=bce,weighted_bce seed=0,1) make a training each
  --config-dir DIR      YAMLs of your own, DIR/backbone/mine.yaml; Python modules in DIR are found too
  --cfg job             print the settings as YAML, train nothing; --resolve fills in ${{...}}
  -h, --help            this text

examples
  ibxai train dataset=mnist dataset.root=/data/mnist
  ibxai train dataset=chestxray8 dataset.root=/data/cxr8 loss=bce device=cuda precision=bf16 workers=8
  ibxai train dataset=mosmed dataset.root=/data/mosmed backbone=densenet121 epochs=5 learning_rate=1e-4

exit codes: 0 done, 2 a mistake in the command, 1 a bug
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    # threads of OpenMP that wait for work otherwise spin: on a shared machine that doubles the CPU time of a run.
    # It has to be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Greek letters is no reason to fail
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:  # closed by `>&-`
            sys.stdout.flush()
        return code
    except UserError as error:
        print(f"ibxai: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nibxai: stopped. What is finished is kept: the same command continues from there.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _silence_stdout()
        return 141


def _silence_stdout() -> None:
    """The reader has gone (`ibxai list | head -1`): without this, Python complains when it flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    word, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if word in ("-h", "--help", "help"):
        print(HELP, end="")
    elif word == "--version":
        from ibxai import __version__

        print(f"ibxai {__version__}")
    elif word in COMMANDS:
        return COMMANDS[word](rest)
    elif "=" in word:
        raise UserError(f"A command comes first: ibxai run {word} ...")
    else:
        raise UserError(f"There is no command {word!r}. {nearest(word, COMMANDS)}")
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse, with our way to say no."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split())}. See `{self.prog} --help`.")


def _parser(command: str, usage: str) -> _Parser:
    return _Parser(prog=f"ibxai {command}", usage=f"ibxai {command} {usage}".rstrip(), allow_abbrev=False)


def _run(arguments: list[str], command: str = "run") -> int:
    parser = _Parser(prog=f"ibxai {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-cd", "--config-dir", type=Path)
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options, unknown = parser.parse_known_intermixed_args(arguments)
    overrides = [*options.overrides, *unknown]
    if options.help:
        print(filled_help(command, options.config_dir), end="")
        return 0
    from ibxai import jobs

    if options.cfg:
        jobs.show_config(overrides, options.cfg, options.resolve, options.config_dir, command)
        return 0
    return jobs.run_jobs(overrides, options.multirun, options.config_dir, command)


def _train(arguments: list[str]) -> int:
    return _run(arguments, "train")


def filled_help(command: str, config_dir: Path | None) -> str:
    """The help of `ibxai run` or `ibxai train`, made from the configs themselves."""
    import yaml

    from ibxai import catalogue

    known, chosen = catalogue.entries(config_dir), catalogue.defaults(command)
    groups = []
    for group in chosen:
        options = known[group]
        names = ", ".join(f"{name}*" if name in chosen[group] else name for name in options) or "(none yet)"
        groups.append(textwrap.fill(names, 110, initial_indent=f"  {group:12}", subsequent_indent=" " * 14))
    text = catalogue.root_config(command)
    values = yaml.safe_load(text)
    settings = []
    for key, meaning in catalogue.comments(text).items():
        if "." not in key and not isinstance(values[key], dict | list):
            value = "null" if values[key] is None else values[key]
            settings.append(f"  {f'{key}={value}':22}{meaning}")
    return {"run": RUN_HELP, "train": TRAIN_HELP}[command].format(
        groups="\n".join(groups), settings="\n".join(settings)
    )


def _report(arguments: list[str]) -> int:
    parser = _parser("report", "[FOLDER] [--verify]")
    parser.add_argument("folder", nargs="?", default="outputs", help="the outputs of the runs (outputs)")
    parser.add_argument(
        "--verify", action="store_true", help="read all heatmaps; remove damaged ones, which their run then makes again"
    )
    options = parser.parse_args(arguments)
    folder = options.folder.removeprefix("outputs=")
    outputs = Path(os.path.expanduser(folder))
    if not outputs.is_dir():
        raise UserError(f"There is no folder {folder!r}: give the outputs of your runs, ibxai report FOLDER.")
    from ibxai.report import finish_runs, remove_damaged, write_leaderboard
    from ibxai.store import find_runs

    if not find_runs(outputs):
        raise UserError(f"There are no runs in {folder!r}: start one with `ibxai run`, or give the folder of yours.")
    damaged = remove_damaged(outputs) if options.verify else []
    for reason in damaged:
        print(f"damaged, removed: {reason}")
    for page in finish_runs(outputs):
        print(f"finished: {page}")
    print(write_leaderboard(outputs))
    return 3 if damaged else 0


def _list(arguments: list[str]) -> int:
    from ibxai import catalogue

    parser = _parser("list", "[GROUP [NAME]] [--config-dir DIR]")
    parser.add_argument("group", nargs="?", help=f"one of {', '.join(catalogue.GROUPS)}")
    parser.add_argument("name", nargs="?", help="show the settings of this one, with their meanings")
    parser.add_argument("-cd", "--config-dir", type=Path, metavar="DIR", help="YAMLs of your own")
    options = parser.parse_args(arguments)
    known = catalogue.entries(options.config_dir)
    if options.name:
        print(catalogue.show(known, options.group, options.name))
    else:
        print(catalogue.listing(known, options.group))
    return 0


def _data(arguments: list[str]) -> int:
    parser = _parser("data", f"{'|'.join(DATA)} ... (each has a --help)")
    parser.add_argument(
        "what", choices=tuple(DATA), help="look whether files are there; paint letters over; make phantoms"
    )
    return DATA[parser.parse_args(arguments[:1]).what](arguments[1:])


def _data_check(arguments: list[str]) -> int:
    usage = "dataset=NAME [dataset.setting=value ...] [--read N | --all] [--config-dir DIR]"
    parser = _dataset_parser("data check", usage)
    parser.add_argument("--read", type=int, default=200, metavar="N", help="decode N samples (200)")
    parser.add_argument("--all", action="store_true", help="decode all of them")
    options = parser.parse_intermixed_args(arguments)
    if options.read < 0:
        raise UserError(f"--read {options.read}: 0 or more samples are expected.")
    from ibxai.data_check import check_dataset

    return check_dataset(options.overrides, None if options.all else options.read, options.config_dir)


def _data_clean(arguments: list[str]) -> int:
    parser = _dataset_parser("data clean", "dataset=NAME dataset.root=FOLDER --to FOLDER [--pictures N]")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the cleaned dataset is to land")
    parser.add_argument("--pictures", type=int, default=100, metavar="N", help="before and after, of the first N (100)")
    options = parser.parse_intermixed_args(arguments)
    from ibxai.data_check import dataset_of
    from ibxai.datasets.letters import TABLE, clean

    done = clean(dataset_of(options.overrides, options.config_dir), options.to, options.pictures)
    print(f"{done.pictures:,} pictures, {done.letters:,} boxes of letters painted over on {done.painted:,} of them")
    for file, reason in list(done.unread.items())[:10]:
        print(f"  {file}: {reason}")
    print(done.folder / TABLE)
    return 3 if done.unread else 0


def _data_phantom(arguments: list[str]) -> int:
    from ibxai.datasets.phantoms import KINDS, LETTERS, Recipe, make_phantoms

    parser = _parser("data phantom", "KIND DIR [--studies N] [--seed S] [--size PIXELS] [--letters none|leak|random]")
    parser.add_argument("kind", choices=KINDS, help="CT in MosMed's layout; X-rays in ChestX-ray8's and BrixIA's")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder, or one of phantoms to go on with")
    parser.add_argument("--studies", type=int, default=60, metavar="N", help="how many (60)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="names the patients (0)")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="of a side (256; real CT has 512)")
    parser.add_argument(
        "--letters", choices=LETTERS, default="none", help="leak: L on the ill, R on the healthy (none)"
    )
    options = parser.parse_args(arguments)
    folder = options.folder.expanduser()
    recipe = Recipe(options.kind, options.seed, options.size, options.letters)
    made = make_phantoms(recipe, folder, options.studies)
    print(f"{made} phantoms made, {options.studies - made} were there")
    print(f"ibxai data check dataset={options.kind} dataset.root={folder}")
    return 0


def _dataset_parser(command: str, usage: str) -> _Parser:
    parser = _parser(command, usage)
    parser.add_argument("overrides", nargs="*", metavar="dataset=NAME", help="the dataset and its settings")
    parser.add_argument("-cd", "--config-dir", type=Path, metavar="DIR", help="YAMLs of your own")
    return parser


def _reader_study(arguments: list[str]) -> int:
    if arguments[:1] == ["score"]:
        return _reader_score(arguments[1:])
    parser = _parser("reader-study", "RUN RUN ... [--cases N] [--seed S] [--to FOLDER], then: score FILE ... --key KEY")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs on the same rows")
    parser.add_argument("--cases", type=int, default=30, metavar="N", help="pictures that are shown (30, as in IBA-CT)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="draws the cases, their order and sides (0)")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where page and key are to land (among the outputs)")
    options = parser.parse_args(arguments)
    from ibxai.reader_study import make_reader_study

    made = make_reader_study(options.runs, options.to, options.cases, options.seed)
    print(f"{made.cases} cases, {made.questions} pairs of maps")
    print(f"for the readers: {made.page}")
    print(f"not for them:    {made.key}")
    print(f"then:            ibxai reader-study score answers-*.json --key {shlex.quote(str(made.key))}")
    return 0


def _reader_score(arguments: list[str]) -> int:
    parser = _parser("reader-study score", "FILE ... --key KEY")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="answers as the page has saved them")
    parser.add_argument("--key", type=Path, required=True, help="key.json, as `ibxai reader-study` has written it")
    options = parser.parse_intermixed_args(arguments)
    from ibxai.reader_score import score_reader_study

    print(score_reader_study(options.files, options.key))
    return 0


def _doctor(arguments: list[str]) -> int:
    parser = _parser("doctor", "[FOLDER]")
    parser.add_argument("folder", nargs="?", default="outputs", help="where the results are to land (outputs)")
    folder = parser.parse_args(arguments).folder.removeprefix("outputs=")
    from ibxai.doctor import examine

    return examine(Path(os.path.expanduser(folder)))


def _completion(arguments: list[str]) -> int:
    parser = _parser("completion", "bash")
    parser.add_argument("shell")
    shell = parser.parse_args(arguments).shell
    from ibxai import completion

    if shell == "query":  # what the script asks, at every press of the tab key
        found = completion.candidates(os.environ.get("COMP_LINE", ""), list(COMMANDS))
        print("\n".join(found))
    else:
        print(completion.script(shell))
    return 0


DATA: dict[str, Callable[[list[str]], int]] = {
    "check": _data_check,
    "clean": _data_clean,
    "phantom": _data_phantom,
}
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "train": _train,
    "report": _report,
    "list": _list,
    "data": _data,
    "reader-study": _reader_study,
    "doctor": _doctor,
    "completion": _completion,
}
