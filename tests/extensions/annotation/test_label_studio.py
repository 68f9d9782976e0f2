"""Label Studio's JSON: a set survives export and import, and foreign files are read or refused with their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.extensions.annotation.label_studio import import_tasks, write_tasks
from align.extensions.annotation.session import Reply, Session
from align.store.annotations import AnnotationSet, Pair, pair_id
from tests.support.refusals import Refused

MESSAGES = [{"role": "user", "content": "Hi"}]


def make_set(root: Path) -> AnnotationSet:
    annotations = AnnotationSet(root, "s")
    annotations.add_pairs(
        Pair(id=pair_id(MESSAGES, text, "y"), prompt=MESSAGES, a=text, b="y", systems=("m", "n")) for text in "abcd"
    )
    annotations.change_settings(duplicates=0.0)
    session = Session(root, "s", "ann")
    replies = [
        Reply("much_better", "left", tags=("safe", "short"), rewrite="z", comment="why", seconds=2.5),
        Reply("better", "right"),
        Reply("tie"),
        Reply("both_bad"),
    ]
    for reply in replies:
        question = session.next()
        assert question is not None
        session.answer(question, reply)
    return annotations


def plain(annotations: AnnotationSet) -> list[dict[str, Any]]:
    return [answer.model_dump(exclude={"id"}) for answer in annotations.answers()]


def test_set_is_the_same_after_export_and_import(tmp_path: Path) -> None:
    annotations = make_set(tmp_path / "one")
    assert write_tasks(tmp_path / "tasks.json", annotations) == 4
    other = AnnotationSet(tmp_path / "two", "s")
    assert import_tasks(tmp_path / "tasks.json", other) == (4, 4)
    assert other.pairs() == annotations.pairs()
    assert plain(other) == plain(annotations)
    # A second import adds nothing.
    assert import_tasks(tmp_path / "tasks.json", other) == (0, 0)


def task(result: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    annotation = {"completed_by": {"id": 7, "email": "a@b.c"}, "result": result, "lead_time": 3.5, **fields}
    return {"id": 1, "data": {"prompt": "Hi", "left": "x", "right": "y"}, "annotations": [annotation]}


def pairwise(selected: Any) -> dict[str, Any]:
    return {"from_name": "pw", "to_name": "left", "type": "pairwise", "value": {"selected": selected}}


def test_foreign_task_is_read_without_the_address_of_a_person(tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    cancelled = task([pairwise("left")], was_cancelled=True)
    path.write_text(json.dumps([task([pairwise("right")]), cancelled]))
    annotations = AnnotationSet(tmp_path, "s")
    assert import_tasks(path, annotations) == (1, 1)
    (answer,) = annotations.answers()
    assert (answer.annotator, answer.preferred, answer.verdict, answer.seconds) == ("ls-7", "b", "better", 3.5)
    assert "a@b.c" not in "".join(file.read_text() for file in (tmp_path / "annotations").rglob("*.jsonl"))


@pytest.mark.parametrize(
    "content",
    [
        {},
        [{"data": {"prompt": "p"}}],
        [{"data": {"pair": {"id": 3}}}],
        [task([pairwise("middle")])],
        [task([], completed_by=None)],
        [task([{"from_name": "verdict", "type": "choices", "value": {"choices": ["better"]}}])],
        [{"data": {"prompt": "p", "left": "x", "right": "y"}, "annotations": [{}]}],
    ],
)
def test_wrong_tasks_are_refused_and_nothing_is_written(refused: Refused, tmp_path: Path, content: Any) -> None:
    path = tmp_path / "export.json"
    path.write_text(json.dumps(content))
    refused(lambda: import_tasks(path, AnnotationSet(tmp_path, "s")))
    assert not (tmp_path / "annotations").exists()
