"""Recipes: what is accepted, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import yaml

from align.config.recipe.recipe import load_recipe
from align.store.artifacts import Kind
from tests.support.refusals import Refused

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


def test_a_recipe_that_does_not_exist(refused: Refused, tmp_path: Path) -> None:
    load(tmp_path, kind="prompts", sources=[FILES])
    refused(load_recipe, "rr.yaml", tmp_path)


def test_files_take_the_place_of_sources_but_not_of_a_generator(refused: Refused, tmp_path: Path) -> None:
    recipe = load(
        tmp_path, kind="instructions", sources=[HUB | {"part": "train"}, HUB | {"part": "test", "split": "test"}]
    )
    replaced = recipe.with_files(["x.jsonl"]).sources
    assert [(s.type, s.format, s.part) for s in replaced] == [("files", "messages", "split")]
    refused(lambda: load(tmp_path, kind="prompts", sources=[EMBEDDED]).with_files(["x.jsonl"]))
