"""What each process of ``test_distributed.py`` runs: two updates of a method; rank 0 writes what came out.

``python -m tests.online.one_of_two MODEL OUT METHOD``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from align.models.loading import load_policy, load_tokenizer
from tests.online.conftest import METHODS
from tests.ppo.one_of_two import FixedEngine
from tests.ppo.test_ptx import TEXTS

FIELDS = {
    "grpo": {"scale_rewards": "batch", "truncated": "mask", "kl_coef": 0.5},
    "rloo": {"whiten_advantages": True, "normalise_scores": True},
    "online_dpo": {},
    "rejection": {"best": 2, "truncated": "learn"},
}


def main(model_dir: Path, out: Path, method: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made, config = METHODS[method]
    trainer = made(
        model=load_policy(model_dir),
        args=config(
            output_dir=str(out.parent / "run"),
            updates=2,
            rollout_batch=16,
            samples_per_prompt=4,
            max_tokens=8,
            num_epochs=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            probe_parity=False,
            ptx_coef=0.5,
            ptx_rows=4,
            **FIELDS[method],
        ),
        train_dataset=[{"prompt": "abc" * (i + 1)} for i in range(8)],
        processing_class=load_tokenizer(model_dir),
        scorer=lambda rows, texts: [int(text) % 7 / 7 for text in texts],
        engine=FixedEngine(),
        ptx_dataset=TEXTS,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "score" in entry]
        weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        torch.save({"logs": logs, "weights": weights, "processes": trainer.args.world_size}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    if torch.distributed.is_initialized():
        # or the interpreter ends under gloo's running threads, which on a busy machine aborts the process
        torch.distributed.destroy_process_group()
