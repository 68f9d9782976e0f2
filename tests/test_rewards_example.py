"""The shipped example of a list of rewards, from its data to the report, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align import Pipeline
from align.report.page.metric_series import group_by_panel, read_events
from align.report.scorecard.stored_rollouts import read_rollouts
from examples import rewards
from tests.support.stored_rollouts import stored_rows


@pytest.mark.usefixtures("stages_in_process")
def test_grpo_on_two_rewards_with_known_answers(tmp_path: Path) -> None:
    changes = {
        "runtime.engine": {"name": "transformers"},
        "stages.model": {"source": "tiny"},
        "stages.data.max_rows": 24,
        "stages.grpo.updates": 2,
        "stages.grpo.rollout_batch": 8,
        "stages.grpo.samples_per_prompt": 4,
        "stages.grpo.max_tokens": 8,
        "stages.grpo.eval_updates": 2,
        "stages.evaluate.max_tokens": 8,
    }
    run = Pipeline.load("pipelines/rewards.yaml").changed(changes).run(store=tmp_path / "store")
    record = run.artifacts["grpo"].record["metrics"]
    assert {"score_exact_answer_last", "score_brevity_last"} <= record.keys()
    folder = run.artifacts["grpo"].path
    lines = stored_rows(folder / "rollouts")
    for line in lines:
        brevity = rewards.brevity([{}], [line["response"]], limit=60)[0]
        assert line["scores"]["brevity"] == pytest.approx(brevity)
        assert line["score"] == pytest.approx(line["scores"]["exact_answer"] + 0.2 * brevity)
    # The curves of the rewards stand beside the score's.
    titles = [title for title, _ in group_by_panel(read_events(folder).series)]
    first = titles.index("score")
    assert titles[first + 1 : first + 4] == ["score_brevity", "score_exact_answer", "score_exact_answer_numbers"]
    card = json.loads((run.artifacts["evaluate"].path / "scorecard.json").read_text())
    assert {"score", "score_exact_answer", "score_brevity"} <= card["metrics"].keys()
    page = (run.artifacts["report"].path / "report.html").read_text(encoding="utf-8")
    assert "score_exact_answer" in page and "score_brevity" in page
    assert read_rollouts(folder / "rollouts")


def test_the_functions_of_the_example_say_what_is_right() -> None:
    row = {"checks": json.dumps({"answer": "12"})}
    texts = ["7 + 5 is 12.", "12 is not 13", "none", "-12"]
    assert [rewards.exact_answer(row, text)["score"] for text in texts] == [1.0, 0.0, 0.0, 0.0]
    assert [rewards.exact_answer(row, text)["numbers"] for text in texts] == [3, 2, 0, 1]
    assert rewards.brevity([row] * 3, ["", "a" * 20, "a" * 80], limit=40) == [1.0, 0.5, 0.0]
    questions = [record["question"] for record in rewards.sums(count=400)]
    assert len(set(questions)) == 400
