"""What keys count of a config: later fields only when they are set, and retired ones still."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from align.config.base import Config, rename_in_block, settings_for_key
from align.config.recipe.recipe import Recipe
from align.config.stages.inputs import DataConfig
from align.stages.data import identities


class Inner(Config):
    size: int = 1
    later: str | None = None

    keyed_when_set: ClassVar[frozenset[str]] = frozenset({"later"})
    retired: ClassVar[Mapping[str, Any]] = {"gone": {}}


class Outer(Config):
    inner: Inner = Inner()
    several: list[Inner] = []
    by_number: dict[int, Inner] = {}


def test_key_counts_later_fields_if_set_and_retired_fields() -> None:
    config = Outer(inner=Inner(later="x"), several=[Inner()], by_number={2: Inner(size=3)})
    for mode in ("json", "python"):
        found = settings_for_key(config, config.model_dump(mode=mode))
        assert found["inner"] == {"size": 1, "later": "x", "gone": {}}
        assert found["several"] == [{"size": 1, "gone": {}}]
        assert list(found["by_number"].values()) == [{"size": 3, "gone": {}}]
    assert settings_for_key(Outer(), {}) == {}  # what a key leaves out stays out


def test_a_field_has_changed_where_its_value_is_not_the_default() -> None:
    config = Outer(inner=Inner(), several=[Inner()], by_number={})
    assert config.changed("inner", "several", "by_number") == ["several"]


def test_key_counts_mapping_of_source_if_used(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "a", "gold": 1}\n')

    def digest(name: str, more: str = "") -> str:
        source = f"{{type: files, paths: [a.jsonl]{more}}}"
        (tmp_path / name).write_text(f"kind: instructions\nsources: [{source}]\n")
        return identities(DataConfig(recipe=name), tmp_path)["recipe"]

    plain = digest("plain.yaml")
    # A default that is written out is the same recipe; what is set is another one.
    assert digest("written.yaml", ", keep: [], columns: {}, roles: {}, header: null") == plain
    settings = (", keep: [gold]", ", columns: {prompt: prompt}", ", system: Hi.", ", records: examples")
    assert len({plain, *(digest(f"{number}.yaml", more) for number, more in enumerate(settings))}) == 5
    source = Recipe.model_validate({"kind": "prompts", "sources": [{"type": "files", "paths": ["a"]}]}).sources[0]
    counted = settings_for_key(source, source.model_dump())
    assert set(counted) == {"name", "license", "part", "format", "options", "type", "paths"}
    assert counted["options"]["columns"] == counted["options"]["roles"] == {}


@pytest.mark.parametrize(
    ("name", "block", "renamed"),
    [
        ("policy", {"policy": "sft", "n": 4}, {"policy": "sft-2", "n": 4}),
        ("score.reward", {"score": "gold"}, {"score": "gold"}),
        (
            "score.reward",
            {"score": [{"function": "gold"}, {"reward": "rm"}], "policy": "rm"},
            {"score": [{"function": "gold"}, {"reward": "rm-2"}], "policy": "rm"},
        ),
        (
            "environment.user.model",
            {"environment": {"class": "a:B", "user": {"model": "sft"}}},
            {"environment": {"class": "a:B", "user": {"model": "sft-2"}}},
        ),
        ("environment.user.model", {"environment": None}, {"environment": None}),
        (
            "environment.user.model",
            {"environment": {"user": {"prompt": "q"}}},
            {"environment": {"user": {"prompt": "q"}}},
        ),
    ],
)
def test_stages_are_renamed_in_nested_blocks(name: str, block: dict[str, Any], renamed: dict[str, Any]) -> None:
    before = copy.deepcopy(block)
    assert rename_in_block(block, name, lambda stage: f"{stage}-2") == renamed
    assert block == before
