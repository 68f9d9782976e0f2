"""trl's side of ``episodes``: its GRPO trainer with a tool on scripted episodes.

    python -m benchmarks.episodes_trl WORK OUT --method full [--engine transformers]   (called by episodes)

Its code runs unchanged: it renders prompts, parses calls, calls tools, appends their results and learns. Around it: a
clock; and the script, which has the engine sample each turn to its length, and writes its ending. With transformers a
turn's batch decodes to its longest row, as it does where rows end by themselves; vLLM gets each row's length, and on a
CPU its weights by another function than trl's, which raises there (``repair_weights``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.episodes_work import (
    NO_MARKUP,
    EpisodeShape,
    Markup,
    Script,
    ScriptedTurn,
    Shelf,
    count_calls,
    load_tokenizer,
    read_work,
)
from benchmarks.ppo_trl import LEARNING_RATE


class TrlShelf(Shelf):
    """trl's environment."""

    def reset(self, **row: Any) -> None:
        """Begin; the row's prompt is the first message."""
        self._looked_up = []

    def get_reward(self) -> float:
        """Return the sum of what was looked up."""
        return self._value()


class PhaseClock:
    """Seconds of each update by phase.

    sampling: ``_generate``, which also brings weights to vLLM and calls tools. scoring: ``_calculate_rewards``.
    measuring: the rest of ``_generate_and_score_completions``. learning: the rest of the update.
    """

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []
        self._seconds = {"sampling": 0.0, "scoring": 0.0, "rollout": 0.0}
        self._began = time.perf_counter()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, whose seconds count for ``phase``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[phase] += time.perf_counter() - start

        return call

    def begin(self) -> None:
        """Begin the first update."""
        self._began = time.perf_counter()

    def end(self, **counts: float) -> None:
        """End an update, and begin the next one."""
        now = time.perf_counter()
        sampling, scoring, rollout = (self._seconds[phase] for phase in ("sampling", "scoring", "rollout"))
        update_seconds = now - self._began
        self.updates.append(
            {
                "sampling": sampling,
                "scoring": scoring,
                "measuring": rollout - sampling - scoring,
                "learning": update_seconds - rollout,
                "seconds": update_seconds,
                **counts,
            }
        )
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._began = now


class ScriptedTurns:
    """Wrapper of ``_generate_single_turn``: the turns of the script, one for every row that trl carries on."""

    def __init__(
        self, scripts: Sequence[Script], limit: Callable[[list[int]], Any], markup: Markup = NO_MARKUP
    ) -> None:
        """Take ``limit``, which tells the engine the lengths of the rows to come."""
        self._scripts, self._limit, self._markup = iter(scripts), limit, markup
        self._remaining: list[Iterator[ScriptedTurn]] = []

    def begin(self) -> None:
        """Begin a rollout."""
        self._remaining = [iter(turns) for turns in next(self._scripts)]

    def next_turns(self) -> list[ScriptedTurn]:
        """Return the next turn of every episode that has one: trl carries on rows in their order."""
        pairs = [(turns, next(turns, None)) for turns in self._remaining]
        self._remaining = [turns for turns, turn in pairs if turn is not None]
        return [turn for _, turn in pairs if turn is not None]

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``_generate_single_turn`` with scripted lengths and endings."""

        def generate(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            turns = self.next_turns()
            if len(turns) != len(prompt_ids):
                raise RuntimeError(f"trl carries on {len(prompt_ids)} episodes; the script has {len(turns)}")
            self._limit([turn.length for turn in turns])
            sampled, logprobs = function(prompt_ids, *args, **kwargs)
            completed = [turn.complete(ids, self._markup) for turn, ids in zip(turns, sampled, strict=True)]
            if logprobs is not None:
                logprobs = [row[: turn.length] for turn, row in zip(turns, logprobs, strict=True)]
            return completed, logprobs

        return generate


def limit_transformers(trainer: Any) -> Callable[[list[int]], None]:
    """Return a function that has ``generate`` decode to the longest row, and sample no end before it."""

    def limit(lengths: list[int]) -> None:
        longest = max(lengths)
        trainer.generation_config.max_new_tokens = trainer.generation_config.min_new_tokens = longest
        trainer.generation_kwargs["max_new_tokens"] = longest

    return limit


def limit_vllm(trainer: Any) -> Callable[[list[int]], None]:
    """Return a function that gives each of vLLM's next requests its length."""
    llm = trainer.vllm_generation.llm
    generate = llm.generate
    lengths_to_come: list[int] = []

    def limited(prompts: Any, sampling_params: Any, **kwargs: Any) -> Any:
        params = []
        for length in lengths_to_come:
            copy = sampling_params.clone()
            copy.max_tokens = copy.min_tokens = length
            params.append(copy)
        return generate(prompts, sampling_params=params, **kwargs)

    def limit(lengths: list[int]) -> None:
        lengths_to_come[:] = lengths

    llm.generate = limited
    return limit


def repair_weights(trainer: Any) -> None:
    """Have new weights reach vLLM on a CPU.

    trl calls ``load_weights`` of the loaded model. vLLM's CPU build has packed the matrices by then, and the parameters
    have no ``weight_loader`` any more (trl 1.16, vLLM 0.31); ``reload_weights`` unpacks and packs them.
    """
    from align.inference.vllm_internals import model_runner
    from align.inference.weights import with_tied_head

    generation = trainer.vllm_generation
    runner = model_runner(generation.llm)
    tied = bool(trainer.model.config.tie_word_embeddings)

    def sync_weights() -> None:
        with_head = with_tied_head(generation._iter_named_params(), tied)
        runner.reload_weights(weights_iterator=((name, tensor.detach()) for name, tensor in with_head))
        generation.llm.reset_prefix_cache()

    generation.sync_weights = sync_weights


def make_trainer(work: dict[str, Any], options: argparse.Namespace, folder: str) -> Any:
    """Return trl's trainer, its data in the order of the work."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.chat_template_utils import qwen3_template
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    shape: EpisodeShape = work["shape"]
    tokenizer = load_tokenizer(work["model"])
    tokenizer.padding_side = "left"
    # trl knows the response format by the text of the template alone. This template writes calls as Qwen 3's does.
    tokenizer.response_template = qwen3_template
    # trl writes what a tool returns into the prompt; align does not.
    Shelf.look_up.__annotations__.pop("return", None)
    peft_config = None
    if options.method == "lora":
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [work["rows"][index] for index in work["order"]]
    arguments: dict[str, Any] = {"output_dir": folder, "use_cpu": True, "bf16": True, "gradient_checkpointing": False}
    arguments |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    if options.engine == "vllm":
        arguments |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 1024 + shape.max_tokens}
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, options.weights)),
        reward_funcs=[],
        args=GRPOConfig(
            **arguments,
            seed=shape.seed,
            learning_rate=LEARNING_RATE[options.method],
            beta=options.kl,
            loss_type="grpo",
            temperature=1.0,
            max_steps=shape.updates,
            num_generations=shape.samples,
            max_completion_length=shape.max_tokens,
            per_device_train_batch_size=shape.micro_batch,
            gradient_accumulation_steps=shape.batch // shape.micro_batch,
            shuffle_dataset=False,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        environment_factory=lambda: TrlShelf(shape.result_words, shape.tool_seconds),
        peft_config=peft_config,
    )


def measure(work: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run all updates; return seconds and tokens of each, and the peak memory of this process in GiB."""
    import torch
    from transformers import TrainerCallback

    from align.rl.metrics import peak_memory_gib

    counts: list[dict[str, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(work, options, folder)
        clock = PhaseClock()
        limit = limit_transformers(trainer)
        if options.engine == "vllm":
            limit = limit_vllm(trainer)
            repair_weights(trainer)
        turns = ScriptedTurns(work["script"], limit, Markup.of(trainer.processing_class))
        generate, expected = trainer._generate, iter(work["script"])

        def generate_scripted(prompts: list[Any]) -> Any:
            turns.begin()
            result = generate(prompts)
            looked_up = sum(len(environment._looked_up) for environment in trainer.environments)
            counts.append(count_tokens(*result[:3]) | {"calls": looked_up})
            calls = count_calls(next(expected))
            if looked_up != calls:
                raise RuntimeError(f"trl made {looked_up} calls; the script has {calls}")
            return result

        class Updates(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                clock.begin()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.end(**counts[-1], episodes=work["shape"].batch)

        trainer.add_callback(Updates())
        trainer._generate_single_turn = turns.wrap(trainer._generate_single_turn)
        trainer._generate = clock.timed("sampling", generate_scripted)
        trainer._calculate_rewards = clock.timed("scoring", trainer._calculate_rewards)
        trainer._generate_and_score_completions = clock.timed("rollout", trainer._generate_and_score_completions)
        trainer.train()
    return {
        "updates": clock.updates,
        "peak_gib": peak_memory_gib(),
        "engine": options.engine,
        "threads": torch.get_num_threads(),
        "mixed_precision": trainer.accelerator.mixed_precision,
    }


def count_tokens(
    prompt_ids: list[list[int]], completion_ids: list[list[int]], tool_mask: list[list[int]]
) -> dict[str, int]:
    """Return the tokens of prompts, those that were sampled, and those between turns."""
    sampled = sum(map(sum, tool_mask))
    return {
        "prompt_tokens": sum(map(len, prompt_ids)),
        "sampled_tokens": sampled,
        "tool_tokens": len(list(itertools.chain(*completion_ids))) - sampled,
    }


def main() -> None:
    """Measure, and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=("full", "lora"), required=True)
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="transformers")
    parser.add_argument("--kl", type=float, default=0.04)
    parser.add_argument("--weights", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    # transformers 5 does not tell accelerate through the environment, so trl's `bf16` alone changes nothing.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    results = measure(read_work(options.work), options)
    options.out.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
