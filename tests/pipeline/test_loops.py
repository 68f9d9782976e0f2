"""Loops: what they are written out to, what is refused, and how a run, a plan and the options treat their rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align import Pipeline
from align.cli.main import main
from align.errors import UserError
from align.runner.plan import History, choose_stages, plan
from align.runner.runner import run_pipeline
from align.store.store import Store
from tests.support import toy
from tests.support.loops import NUMBER, SUM, looped
from tests.support.refusals import Refused

pytestmark = pytest.mark.usefixtures("stages_in_process")
TUNING = {"method": "lora", "rank": 4, "alpha": 9}


def refused(raw: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        Pipeline(raw, "p.yaml")
    return str(caught.value)


def test_rounds_are_stages_of_their_own_and_carry_the_result_on(tmp_path: Path) -> None:
    pipeline = Pipeline(looped(after={"last": {"stage": SUM, "first": "total", "others": ["drawn-1"]}}))
    assert list(pipeline.nodes) == ["start", "drawn-1", "total-1", "drawn-2", "total-2", "drawn-3", "total-3", "last"]
    assert pipeline.nodes["total-1"].input_names == ["start", "drawn-1"]
    assert pipeline.nodes["total-3"].input_names == ["total-2", "drawn-3"]
    assert pipeline.nodes["last"].input_names == ["total-3", "drawn-1"]
    run = run_pipeline(pipeline, store=tmp_path / "store")
    assert [run.metrics(f"total-{number}")["total"] for number in (1, 2, 3)] == [3, 5, 7]
    assert run.metrics("total") == {"total": 7} and run.metrics("last") == {"total": 9}


def test_first_round_equals_the_block_and_more_rounds_keep_it(tmp_path: Path) -> None:
    plain = looped()
    block = plain["stages"].pop("loop")
    plain["stages"] |= {"drawn-1": block["stages"]["drawn"], "total-1": {**block["stages"]["total"], "first": "start"}}
    plain["stages"]["total-1"]["others"] = ["drawn-1"]
    single_round, three = Pipeline(looped(1)), Pipeline(looped(3))
    assert [node.key for node in single_round] == [node.key for node in Pipeline(plain)]
    store = tmp_path / "store"
    assert run_pipeline(single_round, store=store).ran == ["start", "drawn-1", "total-1"]
    assert run_pipeline(three, store=store).ran == ["drawn-2", "total-2", "drawn-3", "total-3"]
    assert run_pipeline(three, store=store).ran == []


def test_rounds_have_different_seeds_unless_set() -> None:
    raw = looped(3, changes={3: {"total": {"seed": 3}}})
    raw["stages"]["loop"]["stages"]["drawn"]["seed"] = 2**32 - 1
    nodes = Pipeline(raw).nodes
    assert [nodes[f"total-{number}"].seed for number in (1, 2, 3)] == [3, 4, 3]
    assert [nodes[f"drawn-{number}"].seed for number in (1, 2, 3)] == [2**32 - 1, 0, 1]


def test_a_round_can_be_set_otherwise() -> None:
    nodes = Pipeline(looped(3, changes={2: {"drawn": {"number": 9}, "total": {"others": ["drawn", "start"]}}})).nodes
    assert [nodes[f"drawn-{number}"].config.number for number in (1, 2, 3)] == [2, 9, 2]
    assert nodes["total-2"].inputs["others"] == ["drawn-2", "start"]


def test_pattern_names_every_round_or_every_round_so_far() -> None:
    raw = looped(3, after={"all": {"stage": SUM, "first": "start", "others": ["total-*", "start"]}})
    block = raw["stages"]["loop"]["stages"]
    block["sofar"] = {"stage": SUM, "first": "total", "others": ["drawn-*", "sofar-*"]}
    raw["stages"]["alone"] = {"stage": SUM, "first": "start", "others": "drawn-*"}  # a list, where one is taken
    nodes = Pipeline(raw).nodes
    assert nodes["all"].inputs["others"] == ["total-1", "total-2", "total-3", "start"]
    assert nodes["alone"].inputs["others"] == ["drawn-1", "drawn-2", "drawn-3"]
    assert nodes["sofar-1"].inputs["others"] == ["drawn-1"]
    assert nodes["sofar-3"].inputs["others"] == ["drawn-1", "drawn-2", "drawn-3", "sofar-1", "sofar-2"]


def test_carry_has_a_short_form() -> None:
    raw = looped(2, carry={"start": "total"})
    raw["stages"]["loop"]["stages"]["total"]["first"] = "start"
    nodes = Pipeline(raw).nodes
    assert [nodes[f"total-{number}"].inputs["first"] for number in (1, 2)] == ["start", "total-1"]
    fixed = looped(2)
    fixed["stages"]["loop"]["stages"]["total"]["others"] = ["drawn", "start"]
    assert Pipeline(fixed).nodes["total-2"].inputs == {"first": "total-1", "others": ["drawn-2", "start"]}


def test_a_second_loop_goes_on_from_the_first() -> None:
    again = {
        "stage": "loop", "rounds": 2, "carry": {"total": "more"},
        "stages": {"more": {"stage": SUM, "first": "total", "others": ["drawn", "drawn-*"]}},
    }  # fmt: skip
    nodes = Pipeline(looped(2, after={"again": again})).nodes
    assert nodes["more-1"].inputs == {"first": "total-2", "others": ["drawn-2", "drawn-1", "drawn-2"]}
    assert nodes["more-2"].inputs["first"] == "more-1"


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        ({"round": 2}, "p.yaml: stages.loop: unknown key 'round'. Did you mean 'rounds'?"),
        ({"rounds": 0}, "p.yaml: stages.loop.rounds: should be greater than or equal to 1; found 0."),
        ({"carry": {"befor": {"first": "start", "then": "total"}}}, "reads 'befor'. Did you mean 'before'?"),
        ({"carry": {"before": {"first": "strat", "then": "total"}}}, "no stage 'strat' outside of the loop. Did you"),
        ({"carry": {"before": {"first": "start", "then": "totl"}}}, "no stage 'totl' in the loop's block. Did you"),
        ({"carry": {"before": {"first": "start", "them": "total"}}}, "unknown key 'them'. Did you mean 'then'?"),
        ({"carry": {"before": "total"}}, "Say which stage it is in the first round: {first: STAGE, then: total}."),
        ({"carry": {"drawn": {"first": "start", "then": "total"}}}, "the block has a stage 'drawn' itself"),
        ({"changes": {4: {"drawn": {"number": 1}}}}, "changes.4: there is no such round; they are 1 to 3."),
        ({"changes": {2: {"drwn": {"number": 1}}}}, "no stage 'drwn' in the loop's block. Did you mean 'drawn'?"),
        ({"changes": {2: {"drawn": {"numbr": 1}}}}, "stages.loop.stages.drawn[round 2]: unknown key 'numbr'. Did you"),
        ({"stages": {"loop": {"rounds": 2}}}, "stages.loop.stages.loop: a loop in a loop"),
        ({"stages": {"start": {"stage": NUMBER}}}, "'start' is a stage of the pipeline already; rename one of them."),
        ({"stages": {"sftt": {}}, "carry": {}}, "stages.loop.stages: unknown stage 'sftt'. Did you mean 'sft'?"),
        ({"stages": {"x": {"stage": "sftt"}}, "carry": {}}, "stages.x.stage: unknown stage 'sftt'. Did you mean 'sft'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_loop(loop: dict[str, Any], expected: str) -> None:
    assert expected in refused(looped(**loop))


def test_mistakes_around_a_loop() -> None:
    assert "stages: unknown stage 'lop'. Did you mean 'loop'?" in refused(
        {**looped(), "stages": {"lop": looped()["stages"]["loop"]}}
    )
    wrong = looped()
    wrong["stages"]["loop"]["stages"]["total"]["first"] = "befroe"
    assert "reads 'before'. Did you mean 'befroe'?" in refused(wrong)
    order = looped()
    order["stages"]["loop"]["stages"] = dict(reversed(order["stages"]["loop"]["stages"].items()))
    assert "p.yaml: stages.loop.stages.total.others: stage 'drawn-1' comes later" in refused(order)
    card = looped(2, carry={"before": {"first": "start", "then": "card"}})
    card["stages"]["loop"]["stages"]["card"] = {"stage": "tests.support.toy:CARD"}
    expected = "p.yaml: stages.loop.stages.total[round 2].first points at 'card-1', a Scorecard; sum needs a PromptData"
    assert expected in refused(card)
    clash = looped(2, after={"total-2": {"stage": NUMBER}})
    assert "'total-2' is a stage of the pipeline already" in refused(clash)
    shadow = looped(2, after={"other": {"stage": NUMBER}}, carry={"other": {"first": "start", "then": "total"}})
    shadow["stages"]["loop"]["stages"]["total"]["first"] = "other"
    assert "'other' is a stage of the pipeline, so the name would mean two" in refused(shadow)


def test_set_reaches_the_loop_its_stages_and_one_round(refused: Refused) -> None:
    pipeline = Pipeline(looped(2))
    assert len(pipeline.set("stages.loop.rounds=4").nodes) == 9
    everywhere = pipeline.set("stages.drawn.number=7")
    assert [everywhere.nodes[f"drawn-{number}"].config.number for number in (1, 2)] == [7, 7]
    assert everywhere.nodes["drawn-1"].key == pipeline.set("stages.loop.stages.drawn.number=7").nodes["drawn-1"].key
    once = pipeline.set("stages.drawn-2.number=7").set("stages.drawn-2.steps=1")
    assert [once.nodes[f"drawn-{number}"].config.number for number in (1, 2)] == [2, 7]
    assert once.nodes["drawn-2"].config.steps == 1
    assert once.set("stages.loop.changes.2.drawn.number=8").nodes["drawn-2"].config.number == 8
    for path in ("stages.drwn.number=1", "stages.drawn-3.number=1"):
        refused(pipeline.set, path)


def test_changed_part_of_a_field_keeps_the_other_parts() -> None:
    stages = {
        "model": {"source": "tiny"},
        "data": {"recipe": "data_recipes/embedded.yaml"},
        "loop": {
            "rounds": 2, "carry": {"model": "sft"},
            "stages": {"sft": {"model": "model", "data": "data", "tuning": TUNING, "learning_rate": 1e-3}},
        },
    }  # fmt: skip
    changed = Pipeline({"name": "x", "stages": stages}).set("stages.sft-2.tuning.rank=2").nodes
    assert (changed["sft-2"].config.tuning.rank, changed["sft-2"].config.tuning.alpha) == (2, 9)
    assert changed["sft-1"].config.tuning.rank == 4


def test_plan_and_explain_speak_of_rounds(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    run_pipeline(Pipeline(looped(2)), store=store.root)
    changed = Pipeline(looped(3)).set("stages.drawn-2.number=4")
    steps = {step.node.name: (step.action, step.why) for step in plan(changed, store)}
    assert steps["total-1"][0] == "cached" and steps["drawn-2"] == ("run", "number: 2 → 4")
    assert steps["total-2"] == ("run", "input others changed (drawn-2)") and steps["drawn-3"] == ("run", "never run")
    assert History(changed, store).explain(changed.nodes["drawn-2"]) == ["number: 2 → 4"]


def test_options_take_a_round_or_the_stage_itself(refused: Refused, tmp_path: Path) -> None:
    pipeline, store = Pipeline(looped(2)), tmp_path / "store"
    run_pipeline(pipeline, store=store)
    opened = Store.open(store)
    assert choose_stages(pipeline, opened, None, "total-2", ()) == {"total-2"}
    assert choose_stages(pipeline, opened, None, "drawn", ()) == {"drawn-1", "total-1", "drawn-2", "total-2"}
    assert choose_stages(pipeline, opened, None, None, ("drawn",)) == {"drawn-1", "drawn-2"}
    more = pipeline.set("stages.loop.rounds=3")
    assert run_pipeline(more, store=store, only="drawn").ran == ["drawn-3"]
    refused(run_pipeline, pipeline, store=store, from_="totl")


def test_the_page_and_the_store_know_the_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, store = tmp_path / "p.yaml", str(tmp_path / "store")
    file.write_text(yaml.safe_dump(looped(2), sort_keys=False))
    assert main(["run", str(file), "--store", store, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["stages"]) == ["start", "drawn-1", "total-1", "drawn-2", "total-2"]
    assert "total-2" in Path(document["report"]).read_text(encoding="utf-8")
    assert main(["report", "looped", "--store", store]) == 0
    assert main(["gc", "--store", store]) == 0
    assert "0 folders" in capsys.readouterr().out
    remembered = Store.open(Path(store)).runs()["looped"]["pipeline"]
    # what the store remembers is a pipeline without loops, and the same one
    assert list(remembered["stages"]) == ["start", "drawn-1", "total-1", "drawn-2", "total-2"]
    assert [node.key for node in Pipeline(remembered)] == [node.key for node in Pipeline(looped(2))]


def test_baselines_and_gates_follow_the_last_round() -> None:
    stages: dict[str, Any] = {
        "model": {"source": "tiny"},
        "data": {"recipe": "data_recipes/embedded.yaml"},
        "loop": {
            "rounds": 2, "carry": {"policy": {"first": "model", "then": "dpo"}},
            "stages": {
                "sample": {"policy": "policy", "prompts": "data"},
                "dpo": {"policy": "policy", "data": "sample", "learning_rate": 1e-3},
            },
        },
        "evaluate": {
            "policies": ["model", "dpo-1", "dpo"], "reference": "dpo", "prompts": "data", "score": "gold",
            "baselines": {"again": {"of": "dpo", "sample_seed": 1}, "shown": {"of": "model", "shots": 1}},
            "gates": {"dpo/gold": ">= dpo-1 - 0.1", "kl_to_dpo": "<= 9",
                      "gold": {"bound": ">= model", "systems": ["dpo"]}},
        },
    }  # fmt: skip
    config = Pipeline({"name": "x", "stages": stages}).nodes["evaluate"].config
    assert config.policies == ["model", "dpo-1", "dpo-2"] and config.reference == "dpo-2"
    assert config.baselines["again"].of == "dpo-2" and config.baselines["shown"].of == "model"
    assert list(config.gates) == ["dpo-2/gold", "kl_to_dpo-2", "gold"]
    assert config.gates["dpo-2/gold"] == ">= dpo-1 - 0.1" and config.gates["gold"].systems == ["dpo-2"]


def test_the_toy_pipeline_without_a_loop_keeps_its_keys() -> None:
    keys = {node.name: node.key[:12] for node in Pipeline(toy.pipeline())}
    assert keys == {"one": "7a9700d387e8", "two": "19764925c4ac", "total": "f048945424d0"}
