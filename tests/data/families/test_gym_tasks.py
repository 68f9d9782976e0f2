"""The source ``reasoning_gym``: its settings, its rows, and the score of their verifiers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.config.recipe.recipe import Recipe
from align.config.recipe.source_settings import GymSource
from align.config.validation import validate
from align.data.families.gym_tasks import KEY, verified
from align.data.rows import BadRecord
from align.data.sources import identity, read
from tests.support.refusals import Refused

SOURCE = {"type": "reasoning_gym", "tasks": ["chain_sum", {"name": "leg_counting", "arguments": {"max_animals": 3}}]}


def recipe(kind: str = "prompts", **fields: Any) -> Recipe:
    return validate(Recipe, {"kind": kind, "sources": [SOURCE | fields]}, "r.yaml")


def rows(**fields: Any) -> list[dict[str, Any]]:
    source = recipe(**fields).sources[0]
    assert isinstance(source, GymSource)
    return list(_rows(source))


def _rows(source: GymSource) -> Iterator[dict[str, Any]]:
    for item in read(source, Path()):
        assert not isinstance(item, BadRecord)
        yield item[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"tasks": []},
        {"tasks": [3]},
        {"tasks": [{"name": "chain_sum", "arguments": {"seed": 3}}]},
        {"count": 0},
        {"cuont": 3},
        {"kind": "preferences"},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(refused: Refused, fields: dict[str, Any]) -> None:
    refused(recipe, **fields)


def test_a_row_of_another_source_is_not_scored(refused: Refused) -> None:
    pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")
    refused(verified, {"id": "1", "checks": ""}, "3")


def test_without_the_package_the_extra_is_named(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(lambda: identity(recipe().sources[0], Path()))


def test_tasks_take_turns_and_their_verifiers_score() -> None:
    pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")
    made = rows(count=6, seed=3)
    assert [row["source"] for row in made] == ["reasoning_gym/chain_sum", "reasoning_gym/leg_counting"] * 3
    assert len({row["id"] for row in made}) == 6 and made == rows(count=6, seed=3)
    assert rows(count=4, seed=3) == made[:4]
    assert rows(count=6, seed=4)[0] != made[0]
    check = json.loads(made[1]["checks"])[KEY]
    assert check == {"task": "leg_counting", "arguments": {"max_animals": 3}, "seed": 3, "index": 0}
    for row in made:
        right = row["completion"][0]["content"]
        assert verified(row, right) == 1.0
        assert verified(row, f"I think <answer>1</answer>, no: <answer> {right} </answer>.") == 1.0
        assert verified(row, f"{right}0000") < 1.0
        assert verified(row, "") == 0.0
    assert identity(recipe().sources[0], Path()).keys() == {"reasoning-gym"}


def test_a_task_with_many_right_answers_has_no_completion() -> None:
    pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")
    row = rows(tasks=["graph_color"], count=1)[0]
    assert "completion" not in row
    assert verified(row, "no JSON") < 0.5
    assert verified(row, "{" * 100_000) == 0.0


@pytest.mark.parametrize(
    "tasks",
    [
        ["chain_sun"],
        [{"name": "chain_sum", "arguments": {"terms": 3}}],
        [{"name": "chain_sum", "arguments": {"min_terms": 0}}],
    ],
)
def test_a_task_that_is_not_there_is_refused(refused: Refused, tasks: list[Any]) -> None:
    pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")
    refused(rows, tasks=tasks)
