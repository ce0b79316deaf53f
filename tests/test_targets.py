"""Targets: what is explained, checked against torch.nn.functional in float64; Batch.take and the preprocessing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import batch_of, noise_pictures
from PIL import Image
from torch.nn import functional as F

from ibxai.errors import BadSample, UserError
from ibxai.preprocessing import Preprocessing
from ibxai.targets import PREDICTED, Classes, ClassTarget, Label, MultiLabel, MultiLabelTarget, Predicted, Regression
from ibxai.types import Attribution, Batch, Picture, Sample

OUT = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 3.5], [-2.0, -1.0, -4.0], [30.0, -30.0, 0.0]])


def sample(label: int | None) -> Sample:
    return Sample("s", "s", Path("nowhere"), 0, label)


def test_bind_fills_in_what_the_network_predicts_and_nothing_else() -> None:
    bound = ClassTarget(torch.tensor([PREDICTED, 0, PREDICTED, 2])).bind(OUT)
    assert bound.classes.tolist() == [0, 0, 1, 2]
    assert list(bound.describe()) == [0, 0, 1, 2]
    assert bound.bind(-OUT).classes.tolist() == [0, 0, 1, 2]  # a bound target stays, whatever a network says later


def test_bind_leaves_the_unbound_target_as_it_was() -> None:
    target = ClassTarget(torch.tensor([PREDICTED, 1, 1, 1]))
    target.bind(OUT)
    assert target.classes.tolist() == [PREDICTED, 1, 1, 1]


@pytest.mark.parametrize("asked", [3, 1000])
def test_a_class_that_the_network_does_not_have(asked: int) -> None:
    with pytest.raises(UserError, match=rf"class {asked} does not exist.* 3 outputs.*0 to 2"):
        ClassTarget(torch.tensor([0, asked, PREDICTED, 1])).bind(OUT)


def test_the_last_class_exists() -> None:
    assert ClassTarget(torch.tensor([2, 2, 2, 2])).bind(OUT).classes.tolist() == [2, 2, 2, 2]


def test_score_and_loss() -> None:
    classes = torch.tensor([0, 1, 2, 1])
    target = ClassTarget(classes).bind(OUT)
    rows = torch.arange(4)
    probability = F.softmax(OUT.double(), 1)[rows, classes]
    torch.testing.assert_close(target.score(OUT, "probability").double(), probability, rtol=1e-6, atol=1e-30)
    assert torch.equal(target.score(OUT, "logit"), OUT[rows, classes])
    assert torch.equal(target.score(OUT, "value"), OUT[rows, classes])
    loss = target.loss(OUT)
    assert loss.shape == (4,)
    torch.testing.assert_close(loss.double(), -F.log_softmax(OUT.double(), 1)[rows, classes], rtol=1e-6, atol=1e-7)
    assert loss[3] == pytest.approx(60)  # nats, not cut off where the probability underflows


def test_score_and_loss_have_gradients() -> None:
    target = ClassTarget(torch.tensor([0, 1, 2, 1]))
    out = OUT.double().requires_grad_()
    (found,) = torch.autograd.grad(target.loss(out).sum(), out)
    wanted = F.softmax(OUT.double(), 1) - F.one_hot(target.classes, 3)
    torch.testing.assert_close(found, wanted)


def test_an_unbound_target_is_not_explained() -> None:
    target = ClassTarget(torch.tensor([0, PREDICTED, 0, 0]))
    for use in (lambda: target.score(OUT, "logit"), lambda: target.loss(OUT)):
        with pytest.raises(RuntimeError, match="bound"):
            use()


def test_take_selects_and_repeats() -> None:
    assert ClassTarget(torch.tensor([4, 5, 6])).take(torch.tensor([2, 0, 2])).classes.tolist() == [6, 4, 6]


def test_the_specifications() -> None:
    assert Predicted().names() == ("predicted",)
    assert Predicted().make(sample(3)).tolist() == [PREDICTED]
    assert Label().names() == ("label",)
    assert Label().make(sample(3)).tolist() == [3]
    assert Label().make(sample(0)).tolist() == [0]
    with pytest.raises(BadSample, match="no label"):
        Label().make(sample(None))
    assert Classes((281, 7)).names() == ("281", "7")
    assert Classes((281, 7)).make(sample(None)).tolist() == [281, 7]


@pytest.mark.parametrize("ids", [(), (-1,), (3, -2)])
def test_classes_that_cannot_be(ids: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"target\.ids"):
        Classes(ids)


# --- several labels: a sigmoid an output


def test_a_label_is_a_sigmoid_of_its_own() -> None:
    classes = torch.tensor([0, 1, 2, 1])
    target = MultiLabelTarget(classes).bind(OUT)
    logits = OUT.double()[torch.arange(4), classes]
    probability = 1 / (1 + (-logits).exp())
    torch.testing.assert_close(target.score(OUT, "probability").double(), probability, rtol=1e-6, atol=0)
    for kind in ("logit", "value"):
        assert torch.equal(target.score(OUT, kind), OUT[torch.arange(4), classes])  # type: ignore[arg-type]
    entropy = F.binary_cross_entropy_with_logits(logits, torch.ones(4).double(), reduction="none")
    torch.testing.assert_close(target.loss(OUT).double(), entropy, rtol=1e-6, atol=0)
    assert target.loss(OUT)[3] == pytest.approx(30)  # nats, not cut off where the sigmoid underflows
    others = OUT + torch.tensor([[0.0, 5.0, -3.0]])  # the other outputs do not count
    first = MultiLabelTarget(torch.zeros(4, dtype=torch.long))
    assert torch.equal(first.loss(others), first.loss(OUT))


def test_removal_of_a_label() -> None:
    target = MultiLabelTarget(torch.tensor([0, 1, 2, 0]))
    logits = OUT.double()[torch.arange(4), target.classes]
    p, complement = logits.sigmoid(), (-logits).sigmoid()
    for bound, wanted in [("complement", -complement.log()), ("probability", p), ("none", p.log())]:
        torch.testing.assert_close(target.removal_loss(OUT, bound).double(), wanted, rtol=1e-5, atol=1e-9)
    sure = torch.tensor([[40.0]]).requires_grad_()  # -ln(1 - p) computed from p would be infinite in float32
    (gradient,) = torch.autograd.grad(MultiLabelTarget(torch.tensor([0])).removal_loss(sure, "complement").sum(), sure)
    assert gradient.item() == pytest.approx(1.0)


def test_labels_bind_take_and_say_what_the_network_predicts() -> None:
    bound = MultiLabelTarget.predicted(4).bind(OUT)
    assert isinstance(bound, MultiLabelTarget)
    assert bound.classes.tolist() == [0, 2, 1, 0]
    taken = bound.take(torch.tensor([2, 0]))
    assert isinstance(taken, MultiLabelTarget)
    assert taken.describe() == [1, 0]
    index, probability = bound.prediction(OUT)
    assert index.tolist() == [0, 2, 1, 0]
    torch.testing.assert_close(probability, OUT.amax(1).sigmoid())
    index, probability = ClassTarget(torch.tensor([2, 2, 2, 2])).prediction(OUT)
    assert index.tolist() == [0, 2, 1, 0]
    torch.testing.assert_close(probability, OUT.softmax(1).amax(1))
    with pytest.raises(UserError, match="class 3 does not exist"):
        MultiLabelTarget(torch.tensor([3, 0, 0, 0])).bind(OUT)
    with pytest.raises(RuntimeError, match="bound"):
        MultiLabelTarget.predicted(4).loss(OUT)


def test_the_specifications_of_labels_and_of_a_regression() -> None:
    graded = Sample("s", "s", Path("nowhere"), 0, None, (4.0, 7.0))
    assert MultiLabel((3, 1)).names() == ("3", "1")
    assert MultiLabel((3, 1)).make(sample(None)).tolist() == [3, 1]
    assert (MultiLabel("label").names(), MultiLabel("label").make(sample(2)).tolist()) == (("label",), [2])
    assert MultiLabel("predicted").make(sample(2)).tolist() == [PREDICTED]
    with pytest.raises(BadSample, match="no label"):
        MultiLabel("label").make(sample(None))
    assert (Regression("mse", 1).names(), Regression("mse", 1).make(graded).tolist()) == (("1",), [1])
    for spec, bad in ((Regression("mse", 2), graded), (Regression("mse", 0), sample(3))):
        with pytest.raises(BadSample, match=f"no value for output {spec.output}"):
            spec.make(bad)
    assert Regression("deviation", 2).make(sample(None)).tolist() == [2]  # which needs no label
    made = Regression("mse", 1).of_rows(torch.tensor([1, 1]), torch.tensor([4.0, 7.0]))
    assert made.loss(torch.tensor([[0.0, 5.0], [0.0, 5.0]])).tolist() == [1.0, 4.0]
    assert made.prediction(torch.zeros(2, 3))[0].tolist() == [1, 1]
    assert made.prediction(torch.zeros(2, 3))[1].isnan().all()
    with pytest.raises(UserError, match=r"target\.output"):
        Regression("mse", -1)
    with pytest.raises(UserError, match=r"target\.ids"):
        MultiLabel(())


@pytest.mark.parametrize("rows", [[2, 0, 2, 2], torch.tensor([2, 0, 2, 2])])
def test_batch_take_brings_everything_along(rows) -> None:
    inputs = noise_pictures(3, (3, 4, 4))
    regions = {"target": torch.rand(3, 2, 4, 4) > 0.5, "severity": torch.tensor([0.1, 0.2, 0.3])}
    batch = Batch(inputs, ClassTarget(torch.tensor([7, 8, 9])), ("a", "b", "c"), ("g", "h", "i"), regions)
    found = batch.take(rows)
    assert len(found) == 4
    assert found.sample_ids == ("c", "a", "c", "c")
    assert found.group_ids == ("i", "g", "i", "i")
    assert found.target.describe() == [9, 7, 9, 9]
    for new, old in enumerate([2, 0, 2, 2]):
        assert torch.equal(found.inputs[new], inputs[old])
        for name, planes in regions.items():
            assert torch.equal(found.regions[name][new], planes[old])
    assert batch.sample_ids == ("a", "b", "c")


def test_batch_take_of_nothing_is_an_empty_batch() -> None:
    found = batch_of(noise_pictures(2, (3, 4, 4)), [0, 1]).take([])
    assert len(found) == 0
    assert found.inputs.shape == (0, 3, 4, 4)


def test_attribution_take() -> None:
    attribution = Attribution(torch.arange(12.0).view(3, 2, 2), "bits", {"loss": torch.tensor([1.0, 2.0, 3.0])})
    found = attribution.take([2, 2, 0])
    assert torch.equal(found.heatmap, attribution.heatmap[[2, 2, 0]])
    assert found.unit == "bits"
    assert found.diagnostics["loss"].tolist() == [3, 3, 1]


# --- preprocessing: resize of the shorter side, centre crop, normalisation; regions go along


def numbered(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows, columns, rows * 0 + 60], 2).astype(np.uint8))


def test_crop_and_normalisation_without_resizing() -> None:
    prepare = Preprocessing(resize=8, crop=6, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    found, regions = prepare(Picture(numbered(14, 8)))
    rows, columns = np.mgrid[1:7, 4:10]  # the centre 6 x 6 of 8 x 14
    wanted = np.stack([(rows / 255 - 0.1) / 0.5, (columns / 255 - 0.2) / 0.25, (rows * 0 + 60 / 255 - 0.3) / 2.0])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)
    assert regions == {}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90)])
def test_the_shorter_side_is_resized(width: int, height: int, interpolation: str) -> None:
    """Of a picture that rises linearly, to a third: centres of 3 x 3 blocks, away from the border."""
    prepare = Preprocessing(resize=20, crop=12, mean=(0.0,) * 3, std=(1 / 255,) * 3, interpolation=interpolation)
    found, _ = prepare(Picture(numbered(width, height)))
    top, left = (height // 3 - 12) // 2, (width // 3 - 12) // 2
    rows, columns = np.mgrid[top : top + 12, left : left + 12]
    np.testing.assert_allclose(found[0].numpy(), rows * 3 + 1, atol=0.51)  # rounded to 8 bit
    np.testing.assert_allclose(found[1].numpy(), columns * 3 + 1, atol=0.51)


def test_regions_follow_the_picture() -> None:
    """A box painted into the picture and given as a region ends at the same pixels."""
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[22:38, 31:47] = 255  # two thirds of the outermost 3 x 3 blocks
    planes = torch.zeros(3, 60, 90, dtype=torch.bool)
    planes[0, 22:38, 31:47] = True
    planes[1, :, :3] = True  # the crop cuts it away
    planes[2] = True
    prepare = Preprocessing(resize=20, crop=12, mean=(0.0,) * 3, std=(1.0,) * 3)
    found, regions = prepare(Picture(Image.fromarray(pixels), {"target": planes}))
    region = regions["target"]
    assert region.dtype == torch.bool
    assert region.shape == (3, 12, 12)
    assert torch.equal(region[0], found[0] > 0.4)  # a corner block holds 4/9
    assert int(region[0].sum()) == 36
    assert not region[1].any()  # stays, empty
    assert region[2].all()


def test_a_region_with_a_degree_keeps_it() -> None:
    """A severity is no yes or no: its values come through, and no value between them appears."""
    degrees = torch.zeros(1, 60, 90)
    degrees[0, :, :45], degrees[0, 30:, 45:] = 3, 0.5
    prepare = Preprocessing(resize=20, crop=12, mean=(0.0,) * 3, std=(1.0,) * 3)
    _, regions = prepare(Picture(numbered(90, 60), {"severity": degrees}))
    found = regions["severity"]
    assert found.dtype == torch.float32
    wanted = torch.zeros(12, 12)
    wanted[:, :6], wanted[6:, 6:] = 3, 0.5
    assert torch.equal(found[0], wanted)


def test_picture_of_undoes_the_normalisation() -> None:
    prepare = Preprocessing(resize=8, crop=8, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8))
    found, _ = prepare(Picture(image))
    shown = prepare.picture_of(found[None])
    assert shown.dtype == np.uint8
    assert np.array_equal(shown[0], np.asarray(image))
    assert prepare.picture_of(torch.full((3, 1, 1), 99.0)).tolist() == [[[255, 255, 255]]]  # cut, not wrapped round
    assert prepare.picture_of(torch.full((3, 1, 1), -99.0)).tolist() == [[[0, 0, 0]]]


def test_input_shape() -> None:
    assert Preprocessing(resize=30, crop=24, mean=(0.5,), std=(1.0,)).input_shape == (1, 24, 24)
