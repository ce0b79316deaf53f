"""What may stand behind `ibxai run` and `ibxai train`, and what Hydra's errors about it mean in a person's words.

Some of what Hydra would accept is refused before it composes anything: what would import or call a thing of the
user's choosing (`_target_`, callbacks), what would litter, and what would be taken for something else in silence.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import MarkedYAMLError, YAMLError

from ibxai.catalogue import GROUPS, Catalogue, defaults
from ibxai.config import SCHEMAS, expected
from ibxai.errors import UserError, nearest

_LONGEST_NAME = 200  # it becomes a file's name, and a file system has a limit
# of Hydra's own settings: who runs the jobs of a sweep, and how
_HYDRA_ALLOWED = re.compile(
    r"hydra/(launcher|sweeper|sweeper/sampler)|hydra\.launcher\.\w[\w.]*"
    # not Optuna's custom_search_space, which calls what it names, nor its database
    r"|hydra\.sweeper\.(max_batch_size|n_trials|n_jobs|max_failure_rate|sampler\.\w+)"
)


def check(overrides: Sequence[str], multirun: bool, command: str = "run") -> None:
    """Raise UserError for what must not reach Hydra. Nothing is composed or imported."""
    for text in overrides:
        _check_text(text, command)
        override = _parse(text)
        if override.is_sweep_override() and not multirun:
            key = override.get_key_element()
            listed = f", or {key}=[...] to give one list" if key == "metric" or "." in key else ""
            raise UserError(f"{text} gives several values: add -m to run them one after the other{listed}.")
        _check_override(override, text, command)
        group = override.key_or_group.partition(".")[0]
        if group in GROUPS and group not in defaults(command):
            other = next(name for name in SCHEMAS if group in defaults(name))
            raise UserError(f"{text}: `ibxai {command}` takes no {group}; `ibxai {other}` does.")


def for_sweep(overrides: Sequence[str]) -> list[str]:
    """The overrides of a sweep, with the first of the swept methods chosen before the sweep over them.

    Hydra composes one config, without what is swept, before it makes the jobs: a setting that all the swept methods
    have would be looked for in the default one. Of a key that is given twice its sweeper takes the last; a sweeper that
    searches would take the one that is fixed.
    """
    if searches(overrides):
        return list(overrides)
    return [text for given in overrides for text in (*_first_choice(_parse(given)), given)]


def searches(overrides: Sequence[str]) -> bool:
    """Whether a sweeper other than Hydra's own chooses the jobs one after the other, by what came of those before."""
    return any(text.startswith("hydra/sweeper=") and text != "hydra/sweeper=basic" for text in overrides)


def _first_choice(override: Override) -> list[str]:
    """Of a sweep over a part. A preset may hold a sweep of its own, which is not to become that of the others."""
    swept = override.value_type in (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP)
    if not swept or override.key_or_group not in GROUPS or override.key_or_group == "experiment":
        return []
    return [f"{override.key_or_group}={next(override.sweep_string_iterator())}"]


def _check_text(text: str, command: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{text!a} holds bytes that are no text in UTF-8.") from error
    if text.startswith("-"):
        raise UserError(f"There is no option {text.partition('=')[0]!r}. `ibxai {command} --help` lists the options.")
    if "_target_" in text:
        raise UserError(
            f"{text}: which class runs is not set on the command line.\n"
            "Write a YAML for it and give its folder: --config-dir DIR."
        )


def _check_override(override: Override, text: str, command: str) -> None:
    key = override.key_or_group
    if not key:
        raise UserError(f"{text}: a name is missing before the '='.")
    if override.package is not None:
        raise UserError(f"{text}: '@' is of no use here; groups stand where they are.")
    if key == "hydra" or override.is_hydra_override():
        if not _HYDRA_ALLOWED.fullmatch(key):
            raise UserError(f"{text}: ibxai sets Hydra up itself; hydra/launcher and hydra.launcher.* can be given.")
        if "/" in key and not isinstance(override.value(), str):
            raise UserError(f"{text}: one name is expected, such as hydra/launcher=local.")
        return
    if key == "weights":  # a group through which datasets say that their network is a trained one
        raise UserError(f"{text}: what the network has learnt is backbone.weights=..., a file or a tag.")
    if override.is_delete() and not key.startswith("metric."):
        raise UserError(f"{text}: this cannot be taken away. metric=[] runs without metrics.")
    if key in GROUPS:
        _check_choice(override, text, command)


def _check_choice(override: Override, text: str, command: str) -> None:
    """A group is chosen by name, or null where none is the default, as of attacks; Hydra would merge two methods in
    silence, or fail without a word on a method that is null.
    """
    group = override.key_or_group
    if override.is_add() or override.is_force_add():
        raise UserError(f"{text}: choose without '+': {group}=NAME.")
    if override.is_sweep_override():
        if override.value_type is ValueType.CHOICE_SWEEP or override.value_type is ValueType.SIMPLE_CHOICE_SWEEP:
            for choice in override.sweep_string_iterator():
                _check_choice(_parse(f"{group}={choice}"), text, command)
        return
    value = override.value()
    if value is None and defaults(command).get(group) == []:
        return
    if isinstance(value, list) and group != "metric":
        listed = ",".join(str(v) for v in value) or "NAME"
        raise UserError(f"{text}: {group} takes one name. To run several, one after the other: -m {group}={listed}")
    names = value if isinstance(value, list) else [value]
    if any(isinstance(name, str) and len(name) > _LONGEST_NAME for name in names):
        raise UserError(f"{text[:60]}...: no {group} has so long a name. `ibxai list {group}` shows all.")
    if not all(isinstance(name, str) and name for name in names):
        example = "metric=[insertion,deletion], or metric=[] for none" if group == "metric" else f"{group}=NAME"
        raise UserError(f"{text}: a name is expected, {example}. `ibxai list {group}` shows all.")


def as_hydra_takes(text: str) -> str:
    """The override as Hydra takes it: a group's null is an error to it, and of an empty list it chooses nothing."""
    key, equals, value = text.partition("=")
    if key not in GROUPS:
        return text
    return key + equals + ",".join("[]" if name.strip() == "null" else name for name in value.split(","))


def as_typed(text: str) -> str:
    """The other way round: metric alone takes lists."""
    key, _, value = text.partition("=")
    return f"{key}=null" if key in GROUPS and key != "metric" and value == "[]" else text


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_overrides([text])[0]
    except OverrideParseException as error:
        raise UserError(_parse_error(text)) from error


def _parse_error(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        return f"{text!r} is no setting: name=value is expected."
    if not re.fullmatch(r"[+~]{0,2}[\w./@-]+", key, re.ASCII) or key.endswith("."):
        return f"{text!r}: {key!r} is no name of a setting; name=value is expected, without blanks around the '='."
    if value[:1] in ("[", "{", "'", '"'):
        reason, advice = "is a quote or a bracket left open?", "On the shell, quote all of it: 'name=[a,b]'."
    else:
        quoted = key + '="' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        reason, advice = "some characters have a meaning of their own.", f"Quote the value: {shlex.quote(quoted)}"
    return f"{text!r} cannot be read: {reason}\n{advice}"


def explained(error: Exception, catalogue: Catalogue, command: str = "run") -> UserError | None:
    """What an error of Hydra's composing says to a user; None when it is no user's mistake."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return UserError(_unknown_option(error.missing_cfg_file, catalogue))
    # Hydra chains what OmegaConf said, openly or, for a file's content, only as the context
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(error, HydraException | OmegaConfBaseException) and isinstance(cause, OmegaConfBaseException):
        return UserError(_config_error(cause, str(error), SCHEMAS[command]))
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return UserError(f"{mark.name}, line {mark.line + 1}: {error.problem}.")
    if isinstance(error, HydraException | YAMLError):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return UserError("\n".join(lines[:2]))
    return None


def _unknown_option(path: str, catalogue: Catalogue) -> str:
    group, _, name = path.rpartition("/")
    if group == "hydra/launcher" and name.partition("_")[0] in ("joblib", "submitit"):
        return f"hydra/launcher={name} is not installed: pip install 'ibxai[launchers]'."
    if path == "hydra/sweeper/optuna":
        return "hydra/sweeper=optuna is not installed: pip install 'ibxai[optuna]'."
    if group not in catalogue:
        return f"There is no {group} {name!r}: is its Hydra plugin installed?"
    return f"There is no {group} {name!r}. {nearest(name, catalogue[group])}"


def _config_error(cause: OmegaConfBaseException, message: str, schema: type) -> str:
    key = cause.full_key or ""
    file = re.match(r"In '(.*?)':", message)
    where = f"{file[1]}.yaml: " if file else ""
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return where + _unknown_key(key, cause, schema)
    given = re.match(r"Error merging override \+*(.*)", message)
    if isinstance(cause, ValidationError) and key in get_type_hints(schema):
        return f"{where}{given[1] if given else key}: {expected(get_type_hints(schema)[key])} is expected."
    reason = str(cause).splitlines()[0]
    if reason.startswith("Cannot merge"):
        reason = "settings are expected here, like {name: value}."
    return f"{where}{given[1] if given else key}: {reason}"


def _unknown_key(key: str, cause: OmegaConfBaseException, schema: type) -> str:
    group, _, rest = key.partition(".")
    if not rest:
        if group == "experiment":  # the group has no YAML at all, so Hydra takes the word for a setting
            return "There is no experiment of this name. There are none."
        return f"There is no setting {key!r}. {nearest(key, [*get_type_hints(schema), 'experiment'])}"
    parent = cause.parent_node
    siblings = [str(k) for k in parent if k not in ("_target_", "name")] if hasattr(parent, "keys") else []
    owner = parent.get("name", group) if hasattr(parent, "keys") else key.rpartition(".")[0]
    return f"{key} is not a setting of {owner}. {nearest(key.rpartition('.')[2], siblings)}"
