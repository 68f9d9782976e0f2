"""``align rollout``: plays a stage's environment with a checkpoint, stores the episodes, and plays them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.cli.main import main
from align.environments.rehearsal import read_episodes
from tests.support.environments.buttons import FORMAT, make_presser
from tests.support.refusals import Refused

USER = {"model": "model", "prompt": "ab", "stop": "!b", "max_tokens": 8}
QUESTIONS = [{"question": f"Go {number}", "answer": "#### 1"} for number in range(12)]


@pytest.fixture(scope="module")
def presser(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_presser(tiny_model, tmp_path_factory.mktemp("presser"))


@pytest.fixture(scope="module")
def folder(presser: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose model and prompts are finished, in a folder with its store."""
    folder = tmp_path_factory.mktemp("rollout")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    recipe = {
        "kind": "instructions",
        "sources": [{"type": "files", "paths": ["rows.jsonl"], "format": "gsm8k", "license": "CC0-1.0"}],
        "test_size": 0.5,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    training = {"policy": "model", "prompts": "data", "learning_rate": 1e-3, "precision": "float32", "updates": 1}
    environment = {
        "class": "tests.support.environments.buttons:Buttons",
        "tool_format": FORMAT,
        "max_turns": 3,
        "max_tokens": 60,
        "turn_max_tokens": 8,
    }
    pipeline = {
        "name": "buttons",
        "runtime": {"engine": {"name": "transformers"}, "threads": 1},
        "stages": {
            "model": {"source": str(presser)},
            "data": {"recipe": "recipe.yaml"},
            "ppo": training | {"environment": environment},
            "plain": training | {"stage": "ppo", "score": "gsm8k_answer"},
            "talk": training | {"stage": "ppo", "environment": environment | {"user": USER}},
        },
    }
    (folder / "buttons.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    for stage in ("model", "data"):
        assert main(["run", str(folder / "buttons.yaml"), "--only", stage, "--store", str(folder / "store")]) == 0
    return folder


def rollout(folder: Path, *words: str) -> int:
    stage = [] if "--stage" in words else ["--stage", "ppo"]
    return main(["rollout", str(folder / "buttons.yaml"), "--store", str(folder / "store"), *stage, *words])


def test_episodes_are_printed_stored_and_played_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "episodes.jsonl"
    assert rollout(folder, "--n", "5", "--save", str(saved)) == 0
    output = capsys.readouterr().out
    assert output.count("--- episode") == 5 and "user: go" in output and "tokens sampled" in output
    assert "5 episodes, mean score" in output
    stored = read_episodes(saved)
    assert len(stored) == 5 and any(entry.episode.calls for entry in stored)

    # The same turns in the same environment: the same tokens, calls and scores, and the checkpoint's own numbers.
    assert rollout(folder, "--replay", str(saved), "--json") == 0
    for entry, result in zip(stored, json.loads(capsys.readouterr().out), strict=True):
        assert result["episode"]["score"] == entry.episode.score and result["difference"] == ""
        assert result["logprob_gap"] < 1e-4

    # Another environment scores them anew.
    other = "stages.ppo.environment.class=tests.support.environments.buttons:Generous"
    assert rollout(folder, "--replay", str(saved), "--set", other) == 1
    assert "differs in the score" in capsys.readouterr().out


WITHOUT = [
    word
    for stage in ("ppo", "talk")
    for word in ("--set", f"stages.{stage}.environment=null", "--set", f"stages.{stage}.score=gsm8k_answer")
]


def test_what_the_model_and_tools_say_cannot_drive_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "stages.ppo.environment.class=tests.support.environments.buttons:Hostile"
    assert rollout(folder, "--n", "5", "--set", hostile) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output and "<|im_end|>" in output


def test_a_replay_takes_what_the_user_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "episodes.jsonl"
    assert rollout(folder, "--stage", "talk", "--n", "6", "--save", str(saved)) == 0
    assert "user: go" in capsys.readouterr().out
    stored = read_episodes(saved)
    assert any(entry.episode.user_answers for entry in stored)

    monkeypatch.setattr("align.environments.rehearsal.open_user", lambda *values: pytest.fail("a user was opened"))
    assert rollout(folder, "--stage", "talk", "--replay", str(saved), "--json") == 0
    for entry, result in zip(stored, json.loads(capsys.readouterr().out), strict=True):
        assert result["episode"]["user_answers"] == entry.episode.user_answers and result["difference"] == ""
        assert result["episode"]["messages"] == entry.episode.messages

    # Where the turns of the policy are read in another way, the user was never asked.
    other = ["--set", "stages.talk.environment.tool_format=regex:(?P<name>zz)(?P<arguments>)"]
    assert rollout(folder, "--stage", "talk", "--replay", str(saved), "--json", *other) == 1
    failures = {result["episode"]["failure"] for result in json.loads(capsys.readouterr().out)}
    assert "user: the stored episode has no further answer of the user." in failures


@pytest.mark.parametrize(
    "words",
    [
        ["--n", "0"],
        ["--stage", "pop"],
        ["--stage", "plain"],
        [],
        ["--stage", "talk", "--set", "stages.talk.environment.user.prompt=Want {goal}"],
        ["--stage", "ppo", "--replay", "nowhere.jsonl"],
        ["--stage", "ppo", "--checkpoint", "nowhere"],
        WITHOUT,
    ],
)
def test_wrong_words_are_refused(refused: Refused, folder: Path, words: list[str]) -> None:
    refused(_run_command, folder, words)


def _run_command(folder: Path, words: list[str]) -> Any:
    from align.cli import rollout as module
    from align.cli.main import _parse

    options = _parse(["rollout", str(folder / "buttons.yaml"), "--store", str(folder / "store"), *words])
    return module.run(options)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"row": {}, "seed": 1, "episode": {"turns": 3}}'])
def test_a_file_that_has_no_episodes_is_refused_with_its_line(refused: Refused, tmp_path: Path, content: str) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_text(content and content + "\n")
    refused(read_episodes, path)


def test_data_stage_is_played_with_its_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = yaml.safe_load((folder / "buttons.yaml").read_text())
    fields = {"prompts": "data", "environment": pipeline["stages"]["ppo"]["environment"]}
    made = {"stage": "synthesize", "task": {"type": "responses"}, **fields}
    endpoint = {"url": "http://127.0.0.1:9/v1", "model": "teacher"}
    stages = {
        "model": pipeline["stages"]["model"],
        "data": pipeline["stages"]["data"],
        "sample": {"policy": "model", **fields},
        "made": made | {"model": "model"},
        "taught": made | {"endpoint": endpoint},
    }
    path = folder / "data_stages.yaml"
    path.write_text(yaml.safe_dump(pipeline | {"stages": stages}, sort_keys=False))
    words = ["rollout", str(path), "--store", str(folder / "store"), "--n", "2", "--stage"]
    for stage in ("sample", "made"):
        assert main([*words, stage]) == 0
        assert capsys.readouterr().out.count("--- episode") == 2
    assert main([*words, "taught"]) == 2
    assert "taught: an endpoint plays in this stage's environment" in capsys.readouterr().err


@pytest.fixture(scope="module")
def evaluation(folder: Path) -> Path:
    """A pipeline whose evaluation has two tasks with environments."""
    pipeline = yaml.safe_load((folder / "buttons.yaml").read_text())
    task = {"task": "environment", "environment": pipeline["stages"]["ppo"]["environment"], "rows": "data"}
    stages = {
        "model": pipeline["stages"]["model"],
        "data": pipeline["stages"]["data"],
        "evaluate": {
            "policies": ["model"],
            "reference": "model",
            "rows": ["data"],
            "users": ["model"],
            "max_context": 128,
            "tasks": {
                "press": task | {"samples": 2, "temperature": 1.0, "max_items": 3},
                "talk": task | {"environment": task["environment"] | {"user": USER}},
            },
        },
    }
    path = folder / "evaluation.yaml"
    path.write_text(yaml.safe_dump(pipeline | {"stages": stages}, sort_keys=False))
    return path


def test_task_of_evaluation_plays_its_own_episodes(
    folder: Path, evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "episodes.jsonl"
    words = [str(evaluation), "--store", str(folder / "store"), "--stage", "evaluate"]
    assert main(["rollout", *words, "--task", "press", "--n", "20", "--save", str(saved)]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("--- episode") == 6 and "playing with stage model, the last of policies" in captured.err

    assert main(["run", str(evaluation), "--store", str(folder / "store")]) == 0
    played = [
        episode
        for path in (folder / "store" / "cache" / "evaluation").glob("episodes-*.jsonl")
        for line in path.read_text().splitlines()
        for episode in json.loads(line).get("episodes", [])
    ]
    texts = [[turn["token_ids"] for turn in episode["turns"]] for episode in played]
    for entry in read_episodes(saved):
        assert [turn.token_ids for turn in entry.episode.turns] in texts


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--task", "pres"],
        ["--task", "press", "--split", "train"],
        ["--task", "talk", "--set", "stages.evaluate.tasks.talk.environment.user.prompt=Want {goal}"],
    ],
)
def test_a_task_that_is_not_there_is_refused(
    refused: Refused, folder: Path, evaluation: Path, words: list[str]
) -> None:
    from align.cli import rollout as module
    from align.cli.main import _parse

    refused(lambda: module.run(_parse(["rollout", str(evaluation), "--store", str(folder / "store"), *words])))
