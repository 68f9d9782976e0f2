"""align's side of ``ppo_vs_trl``: its PPO trainer on given work, set up as the ``ppo`` stage does.

    python -m benchmarks.ppo_align WORK OUT --method full [--engine auto]   (called by ppo_vs_trl)

The one thing added is that responses have the lengths the work gives them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from align.config.tuning import FullTuning, LoraTuning
from benchmarks.ppo_trl import LEARNING_RATE
from benchmarks.ppo_work import TRL_METHODS, load_work_tokenizer, read_work

LAST_LAYERS = 15
"""Layers with adapters of ``lora_last``: half of the embedded model's."""
TUNINGS = {"full": FullTuning(), "lora": LoraTuning(), "lora_last": LoraTuning(last_layers=LAST_LAYERS)}
PHASES = ("sync", "sampling", "scoring", "measuring", "learning")


class FixedLengths:
    """An engine whose responses have given lengths: the end token does not end them, the number of tokens does.

    vLLM gets a limit for each request, so that a short response leaves the batch when it is done, as always. With
    transformers all are sampled to the last token and cut afterwards. What the work does not hold (the parity probe's
    few prompts) passes through.
    """

    def __init__(self, engine: Any, work: dict[str, Any]) -> None:
        self.engine, self.name, self.dtype = engine, engine.name, engine.dtype
        self._samples = work["shape"].samples
        self._remaining = list(zip(work["prompts"], work["lengths"], strict=True))
        self.counts: list[dict[str, int]] = []
        self.load_weights, self.score_tokens, self.close = engine.load_weights, engine.score_tokens, engine.close

    def generate(self, prompts: list[list[int]], sampling: Any, on_progress: Any = None) -> Any:
        """See ``align.inference.protocol``. Raises ``RuntimeError`` when a response has another length."""
        if not self._remaining or [ids for ids in prompts for _ in range(self._samples)] != self._remaining[0][0]:
            return self.engine.generate(prompts, sampling, on_progress)
        expected, lengths = self._remaining.pop(0)
        sample = self._by_limit if self.name == "vllm" else self._by_cutting
        responses = sample(prompts, sampling, lengths)
        counted = [len(response.token_ids) for group in responses for response in group]
        if counted != lengths:
            raise RuntimeError(f"responses have {counted} tokens, not {lengths}")
        self.counts.append({"prompt_tokens": sum(map(len, expected)), "response_tokens": sum(counted)})
        return responses

    def _by_limit(self, prompts: list[list[int]], sampling: Any, lengths: list[int]) -> Any:
        run = self.engine._run

        def limited(call: str, rows: Any, params: Any, on_progress: Any) -> Any:
            for request, length in zip(params, lengths, strict=True):
                request.max_tokens = request.min_tokens = length
            return run(call, rows, params, on_progress)

        self.engine._run = limited
        try:
            return self.engine.generate(prompts, sampling)
        finally:
            self.engine._run = run

    def _by_cutting(self, prompts: list[list[int]], sampling: Any, lengths: list[int]) -> Any:
        from align.inference.protocol import Response

        end, self.engine.eos = self.engine.eos, -1
        try:
            responses = self.engine.generate(prompts, sampling)
        finally:
            self.engine.eos = end
        remaining_lengths = iter(lengths)

        def cut(response: Response) -> Response:
            size = next(remaining_lengths)
            ids = response.token_ids[:size]
            text = self.engine.tokenizer.decode(ids, skip_special_tokens=True)
            return Response(ids, response.logprobs[:size], False, text)

        return [[cut(response) for response in group] for group in responses]


def make_trainer(work: dict[str, Any], method: str, engine: str, folder: str, reuse_forward: float = 0.0) -> Any:
    """Policy, reward model, critic from the reward model, and engine, as ``align.stages.rl`` puts them together."""
    from align.config.runtime import EngineConfig, Runtime
    from align.inference.engine import open_engine
    from align.models.compute.processes import use_threads
    from align.models.loading import load_policy
    from align.models.reward import RewardModel
    from align.rl import PpoConfig, PPOTrainer
    from align.scoring.models import RewardScorer
    from align.scoring.score import Part, WeightedSum

    shape, model = work["shape"], Path(work["model"])
    runtime = Runtime(device="cpu", engine=EngineConfig(name=engine))  # type: ignore[arg-type]
    use_threads(runtime)
    policy = load_policy(model)
    reward = RewardModel(Path(work["reward"]), device="cpu", precision="bfloat16", share_beginnings=True)
    longest = max(len(ids) for batch in work["prompts"] for ids in batch) + shape.tokens
    opened = open_engine(model, runtime, precision="bfloat16", max_length=longest, seed=shape.seed, warn=print)
    trainer = PPOTrainer(
        model=policy,
        config=PpoConfig.for_trainer(
            updates=shape.updates,
            rollout_batch=shape.batch,
            samples_per_prompt=shape.samples,
            max_tokens=shape.tokens,
            micro_batch_size=shape.micro_batch,
            learning_rate=LEARNING_RATE[TRL_METHODS[method]],
            precision="bfloat16",
            tuning=TUNINGS[method],
            critic="reward",
        ),
        options={
            "output_dir": folder,
            "reuse_forward": reuse_forward,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": shape.seed,
        },
        train_dataset=work["rows"],
        processing_class=load_work_tokenizer(model, shape),
        scorer=WeightedSum((Part("reward", 1.0, RewardScorer.of(reward)),)),
        engine=FixedLengths(opened, work),
        reward_model=reward.model,
    )
    reward.round_weights()
    return trainer


def count_read(trainer: Any, read: list[int]) -> None:
    """Have the tokens of each update that a model reads, what prompts have in common once a micro-batch, appended."""
    measure = trainer.measure

    def counted(rollout: Any) -> None:
        planned = [indices for batch in trainer.buffer.plan(rollout, 0) for indices in batch.micro_batches]
        packs = [rollout.pack(indices, trainer.buffer.pad_id, trainer.buffer.form) for indices in planned]
        read.append(sum(pack["input_ids"].numel() for pack in packs))
        measure(rollout)

    trainer.measure = counted


def measure(work: dict[str, Any], method: str, engine: str, reuse_forward: float) -> dict[str, Any]:
    """Run all updates; return their seconds and tokens, peak memory in GiB, the model's size and the matrix peak."""
    from transformers import TrainerCallback

    from align.rl.metrics import peak_memory_gib
    from benchmarks.training import matrix_peak

    ends: list[float] = []
    logged: list[dict[str, float]] = []

    class Updates(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "score" in logs:
                ends.append(time.perf_counter())
                logged.append(logs)

    read: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(work, method, engine, folder, reuse_forward)
        count_read(trainer, read)
        trainer.add_callback(Updates())
        trainer.train()
        trainer.engine.close()
    if len(trainer.engine.counts) != len(logged):
        raise RuntimeError("align's trainer drew other prompts than the benchmark gives to trl")
    updates = [
        {phase: logs[f"seconds_{phase}"] for phase in PHASES} | {"seconds": end - start, "read_tokens": tokens} | counts
        for logs, (start, end), tokens, counts in zip(
            logged, itertools.pairwise(ends), read, trainer.engine.counts, strict=True
        )
    ]
    base = trainer.model.policy if method == "full" else trainer.model.policy.get_base_model()
    parameters = {"all": sum(p.numel() for n, p in base.named_parameters() if "lora_" not in n)}
    parameters["head"] = base.get_output_embeddings().weight.numel()
    return {
        "updates": updates,
        "peak_gib": peak_memory_gib(),
        "engine": trainer.engine.name,
        "parameters": parameters,
        "matrix_peak": matrix_peak(),
    }


def main() -> None:
    """Measure, and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=TUNINGS, required=True)
    parser.add_argument("--engine", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--reuse-forward", type=float, default=0.0)
    options = parser.parse_args()
    results = measure(read_work(options.work), options.method, options.engine, options.reuse_forward)
    options.out.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
