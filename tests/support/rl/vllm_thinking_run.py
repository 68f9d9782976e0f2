"""A run of GRPO with vLLM whose thoughts are closed: ``python -m tests.support.rl.vllm_thinking_run POLICY FOLDER``.

It writes the metrics of its updates to ``FOLDER/logs.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from align.config.runtime import EngineConfig, Runtime
from align.config.tuning import LoraTuning
from align.inference.engine import open_engine
from align.models.loading import load_policy, load_tokenizer
from tests.support.rl.arguments import settings
from tests.support.rl.trainers import METHODS, options_in, share_of_vowels, updates

ROWS = [{"id": str(number), "prompt": f"say {'abc' * number}<think>\n"} for number in range(8)]
"""Prompts that open a thought, which a random model never closes."""


def main(policy: Path, folder: Path) -> None:
    """Train for two updates, with the check that engine and trainer agree before each."""
    runtime = Runtime(device="cpu", threads=1, engine=EngineConfig(name="vllm", cpu_kv_cache_gb=0.1))
    engine = open_engine(policy, runtime, precision="float32", max_length=128, seed=7, warn=print)
    trainer_class, config = METHODS["grpo"]
    fields = {"samples_per_prompt": 4, "max_tokens": 24, "thinking_budget": 6, "tuning": LoraTuning(rank=4, alpha=8)}
    fields |= {"probe_parity": True, "probe_updates": 1}
    trainer = trainer_class(
        model=load_policy(policy),
        **settings(config, **(options_in(folder) | fields)),
        train_dataset=ROWS,
        processing_class=load_tokenizer(policy),
        scorer=share_of_vowels,
        engine=engine,
    )
    trainer.train()
    engine.close()
    (folder / "logs.json").write_text(json.dumps(updates(trainer)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
