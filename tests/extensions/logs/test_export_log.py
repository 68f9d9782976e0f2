"""Exports of conversations. inspect_ai's and trackio's own readers open the files, in the environment that has both."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.cli.main import main
from align.evaluation.comparisons import Resampling
from align.evaluation.scorecard import SystemInfo
from align.evaluation.scorecard.scorecard_builder import Measurements, build
from align.extensions.logs import export_log as exports
from align.extensions.logs.transcripts import Transcript, TranscriptLog, read_calls, read_logs
from align.store.artifacts import Artifact
from align.store.record import read_artifact
from align.store.rollout_writer import RolloutFiles
from align.store.rollouts import make_table
from tests.support.records import put_record
from tests.support.refusals import Refused

ROOT = Path(__file__).parents[2]
READERS = Path(os.environ.get("ALIGN_LOG_READERS", ROOT / ".venv-logs" / "bin" / "python"))
"""Python of the environment with inspect_ai and trackio, which `make log-readers` makes."""
needs_readers = pytest.mark.skipif(not READERS.is_file(), reason="no inspect_ai and trackio here: `make log-readers`")
CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}
EPISODE = [
    {"role": "system", "content": "Use the tool."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "name": "add", "tool_call_id": "call-0"},
    {"role": "assistant", "content": "<think>\nit said 4\n</think>\n\nIt is <b>4</b>."},
]
HOSTILE = "<script>alert(1)</script>\x00\u202e"


def rollout(update: int | None, prompt: str, response: str, score: float, **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    row = {"update": update, "round": 0, "prompt_id": prompt, "prompt": messages, "response": response, "score": score}
    return row | {"scores": {"math": score}, "finished": True, "tokens": 3} | columns


def make_stage(folder: Path, rows: list[dict[str, Any]], name: str = "rollouts") -> Artifact:
    """Return a finished stage `ppo` with stored rollouts."""
    files = RolloutFiles(folder, 10**9, {}, print)
    for update in dict.fromkeys(row["update"] for row in rows):
        files.write(make_table([row for row in rows if row["update"] == update]), name)
    put_record(folder, kind="ppo", stage="ppo", makes="PolicyCheckpoint", pipeline="my run")
    return read_artifact(folder)


@pytest.fixture
def stage(tmp_path: Path) -> Artifact:
    """A stage of two updates. The second has an episode that failed."""
    rows = [
        rollout(1, "one?", "1", 1.0, reference="1", reasons={"math": "equal"}),
        rollout(1, "one?", HOSTILE, 0.0, kl=math.nan),
        rollout(1, "two?", "2", 0.5, finished=False),
        rollout(2, "sum", "It is 4.", 0.0, messages=EPISODE, stop="max_turns", turns=2),
        rollout(2, "fail", "", 0.0, failure="no server", stop="failed"),
    ]
    rows[3]["prompt"] = EPISODE[:2]
    return make_stage(tmp_path / "ppo", rows)


@pytest.fixture
def evaluation(tmp_path: Path) -> Artifact:
    """An evaluation of two systems on a prompt set; a task `pairs` stores no answers of systems."""
    folder = tmp_path / "evaluate"
    folder.mkdir()
    systems = [SystemInfo("base", "base", "base", "k0"), SystemInfo("a/b", "a/b", "checkpoint", "k1")]
    values = {"base": {"reward": [[0.0], [1.0]]}, "a/b": {"reward": [[1.0], [1.0]]}}
    measured = Measurements(systems, "base", "base", ["words"] * 2, values, {"reward": ("higher", "a program")})
    (folder / "scorecard.json").write_text(json.dumps(build(measured, Resampling(200, 1), {})))
    turns = [
        {"prompt": "q0", "text": "first", "finished": True},
        {"prompt": "and then?", "text": "second", "finished": True},
    ]
    answer = {"text": "second", "tokens": 2, "finished": True, "turns": turns, "scores": {"reward": 1.0}}
    lines: list[dict[str, Any]] = [
        {
            "task": "prompts", "id": f"q{number}", "source": "words", "prompt": [{"role": "user", "content": "q"}],
            "row": {"answer": "4"}, "responses": {"base": [{"text": "no", "scores": {"reward": 0.0}}], "a/b": [answer]},
        }
        for number in range(2)
    ]  # fmt: skip
    side = {"text": "good", "scores": {"rm": 1.0}}
    lines.append({"task": "pairs", "id": "p", "prompt": [], "columns": ["chosen"], "responses": {"chosen": [side]}})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    put_record(folder, kind="evaluate", stage="evaluate", makes="Scorecard", key="b" * 64)
    return read_artifact(folder)


# ---- reading ----


def test_rollouts_become_a_log_for_each_update(stage: Artifact) -> None:
    first, second = read_logs(stage)
    assert [log.name for log in (first, second)] == ["ppo-rollouts-000001", "ppo-rollouts-000002"]
    # Responses to one prompt are its epochs.
    assert [(entry.id, entry.epoch) for entry in first.transcripts] == [("one?", 1), ("one?", 2), ("two?", 1)]
    assert first.transcripts[0].target == "1" and first.transcripts[0].reasons == {"math": "equal"}
    # A KL that is no number is no score.
    assert first.transcripts[1].scores == {"score": 0.0, "math": 0.0}
    assert first.means()["score"] == 0.5
    assert second.transcripts[0].messages == EPISODE and second.transcripts[0].prompt == EPISODE[:2]


def test_updates_and_limit_select_conversations(refused: Refused, stage: Artifact) -> None:
    (log,) = read_logs(stage, updates=range(1, 2), limit=2)
    assert log.update == 1 and len(log.transcripts) == 2
    refused(lambda: list(read_logs(stage, updates=range(7, 9))))


def test_validations_are_a_separate_log(refused: Refused, tmp_path: Path) -> None:
    artifact = make_stage(tmp_path, [rollout(4, "held out", "x", 1.0)], "validations")
    (log,) = read_logs(artifact, validations=True)
    assert log.name == "ppo-validations-000004"
    refused(read_logs, artifact)


def test_rollouts_of_sample_have_no_update(tmp_path: Path) -> None:
    (log,) = read_logs(make_stage(tmp_path, [rollout(1, "q", "x", 1.0)]))
    assert log.transcripts[0].facts["update"] == 1


def test_evaluation_becomes_a_log_for_each_system(refused: Refused, evaluation: Artifact) -> None:
    logs = list(read_logs(evaluation))
    assert [(log.system, log.task) for log in logs] == [("base", "evaluate/prompts"), ("a/b", "evaluate/prompts")]
    assert logs[0].estimates["reward"].value == 0.5
    second = logs[1].transcripts[0]
    assert [message["content"] for message in second.messages] == ["q", "first", "and then?", "second"]
    assert second.target == "4" and second.scores == {"reward": 1.0}
    refused(lambda: read_logs(evaluation, updates=range(1, 2)))


def test_calls_of_any_form_are_read() -> None:
    nested = json.dumps([{"id": "7", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}])
    assert read_calls({"tool_calls": nested}) == [{"name": "f", "arguments": {"a": 1}, "id": "7"}]
    assert read_calls({"tool_calls": [{"name": "f", "arguments": "x"}]})[0]["arguments"] == {"arguments": "x"}
    assert read_calls({"tool_calls": "not JSON"}) == [] and read_calls({}) == []


# ---- the command ----


def test_missing_package_is_refused_before_reading(
    stage: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(exports.PACKAGES, "inspect", "no_such_package")
    assert main(["export-log", str(stage.path), "--output", str(tmp_path / "logs")]) == 2
    assert "no_such_package is not installed. `pip install 'align-pipeline[inspect]'`" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--updates", "5:2"], "--updates 5:2: should be two numbers in order"),
        (["--updates", "all"], "--updates all: should be two numbers in order"),
        (["--limit", "0"], "--limit 0: should be 1 or more"),
    ],
)
def test_wrong_options_are_refused(
    words: list[str], message: str, stage: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export-log", str(stage.path), "--output", "unused", *words]) == 2
    assert message in capsys.readouterr().err


# ---- readers of the other projects ----


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the command in the environment of the readers, and return its JSON document."""

    def run(artifact: Artifact, form: str, *words: str, code: int = 0) -> dict[str, Any]:
        command = [str(READERS), "-m", "align.cli.main", "export-log", str(artifact.path), "--format", form]
        result = run_there([*command, "--output", str(tmp_path / "logs"), *words, "--json"], code)
        return dict(json.loads(result)) if code == 0 else {"error": result}

    return run


def run_there(command: list[str], code: int = 0, **variables: str) -> str:
    """Run a command with this source, without a network, and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **variables}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == code, process.stderr
    return process.stdout if code == 0 else process.stderr


READ_LOGS = """
import json, sys
from inspect_ai.log import list_eval_logs, read_eval_log, read_eval_log_sample_summaries
documents = []
for info in sorted(list_eval_logs(sys.argv[1]), key=lambda info: info.name):
    document = read_eval_log(info).model_dump(mode="json")
    document["summaries"] = len(read_eval_log_sample_summaries(info))
    documents.append(document)
print(json.dumps(documents))
"""


def read_inspect(folder: Path) -> list[dict[str, Any]]:
    """Return all logs of a folder as inspect_ai reads them."""
    documents: list[dict[str, Any]] = json.loads(run_there([str(READERS), "-c", READ_LOGS, str(folder)]))
    return documents


@needs_readers
def test_inspect_reads_rollouts(stage: Artifact, export: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert export(stage, "inspect")["conversations"] == 5
    first, second = read_inspect(tmp_path / "logs")
    assert (first["status"], first["eval"]["task"], first["eval"]["model"]) == ("success", "ppo", "align/ppo")
    assert first["eval"]["metadata"] == {"stage": "ppo", "key": "a" * 64, "pipeline": "my run", "update": 1}
    assert first["eval"]["dataset"]["samples"] == 2 and first["eval"]["config"]["epochs"] == 2
    assert first["summaries"] == 3
    scores = {score["name"]: score for score in first["results"]["scores"]}
    assert scores["score"]["metrics"]["mean"]["value"] == 0.5
    # Scores 1, 0 and 1/2: variance 1/4, so the error is sqrt(1/4 / 3).
    assert scores["score"]["metrics"]["stderr"]["value"] == pytest.approx(math.sqrt(0.25 / 3))
    samples = {(sample["id"], sample["epoch"]): sample for sample in (*first["samples"], *second["samples"])}
    equal = samples["one?", 1]
    hostile = samples["one?", 2]
    cut = samples["two?", 1]
    assert equal["scores"]["math"]["explanation"] == "equal" and equal["target"] == "1"
    assert hostile["output"]["choices"][0]["message"]["content"] == HOSTILE
    assert cut["output"]["choices"][0]["stop_reason"] == "max_tokens"
    episode = samples["sum", 1]
    failed = samples["fail", 1]
    assert [message["role"] for message in episode["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    call = episode["messages"][2]["tool_calls"][0]
    assert (call["function"], call["arguments"]) == ("add", {"a": 2, "b": 2})
    thought, answer = episode["messages"][4]["content"]
    assert (thought["type"], "it said 4" in thought["reasoning"], answer["text"]) == (
        "reasoning", True, "It is <b>4</b>.",
    )  # fmt: skip
    assert (episode["limit"]["type"], episode["limit"]["limit"]) == ("turn", 2)
    assert failed["error"]["message"] == "no server"


@needs_readers
def test_inspect_reads_an_evaluation(
    evaluation: Artifact, export: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    written = export(evaluation, "inspect")
    # A system's name has a slash, which a file's name cannot have.
    assert [Path(path).name for path in written["paths"]] == [
        f"evaluate-prompts-{name}-bbbbbbbbbbbb.eval" for name in ("base", "a-b")
    ]
    logs = {log["eval"]["model"]: log for log in read_inspect(tmp_path / "logs")}
    (score,) = logs["align/base"]["results"]["scores"]
    assert {name: metric["value"] for name, metric in score["metrics"].items()}.keys() == {"mean", "low", "high"}
    assert score["metrics"]["mean"]["value"] == 0.5
    assert [len(sample["messages"]) for sample in logs["align/a/b"]["samples"]] == [4, 4]


@needs_readers
def test_repeated_export_to_inspect_is_the_same(
    stage: Artifact, export: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    export(stage, "inspect")
    before = read_inspect(tmp_path / "logs")
    export(stage, "inspect")
    assert read_inspect(tmp_path / "logs") == before


@needs_readers
def test_trackio_reads_episodes(stage: Artifact, export: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert export(stage, "trackio") == {"stage": "ppo", "conversations": 5, "paths": [str(tmp_path / "logs")]}
    command = [str(READERS.with_name("trackio")), "list", "traces", "--project", "my-run", "--run", "ppo-aaaaaaaaaaaa"]
    document = json.loads(run_there([*command, "--json"], TRACKIO_DIR=str(tmp_path / "logs")))
    traces = {trace["metadata"]["session_id"]: trace for trace in document["traces"]}
    assert {identity: trace["step"] for identity, trace in traces.items()} == {
        "one?/1": 1, "one?/2": 1, "two?/1": 1, "sum/1": 2, "fail/1": 2,
    }  # fmt: skip
    assert traces["one?/1"]["metadata"]["score_math"] == 1.0
    assert traces["one?/1"]["metadata"]["reason_math"] == "equal"
    episode = traces["sum/1"]["messages"]
    assert episode[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 2, "b": 2}'}
    assert traces["fail/1"]["metadata"]["status"] == "error"
    # trackio would make a second run of the same name.
    assert "project 'my-run' has a run 'ppo-aaaaaaaaaaaa'" in export(stage, "trackio", code=2)["error"]


@needs_readers
def test_trackio_writes_to_no_other_machine(stage: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With these variables trackio would send to a server, and fail here.
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    command = [str(READERS), "-m", "align.cli.main", "export-log", str(stage.path), "--format", "trackio"]
    run_there([*command, "--output", str(tmp_path / "logs")])
    assert list((tmp_path / "logs").glob("*.db"))


def test_exports_import_no_torch() -> None:
    code = "import sys; from align.extensions.logs import export_log, inspect_logs, trackio_traces; "
    run_there([sys.executable, "-c", code + "assert 'torch' not in sys.modules"])


def test_means_count_only_transcripts_with_the_score() -> None:
    scored = Transcript("a", 1, [], [], "", True, scores={"x": 1.0})
    log = TranscriptLog("l", "t", "s", None, [scored, Transcript("b", 1, [], [], "", True)])  # type: ignore[arg-type]
    assert log.means() == {"x": 1.0}
