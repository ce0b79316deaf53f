"""What can be chosen by name: the YAMLs of the config groups, ibxai's own and those of a user's --config-dir.

Every YAML opens with a comment, its one-line description; a comment behind a key says what the setting means. Both
are read from here for `ibxai list`, `ibxai run --help` and for errors, so that nothing is described twice. Neither
Hydra nor torch is imported: this has to answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from ibxai.errors import UserError, nearest

GROUPS = ("dataset", "backbone", "attack", "method", "target", "metric", "study", "loss", "experiment")
COMMANDS = ("run", "train")  # that are composed of them, each with a root of its own, conf/<command>.yaml

_KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):(?P<value>[^#]*)(?:# ?(?P<comment>.*))?")


@dataclass(frozen=True)
class Entry:
    """One YAML of a group. text: the whole of it."""

    group: str
    name: str
    text: str

    @property
    def description(self) -> str:
        lines = (line for line in self.text.splitlines() if not line.startswith("# @package"))
        first = next(lines, "")
        return first.lstrip("# ").strip() if first.startswith("#") else ""


Catalogue = Mapping[str, Mapping[str, Entry]]


def entries(config_dir: Path | None = None) -> Catalogue:
    """group -> name -> entry, in the order of the names. Raises UserError when config_dir is of no use."""
    own = {group: _read(_conf() / group, group) for group in GROUPS}
    if config_dir is None:
        return own
    if not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir}: there is no such folder.")
    users = {group: _read(config_dir / group, group) for group in GROUPS}
    if not any(users.values()):
        raise UserError(
            f"--config-dir {config_dir} holds no config: its YAMLs belong in folders named {', '.join(GROUPS)}."
        )
    for group in GROUPS:
        for name in own[group].keys() & users[group].keys():
            # Hydra would take ibxai's own file and say nothing
            raise UserError(
                f"{config_dir / group / name}.yaml has the name of an option of ibxai's own: give it another name."
            )
    return {group: dict(sorted((own[group] | users[group]).items())) for group in GROUPS}


def root_config(command: str) -> str:
    """The text of conf/run.yaml or conf/train.yaml."""
    return (_conf() / f"{command}.yaml").read_text(encoding="utf-8")


def defaults(command: str = "run") -> dict[str, list[str]]:
    """group -> the names that the command chooses, of the groups that it knows."""
    lines = [line for line in yaml.safe_load(root_config(command))["defaults"] if isinstance(line, dict)]
    named = {group: name for line in lines for group, name in line.items()}
    chosen = {group: named[group] for group in GROUPS if group in named}
    return {group: n if isinstance(n, list) else [] if n is None else [n] for group, n in chosen.items()}


def comments(text: str) -> dict[str, str]:
    """dotted key -> the comment behind it, for each key of a YAML in block style that has one."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = _KEY.fullmatch(line)
        if match is None:
            continue
        indent = len(match["indent"])
        path = [(i, key) for i, key in path if i < indent] + [(indent, match["key"])]
        if match["comment"]:
            found[".".join(key for _, key in path)] = match["comment"].strip()
    return found


def hints(catalogue: Catalogue, choices: Mapping[str, Any]) -> dict[str, str]:
    """full key ("dataset.root") -> what it means, of the chosen options. choices: group -> name or names."""
    found: dict[str, str] = {}
    for group in GROUPS:
        chosen = choices.get(group)
        for name in [chosen] if isinstance(chosen, str) else chosen or []:
            entry = catalogue[group].get(name)
            found |= {f"{group}.{key}": text for key, text in comments(entry.text if entry else "").items()}
    return found


def listing(catalogue: Catalogue, group: str | None = None) -> str:
    """The text of `ibxai list`: every option with its description, in aligned columns."""
    if group is not None and group not in GROUPS:
        raise UserError(f"There is no group {group!r}. {nearest(group, GROUPS)}")
    shown = [group] if group else list(GROUPS)
    width = max((len(name) for g in shown for name in catalogue[g]), default=0)
    chosen = defaults()
    blocks = []
    for g in shown:
        lines = [
            f"  {name:{width}}  {entry.description}{'  (default)' if name in chosen.get(g, ()) else ''}".rstrip()
            for name, entry in catalogue[g].items()
        ]
        blocks.append("\n".join([g, *(lines or ["  (none)"])]))
    return "\n\n".join(blocks)


def show(catalogue: Catalogue, group: str, name: str) -> str:
    """The text of `ibxai list GROUP NAME`: the YAML itself, whose comments say what the settings mean."""
    if group not in GROUPS:
        raise UserError(f"There is no group {group!r}. {nearest(group, GROUPS)}")
    if name not in catalogue[group]:
        raise UserError(f"There is no {group} {name!r}. {nearest(name, catalogue[group])}")
    return catalogue[group][name].text.rstrip()


def _conf() -> Traversable:
    return files("ibxai.conf")


def _read(folder: Traversable, group: str) -> dict[str, Entry]:
    if not folder.is_dir():
        return {}
    found = {}
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            name = file.name.removesuffix(".yaml")
            try:
                found[name] = Entry(group, name, file.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file} cannot be read: {error}.") from error
    return found
