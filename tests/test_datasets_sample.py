"""The seven photographs are there, credited, and read without a download."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ibxai.datasets import sample as module
from ibxai.datasets.imagenet_classes import class_index, class_names, wnids
from ibxai.datasets.sample import CREDITS, SampleDataset
from ibxai.errors import UserError

CONF = Path(__file__).parents[1] / "conf" / "dataset"


def test_seven_photographs_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    dataset = SampleDataset()
    samples = dataset.samples()
    assert [s.sample_id for s in samples] == sorted(CREDITS)
    assert len(samples) == 7
    for sample in samples:
        assert sample.size == sample.source.stat().st_size > 0
        assert sample.group_id == sample.sample_id
        assert min(dataset.read(sample).image.size) >= 300
    assert dataset.reference() == samples


def test_labels_name_what_the_pictures_show() -> None:
    dataset = SampleDataset()
    named = {s.sample_id: None if s.label is None else dataset.class_names[s.label] for s in dataset.samples()}
    assert named == {
        "astronaut": None,
        "camera": "tripod",
        "chelsea": "tabby",
        "china": None,
        "coffee": "espresso",
        "flower": None,
        "rocket": "missile",
    }


def test_every_credit_is_complete() -> None:
    for credit in CREDITS.values():
        assert all((credit.title, credit.author, credit.licence, credit.source))
    assert {name for name, credit in CREDITS.items() if credit.licence.startswith("CC BY ")} == {"china", "flower"}


def test_a_missing_package_or_file_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FILES", {"x": ("skimage", "data/absent.png", None)})
    with pytest.raises(UserError, match=r"absent\.png") as found:
        SampleDataset().samples()
    assert str(found.value).count("\n") <= 1
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install scikit-image"):
        SampleDataset().samples()


def test_class_lists_are_whole_and_in_order() -> None:
    assert len(wnids()) == len(class_names()) == len(set(class_names())) == len(class_index()) == 1000
    assert list(wnids()) == sorted(wnids())
    known = {"n01440764": "tench", "n02123045": "tabby", "n04485082": "tripod", "n07920052": "espresso"}
    assert {wnid: class_names()[class_index()[wnid]] for wnid in known} == known


@pytest.mark.parametrize("name", ["sample", "imagenet"])
def test_the_yaml_has_every_field_with_its_default(name: str) -> None:
    from dataclasses import MISSING, fields

    from ibxai.datasets.imagenet import ImageNet

    cls = {"sample": SampleDataset, "imagenet": ImageNet}[name]
    text = (CONF / f"{name}.yaml").read_text()
    values = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(values, dict)
    assert text.startswith("# ")
    assert values.pop("_target_") == f"{cls.__module__}.{cls.__name__}"
    assert values == {f.name: "???" if f.default is MISSING else f.default for f in fields(cls)}
