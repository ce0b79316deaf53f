"""What the network says whatever the map is asked once: by the second method, after damage, of another target."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import batch_of, noise_pictures, relative, small_backbone
from test_pipeline import (  # noqa: F401  # pytest finds fixtures by name
    Spy,
    TinyNet,
    _nothing_seen_yet,
    _one_thread,
    lines_of,
    passes,
    pictures,
    plan,
)

from ibxai.metrics import SensitivityN
from ibxai.pipeline import Plan, run
from ibxai.responses import KeptResponses
from ibxai.targets import Classes
from ibxai.types import Attribution

METRIC = SensitivityN(points=3, sets=5)
ASKED = 3 * 5  # network passes a row


@pytest.fixture
def judged(plan: Plan) -> Plan:  # noqa: F811
    return replace(plan, metrics={"sensitivity_n": METRIC})


def values(folder: Path) -> list[float]:
    return [float(line["value"]) for line in lines_of(folder / "metrics.csv")]


def files(outputs: Path) -> list[Path]:
    return sorted(outputs.glob("tinydata/*/cache/responses-*/*.safetensors"))


def test_the_second_method_asks_the_network_nothing(judged: Plan, passes: Counter[str], tmp_path: Path) -> None:  # noqa: F811
    run(judged)
    assert passes.total() == 7 + 7 * ASKED
    passes.clear()
    other = replace(judged, method=Spy(scale=-1.0))
    second = run(other)
    assert passes.total() == 7  # the prediction
    alone = run(replace(other, outputs=tmp_path / "alone"))
    assert values(second.folder) == pytest.approx(values(alone.folder), rel=1e-5)
    assert np.std(values(second.folder)) > 0.05
    assert len(files(judged.outputs)) == 7


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("backbone", TinyNet(weights_seed=1)),
        ("backbone", TinyNet(resize=18)),
        ("target", Classes((0,))),
        ("metrics", {"sensitivity_n": replace(METRIC, value=0.5)}),
    ],
)
def test_what_changes_the_answer_asks_again(judged: Plan, part: str, other: object, tmp_path: Path) -> None:
    judged = replace(judged, target=Classes((1,)))
    run(judged)
    changed = replace(judged, method=Spy(scale=-1.0), **{part: other})  # type: ignore[arg-type]
    found = run(changed)
    alone = run(replace(changed, outputs=tmp_path / "alone"))
    assert values(found.folder) == pytest.approx(values(alone.folder), rel=1e-5)
    assert len(files(judged.outputs)) == 14


def test_damaged_files_are_made_again(judged: Plan, passes: Counter[str]) -> None:  # noqa: F811
    first = run(judged)
    cut, foreign, *_ = files(judged.outputs)
    cut.write_bytes(cut.read_bytes()[:-10])
    foreign.write_bytes(b"something else")
    passes.clear()
    again = run(replace(judged, method=Spy(scale=2.0)))
    assert passes.total() == 7 + 2 * ASKED
    assert values(again.folder) == pytest.approx(values(first.folder), rel=1e-5), "r does not feel the scale"


def test_rows_by_sample_and_output(tmp_path: Path) -> None:
    """One file a (sample, class), whatever batch it comes in; ids that are no file names too."""
    backbone, kept = small_backbone(), KeptResponses(tmp_path / "kept")
    ids = ["a", "../a", "a", "A", "b" * 300]
    batch = batch_of(noise_pictures(1).expand(5, -1, -1, -1), [0, 0, 3, 0, 0], ids)
    plain = METRIC.responses(backbone, batch)
    first = kept.of(METRIC, backbone, batch.take([2, 4]))
    assert relative(first, plain[[2, 4]]) < 1e-5
    with backbone.counting() as counted:
        found = kept.of(METRIC, backbone, batch)
    assert counted.total() == 3 * ASKED
    assert torch.equal(found[[2, 4]], first)
    assert relative(found, plain) < 1e-5
    assert len(list((tmp_path / "kept").iterdir())) == 5
    assert len(list(tmp_path.iterdir())) == 1
    attribution = Attribution(noise_pictures(5, (1, 32, 32))[:, 0], "score")
    with backbone.counting() as counted:
        judged = METRIC(backbone, batch, attribution, found)
    assert counted.total() == 0
    assert relative(judged["curve"], METRIC(backbone, batch, attribution)["curve"]) < 1e-4


def test_another_picture_of_the_same_name_asks_again(judged: Plan, pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    run(judged)
    shutil.copytree(pictures, tmp_path / "changed")
    shutil.copy(pictures / "e.png", tmp_path / "changed" / "a.png")  # of another size, by which it is known
    changed = replace(judged, dataset=replace(judged.dataset, root=str(tmp_path / "changed")))  # type: ignore[type-var]
    found, alone = run(changed), run(replace(changed, outputs=tmp_path / "alone"))
    assert values(found.folder) == pytest.approx(values(alone.folder), rel=1e-5)
    assert len(files(judged.outputs)) == 14
