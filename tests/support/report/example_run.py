"""An example run as the report reads it: artifacts with records, events, ledgers, a scorecard and samples.

Some of its texts are hostile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.store.artifacts import Artifact, Kind
from tests.support.report.example_card import ITEMS, PROMPTS, full_card
from tests.support.stored_rollouts import write_lines

HOSTILE = (
    '<script>document.title="PWNED"</script><img src=x onerror="document.title=\'PWNED\'">'
    "</script><!-- </div> {{ 7*7 }} $\\frac{1}{2}$ \x1b[31m \u202egnp.exe \x00 \ud800"
)
FORMULA = '=HYPERLINK("http://x.invalid";"click")'


def write_artifact(
    root: Path, stage: str, kind: Kind, inputs: tuple[str, ...] = (), curves: dict[str, list[float]] | None = None,
    **more: Any,
) -> Artifact:  # fmt: skip
    """Write a finished stage's folder with a record and events; ``more`` replaces fields of the record."""
    folder = root / stage
    folder.mkdir()
    record = {
        "key": stage.encode().hex() * 4,
        "kind": stage,
        "stage": stage,
        "makes": str(kind),
        "version": 1,
        "config": {"learning_rate": 0.0005, "note": HOSTILE},
        "seed": 17,
        "input_stages": [{"stage": name, "kind": name, "key": name.encode().hex() * 4} for name in inputs],
        "metrics": {"loss_last": 0.25, "nested": {"deep": 3}},
        "tokens": 12_345,
        "seconds": 83.0,
        "peak_memory_bytes": 3 * 2**30,
        "created": "2026-01-02T03:04:05+00:00",
        "packages": {"torch": "2.13.0"},
        "platform": "linux x86_64, 2 cores",
        "command": "align run pipelines/quickstart.yaml",
    } | more
    events = [{"event": "warning", "message": f"careful with {HOSTILE}"}]
    for name, values in (curves or {}).items():
        events += [{"event": "metrics", "step": step, name: value} for step, value in enumerate(values)]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return Artifact(stage, kind, folder, record)


def write_ledger(artifact: Artifact) -> None:
    """Write a recipe's ledger: two sources, and a step with two reasons to drop rows, one of them a formula."""

    def tally(rows_in: int, dropped: dict[str, int]) -> dict[str, Any]:
        lost = sum(dropped.values())
        return {"rows_in": rows_in, "rows_out": rows_in - lost, "added": 0, "changed": 1, "dropped": dropped}

    lost = {"too long": 5, FORMULA: 2}
    ledger = {
        "rows_in": 40, "rows_out": 33, "added": 0, "dropped": lost, "splits": {"train": 30, "test": 3},
        "format_choices": {"words": "alpaca"},
        "sources": [
            {"source": "words", "type": "file", "part": "", "license": "CC BY 4.0", "identity": {"sha": "ab12"},
             **tally(20, {"too long": 5})},
            {"source": "<b>lists</b>", "type": "hub", "part": "", "license": None, "identity": {},
             **tally(20, {FORMULA: 2})},
        ],
        "steps": [
            {"step": "0 read", **tally(40, {}), "by_source": {}, "examples": {}, "notes": {}},
            {"step": "1 filter", **tally(40, lost),
             "by_source": {"words": tally(20, {"too long": 5}), "<b>lists</b>": tally(20, {FORMULA: 2})},
             "examples": {"too long": [{"text": "a private text", "where": "x", "id": "1", "detail": {}}]},
             "notes": {}},
        ],
        "digests": {},
    }  # fmt: skip
    (artifact.path / "ledger.json").write_text(json.dumps(ledger), encoding="utf-8")


def prompt_samples(policies: list[str], heat: bool) -> Iterator[dict[str, Any]]:
    """Yield a line per prompt; the first is hostile, and PPO gained most on it."""
    for number in range(PROMPTS):
        is_hostile = number == 0
        responses = {}
        for policy in policies:
            text = HOSTILE if is_hostile and policy == "ppo" else f"answer {number} of {policy}"
            gold = 1.0 if is_hostile and policy == "ppo" else number / 100
            response: dict[str, Any] = {"text": text, "tokens": 9, "finished": number % 5 > 0, "gold": gold}
            if heat and policy != "best8":
                pieces = ["", *(f"{word} " for word in text.split(" "))]
                response["token_kl"] = [[piece, 0.5 * index - 1] for index, piece in enumerate(pieces)]
                response["token_value"] = [0.1 * index for index in range(len(pieces))]
            responses[policy] = [response]
        prompt = [{"role": "user", "content": HOSTILE if is_hostile else f"question {number}"}]
        yield {"task": "prompts", "id": str(number), "source": "<b>lists</b>", "prompt": prompt, "responses": responses}


def task_samples(policies: list[str]) -> Iterator[dict[str, Any]]:
    """Yield lines of an instruction task, and of a judged one with two turns."""
    for index in range(ITEMS):
        responses = {
            policy: [{"text": f"{policy} did {index}", "tokens": 4, "finished": True,
                      "scores": {"prompt_strict": float(policy == "ppo" and index < 3)}}]
            for policy in policies
        }  # fmt: skip
        prompt = [{"role": "user", "content": f"instruction {index}"}]
        yield {"task": "ifeval", "id": f"i{index}", "source": "length", "prompt": prompt, "responses": responses}
    turns = [{"prompt": "write", "text": "first reply", "finished": True},
             {"prompt": "now shorter", "text": "second reply", "finished": True}]  # fmt: skip
    responses = {policy: [{"text": "second reply", "tokens": 4, "finished": True, "scores": {"score": 7.0},
                           "turns": turns}] for policy in policies}  # fmt: skip
    prompt = [{"role": "user", "content": "write"}]
    yield {"task": "mt", "id": "m0", "source": "writing", "prompt": prompt, "responses": responses}


def write_evaluation(artifact: Artifact, card: dict[str, Any], samples: Iterator[dict[str, Any]]) -> None:
    """Write an evaluation's files."""
    (artifact.path / "scorecard.json").write_text(json.dumps(card), encoding="utf-8")
    with (artifact.path / "samples.jsonl").open("w", encoding="utf-8") as file:
        for line in samples:
            file.write(json.dumps(line) + "\n")


def make_full_run(root: Path) -> tuple[list[Artifact], dict]:
    """Write a run with everything: baselines, tasks, gates, judges, reward models, ledgers, costs, rollouts, heat."""
    line = [1 / (step + 1) for step in range(30)]
    rising = [0.1 * step for step in range(30)]
    update = {"kl": rising, "score": line[::-1], "gold": line, "loss": line}
    source = {"config": {"source": "smollm2-135m-instruct"}, "identities": {"source": "embedded:bcc8"}}
    usage = {"metrics": {"cost": 0.25, "engines": ["vllm"]}}
    artifacts = [
        write_artifact(root, "model", Kind.MODEL, **source),
        write_artifact(root, "data", Kind.INSTRUCTIONS),
        write_artifact(root, "answers", Kind.PREFERENCES, ("data",), None, **usage),
        write_artifact(root, "sft", Kind.POLICY, ("model", "data"), {"loss": line, "test_loss": line[:3]}),
        write_artifact(root, "reward", Kind.REWARD, ("sft", "answers"), {"loss": line}),
        write_artifact(root, "ppo", Kind.POLICY, ("sft", "reward"), update),
        write_artifact(root, "evaluate", Kind.SCORECARD, ("model", "sft", "ppo", "reward")),
    ]
    write_ledger(artifacts[1])
    levels = {
        "answers": {"in": 12, "out": 9, "dropped": {"cut off": 3}, "examples": {}},
        "rows": {"train": 8, "test": 1},
    }
    (artifacts[2].path / "ledger.json").write_text(json.dumps({"task": "answers", **levels}), encoding="utf-8")
    rollout = {"update": 1, "prompt": [{"role": "user", "content": "roll"}], "response": "a b", "score": 0.5, "kl": 0.3,
               "tokens": 2, "finished": True, "by_token": [["a", 0.1, 0.2, -0.3], [" b", 0.2, 0.1, 0.4]]}  # fmt: skip
    write_lines(artifacts[5].path / "rollouts", [rollout])
    card = full_card()

    def samples() -> Iterator[dict[str, Any]]:
        yield from prompt_samples(card["policies"], heat=True)
        yield from task_samples(card["policies"])

    write_evaluation(artifacts[-1], card, samples())
    return artifacts, card
