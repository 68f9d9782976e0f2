"""Settings that map records: names, collisions, and what goes together."""

from __future__ import annotations

from typing import Any

import pytest

from align.config.recipe.recipe import Recipe
from align.config.recipe.record_mapping import FORMAT_FIELDS, ROW_FIELDS
from align.config.recipe.source_settings import FilesSource, HubSource
from align.config.stages.evaluation.tasks import IfevalConfig
from align.config.validation import validate
from align.data.formats.fields import NAMES, OPTIONAL
from align.data.rows import column_types
from align.errors import UserError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": {"promt": "q"}}, "columns.promt: no format reads a field 'promt'. Did you mean 'prompt'?"),
        ({"columns": {"images": "i"}}, "columns.images: align trains only on text, so it does not accept images"),
        ({"columns": {"prompt": "{q"}}, "columns.prompt: '{q' has a single '{'"),
        ({"columns": {"prompt": "{q.__class__!r}"}}, "has a conversion or a format"),
        ({"columns": {"choices": ["a", "b}"]}}, "columns.choices: 'b}' has a single '}'"),
        (
            {"keep": ["source"]},
            "'source' is a field of align's own rows. Give it another name: keep: {record_source: so",
        ),
        ({"keep": {"score": "rating"}}, "'score' is a field of align's own rows"),
        ({"keep": ["_x"]}, "'_x' begins with _, as align's internal fields do. Give it another name: keep: {x: _x}"),
        ({"keep": ["{a}"]}, "'{a}' is a template and needs a name"),
        ({"better": {"label": "w", "a": "x", "b": "y", "a_is": 1}}, "a_is and b_is go together"),
        ({"better": {"label": "w", "a": "x", "b": "y"}, "format": "alpaca"}, "better makes records of format preferen"),
        ({"better": {"label": "w", "a": "x", "b": "y"}, "columns": {"chosen": "z"}}, "both make the pair"),
        ({"grouped": {"by": "p", "answer": "r"}}, "grouped answers need a score or a rank"),
        (
            {"grouped": {"by": "p", "answer": "r", "score": "s"}, "format": "dolly"},
            "grouped makes records of format sco",
        ),
        ({"system": "You are {persona!s}"}, "has a conversion or a format"),
        ({"system": "x", "columns": {"system": "y"}}, "both name the system prompt"),
        ({"format": "rows", "keep": ["a"]}, "format: rows reads align's own rows with all their columns"),
        ({"options": {"columns": {"a": "b"}}}, "columns"),
    ],
)
def test_a_wrong_mapping_is_named_before_anything_is_read(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(FilesSource, {"type": "files", "paths": ["a.jsonl"], **settings}, "mine.yaml")
    assert message in str(caught.value)


def test_settings_without_effect_are_refused() -> None:
    hub = {"type": "hub", "dataset": "o/n", "revision": "a" * 40, "records": "examples"}
    with pytest.raises(UserError, match="records is about files, and this source reads none"):
        validate(HubSource, hub, "mine.yaml")
    assert validate(HubSource, {**hub, "files": ["a.json"]}, "mine.yaml").records == "examples"
    with pytest.raises(UserError, match="header is about files, and there are none"):
        validate(IfevalConfig, {"revision": "a" * 40, "header": ["prompt"]}, "suite.yaml")
    grouped = {"by": "p", "answer": "r", "score": "s"}
    recipe = {"kind": "preferences", "sources": [{"type": "files", "paths": ["a.jsonl"], "grouped": grouped}]}
    with pytest.raises(UserError, match="several answers to a prompt; add the step `type: pairs`"):
        validate(Recipe, recipe, "mine.yaml")
    assert validate(Recipe, {**recipe, "steps": [{"type": "pairs"}]}, "mine.yaml").kind == "preferences"


def test_the_names_are_those_of_rows_and_formats() -> None:
    assert set(ROW_FIELDS) == {name for name in column_types() if not name.startswith("_")}
    other_spellings = {name for names in OPTIONAL.values() for name in names} | NAMES
    assert set(FORMAT_FIELDS) <= other_spellings | {"chosen_score", "rejected_score", "checks", "labels", "output"}
