"""Policy, reference and, for PPO, critic as the one module that the Trainer optimizes."""

from __future__ import annotations

import contextlib
import copy
from typing import Any, Self

import torch
from torch import nn

from align.errors import UserError
from align.models.fast import ragged_rows, shared_layers
from align.models.sharding import in_parts
from align.models.tuning.apply import initial_policy
from align.rl.logprobs import Temperature, token_logprobs
from align.rl.packing import Batch
from align.rl.ppo.critic import Critic, trunk_of


class PolicyAndReference(nn.Module):
    """``policy`` (a causal model, maybe with LoRA) and the frozen ``reference``.

    A LoRA policy with its adapter off is the reference; a fully tuned one gets a frozen copy. Dropout is always off:
    otherwise the ratio is not 1 at the first step and KL is noise.
    """

    _keys_to_ignore_on_save = None

    def __init__(self, policy: Any, temperature: float) -> None:
        super().__init__()
        _check_head(policy)
        self.policy = policy
        self.temperature = temperature
        self.checkpointing = False
        self.frozen_layers = _frozen_layers(policy, trunk_of(policy))
        self.reference = None if hasattr(policy, "disable_adapter") else copy.deepcopy(policy).requires_grad_(False)
        self._without_dropout()

    def _without_dropout(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                setattr(module, "attention_dropout", 0.0)  # noqa: B010  (nn.Module types its attributes)

    @property
    def trained(self) -> list[Any]:
        """The models with trunks that gradients flow through."""
        return [self.policy]

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, unless activations are checkpointed, which transformers does in training mode only."""
        return super().train(mode and self.checkpointing)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """What the Trainer calls for ``gradient_checkpointing=True``."""
        self.checkpointing = True
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for model in self.trained:
            model.gradient_checkpointing_enable(**options)

    def forward(self, batch: Batch, policy: bool = True, *, reference: bool = False) -> dict[str, torch.Tensor]:
        """``logprobs`` and ``entropy`` (B, T), ``ref_logprobs`` (B, T): those asked for; float32, zero on padding.

        All at the sampling temperature, but at 1 for the last ``batch["supervised"]`` rows.
        """
        out = {}
        if policy:
            states = self._states(trunk_of(self.policy), batch)
            out["logprobs"], out["entropy"] = self._logprobs(self.policy, states, batch)
        if reference:
            out["ref_logprobs"] = self._reference_logprobs(batch)
        return out

    def _reference_logprobs(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad(), self.reference_policy() as model:
            return self._logprobs(model, self._states(trunk_of(model), batch), batch)[0]

    @contextlib.contextmanager
    def reference_policy(self) -> Any:
        """The policy as it was before training."""
        if self.reference is not None:
            yield self.reference
        else:
            with initial_policy(self.policy) as model:
                yield model

    def _states(self, trunk: Any, batch: Batch) -> torch.Tensor:
        """(R * L, H) or (N, H) hidden states; layers that nothing trains are passed once for all that share them"""
        count = self.frozen_layers.get(id(trunk), 0)
        if not count or in_parts(self):
            return _hidden(trunk, batch)
        known = batch.setdefault("below", {})
        key = (*shared_layers.same_below(trunk), count)
        if key not in known:
            with torch.no_grad(), shared_layers.below(trunk, count):
                known[key] = _hidden(trunk, batch)
        with shared_layers.above(trunk, count):
            return _hidden(trunk, batch, known[key])

    def _logprobs(self, model: Any, states: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        mask = batch["response_mask"]
        hidden = states[batch["positions"][:, :-1][mask]]  # (N, H), response tokens only
        head = model.get_output_embeddings()
        logprobs, entropy = token_logprobs(hidden, head, batch["targets"][mask], self._temperature(batch))
        return _scatter(logprobs, mask), _scatter(entropy, mask)

    def _temperature(self, batch: Batch) -> Temperature:
        """The sampling temperature, and 1 for a batch's ``supervised`` rows, whose likelihood is learned as in SFT."""
        if self.temperature == 1.0 or "supervised" not in batch:
            return self.temperature
        mask, supervised = batch["response_mask"], int(batch["supervised"])
        rows = torch.full((len(mask), 1), self.temperature, device=mask.device)
        rows[len(mask) - supervised :] = 1.0
        return rows.expand_as(mask)[mask][:, None]


class PolicyAndCritic(PolicyAndReference):
    """... and the ``critic``."""

    def __init__(self, policy: Any, critic: Critic, temperature: float, critic_detach: bool = True) -> None:
        """``critic_detach``: values of a head on the policy's own trunk send no gradient into it."""
        super().__init__(policy, temperature)
        self.critic, self.critic_detach = critic, critic_detach
        if critic.trunk is not None:
            self.frozen_layers |= _frozen_layers(policy, critic.trunk)
        self._without_dropout()

    @property
    def trained(self) -> list[Any]:
        """The policy, and the critic's trunk where it has one."""
        return [self.policy, *([] if self.critic.trunk is None else [self.critic.trunk])]

    def forward(
        self, batch: Batch, policy: bool = True, critic: bool = True, reference: bool = False
    ) -> dict[str, torch.Tensor]:
        """``logprobs`` and ``entropy`` (B, T), ``values`` (B, T+1), ``ref_logprobs`` (B, T): those asked for.

        The last ``batch["ptx"]`` rows, if any, are supervised texts: they have no values.

        ``values[:, t]`` belongs to the state before token t, the column after a row's last token to the state at the
        end. All are float32, and zero on padding.
        """
        out = {}
        states = None  # (R * L, H) or (N, H) of the policy's trunk
        if policy or (critic and self.critic.trunk is None):
            with torch.set_grad_enabled(torch.is_grad_enabled() and policy):
                states = self._states(trunk_of(self.policy), batch)
        if policy and states is not None:
            out["logprobs"], out["entropy"] = self._logprobs(self.policy, states, batch)
        if critic:
            out["values"] = self._values(states, batch)
        if reference:
            out["ref_logprobs"] = self._reference_logprobs(batch)
        return out

    def _values(self, states: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        if self.critic.trunk is not None:
            batch = batch.get("without_ptx", batch)
            states = self._states(self.critic.trunk, batch)
        elif states is not None and self.critic_detach:
            states = states.detach()
        assert states is not None
        own = len(batch["targets"]) - int(batch.get("ptx", 0))
        mask = batch["response_mask"][:own]
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)  # (B, T+1)
        return _scatter(self.critic.values(states[batch["positions"][:own][mask]]), mask)


def _hidden(trunk: Any, batch: Batch, states: torch.Tensor | None = None) -> torch.Tensor:
    """(R * L, H), or (N, H) of ragged rows, from their tokens or from such ``states``."""
    ids = batch["input_ids"]
    if "layout" in batch:
        return ragged_rows.hidden_states(trunk, ids, batch["position_ids"], batch["layout"], states)
    given = {"input_ids": ids} if states is None else {"inputs_embeds": states.unflatten(0, ids.shape)}
    flat: torch.Tensor = trunk(**given, use_cache=False).last_hidden_state.flatten(0, 1)
    return flat


def _frozen_layers(policy: Any, trunk: Any) -> dict[int, int]:
    """By the trunk's id, how many of its lowest layers nothing trains; only adapters leave them so for good."""
    return {id(trunk): shared_layers.frozen_below(trunk)} if hasattr(policy, "peft_config") else {}


def _scatter(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N,) values of the real tokens -> mask's shape, zero elsewhere; differentiable."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def _check_head(policy: Any) -> None:
    """The head is applied to response tokens by ``logprobs.py``, which knows linear heads and nothing after them."""
    config = policy.config.get_text_config()
    for name, neutral in (("final_logit_softcapping", None), ("logits_scaling", 1), ("logit_scale", 1)):
        value = getattr(config, name, neutral)
        if value not in (None, neutral):
            raise UserError(
                f"ppo: this model transforms its logits ({name}: {value}), which PPO here does not do; "
                "its log-probabilities would be wrong. Use a model without."
            )
