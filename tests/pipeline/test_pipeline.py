from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.errors import UserError
from tests.support import toy
from tests.support.refusals import Refused


def refused(raw: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        Pipeline(raw, "p.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "allowed"), [("x-0.03", "x-0_03"), ("0.5", "run_0_5"), ("a" * 65, "a" * 64), ("日本", "run")]
)
def test_refused_run_name_offers_one_to_write(name: str, allowed: str) -> None:
    assert refused({**toy.pipeline(), "name": name}).endswith(f"Write `name: {allowed}`.")
    assert Pipeline({**toy.pipeline(), "name": allowed}).name == allowed


def test_inputs_and_order() -> None:
    nodes = Pipeline(toy.pipeline()).nodes
    assert list(nodes) == ["one", "two", "total"]
    assert nodes["total"].input_names == ["one", "two"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"total": {"first": "oen"}}, "p.yaml: stages.total.first: there is no stage 'oen'. Did you mean 'one'?"),
        ({"total": {"first": "total"}}, "stages go in a circle: total → total"),
        (
            {"total": {"others": ["later"]}, "later": {"stage": "tests.support.toy:NUMBER"}},
            "stage 'later' comes later; move",
        ),
        ({"one": {"numbr": 1}}, "p.yaml: stages.one: unknown key 'numbr'. Did you mean 'number'?"),
        ({"one": {"seeed": 1}}, "Did you mean 'seed'?"),
        ({"one": {"number": 101}}, "stages.one.number: should be less than or equal to 100; found 101."),
        ({"one": {"number": "x"}}, "stages.one.number: should be a valid integer"),
        (
            {"one": {"stage": "tests.support.toy:NUMBR"}},
            "stages.one.stage: 'tests.support.toy:NUMBR': tests.support.toy has no 'NUMBR'. Did",
        ),
        ({"one": {"stage": "nowhere:X"}}, "there is no module 'nowhere'"),
        ({"one": {"stage": "sftt"}}, "stages.one.stage: unknown stage 'sftt'. Did you mean 'sft'?"),
        ({"rewrd": {"model": "one"}}, "stages: unknown stage 'rewrd'. Did you mean 'reward'?"),
        ({"9lives": {"stage": "tests.support.toy:NUMBER"}}, "'9lives' is not a valid stage name"),
        ({"one": {"seed": -1}}, "stages.one.seed: should be a whole number"),
    ],
)
def test_bad_pipelines(changes: dict[str, Any], expected: str) -> None:
    assert expected in refused(toy.pipeline(**changes))


def test_a_circle_of_two_is_shown() -> None:
    raw = toy.pipeline(total={"others": ["late"]}, late={"stage": "tests.support.toy:SUM", "first": "total"})
    assert "stages go in a circle: total → late → total" in refused(raw)


def test_wrong_artifact_kind_names_a_fitting_stage() -> None:
    raw = toy.pipeline()
    raw["stages"] = {"card": {"stage": "tests.support.toy:CARD"}, **raw["stages"]}
    raw["stages"]["total"]["first"] = "card"
    assert refused(raw) == (
        "p.yaml: stages.total.first points at 'card', a Scorecard; sum needs a PromptData there. Point it at 'two'."
    )


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({"sed": 1}, "p.yaml: unknown key 'sed'. Did you mean 'seed'?"),
        ({"runtime": {"devise": "cpu"}}, "p.yaml: runtime: unknown key 'devise'. Did you mean 'device'?"),
        ({"stages": {}}, "stages"),
        ({"stages": {"one": 3}}, "stages.one"),
        ({"name": "../x"}, "name"),
    ],
)
def test_bad_top_level(top: dict[str, Any], expected: str) -> None:
    assert expected in refused({**toy.pipeline(), **top})


def key(raw: dict[str, Any], stage: str = "total") -> str:
    return Pipeline(raw).nodes[stage].key


def test_the_key_follows_config_seed_and_inputs_and_nothing_else() -> None:
    base = key(toy.pipeline())
    assert key({**toy.pipeline(), "runtime": {"device": "cpu", "threads": 1}}) == base
    assert key({**toy.pipeline(), "name": "other", "description": "x"}) == base
    assert key({**toy.pipeline(), "seed": 4}) != base
    assert key(toy.pipeline(total={"scale": 2.0})) != base
    assert key(toy.pipeline(one={"number": 5})) != base
    # a default written out is the same config
    assert key(toy.pipeline(total={"scale": 1.0})) == base


def test_a_single_inputs_name_is_no_part_of_the_key() -> None:
    renamed = toy.pipeline()
    renamed["stages"] = {
        "uno": renamed["stages"]["one"],
        "two": renamed["stages"]["two"],
        "total": {**renamed["stages"]["total"], "first": "uno"},
    }
    assert key(renamed) == key(toy.pipeline())


def test_set_returns_a_changed_copy() -> None:
    pipeline = Pipeline(toy.pipeline())
    for changed in (
        pipeline.set("stages.total.scale=2.5"),
        pipeline.set("stages.total.scale", 2.5),
        pipeline.set(stages__total__scale=2.5),
    ):
        assert changed.nodes["total"].config.scale == 2.5
    assert pipeline.nodes["total"].config.scale == 1.0


@pytest.mark.parametrize(
    "assignment",
    [
        "stages.totl.scale=1",
        "stage.total.scale=1",
        "stages.total.scal=1",
        "stages.total.scale.x=1",
        "nonsense",
        "stages.total.scale=[",
    ],
)
def test_bad_assignments(refused: Refused, assignment: str) -> None:
    refused(lambda: Pipeline(toy.pipeline()).set(assignment))


def test_load_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("name: x\nstages:\n  one: {stage: 'tests.support.toy:NUMBER', number: 4}\n")
    assert Pipeline.load(path).nodes["one"].config.number == 4


def test_misspelled_field_is_found_before_missing_file(refused, tmp_path):
    block = {"model": {"source": "tiny", "chat_template": "no/such.jinja"}, "data": {"recipe": "x", "max_rwos": 1}}
    refused(Pipeline, {"name": "p", "stages": block}, base=tmp_path)
    block["data"] = {"recipe": str(tmp_path / "missing" / "x.yaml")}
    refused(Pipeline, {"name": "p", "stages": block}, base=tmp_path)
    block["model"] = {"source": "tiny"}
    refused(Pipeline, {"name": "p", "stages": block}, base=tmp_path)


@pytest.mark.parametrize("kind", ["a number", "a/number", "", "..", "zahl\n", "größe"])
def test_user_stage_with_invalid_kind_is_refused(refused: Refused, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record could not be written in the end, nor be read."""
    monkeypatch.setattr(toy, "NUMBER", replace(toy.NUMBER, kind=kind))
    refused(lambda: Pipeline(toy.pipeline()))
