"""Updates on episodes of the tiny model from the last checkpoint; ``test_sigkill.py`` kills them.

``python -m tests.support.rl.killed_episodes MODEL FOLDER`` runs it with the transformers sampler.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from align.config.environment import EnvironmentConfig
from align.config.tuning import LoraTuning
from align.environments.player import EnvironmentPlayer
from align.environments.sources import open_environment
from align.models.loading import load_policy, load_tokenizer
from align.rl import PpoConfig, PPOTrainer
from align.rl.checkpoint import last_checkpoint
from tests.support.environments.buttons import FORMAT
from tests.support.rl.arguments import settings
from tests.support.rl.killed_run import FIELDS, TIMED, Lives
from tests.support.rl.trainers import make_engine

ROWS = [{"id": str(i), "prompt": [{"role": "user", "content": "go"}]} for i in range(8)]
UPDATES = 40


def main(model: Path, folder: Path) -> None:
    """Train to the end; leave metrics and weights in ``folder``, and the presses of all lives in ``presses``."""
    torch.set_num_threads(1)
    config = EnvironmentConfig.model_validate(
        {
            "class": "tests.support.environments.buttons:SavedButtons",
            "arguments": {"log": str(folder / "presses")},
            "tool_format": FORMAT,
            "max_turns": 3,
            "max_tokens": 60,
            "turn_max_tokens": 8,
        }
    )
    tokenizer = load_tokenizer(model)
    fields = FIELDS | {"tuning": LoraTuning(rank=4, alpha=8), "max_tokens": 60, "eval_updates": None, "keep": "last"}
    trainer = PPOTrainer(
        model=load_policy(model),
        **settings(PpoConfig, output_dir=str(folder / "run"), updates=UPDATES, **fields),
        train_dataset=ROWS,
        processing_class=tokenizer,
        scorer=None,
        engine=make_engine(model),
        episodes=EnvironmentPlayer(config, open_environment(config), tokenizer, 64, "test"),
        callbacks=[Lives(folder / "begun", 0)],
    )
    checkpoint = last_checkpoint(folder / "run")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = {name: p.detach().contiguous() for name, p in trainer.model.named_parameters() if p.requires_grad}
    save_file(weights, folder / "weights.safetensors")
    history = [
        {name: value for name, value in entry.items() if not any(word in name for word in TIMED)}
        for entry in trainer.state.log_history
        if "score" in entry
    ]
    (folder / "done.json").write_text(json.dumps(history))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
