"""What ``test_memory.py`` runs in a process of its own: two PPO updates on a real model, and its peak memory.

    python -m tests.support.rl.memory_run MODEL FOLDER full|lora reward|policy|head

Responses are given instead of sampled, so that what is measured is the trainer and not an engine's kernels.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from align.capacity.memory import ppo_memory
from align.config.tuning import FullTuning, LoraTuning
from align.models.compute.model_types import read_architecture
from align.models.compute.precision import cast_frozen_to_bf16
from align.models.loading import load_policy, load_tokenizer, new_reward
from align.rl import PpoConfig, PPOTrainer
from tests.support.rl.arguments import settings
from tests.support.rl.distributed_run import FixedEngine
from tests.support.rl.trainers import share_of_vowels

BATCH, PROMPTS, TOKENS = 8, 2, 48


class LongAnswers(FixedEngine):
    """Responses of exactly TOKENS tokens."""

    def generate(self, prompts: Any, sampling: Any, on_progress: Any = None) -> Any:
        from align.inference.protocol import Response

        generator = torch.Generator().manual_seed(1)
        return [
            [
                Response(torch.randint(4, 250, (TOKENS,), generator=generator).tolist(), [-5.0] * TOKENS, False, "abc")
                for _ in range(sampling.n)
            ]
            for _ in prompts
        ]


def main(model_dir: Path, folder: Path, method: str, critic: Any) -> None:
    torch.ones(64, 64) @ torch.ones(64, 64)
    start = psutil.Process().memory_info().rss
    tuning = FullTuning() if method == "full" else LoraTuning()
    policy, reward = _owned(load_policy(model_dir)), _owned(new_reward(model_dir).requires_grad_(False))
    trainer = PPOTrainer(
        model=policy,
        **settings(
            PpoConfig,
            tuning=tuning,
            critic=critic,
            output_dir=str(folder / "run"),
            updates=2,
            rollout_batch=2 * BATCH,
            samples_per_prompt=BATCH // PROMPTS,
            max_tokens=TOKENS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-6,
            bf16=True,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            probe_parity=False,
        ),
        train_dataset=[{"prompt": f"a story about number {i}"} for i in range(4)],
        processing_class=load_tokenizer(model_dir),
        scorer=share_of_vowels,
        engine=LongAnswers(),
        reward_model=reward,
    )
    cast_frozen_to_bf16(reward.model)  # as the stage does
    sizes = read_architecture(model_dir / "config.json")
    tokens: list[int] = []
    pack = trainer.buffer.pack

    def counted_pack(*inputs: Any) -> Any:
        batch = pack(*inputs)
        tokens.append(int(batch["input_ids"].numel()))
        return batch

    trainer.buffer.pack = counted_pack
    # The count is of training. Setting up holds both models in float32 and their files' pages, as a stage does not.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM back to what is held now
    trainer.train()
    peak = _peak_memory() - start
    counted = replace(ppo_memory(sizes, [sizes], tuning=tuning, critic=critic, precision="bfloat16"), in_heap=True)
    assert counted.activations is not None
    total = counted.peak(max(tokens))
    print(json.dumps({"peak": peak, "counted": total, "tokens": max(tokens), "without activations": counted.total}))


def _peak_memory() -> int:
    """Return the peak resident memory of this process in bytes, since it was set back."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _owned(model: Any) -> Any:
    """The model in memory of its own: pages of a mapped file are counted, although the system may take them back."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
