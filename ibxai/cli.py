"""The `ibxai` command. It answers at once: Hydra and torch are imported by the commands that need them, and not here.

Exit codes: 0 fine; 2 a user's mistake, in one or two lines; 3 finished, but samples were skipped; 1 a bug, with its
traceback; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import os
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

  run         compute heatmaps, scores and a report (`ibxai run --help`: all settings)
  report      put all runs of a folder on one page
  list        show what can be chosen: datasets, backbones, methods, targets, metrics, studies
  data        check a dataset's files: what is there, what is missing, what cannot be read
  doctor      check that this machine has what a run needs
  completion  tab completion: eval "$(ibxai completion bash)"

examples
  ibxai run                                     a first run: pictures and network are built in, nothing is downloaded
  ibxai run method=gradcam limit=3              another method, the first three samples
  ibxai run -m method=iba,gradcam,random        three methods, one after the other
  ibxai run dataset=imagenet dataset.root=/data/imagenet backbone=resnet50 device=cuda
  ibxai run study=parameter_randomization       does the map change when the network forgets what it learnt?
  ibxai data check dataset=mosmed dataset.root=/data/mosmed
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
        raise UserError(f"{message}. See `{self.prog} --help`.")


def _parser(command: str, usage: str) -> _Parser:
    return _Parser(prog=f"ibxai {command}", usage=f"ibxai {command} {usage}".rstrip(), allow_abbrev=False)


def _run(arguments: list[str]) -> int:
    parser = _Parser(prog="ibxai run", add_help=False, allow_abbrev=False)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-cd", "--config-dir", type=Path)
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options, unknown = parser.parse_known_intermixed_args(arguments)
    overrides = [*options.overrides, *unknown]
    if options.help:
        print(run_help(options.config_dir), end="")
        return 0
    from ibxai import jobs

    if options.cfg:
        jobs.show_config(overrides, options.cfg, options.resolve, options.config_dir)
        return 0
    return jobs.run_jobs(overrides, options.multirun, options.config_dir)


def run_help(config_dir: Path | None) -> str:
    """The help of `ibxai run`, made from the configs themselves."""
    import yaml

    from ibxai import catalogue

    known, chosen = catalogue.entries(config_dir), catalogue.defaults()
    groups = []
    for group, options in known.items():
        names = ", ".join(f"{name}*" if name in chosen[group] else name for name in options) or "(none yet)"
        groups.append(textwrap.fill(names, 110, initial_indent=f"  {group:12}", subsequent_indent=" " * 14))
    text = catalogue.run_config()
    values = yaml.safe_load(text)
    settings = []
    for key, meaning in catalogue.comments(text).items():
        if "." not in key and not isinstance(values[key], dict | list):
            value = "null" if values[key] is None else values[key]
            settings.append(f"  {f'{key}={value}':20}{meaning}")
    return RUN_HELP.format(groups="\n".join(groups), settings="\n".join(settings))


def _report(arguments: list[str]) -> int:
    parser = _parser("report", "[FOLDER]")
    parser.add_argument("folder", nargs="?", default="outputs", help="the outputs of the runs (outputs)")
    folder = parser.parse_args(arguments).folder.removeprefix("outputs=")
    outputs = Path(folder).expanduser()
    if not outputs.is_dir():
        raise UserError(f"There is no folder {folder!r}: give the outputs of your runs, ibxai report FOLDER.")
    from ibxai.report import write_leaderboard
    from ibxai.store import find_runs

    if not find_runs(outputs):
        raise UserError(f"There are no runs in {folder!r}: start one with `ibxai run`, or give the folder of yours.")
    print(write_leaderboard(outputs))
    return 0


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
    parser = _parser("data", "check dataset=NAME [dataset.setting=value ...] [--read N | --all] [--config-dir DIR]")
    parser.add_argument("what", choices=("check",), help="look whether the files are there and can be read")
    parser.add_argument("overrides", nargs="*", metavar="dataset=NAME", help="the dataset and its settings")
    parser.add_argument("--read", type=int, default=200, metavar="N", help="decode N samples (200)")
    parser.add_argument("--all", action="store_true", help="decode all of them")
    parser.add_argument("-cd", "--config-dir", type=Path, metavar="DIR", help="YAMLs of your own")
    options = parser.parse_intermixed_args(arguments)
    if options.read < 0:
        raise UserError(f"--read {options.read}: 0 or more samples are expected.")
    from ibxai.data_check import check_dataset

    return check_dataset(options.overrides, None if options.all else options.read, options.config_dir)


def _doctor(arguments: list[str]) -> int:
    parser = _parser("doctor", "[FOLDER]")
    parser.add_argument("folder", nargs="?", default="outputs", help="where the results are to land (outputs)")
    folder = parser.parse_args(arguments).folder.removeprefix("outputs=")
    from ibxai.doctor import examine

    return examine(Path(folder).expanduser())


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


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "report": _report,
    "list": _list,
    "data": _data,
    "doctor": _doctor,
    "completion": _completion,
}
