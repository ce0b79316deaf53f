"""Intervals against simulation, scipy and a slow re-derivation; heatmaps as pictures; curves as SVG."""

import io
import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from ibxai.report.charts import MOST_POINTS, Line, common_curve, line_chart, log_axis, value_axis
from ibxai.report.diagrams import Point, rank_diagram, scatter
from ibxai.report.figures import encoded, map_picture, overlay, scale_of, split_at_top
from ibxai.report.render import (
    breakable,
    count,
    duration,
    ends,
    enumerated,
    fixed,
    moment,
    number,
    p_value,
    percent,
    span,
)
from ibxai.report.significance import Ranking
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


def test_the_mean_of_a_resample_lies_between_the_values() -> None:
    """Rounding made -2.8e-17 of the low end here, of values that are not negative."""
    values = np.array([0.79, 0.24, 0, 0, 0, 0, 0])
    assert interval(values, own_groups(7))[0] == 0
    assert interval(1 - values, own_groups(7))[1] <= 1


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


def test_top_pixels_are_sharp_alone_and_blurred_when_removed() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    split = split_at_top(picture, ramp(), 0.25)
    assert split is not None
    kept, removed = split
    np.testing.assert_array_equal(kept[:, 48:], picture[:, 48:])  # the ramp's hottest quarter is at the right
    np.testing.assert_array_equal(removed[:, :48], picture[:, :48])
    for hidden in (kept[:, :48], removed[:, 48:]):
        assert hidden.std() < 0.5 * picture.std()
    np.testing.assert_array_equal(np.where(kept == picture, removed, kept), np.where(removed == picture, kept, removed))


def test_exactly_the_share_is_shown_also_among_equal_values() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    heatmap = np.zeros((50, 50), dtype=np.float32)
    heatmap[10, 10:20] = 3
    split = split_at_top(picture, heatmap, 0.12)
    assert split is not None
    sharp = (split[0] == picture).all(axis=2)
    assert sharp[10, 10:20].all()
    assert abs(int(sharp.sum()) - 300) < 5  # a blurred pixel may have its old colour by chance
    assert sharp[:25].sum() > 50 < sharp[25:].sum()  # equal values from everywhere, not from the top left
    nothing = split_at_top(picture, heatmap, 0)
    assert nothing is not None
    np.testing.assert_array_equal(nothing[1], picture)
    for orderless in (np.ones((50, 50)), np.where(heatmap > 0, np.nan, 0)):
        assert split_at_top(picture, orderless, 0.06) is None


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


def test_undefined_points_of_a_curve_are_left_out() -> None:
    x = np.linspace(0, 1, 5)
    y = np.array([0, np.nan, 0.5, 0.75, 1])
    got = corners(drawn([Line(x, y, 0, y - 0.1, y + 0.1)]))
    np.testing.assert_allclose(got, corners(drawn([Line(x, x, 0, x - 0.1, x + 0.1)]))[[0, 2, 3, 4]])


def test_a_logarithmic_axis_gives_every_power_of_ten_the_same_room() -> None:
    x, y = np.array([1e-4, 1e-3, 1e-1, 1.0]), np.array([0, 0.25, 0.75, 1])
    svg = ElementTree.fromstring(str(line_chart([Line(x, y, 0)], "d", 420, 270, "n", "r", log_x=True)))
    got = corners(svg)
    grid = svg.findall("line")[0]  # as wide as the chart's area
    left, right = float(grid.attrib["x1"]), float(grid.attrib["x2"])
    np.testing.assert_allclose(got[:, 0], left + (right - left) * y, atol=0.11)
    texts = [text.text for text in svg.findall("text")]
    assert {"10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "1"} <= set(texts)
    assert log_axis([np.array([2e-5, 0.63])]).low == pytest.approx(1e-5)
    assert log_axis([np.array([2e-5, 0.63])]).high == 1


def test_correlations_get_an_axis_of_their_own_size() -> None:
    lines = [Line(np.array([0, 1]), np.array([0.0, 0.31]), 0)]
    assert (value_axis(lines).low, value_axis(lines).high) == (0, 1)
    assert value_axis(lines, scores=False).high == pytest.approx(0.4)


# diagrams of many methods


def named(svg: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """What stands in the diagram, with its place."""
    return {
        "".join(text.itertext()): (float(text.attrib["x"]), float(text.attrib["y"]))
        for text in svg.findall("text")
        if text.get("class") == "name"
    }


def test_points_lie_where_their_means_say_and_every_name_is_there() -> None:
    points = [
        Point("low", 0.2, 0.4, (0.1, 0.3), (0.3, 0.5)),
        Point("high", 0.4, 0.8, (0.35, 0.75), (0.45, 0.85)),
        Point("alone", 0.3, 0.6, (np.nan, np.nan), (np.nan, np.nan)),
    ]
    svg = ElementTree.fromstring(str(scatter(points, "d", "x", "y", ("lower", "higher"))))
    x, y = np.array([[float(c.attrib["cx"]), float(c.attrib["cy"])] for c in svg.findall("circle")]).T
    assert x[0] < x[2] < x[1]
    assert y[0] > y[2] > y[1]  # SVG's y points down
    assert x[2] == pytest.approx((x[0] + x[1]) / 2, abs=0.11)
    bars = [line for line in svg.findall("line") if line.get("class") == "error"]
    assert len(bars) == 4
    assert float(bars[0].attrib["x2"]) - float(bars[0].attrib["x1"]) == pytest.approx(x[1] - x[0], abs=0.11)
    assert set(named(svg)) == {"low", "high", "alone"}
    [corner] = [text for text in svg.findall("text") if text.get("class") == "corner"]
    assert corner.text == "↖ better"
    assert float(corner.attrib["x"]) < x.min()
    assert float(corner.attrib["y"]) < 30


def test_names_of_crowded_points_do_not_cover_each_other() -> None:
    generator = np.random.default_rng(0)
    middle = 0.5 + 0.02 * generator.normal(size=(12, 2))
    middle[0] = 0.9, 0.1
    points = [Point(f"method_{i}", x, y, (x - 0.01, y - 0.01), (x + 0.01, y + 0.01)) for i, (x, y) in enumerate(middle)]
    places = named(ElementTree.fromstring(str(scatter(points, "d", "x", "y", ("lower", "higher")))))
    assert len(places) == 12
    boxes = [(x, y, x + 6 * len(name), y + 10) for name, (x, y) in places.items()]
    for one, other in itertools.combinations(boxes, 2):
        wide = min(one[2], other[2]) - max(one[0], other[0])
        high = min(one[3], other[3]) - max(one[1], other[1])
        assert min(wide, high) < 2, (one, other)
    assert all(box[0] >= 0 and box[2] <= 562 and 0 <= box[1] <= 420 for box in boxes)


def test_rank_diagram_puts_the_best_first_and_joins_what_is_level() -> None:
    ranks = Ranking(np.array([3.0, 1.2, 1.8, 4.0]), blocks=20, chi_square=30, p=1e-6, critical_difference=1.1)
    svg = ElementTree.fromstring(str(rank_diagram(["c", "a", "b", "d"], ranks, "d")))
    places = named(svg)
    assert set(places) == {"a 1.20", "b 1.80", "c 3.00", "d 4.00", "critical difference 1.10"}
    assert places["a 1.20"][0] == places["b 1.80"][0] < places["c 3.00"][0] == places["d 4.00"][0]
    assert places["a 1.20"][1] < places["b 1.80"][1]
    assert places["d 4.00"][1] < places["c 3.00"][1]  # the outermost on top
    bars = [
        [float(bar.attrib[end]) for end in ("x1", "x2")] for bar in svg.findall("line") if bar.get("class") == "level"
    ]
    start, end = (float(t.attrib["x"]) for t in svg.findall("text") if t.text in ("1", "4"))
    at = [start + (rank - 1) / 3 * (end - start) for rank in (1.2, 1.8, 3, 4)]
    np.testing.assert_allclose(bars, [[at[0] - 3, at[1] + 3], [at[2] - 3, at[3] + 3]], atol=0.2)


def test_a_critical_difference_beyond_the_axis_is_cut_and_said() -> None:
    ranks = Ranking(np.array([1.0, 2.0, 3.0]), blocks=2, chi_square=4, p=0.13, critical_difference=2.4)
    svg = ElementTree.fromstring(str(rank_diagram(["a", "b", "c"], ranks, "d")))
    assert "critical difference 2.40, longer than the axis" in named(svg)


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
    assert (fixed(0.1234, 3), fixed(-0.1234, 1), fixed(-0.0001, 2), fixed(float("nan"), 2)) == (
        "+0.123",
        "\N{MINUS SIGN}0.1",
        "0.00",
        "\N{EN DASH}",
    )
    assert (p_value(0.0123)[-5:], p_value(1e-9)[0], p_value(float("nan"))) == ("0.012", "<", "is undefined")
    assert (span([3, 3], "row"), span([5, 1, 3], "row"), span([], "row")) == ("3 rows", "1 to 5 rows", "0 rows")
    assert [enumerated(list(names)) for names in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]
    assert breakable("a_<b>") == "a_<wbr>&lt;b&gt;"
