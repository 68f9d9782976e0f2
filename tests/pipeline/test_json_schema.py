"""The schema for editors: it accepts what the loader accepts, shipped files and those of the documents among it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from align.config.yaml import load_yaml, parse_yaml
from align.pipeline.json_schema import pipeline_schema

jsonschema = pytest.importorskip("jsonschema")
SHIPPED = [path for path in sorted(Path("pipelines").glob("**/*.yaml")) if "stages:" in path.read_text()]
PAGES = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]


@pytest.fixture(scope="module")
def schema() -> Any:
    document = pipeline_schema()
    jsonschema.Draft202012Validator.check_schema(document)
    return jsonschema.Draft202012Validator(document)


def problems(schema: Any, document: dict[str, Any]) -> list[str]:
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in schema.iter_errors(document)]


def shown_pipelines() -> dict[str, dict[str, Any]]:
    """Return the whole pipeline files that the documents show, by page and number."""
    shown: dict[str, dict[str, Any]] = {}
    for page in PAGES:
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
            # Others are parts of a file, or ways to write one.
            if re.search(r"^(name|extends):", block, re.MULTILINE) and re.search(r"^stages:", block, re.MULTILINE):
                shown[f"{page.name}-{number}"] = parse_yaml(block, page.name)
    return shown


def test_shipped_pipelines_are_accepted(schema: Any) -> None:
    assert len(SHIPPED) > 10
    for path in SHIPPED:
        assert problems(schema, load_yaml(path)) == [], path


def test_pipelines_of_the_documents_are_accepted(schema: Any) -> None:
    shown = shown_pipelines()
    assert len(shown) >= 5
    for place, document in shown.items():
        assert problems(schema, document) == [], place


def test_loops_are_known(schema: Any) -> None:
    loop = {"rounds": 2, "stages": {"sft": {"model": "m", "data": "d", "learning_rate": 1e-3}}}
    for stages in ({"loop": loop}, {"again": {"stage": "loop", **loop}}):
        assert problems(schema, {"name": "x", "stages": stages}) == []
    for wrong in ({"round": 2}, {"rounds": 2, "stages": {"sft": {"modle": "m"}}}):
        assert problems(schema, {"name": "x", "stages": {"loop": wrong}})


def test_forms_of_an_executor_are_known(schema: Any) -> None:
    raw = {"name": "p", "stages": {"data": {"recipe": "recipe.yaml"}}}
    slurm = {"name": "slurm", "partition": "gpu", "cpus": 8}
    for runtime in ({"executor": "slurm"}, {"executor": slurm, "stages": {"one": {"executor": {"gpus": 4}}}}):
        assert problems(schema, {**raw, "runtime": runtime}) == []
    assert problems(schema, {**raw, "runtime": {"executor": {"name": "ray", "partition": "a"}}})


def evaluation(**fields: Any) -> dict[str, Any]:
    return {"name": "x", "stages": {"evaluate": {"policies": ["sft"], "reference": "sft", **fields}}}


def training(**tasks: Any) -> dict[str, Any]:
    return {"name": "x", "stages": {"sft": {**SFT["sft"], "evaluate": {"every": 5, "tasks": tasks}}}}


SFT: dict[str, Any] = {"sft": {"model": "m", "data": "d", "learning_rate": 1e-3}}


@pytest.mark.parametrize(
    "document",
    [
        evaluation(tasks={"ifeval": {"files": ["x"]}, "preference": {}, "mine": {"task": "ifeval", "files": ["x"]}}),
        training(ifeval={"files": ["x"]}, mine={"task": "ifeval", "files": ["x"]}),
        {"name": "x", "stages": SFT, "runtime": {"store": "/folder", "report_to": "tensorboard"}},
        {"name": "x", "stages": SFT, "runtime": {"store": {"remote": "s3://b/p"}, "report_to": ["wandb"]}},
        {"name": "x", "stages": {"mine": {"stage": "my.module:STAGE", "anything": 5}}},
        {"name": "x", "stages": {"sft": {"stage": "my.module:STAGE", "anything": 5}}},
        {"extends": "base.yaml", "stages": {"sft": {"tuning": {"rank": 16}}}},
    ],
)
def test_short_forms_are_accepted(schema: Any, document: dict[str, Any]) -> None:
    assert problems(schema, document) == []


@pytest.mark.parametrize(
    "document",
    [
        evaluation(tasks={"mine": {"files": ["x"]}}),
        evaluation(tasks={"ifeval": {"fils": ["x"]}}),
        training(mine={"files": ["x"]}),
        {"name": "x", "stages": {"mine": {"stage": "sftt", "model": "m"}}},
        {"stages": SFT},
        {"name": "x"},
        {"name": "x", "stages": {"sft": {"model": "m"}}},
        {"name": "x", "stages": SFT, "runtime": {"store": 5}},
    ],
)
def test_mistakes_are_refused(schema: Any, document: dict[str, Any]) -> None:
    assert problems(schema, document)
