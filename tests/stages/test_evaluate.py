"""The evaluate stage's configuration: what is refused, and what enters the key."""

import pytest

from align.config.stages.evaluate import EvaluateConfig
from align.evaluation.tasks import identities
from align.stages.evaluate import score_reasons

GOOD = {"policies": ["model", "sft"], "reference": "sft", "prompts": "data"}
FILES = {"files": ["x.jsonl"]}


@pytest.mark.parametrize(
    "change",
    [
        {"reference": "ppo"},
        {"policies": ["sft", "sft"]},
        {"pairs": "sample"},
        {"policies": []},
        {"max_token": 3},
        {"gates": {"ifeval.prompt_strict": ">= 0.3"}},
        {"score": "gold", "gates": {"golt": ">= 0.3"}},
        {"score": "gold", "gates": {"gold": ">= stf"}},
        {"baselines": {"sft": {"of": "sft", "shots": 1}}},
        {"baselines": {"b": {"of": "ppo", "shots": 1}}},
        {"baselines": {"b": {"of": "sft", "best_of": 4}}},
        {"tasks": {"prompts": {"task": "ifeval", "files": ["x"]}}},
        {"prompts": None},
        {"temperature": 0.0, "samples_per_prompt": 2},
        {"tasks": {"preference": {}}},
        {"tasks": {"reward_pairs": FILES}},
        {"tasks": {"judged": {**FILES, "judge": {"reward": True}}}},
        {"reward": "rm", "tasks": {"judged": {**FILES, "judge": {"reward": "second_reward"}}}},
    ],
)
def test_what_is_refused(refused, change):
    refused(EvaluateConfig, **GOOD | change)


def test_the_scoring_program_is_part_of_the_key(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scorer = tmp_path / "my_scorer_of_tests.py"
    scorer.write_text("def score(rows, responses): return [0.0] * len(rows)\n")
    config = EvaluateConfig(**GOOD, score="my_scorer_of_tests:score")
    before = identities(config, tmp_path)
    scorer.write_text("def score(rows, responses): return [1.0] * len(rows)\n")
    assert identities(config, tmp_path) != before
    assert identities(EvaluateConfig(**GOOD), tmp_path) == {}
    refused(lambda: identities(EvaluateConfig(**GOOD, score="no_such_module:score"), tmp_path))


def test_score_of_0_has_the_reasons_of_the_verifier():
    """Of rewards and of metrics, under their names in the scorecard."""
    config = EvaluateConfig(**GOOD, score=[{"math": "answer"}], metrics=[{"number": "answer", "name": "final"}])
    values = {"score_math": 0.0, "score_math_no_answer": 1.0, "final": 0.5, "final_unequal": 0.5}
    right = {"score_math": 1.0, "final": 0.0, "final_unparsable": 1.0}
    lines = score_reasons(config, {"prompts": 32, "values": {"sft": values, "model": right}})
    assert [line.partition("; ")[0] for line in lines] == ["sft: 32 of 32: no_answer", "model: 32 of 32: unparsable"]
