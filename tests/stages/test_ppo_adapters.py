"""Stage ppo with bottlenecks and LLaMA-Adapter: the engine has a place for them, and gets their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.config.runtime import Runtime
from align.config.stages.policy_gradient import PpoConfig
from align.config.tuning import AdaptersTuning
from align.data.rows import user, write_rows
from align.models.chat.render import render_prompt
from align.models.loading import load_policy, load_tokenizer
from align.pipeline.context import StageContext
from align.stages.rl import run
from align.store.artifacts import Artifact, Kind
from tests.support.models.tuning.confident_model import saved
from tests.support.refusals import Refused

METHODS: dict[str, dict[str, Any]] = {
    "parallel": {"method": "adapters", "size": 16},
    "sequential": {"method": "adapters", "size": 16, "position": "sequential"},
    "llama_adapter": {"method": "adapters", "kind": "llama_adapter", "tokens": 4, "layers": 2},
}

SEQUENTIAL = AdaptersTuning(size=16, position="sequential")


def made(root: Path, policy: Path, reward: Path, tuning: dict[str, Any], **fields: Any) -> StageContext:
    for name, model in (("sft", policy), ("reward", reward)):
        (root / name).mkdir(parents=True, exist_ok=True)
        if not (root / name / "model").exists():
            (root / name / "model").symlink_to(model)
    (root / "data").mkdir(exist_ok=True)
    rows = [{"id": str(i), "source": "test", "prompt": [user(f"say {'x' * i}")], "checks": ""} for i in range(8)]
    write_rows(root / "data" / "train.parquet", rows)
    options = {"rollout_batch": 8, "updates": 2, "max_tokens": 6, "max_prompt_tokens": 64, "precision": "float32"}
    config = PpoConfig(policy="sft", prompts="data", reward="reward", learning_rate=1e-2, tuning=tuning,
                       **(options | fields))  # fmt: skip
    inputs = {
        "policy": Artifact("sft", Kind.POLICY, root / "sft", {}),
        "reward": Artifact("reward", Kind.REWARD, root / "reward", {}),
        "prompts": Artifact("data", Kind.PROMPTS, root / "data", {}),
        "ptx": None,
    }
    out, checkpoints = root / "out", root / "checkpoints"
    for folder in (out, checkpoints):
        folder.mkdir(exist_ok=True)
    runtime = Runtime(engine={"name": "transformers"}, threads=1, device="cpu")
    return StageContext("ppo", config, inputs, 5, runtime, out, checkpoints, root / "events.jsonl")


@pytest.mark.parametrize("method", METHODS)
def test_the_engine_samples_from_what_is_trained(
    method: str, tiny_model: Path, tiny_reward: Path, tmp_path: Path
) -> None:
    context = made(tmp_path, tiny_model, tiny_reward, METHODS[method])
    metrics = run(context)
    assert metrics["updates"] == 2
    # the second update's samples come from adapters that the first one moved: parity says the engine has them
    assert metrics["parity_gap_last"] < 1e-4
    assert abs(metrics["kl_last"]) > 1e-4  # k1 estimates may be negative
    folder = context.output / "model"
    assert load_policy(folder).config.intermediate_size == (144 if method == "parallel" else 128)
    frozen = load_file(tiny_model / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensors[n][tuple(map(slice, tensor.shape))], tensor) for n, tensor in frozen.items())
    ids = torch.tensor([render_prompt(load_tokenizer(folder), [user("say x")])])
    with torch.no_grad():
        moved = (load_policy(folder)(ids).logits - load_policy(tiny_model)(ids).logits).abs().max()
    assert moved > 1e-2


@pytest.mark.parametrize(
    "fields", [{}, {"trainer": {"reuse_forward": 1.0}}, {"precision": "bfloat16"}], ids=["plain", "reuse", "bfloat16"]
)
def test_a_policy_that_brings_its_adapter_is_trained_further(
    fields: dict[str, Any], tiny_model: Path, tiny_reward: Path, tmp_path: Path
) -> None:
    start = saved(tiny_model, SEQUENTIAL, tmp_path / "start" / "model")
    context = made(tmp_path / "run", start, tiny_reward, METHODS["sequential"], critic="policy", **fields)
    metrics = run(context)
    assert metrics["parity_gap_last"] < (0.1 if "precision" in fields else 1e-4)
    assert metrics["kl_first"] == pytest.approx(0, abs=1e-4)  # the reference has the adapter as it came
    assert abs(metrics["kl_last"]) > 1e-3  # and not as it is now
    before, after = (
        load_file(entry / "adapter" / "adapter.safetensors") for entry in (start, context.output / "model")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "prefix"])
def test_virtual_tokens_are_refused_by_name(refused: Refused, method: str) -> None:
    refused(PpoConfig, policy="sft", prompts="data", score="gold", learning_rate=0.001, tuning={"method": method})


def test_a_critic_on_such_a_policy_has_an_adapter_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    from align.models.tuning.apply import apply_tuning, load_for_tuning
    from align.models.tuning.inserted import inserted_weights
    from align.rl.model import critic_from_policy

    start = saved(tiny_model, SEQUENTIAL, tmp_path / "start" / "model")
    policy = load_for_tuning(start, SEQUENTIAL)
    critic = critic_from_policy(policy, SEQUENTIAL, seed=1)
    policy = apply_tuning(policy, SEQUENTIAL, seed=1)
    ours = {tensor.data_ptr() for tensor in inserted_weights(policy).values()}
    theirs = {tensor.data_ptr() for tensor in inserted_weights(critic.trunk).values()}
    assert len(ours) == len(theirs) == 8
    assert not ours & theirs
    shared = policy.model.layers[0].mlp.up_proj.weight, critic.trunk.layers[0].mlp.up_proj.weight  # type: ignore[union-attr]
    assert shared[0].data_ptr() == shared[1].data_ptr()


def test_the_note_before_the_first_step_counts_them(tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> None:
    context = made(tmp_path, tiny_model, tiny_reward, METHODS["parallel"], updates=1)
    run(context)
    notes = [line for line in context.events.read_text().splitlines() if '"note"' in line]
    assert len(notes) == 1
    assert "bottleneck 16 parallel" in notes[0]
