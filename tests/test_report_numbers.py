"""Intervals against simulation, scipy and a slow re-derivation; heatmaps as pictures; curves as SVG."""

import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from ibxai.report.charts import MOST_POINTS, Line, common_curve, line_chart
from ibxai.report.figures import encoded, map_picture, overlay, scale_of
from ibxai.report.render import count, duration, ends, moment, number, percent
from ibxai.report.statistics import mean_intervals


def interval(values: np.ndarray, groups: list[str]) -> tuple[float, float]:
    low, high = mean_intervals(np.asarray(values, dtype=float)[:, None], groups)
    return float(low[0]), float(high[0])


def own_groups(number_of_rows: int) -> list[str]:
    return [f"s{i}" for i in range(number_of_rows)]


# intervals


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    experiments = 3.0 + generator.normal(size=(60, 1000))  # a column is an experiment of 60 rows
    low, high = mean_intervals(experiments, own_groups(60))
    assert 0.92 < np.mean((low <= 3.0) & (high >= 3.0)) < 0.97


def test_interval_over_groups_covers_where_one_over_rows_fails() -> None:
    generator = np.random.default_rng(1)
    patients = np.repeat(generator.normal(size=(50, 500)), 6, axis=0)  # six pictures of a patient are alike
    experiments = patients + 0.2 * generator.normal(size=(300, 500))
    of_patient = [f"p{i // 6}" for i in range(300)]
    covered = {}
    for name, groups in (("groups", of_patient), ("rows", own_groups(300))):
        low, high = mean_intervals(experiments, groups)
        covered[name] = np.mean((low <= 0) & (high >= 0))
    assert 0.91 < covered["groups"] < 0.975
    assert covered["rows"] < 0.75


def test_interval_agrees_with_scipy_when_each_row_is_its_own_group() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(2).exponential(size=80)
    expected = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", random_state=3)
    low, high = interval(values, own_groups(80))
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.05 * width)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.05 * width)


def test_interval_of_unequal_groups_agrees_with_a_slow_resampling() -> None:
    generator = np.random.default_rng(4)
    groups = [f"p{i}" for i in range(12) for _ in range(1 if i < 9 else 15)]
    values = generator.normal(size=len(groups)) + np.array([int(name[1:]) for name in groups])
    members = {name: values[[g == name for g in groups]] for name in set(groups)}
    names = sorted(members)
    means = [np.concatenate([members[names[i]] for i in generator.integers(12, size=12)]).mean() for _ in range(4000)]
    low, high = interval(values, groups)
    width = high - low
    assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.06 * width)


def test_copies_of_a_row_in_its_group_add_no_certainty() -> None:
    values = np.random.default_rng(5).normal(size=30)
    copied, of_row = np.repeat(values, 4), [f"s{i // 4}" for i in range(120)]
    alone = interval(values, own_groups(30))
    assert interval(copied, of_row) == pytest.approx(alone)
    low, high = interval(copied, own_groups(120))
    assert high - low < 0.6 * (alone[1] - alone[0])


def test_undefined_values_and_their_groups_are_left_out_column_by_column() -> None:
    generator = np.random.default_rng(6)
    full = generator.normal(size=40)
    holed = full.copy()
    holed[[0, 7, 8]] = [np.nan, np.inf, -np.inf]
    kept = np.isfinite(holed)
    low, high = mean_intervals(np.stack([full, holed], axis=1), own_groups(40))
    assert (low[0], high[0]) == interval(full, own_groups(40))
    assert (low[1], high[1]) == interval(holed[kept], [g for g, k in zip(own_groups(40), kept, strict=True) if k])


def test_interval_is_deterministic_and_does_not_depend_on_the_order_of_rows() -> None:
    values, groups = np.random.default_rng(7).normal(size=50), [f"p{i % 9}" for i in range(50)]
    order = np.random.default_rng(8).permutation(50)
    assert interval(values, groups) == interval(values, groups)
    assert interval(values[order], [groups[i] for i in order]) == pytest.approx(interval(values, groups))


def test_one_group_has_no_interval_and_a_constant_has_no_width() -> None:
    assert np.isnan(interval(np.arange(5.0), ["p"] * 5)).all()
    assert np.isnan(interval(np.full(5, np.nan), own_groups(5))).all()
    assert interval(np.full(9, 0.1), own_groups(9)) == (0.1, 0.1)
    assert mean_intervals(np.zeros((0, 3)), [])[0].shape == (3,)


# heatmaps for the eye


def ramp() -> np.ndarray:
    return np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))


def test_map_without_negative_values_gets_brighter_with_heat() -> None:
    assert not scale_of(ramp()).signed
    brightness = map_picture(ramp()).astype(int).sum(axis=2)[0]
    assert (np.diff(brightness) >= 0).all()
    assert brightness[0] < 60
    assert brightness[-1] > 500


def test_signed_map_is_centred_at_zero_red_above_blue_below() -> None:
    heatmap = 2 * ramp() - 0.5  # -0.5 .. 1.5: zero is not in the middle of the range
    scale = scale_of(heatmap)
    assert scale.signed
    assert scale.low == -scale.high
    colours = map_picture(np.array([[-1.5, 0, 1.5]]))[0].astype(int)
    assert colours[0, 2] > colours[0, 0] + 80
    assert np.ptp(colours[1]) < 10
    assert colours[2, 0] > colours[2, 2] + 80


def test_rounding_below_zero_does_not_make_a_map_signed() -> None:
    heatmap = ramp()
    heatmap[0, 0] = -1e-6
    assert not scale_of(heatmap).signed


def test_one_hot_pixel_does_not_darken_the_rest_and_is_not_lost_alone() -> None:
    heatmap = ramp()
    heatmap[3, 3] = 1e6
    assert scale_of(heatmap).high <= 1
    lonely = np.zeros((64, 64))
    lonely[3, 3] = 5.0
    assert (scale_of(lonely).low, scale_of(lonely).high) == (0, 5)
    assert map_picture(lonely)[3, 3].sum() > map_picture(lonely)[0, 0].sum() + 300


@pytest.mark.parametrize("value", [0.0, 7.0, -7.0, np.nan, np.inf])
def test_map_without_differences_adds_no_heat(value: float) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    heatmap = np.full((16, 16), value, dtype=np.float32)
    assert len(np.unique(map_picture(heatmap).reshape(-1, 3), axis=0)) == 1
    np.testing.assert_array_equal(overlay(picture, heatmap), overlay(picture, np.zeros((16, 16))))


def test_undefined_pixels_are_grey_in_the_map_and_clear_in_the_overlay() -> None:
    heatmap, picture = ramp(), np.full((64, 64, 3), 90, dtype=np.uint8)
    heatmap[:, 60] = np.nan
    assert (map_picture(heatmap)[:, 60] == 128).all()
    np.testing.assert_allclose(overlay(picture, heatmap)[:, 60], 90, atol=1)


@pytest.mark.parametrize("heatmap", [ramp(), -ramp()])
def test_overlay_shows_the_picture_where_cold_and_the_heat_where_hot(heatmap: np.ndarray) -> None:
    picture = np.full((64, 64, 3), 120, dtype=np.uint8)
    picture[::2] = 180
    shown = overlay(picture, heatmap).astype(float)
    np.testing.assert_allclose(shown[:, 0], picture[:, 0], atol=8)
    difference = np.abs(shown - picture).sum(axis=2).mean(axis=0)
    assert difference[-1] > 100 > difference[5]
    assert np.abs(shown[0, -1] - shown[1, -1]).max() > 8  # stripes of the picture remain under the hottest spot


def test_overlay_refuses_another_size() -> None:
    with pytest.raises(ValueError, match="8, 8"):
        overlay(np.zeros((8, 8, 3), dtype=np.uint8), np.zeros((4, 4)))


def test_png_keeps_every_colour_and_jpeg_is_close() -> None:
    pixels = map_picture(ramp())
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded(pixels, "png")))), pixels)
    read_back = np.asarray(Image.open(io.BytesIO(encoded(pixels, "jpeg")))).astype(int)
    assert np.abs(read_back - pixels).mean() < 3


# curves


def drawn(lines: list[Line], description: str = "d") -> ElementTree.Element:
    svg = line_chart(lines, description, 420, 270, "fraction", "score")
    assert len(svg) < 10_000
    return ElementTree.fromstring(str(svg))


def corners(svg: ElementTree.Element, place: int = 0) -> np.ndarray:
    points = svg.findall("polyline")[place].attrib["points"].split()
    return np.array([[float(part) for part in point.split(",")] for point in points])


def test_curve_runs_where_its_numbers_say() -> None:
    x = np.linspace(0, 1, 5)
    got = corners(drawn([Line(x, x, 0)]))
    assert (np.diff(got[:, 0]) > 0).all()
    assert (np.diff(got[:, 1]) < 0).all()  # SVG's y points down
    middle = got.mean(axis=0)
    np.testing.assert_allclose(got[2], middle, atol=0.11)


def test_probabilities_share_an_axis_and_small_ones_get_their_own() -> None:
    def texts(top: float) -> list[str | None]:
        return [text.text for text in drawn([Line(np.array([0, 1]), np.array([0, top]), 0)]).findall("text")]

    assert texts(0.6)[:5] == texts(0.9)[:5] == ["0", "0.25", "0.5", "0.75", "1"]
    assert "0.002" in texts(0.002)
    assert "1" in texts(0.002)  # the abscissa still runs to 1
    assert "-5" in [t.text for t in drawn([Line(np.array([0, 1]), np.array([-4.0, 8.0]), 0)]).findall("text")]


def test_long_curves_with_bands_stay_small_and_keep_their_ends() -> None:
    x = np.linspace(0, 1, 1001)
    lines = [Line(x, x**2, style, x**2 - 0.01, x**2 + 0.01) for style in (0, 1)]
    got = corners(drawn(lines))
    assert len(got) == MOST_POINTS
    whole = corners(drawn([Line(x[[0, -1]], x[[0, -1]] ** 2, 0, x[[0, -1]] - 0.01, x[[0, -1]] + 0.01)]))
    np.testing.assert_allclose(got[[0, -1]], whole)


def test_description_of_a_chart_is_escaped() -> None:
    assert drawn([Line(np.array([0, 1]), np.array([0, 1]), 0)], '"><script>').attrib["aria-label"] == '"><script>'


def test_common_curve_keeps_equal_abscissae_and_interpolates_others() -> None:
    coarse, fine = np.linspace(0, 1, 3), np.linspace(0, 1, 5)
    x, y, places = common_curve([coarse, coarse, coarse], [coarse, np.full(3, np.nan), 1 - coarse])
    np.testing.assert_array_equal(x, coarse)
    np.testing.assert_array_equal(y, [coarse, 1 - coarse])
    assert places.tolist() == [0, 2]
    x, y, places = common_curve([coarse, fine, None], [2 * coarse, 2 * fine, None])
    np.testing.assert_allclose(y, [2 * x, 2 * x])
    assert places.tolist() == [0, 1]
    assert common_curve([None], [None])[1].size == 0


# numbers for people


def test_numbers_are_short_and_honest() -> None:
    told = [number(v) for v in (0.71234, 12.345, 123.45, 4637.2, 10.0, 0, 2.1e-5, float("nan"), float("inf"))]
    assert told == ["0.712", "12.35", "123.5", "4,637", "10", "0", "2.1e\N{MINUS SIGN}5", "\N{EN DASH}", "∞"]
    assert number(-0.5) == "\N{MINUS SIGN}0.500"
    assert ends(1e-5, 0.5) == ("0", "0.500")
    assert ends(-0.5, 0.5) == ("\N{MINUS SIGN}0.500", "0.500")
    assert percent(0.829) == "82.9\N{NARROW NO-BREAK SPACE}%"
    assert percent(1e-5).startswith("<")
    assert (count(1, "row"), count(5000, "row")) == ("1 row", "5,000 rows")
    assert (duration(81.4), duration(3.21), duration(7384)) == ("1 min 21 s", "3.2 s", "2 h 3 min")
    assert moment("2025-11-02T22:40:11+00:00") == "2 November 2025, 22:40"
    assert moment("yesterday") == "yesterday"
