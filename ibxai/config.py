"""From a composed config to a Plan: the types of the root settings, their checks, and the building of the parts.

A part is a frozen dataclass named by `_target_`. It is built by `build` and by nothing else: the class is looked at
before anything is called, and its fields say which settings there are and of which types. Root settings are checked
before the parts are imported, so that a mistake there answers at once, without torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ibxai.errors import UserError, nearest
from ibxai.shards import Shard, parse_shard

if TYPE_CHECKING:
    from ibxai.pipeline import Plan
    from ibxai.train import TrainPlan

UNSET = "???"


@dataclass
class RunConfig:
    """The root of a run's config. The values are in conf/run.yaml, and here are their types."""

    dataset: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    metric: dict[str, Any] = field(default_factory=dict)
    study: Any = None  # a dict when one is chosen
    attack: Any = None  # the same
    seed: int = MISSING
    device: str = MISSING
    batch_size: int = MISSING
    max_passes: int | None = MISSING
    workers: int = MISSING
    limit: int | None = MISSING
    shard: str | None = MISSING
    pictures: int = MISSING
    outputs: str = MISSING


@dataclass
class TrainConfig:
    """The root of a training's config. The values are in conf/train.yaml, and here are their types."""

    dataset: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    method: Any = None  # a dict when one is chosen
    target: dict[str, Any] = field(default_factory=dict)
    loss: Any = None  # the same
    epochs: int | None = MISSING
    batch_size: int | None = MISSING
    learning_rate: float | None = MISSING
    learns: str = MISSING
    patience: int = MISSING
    validation_share: float = MISSING
    seed: int = MISSING
    device: str = MISSING
    devices: int = MISSING
    precision: str = MISSING
    workers: int = MISSING
    outputs: str = MISSING


SCHEMAS: dict[str, type] = {"run": RunConfig, "train": TrainConfig}  # of the commands that Hydra composes
for _command, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_command}_schema", node=_schema, provider="ibxai")

# in this order they are built: a mistake in a method shows before the libraries of networks are imported
_SINGLE = ("method", "target", "dataset", "backbone")
_OPTIONAL = ("study", "attack", "loss")
_SMALLEST = {"seed": 0, "batch_size": 1, "max_passes": 1, "workers": 0, "limit": 1, "pictures": 0}
_SMALLEST |= {"epochs": 1, "patience": 1, "devices": 1}
_LARGEST = 2**31 - 1  # beyond it torch and numpy overflow, each in its own way
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")

# what a class of a group has to have; "__call__" is looked up in the class, since every class itself can be called
_PROTOCOL = {
    "dataset": "samples", "backbone": "load", "method": "fit", "metric": "__call__", "target": "make", "study": "check",
    "attack": "perturb", "loss": "make",
}  # fmt: skip


def make_plan(cfg: DictConfig, choices: Mapping[str, Any], hints: Mapping[str, str], command: str) -> Plan:
    """Check a composed config and build its parts.

    choices: group -> chosen name. hints: full key -> what the setting means, for errors. command: what was typed.
    Raises UserError for whatever a user can put right.
    """
    settings = resolved(cfg)
    check_settings(settings, choices, hints)
    shard = parse_shard(settings["shard"])
    metrics = {name: build(node, f"metric.{name}") for name, node in settings["metric"].items()}
    parts = {group: build(settings[group], group) for group in _SINGLE}
    study, attack = settings.get("study"), settings.get("attack")
    from ibxai.pipeline import Plan  # torch comes with it, and the checks above do without

    return Plan(
        **parts,
        method_name=settings["method"].get("name", choices.get("method")),
        metrics=metrics,
        study=None if study is None else build(study, "study"),
        study_name="" if study is None else study.get("name", choices.get("study")),
        attack=None if attack is None else build(attack, "attack"),
        attack_name="" if attack is None else attack.get("name", choices.get("attack")),
        settings=settings,
        seed=settings["seed"],
        device=_usable_device(settings["device"], shard),
        batch_size=settings["batch_size"],
        max_passes=settings["max_passes"],
        workers=settings["workers"],
        limit=settings["limit"],
        shard=shard,
        pictures=settings["pictures"],
        outputs=Path(os.path.expanduser(settings["outputs"])),
        command=command,
    )


def make_training(cfg: DictConfig, choices: Mapping[str, Any], hints: Mapping[str, str], command: str) -> TrainPlan:
    """As `make_plan`, for `ibxai train`."""
    settings = resolved(cfg)
    check_settings(settings, choices, hints, "train")
    parts = {group: build(settings[group], group) for group in _SINGLE if settings.get(group) is not None}
    loss = settings.get("loss")
    from ibxai.train import LEARNS, PRECISIONS, TrainPlan

    if settings["precision"] not in PRECISIONS:
        raise UserError(f"precision={settings['precision']}: one of {', '.join(PRECISIONS)} is expected.")
    if settings["learns"] not in LEARNS:
        raise UserError(f"learns={settings['learns']}: one of {', '.join(LEARNS)} is expected.")
    given = {key: settings[key] for key in ("epochs", "batch_size", "learning_rate") if settings[key] is not None}
    return TrainPlan(
        **parts,
        loss=None if loss is None else build(loss, "loss"),
        given=given,
        learns=settings["learns"],
        patience=settings["patience"],
        validation_share=settings["validation_share"],
        settings=settings,
        seed=settings["seed"],
        device=_usable_device(settings["device"]),
        devices=settings["devices"],
        precision=settings["precision"],
        workers=settings["workers"],
        outputs=Path(os.path.expanduser(settings["outputs"])),
        command=command,
    )


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain dicts and lists, its interpolations filled in."""
    try:
        settings = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).splitlines()[0]).strip('"')
        raise UserError(f"{error.full_key or 'config'}: {reason}") from error
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def check_settings(
    settings: Mapping[str, Any], choices: Mapping[str, Any], hints: Mapping[str, str], command: str = "run"
) -> None:
    """What can be known without importing a part. Raises UserError."""
    known = [f.name for f in dataclasses.fields(SCHEMAS[command])]
    for key in settings:
        if key not in known:
            raise UserError(f"There is no setting {key!r}. {nearest(key, known)}")
    for group in (*_SINGLE, *_OPTIONAL):
        # an experiment may have chosen two, which Hydra merges
        if settings.get(group) is not None and not isinstance(choices.get(group), str):
            raise UserError(f"{group} takes one name. To run several, one after the other: -m {group}=NAME,NAME")
    for key in unset(settings):
        meaning = hints.get(key)
        raise UserError(f"{key} is not set: give {key}=..." + (f", {meaning}" if meaning else ""))
    for key, smallest in _SMALLEST.items():
        value = settings.get(key)
        if value is not None and not smallest <= value <= _LARGEST:
            bound = f"least {smallest}" if value < smallest else f"most {_LARGEST}"
            raise UserError(f"{key}={value}: at {bound} is expected.")
    if not _DEVICE.fullmatch(settings["device"]):
        raise UserError(f"device={settings['device']}: auto, cpu, cuda or cuda:N is expected.")
    if not settings["outputs"].strip():
        raise UserError("outputs is empty: name the folder that the results are to land in.")


def unset(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The full keys whose value is still `???`."""
    for key, value in settings.items():
        if value == UNSET:
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping):
            yield from unset(value, f"{prefix}{key}.")


def build(node: Any, key: str) -> Any:
    """The part that a config node describes.

    node: `_target_` and settings, as plain values. key: where the node stands ("method", "metric.insertion"); its
    first part is the group. Raises UserError before anything is called when the target is no frozen dataclass of that
    group, and when a setting is unknown, unset or of the wrong type.
    """
    group = key.partition(".")[0]
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        choice = f"metric=[{key.partition('.')[2]}]" if group == "metric" else f"{group}=NAME"
        raise UserError(f"{key} describes no {group}. Choose one by name: {choice}; `ibxai list {group}` shows all.")
    cls = _load_class(node["_target_"], key)
    _require_protocol(cls, group, key, node["_target_"])
    settings = {str(k): value for k, value in node.items() if k != "_target_"}
    name = settings.get("name", key.rpartition(".")[2])
    if name == UNSET:
        raise UserError(f"{key}.name is not set: give {key}.name=...")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"{key}.name={name}: letters, digits, '.', '_' and '-' are expected; it names a folder.")
    if "name" not in _fields(cls):
        settings.pop("name", None)  # it names the folder of a run, and not every class asks to know it
    return _construct(cls, settings, key, owner=name)


def _load_class(path: str, key: str) -> Any:
    module_name, _, class_name = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")) or not module_name:
        raise UserError(f"{key}._target_ is {path!r}: module.Class is expected.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if f"{module_name}.".startswith(f"{missing}."):
            raise UserError(
                f"{key}._target_ is {path}: there is no module {missing!r} here.\n"
                "A module of your own is found when it is installed, on PYTHONPATH or inside --config-dir."
            ) from error
        raise UserError(f"{key} needs the package {missing!r}, which is not installed.") from error
    if not hasattr(module, class_name):
        known = [n for n, value in vars(module).items() if dataclasses.is_dataclass(value)]
        raise UserError(f"{key}._target_: {module_name} has no {class_name!r}. {nearest(class_name, known)}")
    return getattr(module, class_name)


def _require_protocol(cls: Any, group: str, key: str, path: str) -> None:
    """Look before anything is called: a YAML that names os.system must not run it."""
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise UserError(f"{key}._target_ is {path}, which is no frozen dataclass: it cannot be a {group}.")
    attribute = _PROTOCOL[group]
    if not any(attribute in base.__dict__ for base in cls.__mro__):
        raise UserError(f"{key}._target_ is {path}, which has no `{attribute}`: it cannot be a {group}.")


def _fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def _construct(cls: type, settings: Mapping[str, Any], key: str, owner: str) -> Any:
    """An instance of a dataclass, each setting checked against its field. owner: what an error calls the instance."""
    known = _fields(cls)
    hints = get_type_hints(cls)
    for name in settings:
        if name not in known:
            settable = [n for n in known if n != "name"]
            raise UserError(f"{key}.{name} is not a setting of {owner}. {nearest(name, settable)}")
    for name, f in known.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and name not in settings:
            raise UserError(f"{key}.{name} is not set, and {owner} needs it.")
    return cls(**{name: _convert(value, hints[name], f"{key}.{name}") for name, value in settings.items()})


def _convert(value: Any, hint: Any, key: str) -> Any:
    """The value as the type that a field asks for. YAML knows no tuples and paths, and an environment no numbers."""
    origin, args = get_origin(hint), get_args(hint)
    if value == UNSET:
        raise UserError(f"{key} is not set: give {key}=...")
    if hint is Any or hint is type(value):
        return value
    if origin in (Union, types.UnionType):
        return _convert_to_any(value, args, hint, key)
    if origin in (list, tuple, Sequence) and isinstance(value, list):
        return _convert_list(value, origin, args, hint, key)
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {str(k): _convert(v, args[1], f"{key}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _construct(hint, value, key, owner=key)
    if origin is Literal and value in args:
        return value
    converted = _convert_plain(value, hint)
    if converted is None:
        raise UserError(f"{key}={_shown(value)}: {expected(hint)} is expected.")
    return converted


def _convert_to_any(value: Any, options: Sequence[Any], hint: Any, key: str) -> Any:
    if value is None and type(None) in options:
        return None
    for option in options:
        # a value that is of one of the types already is not to become the other: 3 stays a number in `str | int`
        if option is type(value):
            return value
    errors = []
    for option in (o for o in options if o is not type(None)):
        try:
            return _convert(value, option, key)
        except UserError as error:
            errors.append(error)
    if len(errors) == 1 and not str(errors[0]).startswith(f"{key}="):
        raise errors[0]  # it is about a setting further inside, and says more than this one could
    raise UserError(f"{key}={_shown(value)}: {expected(hint)} is expected.")


def _convert_list(value: list[Any], origin: Any, args: Sequence[Any], hint: Any, key: str) -> Any:
    if origin is tuple and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise UserError(f"{key}={_shown(value)}: {expected(hint)} is expected.")
        kinds = list(args)
    else:
        kinds = [args[0]] * len(value)
    items = [_convert(v, kind, f"{key}[{i}]") for i, (v, kind) in enumerate(zip(value, kinds, strict=True))]
    return items if origin is list else tuple(items)


def _convert_plain(value: Any, hint: Any) -> Any:
    """A number, a text or a path; None when the value is nothing of the kind."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        if hint is int and not isinstance(value, float):
            return int(value)
        if hint is float:
            return float(value)
    except ValueError:
        return None
    if hint is str:
        return str(value)
    if hint is Path and str(value).strip():
        return Path(os.path.expanduser(str(value)))
    if hint is bool and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return None


def expected(hint: Any) -> str:
    """A type in a person's words."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    origin, args = get_origin(hint), get_args(hint)
    if hint in plain:
        return plain[hint]
    if hint is type(None):
        return "null"
    if origin in (Union, types.UnionType):
        return " or ".join(expected(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}, like [{','.join(_example(a) for a in args)}],"
    if origin in (list, tuple, Sequence):
        return f"a list like [{_example(args[0])},{_example(args[0])}]"
    if origin in (dict, Mapping) or dataclasses.is_dataclass(hint):
        return "a group of settings, like {name: value},"
    return f"a {getattr(hint, '__name__', hint)}"


def _example(hint: Any) -> str:
    return {int: "1", float: "0.5", bool: "true"}.get(hint, "a")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _usable_device(name: str, shard: Shard | None = None) -> str:
    """The device that was asked for. A missing GPU is an error, never a silent CPU. Shards share several GPUs out."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        own = f"cuda:{(shard.number - 1) % count}" if shard is not None and count > 1 else "cuda"
        return own if count else "cpu"
    if name.startswith("cuda") and not count:
        raise UserError(
            f"device={name}: PyTorch {torch.__version__} finds no usable GPU here.\n"
            "Use device=cpu, or see what `ibxai doctor` says."
        )
    index = int(name.partition(":")[2] or 0)
    if name.startswith("cuda") and index >= count:
        raise UserError(f"device={name}: there are {count} GPUs here, cuda:0 to cuda:{count - 1}.")
    return name
