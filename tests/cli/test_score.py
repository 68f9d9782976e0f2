"""``align score``: scores stored responses again, compares two scores, and validates a score."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from align.cli.main import main
from align.cli.score_spec import read_spec
from align.data.rows import assistant, user, write_rows
from align.inference import endpoint_client
from align.runner.open_store import open_store
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.records import put_record
from tests.support.refusals import Refused
from tests.support.stages.broken_rewards import MODULE, problem_rows
from tests.support.stored_rollouts import write_lines

Run = Callable[..., int]
KEY = "a" * 64
RESPONSES = [
    {"id": "a", "prompt": "2+2?", "answer": "4", "response": "it is 4", "score": 1},
    {"id": "b", "prompt": "2+3?", "answer": "5", "response": "4 or 5", "score": 1},
    {"id": "c", "prompt": "x?", "answer": "1080", "responses": ["#### 1,080", "\x1b[2J1079"], "scores": [1, 0.2]},
]


@pytest.fixture
def score(tmp_path: Path) -> Run:
    def run(data: Path, *words: str) -> int:
        return main(["score", str(data), *words, "--store", str(tmp_path / "store")])

    return run


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RESPONSES))
    return path


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A folder with rows."""
    (tmp_path / "build").mkdir()
    write_rows(tmp_path / "build" / "train.parquet", problem_rows())
    return tmp_path / "build"


def test_stored_and_new_scores_are_compared(score: Run, responses: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(responses, "--with", "{number: answer}") == 0
    shown = capsys.readouterr().out
    assert "4 responses to 3 rows" in shown
    assert "reasons of number: 1 no_answer, 1 unequal" in shown
    assert "number and stored disagree about 1 of 4 (25.0%)" in shown
    assert "  row 'b', 1:\n    number: 0 (no_answer)\n    stored: 1\n    '4 or 5'\n" in shown


def test_two_scores_are_compared_with_examples(score: Run, responses: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--with", "{number: answer}", "--with", "{contains: answer}", "--json"]
    assert score(responses, *words) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(entry["name"], entry["mean"]) for entry in document["scores"][:2]] == [("number", 0.5), ("contains", 0.5)]
    agreement = document["agreement"]
    # "4 or 5" has the text 5, and "1,080" is the number 1080.
    assert (agreement["compared"], agreement["disagreements"], agreement["rank_correlation"]) == (4, 2, 0.0)
    assert [example["id"] for example in agreement["examples"]] == ["b", "c"]
    assert agreement["examples"][0]["scores"] == [0.0, 1.0]
    assert agreement["examples"][0]["reasons"] == ["no_answer", ""]


def test_responses_cannot_drive_the_terminal(score: Run, responses: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(responses, "--with", "{regex: '9$'}", "--with", "{number: answer}", "--examples", "9") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and r"'\x1b[2J1079'" in shown


def test_scores_are_written_to_a_file(score: Run, responses: Path, tmp_path: Path) -> None:
    spec = f"[{{number: answer}}, {{function: '{MODULE}:brief', weight: 0.0}}]"
    assert score(responses, "--with", spec, "--output", str(tmp_path / "scores.jsonl")) == 0
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c", "c"]
    expected = {"score": 0.0, "reason": "number_no_answer", "number": 0.0, "brief": pytest.approx(1 / 7)}
    assert lines[1]["scores"]["number + brief"] == expected


def test_samples_get_the_columns_of_their_prompts(
    score: Run, build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = problem_rows()[0]
    open_store(None, str(tmp_path / "store"))
    prompts = tmp_path / "store" / "data" / KEY[:12]
    prompts.parent.mkdir(parents=True)
    build.rename(prompts)
    put_record(prompts, kind="data", stage="data", key=KEY, makes="InstructionData")
    sampled = tmp_path / "store" / "sample" / ("b" * 12)
    sampled.mkdir(parents=True)
    sample = {"split": "train", "prompt": row["prompt"], "id": row["id"], "texts": ["7", "8"], "scores": [0.0, 1.0]}
    (sampled / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    put_record(sampled, kind="sample", stage="sample", key="b" * 64, inputs={"prompts": KEY}, makes="PreferenceData")
    assert score(sampled, "--with", "{number: answer}", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["scores"][0]["mean"] == 0.5
    assert document["agreement"]["disagreements"] == 2


def test_rows_of_a_build_complete_rollouts(
    score: Run, build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = problem_rows()[2]["prompt"]
    line = {"update": 1, "prompt": prompt, "response": "1,080", "score": 0.0, "finished": True}
    write_lines(tmp_path / "ppo" / "rollouts", [line])
    assert score(tmp_path / "ppo", "--with", "{number: answer}", "--rows", str(build), "--json") == 0
    assert json.loads(capsys.readouterr().out)["scores"][0]["mean"] == 1.0


def test_both_answers_of_pairs_are_scored(score: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"id": "1", "source": "t", "checks": "", "prompt": [user("?")], "answer": "4"}
    (tmp_path / "pairs").mkdir()
    write_rows(
        tmp_path / "pairs" / "train.parquet", [pair | {"chosen": [assistant("4")], "rejected": [assistant("5")]}]
    )
    assert score(tmp_path / "pairs", "--with", "{number: answer}") == 0
    assert "2 responses to 1 rows" in capsys.readouterr().out


def test_file_of_training_data_is_read_in_its_format(
    score: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"question": f"{n} + 1000?", "answer": f"It is.\n#### {n + 1000:,}", "level": n} for n in range(9)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert score(path, "--with", "gsm8k_answer", "--validate", "--json") == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert document["rewards"]["gsm8k_answer"]["checks"]["reference"] == {"passed": 9, "total": 9}
    assert score(path, "--with", "{number: level}", "--validate") == 1


def test_lost_judge_ends_with_a_message_and_exit_code_1(
    score: Run, responses: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first answer must be stored before the other requests fail for good.
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.3)
    calls = itertools.count()
    server = FakeChat(lambda body: (500, "broken") if next(calls) > 1 else completion("[[8]]"))
    endpoint = f"{{url: '{server.url}', model: m, retries: 1, price_input: 1, price_output: 1}}"
    spec = f"{{judge: {{max_cost: 5, endpoint: {endpoint}}}}}"
    try:
        assert score(responses, "--with", spec) == 1
        error = capsys.readouterr().err
        assert "judge.max_cost: 5 is the budget of this command; each command has its own" in error
        assert "answered with status 500" in error and "gave up after 2 attempts" in error
        assert "Traceback" not in error
        server.reply = lambda body: completion("[[10]]")
        asked = len(server.bodies)
        assert score(responses, "--with", spec) == 0
        assert len(server.bodies) - asked <= 4, "answers to the first command are kept"
    finally:
        server.stop()


def test_validation_shows_the_table_and_refuses(score: Run, build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(build, "--with", "{number: answer}", "--with", f"{MODULE}:without_separators", "--validate") == 1
    shown = capsys.readouterr().out
    header, row = shown.splitlines()[1:3]
    titles = (
        *("reward", "rows", "reference best", "empty lower", "other lower", "prompt lower"),
        *("wrong lower", "hedged lower", "long not higher", "same twice", "varies"),
    )
    assert header.split() == " ".join(titles).split()
    assert row.split() == ["number", "22", "22/22", "22/22", "22/22", "22/22", "-", "-", "-", "16/16", "-"]
    assert "A stage would accept this score (floor 0.9)." in shown
    assert "✗ 'without_separators' does not give references its maximum" in shown
    assert score(build, "--with", f"{MODULE}:without_separators", "--validate", "--floor", "0") == 0


def test_waived_checks_refuse_nothing(score: Run, build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--with", f"{MODULE}:without_separators", "--validate"]
    assert score(build, *words) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("If the score is meant so")]
    waived = line.partition("with ")[2].partition(":")[0].split()
    assert waived[:2] == ["--waive", "reference"]
    assert score(build, *words, *waived) == 0


def test_validation_has_the_settings_of_the_stage(score: Run, build: Path, tmp_path: Path) -> None:
    settings = {"floor": 0.0, "rows": 8}
    sample = {"policy": "model", "prompts": "data", "score": f"{MODULE}:constant", "score_validation": settings}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"kind": "prompts", "sources": [{"type": "embedded"}]}))
    stages = {"model": {"source": "tiny"}, "data": {"recipe": "recipe.yaml"}, "sample": sample}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "stages": stages}))
    assert score(build, "--with", f"{path}:sample", "--validate") == 0
    assert score(build, "--with", f"{path}:sample", "--validate", "--floor", "0.9") == 1


def test_score_of_a_stage_is_read_from_its_pipeline(refused: Refused, score: Run, build: Path, tmp_path: Path) -> None:
    sample = {"policy": "model", "prompts": "data", "score": [{"number": "answer"}]}
    recipe = {"kind": "prompts", "sources": [{"type": "embedded", "size": 4}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    stages = {"model": {"source": "tiny"}, "data": {"recipe": "recipe.yaml"}, "sample": sample}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "stages": stages}))
    assert score(build, "--with", f"{path}:sample", "--validate") == 0
    refused(read_spec, f"{path}:sampel", None)
    refused(lambda: read_spec(str(path), None))
    refused(read_spec, f"{path}:data", None)


def test_spec_in_a_file_is_a_list_or_has_score(tmp_path: Path) -> None:
    path = tmp_path / "score.yaml"
    path.write_text("score:\n- {number: answer}\n- {function: gold, weight: 0.5}\n")
    spec = read_spec(str(path), None)
    assert (spec.name, [entry.label for entry in spec.entries]) == ("score", ["number", "gold"])
    assert read_spec("gold", None).entries[0].function == "gold"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--with", "{numbr: answer}"], "Did you mean 'number'"),
        (["--with", "[]"], "has no reward"),
        (["--with", "[gold, gold]"], "two rewards are called 'gold'"),
        (["--with", "{number: answer}", "--floor", "0.5"], "--floor is for --validate"),
        (["--with", "{number: answer}", "--waive", "row"], "--waive is for --validate"),
        (["--with", "gold", "--validate", "--output", "x"], "remove one of them"),
        (["--with", "gold", "--max-rows", "0"], "at least 1"),
        (["--with", "a:b", "--with", "a:c", "--with", "a:d"], "at most two scores"),
        (["--with", "{number: answer}", "--validate", "--floor", "2"], "less than or equal to 1"),
        (["--with", "{number: answer}", "--split", "test"], "has no test split"),
    ],
)
def test_wrong_options_are_refused(
    score: Run, build: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(build, *words) == 2
    assert message in capsys.readouterr().err


def test_unknown_data_is_refused(score: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(tmp_path / "nothing.jsonl", "--with", "gold") == 2
    assert "nothing.jsonl: there is no such file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert score(tmp_path / "empty", "--with", "gold") == 2
    assert "has neither rows" in capsys.readouterr().err
