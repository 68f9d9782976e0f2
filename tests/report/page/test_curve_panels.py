"""Panels of training curves: labels that fit, numbers for the page's script where the drawing has them."""

import re

import pytest

from align.report.page.curve_panels import METRICS, draw_curve, stage_curves
from align.report.page.metric_series import EPISODE_CURVES, Events


def test_readings_are_where_the_line_is_drawn():
    events = Events({"loss": ([0.0, 50.0, 100.0], [1.0, 0.5, 0.25])})
    curve = draw_curve("loss", ["loss"], events)
    box, reading = curve.reading["box"], curve.reading
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', curve.svg)
    assert view is not None
    assert box[0] == pytest.approx(METRICS.axes_box[0] * float(view[1]))
    path = next(
        text for text in re.findall(r'<path d="([^"]+)"[^>]*stroke: #0072b2', curve.svg, re.I) if text.count("L") == 2
    )
    points = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path)]

    def position(x, y):
        across = box[0] + (x - reading["x"][0]) / (reading["x"][1] - reading["x"][0]) * (box[2] - box[0])
        down = box[3] - (y - reading["y"][0]) / (reading["y"][1] - reading["y"][0]) * (box[3] - box[1])
        return across, down

    for index, (x, y) in enumerate(((0, 1), (50, 0.5), (100, 0.25))):
        assert points[index] == pytest.approx(position(x, y), abs=0.05)
    assert reading["lines"] == [{"name": "loss", "x": [0, 50, 100], "y": [1, 0.5, 0.25]}]


def test_a_single_point_is_no_curve_and_the_rest_is_named():
    line = ([1.0, 2.0], [1.0, 2.0])
    events = Events({"loss": line, "once": ([1.0], [1.0]), "zebra": line, "ant": line})
    curves, left_out = stage_curves(events, 2)
    assert [curve.title for curve in curves] == ["loss", "ant"]
    assert left_out == ["zebra"]
    assert "loss from 1.00 to 2.00" in curves[0].svg  # what a screen reader says


def test_panels_about_episodes_leave_the_others_their_room():
    line = ([1.0, 2.0], [0.0, 1.0])
    others = {"loss": line, "ant": line, "zebra": line}
    curves, left_out = stage_curves(Events(others), 2)
    assert ([curve.title for curve in curves], left_out) == (["loss", "ant"], ["zebra"])
    episodes = dict.fromkeys([*EPISODE_CURVES, "score_turn_2", "score_turn_1"], line)
    curves, left_out = stage_curves(Events(others | episodes), 2)
    titles = {curve.title for curve in curves}
    assert (titles, left_out) == ({"loss", "ant", "score_turn_1 to 2", *EPISODE_CURVES}, ["zebra"])
    shared = next(curve for curve in curves if curve.title == "score_turn_1 to 2")
    assert [drawn["name"] for drawn in shared.reading["lines"]] == ["score_turn_1", "score_turn_2"]


def test_the_numbers_of_late_steps_are_not_rounded():
    events = Events(series={"loss": ([1234567.0, 1234568.0], [1.0, 0.5])})
    (line,) = draw_curve("loss", ["loss"], events).reading["lines"]
    assert line["x"] == [1234567, 1234568]
