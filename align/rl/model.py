"""Policy, reference and, for PPO, critic in the one module that the Trainer optimizes.

The critic is a separate model with one value per token that starts from the reward model or from the policy. With
adapters it shares the frozen tensors of the model it starts from, so it costs an adapter and a head. Or it is only a
head on the policy's trunk.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any, Literal, Self

import torch
from torch import nn

from align.config.base import Precision
from align.config.stages.rl import RolloutFields
from align.config.tuning import LoraTuning, LowRank, TuningBase
from align.errors import UserError
from align.models.checkpoints.conversion import plain_of
from align.models.checkpoints.sharding import is_partitioned
from align.models.fast import ragged_rows
from align.models.fast.shared_parts import count_frozen_layers, lower_weights_key, run_lower_layers, run_upper_layers
from align.models.fast.token_logprobs import Temperature, logit_transform, token_logprobs
from align.models.tuning.apply import apply_tuning, initial_policy
from align.rl.masking import value_mask
from align.rl.packing import Batch


class Critic(nn.Module):
    """A trunk and a linear head. The head always computes in float32: bf16 would round values to 8 bits.

    Without a trunk it reads the policy's hidden states. It then costs one vector and no forward pass.
    """

    def __init__(self, trunk: nn.Module | None, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, 1, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return values (N,) in float32 of hidden states (N, H)."""
        with torch.autocast(hidden.device.type, enabled=False):
            values: torch.Tensor = self.head(hidden.float()).squeeze(-1)
        return values


def trunk_of(model: Any) -> Any:
    """Return the module below the head that turns token ids into hidden states, also of a model in a peft wrapper."""
    base = plain_of(model)
    trunk = getattr(base, base.base_model_prefix, None)
    if trunk is None or trunk is base:
        raise UserError(f"{type(base).__name__} has no separate trunk; PPO needs a decoder with a head on top.")
    return trunk


def make_critic(
    kind: Literal["reward", "policy", "head"] | None,
    policy: Any,
    reward: Any,
    tuning: TuningBase,
    seed: int,
) -> Critic:
    """Return a critic, by default from ``reward`` if there is one. Raises ``ValueError`` if it needs a reward model."""
    if isinstance(tuning, LowRank):
        # Values need no new tokens, and the reward model's embedding has not learned them with the policy.
        tuning = tuning.model_copy(update={"train_tokens": []})
    if kind == "head":
        return critic_head(policy)
    if kind == "policy" or (kind is None and reward is None):
        return critic_from_policy(policy, tuning, seed)
    if reward is None:
        raise ValueError("critic is reward, but no reward_model is given; pass one, or set critic='policy'.")
    return critic_from_reward(reward, tuning, seed)


def may_round_reward(config: RolloutFields, precision: Precision) -> bool:
    """Return True if no critic needs the reward model's weights in the type of their files.

    A critic that is trained in full copies them; ``qlora`` quantizes them and ``pissa`` changes them.
    """
    tuning = config.tuning
    is_rounded = isinstance(tuning, LoraTuning) and tuning.base_type(precision) == "bfloat16"
    return is_rounded or getattr(config, "critic_source", None) != "reward"


def critic_head(policy: Any) -> Critic:
    """Return a critic that is a head on the policy's hidden states (arXiv 1909.08593). All values start at 0."""
    return Critic(None, policy.config.get_text_config().hidden_size)


def critic_from_policy(policy: Any, tuning: TuningBase, seed: int) -> Critic:
    """Return a critic on the weights of ``policy``, a causal model without adapters yet. All values start at 0."""
    model = _copy(policy, tuning)
    return Critic(trunk_of(apply_tuning(model, tuning, seed)), policy.config.get_text_config().hidden_size)


def critic_from_reward(reward: Any, tuning: TuningBase, seed: int) -> Critic:
    """Return a critic on the weights of ``reward``, a sequence classifier with one label. Its head is the score head.

    So its value at the last token of a response is the reward model's score at first (arXiv 2403.17031, detail 5).
    ``reward`` itself is not changed and can still score.
    """
    head = getattr(reward, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise UserError(
            f"critic: reward needs a reward model with one linear 'score' head; {type(reward).__name__} has "
            f"{type(head).__name__}. Set critic: policy."
        )
    # Add adapters to a copy of the modules, because the reward model must keep scoring without them.
    critic = Critic(trunk_of(apply_tuning(_copy(reward, tuning), tuning, seed)), head.in_features)
    critic.head.weight.data.copy_(head.weight.detach())
    if head.bias is not None:
        critic.head.bias.data.copy_(head.bias.detach())
    return critic


def _copy(model: Any, tuning: TuningBase) -> Any:
    """Return a second module tree: over the same tensors if they stay frozen, over copies if they are trained."""
    if tuning.trains_all:
        duplicate = copy.deepcopy(model)
        duplicate.requires_grad_(True)
        return duplicate
    # deepcopy treats objects in its memo as already copied: every tensor stays, only the modules are new.
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class PolicyAndReference(nn.Module):
    """``policy`` (a causal model, maybe with LoRA) and the frozen ``reference``.

    A LoRA policy with its adapter off is the reference; a fully tuned policy has a frozen copy. Dropout is always off:
    otherwise the ratio would not be 1 at the first step, and the KL would be noise.
    """

    _keys_to_ignore_on_save = None

    def __init__(self, policy: Any, temperature: float) -> None:
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        self.checkpointing = False
        self.frozen_layers = _frozen_layers(policy, trunk_of(policy))
        self.reference = None if hasattr(policy, "disable_adapter") else copy.deepcopy(policy).requires_grad_(False)
        self._disable_dropout()

    def _disable_dropout(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                # Ratios compare two passes over the same tokens; dropout would make them differ by chance.
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                setattr(module, "attention_dropout", 0.0)  # noqa: B010  (nn.Module types its attributes)

    @property
    def trained(self) -> list[Any]:
        """The models whose trunks are trained."""
        return [self.policy]

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, unless activations are checkpointed, which transformers does in training mode only."""
        return super().train(mode and self.checkpointing)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """Checkpoint activations; the Trainer calls this for ``gradient_checkpointing=True``."""
        self.checkpointing = True
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for model in self.trained:
            model.gradient_checkpointing_enable(**options)

    def forward(self, batch: Batch, policy: bool = True, *, reference: bool = False) -> dict[str, torch.Tensor]:
        """Return ``logprobs`` and ``entropy`` of the policy and ``ref_logprobs``, (B, T), as requested.

        All are float32 and zero on padding, at the sampling temperature, but at 1 for the last ``batch["supervised"]``
        rows.
        """
        outputs = {}
        if policy:
            states = self._states(trunk_of(self.policy), batch)
            outputs["logprobs"], outputs["entropy"] = self._logprobs(self.policy, states, batch)
        if reference:
            outputs["ref_logprobs"] = self._reference_logprobs(batch)
        return outputs

    def _reference_logprobs(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad(), self.reference_policy() as model:
            return self._logprobs(model, self._states(trunk_of(model), batch), batch)[0]

    @contextlib.contextmanager
    def reference_policy(self) -> Any:
        """Yield the policy as it was before training."""
        if self.reference is not None:
            yield self.reference
        else:
            with initial_policy(self.policy) as model:
                yield model

    def _states(self, trunk: Any, batch: Batch) -> torch.Tensor:
        """Return hidden states (R * L, H), or (N, H) of rows without padding.

        The lowest layers, if they are frozen in all models, run once for all models that share them: policy, reference
        and critic on one frozen trunk have equal states there. The batch carries these states from one model to the
        next.
        """
        count = self.frozen_layers.get(id(trunk), 0)
        # Layers below the first adapter never change: their states are computed once for policy, reference and critic.
        if not count or is_partitioned(self):
            return _hidden_states(trunk, batch)
        cached_states = batch.setdefault("below", {})
        key = (*lower_weights_key(trunk), count)
        if key not in cached_states:
            with torch.no_grad(), run_lower_layers(trunk, count):
                cached_states[key] = _hidden_states(trunk, batch)
        with run_upper_layers(trunk, count):
            return _hidden_states(trunk, batch, cached_states[key])

    def _logprobs(self, model: Any, states: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and entropies of the response tokens, (B, T) each."""
        mask = batch["response_mask"]
        # The head is the largest matrix: it runs on the states before response tokens only, not on prompts or padding.
        hidden = states[batch["positions"][:, :-1][mask]]  # (N, H)
        head = model.get_output_embeddings()
        targets = batch["targets"][mask]
        temperature = self._temperature(batch)
        logprobs, entropy = token_logprobs(hidden, head, targets, temperature, logit_transform(model))
        return _scatter(logprobs, mask), _scatter(entropy, mask)

    def _temperature(self, batch: Batch) -> Temperature:
        """Return the sampling temperature; 1 for the tokens of a batch's ``supervised`` rows, (N, 1)."""
        if self.temperature == 1.0 or "supervised" not in batch:
            return self.temperature
        mask = batch["response_mask"]
        supervised = int(batch["supervised"])
        rows = torch.full((len(mask), 1), self.temperature, device=mask.device)
        rows[len(mask) - supervised :] = 1.0
        return rows.expand_as(mask)[mask][:, None]


class PolicyAndCritic(PolicyAndReference):
    """Policy, reference, and the ``critic``."""

    def __init__(self, policy: Any, critic: Critic, temperature: float, critic_detach: bool = True) -> None:
        """``critic_detach``: do not propagate the value loss of a head on the policy's trunk into the trunk."""
        super().__init__(policy, temperature)
        self.critic = critic
        self.critic_detach = critic_detach
        if critic.trunk is not None:
            self.frozen_layers |= _frozen_layers(policy, critic.trunk)
        self._disable_dropout()

    @property
    def trained(self) -> list[Any]:
        """The policy, and the critic's trunk if it has one."""
        return [self.policy, *([] if self.critic.trunk is None else [self.critic.trunk])]

    def forward(
        self, batch: Batch, policy: bool = True, critic: bool = True, reference: bool = False
    ) -> dict[str, torch.Tensor]:
        """Return ``logprobs`` and ``entropy`` (B, T), ``values`` (B, T+1), ``ref_logprobs`` (B, T), as requested.

        The last ``batch["ptx"]`` rows, if any, are supervised texts: they have no values. ``values[:, t]`` belongs to
        the state before token t, the column after a row's last token to the state at the end. All are float32 and zero
        on padding.
        """
        outputs = {}
        states = None  # (R * L, H) or (N, H) of the policy's trunk
        if policy or (critic and self.critic.trunk is None):
            # For values of only a head the trunk runs without a graph.
            with torch.set_grad_enabled(torch.is_grad_enabled() and policy):
                states = self._states(trunk_of(self.policy), batch)
        if policy and states is not None:
            outputs["logprobs"], outputs["entropy"] = self._logprobs(self.policy, states, batch)
        if critic:
            outputs["values"] = self._values(states, batch)
        if reference:
            outputs["ref_logprobs"] = self._reference_logprobs(batch)
        return outputs

    def _values(self, states: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Return values (B, T+1) from the critic's trunk, or from the policy's ``states`` if it is only a head."""
        if self.critic.trunk is not None:
            batch = batch.get("without_ptx", batch)
            states = self._states(self.critic.trunk, batch)
        elif states is not None and self.critic_detach:
            states = states.detach()
        assert states is not None
        responses = len(batch["targets"]) - int(batch.get("ptx", 0))
        mask = value_mask(batch["response_mask"][:responses])  # (B, T+1)
        return _scatter(self.critic.values(states[batch["positions"][:responses][mask]]), mask)


def _hidden_states(trunk: Any, batch: Batch, states: torch.Tensor | None = None) -> torch.Tensor:
    """Return hidden states (R * L, H), or (N, H) of rows without padding, from tokens or from such ``states``."""
    ids = batch["input_ids"]
    if "layout" in batch:
        return ragged_rows.hidden_states(trunk, ids, batch["position_ids"], batch["layout"], states)
    inputs = {"input_ids": ids} if states is None else {"inputs_embeds": states.unflatten(0, ids.shape)}
    flat: torch.Tensor = trunk(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    return flat


def _frozen_layers(policy: Any, trunk: Any) -> dict[int, int]:
    """Return, by the trunk's id, the number of its lowest layers that are never trained; empty without adapters."""
    return {id(trunk): count_frozen_layers(trunk)} if hasattr(policy, "peft_config") else {}


def _scatter(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return values (N,) of the real tokens in the mask's shape (B, T), zero elsewhere; differentiable."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)
