"""The ppo stage: its config, its run on a two-layer model, and a run that was killed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from align.config.runtime import Runtime
from align.config.stages.policy_gradient import PpoConfig
from align.data.rows import assistant, user, write_rows
from align.models.loading import load_reward, load_tokenizer
from align.models.reward import RewardModel
from align.pipeline.context import StageContext
from align.pipeline.stop_signal import CAN_STOP, clear_request, request_stop
from align.rl.checkpoint import DRAFT
from align.scoring.models import RewardScorer
from align.stages.rl import _make_scorer, _open_parts, _read_prompts, run
from align.stages.update_reports import ReportUpdates
from align.store.artifacts import Artifact, Kind
from tests.support.stored_rollouts import stored_rows
from tests.support.training.harness import events

BASE = {"policy": "sft", "prompts": "data", "learning_rate": 1e-3, "score_validation": {"rows": 0}}


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"score": "gold", "critic": "reward"},
        {"score": "gold", "rollout_batch": 10},
        {"score": "gold", "num_mini_batches": 3},
        {"score": "gold", "micro_batch_size": 24},
        {"score": "gold", "rollout_batch": 4, "whiten_rewards": True},
        {"score": "gold", "tuning": {"method": "lora", "dropout": 0.1}},
        {"score": "gold", "trainer": {"kl_coef": 0.1}},
        {"score": "gold", "trainer": {"adam_bta2": 0.9}},
        {"score": "gold", "trainer": {"bf16": True}},
        {"score": "gold", "kl_coef": -1},
        {"reward": []},
        {"score": "gold", "keep": "best"},
        {"score": "gold", "keep": "best_gold", "eval_updates": 2},
        {"score": "gold", "keep_kl": 3.0},
        {"score": "gold", "ptx": "data"},
        {"score": "gold", "ptx_coef": 0.5},
        {"score": "gold", "kl_controller": "adaptive", "kl_horizon": 63},
        {"score": "gold", "kl_controller": "adaptive", "kl_coef": 0},
        {"score": "gold", "ensemble": "minimum"},
        {"reward": ["reward"], "ensemble": "uncertainty"},
        {"score": "gold", "critic_warmup_updates": 3, "updates": 3},
        {"score": "gold", "kl_estimator": "k3"},
        {"score": "gold", "kl_in": "loss", "kl_estimator": "k1"},
    ],
)
def test_wrong_configs_are_refused_with_a_remedy(refused, inputs):
    refused(PpoConfig, **BASE, **inputs)


def test_defaults_follow_from_what_is_given():
    assert PpoConfig(**BASE, score="gold").critic_source == "policy"
    assert PpoConfig(**BASE, reward="reward").critic_source == "reward"
    assert PpoConfig(**BASE, reward="reward", critic="policy").critic_source == "policy"
    assert PpoConfig(**BASE, score="gold", rollout_batch=48, num_mini_batches=2).micro_batch == 12


def test_scoring_functions_are_part_of_the_identity(refused, tmp_path):
    assert PpoConfig(**BASE, reward="reward").identities(tmp_path) == {}
    identities = PpoConfig(**BASE, score="gold", gold="gsm8k_answer").identities(tmp_path)
    assert set(identities) == {"score", "gold"}
    refused(lambda: PpoConfig(**BASE, score="gild").identities(tmp_path))


@pytest.fixture
def make_context(tmp_path, tiny_model, tiny_reward):
    """A context whose inputs are the tiny models and eight prompts."""
    for name, model in (("sft", tiny_model), ("reward", tiny_reward)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(model)
    (tmp_path / "data").mkdir()
    checks = json.dumps({"answer": "72"})
    rows = [
        {"id": str(i), "source": "test", "prompt": [user(f"say {'x' * i}")], "checks": checks}
        | {"completion": [assistant("x" * i + "!")]}
        for i in range(8)
    ]
    write_rows(tmp_path / "data" / "train.parquet", rows)
    write_rows(tmp_path / "data" / "test.parquet", rows[:4])
    kinds = {"policy": ("sft", Kind.POLICY), "reward": ("reward", Kind.REWARD)}
    kinds |= dict.fromkeys(("prompts", "ptx"), ("data", Kind.INSTRUCTIONS))

    def make(attempt: str, **values) -> StageContext:
        options = {
            **BASE,
            "rollout_batch": 8,
            "updates": 2,
            "max_tokens": 6,
            "max_prompt_tokens": 64,
            "precision": "float32",
        }
        config = PpoConfig(**(options | values))
        inputs = {
            field: Artifact(stage, kind, tmp_path / stage, {}) if getattr(config, field) else None
            for field, (stage, kind) in kinds.items()
        }
        if isinstance(config.reward, list):
            inputs["reward"] = [inputs["reward"] for _ in config.reward]
        folder = tmp_path / attempt
        for name in ("out", "checkpoints"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        runtime = Runtime(engine={"name": "transformers"}, threads=1)
        return StageContext(
            "ppo", config, inputs, 5, runtime, folder / "out", folder / "checkpoints", folder / "events.jsonl"
        )

    return make


LORA = {"method": "lora", "rank": 4, "alpha": 8}


def test_run_trains_on_a_reward_model_and_reports_every_update(make_context):
    context = make_context("run", reward="reward", gold="gsm8k_answer", tuning=LORA)
    metrics = run(context)
    assert json.loads(json.dumps(metrics))["updates"] == 2
    assert metrics["episodes"] == 16 and metrics["engine"] == "transformers"
    assert metrics["kl_first"] >= 0 and metrics["parity_gap_last"] < 1e-4
    assert metrics["gold_last"] == 0.0
    adapters = 4 * 2 * (4 * 128 + 3 * 192)  # rank x layers x (attention's and the MLP's matrices, inputs + outputs)
    trained = adapters, adapters + 64 + 1  # the critic has a head with a bias
    assert (metrics["trainable_parameters"], metrics["trainable_parameters_critic"]) == trained
    references, output = events(context, "note")
    assert references["message"].startswith("ppo: the reference answers of") and "reference_score" in metrics
    assert f"{adapters:,} of {metrics['parameters']:,} parameters are trained" in output["message"]
    points = events(context, "metrics")
    assert [point["step"] for point in points] == [1, 2]
    assert {"score", "gold", "kl", "entropy", "explained_variance"} <= points[0].keys()
    assert events(context, "progress")[-1]["done"] == 2
    assert (context.output / "model" / "model.safetensors").is_file()
    assert (context.output / "adapter" / "adapter_config.json").is_file()


def test_scores_of_steps_are_placed_and_recorded(make_context):
    entry = {"function": "tests.support.rewards:score_pieces", "steps": "e"}
    context = make_context("run", score=[entry, {"function": "gsm8k_answer"}], tuning=LORA)
    metrics = run(context)
    assert metrics["score_score_pieces_last"] > 0
    rows = stored_rows(context.output / "rollouts")
    assert len(rows) == 16
    for row in rows:
        pieces = [len(piece.strip()) for piece in row["response"].split("e") if piece.strip()]
        assert row["scores"]["score_pieces_steps"] == len(pieces)
        assert row["score"] == sum(pieces) == sum(row["step_rewards"])
    replayed = make_context("replayed", score=[entry], tuning=LORA, replay={"folder": str(context.output / "rollouts")})
    run(replayed)
    weights = [load_file(each.output / "model" / "model.safetensors") for each in (context, replayed)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_phases_of_an_update_have_counts(make_context, monkeypatch):
    monkeypatch.setattr("align.pipeline.context.PROGRESS_SECONDS", 0.0)
    context = make_context("run", score="gsm8k_answer", updates=1, eval_updates=1)
    run(context)
    phases = [event["text"] for event in events(context, "phase")]
    assert {"sampling 8/8", "validating 4/4"} <= set(phases)
    assert phases.index("validating 4/4") < phases.index("sampling 8/8") < phases.index("learning 1/1")


def test_an_ensemble_supervised_text_and_the_best_policy_kept(make_context):
    context = make_context(
        "run",
        reward=["reward", "reward"],
        ensemble="uncertainty",
        score="gsm8k_answer",
        critic="head",
        ptx="data",
        ptx_coef=0.1,
        eval_updates=1,
        eval_prompts=3,
        keep="best",
        tuning=LORA,
    )
    metrics = run(context)
    points = events(context, "metrics")
    assert [point["step"] for point in points if "validation_score" in point] == [0, 1, 2]
    assert not any("test_score" in point for point in points)
    trained = [point for point in points if "score" in point]
    assert {"score_reward", "score_reward_spread", "score_function", "ptx_loss"} <= trained[0].keys()
    assert trained[0]["score_reward_spread"] == 0.0  # the same model twice
    best = max((point for point in points if "validation_score" in point), key=lambda point: point["validation_score"])
    assert (metrics["kept"]["update"], metrics["kept"]["score"]) == (best["step"], best["validation_score"])
    rows = stored_rows(context.output / "rollouts")
    assert {row["update"] for row in rows} == {1, 2} and len(rows) == metrics["episodes"]
    assert {"reward", "reward_spread", "function"} <= rows[0]["scores"].keys()


def test_prompts_that_choose_the_policy_are_held_back_from_train(make_context, tmp_path):
    tested = [{"id": f"t{i}", "source": "test", "prompt": [user(f"shout {i}")], "checks": ""} for i in range(4)]
    write_rows(tmp_path / "data" / "test.parquet", tested)
    fields = {"score": "gold", "eval_updates": 1, "eval_prompts": 1}
    rows, validation = _read_prompts(make_context("best", keep="best", **fields))
    assert len(validation) == 1 and len(rows) == 7
    observations = {row["id"] for row in [*rows, *validation]}
    assert observations == {str(i) for i in range(8)}
    rows, validation = _read_prompts(make_context("few", keep="best", max_prompts=2, **fields))
    assert (len(rows), len(validation)) == (2, 1)
    rows, monitored = _read_prompts(make_context("last", **fields))
    assert len(rows) == 8 and monitored[0]["id"] == "t0"  # looked at, and nothing chosen
    assert _read_prompts(make_context("none", score="gold"))[1] is None


def test_run_on_a_verifiable_function_alone(make_context):
    metrics = run(make_context("run", score="gsm8k_answer", updates=1))
    assert metrics["score_last"] == 0.0
    assert metrics["trainable_parameters"] == metrics["parameters"]  # the policy's alone: no reference, no critic


def test_scores_of_model_and_function_have_configured_weights(make_context):
    fields = {"reward": "reward", "reward_weight": 0.5}
    context = make_context("one", **fields, score="gsm8k_answer", score_weight=2.0)
    scorer = _make_scorer(context, [object()], _open_parts(context))
    assert [(part.name, part.weight) for part in scorer.parts] == [("reward", 0.5), ("function", 2.0)]
    score = [{"function": "gsm8k_answer", "weight": 3.0}, {"function": "gold"}]
    context = make_context("list", **fields, score=score)
    scorer = _make_scorer(context, [object()], _open_parts(context))
    weights = [(part.name, part.weight) for part in scorer.parts]
    assert weights == [("reward", 0.5), ("gsm8k_answer", 3.0), ("gold", 1.0)]
    assert scorer.names == ["reward", "gsm8k_answer", "gold"]


class Killed(BaseException):
    """As abrupt as a signal: nothing catches it."""


def test_a_killed_stage_goes_on_to_the_same_weights(make_context, monkeypatch):
    settings = {"reward": "reward", "tuning": LORA, "updates": 4, "scheduler": "linear", "num_mini_batches": 2}
    uninterrupted, killed = make_context("whole", **settings), make_context("killed", **settings)
    expected = run(uninterrupted)

    def kill(self, args, state, control, **kwargs):
        if state.global_step == 5:  # in the middle of the third update
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ReportUpdates, "on_step_begin", kill)
        with pytest.raises(Killed):
            run(killed)
    assert not (killed.output / "model").exists()
    shutil.copytree(killed.checkpoints / "checkpoint-4", killed.checkpoints / DRAFT / "checkpoint-6")  # half written
    result = run(killed)
    assert [point["step"] for point in events(killed, "metrics")] == [1, 2, 3, 4]
    weights = [load_file(context.output / "model" / "model.safetensors") for context in (uninterrupted, killed)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    for name in ("score_first", "score_last", "kl_last", "episodes", "tokens"):
        assert result[name] == expected[name]


def test_stopped_stage_saves_its_update_and_resumes_exactly(refused, make_context, monkeypatch):
    settings = {"reward": "reward", "tuning": LORA, "updates": 4, "num_mini_batches": 2, "save_updates": 100}
    uninterrupted, parts = make_context("whole", **settings), make_context("parts", **settings)
    run(uninterrupted)

    def ask(self, args, state, control, **kwargs):
        if state.global_step == 3:  # the first of the second update's two steps
            request_stop(parts.events.parent)

    with monkeypatch.context() as patch:
        patch.setattr(ReportUpdates, "on_step_end", ask)
        refused(run, parts)
    assert [folder.name for folder in parts.checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]
    assert len(events(parts, CAN_STOP)) == 1
    clear_request(parts.events.parent)
    run(parts)
    assert [point["step"] for point in events(parts, "metrics")] == [1, 2, 3, 4]
    weights = [load_file(context.output / "model" / "model.safetensors") for context in (uninterrupted, parts)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def another_reward(tiny_reward, tmp_path):
    """The tiny reward model with a chat template of its own, and a vocabulary in which two letters changed places."""
    folder = tmp_path / "another"
    shutil.copytree(tiny_reward, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_reward_model_of_another_family_has_its_own_template(another_reward, tiny_model):
    rows = [{"prompt": [user("name a cat")]}, {"prompt": [user("and?")]}]
    model = RewardModel(another_reward, precision="float32")
    scores = RewardScorer.of(model).score(rows, ["Bea", "Eva"], [False, True]).total
    tokenizer = model.tokenizer
    texts = [f"[INST]name a cat[/INST]Bea{tokenizer.eos_token}", "[INST]and?[/INST]Eva"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert ids[0] != load_tokenizer(tiny_model)(texts[0], add_special_tokens=False)["input_ids"]
    model = load_reward(another_reward)
    expected = [model(torch.tensor([tokens])).logits.item() for tokens in ids]
    assert scores == pytest.approx(expected, abs=1e-5)


def test_it_trains_a_policy_but_is_no_critic_for_it(refused, make_context, another_reward, tmp_path):
    context = make_context("run", reward="reward", critic="policy", updates=1)
    (tmp_path / "reward" / "model").unlink()
    (tmp_path / "reward" / "model").symlink_to(another_reward)
    assert run(context)["updates"] == 1
    refused(lambda: run(make_context("refused", reward="reward", critic="reward")))
