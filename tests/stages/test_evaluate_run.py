"""The evaluate stage end to end on two-layer models: files, numbers, going on from an earlier attempt."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from align.artifacts import Artifact, Kind
from align.data.rows import assistant, user, write_rows
from align.errors import UserError
from align.models.tiny import make_tiny
from align.rollouts.transformers import TransformersEngine
from align.stage import EngineConfig, Runtime, StageContext
from align.stages import evaluate
from align.stages.evaluate import EvaluateConfig

PROMPTS = 6


@pytest.fixture
def inputs(tmp_path: Path, tiny_model: Path, tiny_reward: Path) -> dict:
    """Artifacts for every input: base and reference share their weights, the third checkpoint has others."""
    other = make_tiny(tmp_path / "ppo" / "model", seed=1)

    def artifact(stage: str, kind: Kind, model: Path | None = None) -> Artifact:
        folder = model.parent if model else tmp_path / stage
        folder.mkdir(exist_ok=True)
        return Artifact(stage, kind, folder, {"key": f"{stage}-key"})

    data, pairs = artifact("data", Kind.INSTRUCTIONS), artifact("sample", Kind.PREFERENCES)
    base = {"source": "words", "checks": ""}
    rows = [
        base | {"id": str(i), "prompt": [user("say " + "x" * i)], "completion": [assistant(f"ok {i}")]}
        for i in range(PROMPTS)
    ]
    rows.append(base | {"id": "long", "prompt": [user("x" * 300)], "completion": [assistant("no")]})
    write_rows(data.split("test"), rows)
    sides = {"chosen": [assistant("aaa")], "rejected": [assistant("b")], "chosen_score": 1.0, "rejected_score": 0.0}
    write_rows(pairs.split("test"), [base | {"id": str(i), "prompt": [user(f"q{i}")]} | sides for i in range(4)])
    policies = [
        artifact("model", Kind.MODEL, tiny_model),
        artifact("sft", Kind.POLICY, tiny_model),
        artifact("ppo", Kind.POLICY, other),
    ]
    return {
        "policies": policies,
        "reference": policies[1],
        "prompts": data,
        "heldout": data,
        "reward": artifact("reward", Kind.REWARD, tiny_reward),
        "pairs": pairs,
    }


@pytest.fixture
def context(tmp_path: Path, inputs: dict, monkeypatch: pytest.MonkeyPatch) -> StageContext:
    scorer = tmp_path / "scorer_of_this_test.py"
    scorer.write_text("def score(rows, responses): return [min(1.0, len(set(r)) / 9) for r in responses]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = EvaluateConfig(
        policies=["model", "sft", "ppo"],
        reference="sft",
        prompts="data",
        heldout="data",
        reward="reward",
        pairs="sample",
        score="scorer_of_this_test:score",
        samples_per_prompt=2,
        max_tokens=8,
        max_prompt_tokens=100,
        max_heldout_length=100,
        precision="float32",
        bootstrap=200,
    )
    for name in ("out", "checkpoints"):
        (tmp_path / name).mkdir()
    return StageContext(
        name="evaluate",
        config=config,
        inputs=inputs,
        seed=3,
        runtime=Runtime(device="cpu", engine=EngineConfig(name="transformers")),
        output=tmp_path / "out",
        checkpoints=tmp_path / "checkpoints",
        events=tmp_path / "events.jsonl",
    )


def test_everything_at_once_and_again_from_what_is_kept(context, monkeypatch):
    metrics = evaluate.run(context)
    text = (context.output / "scorecard.json").read_text(encoding="utf-8")
    card = json.loads(text)
    assert (card["reference"], card["base"], card["primary"]) == ("sft", "model", "gold")
    assert card["settings"]["prompts"] == metrics["prompts"] == PROMPTS  # the long one is left out
    assert set(card["metrics"]) == {"gold", "reward", "finished", "length", "kl", "kl_k3", "heldout_loss"}
    own = card["estimates"]
    # the same weights and the same randomness: same responses, no drift; other weights drift
    assert own["model"]["reward"] == own["sft"]["reward"]
    assert own["model"]["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert own["sft"]["kl"]["value"] == 0
    assert own["ppo"]["kl"]["value"] > 0.1
    assert own["ppo"]["kl_k3"]["value"] > 0.1
    assert own["ppo"]["heldout_loss"]["n"] == PROMPTS
    (model,) = card["reward_models"]
    assert (model["pairs"], model["stage"], model["task"]) == (4, "reward", "pairs")
    assert metrics["reward_accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    assert metrics["tokens"] > 0
    samples = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    assert [len(samples), len(samples[0]["responses"]["ppo"])] == [PROMPTS, 2]
    first, second = samples[0]["responses"]["ppo"]
    assert set(second) == {"text", "tokens", "finished", "gold", "reward", "kl"}
    assert len(first["token_kl"]) == first["tokens"]
    assert sum(nats for _, nats in first["token_kl"]) == pytest.approx(first["kl"], abs=1e-2)
    warnings = [line for line in context.events.read_text().splitlines() if '"warning"' in line]
    assert len(warnings) == 2  # the long prompt and the long held-out row

    def no_engine(*arguments, **options):
        raise AssertionError("an engine was opened although every response is kept")

    monkeypatch.setattr("align.rollouts.engine.open_engine", no_engine)
    monkeypatch.setattr("align.models.loading.load_policy", no_engine)
    monkeypatch.setattr("align.models.reward.RewardModel", no_engine)
    evaluate.run(context)
    assert (context.output / "scorecard.json").read_text(encoding="utf-8") == text


def test_an_empty_split_is_refused(context, inputs):
    write_rows(inputs["prompts"].split("test"), [])
    with pytest.raises(UserError, match="no rows"):
        evaluate.run(context)


def test_greedy_leaves_kl_out(context, inputs):
    changes = {"temperature": 0.0, "reward": None, "pairs": None, "heldout": None, "score": None}
    config = context.config.model_copy(update=changes)
    given = inputs | {"reward": None, "pairs": None, "heldout": None}
    evaluate.run(StageContext(**{**context.__dict__, "config": config, "inputs": given}))
    card = json.loads((context.output / "scorecard.json").read_text(encoding="utf-8"))
    assert set(card["metrics"]) == {"finished", "length"}
    assert card["reward_models"] == []


def test_responses_of_other_weights_are_noticed(context, monkeypatch):
    """An engine that goes on with the first checkpoint's weights: what a failed hand-over looks like."""
    monkeypatch.setattr(TransformersEngine, "load_weights", lambda self, weights: None)
    with pytest.raises(RuntimeError, match="not this checkpoint's"):
        evaluate.run(context)


def test_an_engine_that_hangs_ends_the_stage(context, monkeypatch):
    def end(message):
        raise SystemExit(message)

    monkeypatch.setattr(TransformersEngine, "generate", lambda engine, *given: engine.watchdog.on_hang("it hangs"))
    with pytest.raises(SystemExit, match="it hangs"):
        evaluate.run(replace(context, fail_at_once=end))
