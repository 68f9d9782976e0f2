"""``score:`` of every stage: what a list may say, what is refused, and what of it enters the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.config.base import settings_for_key
from align.config.scores import MetricFunction, score_identities
from align.config.stages.policy_gradient import GrpoConfig, PpoConfig
from align.config.user_functions import function_identity
from align.config.validation import validate
from align.errors import UserError
from tests.support.refusals import Refused

LENGTH, VOWELS = "tests.support.rewards:length", "tests.support.rewards:vowels"
ENDPOINT = {"url": "http://127.0.0.1:9/v1", "model": "judge"}
GRPO = {"policy": "model", "prompts": "data", "learning_rate": 1e-3}


def score_of(score: Any, **fields: Any) -> Any:
    return validate(GrpoConfig, GRPO | {"score": score} | fields, "p.yaml: stages.grpo").score


def refusal(score: Any, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        score_of(score, **fields)
    return str(caught.value)


def pipeline(score: Any, **stages: Any) -> Pipeline:
    blocks = {
        "model": {"source": "tiny"},
        "data": {"recipe": "data_recipes/embedded.yaml"},
        **stages,
        "grpo": GRPO | {"score": score},
    }
    return Pipeline({"name": "p", "stages": blocks}, "p.yaml")


def test_reward_without_name_has_name_of_its_source() -> None:
    entries = score_of(
        [
            {"function": "gold"},
            {"function": LENGTH, "name": "brevity"},
            {"judge": {"endpoint": ENDPOINT}, "weight": 0.5},
            {"reward": "rm"},
        ]
    )
    assert [entry.label for entry in entries] == ["gold", "brevity", "judge", "rm"]
    assert [entry.weight for entry in entries] == [1.0, 1.0, 0.5, 1.0]


def test_steps_are_for_functions_and_ppo(refused: Refused) -> None:
    entry = {"function": LENGTH, "steps": "\n\n"}
    assert "score[0].steps gives tokens separate rewards, and this method has one advantage" in refusal([entry])
    assert "steps is for a function, and this is a reward" in refusal([{"reward": "rm", "steps": "."}])
    judged = {"judge": {"endpoint": ENDPOINT}, "timeout": "30s"}
    assert "timeout is for a function, and this is a judge; set judge.endpoint.timeout" in refusal([judged])
    ppo = {**GRPO, "score": [entry]}
    assert validate(PpoConfig, ppo, "p.yaml: stages.ppo").score[0].steps == "\n\n"
    environment = {"class": "tests.support.environments.classes:Counter", "max_tokens": 64}
    refused(validate, PpoConfig, ppo | {"environment": environment}, "p.yaml: stages.ppo")
    whole, stepwise = score_of([{"function": LENGTH}])[0], validate(PpoConfig, ppo, "p.yaml").score[0]
    assert whole.identity("") != stepwise.identity("")


@pytest.mark.parametrize(
    "function",
    [
        "tests.support.rewards:lenght",
    ],
)
def test_metrics_of_evaluation_are_checked_at_loading(refused: Refused, function: str) -> None:
    block = {"policies": ["model"], "reference": "model", "prompts": "data", "metrics": [function]}
    refused(pipeline, "gold", evaluate=block)


def test_arguments_of_metrics_enter_the_key_where_there_are_some(refused: Refused) -> None:
    def key(*metrics: Any) -> str:
        block = {"policies": ["model"], "reference": "model", "prompts": "data", "metrics": list(metrics)}
        return pipeline("gold", evaluate=block).nodes["evaluate"].key

    entry = {"function": LENGTH, "name": "brevity"}
    # Without arguments it is keyed as an entry from before there were any.
    assert "arguments" not in settings_for_key(MetricFunction(**entry), MetricFunction(**entry).model_dump())
    assert len({key(entry), key(entry | {"arguments": {"limit": 5}}), key(entry | {"arguments": {"limit": 6}})}) == 3
    refused(key, VOWELS, entry | {"arguments": {"limt": 5}})


def test_a_single_function_is_identified_as_ever() -> None:
    assert score_identities(LENGTH) == {"score": function_identity(LENGTH)}
    assert score_identities(None) == {}


def test_key_has_weights_and_arguments_but_no_judge_rate() -> None:
    def key(**changes: Any) -> str:
        judge = {"endpoint": ENDPOINT | changes.pop("endpoint", {}), **changes.pop("judge", {})}
        first = {"function": LENGTH, "arguments": {"limit": 9}} | changes
        return pipeline([first, {"judge": judge}]).nodes["grpo"].key

    assert key() == key(
        endpoint={"concurrency": 3, "retries": 1, "timeout": 5.0, "patience": "2h"}, judge={"max_unreadable": 0.5}
    )
    assert key() == key(concurrency=99) == key(retries=3) == key(timeout="30s")
    keys = {
        key(),
        key(weight=0.5),
        key(name="brevity"),
        key(on_error=0.0),
        key(arguments={"limit": 8}),
        key(endpoint={"model": "larger"}),
        key(judge={"rubric": "Be strict."}),
        key(judge={"reference": "answer"}),
    }
    assert len(keys) == 8


def test_a_reward_stage_in_the_list_is_an_input_of_the_stage(refused: Refused) -> None:
    reward = {"model": "model", "data": "pairs", "learning_rate": 1e-3}
    sample = {"stage": "sample", "policy": "model", "prompts": "data"}
    score = [{"function": "gold"}, {"reward": "rm", "weight": 0.5}]
    nodes = pipeline(score, pairs=sample, rm={"stage": "reward", **reward}).nodes
    assert nodes["grpo"].input_names == ["model", "data", "rm"]
    assert nodes["grpo"].parts["inputs"]["score.reward"] == [nodes["rm"].key]
    changed = pipeline(score, pairs=sample, rm={"stage": "reward", **reward, "epochs": 2}).nodes
    assert changed["grpo"].key != nodes["grpo"].key
    refused(pipeline, [{"reward": "rmm"}], pairs=sample, rm={"stage": "reward", **reward})
    refused(pipeline, [{"reward": "data"}])


def test_checkpoint_that_judges_is_an_input_of_the_stage(refused: Refused) -> None:
    judge = {"judge": {"model": "judge"}}
    score = [judge, {"function": "gold"}, {"criteria": ["It is short."], **judge, "weight": 0.5}]
    file = pipeline(score, judge={"stage": "model", "source": "tiny"})
    assert file.nodes["grpo"].inputs["score.judge.model"] == ["judge", "judge"]
    refused(pipeline, [{"judge": {"model": "juge"}}])


def test_a_loop_gives_the_list_the_reward_stage_of_its_round() -> None:
    loop = {
        "rounds": 2,
        "carry": {"policy": {"first": "model", "then": "grpo"}, "judge": {"first": "rm0", "then": "rm"}},
        "stages": {
            "pairs": {"stage": "sample", "policy": "policy", "prompts": "data"},
            "rm": {"stage": "reward", "model": "model", "data": "pairs", "learning_rate": 1e-3},
            "grpo": GRPO | {"policy": "policy", "score": [{"reward": "judge"}, {"reward": "rm", "name": "new"}]},
        },
    }
    stages = {
        "model": {"source": "tiny"},
        "data": {"recipe": "data_recipes/embedded.yaml"},
        "pairs0": {"stage": "sample", "policy": "model", "prompts": "data"},
        "rm0": {"stage": "reward", "model": "model", "data": "pairs0", "learning_rate": 1e-3},
        "loop": loop,
    }
    nodes = Pipeline({"name": "p", "stages": stages}, "p.yaml").nodes
    assert nodes["grpo-1"].inputs["score.reward"] == ["rm0", "rm-1"]
    assert nodes["grpo-2"].inputs["score.reward"] == ["rm-1", "rm-2"]


def test_no_code_of_the_user_s_runs_when_a_file_is_read(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loud.py").write_text(
        "raise SystemExit('imported')\n"
        "from functools import partial as first\n"
        "def f(rows, responses, /, a, *, b=1): ...\n"
        "second = third = f\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("f", "first", "second", "third"):  # the source of the last three does not tell their parameters
        score_identities(score_of([{"function": f"loud:{name}", "arguments": {"a": 1}}]))
    refused(lambda: score_identities(score_of([{"function": "loud:f", "arguments": {"a": 1, "c": 1}}])))
    (tmp_path / "broken.py").write_text("def f(:\n")
    refused(lambda: score_identities(score_of([{"function": "broken:f"}])))


def test_arguments_of_a_recipe_s_generator_are_checked_too(refused: Refused) -> None:
    from align.config.recipe.recipe import Recipe

    def recipe(**source: Any) -> Recipe:
        block = {"type": "python", "format": "gsm8k", "license": "MIT", **source}
        return validate(Recipe, {"description": "Sums.", "kind": "instructions", "sources": [block]}, "r.yaml")

    recipe(function="examples.rewards:sums", arguments={"count": 3})
    recipe(function="not.here:sums", arguments={"count": 3})  # an error of its own, where it is read
    refused(recipe, function="examples.rewards:sums", arguments={"cuont": 3})
