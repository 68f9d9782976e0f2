"""Measure how an engine in this process gets a policy's adapter: merged into its weights, or by vLLM's LoRA kernels.

    python -m benchmarks.gpu_adapters WORK '{"way": "merged", "shape": "qwen2.5-0.5b", "rank": 16, ...}'

The last line of the output is the result as JSON: the seconds of an update, for merged weights also of a full set, the
sampled tokens per second, and the gap to the trainer's log-probabilities. A process holds one engine of vLLM. Engines
are eager, as a stage's are by default.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_models import make_model

LENGTH = 256
PROBED = 4
"""Prompts whose responses the trainer scores."""


@dataclass(frozen=True)
class AdapterItem:
    """One way of getting an adapter, for one model and rank."""

    way: str
    """``merged`` or ``kernels``."""
    shape: str
    rank: int
    device: str
    tiny: bool

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids to sample from."""
        return [[1, *range(10 + number, 42 + number)] for number in range(4 if self.tiny else 64)]

    @property
    def tokens(self) -> int:
        """Tokens of each response; the models are random and rarely end one."""
        return 8 if self.tiny else 128


def measure(item: AdapterItem, work: Path) -> dict[str, Any]:
    """Return the bytes of the adapter and what updates and samples cost."""
    import torch

    from align.config.tuning import LoraTuning
    from align.models.tuning.apply import apply_tuning, load_for_tuning

    (work / "models").mkdir(parents=True, exist_ok=True)
    folder = make_model(work / "models", item.shape, tiny=item.tiny, device=item.device)
    tuning = LoraTuning(rank=item.rank)
    policy = apply_tuning(load_for_tuning(folder, tuning, "bfloat16"), tuning, seed=0).to(item.device)
    generator = torch.Generator(item.device).manual_seed(1)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.002, generator=generator)
    size = sum(weight.nbytes for weight in policy.parameters() if weight.requires_grad)
    with tempfile.TemporaryDirectory(dir=work, prefix="adapter-") as scratch:
        results = (_merged if item.way == "merged" else _kernels)(item, folder, policy, Path(scratch))
    return {"bytes": size, **results}


def _merged(item: AdapterItem, folder: Path, policy: Any, scratch: Path) -> dict[str, Any]:
    import torch

    from align.config.runtime import EngineConfig
    from align.inference.protocol import Sampling
    from align.inference.trainer_engine import policy_weights
    from align.inference.vllm import VllmEngine
    from align.models.tuning.peft_layers import merged_weights

    config = EngineConfig(name="vllm", sleep=False)
    settings: dict[str, Any] = {"device": torch.device(item.device), "config": config, "seed": 0}
    engine = VllmEngine(folder, dtype=torch.bfloat16, max_length=LENGTH, **settings)
    full = _seconds(item, lambda: engine.load_weights(merged_weights(policy)))
    engine.load_weights(policy_weights(policy))
    seconds = _seconds(item, lambda: engine.load_weights(policy_weights(policy)))

    def sample() -> list[tuple[list[int], list[float]]]:
        drawn = engine.generate(item.prompts, Sampling(item.tokens, seed=1))
        return [(row[0].token_ids, row[0].logprobs) for row in drawn]

    return {"full_seconds": full, "seconds_of_update": seconds, **_sampled(item, policy, sample)}


def _kernels(item: AdapterItem, folder: Path, policy: Any, scratch: Path) -> dict[str, Any]:
    from align.inference.vllm import import_engine

    import_engine()
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {} if item.device == "cuda" else {"kv_cache_memory_bytes": 2**28}
    llm = LLM(
        str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=LENGTH, max_num_seqs=64, enable_lora=True,
        max_loras=1, max_lora_rank=max(16, item.rank), logprobs_mode="processed_logprobs", generation_config="vllm",
        **options,
    )  # fmt: skip
    request = LoRARequest("policy", 1, str(scratch))

    def update() -> None:
        policy.save_pretrained(scratch)
        llm.llm_engine.add_lora(LoRARequest("policy", 1, str(scratch), load_inplace=True))

    seconds = _seconds(item, update)
    params = [SamplingParams(max_tokens=item.tokens, seed=row, logprobs=0) for row in range(len(item.prompts))]
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in item.prompts]

    def sample() -> list[tuple[list[int], list[float]]]:
        answers = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False, lora_request=request)]
        responses = []
        for answer in answers:
            entries = zip(answer.token_ids, answer.logprobs or [], strict=True)
            responses.append((list(answer.token_ids), [(entry or {})[token].logprob for token, entry in entries]))
        return responses

    return {"seconds_of_update": seconds, **_sampled(item, policy, sample)}


def _sampled(
    item: AdapterItem, policy: Any, sample: Callable[[], list[tuple[list[int], list[float]]]]
) -> dict[str, float]:
    """Return tokens per second after a warm-up, and the mean gap to the trainer in nats per token."""
    import torch

    from align.inference.trainer_engine import trainer_logprobs

    sample()
    started = time.monotonic()
    responses = sample()
    seconds = time.monotonic() - started
    drawn = responses[:PROBED]
    with torch.autocast(item.device, torch.bfloat16):
        ours = trainer_logprobs(policy, item.prompts[:PROBED], [tokens for tokens, _ in drawn], 1.0)
    theirs = torch.tensor([value for _, logprobs in drawn for value in logprobs])
    count = sum(len(tokens) for tokens, _ in responses)
    return {"tokens_per_second": count / seconds, "gap": float((ours - theirs).abs().mean())}


def _seconds(item: AdapterItem, update: Callable[[], None]) -> float:
    """Return the shortest of three updates."""
    import torch

    times = []
    for _ in range(3):
        started = time.monotonic()
        update()
        if item.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - started)
    return min(times)


if __name__ == "__main__":
    print(json.dumps(measure(AdapterItem(**json.loads(sys.argv[2])), Path(sys.argv[1]))), flush=True)
