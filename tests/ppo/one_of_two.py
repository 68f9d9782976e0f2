"""What each process of ``test_distributed.py`` runs: two updates on the tiny model; rank 0 writes what came out."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from align.models.loading import load_policy, load_tokenizer
from align.ppo import PPOConfig, PPOTrainer
from align.rollouts.protocol import Response
from tests.ppo.test_ptx import TEXTS


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


def main(model_dir: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trainer = PPOTrainer(
        model=load_policy(model_dir),
        args=PPOConfig(
            output_dir=str(out.parent / "run"),
            updates=2,
            rollout_batch=8,
            samples_per_prompt=2,
            max_tokens=8,
            num_epochs=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            whiten_rewards=True,
            normalise_scores=True,
            truncated="mask",
            kl_controller="adaptive",
            kl_target=0.01,
            kl_horizon=50,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            probe_parity=False,
            ptx_coef=0.5,
            ptx_rows=4,
            eval_updates=1,
        ),
        train_dataset=[{"prompt": "abc" * (i + 1)} for i in range(8)],
        processing_class=load_tokenizer(model_dir),
        scorer=lambda rows, texts: [int(text) % 7 / 7 for text in texts],
        engine=FixedEngine(),
        eval_dataset=[{"prompt": "xy" * (i + 1)} for i in range(5)],
        ptx_dataset=TEXTS,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "score" in entry]
        validations = [entry for entry in trainer.state.log_history if "eval_score" in entry]
        weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        torch.save(
            {
                "logs": logs,
                "validations": validations,
                "weights": weights,
                "kl_coef": trainer.kl_controller.value,
                "processes": trainer.args.world_size,
            },
            out,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    if torch.distributed.is_initialized():
        # or the interpreter ends under gloo's running threads, which on a busy machine aborts the process
        torch.distributed.destroy_process_group()
