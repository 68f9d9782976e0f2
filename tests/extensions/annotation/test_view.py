"""The studio's Annotate view through its API: the same journal, questions and report as ``align annotate``."""

from __future__ import annotations

import json
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from align.cli.main import main
from align.extensions.annotation.session import Session
from align.store.annotations import AnnotationSet
from align.store.leases import write_run
from tests.support.records import put_record
from tests.support.studio.client import OWN_PAGE, open_client

HOSTILE = "<img src=x onerror=alert(1)>\u202e"


def pair_lines(count: int, **fields: Any) -> str:
    lines = [
        {"prompt": f"Question {number}", "a": f"yes {number}", "b": f"no {number}", "systems": ["new", "old"]} | fields
        for number in range(count)
    ]
    return "\n".join(map(json.dumps, lines))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def client(store: Path) -> TestClient:
    """A client of a studio whose set `helpful-1` has 12 pairs."""
    client = open_client(store)
    settings = {"overlap": 1.0, "duplicates": 0.0}
    assert post(client, "helpful-1/pairs", lines=pair_lines(12), settings=settings)["added"] == 12
    return client


def post(client: TestClient, place: str, status: int = 200, **body: Any) -> Any:
    answer = client.post(f"/api/annotate/{place}", json=body, headers=OWN_PAGE)
    assert answer.status_code == status, answer.text
    return answer.json()


def get(client: TestClient, place: str, status: int = 200, **query: Any) -> Any:
    answer = client.get(f"/api/annotate{place}", params=query)
    assert answer.status_code == status, answer.text
    return answer.json()


def reply(state: dict[str, Any], annotator: str, **fields: Any) -> dict[str, Any]:
    """Return a request that answers the question of a state."""
    request = {"id": uuid.uuid4().hex, "annotator": annotator, "pair": state["question"]["pair"], "seconds": 2.5}
    return request | {"verdict": "better", "choice": "left"} | fields


def answer_all(client: TestClient, annotator: str) -> int:
    state = get(client, "/helpful-1/questions", annotator=annotator)
    count = 0
    while state["question"]:
        following = state["following"]
        state = post(client, "helpful-1/answers", **reply(state, annotator))
        assert state["question"] == following, "the pair that was loaded ahead is the next one"
        count += 1
    return count


def test_answers_are_those_of_the_terminal(client: TestClient, store: Path) -> None:
    state = get(client, "/helpful-1/questions", annotator="ann")
    expected = Session(store, "helpful-1", "ann").next()
    assert expected is not None
    assert state["question"]["pair"] == expected.pair.id
    assert (state["question"]["left"], state["question"]["right"]) == expected.texts
    assert (state["done"], state["total"]) == (0, 12)
    request = reply(state, "ann", tags=["kind"], rewrite="better", comment="why", verdict="much_better", choice="right")
    post(client, "helpful-1/answers", **request)
    (answer,) = AnnotationSet(store, "helpful-1").answers()
    assert (answer.id, answer.verdict, answer.tags) == (request["id"], "much_better", ["kind"])
    assert (answer.rewrite, answer.comment, answer.seconds) == ("better", "why", 2.5)
    assert answer.preferred != answer.left == expected.left
    assert main(["annotate", "helpful-1", "--report", "--store", str(store)]) == 0


def test_questions_are_blind(client: TestClient) -> None:
    post(client, "helpful-1/pairs", lines=pair_lines(3, scores={"rm": [1.0, 2.0]}, gold="a", prompt="Gold?"))
    state = get(client, "/helpful-1/questions", annotator="ann")
    for question in (state["question"], state["following"]):
        assert question.keys() == {"pair", "prompt", "left", "right"}
        assert not {"new", "old", "rm", "gold"} & set(json.dumps(question).replace('"', " ").split())


def test_repeated_request_is_written_once(client: TestClient, store: Path) -> None:
    state = get(client, "/helpful-1/questions", annotator="ann")
    request = reply(state, "ann")
    first = post(client, "helpful-1/answers", **request)
    # A studio that was killed before it answered, and another one that gets the request again.
    again = post(open_client(store), "helpful-1/answers", **request)
    assert again == {**first, "notes": again["notes"]}
    assert len(AnnotationSet(store, "helpful-1").answers()) == 1


def test_undo_and_skip_ask_again_and_later(client: TestClient, store: Path) -> None:
    state = get(client, "/helpful-1/questions", annotator="ann")
    first = state["question"]["pair"]
    state = post(client, "helpful-1/answers", **reply(state, "ann"))
    assert post(client, "helpful-1/undo", annotator="ann")["question"]["pair"] == first
    assert AnnotationSet(store, "helpful-1").answers() == []
    assert "no answer to undo" in post(client, "helpful-1/undo", 400, annotator="ann")["error"]
    skipped = post(client, "helpful-1/skip", annotator="ann", pair=first)
    assert skipped["question"]["pair"] != first
    assert get(open_client(store), "/helpful-1/questions", annotator="ann")["question"]["pair"] == first


def test_duplicate_comes_with_exchanged_sides(client: TestClient, store: Path) -> None:
    post(client, "helpful-1/settings", duplicates=1.0)
    # The last pair has no duplicate, which would follow at once.
    assert answer_all(client, "ann") == 23
    answers = AnnotationSet(store, "helpful-1").answers()
    sides: dict[str, list[str]] = {}
    for answer in answers:
        sides.setdefault(answer.pair, []).append(answer.left)
    assert [len(each) for each in sides.values()].count(1) == 1
    assert all(sorted(each) == ["a", "b"] for each in sides.values() if len(each) == 2)
    report = get(client, "/helpful-1")["report"]
    # The left answer was always chosen, so no duplicate has the same verdict.
    assert report["annotators"]["ann"]["consistency"]["value"] == 0.0


def test_two_annotators_at_once_lose_no_answer(client: TestClient, store: Path) -> None:
    threads = [threading.Thread(target=answer_all, args=(client, name)) for name in ("ann", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    by_annotator = AnnotationSet(store, "helpful-1").ledger()
    assert {name: line["answers"] for name, line in by_annotator.items()} == {"ann": 12, "bob": 12}
    report = get(client, "/helpful-1")["report"]
    assert report["annotators"].keys() == {"ann", "bob"} and report["alpha"]["n"] == 12


def test_pairs_come_from_a_finished_stage(client: TestClient, store: Path) -> None:
    folder = store / "sample" / ("c" * 12)
    folder.mkdir(parents=True)
    line = {"prompt": [{"role": "user", "content": "q"}], "texts": ["one", HOSTILE], "scores": [0.0, 1.0]}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    put_record(folder, kind="sample", stage="sample", makes="PreferenceData", key="c" * 64)
    write_run(store, "mine", {"sample": {"kind": "sample", "key": "c" * 64}}, {})
    assert get(client, "/sources")["sources"] == [{"run": "mine", "stage": "sample", "kind": "sample", "key": "c" * 12}]
    assert post(client, "from-stage/pairs", run="mine", stage="sample") == {"added": 1, "read": 1, "skipped": []}
    question = get(client, "/from-stage/questions", annotator="ann")["question"]
    assert HOSTILE in (question["left"], question["right"])
    assert "has no stage 'other'" in post(client, "x/pairs", 404, run="mine", stage="other")["error"]
    assert "no run 'yours'" in post(client, "x/pairs", 404, run="yours", stage="sample")["error"]


def test_label_studio_file_goes_out_and_in(client: TestClient, store: Path) -> None:
    answer_all(client, "ann")
    exported = client.get("/api/annotate/helpful-1/export")
    assert exported.headers["content-disposition"] == 'attachment; filename="helpful-1.json"'
    assert post(client, "copy/import", text=exported.text) == {"pairs": 12, "answers": 12}
    assert post(client, "copy/import", text=exported.text) == {"pairs": 0, "answers": 0}
    path = store.parent / "exported.json"
    assert main(["annotate", "helpful-1", "--export", str(path), "--store", str(store)]) == 0
    assert json.loads(path.read_text()) == exported.json()
    assert "is not a list of tasks" in post(client, "copy/import", 400, text="{}")["error"]
    assert post(client, "copy/delete-annotator", annotator="ann") == {"deleted": 12}
    assert get(client, "/copy")["report"]["answered"] == 0


def test_deleted_annotator_starts_anew(client: TestClient, store: Path) -> None:
    state = get(client, "/helpful-1/questions", annotator="ann")
    post(client, "helpful-1/answers", **reply(state, "ann"))
    post(client, "helpful-1/delete-annotator", annotator="ann")
    assert get(client, "/helpful-1/questions", annotator="ann")["done"] == 0
    post(client, "helpful-1/answers", **reply(state, "ann"))
    assert len(AnnotationSet(store, "helpful-1").answers()) == 1


@pytest.mark.parametrize("name", ["..", ".hidden", "a b", "x" * 70, "%2e%2e", "-x"])
def test_names_that_are_no_sets_are_refused(client: TestClient, name: str) -> None:
    answer = client.post(f"/api/annotate/{name}/pairs", json={"lines": pair_lines(1)}, headers=OWN_PAGE)
    assert answer.status_code in (400, 404, 405)
    assert get(client, "")["sets"] == [{"name": "helpful-1", "pairs": 12, "answered": 0, "annotators": []}]
    questions = client.get("/api/annotate/helpful-1/questions", params={"annotator": name})
    assert questions.status_code == 400


def test_wrong_requests_have_a_remedy(client: TestClient, store: Path) -> None:
    state = get(client, "/helpful-1/questions", annotator="ann")
    wrong = post(client, "helpful-1/answers", 400, **reply(state, "ann", choice=None))
    assert "does not fit the choice" in wrong["error"]
    missing = reply(state, "ann") | {"pair": "f" * 16}
    assert "has no pair" in post(client, "helpful-1/answers", 404, **missing)["error"]
    post(client, "helpful-1/answers", 422, **reply(state, "ann", id="../x"))
    assert "line 2" in post(client, "new/pairs", 400, lines=pair_lines(1) + "\nnot JSON")["error"]
    assert "Name a run and a stage" in post(client, "new/pairs", 400)["error"]
    assert "no set 'other'" in get(client, "/other", 404)["error"]
    assert AnnotationSet(store, "helpful-1").answers() == []


def test_read_only_studio_refuses_to_write(client: TestClient, store: Path) -> None:
    reader = open_client(store, read_only=True)
    state = get(client, "/helpful-1/questions", annotator="ann")
    assert get(reader, "/helpful-1")["report"]["pairs"] == 12
    refusals = [
        post(reader, "helpful-1/answers", 403, **reply(state, "ann")),
        post(reader, "helpful-1/pairs", 403, lines=pair_lines(1)),
        post(reader, "helpful-1/import", 403, text="[]"),
        post(reader, "helpful-1/delete-annotator", 403, annotator="ann"),
        get(reader, "/helpful-1/questions", 403, annotator="ann"),
    ]
    assert all("only reads" in refusal["error"] for refusal in refusals)


def test_second_window_of_an_annotator_keeps_one_answer(client: TestClient, store: Path) -> None:
    state = get(client, "/helpful-1/questions", annotator="ann")
    assert state["notes"] == []
    post(client, "helpful-1/answers", **reply(state, "ann"))
    refusal = post(client, "helpful-1/answers", 400, **reply(state, "ann", verdict="tie", choice=None))
    assert "'ann' has answered this pair in another session meanwhile" in json.dumps(refusal)
    assert len(AnnotationSet(store, "helpful-1").answers()) == 1
    session = Session(store, "helpful-1", "ann")
    assert "'ann' has another session open" in session.conflict
