"""What ``test_sigkill.py`` kills: eighty updates on the tiny model, from the last checkpoint if there is one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from align.models.loading import load_policy, load_reward, load_tokenizer
from align.ppo import PPOConfig, PPOTrainer
from align.ppo.checkpoint import last_checkpoint
from align.stage import LoraTuning
from tests.ppo.conftest import ROWS, make_engine, share_of_vowels

TIMED = ("seconds", "per_second", "peak_memory", "runtime")
HELD_OUT = [{"id": f"h{i}", "prompt": f"tell {'z' * i}"} for i in range(3)]


class Begun(TrainerCallback):
    """Leaves a file when training starts: from then on a kill hits the run and not its imports."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def on_train_begin(self, args, state, control, **kwargs):
        self.marker.write_text("begun")


def main(policy: Path, reward: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    trainer = PPOTrainer(
        model=load_policy(policy),
        args=PPOConfig(
            output_dir=str(folder / "run"),
            updates=80,
            rollout_batch=16,
            samples_per_prompt=4,
            max_tokens=12,
            num_epochs=2,
            num_mini_batches=2,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            normalise_scores=True,
            kl_controller="adaptive",
            kl_target=0.5,
            kl_horizon=200,
            eval_updates=5,
            keep="best",
            save_strategy="steps",
            save_total_limit=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            probe_parity=False,
            seed=3,
        ),
        train_dataset=ROWS,
        processing_class=load_tokenizer(policy),
        scorer=share_of_vowels,
        engine=make_engine(policy),
        reward_model=load_reward(reward),
        tuning=LoraTuning(rank=4, alpha=8),
        eval_dataset=HELD_OUT,
        callbacks=[Begun(folder / "begun")],
    )
    checkpoint = last_checkpoint(folder / "run")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = {name: p.detach().contiguous() for name, p in trainer.model.named_parameters() if p.requires_grad}
    save_file(weights, folder / "weights.safetensors")
    history = [
        {name: value for name, value in entry.items() if not any(word in name for word in TIMED)}
        for entry in trainer.state.log_history
        if "score" in entry or "eval_score" in entry
    ]
    (folder / "done.json").write_text(json.dumps({"history": history, "best": trainer.validation.best}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
