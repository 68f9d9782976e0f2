"""Recipes: what is accepted, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from align.config.recipe.recipe import load_recipe
from align.errors import UserError
from align.store.artifacts import Kind

FILES = {"type": "files", "paths": ["a.jsonl"], "format": "hh_rlhf"}
EMBEDDED = {"type": "embedded"}
HUB = {"type": "hub", "dataset": "o/n", "revision": "0" * 40, "format": "messages"}


def load(folder: Path, **content: object):
    (folder / "r.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_recipe("r.yaml", folder)


def test_kinds(tmp_path: Path) -> None:
    assert load(tmp_path, kind="preferences", sources=[FILES]).makes() == Kind.PREFERENCES
    assert load(tmp_path, kind="instructions", sources=[FILES, HUB]).makes() == Kind.INSTRUCTIONS
    assert load(tmp_path, kind="prompts", sources=[EMBEDDED]).makes() == Kind.PROMPTS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "instructions", "sources": [FILES], "test_sise": 1}, "unknown key 'test_sise'. Did you"),
        ({"kind": "instructions", "sources": [FILES | {"fromat": "x"}]}, "'fromat'. Did you mean 'format'"),
        ({"kind": "preference", "sources": [FILES]}, "Did you mean 'preferences'"),
        ({"kind": "prompts", "sources": []}, "sources"),
        ({"kind": "prompts", "sources": [HUB | {"revision": "main"}]}, "sources.0..revision"),
        ({"kind": "prompts", "sources": [{"type": "hub", "dataset": "o/n", "format": "prompt"}]}, "revision: this"),
        ({"kind": "prompts", "sources": [FILES], "test_size": 1.5}, "test_size"),
        ({"kind": "preferences", "sources": [HUB]}, r"which sources.0. .format messages. cannot give; .*hh_rlhf"),
        ({"kind": "preferences", "sources": [EMBEDDED]}, "embedded. has one reply"),
        ({"kind": "instructions", "sources": [HUB | {"format": "prompt"}]}, "format prompt. cannot give"),
        ({"kind": "prompts", "sources": [HUB | {"part": "train"}]}, "leaves the other split empty"),
        ({"kind": "prompts", "sources": [EMBEDDED | {"families": ["sorts"]}]}, "family 'sorts'. Did you mean 'sort'"),
        ({"kind": "prompts", "sources": [{"type": "embeded"}]}, "unknown value 'embeded'. Did you mean 'embedded'"),
    ],
)  # fmt: skip
def test_wrong_recipes(tmp_path: Path, content: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, **content)


def test_a_recipe_that_does_not_exist(tmp_path: Path) -> None:
    load(tmp_path, kind="prompts", sources=[FILES])
    with pytest.raises(UserError, match=r"no such file.*Did you mean .*r.yaml"):
        load_recipe("rr.yaml", tmp_path)


def test_files_take_the_place_of_sources_but_not_of_a_generator(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, kind="instructions", sources=[HUB | {"part": "train"}, HUB | {"part": "test", "split": "test"}]
    )
    replaced = recipe.with_files(["x.jsonl"]).sources
    assert [(s.type, s.format, s.part) for s in replaced] == [("files", "messages", "split")]
    with pytest.raises(ValueError, match="generated"):
        load(tmp_path, kind="prompts", sources=[EMBEDDED]).with_files(["x.jsonl"])
