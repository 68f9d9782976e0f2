"""The artifact stage: a finished artifact goes into another pipeline as it is, shared, checked, known by its key."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.store.artifacts import Artifact, Kind
from align.store.json_files import write_sealed
from align.store.record import read_record
from align.store.store import Store
from tests.support import toy
from tests.support.records import change_record
from tests.support.refusals import Refused

pytestmark = pytest.mark.usefixtures("stages_in_process")


@pytest.fixture
def original(tmp_path: Path) -> Artifact:
    """A finished number in a store of its own."""
    raw = {"name": "toy", "stages": {"one": {"stage": "tests.support.toy:NUMBER", "number": 41}}}
    return Pipeline(raw).run(store=tmp_path / "old").artifacts["one"]


def pipeline_with(path: Path | str, **stages: Any) -> Pipeline:
    return Pipeline({"name": "takes", "stages": {"mine": {"stage": "artifact", "path": str(path)}, **stages}}, "p.yaml")


def test_a_later_stage_reads_it_and_its_files_are_shared(original: Artifact, tmp_path: Path) -> None:
    pipeline = pipeline_with(original.path, total={"stage": "tests.support.toy:SUM", "first": "mine"})
    assert pipeline.nodes["mine"].makes == Kind.PROMPTS
    run = pipeline.run(store=tmp_path / "store")
    assert run.metrics("total") == {"total": 41}
    artifact = run.artifacts["mine"]
    assert os.path.samefile(artifact.path / "number.txt", original.path / "number.txt")
    assert run.metrics("mine") == {"key": original.record["key"], "stage": "one", "kind": "number"}
    assert set(artifact.record["outputs"]) == {"number.txt"}
    assert "41" not in (artifact.path / "log.txt").read_text()
    assert Store(tmp_path / "store").problems(artifact, thorough=True) == []
    assert pipeline_with(original.path).run(store=tmp_path / "store").ran == []


def test_what_was_taken_twice_keeps_the_key_of_the_original(original: Artifact, tmp_path: Path) -> None:
    first = pipeline_with(original.path).run(store=tmp_path / "store").artifacts["mine"]
    second = pipeline_with(first.path).run(store=tmp_path / "store").artifacts["mine"]
    assert first.record["key"] != original.record["key"] != second.record["key"]
    assert first.key == second.key == original.key == original.record["key"]


def test_where_links_are_impossible_files_are_copied(
    original: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.config.runtime import Runtime
    from align.config.stages.inputs import ArtifactConfig
    from align.pipeline.context import StageContext
    from align.stages.artifact import run

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "out").mkdir()
    context = StageContext(
        "mine",
        ArtifactConfig(path=str(original.path)),
        {},
        0,
        Runtime(),
        tmp_path / "out",
        tmp_path,
        tmp_path / "events",
    )
    run(context)
    assert (tmp_path / "out" / "number.txt").read_text() == "41"
    assert not os.path.samefile(tmp_path / "out" / "number.txt", original.path / "number.txt")


def test_the_key_follows_the_artifact_and_not_its_place(original: Artifact, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(original.path, moved)
    assert pipeline_with(moved).nodes["mine"].key == pipeline_with(original.path).nodes["mine"].key
    change_record(moved, key="0" * 64)
    assert pipeline_with(moved).nodes["mine"].key != pipeline_with(original.path).nodes["mine"].key


def test_a_reward_models_folder_needs_no_record(tiny_reward: Path, tmp_path: Path) -> None:
    pipeline = pipeline_with(tiny_reward)
    assert pipeline.nodes["mine"].makes == Kind.REWARD
    artifact = pipeline.run(store=tmp_path / "store").artifacts["mine"]
    from align.models.reward import RewardModel

    scores = [
        RewardModel(folder).score([[{"role": "user", "content": "hi"}]], ["ho"])
        for folder in (artifact.model, tiny_reward)
    ]
    assert scores[0] == scores[1]
    assert not os.path.samefile(artifact.model / "config.json", tiny_reward / "config.json")


def test_its_sizes_are_known_to_the_plan(tiny_reward: Path) -> None:
    from align.models.compute.model_types import read_architecture
    from align.stages.artifact import architecture

    config = pipeline_with(tiny_reward).nodes["mine"].config
    assert architecture(config, Path.cwd()) == read_architecture(tiny_reward / "config.json")  # type: ignore[arg-type]


def test_what_cannot_be_taken_is_refused_before_anything_runs(
    refused: Refused, original: Artifact, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "record.json").write_text('{"makes": "Nonsense", "key": "k", "outputs": {}}')
    for path in (tmp_path / "nowhere", tmp_path / "empty", broken, tiny_model):
        refused(pipeline_with, path)


def damage(folder: Path) -> None:
    (folder / "number.txt").write_text("42")


def flip(folder: Path) -> None:
    """As a disk does it: size and time stay."""
    path = folder / "number.txt"
    stat = path.stat()
    path.write_text("43")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def remove(folder: Path) -> None:
    (folder / "number.txt").unlink()


def lead_out(folder: Path) -> None:
    record = read_record(folder)
    write_sealed(folder / "record.json", record | {"outputs": {"../../outside.txt": record["outputs"]["number.txt"]}})


@pytest.mark.parametrize(
    "harm",
    [
        damage,
        flip,
        remove,
        lead_out,
    ],
)
def test_an_artifact_that_is_not_what_its_record_says_is_refused(
    refused: Refused, harm: Any, original: Artifact, tmp_path: Path
) -> None:
    harm(original.path)
    refused(lambda: pipeline_with(original.path).run(store=tmp_path / "store"))
    assert not list(tmp_path.rglob("outside.txt"))


def test_the_toy_is_not_a_checkpoint(refused: Refused, original: Artifact) -> None:
    refused(
        pipeline_with, original.path, sample={"policy": "mine", "prompts": "mine", "score": "examples.scorers:letters"}
    )
    assert toy.NUMBER.makes == Kind.PROMPTS
