"""Building a part from its config node: what is looked at before anything is called, and how values become types."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from ibxai.catalogue import GROUPS, entries
from ibxai.config import build, unset
from ibxai.errors import UserError


@dataclass(frozen=True)
class Size:
    height: int
    width: int = 7

    def __post_init__(self) -> None:
        if self.height < 0:
            raise UserError("a negative height")


@dataclass(frozen=True)
class Everything:
    """A method with a field of every type that a part may have."""

    whole: int = 0
    number: float = 0.0
    switch: bool = False
    text: str = ""
    path: Path = Path()
    choice: Literal["a", "b", 3] = "a"
    maybe: int | None = None
    either: float | Literal["auto"] = "auto"
    layer: str | int = ""
    many: tuple[int, ...] = ()
    pair: tuple[int, float] = (0, 0.0)
    listed: list[str] = field(default_factory=list)
    sequence: Sequence[float] = ()
    named: dict[str, float] = field(default_factory=dict)
    mapping: Mapping[str, int] = field(default_factory=dict)
    size: Size | None = None
    anything: Any = None

    def fit(self, *arguments: object) -> None: ...


@dataclass(frozen=True)
class Named:
    name: str
    root: Path

    def fit(self, *arguments: object) -> None: ...


@dataclass(frozen=True)
class Inherited(Everything):
    more: int = 1


class Plain:
    def fit(self, *arguments: object) -> None: ...


CALLED = []


def factory(**settings: object) -> None:
    CALLED.append(settings)


def node(cls: str, **settings: Any) -> dict[str, Any]:
    return {"_target_": f"{__name__}.{cls}", **settings}


@pytest.mark.parametrize(
    ("name", "given", "becomes"),
    [
        ("whole", 3, 3),
        ("whole", "3", 3),  # from ${oc.env:...}
        ("number", 3, 3.0),
        ("number", "1e-4", 1e-4),  # YAML reads 1e-4 as a text
        ("switch", "false", False),
        ("switch", True, True),
        ("text", 2012, "2012"),
        ("path", "~/x", Path.home() / "x"),
        ("choice", "b", "b"),
        ("choice", 3, 3),
        ("maybe", None, None),
        ("maybe", 4, 4),
        ("either", "auto", "auto"),
        ("either", 1, 1.0),
        ("layer", 3, 3),
        ("layer", "3", "3"),
        ("many", [1, 2, 3], (1, 2, 3)),
        ("many", [], ()),
        ("pair", [1, 2], (1, 2.0)),
        ("listed", ["a", 1], ["a", "1"]),
        ("sequence", [1, 2], (1.0, 2.0)),
        ("named", {"a": 1}, {"a": 1.0}),
        ("mapping", {1: 2}, {"1": 2}),
        ("size", {"height": "3"}, Size(3)),
        ("size", None, None),
        ("anything", {"a": [1]}, {"a": [1]}),
    ],
)
def test_values_become_the_types_of_the_fields(name: str, given: object, becomes: object) -> None:
    built = getattr(build(node("Everything", **{name: given}), "method"), name)
    assert built == becomes
    assert type(built) is type(becomes)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("whole", 1.0, "a whole number"),
        ("whole", True, "a whole number"),
        ("whole", "x", "a whole number"),
        ("whole", None, "a whole number"),
        ("whole", [1], "a whole number"),
        ("number", False, "a number"),
        ("number", "x", "a number"),
        ("switch", 1, "true or false"),
        ("switch", "yes", "true or false"),
        ("text", ["a"], "a text"),
        ("path", "", "a path"),
        ("path", None, "a path"),
        ("choice", "c", "one of a, b, 3"),
        ("maybe", "x", "a whole number or null"),
        ("either", "x", "a number or one of auto"),
        ("many", 3, "a list like [1,1]"),
        ("pair", [1], "a list of 2, like [1,0.5],"),
        ("named", [1], "a group of settings, like {name: value},"),
        ("size", 3, "a group of settings, like {name: value}, or null"),
    ],
)
def test_other_values_are_refused(name: str, given: object, expected: str) -> None:
    with pytest.raises(UserError) as error:
        build(node("Everything", **{name: given}), "method")
    assert f"method.{name}=" in str(error.value)
    assert f"{expected} is expected." in str(error.value)


def test_mistakes_further_inside_are_named_by_their_full_key() -> None:
    for settings, says in [
        ({"many": [1, "x"]}, "method.many[1]=x: a whole number is expected."),
        ({"named": {"a": "x"}}, "method.named.a=x: a number is expected."),
        ({"size": {"height": "x"}}, "method.size.height=x: a whole number is expected."),
        ({"size": {"hight": 3}}, "method.size.hight is not a setting of method.size. Did you mean height"),
        ({"size": {}}, "method.size.height is not set, and method.size needs it."),
        ({"size": {"height": -1}}, "a negative height"),
        ({"whole": "???"}, "method.whole is not set: give method.whole=..."),
    ]:
        with pytest.raises(UserError) as error:
            build(node("Everything", **settings), "method")
        assert says in str(error.value)


def test_name_goes_to_the_classes_that_want_it() -> None:
    assert build(node("Named", name="mine", root="/x"), "method") == Named("mine", Path("/x"))
    assert build(node("Everything", name="mine"), "method") == Everything()
    with pytest.raises(UserError, match=r"method.root is not set, and mine needs it"):
        build(node("Named", name="mine"), "method")
    for bad in ("../x", "", "a b", 3, None, ".hidden"):
        with pytest.raises(UserError, match=r"method.name="):
            build(node("Named", name=bad, root="/x"), "method")


def test_unknown_setting_suggests_the_near_one() -> None:
    with pytest.raises(UserError, match=r"method.woles is not a setting of mine. Did you mean whole\?"):
        build(node("Everything", name="mine", woles=3), "method")
    with pytest.raises(UserError, match=r"metric.area.x is not a setting of area"):
        build(node("Area", x=3), "metric.area")


@dataclass(frozen=True)
class Area:
    def __call__(self) -> None: ...


@pytest.mark.parametrize(
    "target", [f"{__name__}.factory", f"{__name__}.Plain", "os.system", "builtins.eval", f"{__name__}.CALLED"]
)
def test_nothing_is_called_that_is_no_frozen_dataclass(target: str) -> None:
    with pytest.raises(UserError, match="no frozen dataclass"):
        build({"_target_": target, "command": "touch executed"}, "method")
    assert CALLED == []
    assert not os.path.exists("executed")


def test_protocol_of_the_group() -> None:
    assert build(node("Inherited", more=2), "method").more == 2
    for group, attribute in [
        ("dataset", "samples"),
        ("backbone", "load"),
        ("metric.x", "__call__"),  # which every class has, in the sense of hasattr
        ("target", "make"),
    ]:
        with pytest.raises(UserError, match=f"has no `{attribute}`"):
            build(node("Everything"), group)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "describes no method"),
        (3, "describes no method"),
        ({}, "describes no method. Choose one by name: method=NAME"),
        ({"_target_": 3}, "describes no method"),
        ({"_target_": "nosuch.module.X"}, "there is no module 'nosuch' here"),
        ({"_target_": "ibxai.nosuch.X"}, "there is no module 'ibxai.nosuch' here"),
        ({"_target_": "X"}, "module.Class is expected"),
        ({"_target_": ""}, "module.Class is expected"),
        ({"_target_": ".x.Y"}, "module.Class is expected"),
        ({"_target_": "x y.Z"}, "module.Class is expected"),
        ({"_target_": f"{__name__}.Everythin"}, "Did you mean Everything?"),
    ],
)
def test_nodes_that_name_no_class(given: object, says: str) -> None:
    with pytest.raises(UserError) as error:
        build(given, "method")
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import nosuchpackage\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="method needs the package 'nosuchpackage', which is not installed"):
        build({"_target_": "needs_more.X"}, "method")


def test_a_bug_in_a_users_module_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "has_a_bug.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        build({"_target_": "has_a_bug.X"}, "method")


def test_unset_finds_every_depth() -> None:
    assert list(unset({"a": "???", "b": {"c": "???", "d": 1}, "e": None})) == ["a", "b.c"]


OURS = [(group, name) for group in GROUPS if group != "experiment" for name in entries()[group]]


@pytest.mark.parametrize(("group", "name"), OURS)
def test_every_config_of_ours_builds(group: str, name: str) -> None:
    settings = yaml.safe_load(entries()[group][name].text)
    settings.pop("defaults", None)  # Hydra's, for what a dataset brings along
    if group == "metric":
        assert list(settings) == [name], "a metric's YAML nests itself under its own name"
        build(settings[name], f"metric.{name}")
    elif missing := list(unset(settings)):
        with pytest.raises(UserError, match=f"{group}.{missing[0]} is not set"):
            build(settings, group)
    else:
        build(settings, group)
        assert group in ("target", "loss") or settings["name"] == name
