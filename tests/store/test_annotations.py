"""The journal of annotations: what is acknowledged stays, whatever process is killed or deleted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from align.errors import UserError
from align.store.annotations import AnnotationSet, Answer, AnswerWriter, Pair, find_set, new_id, now, pair_id
from align.store.garbage import find_garbage
from align.store.store import Store
from tests.support.refusals import Refused

PROMPT = [{"role": "user", "content": "Name a color."}]


def make_pair(a: str = "Red.", b: str = "Blue.") -> Pair:
    return Pair(id=pair_id(PROMPT, a, b), prompt=PROMPT, a=a, b=b)


def make_answer(pair: Pair, annotator: str = "ann", preferred: str | None = "a") -> Answer:
    verdict = "better" if preferred else "tie"
    return Answer(
        id=new_id(), pair=pair.id, annotator=annotator, time=now(), left="a", verdict=verdict, preferred=preferred
    )


def test_answers_are_read_back_in_order(tmp_path: Path) -> None:
    annotations, pair = AnnotationSet(tmp_path, "helpful-1"), make_pair()
    assert annotations.add_pairs([pair, make_pair("Green.")]) == 2
    assert annotations.add_pairs([pair]) == 0
    writer = AnswerWriter(annotations, "ann")
    answers = [make_answer(pair), make_answer(pair, preferred=None)]
    for answer in answers:
        writer.write(answer)
    assert find_set(tmp_path, "helpful-1").answers() == answers
    assert len(annotations.pairs()) == 2


def test_pair_id_ignores_the_order_of_answers() -> None:
    assert pair_id(PROMPT, "x", "y") == pair_id(PROMPT, "y", "x") != pair_id(PROMPT, "x", "z")


def test_undo_is_an_entry_and_changes_the_digest(tmp_path: Path) -> None:
    annotations, pair = AnnotationSet(tmp_path, "s"), make_pair()
    annotations.add_pairs([pair])
    writer, answer = AnswerWriter(annotations, "ann"), make_answer(pair)
    writer.write(answer)
    before = annotations.content_digest()
    writer.undo(answer)
    assert annotations.answers() == []
    assert [entry.kind for entry in annotations.entries()] == ["answer", "undo"]
    assert annotations.content_digest() != before


def write_twice(annotations: AnnotationSet, **changes: str) -> None:
    """Write an answer, and again with the same id and other fields in a file of another session."""
    pair = make_pair()
    annotations.add_pairs([pair])
    answer = make_answer(pair)
    for entry in (answer, answer.model_copy(update=changes)):
        AnswerWriter(annotations, "ann").write(entry)


def test_repeated_entry_counts_once(tmp_path: Path) -> None:
    annotations = AnnotationSet(tmp_path, "s")
    write_twice(annotations)
    assert len(annotations.answers()) == 1
    assert annotations.ledger()["ann"]["answers"] == 1
    # The same line once more in the same file.
    path = next((annotations.folder / "answers").glob("*/*.jsonl"))
    path.write_bytes(path.read_bytes() * 2)
    assert len(annotations.answers()) == 1


@pytest.mark.parametrize("changes", [{"preferred": "b"}, {"verdict": "much_better"}, {"annotator": "bob"}])
def test_other_entry_with_the_same_id_is_refused(tmp_path: Path, changes: dict[str, str]) -> None:
    annotations = AnnotationSet(tmp_path, "s")
    write_twice(annotations, **changes)
    with pytest.raises(UserError, match=r"\.jsonl:1: the entry .* differs from the entry .* in .*\.jsonl:1;"):
        annotations.answers()


def test_torn_last_line_is_skipped_in_all_places(tmp_path: Path) -> None:
    annotations, pair = AnnotationSet(tmp_path, "s"), make_pair()
    annotations.add_pairs([pair])
    writer, answer = AnswerWriter(annotations, "ann"), make_answer(pair)
    writer.write(answer)
    writer.write(make_answer(pair, preferred=None))
    whole = writer.path.read_bytes()
    first = whole.index(b"\n") + 1
    digests = set()
    for end in range(first, len(whole)):
        writer.path.write_bytes(whole[:end])
        assert annotations.answers() == [answer]
        digests.add(annotations.content_digest())
    assert len(digests) == 1


def test_damaged_line_in_the_middle_is_reported_with_place(tmp_path: Path) -> None:
    annotations, pair = AnnotationSet(tmp_path, "s"), make_pair()
    writer = AnswerWriter(annotations, "ann")
    writer.write(make_answer(pair))
    writer.path.write_bytes(b"{broken\n" + writer.path.read_bytes())
    with pytest.raises(UserError, match=r"jsonl:1 is not JSON"):
        annotations.answers()


WRITE_FOR_EVER = """
    import sys
    from pathlib import Path
    from tests.store.test_annotations import AnnotationSet, AnswerWriter, make_answer, make_pair
    writer = AnswerWriter(AnnotationSet(Path(sys.argv[1]), "s"), sys.argv[2])
    while True:
        answer = make_answer(make_pair(), sys.argv[2])
        writer.write(answer)
        print(answer.id, flush=True)
"""


def test_killed_processes_lose_no_acknowledged_answer(tmp_path: Path) -> None:
    annotations = AnnotationSet(tmp_path, "s")
    annotations.add_pairs([make_pair()])
    code = textwrap.dedent(WRITE_FOR_EVER)
    # Two processes write at once, one of them under the name of the other's annotator.
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], stdout=subprocess.PIPE, text=True)
        for name in ("ann", "ann", "bob")
    ]
    acknowledged = set()
    for process in processes:
        assert process.stdout is not None
        acknowledged |= {process.stdout.readline().strip() for _ in range(20)}
    for process in processes:
        process.send_signal(signal.SIGKILL)
        acknowledged |= set((process.communicate()[0] or "").split())
    ids = {answer.id for answer in annotations.answers()}
    assert len(acknowledged) >= 60
    assert {name for name in acknowledged if len(name) == 32} <= ids
    assert annotations.annotators() == ["ann", "bob"]


def test_entry_is_synced_before_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations, synced = AnnotationSet(tmp_path, "s"), []
    real_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd)))
    writer = AnswerWriter(annotations, "ann")
    writer.write(make_answer(make_pair()))
    assert synced[0] == str(writer.path) and str(writer.path.parent) in synced
    synced.clear()
    writer.write(make_answer(make_pair()))
    assert synced == [str(writer.path)]


def test_annotator_is_deleted_and_open_session_stops(refused: Refused, tmp_path: Path) -> None:
    annotations, pair = AnnotationSet(tmp_path, "s"), make_pair()
    annotations.add_pairs([pair])
    ann, bob = AnswerWriter(annotations, "ann"), AnswerWriter(annotations, "bob")
    ann.write(make_answer(pair))
    bob.write(make_answer(pair, "bob"))
    assert annotations.ledger()["ann"]["answers"] == 1
    assert annotations.delete_annotator("ann") == 1
    assert [answer.annotator for answer in annotations.answers()] == ["bob"]
    refused(lambda: ann.write(make_answer(pair)))
    assert list(annotations.ledger()) == ["bob"]
    refused(annotations.delete_annotator, "ann")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65, "a b"])
def test_names_that_are_no_folder_are_refused(refused: Refused, tmp_path: Path, name: str) -> None:
    refused(AnnotationSet, tmp_path, name)
    refused(lambda: AnswerWriter(AnnotationSet(tmp_path, "s"), name))


def test_missing_set_is_refused_with_the_sets_there(refused: Refused, tmp_path: Path) -> None:
    AnnotationSet(tmp_path, "other").add_pairs([make_pair()])
    refused(find_set, tmp_path, "helpful")


def test_settings_keep_what_is_not_changed(refused: Refused, tmp_path: Path) -> None:
    annotations = AnnotationSet(tmp_path, "s")
    annotations.change_settings(overlap=0.5)
    assert annotations.change_settings(order="closeness").overlap == 0.5
    assert annotations.settings().order == "closeness"
    refused(annotations.change_settings, overlap=2.0)


def test_garbage_collection_keeps_annotations(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    AnnotationSet(store.root, "s").add_pairs([make_pair()])
    (store.root / "sft" / "0123456789ab").mkdir(parents=True)
    assert [path.parent.name for path in find_garbage(store)] == ["sft"]


def test_lines_are_ascii_json_whatever_the_text(tmp_path: Path) -> None:
    annotations = AnnotationSet(tmp_path, "s")
    pair = make_pair("\u2028\x1b[31m\ud83d", "b")
    annotations.add_pairs([pair])
    writer = AnswerWriter(annotations, "ann")
    answer = make_answer(pair).model_copy(update={"comment": "line\nbreak \u2028"})
    writer.write(answer)
    assert annotations.answers() == [answer]
    assert annotations.pairs()[pair.id] == pair
    assert len(writer.path.read_bytes().splitlines()) == 1
    assert json.loads(writer.path.read_text())["comment"] == answer.comment
