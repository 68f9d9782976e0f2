"""The table about the health of training on the first screen of a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.report.page.metric_series import Events
from align.report.run.run_report import write_report
from align.report.run.training_health import raised_alarms, result_sentence, training_health, unusable
from align.store.artifacts import Artifact, Kind
from tests.support.report.example_run import HOSTILE, write_artifact

HEALTHY = {"score": [0.0, 0.2, 0.5, 0.9], "kl": [0.0, 1.0, 2.0, 4.0], "entropy": [2.0, 1.9, 1.8, 1.7],
           "truncation_rate": [0.6, 0.4, 0.2, 0.1], "length": [10.0] * 4}  # fmt: skip


def health_of(**series):
    values = {name: ([1.0, 2.0, 3.0, 4.0], numbers) for name, numbers in (HEALTHY | series).items()}
    health = training_health({"ppo": Events(values), "sft": Events({"loss": ([1.0], [0.5])})})
    (row,) = health["rows"]
    cells = {column.title: cell for column, cell in zip(health["columns"], row["cells"], strict=True)}
    return {title: (cell["text"], cell["ok"]) for title, cell in cells.items()}


def test_healthy_numbers_have_no_mark():
    assert health_of() == {
        "Reward": ("0.000 → 0.900", True),
        "KL to the reference": ("0.000 → 4.00", True),
        "Entropy": ("2.00 → 1.70", True),
        "Cut off": ("60% → 10%", True),
    }


def test_numbers_outside_of_the_healthy_range_have_a_mark():
    sick = health_of(score=[1.0, 1.0, 0.5, 0.2], kl=[0.0, 1.0, 5.0, 11.0], entropy=[2.0, 2.0, 1.0, 0.4],
                     truncation_rate=[0.1, 0.2, 0.4, 0.5], gold=[1.0, 0.9, 0.8, 0.7])  # fmt: skip
    assert list(sick) == ["Reward", "Gold", "KL to the reference", "Entropy", "Cut off"]
    assert not any(ok for _, ok in sick.values())
    assert not health_of(entropy=[1.0, 1.0, 2.0, 2.1])["Entropy"][1]
    assert health_of(kl=[0.0, 1.0, 2.0, 4.9], length=[1.0] * 4)["KL to the reference"][1]  # as the alarm


def test_stages_without_rollouts_have_no_health():
    assert training_health({"sft": Events({"loss": ([1.0], [0.5]), "entropy": ([1.0], [0.5])})}) is None


def test_alarms_are_read_from_warnings():
    warnings = [
        "ppo: update 12: over-optimization: in 5 updates the score rose",
        "ppo: update 3: KL: the KL to the reference is 30 nats",
        "sft: step 12: divergence: the held-out loss rose from 5.9 to 25 nats a token",
        "ppo ended early, at update 3: KL: the KL to the reference is 30 nats",
        "ppo: 3 of 20 prompts are longer than max_prompt_tokens",
    ]
    assert raised_alarms(warnings) == [
        "over-optimization since update 12",
        "KL since update 3",
        "divergence since step 12",
    ]


def test_first_screen_shows_health_and_alarms(tmp_path):
    first, second = (write_artifact(tmp_path, name, Kind.POLICY, (), HEALTHY) for name in ("ppo", "grpo"))
    with (second.path / "events.jsonl").open("a") as file:
        warning = {"event": "warning", "message": f"grpo: update 2: collapse: {HOSTILE}"}
        file.write(json.dumps(warning) + "\n")
    html = write_report([first, second], None, tmp_path / "r.html").read_text(encoding="utf-8")
    summary = html[html.index('id="summary"') : html.index('id="pipeline"')]
    assert summary.count("✓ no alarms") == 1 and "⚠ collapse since update 2" in summary
    assert "rises slowly; below 1 nat a token" in summary and "0.000 → 4.00" in summary
    assert "<script>document.title" not in html


def artifact(stage: str, **metrics: Any) -> Artifact:
    return Artifact(stage, Kind.POLICY, Path(), {"metrics": metrics})


def test_checkpoint_with_an_alarm_of_kl_is_not_to_be_used() -> None:
    ppo = artifact("ppo", alarms=["update 3: entropy", "update 8: KL, again at 9, 12"], score_first=0.1, score_last=0.9)
    (text,) = unusable([artifact("sft"), ppo])
    assert text == (
        "Do not use the checkpoint of 'ppo': the policy has left the language that it started from "
        "(alarm KL, update 8)."
    )
    # The run ends with this, although its score rose.
    assert result_sentence([artifact("sft"), ppo], None) == text
    assert unusable([artifact("ppo", alarms=["update 8: KL"], kept={"update": 4.0}), artifact("sft")]) == []
    diverged = artifact("sft", alarms=["step 12: divergence"])
    assert "held-out loss rose" in unusable([diverged])[0]


def test_run_ends_with_what_its_last_stage_measured() -> None:
    sft = artifact("sft", test_loss_before=3.5, test_loss_after=2.25)
    assert result_sentence([artifact("model"), sft], None) == "sft: held-out loss 3.50 → 2.25."
    assert result_sentence([artifact("model"), artifact("merge")], None) == "All 2 stages are finished."


def test_page_says_not_to_use_a_checkpoint(tmp_path):
    ppo = write_artifact(tmp_path, "ppo", Kind.POLICY, (), HEALTHY, metrics={"alarms": ["update 8: KL"]})
    html = write_report([ppo], None, tmp_path / "r.html").read_text(encoding="utf-8")
    summary = html[html.index('id="summary"') : html.index('id="pipeline"')]
    assert "⚠ Do not use the checkpoint of &#39;ppo&#39;" in summary
