"""Pipelines written as dictionaries equal the same values in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align import Pipeline
from align.config.yaml import dump_yaml, load_yaml
from tests.support.refusals import Refused

PIPELINES = Path(__file__).parents[2] / "pipelines"


def values(**sft: Any) -> dict[str, Any]:
    return {
        "name": "mine",
        "seed": 3,
        "stages": {
            "model": {"source": "tiny"},
            "data": {"recipe": str(Path("data_recipes/embedded.yaml").absolute())},
            "sft": {"model": "model", "data": "data", "learning_rate": 1e-3, "max_steps": 2, **sft},
        },
    }


def keys(pipeline: Pipeline) -> dict[str, str]:
    return {node.name: node.key for node in pipeline}


@pytest.mark.parametrize("name", ["smoke", "quickstart", "methods", "iterate"])
def test_a_dictionary_has_the_keys_of_the_file(name: str) -> None:
    path = PIPELINES / f"{name}.yaml"
    pipeline = Pipeline.from_dict(load_yaml(path), base=PIPELINES)
    assert keys(pipeline) == keys(Pipeline.load(path))
    assert pipeline.raw == Pipeline.load(path).raw


def test_overrides_supply_what_the_dictionary_lacks(refused: Refused) -> None:
    complete = Pipeline.from_dict(values(epochs=2))
    for overrides in (["stages.sft.epochs=2"], {"stages.sft.epochs": 2}):
        assert keys(Pipeline.from_dict(values(), overrides=overrides)) == keys(complete)
    refused(lambda: Pipeline.from_dict(values(), overrides=["stages.stf.epochs=1"]))


def test_objects_of_python_become_what_yaml_has_for_them() -> None:
    raw = values(max_steps=np.int64(2), learning_rate=np.float64(1e-3))
    raw["stages"]["data"]["recipe"] = Path("data_recipes/embedded.yaml")
    pipeline = Pipeline.from_dict(raw)
    assert keys(pipeline) == keys(Pipeline.from_dict(values()))
    assert type(pipeline.raw["stages"]["sft"]["max_steps"]) is int
    raw["stages"]["report"] = {"stages": ("data", "sft")}
    assert Pipeline.from_dict(raw).raw["stages"]["report"]["stages"] == ["data", "sft"]


def test_object_without_yaml_form_is_refused(refused: Refused) -> None:
    refused(lambda: Pipeline.from_dict(values(epochs=np.ones(2))))
    refused(lambda: Pipeline.from_dict(values(trainer={"seeds": [1, {2}]})))


def test_what_is_no_dictionary_is_refused(refused: Refused) -> None:
    refused(Pipeline.from_dict, "pipelines/smoke.yaml")


def test_the_dictionary_is_left_alone() -> None:
    raw, before = values(), values()
    pipeline = Pipeline.from_dict(raw, overrides=["stages.sft.epochs=2"])
    pipeline.raw["stages"]["sft"]["epochs"] = 7
    assert raw == before


def test_variables_are_filled_in_and_secrets_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_NAME", "tuesday")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    raw = {**values(), "name": "run-${RUN_NAME}", "description": "costs $${5}"}
    pipeline = Pipeline.from_dict(raw)
    assert (pipeline.name, pipeline.config.description) == ("run-tuesday", "costs ${5}")
    refused(Pipeline.from_dict, {**raw, "description": "${HF_TOKEN}"})


def test_a_dictionary_extends_a_file_below_its_base(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(dump_yaml(values(epochs=2)))
    changes = {"extends": "base.yaml", "stages": {"sft": {"epochs": 1}}}
    pipeline = Pipeline.from_dict(changes, base=tmp_path)
    assert keys(pipeline) == keys(Pipeline.from_dict(values(epochs=1)))
    refused(Pipeline.from_dict, changes)


def test_an_error_of_a_field_names_its_place(refused: Refused) -> None:
    refused(lambda: Pipeline.from_dict(values(epoch=2)))
