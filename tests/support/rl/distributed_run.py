"""What each process of ``test_distributed.py`` runs: two updates on the tiny model; rank 0 writes what came out.

``python -m tests.support.rl.distributed_run MODEL OUT``;
``tests.support.rl.objectives.distributed_run`` does the same with its methods.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from align.inference.protocol import Response
from align.models.compute.processes import leave
from align.models.loading import load_policy, load_tokenizer
from align.rl import PpoConfig, PPOTrainer
from tests.support.fork_server import start_module
from tests.support.rl.arguments import settings
from tests.support.rl.gradients import TEXTS


class FixedEngine:
    """Responses that follow from the prompt alone, so that they do not depend on the number of processes."""

    name = "fixed"

    def load_weights(self, weights):
        for _ in weights:
            pass

    def generate(self, prompts, sampling, on_progress=None):
        answers = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(sum(prompt))
            group = []
            for sample in range(sampling.n):
                length = 2 + (sum(prompt) + sample) % 6
                ids = torch.randint(4, 260, (length,), generator=generator).tolist()
                finished = sample % 2 == 0
                group.append(
                    Response([*ids, 2] if finished else ids, [-5.0] * (length + finished), finished, str(sum(ids)))
                )
            answers.append(group)
        return answers


def launch(module: str, processes: int, model_dir: Path, out: Path, *words: str) -> dict[str, Any]:
    """What ``python -m module MODEL OUT WORDS`` wrote, run as that many processes of one trainer."""
    out.parent.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if processes > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = out.parent / f"{rank}.log"
        running.append((start_module(module, [str(model_dir), str(out), *words], log, **variables), log))
    for process, log in running:
        assert process.wait(timeout=280) == 0, log.read_text()[-3000:]
    return torch.load(out, weights_only=True)


def two_updates(trainer: Any, config: Any, model_dir: Path, out: Path, fields: dict[str, Any], **inputs: Any) -> None:
    """Train by ``trainer``, whose ``config`` has these ``fields`` beside the usual ones, and write what came out."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    new_trainer = trainer(
        model=load_policy(model_dir),
        **settings(
            config,
            output_dir=str(out.parent / "run"),
            updates=2,
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
            **fields,
        ),
        train_dataset=[{"prompt": "abc" * (i + 1)} for i in range(8)],
        processing_class=load_tokenizer(model_dir),
        scorer=lambda rows, texts: [int(text) % 7 / 7 for text in texts],
        engine=FixedEngine(),
        ptx_dataset=TEXTS,
        **inputs,
    )
    new_trainer.train()
    if new_trainer.is_world_process_zero():
        torch.save(
            {
                "logs": [entry for entry in new_trainer.state.log_history if "score" in entry],
                "validations": [entry for entry in new_trainer.state.log_history if "eval_score" in entry],
                "weights": {name: p.detach() for name, p in new_trainer.model.named_parameters() if p.requires_grad},
                "kl_coef": new_trainer.kl_controller.value,
                "processes": new_trainer.args.world_size,
            },
            out,
        )
    if torch.distributed.is_initialized():
        leave()
        sys.stdout.flush()
        os._exit(0)  # as a stage's ranks do: gloo's threads may abort an interpreter that is taken down


FIELDS = {
    "rollout_batch": 8,
    "samples_per_prompt": 2,
    "eval_updates": 1,
    "whiten_rewards": True,
    "normalize_scores": True,
    "truncated": "mask",
    "kl_controller": "adaptive",
    "kl_target": 0.01,
    "kl_horizon": 50,
}

WARMING = {"critic": "head", "critic_warmup_updates": 1, "weight_decay": 0.1, "critic_detach": False}
"""The critic learns alone at first, on the policy's own trunk, which it trains later on."""

if __name__ == "__main__":
    held_out = [{"prompt": "xy" * (i + 1)} for i in range(5)]
    warming = "warming" in sys.argv[3:]
    two_updates(
        PPOTrainer,
        PpoConfig,
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        FIELDS | (WARMING if warming else {"critic": "policy"}),
        eval_dataset=held_out,
    )
