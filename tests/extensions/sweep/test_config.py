"""What a sweep's file may say: ranges, choices, sets of changes, objectives; and every way to get it wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from align.errors import UserError
from align.extensions.sweep.config import Range, changes_of, corner_draws, grid, load_sweep
from tests.support.sweep import toy_sweep


def test_whole_numbers_are_those_of_a_whole_field(tmp_path: Path) -> None:
    space = {
        "stages.one.steps": {"low": 1, "high": 3},
        "stages.ppo.height": {"low": 0, "high": 1},  # written without a dot, but the field holds 0.5
        "stages.ppo.penalty": {"low": 1.0e-4, "high": 1, "log": True},
    }
    steps, height, penalty = toy_sweep.check(tmp_path, space=space).space
    assert [dimension.is_integer for dimension in (steps, height, penalty)] == [True, False, False]
    assert steps.changes(2) == {"stages.one.steps": 2} and isinstance(steps.changes(2)["stages.one.steps"], int)
    assert height.changes(0.123456) == {"stages.ppo.height": 0.1235}
    assert Range("x", 0.0, 0.12345, False, False, None).changes(0.12345)["x"] == 0.12345  # never above the bound


def test_choices_are_values_named_values_or_sets_of_changes(tmp_path: Path) -> None:
    raw = toy_sweep.pipeline()
    space = {
        "stages.ppo.steps": [4, 8],
        "seed": [1, 2],
        "way": {
            "low": {"stages.ppo.kind": "a", "stages.ppo.height": 0.1},
            "high": {"stages.ppo.kind": "b", "stages.ppo.height": 0.9},
        },
    }
    sweep = toy_sweep.check(tmp_path, raw, space=space)
    draw = {"stages.ppo.steps": "4", "seed": "2", "way": "high"}
    assert changes_of(sweep.space, draw) == {
        "stages.ppo.steps": 4, "seed": 2, "stages.ppo.kind": "b", "stages.ppo.height": 0.9,
    }  # fmt: skip
    pipeline = sweep.pipeline_of(draw, 7)
    assert pipeline.name == "sw-7" and pipeline.nodes["ppo"].config.kind == "b" and pipeline.nodes["one"].seed == 2
    blocks = {"stages.sft.tuning": {"lora": {"method": "lora", "rank": 4}, "full": {"method": "full"}}}
    stages = {
        "model": {"source": "tiny"}, "data": {"recipe": str(Path("data_recipes/embedded.yaml").absolute())},
        "sft": {"model": "model", "data": "data", "learning_rate": 1e-3},
    }  # fmt: skip
    tuned = toy_sweep.check(tmp_path, {"name": "x", "stages": stages}, space=blocks, maximize="sft.test_loss_after")
    assert tuned.pipeline_of({"stages.sft.tuning": "lora"}, 0).nodes["sft"].config.tuning.rank == 4
    assert set(tuned.shared) == {"model", "data"}


def test_a_grid_is_every_combination_in_order(tmp_path: Path) -> None:
    space = {"stages.ppo.kind": ["a", "b"], "stages.ppo.height": {"low": 0.1, "high": 0.5, "step": 0.2}}
    sweep = toy_sweep.check(tmp_path, space=space, sampler="grid")
    draws = [changes_of(sweep.space, draw) for draw in grid(sweep.space, "x")]
    assert [(entry["stages.ppo.kind"], entry["stages.ppo.height"]) for entry in draws] == [
        ("a", 0.1), ("a", 0.3), ("a", 0.5), ("b", 0.1), ("b", 0.3), ("b", 0.5),
    ]  # fmt: skip
    assert len(list(corner_draws(sweep.space))) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"maximise": "ppo.gold"}, "unknown key 'maximise'. Did you mean 'maximize'?"),
        ({"maximize": None}, "no objective decides which trial is best; write `maximize: SYSTEM.METRIC`"),
        ({"maximize": "gold"}, "'gold' is no objective; write SYSTEM.METRIC"),
        ({"maximize": "pop.gold"}, "'pop' is neither a stage nor one of the systems that the pipeline evaluates. Did"),
        ({"minimize": "ppo.gold"}, "'ppo.gold' is an objective twice"),
        ({"sampler": "tpee"}, "Did you mean 'tpe'?"),
        ({"name": "../x"}, "name"),
        ({"pipeline": "nowhere.yaml"}, "nowhere.yaml: there is no such file"),
        ({"space": {}}, "space"),
        ({"space": {"stages.ppo.hieght": [0.1]}}, "unknown key 'hieght'. Did you mean 'height'?"),
        ({"space": {"stages.pop.height": [0.1]}}, "sweep.yaml: space: stages.pop.height: there is no stage 'pop'."),
        ({"space": {"stages.ppo.height": {"low": 0.0, "hihg": 1.0}}}, "unknown key 'hihg'. Did you mean 'high'?"),
        ({"space": {"stages.ppo.height": {"low": 1.0, "high": 0.0}}}, "low must be below high; found 1.0 and 0.0"),
        ({"space": {"stages.ppo.height": {"low": 0.0, "high": 1.0, "log": True}}}, "a log scale begins above 0"),
        ({"space": {"stages.ppo.height": {"low": 0.1, "high": 1.0, "log": True, "step": 0.1}}}, "exclude one another"),
        ({"space": {"stages.ppo.height": {"low": 0.1, "high": 1.0, "step": 3.0}}}, "step: should be above 0 and at"),
        ({"space": {"stages.ppo.height": 3}}, "should be a list of values, or a range"),
        ({"space": {"stages.ppo.height": []}}, "an empty list; write the values to try"),
        ({"space": {"stages.ppo.height": [0.5, 0.5]}}, "0.5 is listed twice"),
        ({"space": {"stages.one.number": [5, 500]}}, "sweep.yaml: space.stages.one.number = 500: "),
        (
            {"space": {"w": {"a": {"stages.ppo.height": 1.0}, "b": {"stages.ppo.steps": 1}}}},
            "every choice must set",
        ),
        ({"space": {"w": {"a": {"stages.ppo.steps": 1}}, "stages.ppo.steps": [1, 2]}}, "is varied twice"),
        ({"sampler": "grid"}, "space.stages.ppo.height: a grid needs values to try; write a list"),
        ({"set": {"stages.ppo.hight": 1.0}}, "unknown key 'hight'. Did you mean 'height'?"),
        ({"prune": {"maximize": "ppo.score"}}, "prune.start: this key is required"),
        ({"prune": {"start": 1}}, "name one curve, as `maximize: STAGE.CURVE`"),
        ({"prune": {"start": 1, "maximize": "pop.score"}}, "prune: there is no stage 'pop'. Did you mean 'ppo'?"),
        ({"prune": {"start": 1, "maximse": "ppo.score"}}, "unknown key 'maximse'. Did you mean 'maximize'?"),
        ({"prune": {"start": 1, "maximize": "ppo.score"}, "minimize": "ppo.kl"}, "prune ends trials by one objective"),
    ],
)
def test_mistakes_are_found_before_anything_runs(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        toy_sweep.check(tmp_path, **change)
    assert expected in str(caught.value)


def test_a_pipeline_is_no_sweep(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(toy_sweep.pipeline()))
    with pytest.raises(UserError, match="a pipeline, not a sweep; `align run` runs it"):
        load_sweep(file)


def test_what_no_choice_changes_is_shared(tmp_path: Path) -> None:
    assert set(toy_sweep.check(tmp_path).shared) == {"one"}
    assert set(toy_sweep.check(tmp_path, space={"stages.evaluate.spoilt": [True, False]}).shared) == {"one", "ppo"}


def test_what_nothing_that_decides_needs_is_left_out(tmp_path: Path) -> None:
    raw = toy_sweep.pipeline()
    raw["stages"]["spare"] = {"stage": "tests.support.toy:NUMBER"}
    raw["stages"]["other"] = {"stage": toy_sweep.CARDS.path, "policies": ["spare"]}
    raw["runtime"] = {"stages": {"one": {"threads": 2}, "spare": {"threads": 1}}}
    sweep = toy_sweep.check(tmp_path, raw)
    trial = sweep.pipeline_of({"stages.ppo.height": 0.5}, 0)
    assert list(trial.nodes) == ["one", "ppo", "evaluate"] and trial.runtimes["one"].threads == 2
    sweep = toy_sweep.check(tmp_path, raw, space={"stages.ppo.height": [0.1]}, maximize="spare.number")
    assert list(sweep.pipeline_of({"stages.ppo.height": "0.1"}, 0).nodes) == ["spare", "other"]
    prune = {"maximize": "one.loss", "start": 1}
    sweep = toy_sweep.check(tmp_path, raw, space={"stages.one.number": [1]}, maximize="spare.number", prune=prune)
    assert list(sweep.pipeline_of({"stages.one.number": "1"}, 0).nodes) == ["one", "spare", "other"]


def test_a_field_of_a_loop_is_varied_in_every_round(tmp_path: Path) -> None:
    stages = {
        "one": {"stage": "tests.support.toy:NUMBER"},
        "again": {"stage": "loop", "rounds": 2, "stages": {"ppo": {"stage": toy_sweep.CURVE.path, "number": "one"}}},
        "evaluate": {"stage": toy_sweep.CARDS.path, "policies": ["ppo-*"]},
    }
    space = {"stages.again.rounds": [1, 2], "stages.ppo.height": {"low": 0, "high": 1}}
    sweep = toy_sweep.check(tmp_path, {"name": "x", "stages": stages}, space=space)
    assert not sweep.space[1].is_integer
    pipeline = sweep.pipeline_of({"stages.again.rounds": "2", "stages.ppo.height": 0.25}, 0)
    nodes = pipeline.nodes
    assert pipeline.resolve("ppo") == "ppo-2", "the objective is the last round's"
    assert [nodes[name].config.height for name in ("ppo-1", "ppo-2")] == [0.25, 0.25]
