"""What a hostile user gives: every mistake is a short word and exit code 2, every bad picture a line in skipped.csv.

All through the command line, in this process.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_pipeline import EXPLAINED, NAMES, heatmaps_of, lines_of, write_pictures

from ibxai import pipeline
from ibxai.catalogue import GROUPS, entries
from ibxai.cli import main
from ibxai.config import unset
from ibxai.pipeline import Outcome, Plan
from ibxai.store import RunStore

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet"
PARTS: dict[str, dict[str, Any]] = {
    "backbone/tinynet": {"_target_": "test_pipeline.TinyNet", "nan": False},
    "dataset/tinydata": {"_target_": "test_pipeline.TinyData"},
    "method/spy": {"_target_": "test_pipeline.Spy", "fails_at": None, "scale": 1.0},
    "method/slowspy": {"_target_": "test_pipeline.Spy", "seconds": 0.15},
    "metric/mean": {"mean": {"_target_": "test_pipeline.Mean", "power": 1}},
}


def tiny_config(folder: Path, root: Path) -> list[str]:
    """A --config-dir with the tiny parts, and the settings that choose them."""
    for name, settings in PARTS.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        more = {"root": str(root)} if name == "dataset/tinydata" else {}
        path.write_text("# tiny\n" + yaml.safe_dump({**settings, **more}))
    return ["--config-dir", str(folder), "dataset=tinydata", "backbone=tinynet", "pictures=1"]


class Shell:
    """`ibxai run` with tiny parts, in an empty folder of its own."""

    def __init__(self, place: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.outputs, self.root, self._capsys = place / "outputs", root, capsys
        self._chosen = [*tiny_config(place / "conf", root), "method=spy", "metric=[mean]", "batch_size=3"]

    def __call__(self, *settings: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        self._capsys.readouterr()
        code = main(["run", *self._chosen, f"outputs='{self.outputs}'", *settings])
        return (code, *self._capsys.readouterr())

    def refused(self, *settings: str) -> str:
        """stderr of a command that has to be refused in the way of all mistakes."""
        before = sorted(self.outputs.parent.iterdir())
        code, out, err = self(*settings)
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert len(err.splitlines()) <= 3, err
        assert err.splitlines()[-1].strip()
        assert "ibxai: " in err
        assert sorted(self.outputs.parent.iterdir()) == before, "something was left behind"
        return err

    @property
    def folder(self) -> Path:
        [folder] = [path.parent for path in self.outputs.glob("*/*/*/*/provenance.json")]
        return folder


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    EXPLAINED.clear()
    return Shell(tmp_path, write_pictures(tmp_path / "pictures"), capsys)


# mistakes in the command


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["limit=0"], "limit=0: at least 1 is expected"),
        (["batch_size=-1"], "batch_size=-1"),
        (["batchsize=4"], "Did you mean batch_size"),
        (["method=gradcan"], "Did you mean gradcam"),
        (["method=gradcam", "method.layer=nope"], "has no layer 'nope'. Roles: "),
        (["method=gradcam", "method.layer=gradcm"], "Did you mean gradcam"),
        (["method=iba", "method.steps=0"], "method.steps is 0"),
        (["method.scale=much"], "method.scale=much: a number is expected"),
        (["target=classes"], "target.ids is not set"),
        (
            ["target=classes", "target.ids=[5000]"],
            "Target class 5000 does not exist: the network has 4 outputs",
        ),
        (["target=classes", "target.ids=[-1]"], "give class numbers from 0 on"),
        (["target=classes", "target.ids=[1,1]"], "'1' comes more than once"),
        (["backbone.nan=true"], "2.bias holds NaN"),
        (["dataset=imagenet"], "dataset.root is not set"),
        (["dataset=imagenet", "dataset.root=/no/such/folder"], "/no/such/folder does not exist"),
        (["dataset=imagenet", "dataset.root=pictures"], "no labels"),
        (["dataset=imagenet", "dataset.root=conf"], "no pictures under"),
        (["dataset=imagenet", "dataset.root=conf/metric/mean.yaml"], "is a file, not a folder"),
        (["dataset.root=conf"], "The dataset tinydata has no samples"),
        (["metric=[mean]", "metric.mean.power=x"], "metric.mean.power=x"),
        (["outputs=/proc/nowhere"], "Cannot write /proc/nowhere"),
        (["outputs=conf/metric/mean.yaml"], "Cannot write conf/metric/mean.yaml"),
        (["outputs=conf/metric/mean.yaml/deeper"], "Cannot write conf/metric/mean.yaml/deeper"),
        (["outputs=''"], "outputs is empty"),
        (["device=cuda:99"], "device=cuda:99"),
        (["seed=0,1"], "add -m"),
    ],
)
def test_mistakes(shell: Shell, settings: list[str], says: str) -> None:
    assert says in shell.refused(*settings)


def test_weights_with_nan(shell: Shell) -> None:
    import timm

    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    state["blocks.0.0.conv_pw.weight"][0, 0] = torch.nan
    torch.save(state, "weights.pt")
    err = shell.refused("backbone=efficientnet_lite0", "backbone.weights=weights.pt")
    assert "blocks.0.0.conv_pw.weight holds NaN" in err


# bad pictures


def imagenet_root(folder: Path) -> Path:
    """Class folders with pictures of every kind that can be read."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    kinds: dict[str, Image.Image] = {
        "rgb": Image.fromarray(pixels),
        "grey": Image.fromarray(pixels[..., 0]),
        "cmyk": Image.fromarray(pixels).convert("CMYK"),
        "deep": Image.fromarray(random.integers(0, 65536, (40, 30), dtype=np.uint16)),
        "palette": Image.fromarray(pixels).convert("P"),
        "rgba": Image.fromarray(random.integers(0, 256, (40, 30, 4), dtype=np.uint8)),
    }
    for place, (name, image) in enumerate(kinds.items()):
        path = folder / ("n01440764" if place % 2 else "n01443537") / f"{name}.{'JPEG' if name == 'cmyk' else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


def huge_header(path: Path) -> None:
    """A PNG of 50,000 x 50,000 that ends behind its header."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def test_bad_pictures_among_good_ones(shell: Shell, tmp_path: Path) -> None:
    root = imagenet_root(tmp_path / "good")
    assert shell("dataset=imagenet", f"dataset.root={root}")[0] == 0
    good = heatmaps_of(shell.folder)
    assert {row.partition("@")[0] for row in good} == {"rgb", "grey", "cmyk", "deep", "palette", "rgba"}
    assert len({values.tobytes() for values in good.values()}) == 6
    shutil.rmtree(shell.outputs)

    broken = root / "n01440764"
    huge_header(broken / "huge.png")
    (broken / "empty.JPEG").touch()
    (broken / "text.JPEG").write_text("no picture")
    whole = (root / "n01443537" / "rgb.png").read_bytes()
    (broken / "cut.png").write_bytes(whole[: len(whole) // 2])
    (broken / "link.png").symlink_to("nowhere")
    (broken / "folder.png").mkdir()
    code, out, err = shell("dataset=imagenet", f"dataset.root={root}")
    assert code == 3
    reasons = {line["sample"]: line["reason"] for line in lines_of(shell.folder / "skipped.csv")}
    assert reasons.keys() == {"huge", "empty", "text", "cut", "link", "folder"}
    assert "100,000,000" in reasons["huge"]
    assert "0 bytes" in reasons["empty"]
    assert "not a picture" in reasons["text"]
    assert "cut short" in reasons["cut"]
    assert "6 samples skipped" in out
    assert "Traceback" not in err
    page = (shell.folder / "report.html").read_text()
    for sample, reason in reasons.items():
        assert f"skipped {sample}: {reason}" in err
        assert sample in page
        assert reason.split("'")[0].partition("<")[0] in page
    for row, values in heatmaps_of(shell.folder).items():
        np.testing.assert_allclose(values, good[row], rtol=1e-4, atol=1e-6)
    assert len(lines_of(shell.folder / "metrics.csv")) == 12


def test_all_pictures_bad(shell: Shell) -> None:
    for name in NAMES:
        (shell.root / f"{name}.png").write_bytes(b"x")
    code, out, err = shell("method=iba")
    assert code == 3
    assert "7 samples skipped" in out
    assert "Traceback" not in err
    assert (shell.folder / "report.html").is_file()
    assert shell("method=iba")[:2] == (code, out), "and again"


def test_a_sample_with_an_unforeseen_exception(shell: Shell) -> None:
    code, _, err = shell("+dataset.raises=d")
    assert code == 3
    [line] = lines_of(shell.folder / "skipped.csv")
    assert line == {"sample": "d", "reason": "unexpected ZeroDivisionError: nobody foresaw this"}
    assert "Traceback" not in err
    assert len(heatmaps_of(shell.folder)) == 6


@pytest.mark.skipif(os.name == "nt", reason="such names are Unix's")
def test_names_that_are_no_unicode(shell: Shell) -> None:
    odd = os.fsdecode(b"\xff\xfe odd,\"name'\n.png")
    os.rename(shell.root / "b.png", shell.root / odd)
    code, _, err = shell()
    assert code == 0, err
    assert "Traceback" not in err
    assert odd.removesuffix(".png") in {row.sample_id for row in RunStore(shell.folder).rows()}
    assert len(heatmaps_of(shell.folder)) == 7
    (shell.root / odd).write_bytes(b"bad")
    code, _, err = shell()
    assert code == 3
    assert "Traceback" not in err
    assert "Logging error" not in err


# the disk


def test_a_disk_that_fills_up_in_the_middle(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, left = Path.replace, [12]

    def full(path: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        code, out, err = shell()
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert "No space left on device" in err.splitlines()[-2]
    kept = heatmaps_of(shell.folder)
    assert 0 < len(kept) < 7
    assert not list(shell.outputs.rglob("*.tmp"))
    EXPLAINED.clear()
    assert shell()[0] == 0
    assert set(EXPLAINED) == {name for name in NAMES if f"{name}@predicted" not in kept}, "nothing was lost"


def test_a_log_that_cannot_grow_is_no_disaster(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from ibxai.logs import _File

    def full(self: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_File, "flush", full)
    monkeypatch.setattr(_File, "close", lambda self: None)
    code, _, err = shell()
    assert code == 0
    assert "Traceback" not in err


# bugs


def test_a_bug_in_the_middle(shell: Shell) -> None:
    code, out, err = shell("method.fails_at=e")
    assert code == 1
    assert "Traceback" in err
    assert "RuntimeError: in the middle" in err
    assert out == ""
    assert heatmaps_of(shell.folder).keys() == {f"{name}@predicted" for name in "abc"}
    log = (shell.folder / "run.log").read_text()
    assert "Traceback" in log
    assert "RuntimeError: in the middle" in log
    assert json.loads((shell.folder / "provenance.json").read_text())["finished"] is None
    EXPLAINED.clear()
    shell("method.fails_at=e")
    assert EXPLAINED == [], "the finished batch was not done again"


def test_jobs_behind_a_failing_one_are_run(shell: Shell) -> None:
    code, out, err = shell("-m", "method.fails_at=never,e,nobody")
    assert code == 1
    assert "3 jobs: 2 done, 1 failed" in out
    assert "RuntimeError: in the middle" in err
    folders = {len(heatmaps_of(folder)) for folder in (p.parent for p in shell.outputs.glob("*/*/*/*/provenance.json"))}
    assert folders == {7, 3}
    code, out, _ = shell("-m", "backbone.nan=false,true", "limit=1")
    assert code == 2
    assert "2 jobs: 1 done, 1 failed" in out


def test_a_sweep_with_skipped_samples(shell: Shell) -> None:
    code, out, _ = shell("-m", "target=label,predicted", "seed=0,1")
    assert code == 3
    assert "4 jobs: 4 done, 0 failed" in out
    assert out.count("2 samples skipped\n") == 2


# every YAML


def composed(settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Plan:
    plans: list[Plan] = []

    def keep(plan: Plan) -> Outcome:
        plans.append(plan)
        return Outcome(tmp_path, tmp_path / "report.html", 0, 0, 0, {})

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run", keep)
        assert main(["run", *settings]) == 0
    return plans[0]


# an experiment may be a sweep: test_experiments.py; a loss belongs to `ibxai train`: test_train.py
ALL = [(group, name) for group in GROUPS if group not in ("experiment", "loss") for name in entries()[group]]


@pytest.mark.parametrize(("group", "name"), ALL)
def test_every_yaml_composes_and_builds(group: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = yaml.safe_load(entries()[group][name].text)
    missing = [] if group == "metric" else list(unset(settings))
    given = [f"{group}.{key}={[0] if key == 'ids' else tmp_path}" for key in missing]
    if group == "backbone":
        given = ["backbone.name=resnet18"] if name == "timm" else []
        given += ["backbone.weights=none", "backbone.allow_random=true"]
    if name in ("lstm", "hf"):
        given = ["backbone.weights=some.safetensors", "dataset=imdb", f"dataset.root={tmp_path}", "method=iba_text"]
    if group == "dataset" and name == "imagenet":
        given = [f"dataset.root={imagenet_root(tmp_path / 'root')}"]
    plan = composed([f"{group}=[{name}]" if group == "metric" else f"{group}={name}", *given], monkeypatch, tmp_path)
    if group == "metric":
        assert list(plan.metrics) == [name]
    elif group == "method":
        assert plan.method_name == name
    elif group in ("backbone", "dataset"):
        assert getattr(plan, group).name == ("resnet18" if name == "timm" else name)
    if name == "imagenet":
        assert len(plan.dataset.samples()) == 6


def test_a_real_network_with_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = imagenet_root(tmp_path / "root")
    settings = ["dataset=imagenet", f"dataset.root={root}", "backbone=resnet50", "method=random", "metric=[]"]
    settings += ["limit=1", f"outputs={tmp_path / 'outputs'}", "backbone.weights=none"]
    assert main(["run", *settings]) == 2
    assert "allow_random=true" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()
    assert main(["run", *settings, "backbone.allow_random=true"]) == 0
    assert "untrained" in capsys.readouterr().err


# pictures that people really have


@pytest.mark.parametrize("part", ["val", "val_boxes"])
def test_real_imagenet(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (REAL_DATA / part).is_dir():
        pytest.skip(f"the ImageNet pictures are not here: {REAL_DATA / part}")
    settings = ["dataset=imagenet", f"dataset.root={REAL_DATA / part}", "method=random", "metric=[]", "limit=8"]
    assert main(["run", *settings, "target=label", f"outputs={tmp_path}"]) == 0
    [folder] = [path.parent for path in tmp_path.glob("*/*/*/*/provenance.json")]
    store = RunStore(folder)
    listed = store.rows()
    assert len(listed) == (100 if part == "val" else len({row.sample_id for row in listed}))
    stored = [store.read_heatmap(row.row_id) for row in listed[:8]]
    assert [row.label for row in listed[:8]] == [heatmap.target for heatmap in stored]
    right = [heatmap.prediction == heatmap.target for heatmap in stored]
    assert sum(right) >= 4, "a network of 75 % top-1 that is right less often has other labels than the dataset"
    if part == "val_boxes":
        assert "boxes from" in capsys.readouterr().err


def test_the_default_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is typed first, with fewer steps."""
    settings = ["method.steps=1", "method.draws=1", "metric.insertion.step=0.5", "metric.deletion.step=0.5"]
    assert main(["run", f"outputs={tmp_path}", *settings]) == 0
    out = capsys.readouterr().out
    assert "7 rows: 7 heatmaps and 14 scores made" in out
    [folder] = tmp_path.glob("sample/efficientnet_lite0/iba/*")
    assert out.splitlines()[-1] == f"report: {folder / 'report.html'}"
    assert [line["metric"] for line in lines_of(folder / "summary.csv")] == ["deletion", "insertion"]
    assert len(heatmaps_of(folder)) == 7
