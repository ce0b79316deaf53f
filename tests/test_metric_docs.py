"""docs/metrics.md names every metric, and its table of extremes is what scripts/metric_extremes.py prints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from ibxai.backbones import freeze
from ibxai.catalogue import entries

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
NAMES = list(entries()["metric"])


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("metric_extremes", ROOT / "scripts" / "metric_extremes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lines(script: ModuleType) -> dict[str, list[str]]:
    body = PAGE.partition(script.BEGIN)[2].partition(script.END)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    assert cells[0] == ["metric", "better", "perfect", "worst", "constant", "zero", "random"]
    return {row[0].strip("`"): row[1:] for row in cells[2:]}


def test_every_metric_has_its_line(lines: dict[str, list[str]]) -> None:
    assert list(lines) == NAMES
    for better, perfect, worst, *_ in lines.values():
        assert (float(perfect) > float(worst)) == (better == "higher")


@pytest.mark.parametrize("name", ["bbox", "ehr", "ehr_scaled", "iou", "pearson", "pointing_game", "confidence_drop"])
def test_the_numbers(name: str, script: ModuleType, lines: dict[str, list[str]]) -> None:
    """Of the metrics that take no time."""
    from test_metric_contract import metric_of

    backbone, batch = freeze(script.Patches(), (3, script.SIZE, script.SIZE), name="patches"), script.pictures()
    metric = metric_of(name, **script.FITTED.get(name, {}))
    for shown, heatmap in zip(lines[name][1:], script.maps(batch).values(), strict=True):
        found = script.value_of(metric, backbone, batch, heatmap)
        assert (found == shown) or abs(float(found) - float(shown)) < 0.015
