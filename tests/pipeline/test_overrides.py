"""``--set``: items of lists, added stages and their place in the order; what leads nowhere is refused."""

from __future__ import annotations

from typing import Any

import pytest

from align import Pipeline
from align.pipeline.overrides import assign
from tests.support import toy
from tests.support.refusals import Refused

NUMBER = "tests.support.toy:NUMBER"
SUM = "tests.support.toy:SUM"


def pipeline() -> Pipeline:
    """``one``, ``two``, and ``total``, which adds them."""
    return Pipeline(toy.pipeline(), "p.yaml")


def others(*assignments: str) -> Any:
    return pipeline().set(*assignments).nodes["total"].inputs["others"]


def test_an_item_is_added_to_a_list() -> None:
    assert others("stages.total.others+=one") == ["two", "one"]
    assert others("stages.total.others+=one", "stages.total.others+=two") == ["two", "one", "two"]
    assert others("stages.total.others+=[one, two]") == ["two", "one", "two"]


def test_a_name_becomes_a_list_where_one_is_added() -> None:
    assert others("stages.total.others=one", "stages.total.others+=two") == ["one", "two"]


def test_an_item_of_a_list_is_changed() -> None:
    assert others("stages.total.others[0]=one") == ["one"]
    raw: dict[str, Any] = {"stages": {"one": {"sources": [{"rows": 1}, {"rows": 2, "files": [["a"], ["b"]]}]}}}
    assign(raw, "stages.one.sources[1].rows", 3, ["stages"])
    assign(raw, "stages.one.sources[1].files[0][0]", "c", ["stages"])
    assign(raw, "stages.one.sources[0].columns.prompt", "q", ["stages"])
    assign(raw, "stages.one.sources[1].files[1]+", "d", ["stages"])
    assert raw["stages"]["one"]["sources"] == [
        {"rows": 1, "columns": {"prompt": "q"}},
        {"rows": 3, "files": [["c"], ["b", "d"]]},
    ]


@pytest.mark.parametrize(
    "assignment",
    [
        "stages.total.others[1]=one",
        "stages.total.others.0=one",
        "stages.total.first[0]=one",
        "stages.total[0]=one",
        "stages.total.scale+=2",
        "stages.one.number+=2",
        "stages+=three",
        "stages.total.others[x]=one",
        "stages.three.number=1",
    ],
)
def test_a_path_that_leads_nowhere_is_refused(refused: Refused, assignment: str) -> None:
    refused(lambda: pipeline().set(assignment))


def test_added_stage_is_placed_below_its_inputs() -> None:
    changed = pipeline().set(
        "stages.three.stage=tests.support.toy:SUM",
        "stages.three.first=one",
        "stages.total.others+=three",
    )
    assert list(changed.nodes) == ["one", "three", "two", "total"]
    assert changed.nodes["total"].inputs["others"] == ["two", "three"]


def test_a_stage_is_added_in_one_block() -> None:
    changed = pipeline().set(f"stages.three={{stage: {SUM!r}, first: two}}", "stages.total.first=three")
    assert list(changed.nodes) == ["one", "two", "three", "total"]


def test_added_stages_may_read_each_other_in_any_order() -> None:
    changed = pipeline().set(
        f"stages.four={{stage: {SUM!r}, first: three}}",
        f"stages.three={{stage: {NUMBER!r}, number: 5}}",
        "stages.total.others+=four",
    )
    names = list(changed.nodes)
    assert names.index("three") < names.index("four") < names.index("total")


def test_a_stage_that_is_there_keeps_its_place_and_key() -> None:
    changed = pipeline().set(f"stages.one={{stage: {NUMBER!r}, number: 7}}", f"stages.z={{stage: {NUMBER!r}}}")
    assert [name for name in changed.nodes if name != "z"] == ["one", "two", "total"]
    assert changed.nodes["two"].key == pipeline().nodes["two"].key


def test_a_stage_that_reads_a_later_one_is_told_to_move(refused: Refused) -> None:
    refused(
        lambda: pipeline().set("stages.one={stage: 'tests.support.toy:SUM', first: total}", "stages.total.first=two")
    )


def test_a_stage_is_added_below_a_loop_and_inside_one() -> None:
    loop = {
        "rounds": 2,
        "carry": {"start": "total"},
        "stages": {
            "drawn": {"stage": NUMBER, "number": 2},
            "total": {"stage": SUM, "first": "start", "others": ["drawn"]},
        },
    }
    looped = Pipeline({"name": "x", "stages": {"start": {"stage": NUMBER}, "loop": loop, "end": {"stage": NUMBER}}})
    added = f"stages.sum={{stage: {SUM!r}, first: total, others: ['drawn-*']}}"
    below = looped.set(added, f"stages.end.stage={SUM}", "stages.end.first=sum")
    assert list(below.raw["stages"]) == ["start", "loop", "sum", "end"]
    assert below.nodes["sum"].inputs["others"] == ["drawn-1", "drawn-2"]
    inside = looped.set(f"stages.loop.stages.more={{stage: {NUMBER!r}}}", "stages.total.others+=more")
    assert inside.nodes["total-2"].inputs["others"] == ["drawn-2", "more-2"]
    in_one_round = looped.set("stages.total-2.others+=start")
    assert in_one_round.nodes["total-2"].inputs["others"][0] == "drawn-2"
    assert in_one_round.nodes["total-1"].inputs["others"] == ["drawn-1"]


def test_path_that_begins_with_a_stage_is_completed(refused: Refused) -> None:
    refused(lambda: pipeline().set("two.number=3"))
