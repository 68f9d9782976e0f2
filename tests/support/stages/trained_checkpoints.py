"""Checkpoints of every stage that makes weights, after a few steps, with the outputs of the live models."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.runtime import Runtime
from align.data.rows import user, write_rows
from align.models.tuning import apply
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind
from tests.support.stages.stage_contexts import (
    PREFERENCE_KINDS,
    distill_stage,
    merge_stage,
    perturbed_copy,
    preference_stage,
    pretrain_stage,
    reward_stage,
)
from tests.support.training import sft_setup, training_stages
from tests.support.training.harness import data_artifact
from tests.support.training.scored_rows import SEPARATOR, artifact, scored, stepwise

IDS = torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(1))
LORA: dict[str, Any] = {"method": "lora", "rank": 8}
FULL: dict[str, Any] = {"method": "full"}
FEW: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2, "precision": "float32"}


@dataclasses.dataclass(frozen=True)
class BaseModels:
    """Folders of models to start from."""

    policy: Path
    reward: Path
    teacher: Path


MakeStage = Callable[[Path, BaseModels], StageContext]
"""From a folder and the models to start from to a stage that is ready to run."""


def supervised(**fields: Any) -> MakeStage:
    return lambda root, models: training_stages.make_stage(
        "sft", root, models.policy, **{"tuning": FULL, **FEW, **fields}
    )


def replaying(root: Path, models: BaseModels) -> StageContext:
    return training_stages.make_replay_stage("sft", root, models.policy, **FEW)


def packed(root: Path, models: BaseModels) -> StageContext:
    return sft_setup.make_packing_stage(root, models.policy, packing=True, **FEW)


def pretrained(tuning: dict[str, Any]) -> MakeStage:
    return lambda root, models: pretrain_stage(root, models.policy, tuning=tuning, **FEW)


def distilled(tuning: dict[str, Any]) -> MakeStage:
    return lambda root, models: distill_stage(root, models.policy, models.teacher, tuning=tuning, **FEW)


def preferring(kind: str, tuning: dict[str, Any]) -> MakeStage:
    fields = {**PREFERENCE_KINDS[kind], **FEW, "tuning": tuning}
    return lambda root, models: preference_stage(root, models.policy, kind, **fields)


def sampling(kind: str, tuning: dict[str, Any], **fields: Any) -> MakeStage:
    """Make a stage that trains on its own samples, scored by the reward model."""

    def make(root: Path, models: BaseModels) -> StageContext:
        inputs: dict[str, Any] = {"ptx": None}
        for field, source, model in (("policy", Kind.POLICY, models.policy), ("reward", Kind.REWARD, models.reward)):
            (root / field).mkdir(parents=True)
            (root / field / "model").symlink_to(model)
            inputs[field] = Artifact(field, source, root / field, {})
        prompts = root / "prompts"
        prompts.mkdir()
        rows = [{"id": str(i), "source": "test", "prompt": [user(f"say {'x' * i}")], "checks": ""} for i in range(8)]
        write_rows(prompts / "train.parquet", rows)
        inputs["prompts"] = Artifact("prompts", Kind.PROMPTS, prompts, {})
        options: dict[str, Any] = {"rollout_batch": 16, "samples_per_prompt": 4, "updates": 3, "max_tokens": 6}
        options |= {"max_prompt_tokens": 64, "precision": "float32", "learning_rate": 1e-2, "reward_floor": None}
        names = {"policy": "policy", "reward": "reward", "prompts": "prompts", "tuning": tuning}
        config = STAGES[kind].config_class()(**names, **(options | fields))
        for folder in ("output", "checkpoints"):
            (root / folder).mkdir()
        runtime = Runtime(engine={"name": "transformers"}, threads=1, device="cpu")  # type: ignore[arg-type]
        return StageContext(kind, config, inputs, 5, runtime, root / "output", root / "checkpoints", root / "events")

    return make


def merged(method: str) -> MakeStage:
    def make(root: Path, models: BaseModels) -> StageContext:
        (root / "base").mkdir(parents=True)
        (root / "base" / "model").symlink_to(models.policy)
        folders = {name: perturbed_copy(models.policy, root / name / "model", seed) for seed, name in enumerate("ab")}
        folders["base"] = root / "base" / "model"
        return merge_stage(root, folders, policies=["a", "b"], base="base", method=method)

    return make


POLICIES: dict[str, MakeStage] = {
    "sft": supervised(),
    "sft-lora": supervised(tuning=LORA),
    "sft-unfreeze": supervised(tuning={**FULL, "unfreeze": {"at": {0: 1, 2: 2}, "head": True}, "layer_decay": 0.8}),
    "sft-lisa": supervised(tuning={**FULL, "lisa": {"layers": 1, "every": 3}, "freeze": ["*norm*"]}),
    "sft-decay": supervised(tuning={**FULL, "layer_decay": 0.5, "freeze": ["model.embed_tokens"]}),
    "sft-ema": supervised(ema=0.5, anchor={"to": "kl", "weight": 0.1}),
    "sft-replay": replaying,
    "sft-packed": packed,
    "pretrain": pretrained(FULL),
    "pretrain-lora": pretrained(LORA),
    "distill": distilled(FULL),
    "distill-lora": distilled(LORA),
    **{kind: preferring(kind, FULL) for kind in PREFERENCE_KINDS},
    **{f"{kind}-lora": preferring(kind, LORA) for kind in PREFERENCE_KINDS},
    "ppo": sampling("ppo", FULL),
    "ppo-lora": sampling("ppo", LORA),
    "grpo-lora": sampling("grpo", LORA),
    "rloo-lora": sampling("rloo", LORA),
    "online_dpo-lora": sampling("online_dpo", LORA),
    "rejection-lora": sampling("rejection", LORA, truncated="learn"),  # the tiny model hardly ever ends
    "merge": merged("ties"),
    **{f"merge-{m}": merged(m) for m in ("linear", "slerp", "task_arithmetic", "dare_linear", "dare_ties", "warp")},
}
"""Every stage that makes a policy, by its kind and variant. Variants that differ only in the loss are here once."""


def scoring(rows: str, tuning: dict[str, Any], **fields: Any) -> MakeStage:
    def make(root: Path, models: BaseModels) -> StageContext:
        data = {
            "pairs": lambda folder: data_artifact(folder, Kind.PREFERENCES, train=24, test=8),
            "scored": lambda folder: artifact(folder, Kind.INSTRUCTIONS, scored(24), scored(8, start=24)),
            "steps": lambda folder: artifact(folder, Kind.UNPAIRED, stepwise(24), stepwise(6, start=24)),
        }[rows](root / "data")
        return reward_stage(root, models.policy, data, tuning=tuning, **FEW, **fields)

    return make


def merged_rewards(root: Path, models: BaseModels) -> StageContext:
    folders = {name: perturbed_copy(models.reward, root / name / "model", seed) for seed, name in enumerate("ab")}
    return merge_stage(root, folders, Kind.REWARD, rewards=["a", "b"])


REWARDS: dict[str, MakeStage] = {
    "reward": scoring("pairs", FULL),
    "reward-lora": scoring("pairs", LORA),
    "reward-regression": scoring("scored", FULL, objective="regression"),
    "reward-process": scoring("steps", FULL, objective="process", steps={"separator": SEPARATOR}),
    "merge-rewards": merged_rewards,
}
"""Every stage that makes a reward model."""


@contextlib.contextmanager
def recorded_outputs() -> Iterator[list[torch.Tensor]]:
    """Record the logits or scores for ``IDS`` of every model just before a stage saves it."""
    from align.rl import checkpoint
    from align.training import save as training_save

    outputs: list[torch.Tensor] = []
    original = apply.save_tuned

    def save(model: Any, tokenizer: Any, out_dir: Path) -> None:
        training = model.training
        with torch.no_grad():
            outputs.append(model.eval()(input_ids=IDS).logits.clone())
        model.train(training)
        original(model, tokenizer, out_dir)

    with pytest.MonkeyPatch.context() as patch:
        for module in (apply, checkpoint, training_save):
            patch.setattr(module, "save_tuned", save)
        yield outputs


def run(name: str, root: Path, models: BaseModels) -> tuple[Path, torch.Tensor]:
    """Run a stage; return the saved folder, and the outputs of the live model."""
    stage = (POLICIES | REWARDS)[name](root, models)
    with recorded_outputs() as outputs:
        STAGES[name.partition("-")[0]].runner()(stage)
    return stage.output / "model", outputs[-1]
