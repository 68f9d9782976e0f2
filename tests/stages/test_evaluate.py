"""The evaluate stage's configuration: what is refused, and what enters the key."""

import pytest
from pydantic import ValidationError

from align.config.stages.evaluate import EvaluateConfig
from align.errors import UserError
from align.evaluation.tasks import identities
from align.stages.evaluate import score_reasons

GOOD = {"policies": ["model", "sft"], "reference": "sft", "prompts": "data"}
FILES = {"files": ["x.jsonl"]}


def test_a_minimal_config_is_enough():
    config = EvaluateConfig(**GOOD)
    assert config.samples_per_prompt == 1
    assert config.score is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reference": "ppo"}, "not among policies"),
        ({"policies": ["sft", "sft"]}, "twice"),
        ({"pairs": "sample"}, "reward is missing"),
        ({"policies": []}, "at least 1 item"),
        ({"max_token": 3}, "Extra inputs"),
        ({"gates": {"ifeval.prompt_strict": ">= 0.3"}}, "there is no task 'ifeval'"),
        ({"score": "gold", "gates": {"golt": ">= 0.3"}}, "Did you mean 'gold'"),
        ({"score": "gold", "gates": {"gold": ">= stf"}}, "Did you mean 'sft'"),
        ({"baselines": {"sft": {"of": "sft", "shots": 1}}}, "is a stage already"),
        ({"baselines": {"b": {"of": "ppo", "shots": 1}}}, "is none of policies"),
        ({"baselines": {"b": {"of": "sft", "best_of": 4}}}, "name reward"),
        ({"tasks": {"prompts": {"task": "ifeval", "files": ["x"]}}}, "is not a valid name"),
        ({"prompts": None}, "nothing to evaluate on"),
        ({"temperature": 0.0, "samples_per_prompt": 2}, "would be identical at temperature 0; raise temperature"),
        ({"tasks": {"preference": {}}}, "tasks.preference: there are no pairs; name the stage's `pairs`"),
        ({"tasks": {"reward_pairs": FILES}}, "tasks.reward_pairs: measures a reward model; name a reward stage"),
        ({"tasks": {"judged": {**FILES, "judge": {"reward": True}}}}, "tasks.judged.judge.reward: .* has no reward"),
        (
            {"reward": "rm", "tasks": {"judged": {**FILES, "judge": {"reward": "second_reward"}}}},
            "name a reward stage as `second_reward`",
        ),
    ],
)
def test_what_is_refused(change, words):
    with pytest.raises(ValidationError, match=words):
        EvaluateConfig(**GOOD | change)


def test_the_scoring_program_is_part_of_the_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scorer = tmp_path / "my_scorer_of_tests.py"
    scorer.write_text("def score(rows, responses): return [0.0] * len(rows)\n")
    config = EvaluateConfig(**GOOD, score="my_scorer_of_tests:score")
    before = identities(config, tmp_path)
    scorer.write_text("def score(rows, responses): return [1.0] * len(rows)\n")
    assert identities(config, tmp_path) != before
    assert identities(EvaluateConfig(**GOOD), tmp_path) == {}
    with pytest.raises(UserError, match="no module"):
        identities(EvaluateConfig(**GOOD, score="no_such_module:score"), tmp_path)


def test_score_of_0_has_the_reasons_of_the_verifier():
    """Of rewards and of metrics, under their names in the scorecard."""
    config = EvaluateConfig(**GOOD, score=[{"math": "answer"}], metrics=[{"number": "answer", "name": "final"}])
    values = {"score_math": 0.0, "score_math_no_answer": 1.0, "final": 0.5, "final_unequal": 0.5}
    right = {"score_math": 1.0, "final": 0.0, "final_unparsable": 1.0}
    lines = score_reasons(config, {"prompts": 32, "values": {"sft": values, "model": right}})
    assert [line.partition("; ")[0] for line in lines] == ["sft: 32 of 32: no_answer", "model: 32 of 32: unparsable"]
