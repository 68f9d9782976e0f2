"""LoRA adapters on a base in a folder: trained by trl's own trainer, or with random weights as a stage saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def train_adapter(base: Path, folder: Path, tokenizer: Any = None, resized: bool = False, **lora: Any) -> Path:
    """Train LoRA by trl's ``SFTTrainer`` for two steps on the model in ``base``; return the adapter's folder.

    ``lora`` are fields of ``LoraConfig``; ``resized`` gives the model a row for every token of ``tokenizer`` first.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    if resized:
        model.resize_token_embeddings(len(tokenizer))
    rows = [{"prompt": f"Say {word}.", "completion": f" {word}!"} for word in ("one", "two", "three", "four")]
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=2,
        learning_rate=0.05,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config,
    )
    if "trainable_token_indices" in lora:  # trl's fused loss reads a bias that peft's wrapper of the tied head lacks
        trainer.model.get_base_model().lm_head.bias = None
    trainer.train()
    trainer.save_model(str(folder))
    return folder


def write_trained(base: Path, folder: Path, spread: float = 0.2) -> Path:
    """Write ``model/`` and ``adapter/`` of a training stage, with random LoRA weights on ``base``; return ``folder``.

    ``spread`` is the standard deviation of the weights that are zero at the beginning of a training.
    """
    import torch

    from align.config.tuning import LoraTuning
    from align.models.loading import load_policy, load_tokenizer
    from align.models.tuning.apply import apply_tuning, save_tuned

    model = apply_tuning(load_policy(base), LoraTuning(rank=4, alpha=8), seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += spread * torch.randn(weight.shape, generator=generator)
    save_tuned(model, load_tokenizer(base), folder / "model")
    return folder
