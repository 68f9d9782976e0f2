"""A few steps of every stage that makes weights, from the two-layer model, and what the model said that it saved."""

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
from tests.stages import test_distill, test_merge, test_preference, test_pretrain, test_reward_objectives
from tests.support.training.harness import data_artifact
from tests.support.training.scored import SEPARATOR, artifact, scored, stepwise
from tests.training import test_packing, test_replay, test_unfreezing

IDS = torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(1))
LORA: dict[str, Any] = {"method": "lora", "rank": 8}
FULL: dict[str, Any] = {"method": "full"}
FEW: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2, "precision": "float32"}


@dataclasses.dataclass(frozen=True)
class Given:
    """Folders of models to start from."""

    policy: Path
    reward: Path
    teacher: Path


Way = Callable[[Path, Given], StageContext]
"""From a folder of one's own and what there is to a stage that is ready to run."""


def supervised(**fields: Any) -> Way:
    return lambda root, given: test_unfreezing.made("sft", root, given.policy, **{"tuning": FULL, **FEW, **fields})


def replaying(root: Path, given: Given) -> StageContext:
    return test_replay.replaying("sft", root, given.policy, **FEW)


def packed(root: Path, given: Given) -> StageContext:
    return test_packing.made(root, given.policy, packing=True, **FEW)


def pretrained(tuning: dict[str, Any]) -> Way:
    return lambda root, given: test_pretrain.made(root, given.policy, tuning=tuning, **FEW)


def distilled(tuning: dict[str, Any]) -> Way:
    return lambda root, given: test_distill.made(root, given.policy, given.teacher, tuning=tuning, **FEW)


def preferring(kind: str, tuning: dict[str, Any]) -> Way:
    fields = {**test_preference.KINDS[kind], **FEW, "tuning": tuning}
    return lambda root, given: test_preference.made(root, given.policy, kind, **fields)


def sampling(kind: str, tuning: dict[str, Any], **fields: Any) -> Way:
    """A stage that learns from what it samples, scored by the reward model."""

    def made(root: Path, given: Given) -> StageContext:
        inputs: dict[str, Any] = {"ptx": None}
        for field, source, model in (("policy", Kind.POLICY, given.policy), ("reward", Kind.REWARD, given.reward)):
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

    return made


def merged(method: str) -> Way:
    def made(root: Path, given: Given) -> StageContext:
        (root / "base").mkdir(parents=True)
        (root / "base" / "model").symlink_to(given.policy)
        folders = {name: test_merge.moved(given.policy, root / name / "model", seed) for seed, name in enumerate("ab")}
        folders["base"] = root / "base" / "model"
        return test_merge.context(root, folders, policies=["a", "b"], base="base", method=method)

    return made


POLICIES: dict[str, Way] = {
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
    **{kind: preferring(kind, FULL) for kind in test_preference.KINDS},
    **{f"{kind}-lora": preferring(kind, LORA) for kind in test_preference.KINDS},
    "ppo": sampling("ppo", FULL),
    "ppo-lora": sampling("ppo", LORA),
    "grpo-lora": sampling("grpo", LORA),
    "rloo-lora": sampling("rloo", LORA),
    "online_dpo-lora": sampling("online_dpo", LORA),
    "rejection-lora": sampling("rejection", LORA, truncated="learn"),  # the tiny model hardly ever ends
    "merge": merged("ties"),
    **{f"merge-{m}": merged(m) for m in ("linear", "slerp", "task_arithmetic", "dare_linear", "dare_ties", "warp")},
}
"""Every stage that makes a policy, by its kind and what is special about it. What only the loss tells apart is saved
alike, and is here once."""


def scoring(rows: str, tuning: dict[str, Any], **fields: Any) -> Way:
    def made(root: Path, given: Given) -> StageContext:
        data = {
            "pairs": lambda folder: data_artifact(folder, Kind.PREFERENCES, train=24, test=8),
            "scored": lambda folder: artifact(folder, Kind.INSTRUCTIONS, scored(24), scored(8, start=24)),
            "steps": lambda folder: artifact(folder, Kind.UNPAIRED, stepwise(24), stepwise(6, start=24)),
        }[rows](root / "data")
        return test_reward_objectives.made(root, given.policy, data, tuning=tuning, **FEW, **fields)

    return made


def merged_rewards(root: Path, given: Given) -> StageContext:
    folders = {name: test_merge.moved(given.reward, root / name / "model", seed) for seed, name in enumerate("ab")}
    return test_merge.context(root, folders, Kind.REWARD, rewards=["a", "b"])


REWARDS: dict[str, Way] = {
    "reward": scoring("pairs", FULL),
    "reward-lora": scoring("pairs", LORA),
    "reward-regression": scoring("scored", FULL, objective="regression"),
    "reward-process": scoring("steps", FULL, objective="process", steps={"separator": SEPARATOR}),
    "merge-rewards": merged_rewards,
}
"""Every stage that makes a reward model."""


@contextlib.contextmanager
def listening() -> Iterator[list[torch.Tensor]]:
    """What the models that stages save in here say to ``IDS`` just before: logits, or scores."""
    from align.rl import saving as ppo_saving
    from align.training import reload, saving

    heard: list[torch.Tensor] = []
    original = apply.save_tuned

    def save(model: Any, tokenizer: Any, out_dir: Path) -> None:
        training = model.training
        with torch.no_grad():
            heard.append(model.eval()(input_ids=IDS).logits.clone())
        model.train(training)
        original(model, tokenizer, out_dir)

    with pytest.MonkeyPatch.context() as patch:
        for module in (apply, saving, ppo_saving, reload):
            patch.setattr(module, "save_tuned", save)
        yield heard


def run(name: str, root: Path, given: Given) -> tuple[Path, torch.Tensor]:
    """The folder that a way saves, and what its model said before it was saved."""
    stage = (POLICIES | REWARDS)[name](root, given)
    with listening() as heard:
        STAGES[name.partition("-")[0]].runner()(stage)
    return stage.output / "model", heard[-1]
