"""Our side of ``test_trl.py``: the models and responses of trl's runs, and our trainer on them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback

from align.inference.protocol import Response
from align.models.reward import RewardModel
from align.rl import PpoConfig, PPOTrainer
from align.scoring.models import RewardScorer
from tests.support.rl.arguments import settings
from tests.support.rl.make_trl_fixture import FIXTURE, make_tokenizer


def read_fixture():
    """What trl computed: ``tensors`` by name, and everything in the JSON file."""
    about = json.loads(FIXTURE.with_suffix(".json").read_text(encoding="utf-8"))
    return SimpleNamespace(tensors=load_file(FIXTURE.with_suffix(".safetensors")), **about)


def of(trl, prefix):
    """Tensors under a prefix, by the rest of their names."""
    return {n.removeprefix(f"{prefix}/"): t for n, t in trl.tensors.items() if n.startswith(f"{prefix}/")}


def load(trl, name):
    """One of the four models that trl was given."""
    if name in ("policy", "reference"):
        model = LlamaForCausalLM(LlamaConfig(**trl.llama))
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**trl.llama, num_labels=1))
    fill(model, of(trl, name))
    return model.eval()


@torch.no_grad()
def fill(model, weights, rename=str):
    for name, parameter in model.named_parameters():
        if name != "critic.head.bias" and not name.startswith("reference."):
            parameter.copy_(weights[rename(name)])


def theirs(name):
    """trl's name of one of our parameters."""
    return name.replace("critic.trunk.", "value_model.model.").replace("critic.head.", "value_model.score.")


class FixedEngine:
    """Answers with trl's responses, and with its log-probabilities of them."""

    name = "fixed"

    def __init__(self, trl, run):
        self.trl, self.run, self.tokenizer = trl, run, make_tokenizer()

    def load_weights(self, weights):
        pass

    def generate(self, prompts, sampling, on_progress=None):
        return [[self.answer(self.trl.prompts.index(prompt))] for prompt in prompts]

    def answer(self, index):
        ids = self.trl.runs[self.run]["responses"][index]
        logprobs = self.trl.tensors[f"{self.run}/logprobs"][index, : len(ids)].tolist()
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Response(ids, logprobs, self.trl.runs[self.run]["finished"][index], text)


class Steps(TrainerCallback):
    """Gradients of every optimizer step, and the weights after it, under trl's names."""

    def __init__(self):
        self.gradients, self.weights = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({theirs(n): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append({theirs(n): p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


def ours(trl, run, folder, account=None, **fields):
    """One update of our trainer on trl's responses; ``account(tensors, order)`` changes what is learned from.

    ``order[i]`` is the fixture's index of the rollout's response i. Returned ``tensors`` are in the fixture's order.
    """
    s = trl.settings
    options = {
        "output_dir": str(folder / "run"), "updates": 1, "rollout_batch": 8, "samples_per_prompt": 1,
        "max_tokens": s["response_length"],
        "temperature": s["temperature"] + 1e-7, "num_epochs": s["num_ppo_epochs"],  # difference 12
        "per_device_train_batch_size": 4, "learning_rate": s["learning_rate"],
        "adam_epsilon": s["adam_epsilon"], "critic_adam_epsilon": s["adam_epsilon"],  # trl has one for both
        "max_grad_norm": 1e9, "importance_cap": None,  # differences 5 and 14
        "clip_range": s["cliprange"], "value_clip_range": s["cliprange_value"],
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "probe_parity": False,
    }  # fmt: skip
    options |= {n: s[n] for n in ("kl_coef", "gamma", "lam", "vf_coef", "missing_eos_penalty")}
    load(trl, "reward").save_pretrained(folder / "reward")
    make_tokenizer().save_pretrained(folder / "reward")
    steps, actual = Steps(), {}
    trainer = PPOTrainer(
        model=load(trl, "reference"),
        **settings(PpoConfig, **(options | fields)),
        train_dataset=[{"prompt": message} for message in trl.messages],
        processing_class=make_tokenizer(),
        scorer=RewardScorer.of(RewardModel(folder / "reward", precision="float32")),
        engine=FixedEngine(trl, run),
        reward_model=load(trl, "critic"),
        callbacks=[steps],
    )
    fill(trainer.model.policy, of(trl, "policy"))
    assert trainer.model.critic.head.bias.item() == 0  # difference 11: it would move from the second step on
    trainer.model.critic.head.bias.requires_grad_(False)
    compute_advantages = trainer.compute_advantages

    def compute_and_account(rollout):
        compute_advantages(rollout)
        order = [trl.prompts.index(prompt) for prompt in rollout.prompts]
        actual.update({n: t[torch.tensor(order).argsort()].clone() for n, t in rollout.tensors.items()})
        if account is not None:
            account(rollout.tensors, order)

    trainer.compute_advantages = compute_and_account
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "score" in entry]
    return SimpleNamespace(trainer=trainer, tensors=actual, steps=steps, logged=logged)
