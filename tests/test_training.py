"""Training: the answer where it is known, the same again from the same seed, nothing left behind; and the small CNN."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from networks import fixed_seed, noise_pictures, relative
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ibxai.backbones.small import SmallCNN
from ibxai.backbones.training import InMemory, Recipe, labelled_pictures, outputs_of, train
from ibxai.catalogue import entries
from ibxai.config import build
from ibxai.errors import BadSample, UserError
from ibxai.preprocessing import Preprocessing
from ibxai.types import Picture, Sample

QUICK = Recipe(epochs=3, batch_size=8, learning_rate=0.01)


def linear(seed: int = 0) -> nn.Module:
    with fixed_seed(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4, 2))


def with_dropout() -> nn.Module:
    with fixed_seed():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 2))


def examples(count: int = 30, size: int = 4) -> InMemory:
    inputs = noise_pictures(count, (3, size, size))
    return InMemory(inputs, (inputs.mean((1, 2, 3)) > 0).long())


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same_state(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_it_finds_the_least_squares() -> None:
    inputs = torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    design = torch.cat([inputs.flatten(1), torch.ones(64, 1)], 1)
    answers = design @ torch.linspace(-1, 1, 26).view(13, 2) + 0.1 * noise_pictures(64, (2, 1, 1), seed=3).flatten(1)
    wanted = torch.linalg.lstsq(design.double(), answers.double()).solution
    recipe = Recipe(epochs=300, batch_size=64, learning_rate=0.05, weight_decay=0)
    layer = train(linear(), InMemory(inputs, answers), recipe, 0, loss=F.mse_loss)[1]
    assert relative(torch.cat([layer.weight.T, layer.bias[None]]), wanted) < 1e-3  # type: ignore[list-item]


def test_the_seed_alone_decides() -> None:
    torch.manual_seed(1)
    first = train(with_dropout(), examples(), QUICK, seed=5)
    torch.manual_seed(2)
    np.random.seed(2)
    again, other = (train(with_dropout(), examples(), QUICK, seed=seed) for seed in (5, 6))
    assert same_state(first, again)
    assert not same_state(first, other)


def test_nothing_is_left_behind(capfd: pytest.CaptureFixture[str]) -> None:
    network, data = with_dropout().eval(), examples()
    weights, inputs = state_of(network), data.inputs.clone()
    state = torch.get_rng_state()
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning")}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        trained = train(network, data, QUICK, 0)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(data.inputs, inputs)
    assert levels == {name: logging.getLogger(name).level for name in levels}
    assert not any(part.training for part in trained.modules())
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    assert not same_state(trained, network)
    assert "".join(capfd.readouterr()) == ""


def test_nothing_is_left_behind_by_an_error() -> None:
    state, level = torch.get_rng_state(), logging.getLogger("lightning.pytorch").level
    with pytest.raises(ZeroDivisionError):
        train(linear(), examples(size=2), QUICK, 0, loss=lambda *_: 1 / 0)  # type: ignore[arg-type, return-value]
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger("lightning.pytorch").level == level


class Interrupted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_ctrl_c_stays_ctrl_c() -> None:
    """Lightning would exit with code 1, and ignore the next Ctrl-C."""
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        train(Interrupted(), examples(size=2), QUICK, 0)
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_termination_stays_one() -> None:
    """Lightning would end as if all had gone well. In a cluster's job, too, there is one process and one device."""
    code = (
        "import torch; from ibxai.backbones.training import *\n"
        "torch.set_num_threads(1); print('ready', flush=True)\n"
        "class Told(torch.nn.Linear):\n"
        "    def forward(self, x): print('step', flush=True); return super().forward(x.flatten(1))\n"
        "train(Told(4, 2), InMemory(torch.zeros(8, 1, 2, 2), torch.zeros(8).long()), Recipe(100_000, 8), 0)"
    )
    cluster = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "1", "SLURM_PROCID": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, **cluster}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert process.stdout.readline() == "step\n"
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


def test_every_epoch_sees_every_picture_once_in_another_order() -> None:
    seen: list[list[float]] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.flatten().tolist())
            return self.fc(x.flatten(1))

        def __deepcopy__(self, _: object) -> nn.Module:
            return self

    train(Watching(), InMemory(torch.arange(12.0).view(12, 1, 1, 1), torch.zeros(12, dtype=torch.long)), QUICK, 0)
    assert [len(batch) for batch in seen] == [8] * 3  # what is left over is left out, and is another part each time
    recipe = Recipe(epochs=2, batch_size=4)
    seen.clear()
    train(Watching(), InMemory(torch.arange(12.0).view(12, 1, 1, 1), torch.zeros(12, dtype=torch.long)), recipe, 0)
    epochs = [[number for batch in seen[i : i + 3] for number in batch] for i in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1] != list(range(12))


def test_pictures_one_by_one_give_the_same(tmp_path: Path) -> None:
    """A dataset that hands out single pictures, as one that decodes files does."""

    class Single:
        def __init__(self, data: InMemory) -> None:
            self.data = data

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return self.data[index]

    data = examples(size=2)
    assert same_state(train(linear(), data, QUICK, 0), train(linear(), Single(data), QUICK, 0))


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"batch_size": 1}, {"learning_rate": 0.0}, {"weight_decay": -1.0}])
def test_recipes_that_cannot_be(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"training.{next(iter(settings))}"):
        Recipe(**settings)  # type: ignore[arg-type]


def test_mistakes_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="at least 2 pictures"):
        train(linear(), examples(1), QUICK, 0)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(UserError, match=r"pip install 'ibxai\[train\]'") as error:
        train(linear(), examples(), QUICK, 0)
    assert "\n" not in str(error.value)


# the small network


@dataclass(frozen=True)
class Blocks:
    """16 x 16 pictures of noise, with a patch whose colour is the class; two splits. Ids that end in 7 are damaged."""

    name: str = "blocks"
    train: int = 24
    test: int = 12
    damaged: bool = False

    class_names = ("red", "green", "blue")
    reference_note = "The reference split is the train split."

    def samples(self) -> Sequence[Sample]:
        return self.in_split("test")

    def reference(self) -> Sequence[Sample]:
        return self.in_split("train")

    def in_split(self, split: str) -> Sequence[Sample]:
        ids = [f"{split}-{i}" for i in range(getattr(self, split))]
        return [Sample(name, name, Path("none"), 0, i % 3) for i, name in enumerate(ids)]

    def read(self, sample: Sample) -> Picture:
        if self.damaged and sample.sample_id.endswith("7"):
            raise BadSample("damaged")
        split, _, number = sample.sample_id.partition("-")
        draws = np.random.default_rng([int(number), split == "test"])
        pixels = draws.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        row, column = draws.integers(0, 13, 2)
        assert sample.label is not None
        pixels[row : row + 4, column : column + 4, sample.label] = 255
        return Picture(Image.fromarray(pixels))


TINY = SmallCNN(
    classes=3,
    widths=(8,),
    training=Recipe(epochs=12, batch_size=12, learning_rate=0.03),
    layers={"bottleneck": "stage1", "gradcam": "stage2"},
    preprocessing=Preprocessing(16, 16, (0.5,) * 3, (0.5,) * 3),
)


def test_the_yaml_is_the_default() -> None:
    import yaml

    node = yaml.safe_load(entries()["backbone"]["small_cnn"].text)
    built = build(node, "backbone")
    assert isinstance(built, SmallCNN)
    default = dataclasses.replace(SmallCNN(), layers=built.layers)
    assert built == default
    assert set(node) - {"_target_"} == {f.name for f in dataclasses.fields(SmallCNN)}
    backbone = dataclasses.replace(built, weights="none", allow_random=True).load(16)
    shapes = {role: backbone.layers[backbone.layer(role)] for role in built.layers}
    assert shapes == {
        "early": (16, 32, 32), "mid": (32, 16, 16), "late": (64, 8, 8), "bottleneck": (32, 16, 16),
        "gradcam": (64, 4, 4),
    }  # fmt: skip
    assert sum(p.numel() for p in built.fresh(0).parameters()) == 61_338  # the 61,000 that its description names
    assert backbone.random_weights


def trained_weights(data: Blocks, folder: Path) -> Path:
    """A file with the weights of TINY, trained on the data."""
    pictures = labelled_pictures(data, data.in_split("train"), TINY.preprocessing, 12, 0)
    network = train(TINY.fresh(0), pictures, TINY.training, 0)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(state, folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


def test_the_small_network_learns(tmp_path: Path) -> None:
    data = Blocks(train=96)
    backbone = dataclasses.replace(TINY, weights=str(trained_weights(data, tmp_path))).load(64)
    test = labelled_pictures(data, data.samples(), TINY.preprocessing, 5, 0)
    assert test.sample_ids == tuple(f"test-{i}" for i in range(12))
    with torch.no_grad():
        assert (backbone(test.inputs).argmax(1) == test.answers).float().mean() >= 11 / 12
    assert not backbone.random_weights
    assert backbone.name == "small_cnn"


def test_fresh_weights_come_from_the_seed() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, same, other = (TINY.fresh(seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert same_state(one, same)
    assert not same_state(one, other)


def test_mistakes_of_its_user(tmp_path: Path) -> None:
    for spec, says in [
        (dataclasses.replace(TINY, weights="none"), "untrained"),
        (dataclasses.replace(TINY, weights=str(tmp_path / "no.pt")), "there is no file"),
        (dataclasses.replace(TINY, widths=()), "give 1 or more"),
    ]:
        with pytest.raises(UserError, match=says):
            spec.load(1)
    narrow = TINY.fresh(0)
    torch.save(narrow.state_dict(), tmp_path / "narrow.pt")
    with pytest.raises(UserError, match="do not fit"):
        dataclasses.replace(TINY, widths=(9,), weights=str(tmp_path / "narrow.pt")).load(1)


def test_damaged_pictures_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    data = Blocks(train=20, damaged=True)
    with caplog.at_level(logging.WARNING):
        read = labelled_pictures(data, data.in_split("train"), TINY.preprocessing, 4, 0)
    assert len(read) == 18
    assert len(read.answers) == len(read.sample_ids) == len(read.group_ids) == 18
    assert [r.getMessage() for r in caplog.records] == [
        f"left out of the training: train-{i}: damaged" for i in (7, 17)
    ]
    for i, sample_id in enumerate(read.sample_ids):
        assert int(read.answers[i]) == int(sample_id.partition("-")[2]) % 3
    with pytest.raises(UserError, match="None of the 1 pictures"):
        labelled_pictures(data, data.in_split("train")[7:8], TINY.preprocessing, 4, 0)


def test_outputs_in_pieces() -> None:
    network = TINY.fresh(0).eval()
    inputs = noise_pictures(7, (3, 16, 16))
    with torch.no_grad():
        assert relative(outputs_of(network, inputs, rows=2), network(inputs)) < 1e-5
