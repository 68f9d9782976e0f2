"""``align annotate``: keys in a pseudo-terminal and from a pipe, resume, report, and a recipe from the answers."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from align.cli.main import main
from align.data.rows import read_rows
from align.extensions.annotation.session import Reply, Session
from align.store.annotations import AnnotationSet
from tests.support.refusals import Refused

Run = Callable[..., int]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    lines = [
        {"prompt": f"Question {number}", "a": f"yes {number}", "b": f"no {number}", "systems": ["new", "old"]}
        for number in range(20)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def annotate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command with keys as standard input, one a line."""

    def run(*arguments: str, keys: str = "") -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{key}\n" for key in keys)))
        return main(["annotate", "helpful-1", "--store", str(tmp_path / "store"), *arguments])

    return run


def test_twenty_pairs_become_rows_of_a_recipe(annotate: Run, pairs: Path, tmp_path: Path) -> None:
    assert annotate("--pairs", str(pairs), "--name", "ann", "--duplicates", "0", keys="1224" * 4 + "3051") == 0
    answers = AnnotationSet(tmp_path / "store", "helpful-1").answers()
    assert len(answers) == 20
    recipe = {
        "kind": "preferences",
        "sources": [{"type": "annotations", "set": "helpful-1", "license": "CC0-1.0"}],
        "test_size": 0,
        "near_duplicate_prompts": None,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["data", "build", str(tmp_path / "recipe.yaml"), "--store", str(tmp_path / "store")]) == 0
    (folder,) = [path for path in (tmp_path / "store" / "data").iterdir() if not path.suffix]
    rows = {row["prompt"][0]["content"]: row for row in read_rows(folder / "train.parquet")}
    assert len(rows) == 18
    prompts = {f"Question {number}": number for number in range(20)}
    for answer in answers:
        pair = AnnotationSet(tmp_path / "store", "helpful-1").pairs()[answer.pair]
        question = pair.prompt[0]["content"]
        if answer.preferred is None:
            assert question not in rows
            continue
        word = "yes" if answer.preferred == "a" else "no"
        assert rows[question]["chosen"][0]["content"] == f"{word} {prompts[question]}"
        assert rows[question]["chosen_score"] == abs(answer.value)
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger["dropped"] == {"a tie": 1, "both answers are bad": 1}
    assert "ALIGN_STORE" not in os.environ


def test_quit_resume_and_undo_keep_every_answer(
    annotate: Run, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotate("--pairs", str(pairs), "--name", "ann", "--duplicates", "0", keys="2q")
    assert "1 of 20 pairs answered by ann" in capsys.readouterr().out
    # The second session answers, withdraws both answers, and answers the last one anew.
    annotate("--name", "ann", keys="2uu4q")
    answers = AnnotationSet(tmp_path / "store", "helpful-1").answers()
    assert len(answers) == 1
    assert answers[0].preferred != answers[0].left
    out = capsys.readouterr().out
    assert out.count("The last answer is withdrawn.") == 2
    kinds = [entry.kind for entry in AnnotationSet(tmp_path / "store", "helpful-1").entries()]
    assert kinds == ["answer", "answer", "undo", "undo", "answer"]


def test_notes_are_stored_with_the_verdict(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("t\nsafe, short,\nr\nfirst\\nsecond\nc\nwhy\nx\n0\n"))
    store = str(tmp_path / "store")
    assert main(["annotate", "s", "--pairs", str(pairs), "--name", "ann", "--store", store]) == 0
    (answer,) = AnnotationSet(tmp_path / "store", "s").answers()
    assert (answer.tags, answer.rewrite, answer.comment) == (["safe", "short"], "first\nsecond", "why")
    assert answer.verdict == "both_bad" and answer.seconds >= 0
    assert capsys.readouterr().out.count("1 left is much better") == 2  # at the start, and for the unknown key


def test_hostile_answers_stay_text(annotate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hostile.jsonl"
    text = "\x1b[2J\u202eevil\r\n=== 9 of 9 ===\nRIGHT:\n\x9b31m"
    path.write_text(json.dumps({"prompt": text, "a": text, "b": "plain"}) + "\n")
    annotate("--pairs", str(path), "--name", "ann", keys="q")
    out = capsys.readouterr().out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out)
    # Lines of the text have a bar, so only the program's own lines begin with these words.
    assert sum(line.startswith("===") for line in out.splitlines()) == 1
    assert sum(line == "RIGHT:" for line in out.splitlines()) == 1
    assert out.count("  | === 9 of 9 ===") == 2


def test_single_keys_work_in_a_terminal(pairs: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    command = [sys.executable, "-m", "align.cli.main", "annotate", "s", "--store", store]
    command += ["--pairs", str(pairs), "--name", "ann", "--duplicates", "0"]
    controller, terminal = pty.openpty()
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True)
    os.close(terminal)
    # No Enter after a key; the comment is a line.
    keys = [b"1", b"u", b"c", b"good\n", b"2", b"3", b"\x04"]
    shown = _type_keys(controller, keys)
    assert process.wait(60) == 0
    answers = AnnotationSet(tmp_path / "store", "s").answers()
    assert [(answer.verdict, answer.comment) for answer in answers] == [("better", "good"), ("tie", "")]
    assert "2 of 20 pairs answered by ann" in shown


def test_keys_before_the_question_answer_nothing(pairs: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    command = [sys.executable, "-m", "align.cli.main", "annotate", "s", "--store", store, "--pairs", str(pairs)]
    controller, terminal = pty.openpty()
    os.write(controller, b"2222")  # while Python still starts
    process = subprocess.Popen(
        [*command, "--name", "ann"], stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True
    )
    os.close(terminal)
    shown = _type_keys(controller, [b"3", b"q"])
    assert process.wait(60) == 0
    assert [answer.verdict for answer in AnnotationSet(tmp_path / "store", "s").answers()] == ["tie"]
    assert "1 of 20 pairs answered by ann" in shown


def test_pairs_that_are_not_asked_are_explained(
    annotate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": f"Q{number % 14}", "a": f"yes {number % 14}", "b": "no"} for number in range(17)]
    lines[16] |= {"a": "no", "b": "yes 2"}  # the same pair in the other order
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    annotate("--pairs", str(source), "--name", "ann", "--overlap", "0", "--duplicates", "0", keys="22222q")
    out = capsys.readouterr().out
    assert "14 new pairs of 14 in" in out and "  3 pairs repeat another pair, in the same or the other order\n" in out
    assert "for ann" not in out
    annotate("--name", "bob", keys="q")
    out = capsys.readouterr().out
    assert "9 of the 14 pairs are for bob: others have answered 5, and only 0% of the pairs are for all" in out
    assert "0 of 9 pairs answered by bob" in out


def test_second_session_of_a_pseudonym_is_named(
    refused: Refused, annotate: Run, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotate("--pairs", str(pairs), "--duplicates", "0")
    first = Session(tmp_path / "store", "helpful-1", "ann")
    question = first.next()
    assert question is not None and not first.conflict
    assert not Session(tmp_path / "store", "helpful-1", "bob").conflict
    annotate("--name", "ann", keys="2q")
    out = capsys.readouterr().out
    assert f"! 'ann' has another session open (process {os.getpid()} on " in out
    # The other session has answered the question that this one shows.
    refused(lambda: first.answer(question, Reply("tie")))
    assert [answer.verdict for answer in first.annotations.answers()] == ["better"]
    first.close()
    annotate("--name", "ann", keys="q")
    assert "another session" not in capsys.readouterr().out


def _type_keys(controller: int, keys: list[bytes]) -> str:
    """Type each key when the program asks for it, and return all that it printed."""
    shown = b""
    asked = 0
    while True:
        try:
            piece = os.read(controller, 4096)
        except OSError:  # the program ended
            piece = b""
        if not piece:
            return shown.decode()
        shown += piece
        prompts = len(re.findall(rb"(?m)^> |comment: ", shown))
        while asked < min(prompts, len(keys)):
            os.write(controller, keys[asked])
            asked += 1


def test_two_annotators_report_and_deletion(
    annotate: Run, pairs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    annotate("--pairs", str(pairs), "--name", "ann", "--overlap", "1", "--duplicates", "0.3", keys="2" * 40)
    annotate("--name", "bob", keys="24" * 20)
    capsys.readouterr()
    assert annotate("--report", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["answered"] == 20 and report["alpha"]["n"] == 20
    assert set(report["annotators"]) == {"ann", "bob"} == set(report["ledger"])
    assert report["left"]["value"] > 0.5 and report["may_stop"] is False
    # Duplicates have the sides exchanged, and ann always prefers the left.
    assert report["annotators"]["ann"]["consistency"]["value"] == 0
    assert report["strengths"]["position"]["value"] > 1
    assert annotate("--report") == 0
    assert "not decided yet: continue" in capsys.readouterr().out
    assert annotate("--export", str(tmp_path / "tasks.json")) == 0
    assert annotate("--delete-annotator", "bob") == 0
    assert "answers of 'bob' are deleted" in capsys.readouterr().out
    assert AnnotationSet(tmp_path / "store", "helpful-1").annotators() == ["ann"]
    assert annotate("--import", str(tmp_path / "tasks.json")) == 0
    assert AnnotationSet(tmp_path / "store", "helpful-1").annotators() == ["ann", "bob"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "../x"], "--name '../x' is not a name"),
        (["--name", "ann"], "there is no set of annotations 'helpful-1'; sets there: none"),
        (["--pairs", "none.jsonl"], "none.jsonl: no such file"),
        (["--report", "--name", "ann"], "--report and --name do not go together"),
        (["--per-prompt", "0"], "--per-prompt is 0"),
        (["--import", "none.json"], "none.json: no such file"),
    ],
)
def test_wrong_input_is_refused_with_a_remedy(
    annotate: Run, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert annotate(*arguments) == 2
    assert message in capsys.readouterr().err


def test_set_without_an_action_names_the_options(
    annotate: Run, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert annotate("--pairs", str(pairs)) == 0
    assert "20 new pairs of 20" in capsys.readouterr().out
    assert annotate() == 2
    assert "--name gives your pseudonym" in capsys.readouterr().err
    assert annotate("--overlap", "3") == 2
    assert "field 'overlap'" in capsys.readouterr().err
