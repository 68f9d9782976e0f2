"""Makes ``trl_1_12.json`` and ``trl_1_12.safetensors``: what trl 1.12's PPO computes on fixed responses.

Run by hand, in an environment of its own (trl 1.12 is the last release with a PPO trainer, and not ours to install):

    python3.11 -m venv trl112
    trl112/bin/pip install trl==1.12.0 transformers==5.17.0 'torch>=2.13,<2.14'
    TRL_EXPERIMENTAL_SILENCE=1 trl112/bin/python -m tests.support.rl.make_trl_fixture  # in the repository; ten seconds

Its PPO code runs unchanged except that "generation" looks the responses up. Intermediate results live inside one
method of 300 lines; they are read from its frame when it calls ``masked_whiten`` and ``accelerator.backward``.
The files say which versions and settings made them. The ``test_trl`` module compares, and names what differs.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

FIXTURE = Path(__file__).with_name("trl_1_12")
EOS, PAD = 2, 3
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
LETTERS = "abcdefghijklmnopqrstuvwxyz \n"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
CONTENTS = ("a", "say it", "tell me more", "go on", "why", "name three colours", "ok", "count to ten")

LLAMA = {
    "vocab_size": len(SPECIAL) + len(LETTERS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
    "dtype": "float32",
}

RESPONSE_LENGTH = 10
SETTINGS: dict[str, Any] = {
    "response_length": RESPONSE_LENGTH,
    "stop_token": "eos",
    "temperature": 0.9,
    "missing_eos_penalty": 0.25,
    "kl_coef": 0.3,
    "gamma": 0.97,
    "lam": 0.9,
    "cliprange": 0.02,
    "cliprange_value": 0.02,
    "vf_coef": 0.7,
    "num_ppo_epochs": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "total_episodes": 8,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-5,
    "weight_decay": 0.0,
    "max_grad_norm": 1e-3,  # far below what the gradients have: it shows that it is ignored
    "seed": 5,
}
"""Given to all runs; none of them is a default of trl's PPO except ``weight_decay``."""

COMPARED_DEFAULTS = ("adam_epsilon", "lr_scheduler_type", "max_grad_norm", "kl_coef", "vf_coef", "cliprange_value")
COMPARED_DEFAULTS += ("cliprange", "gamma", "lam", "num_ppo_epochs", "temperature", "whiten_rewards", "kl_estimator")

FULL = [(10, i % 3 == 0) for i in range(8)]
"""(tokens, whether the last is EOS) of each response: all fill the length allowed, so that no slot follows EOS."""
RAGGED = [(3, True), (1, True), (10, False), (10, True), (6, True), (9, True), (10, False), (2, True)]
"""Ends of all kinds; trl's permutation makes micro-batches of unlike size of it, each with one of full length."""

RUNS: dict[str, dict[str, Any]] = {
    "full": {"lengths": FULL, "settings": {"num_mini_batches": 2}},
    "ragged": {"lengths": RAGGED, "settings": {}},
    "whitened": {"lengths": RAGGED, "settings": {"whiten_rewards": True, "kl_estimator": "k3"}},
    "last batch of the data": {"lengths": FULL, "settings": {}, "own_loader": True},
}

ROLLOUT = ("query_responses", "logprobs", "ref_logprobs", "values", "scores", "kl", "rewards", "advantages", "returns")
MICRO_BATCH = ("pg_loss", "vf_loss", "loss")


def make_tokenizer() -> Any:
    """One token per letter after the four special tokens; pads on the left, as trl's PPO wants."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *LETTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_models() -> dict[str, Any]:
    """Policy, reference, critic and reward model, all different."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(11)
    models: dict[str, Any] = {name: LlamaForCausalLM(LlamaConfig(**LLAMA)) for name in ("policy", "reference")}
    models |= {
        name: LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1)) for name in ("critic", "reward")
    }
    with torch.no_grad():
        for theirs, ours in zip(models["reference"].parameters(), models["policy"].parameters(), strict=True):
            theirs.copy_(ours + 0.03 * torch.randn_like(ours))
    return models


def make_responses(lengths: list[tuple[int, bool]]) -> list[list[int]]:
    """Random letters, ended by EOS where asked for."""
    generator = torch.Generator().manual_seed(13)
    rows = []
    for length, finished in lengths:
        letters = torch.randint(len(SPECIAL), LLAMA["vocab_size"], (length,), generator=generator).tolist()
        rows.append([*letters[:-1], EOS] if finished else letters)
    return rows


class Recorder:
    """Reads what trl's ``train`` has computed by the time it calls something that we wrap."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.steps: list[dict[str, Any]] = []
        self._micro_batches: list[dict[str, Any]] = []

    def watch(self, trainer: Any, ppo_trainer: Any) -> None:
        """Wrap ``masked_whiten``, ``accelerator.backward`` and the optimizer's step."""
        whiten, backward = ppo_trainer.masked_whiten, trainer.accelerator.backward

        def masked_whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
            frame = sys._getframe(1).f_locals
            if shift_mean:
                self.tensors |= {f"raw_{n}" if n == "advantages" else n: frame[n].clone() for n in ROLLOUT}
            else:
                self.tensors["raw_rewards"] = values.clone()
            return whiten(values, mask, shift_mean)

        def spy(loss: torch.Tensor) -> None:
            frame = sys._getframe(1).f_locals
            self.tensors["advantages"] = frame["advantages"].clone()
            backward(loss)
            micro_batch = {name: float(frame[name].detach()) for name in MICRO_BATCH}
            micro_batch["indices"] = frame["micro_batch_inds"].tolist()
            self._keep("new_logprobs", frame["new_logprobs"])
            self._keep("new_values", frame["vpred"])
            for name, parameter in trainer.model.named_parameters():
                self._keep(f"gradient/{name}", parameter.grad)  # summed over the step so far
            self._micro_batches.append(micro_batch)

        ppo_trainer.masked_whiten = masked_whiten
        trainer.accelerator.backward = spy
        trainer.optimizer.optimizer.register_step_post_hook(lambda *_: self._step(trainer))

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[f"step{len(self.steps)}/micro{len(self._micro_batches)}/{name}"] = tensor.detach().clone()

    def _step(self, trainer: Any) -> None:
        for name, parameter in trainer.model.named_parameters():
            self.tensors[f"step{len(self.steps)}/after/{name}"] = parameter.detach().clone()
        norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()  # of what was stepped with
        self.steps.append({"micro_batches": self._micro_batches, "gradient_norm": norm.item()})
        self._micro_batches = []


def look_up(ppo_trainer: Any, prompts: list[list[int]], responses: list[list[int]]) -> Any:
    """A stand-in for trl's ``generate``: the fixed responses, and scores as ``generate()`` would return them."""
    known = {tuple(prompt): response for prompt, response in zip(prompts, responses, strict=True)}

    def generate(policy: Any, queries: torch.Tensor, pad_token_id: int, generation_config: Any) -> Any:
        values = [known[tuple(row[row != pad_token_id].tolist())] for row in queries]
        filled = [row + [pad_token_id] * (RESPONSE_LENGTH - len(row)) for row in values]
        both = torch.cat([queries, torch.tensor(filled)], dim=1)
        logits = ppo_trainer.forward(policy, both, pad_token_id).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / generation_config.temperature

    return generate


def run(
    settings: dict[str, Any], tokenizer: Any, prompts: list[list[int]], folder: str
) -> tuple[Recorder, dict[str, Any]]:
    """One update of trl's trainer on one set of responses."""
    import numpy as np
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, ppo_trainer

    models, responses, recorder = make_models(), make_responses(settings["lengths"]), Recorder()
    options = {"output_dir": folder, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    options |= {"report_to": "none", "save_strategy": "no", "num_sample_generations": 0, "disable_tqdm": True}
    original = ppo_trainer.generate, ppo_trainer.masked_whiten
    trainer = ppo_trainer.PPOTrainer(
        args=PPOConfig(**options, **SETTINGS, **settings["settings"]),
        processing_class=tokenizer,
        model=models["policy"],
        ref_model=models["reference"],
        reward_model=models["reward"],
        value_model=models["critic"],
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
    )
    if not settings.get("own_loader"):  # the prompts in their order, and no loader that accelerate knows
        trainer.dataloader = [tokenizer.pad({"input_ids": prompts}, return_tensors="pt")]
    recorder.watch(trainer, ppo_trainer)
    ppo_trainer.generate = look_up(ppo_trainer, prompts, responses)
    np.random.seed(17)  # what trl permutes the rollout with
    trainer.train()
    ppo_trainer.generate, ppo_trainer.masked_whiten = original
    metrics = {name: value for name, value in trainer.state.log_history[0].items() if name != "eps"}
    values = {"settings": settings["settings"], "responses": responses, "steps": recorder.steps, "metrics": metrics}
    return recorder, values | {"finished": [ended for _, ended in settings["lengths"]]}


def trim(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop what no test reads: half of the file."""
    if name.startswith("last"):
        return {}
    if name == "whitened":
        return {key: tensor for key, tensor in tensors.items() if "/" not in key}
    dropped = ("micro0/gradient", "step0/after") if name == "full" else ("step1/after", "step1/micro0/gradient")
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in dropped)}


def main() -> None:
    """Run all and write both files."""
    from safetensors.torch import save_file
    from trl.experimental.ppo import PPOConfig

    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    messages = [[{"role": "user", "content": content}] for content in CONTENTS]
    prompts = [
        tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=True, return_dict=False) for m in messages
    ]
    tensors = {
        f"{name}/{key}": parameter.detach().clone()
        for name, model in make_models().items()
        for key, parameter in model.named_parameters()
    }
    packages = ("trl", "transformers", "torch", "accelerate", "tokenizers", "numpy", "safetensors")
    about: dict[str, Any] = {"made_with": {"python": platform.python_version()} | {p: version(p) for p in packages}}
    about |= {"llama": LLAMA, "settings": SETTINGS, "messages": messages, "prompts": prompts, "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        defaults = PPOConfig(output_dir=folder, use_cpu=True)
        about["defaults"] = {name: getattr(defaults, name) for name in COMPARED_DEFAULTS}
        for name, fields in RUNS.items():
            recorder, about["runs"][name] = run(fields, tokenizer, prompts, folder)
            remaining = trim(name, recorder.tensors)
            tensors |= {f"{name}/{key}": tensor.contiguous() for key, tensor in remaining.items()}
    save_file(tensors, FIXTURE.with_suffix(".safetensors"))
    FIXTURE.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
