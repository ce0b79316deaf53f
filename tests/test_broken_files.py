"""Broken files of every kind among good and odd ones, in every layout: as scripts/broken_files.py, with fewer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "broken_files.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("broken_files", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["broken_files"] = module
    spec.loader.exec_module(module)
    return module


script = load()


@pytest.mark.parametrize("name", script.LAYOUTS)
def test_nothing_is_lost_and_each_broken_file_is_listed(name: str, tmp_path: Path) -> None:
    layout = script.LAYOUTS[name]
    found = script.examine(layout, tmp_path, good=3, broken=len(layout.broken))
    assert list(found.wrong) == []
    assert len(found.read) == 3 + len(layout.odd)
    assert len(found.skipped) == len(layout.broken)
    assert found.read.isdisjoint(found.skipped)
    assert all(len(reason) > 5 for reason in found.skipped.values())


def test_the_script_sees_what_is_wrong() -> None:
    files = {"a": "good", "b": "broken: empty", "c": "broken: text", "d": "good", "e": "broken: cut"}
    said = list(script.differences(files, {"a", "b"}, {"c": "unexpected KeyError: x", "e": "cut short"}))
    assert [line[0] for line in said] == ["b", "c", "d"]
    assert "lost" in said[2]


def test_the_odd_files_hold_the_picture(tmp_path: Path) -> None:
    """Read, and not as something else: what stores grey without loss gives the same pixels back."""
    from ibxai.datasets.pictures import read_picture

    for kind in ("16 bit", "palette", "RGBA", "another ending", "animation", "float 0..1", "words behind its end"):
        path = tmp_path / kind.partition(" ")[0]
        script.ODD_PICTURES[kind](path)
        np.testing.assert_array_equal(np.asarray(read_picture(path))[..., 0], script.PIXELS, err_msg=kind)
