"""GRPO with and without ``select``, at equal tokens.

    python -m benchmarks.curriculum --seeds 3

The task is that of ``reward_hacking.py`` without loopholes: write the letters of the prompt as capitals. A response is
right if all letters are. Prompts have 2 to 12 letters. In the examples that the policy learns first, most letters after
the fifth are ``A``. So it solves short prompts always and the longest hardly ever, greedily as well, and has to learn
from the few samples that are right. Each run stops at the first update after ``--tokens`` sampled tokens. Its policy
then answers 256 new prompts greedily.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from align.inference.protocol import Sampling
from align.inference.transformers import TransformersEngine
from align.models.loading import load_policy, load_tokenizer
from align.rl import GrpoConfig, GRPOTrainer
from benchmarks.reward_hacking import LETTERS, OPTIONS, pretrain_on, prompt

SHORTEST = 2
LONGEST = 12
EASY = 5
"""Letters of a prompt that the policy copies from the start."""
WRONG = 0.6
"""Share of wrong letters after these in the examples."""
PROMPTS = 64
FIELDS: dict[str, Any] = {
    "rollout_batch": 64,
    "samples_per_prompt": 8,
    "micro_batch_size": 32,
    "num_mini_batches": 2,
    "max_tokens": 20,
    "learning_rate": 3e-4,
    "kl_coef": 0.01,
    "updates": 400,
    "rollouts": {"keep": 0.0},
}
SELECT = {"easy": 0.95, "hard": 0.05, "easy_share": 0.1, "hard_share": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "all prompts": {},
    "select": {"select": SELECT},
    "resample": {"zero_variance": "resample"},
    "select and resample": {"select": SELECT, "zero_variance": "resample"},
}


class StopAtTokens(TrainerCallback):  # type: ignore[misc]
    """Ends a run at the first update after a number of sampled tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the tokens of the last update."""
        entries = [entry for entry in state.log_history if "tokens" in entry]
        if entries and entries[-1]["tokens"] >= self.tokens:
            control.should_training_stop = True


def example(rng: random.Random) -> tuple[str, str]:
    """Return a supervised example, in which each letter after the fifth is wrong with ``WRONG``."""
    letters = "".join(rng.choices(LETTERS, k=rng.randint(SHORTEST, LONGEST)))
    answer = list(letters.upper())
    for place in range(EASY, len(answer)):
        if rng.random() < WRONG:
            answer[place] = "A"
    return prompt(letters), "".join(answer)


def rows_of(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Return prompts of all lengths."""
    rows = []
    for number in range(count):
        letters = "".join(rng.choices(LETTERS, k=rng.randint(SHORTEST, LONGEST)))
        turn = {"role": "user", "content": prompt(letters)}
        rows.append({"id": str(number), "letters": letters, "prompt": [turn]})
    return rows


def is_right(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[float]:
    """Return 1 for responses with all letters right."""
    return [float(text == row["letters"].upper()) for row, text in zip(rows, texts, strict=True)]


def run(model_dir: Path, fields: Mapping[str, Any], seed: int, tokens: int) -> tuple[float, float, int]:
    """Return the accuracy on new prompts, the mean score of the last five updates, and the number of updates."""
    engine = TransformersEngine(model_dir, device=torch.device("cpu"), dtype=torch.float32, batch_size=64)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=load_policy(model_dir),
            config=GrpoConfig.for_trainer(**FIELDS, **fields),
            options={**OPTIONS, "output_dir": folder, "seed": seed},
            train_dataset=rows_of(random.Random(seed), PROMPTS),
            processing_class=load_tokenizer(model_dir),
            scorer=is_right,
            engine=engine,
            callbacks=[StopAtTokens(tokens)],
        )
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "score" in entry]
    engine.load_weights(trainer.model.policy.state_dict().items())
    return accuracy(engine), statistics.fmean(entry["score"] for entry in entries[-5:]), len(entries)


def accuracy(engine: TransformersEngine) -> float:
    """Return the share of greedy answers to new prompts that are right."""
    rows = rows_of(random.Random(99), 256)
    prompts = []
    for row in rows:
        ids = engine.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        prompts.append(ids)
    responses = engine.generate(prompts, Sampling(n=1, temperature=0.0, max_tokens=20, seed=0))
    return statistics.fmean(is_right(rows, [row[0].text for row in responses]))


def main(arguments: Sequence[str]) -> None:
    """Run all variants with all seeds, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=30_000, help="sampled tokens of a run")
    options = parser.parse_args(arguments)
    lines = ["| | accuracy, greedy | each seed | score of the last updates | updates |", "| --- |" + " --- |" * 4]
    with tempfile.TemporaryDirectory() as folder:
        model_dir = pretrain_on(Path(folder) / "model", example, seed=0, steps=500)
        engine = TransformersEngine(model_dir, device=torch.device("cpu"), dtype=torch.float32, batch_size=64)
        lines.append(f"| before | {accuracy(engine):.3f} | | | |")
        for name, fields in VARIANTS.items():
            results = [run(model_dir, fields, seed, options.tokens) for seed in range(options.seeds)]
            each = ", ".join(f"{result[0]:.3f}" for result in results)
            score = statistics.fmean(result[1] for result in results)
            updates = statistics.fmean(result[2] for result in results)
            mean = statistics.fmean(result[0] for result in results)
            lines.append(f"| {name} | {mean:.3f} | {each} | {score:.2f} | {updates:.0f} |")
            sys.stdout.write(lines[-1] + "\n")
            sys.stdout.flush()
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
