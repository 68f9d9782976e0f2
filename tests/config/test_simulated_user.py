"""``user:`` of an environment: what it may say, what is refused, and how its stage and settings enter keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.config.environment import EnvironmentConfig, SimulatedUserConfig
from align.config.stages.evaluate import EvaluateConfig
from align.config.validation import validate
from align.pipeline.pipeline import Node, Pipeline
from tests.support.refusals import Refused

CLASSES, TOOLS = "tests.support.environments.classes", "tests.support.environments.tools"
USER = {"model": "model", "prompt": "You want {goal}."}
ENDPOINT = {"url": "http://127.0.0.1:9/v1", "model": "m"}
COUNTER = {"class": f"{CLASSES}:Counter", "max_tokens": 64}


def environment(block: dict[str, Any], user: dict[str, Any] | None = None) -> EnvironmentConfig:
    return validate(EnvironmentConfig, block | {"user": user or USER}, "p.yaml: stages.ppo.environment")


def test_a_user_goes_with_a_class_with_tools_or_with_a_score() -> None:
    assert environment(COUNTER).label == f"{CLASSES}:Counter"
    functions = {"tools": [f"{TOOLS}:double"], "score": f"{TOOLS}:by_response", "max_tokens": 64}
    assert environment(functions).label == f"{TOOLS}:double"
    alone = environment({"score": f"{TOOLS}:by_messages", "max_tokens": 64})
    assert alone.label == "a simulated user" and alone.identity()


def test_class_with_step_refuses_a_user(refused: Refused) -> None:
    refused(lambda: environment(COUNTER | {"class": f"{CLASSES}:Game"}).identity())


def test_the_prompt_quotes_columns_of_the_row(refused: Refused) -> None:
    user = SimulatedUserConfig(model="sft", prompt="You want {goal}, {prompt[0].content} {{and}} {more?}.")
    row = {"id": "7", "goal": "a lamp", "prompt": [{"role": "user", "content": "Hi"}]}
    assert user.system_message(row, "user") == "You want a lamp, Hi {and} ."
    refused(user.system_message, {"id": "8", "prompt": []}, "user")


def test_an_identity_has_what_the_user_is_told_and_its_server() -> None:
    before = environment(COUNTER).identity()
    assert environment(COUNTER, USER | {"model": "other"}).identity() == before  # an input of the stage
    for change in ({"prompt": "You."}, {"stop": "BYE"}, {"opens": True}, {"max_tokens": 9}, {"temperature": 0.5}):
        assert environment(COUNTER, USER | change).identity() != before
    plain = validate(EnvironmentConfig, COUNTER, "environment")
    assert "user" not in plain.identity() and plain.identity() != before
    prices = {"price_input": 1.0, "price_output": 1.0}

    def served(**fields: Any) -> str:
        user = {"prompt": "You.", "endpoint": ENDPOINT | prices | fields}
        return environment(COUNTER, user | ({"max_cost": 3.0} if fields else {})).identity()

    assert served() == served(concurrency=3, retries=0) == served(price_input=2.0)
    assert served() != served(model="n")


STAGES: dict[str, Any] = {
    "model": {"source": "tiny"},
    "other": {"stage": "model", "source": "tiny"},
    "data": {"recipe": "data_recipes/embedded.yaml"},
    "ppo": {
        "policy": "model", "prompts": "data", "learning_rate": 1e-3,
        "environment": COUNTER | {"user": USER | {"model": "other"}},
    },
}  # fmt: skip


def nodes_of(stages: dict[str, Any]) -> dict[str, Node]:
    return Pipeline({"name": "p", "stages": STAGES | stages}, "p.yaml").nodes


def ppo(user: str, stage: str = "ppo") -> dict[str, Any]:
    block = STAGES["ppo"]
    return {stage: block | {"environment": COUNTER | {"user": USER | {"model": user}}}}


def test_the_users_stage_is_an_input(refused: Refused) -> None:
    nodes = nodes_of({})
    assert nodes["ppo"].inputs["environment.user.model"] == "other"
    assert nodes["ppo"].input_names == ["model", "data", "other"]
    assert nodes["ppo"].parts["inputs"]["environment.user.model"] == nodes["other"].key
    # Two stages that make the same checkpoint are one input; another checkpoint is another key.
    assert nodes_of(ppo("model"))["ppo"].key == nodes["ppo"].key
    changed = nodes_of({"other": STAGES["other"] | {"chat_template": "chatml"}})
    assert changed["ppo"].key != nodes["ppo"].key
    refused(lambda: nodes_of(ppo("othr")))
    refused(lambda: nodes_of(ppo("data")))


def test_a_stage_without_an_environment_has_no_such_input() -> None:
    block = {name: value for name, value in STAGES["ppo"].items() if name != "environment"}
    node = nodes_of({"ppo": block | {"score": "gold"}})["ppo"]
    assert node.inputs["environment.user.model"] is None
    assert "environment.user.model" not in node.parts["inputs"]


def test_loop_plays_against_policy_of_round_before() -> None:
    loop = {"rounds": 2, "carry": {"before": {"first": "model", "then": "ppo"}}, "stages": ppo("before")}
    stages = {name: block for name, block in STAGES.items() if name != "ppo"}
    nodes = Pipeline({"name": "p", "stages": stages | {"loop": loop}}, "p.yaml").nodes
    assert nodes["ppo-1"].inputs["environment.user.model"] == "model"
    assert nodes["ppo-2"].inputs["environment.user.model"] == "ppo-1"


def test_tasks_of_an_evaluation_name_one_of_its_users(refused: Refused) -> None:
    task = {"task": "environment", "files": ["a.jsonl"], "environment": COUNTER | {"user": USER}}
    fields: dict[str, Any] = {"policies": ["sft"], "reference": "sft", "tasks": {"talk": task}}
    assert EvaluateConfig(**fields, users=["model", "sft"]).users == ["model", "sft"]
    refused(EvaluateConfig, **fields, users=["sft"])
    renamed = EvaluateConfig.rename_stages(fields, lambda name: f"{name}-1")
    assert renamed["tasks"]["talk"]["environment"]["user"]["model"] == "model-1"


def test_the_name_of_an_evaluations_user_is_part_of_its_key(tmp_path: Path) -> None:
    from align.evaluation.tasks import identities

    (tmp_path / "a.jsonl").write_text('{"prompt": "q"}\n')
    keys = set()
    for model in ("model", "sft"):
        user = USER | {"model": model}
        task = {"task": "environment", "files": ["a.jsonl"], "environment": COUNTER | {"user": user}}
        config = EvaluateConfig(policies=["sft"], reference="sft", users=["model", "sft"], tasks={"talk": task})  # type: ignore[arg-type]
        keys.add(str(identities(config, tmp_path)))
    assert len(keys) == 2
