"""The picture: columns follow the data, failed and waiting stages are in it."""

from align.report.picture import lay_out
from align.store.artifacts import Kind


def test_columns_follow_the_longest_way(run):
    picture = lay_out(run[0], None)
    x = {box["name"]: box["x"] for box in picture["boxes"]}
    assert x["model"] == x["data"] < x["sft"] < x["ppo"] < x["evaluate"]
    assert len(picture["arrows"]) == 2 + 2 + 4
    assert max(x.values()) + picture["box_width"] <= picture["width"]


def test_boxes_never_overlap(run):
    boxes = lay_out(run[0], None)["boxes"]
    assert len({(box["x"], box["y"]) for box in boxes}) == len(boxes)


def test_a_failed_stage_and_what_waits_for_it(run):
    failed = {"stage": "dpo", "message": "no", "inputs": ["sft"], "pending": ["report"]}
    boxes = {box["name"]: box for box in lay_out(run[0][:3], failed)["boxes"]}
    assert boxes["dpo"]["status"] == "failed"
    assert boxes["report"]["status"] == "pending"
    assert boxes["sft"]["x"] < boxes["dpo"]["x"] < boxes["report"]["x"]


def test_marks_tell_what_became_of_each_stage(run):
    running = {"stage": "dpo", "message": "", "inputs": ["sft"], "status": "running"}
    picture = lay_out(run[0][:3], running, cached=("model",), pending={"evaluate": ["sft", "dpo"]})
    marks = {box["name"]: box["mark"] for box in picture["boxes"]}
    assert marks == {"model": "↺", "data": "✓", "sft": "✓", "dpo": "▶", "evaluate": "…"}
    boxes = {box["name"]: box for box in picture["boxes"]}
    assert boxes["sft"]["x"] < boxes["dpo"]["x"] < boxes["evaluate"]["x"]
    assert len(picture["arrows"]) == 2 + 1 + 2
    assert picture["legend"] == ["✓ finished", "↺ found finished", "▶ being made", "… not run"]


def test_a_stage_that_paid_says_so(make_artifact):
    plain, paid = make_artifact("a", Kind.MODEL), make_artifact("b", Kind.PREFERENCES, metrics={"cost": 0.5})
    assert lay_out([plain], None)["box_height"] < lay_out([plain, paid], None)["box_height"]
    assert lay_out([plain, paid], None)["boxes"][1]["lines"][-1] == "endpoints: 0.500"


def test_an_empty_run_has_a_picture():
    assert lay_out([], None)["boxes"] == []


def test_a_long_name_is_shortened(make_artifact):
    box = lay_out([make_artifact("a" * 40, Kind.MODEL)], None)["boxes"][0]
    assert len(box["short"]) < 20
