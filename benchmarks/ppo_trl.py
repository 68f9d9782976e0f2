"""trl's side of ``ppo_vs_trl``: its PPO trainer on given work, in trl's own environment.

    python -m benchmarks.ppo_trl WORK OUT --method full   (called by ppo_vs_trl)

Its code runs unchanged. Around it: the batches come in the given order; a clock reads the time when its functions are
called; and a response is cut to the length the work gives it. trl decodes to the last step whatever the rows do, as it
always does while one of them has not ended, so cutting changes nothing of its cost.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEARNING_RATE = {"full": 1e-6, "lora": 1e-4}


class Clock:
    """Seconds of each update by phase.

    sampling: ``batch_generation``. scoring: ``get_reward`` on the reward model. learning: from the first forward pass
    with gradients to the end of the update. measuring: what is between sampling and learning, scoring taken out.
    """

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []
        self._began = time.perf_counter()
        self._sampled = self._learning = 0.0
        self._phases: dict[str, float] = {}

    def sampling(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Time ``batch_generation``."""

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            self._sampled, self._learning = time.perf_counter(), 0.0
            self._phases = {"sampling": self._sampled - start, "scoring": 0.0}
            return result

        return timed

    def scoring(self, function: Callable[..., Any], reward_model: Any) -> Callable[..., Any]:
        """Time ``get_reward``, which trl calls with the critic too: that is measuring."""

        def timed(model: Any, *args: Any) -> Any:
            start = time.perf_counter()
            result = function(model, *args)
            if model is reward_model:
                self._phases["scoring"] += time.perf_counter() - start
            return result

        return timed

    def learning(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Mark the first call of ``forward`` with gradients."""
        import torch

        def marked(*args: Any) -> Any:
            if torch.is_grad_enabled() and not self._learning:
                self._learning = time.perf_counter()
            return function(*args)

        return marked

    def begin(self) -> None:
        """Begin the first update."""
        self._began = time.perf_counter()

    def end(self, **counts: float) -> None:
        """End an update, and begin the next one."""
        now = time.perf_counter()
        self._phases["measuring"] = self._learning - self._sampled - self._phases["scoring"]
        self._phases["learning"] = now - self._learning
        self.updates.append({**self._phases, "seconds": now - self._began, **counts})
        self._began = now


class Cutter:
    """Wrapper of ``generate``: ends each response where the work says, and counts real tokens."""

    def __init__(self, lengths: list[list[int]], end: int) -> None:
        self._lengths = iter([length for update in lengths for length in update])
        self._end = end
        self.prompt_tokens = self.response_tokens = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``generate`` with pads after each response's end; a pad that was sampled would end it early."""
        import torch

        def generate(policy: Any, queries: Any, pad: int, config: Any) -> Any:
            both, logits = function(policy, queries, pad, config)
            new = both[:, queries.shape[1] :]
            new = new.masked_fill(new == pad, self._end)
            lengths = torch.tensor([next(self._lengths) for _ in range(len(new))])
            new = new.masked_fill(torch.arange(new.shape[1]) >= lengths[:, None], pad)
            self.prompt_tokens += int((queries != pad).sum())
            self.response_tokens += int((new != pad).sum())
            return torch.cat([queries, new], dim=1), logits

        return generate

    def take(self) -> dict[str, int]:
        """Tokens since the last call."""
        counts = {"prompt_tokens": self.prompt_tokens, "response_tokens": self.response_tokens}
        self.prompt_tokens = self.response_tokens = 0
        return counts


def load_models(work: dict[str, Any], method: str, weights: str) -> dict[str, Any]:
    """Policy, reference, reward model and critic; with LoRA trl's reference is the policy with its adapter off.

    ``weights`` is the type of those that are trained, frozen ones are always bfloat16: trl runs a model that it does
    not train in its own type.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    trained = getattr(torch, weights)

    def causal(dtype: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype)

    def scoring(dtype: Any) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(work["reward"], num_labels=1, dtype=dtype)

    return {
        "model": causal(trained),
        "ref_model": causal(torch.bfloat16) if method == "full" else None,
        "reward_model": scoring(torch.bfloat16),
        "value_model": scoring(trained),
    }


def make_trainer(work: dict[str, Any], method: str, weights: str, folder: str) -> Any:
    """trl's trainer, its data in the order of the work."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    shape = work["shape"]
    tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left")
    options: dict[str, Any] = {"output_dir": folder, "use_cpu": True, "bf16": True, "gradient_checkpointing": False}
    options |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "num_sample_generations": 0}
    if method == "lora":
        from peft import LoraConfig

        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = PPOTrainer(
        args=PPOConfig(
            **options,
            seed=shape["seed"],
            learning_rate=LEARNING_RATE[method],
            response_length=shape["tokens"],
            temperature=1.0,
            num_ppo_epochs=1,
            num_mini_batches=1,
            per_device_train_batch_size=shape["micro_batch"],
            gradient_accumulation_steps=shape["batch"] // shape["micro_batch"],
            total_episodes=shape["batch"] * shape["updates"],
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": [ids for batch in work["prompts"] for ids in batch]}),
        peft_config=lora if method == "lora" else None,
        **load_models(work, method, weights),
    )
    trainer.dataloader = [tokenizer.pad({"input_ids": batch}, return_tensors="pt") for batch in work["prompts"]]
    return trainer


def measure(work: dict[str, Any], method: str, weights: str) -> dict[str, Any]:
    """Run all updates; seconds and tokens of each, and the peak memory of this process in GiB."""
    from transformers import TrainerCallback
    from trl.experimental.ppo import ppo_trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(work, method, weights, folder)
        clock, cutter = Clock(), Cutter(work["lengths"], trainer.processing_class.eos_token_id)

        class Updates(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                clock.begin()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.end(**cutter.take())

        trainer.add_callback(Updates())
        ppo_trainer.generate = cutter.wrap(ppo_trainer.generate)
        ppo_trainer.batch_generation = clock.sampling(ppo_trainer.batch_generation)
        ppo_trainer.get_reward = clock.scoring(ppo_trainer.get_reward, trainer.reward_model)
        ppo_trainer.forward = clock.learning(ppo_trainer.forward)
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return {"updates": clock.updates, "peak_gib": peak, "mixed_precision": trainer.accelerator.mixed_precision}


def main() -> None:
    """Measure, and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=("full", "lora"), required=True)
    parser.add_argument("--weights", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    # transformers 5 no longer tells accelerate through the environment, so trl's `bf16` alone changes nothing.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    work = json.loads(options.work.read_text(encoding="utf-8"))
    results = measure(work, options.method, options.weights)
    options.out.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
