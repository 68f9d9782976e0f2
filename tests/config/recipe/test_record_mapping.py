"""Settings that map records: names, collisions, and what goes together."""

from __future__ import annotations

from align.config.recipe.recipe import Recipe
from align.config.recipe.record_mapping import FORMAT_FIELDS, ROW_FIELDS
from align.config.recipe.source_settings import HubSource
from align.config.stages.evaluation.tasks import IfevalConfig
from align.config.validation import validate
from align.data.formats.fields import NAMES, OPTIONAL
from align.data.rows import column_types
from tests.support.refusals import Refused


def test_settings_without_effect_are_refused(refused: Refused) -> None:
    hub = {"type": "hub", "dataset": "o/n", "revision": "a" * 40, "records": "examples"}
    refused(validate, HubSource, hub, "mine.yaml")
    assert validate(HubSource, {**hub, "files": ["a.json"]}, "mine.yaml").records == "examples"
    refused(validate, IfevalConfig, {"revision": "a" * 40, "header": ["prompt"]}, "suite.yaml")
    grouped = {"by": "p", "answer": "r", "score": "s"}
    recipe = {"kind": "preferences", "sources": [{"type": "files", "paths": ["a.jsonl"], "grouped": grouped}]}
    refused(validate, Recipe, recipe, "mine.yaml")
    assert validate(Recipe, {**recipe, "steps": [{"type": "pairs"}]}, "mine.yaml").kind == "preferences"


def test_the_names_are_those_of_rows_and_formats() -> None:
    assert set(ROW_FIELDS) == {name for name in column_types() if not name.startswith("_")}
    other_spellings = {name for names in OPTIONAL.values() for name in names} | NAMES
    assert set(FORMAT_FIELDS) <= other_spellings | {"chosen_score", "rejected_score", "checks", "labels", "output"}
