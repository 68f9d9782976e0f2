"""Measure a peer's SFT with LoRA in this process, on a model and on sizes that align is measured with.

    python -m benchmarks.gpu_peers WORK '{"peer": "trl", "shape": "qwen2.5-0.5b", "device": "cuda", ...}'

The last line of the output is the result as JSON. Rows are token ids of the greatest length, all of which are learned,
so a step has ``batch`` times ``length`` tokens on every side. ``align`` is measured by ``benchmarks.gpu_run``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_machine import PeakMemory
from benchmarks.gpu_models import make_model
from benchmarks.gpu_run import FIRST

RANK = 16
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class PeerItem:
    """One SFT with LoRA of a peer."""

    peer: str
    """``trl``, which recomputes activations by default, or ``unsloth``."""
    shape: str
    device: str
    tiny: bool
    length: int
    batch: int
    micro_batch: int
    steps: int


def measure(item: PeerItem, work: Path) -> dict[str, Any]:
    """Train once and return the tokens per second after the first steps, and the peak of torch's tensors."""
    (work / "models").mkdir(parents=True, exist_ok=True)
    model = make_model(work / "models", item.shape, tiny=item.tiny, device=item.device)
    watch = PeakMemory(item.device)
    with tempfile.TemporaryDirectory(dir=work, prefix="peer-") as folder:
        times = train(item, model, Path(folder))
    seconds = times[-1] - times[FIRST - 1]
    tokens = (len(times) - FIRST) * item.batch * item.length
    return {"tokens_per_second": tokens / seconds, "peak": watch.peak(), "reserved": watch.reserved()}


def train(item: PeerItem, model: Path, output: Path) -> list[float]:
    """Return the times at which the steps ended. Unsloth must be imported before transformers, so imports are here."""
    adapted, tokenizer = _unsloth(item, model) if item.peer == "unsloth" else _trl(item, model)
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    times: list[float] = []

    class StepTimes(TrainerCallback):
        """Note when each step ended, its kernels included."""

        def on_step_end(self, *args: Any, **options: Any) -> None:
            if item.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.monotonic())

    generator = torch.Generator().manual_seed(17)
    ids = torch.randint(3, 256, (item.steps * item.batch, item.length), generator=generator).tolist()
    arguments = SFTConfig(
        output_dir=str(output), max_steps=item.steps, per_device_train_batch_size=item.micro_batch,
        gradient_accumulation_steps=item.batch // item.micro_batch, learning_rate=1e-4, max_length=item.length,
        bf16=True, use_cpu=item.device == "cpu", report_to="none", save_strategy="no", logging_steps=1000,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=adapted, args=arguments, train_dataset=Dataset.from_dict({"input_ids": ids}), processing_class=tokenizer,
        callbacks=[StepTimes()],
    )  # fmt: skip
    trainer.train()
    return times


def _trl(item: PeerItem, model: Path) -> tuple[Any, Any]:
    """Return a model in bfloat16 with adapters, and its tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    base.to(item.device)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR, task_type="CAUSAL_LM")
    return get_peft_model(base, config), AutoTokenizer.from_pretrained(model)


def _unsloth(item: PeerItem, model: Path) -> tuple[Any, Any]:
    """Return Unsloth's model with adapters, and its tokenizer. Never run so far: it needs a card."""
    from unsloth import FastLanguageModel

    base, tokenizer = FastLanguageModel.from_pretrained(str(model), max_seq_length=item.length, load_in_4bit=False)
    adapted = FastLanguageModel.get_peft_model(
        base, r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR, use_gradient_checkpointing="unsloth"
    )
    return adapted, tokenizer


if __name__ == "__main__":
    print(json.dumps(measure(PeerItem(**json.loads(sys.argv[2])), Path(sys.argv[1]))))
