"""Settings of the stages that follow a policy gradient: ppo, grpo and rloo. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.own_function import OwnFunction, own_or
from align.config.runtime.launch import LaunchConfig
from align.config.runtime.rollouts import RolloutsConfig
from align.config.stages.rl import RolloutFields
from align.config.stages.training import LearningRate, PeakRates


class DriftFields(RolloutFields):
    """Settings of the methods that penalize drift from the reference: ppo, grpo, rloo."""

    keyed_when_set: ClassVar[frozenset[str]] = RolloutFields.keyed_when_set | {"in_flight"}
    default_loss_estimator: ClassVar[Literal["k2", "k3"]] = "k2"
    """KL estimator in the loss if ``kl_estimator`` is not set."""

    kl_coef: float = Field(0.05, ge=0)
    """KL penalty per nat of drift from the reference. 0 lets the policy follow the score anywhere."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Apply the KL penalty to each token's reward, or as a term of the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """``k1`` in the reward; in the loss ``k2`` (the gradient of the KL, the default) or ``k3`` (of the reverse KL)."""
    kl_budget: float | None = Field(None, gt=0)
    """Maximum KL in nats per response. A rollout above it ends the run before the policy learns from it."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """``adaptive`` adjusts ``kl_coef`` to bring the KL per response to ``kl_target`` (arXiv 1909.08593)."""
    kl_target: float = Field(6.0, gt=0)
    """Target of the adaptive controller, in nats per response."""
    kl_horizon: int = Field(10_000, ge=1)
    """Responses over which the adaptive controller reacts; at least ``rollout_batch``."""
    truncated: Literal["learn", "mask"] = "learn"
    """``mask`` leaves responses cut at ``max_tokens`` out of the loss. Metrics still count them."""
    normalize_scores: bool = False
    """Normalize scores to mean 0 and variance 1 over all responses so far, before clipping and penalties."""
    score_clip: float | None = Field(None, gt=0)
    """Scores are clipped to plus or minus this."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    importance_cap: float | None = Field(2.0, ge=1)
    """Cap on the importance weights that correct the engine's log-probabilities to the trainer's. Null: no weights."""
    max_staleness: int = Field(0, ge=0, le=64)
    """Updates that sampling may run ahead, with weights as old. With 1, servers sample while the trainer learns."""
    in_flight: Literal["wait", "continue"] = "wait"
    """Treatment of unfinished episodes when the policy has new weights. ``wait``: they end with the old weights.
    ``continue``: servers load the new weights between two turns. Then the weights of a turn depend on the clock."""
    importance_sequence_cap: float | None = Field(None, gt=1)
    """Drop responses whose sequence ratio of trainer to engine is outside [1/cap, cap]. Null: drop none."""

    @property
    def drift_estimator(self) -> Literal["k1", "k2", "k3"]:
        """``kl_estimator``, or its default."""
        if self.kl_estimator is not None:
            return self.kl_estimator
        return "k1" if self.kl_in == "reward" else self.default_loss_estimator

    @model_validator(mode="after")
    def _check_kl_controller(self) -> Self:
        # The controller multiplies the coefficient.
        if self.kl_controller == "adaptive" and self.kl_coef == 0:
            raise ValueError(
                "kl_controller is adaptive, but kl_coef is 0 and stays so; set kl_coef above 0, or `kl_controller: "
                "fixed`."
            )
        # The coefficient changes by up to 20 % per horizon: over several in an update, it could even turn negative.
        if self.kl_controller == "adaptive" and self.kl_horizon < self.rollout_batch:
            raise ValueError(
                f"kl_horizon {self.kl_horizon} is shorter than an update, whose rollout_batch is "
                f"{self.rollout_batch} responses, so kl_coef would overshoot; set kl_horizon to {self.rollout_batch} "
                "or more, or `kl_controller: fixed`."
            )
        return self

    @model_validator(mode="after")
    def _check_staleness(self) -> Self:
        if self.max_staleness and self.importance_cap is None:
            raise ValueError(
                f"max_staleness is {self.max_staleness}, so older weights sample, which importance_cap corrects for. "
                "Set importance_cap (2.0 by default), or `max_staleness: 0`."
            )
        return self

    @model_validator(mode="after")
    def _check_in_flight(self) -> Self:
        if self.in_flight == "wait":
            return self
        if not self.max_staleness:
            raise ValueError(
                "in_flight is continue, but max_staleness is 0, with which the policy gets no new weights while "
                "episodes are played. Set `max_staleness: 1`, or `in_flight: wait`."
            )
        if self.environment is None:
            raise ValueError(
                "in_flight is continue, which changes weights between the turns of an episode, but there is no "
                "environment; a single response has one turn. Set environment, or `in_flight: wait`."
            )
        return self

    def sampling_objection(self, rollouts: RolloutsConfig) -> str | None:
        """Return why the servers that sample cannot do what ``in_flight`` says, and the remedy; None if they can."""
        if self.in_flight == "wait":
            return None
        remedy = "or `in_flight: wait`"
        if not rollouts.pooled:
            return (
                "continue lets servers take new weights between turns, but no servers sample for this stage. Set "
                f"runtime.rollouts, {remedy}."
            )
        if rollouts.weights == "nccl":
            return (
                "continue lets servers take new weights between turns, but runtime.rollouts.weights is nccl, by which "
                f"the trainer sends them while no server samples. Take `weights: folder`, {remedy}."
            )
        return None

    @model_validator(mode="after")
    def _check_kl_estimator(self) -> Self:
        if self.kl_in == "reward" and self.kl_estimator in ("k2", "k3"):
            raise ValueError(
                f"kl_estimator is {self.kl_estimator}, whose gradient as a reward nearly vanishes close to the "
                "reference; use k1, or set `kl_in: loss`."
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("kl_estimator is k1, which as a loss has no gradient on average; use k2 or k3.")
        return self


def drift_settings(config: RolloutFields) -> DriftFields:
    """Return the config of a method that penalizes drift; for another method the defaults, such as no staleness."""
    if isinstance(config, DriftFields):
        return config
    return DriftFields.for_trainer()


class PpoConfig(DriftFields):
    """One update samples ``rollout_batch`` responses, scores them and learns from them.

    Memory: LoRA needs the policy once (with its adapter off it is the reference), and the reward model once (the critic
    is an adapter on it), both in ``precision``. Full tuning needs a second, trained copy of both, with
    AdamW's state. `align plan --memory` shows the amounts for a model, and what other choices would cost.
    """

    adam_epsilon: ClassVar[float] = 1e-5
    """AdamW's epsilon for the policy; usual for PPO."""
    keyed_when_set: ClassVar[frozenset[str]] = DriftFields.keyed_when_set | {"turn_discount", "loss"}
    has_token_credit: ClassVar[bool] = True
    critic_rates: ClassVar[PeakRates] = PeakRates(5e-4, 1e-4)
    """Values of ``critic_learning_rate: auto``."""

    critic: Literal["reward", "policy", "head"] | None = None
    """Model that the critic starts from: by default the reward model, else the policy. From ``policy`` it starts at 0.

    Memory: with LoRA, ``reward`` and ``policy`` cost a second adapter and a head on weights that are loaded anyway.
    With full tuning they cost a separate model, 16 bytes a parameter with AdamW. ``head``, a linear head on the
    policy's hidden states, costs one vector and no forward pass.
    """
    critic_detach: bool = True
    """For ``critic: head``: stop the value loss at the head. False lets it also train the policy's trunk."""
    critic_learning_rate: LearningRate | None = "auto"
    """Learning rate of the critic. ``auto`` follows from ``tuning`` and the model's size (docs/methods.md); the plan
    shows its value. Null: the policy's."""
    critic_head_learning_rate: float | None = Field(None, gt=0, le=1)
    """Learning rate of the critic's value head; by default the critic's, with LoRA a tenth of it."""
    critic_warmup_updates: int = Field(0, ge=0)
    """First updates in which only the critic learns."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    turn_discount: float = Field(1.0, gt=0, le=1)
    """For episodes: discount at each step from one turn to the next, on top of ``gamma``."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of generalized advantage estimation: 1 trusts the returns, 0 the critic."""
    truncation: Literal["bootstrap", "terminal"] = "terminal"
    """Value after a response cut at ``max_tokens``: the critic's estimate (``bootstrap``), or 0 (``terminal``)."""
    whiten_rewards: bool = False
    """Scale token rewards to variance 1, keeping their mean."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the update's tokens."""
    loss: own_or(Literal["ppo"]) = "ppo"  # type: ignore[valid-type]
    """``ppo``: the clipped surrogate. Or an own function of ``align.methods.records.ResponseTokens``
    (docs/own_methods.md). The critic's loss is added to it."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """Clip range of a token's probability ratio around 1."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the ratio for negative advantages (arXiv 1912.09729), usually 3."""
    value_clip_range: float | None = Field(0.5, gt=0)
    """Maximum change of a value per update, in units of reward. Null switches value clipping off."""
    vf_coef: float = Field(1.0, gt=0)
    """Weight of the value loss."""
    loss_aggregation: Literal["token", "sequence", "constant"] = "token"
    """``token``: every token weighs the same. ``sequence``: every response does. ``constant``: token sums are divided
    by ``max_tokens``."""

    def processes_objection(self, launch: LaunchConfig) -> str | None:
        """As for every stage that samples; and DeepSpeed has no critic warm-up: its optimizer steps every weight."""
        if self.critic_warmup_updates and launch.strategy == "deepspeed" and launch.known != 1:
            return (
                f"critic_warmup_updates {self.critic_warmup_updates} does not go with strategy deepspeed, whose "
                "optimizer decays and counts the policy's weights all the same; take fsdp2, or leave it out."
            )
        return super().processes_objection(launch)

    @classmethod
    def for_trainer(cls, **settings: Any) -> Self:
        """As for every method; the critic of a script has the policy's rate if none is set."""
        return super().for_trainer(**({"critic_learning_rate": None} | settings))

    def identities(self, base: Path) -> dict[str, str]:
        """Return the identities of all functions, for the stage's key."""
        own = {"loss": self.loss.identity("loss")} if isinstance(self.loss, OwnFunction) else {}
        return super().identities(base) | own

    @model_validator(mode="after")
    def _check_own_loss(self) -> Self:
        if isinstance(self.loss, OwnFunction):
            for name in self.changed("clip_range", "dual_clip", "loss_aggregation"):
                raise ValueError(f"{name} is of the shipped loss; give the own loss an option of its name instead.")
        return self

    def critic_rate(self, parameters: int) -> float:
        """Return the critic's learning rate for a model of so many parameters."""
        rate = self.critic_learning_rate
        if rate == "auto":
            return self.critic_rates.choose(self.tuning, parameters)
        return self.peak_rate if rate is None else rate

    def default_rates(self, parameters: int) -> dict[str, float]:
        """Return the rates of policy and critic that are ``auto``, with their values."""
        rates = super().default_rates(parameters)
        if self.critic_learning_rate == "auto":
            rates["critic_learning_rate"] = self.critic_rate(parameters)
        return rates

    @property
    def critic_source(self) -> Literal["reward", "policy", "head"]:
        """``critic``, or its default."""
        return self.critic or ("reward" if self.reward else "policy")

    @model_validator(mode="after")
    def _check_critic(self) -> Self:
        if self.critic == "reward" and not self.reward:
            raise ValueError("critic is reward, but no reward stage is named; set reward, or `critic: policy`.")
        if self.critic_warmup_updates >= self.updates:
            raise ValueError(
                f"critic_warmup_updates {self.critic_warmup_updates} leaves none of {self.updates} updates for the "
                "policy; lower it, or raise updates."
            )
        if self.whiten_rewards and self.rollout_batch < 8:
            raise ValueError(f"whiten_rewards needs a rollout_batch of at least 8; it is {self.rollout_batch}.")
        return self


GroupLoss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"]
Scale = Literal["group", "batch", "none"]


@dataclass(frozen=True)
class Preset:
    """Defaults of a loss variant, whose function is in ``align.methods.losses``.

    ``aggregation``: as PPO's ``loss_aggregation``. A field replaces the value of its name among the others.
    """

    aggregation: Literal["token", "sequence", "constant"]
    scale_rewards: Scale = "group"
    clip_range: float = 0.2
    clip_range_high: float | None = None


PRESETS: dict[GroupLoss, Preset] = {
    "grpo": Preset("sequence"),
    "bnpo": Preset("token"),
    "dr_grpo": Preset("constant", scale_rewards="none"),
    "dapo": Preset("token", clip_range_high=0.28),
    "gspo": Preset("sequence", clip_range=3e-4, clip_range_high=4e-4),
    "cispo": Preset("token", clip_range_high=4.0),
}
"""Loss variant -> its parts. Sources: ``GrpoConfig.loss``."""


class GrpoConfig(DriftFields):
    """``loss`` selects the variant. Fields that are not set follow its paper (docs/methods.md).

    The other fields are the fields of ``ppo`` without its critic. Memory: the policy; with full tuning also its frozen
    copy.
    """

    default_loss_estimator: ClassVar[Literal["k2", "k3"]] = "k3"
    keyed_when_set: ClassVar[frozenset[str]] = DriftFields.keyed_when_set | {"advantage"}

    loss: own_or(GroupLoss) = "grpo"  # type: ignore[valid-type]
    """``grpo``: every response weighs the same (2402.03300). ``bnpo``: every token of a step does. ``dr_grpo``: token
    sums over ``max_tokens``, scores only centered (2503.20783). ``dapo``: tokens weigh the same, and the ratio may rise
    to 1.28 (2503.14476). ``gspo``: one ratio per response (2507.18071). ``cispo``: the ratio is a capped weight
    (2506.13585). Or an own function of ``align.methods.records.ResponseTokens``: ``"my_methods:soft_clip"``, or
    ``{function: "my_methods:soft_clip", low: 0.2}`` with its options (docs/own_methods.md)."""
    advantage: own_or(None) = None  # type: ignore[valid-type]
    """Own function of ``align.methods.records.Group`` that returns the advantages of the responses to a prompt, instead
    of the score above the group's mean (docs/own_methods.md)."""
    samples_per_prompt: int = Field(8, ge=2)
    """Responses to each prompt: the group, whose mean is the baseline."""
    kl_coef: float = Field(0.04, ge=0)
    """Weight of the KL to the reference. The papers on dr_grpo, dapo, gspo and cispo use 0, with checkers as scores."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Apply the KL penalty as a term of the loss, or to the score of a response before it is compared to its group."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """``k3`` (GRPO's, the default) or ``k2`` in the loss; ``k1`` in the reward."""
    scale_rewards: Scale | None = None
    """Divide centered scores by their standard deviation in the ``group``, in the ``batch``, or not (``none``).
    ``dr_grpo``: none, the others: group."""
    clip_range: float | None = Field(None, gt=0, lt=1)
    """Clip range of the ratio below 1. ``gspo``: 0.0003, the others: 0.2. Not for ``cispo``, which has no lower one."""
    clip_range_high: float | None = Field(None, gt=0)
    """Clip range of the ratio above 1. ``dapo``: 0.28, ``gspo``: 0.0004, ``cispo`` (which caps at 1 + this): 4, else
    ``clip_range``."""
    zero_variance: Literal["keep", "resample"] = "keep"
    """Groups whose responses all score the same have no gradient: keep and count them, or sample other prompts instead
    (DAPO's dynamic sampling)."""
    resample_rounds: int = Field(3, ge=1)
    """Maximum rounds of resampling in an update."""
    overlong_buffer: int = Field(0, ge=0)
    """Tokens before ``max_tokens`` over which a penalty rises (DAPO); 0 for none. Only sampled tokens count.
    ``truncated: mask`` filters."""
    overlong_penalty: float = Field(1.0, ge=0)
    """Penalty of a response of ``max_tokens`` sampled tokens."""

    @property
    def preset(self) -> Preset:
        """Parts of the loss variant. An own loss has the parts of ``bnpo``."""
        return PRESETS["bnpo" if isinstance(self.loss, OwnFunction) else self.loss]

    def identities(self, base: Path) -> dict[str, str]:
        """Return the identities of all functions, for the stage's key."""
        own = {"loss": self.loss, "advantage": self.advantage}
        functions = {name: value.identity(name) for name, value in own.items() if isinstance(value, OwnFunction)}
        return super().identities(base) | functions

    @model_validator(mode="after")
    def _check_own_functions(self) -> Self:
        if isinstance(self.loss, OwnFunction):
            for name in self.changed("clip_range", "clip_range_high"):
                raise ValueError(f"{name} is of the shipped losses; give the own loss an option of its name instead.")
        if self.advantage is not None and self.scale_rewards is not None:
            raise ValueError(
                "scale_rewards is of the shipped advantages, and advantage is an own function; remove one."
            )
        return self

    @property
    def clip(self) -> tuple[float, float]:
        """Clip range of the ratio below and above 1. If only ``clip_range`` is set, it applies to both."""
        low = self.preset.clip_range if self.clip_range is None else self.clip_range
        high = self.clip_range_high
        if high is None and self.clip_range is None:
            high = self.preset.clip_range_high
        return low, low if high is None else high

    @property
    def loss_options(self) -> dict[str, float]:
        """Arguments of the shipped loss."""
        low, high = self.clip
        return {"high": high} if self.loss == "cispo" else {"low": low, "high": high}

    @property
    def scale(self) -> Scale:
        """``scale_rewards``, or the default of the loss variant."""
        return self.scale_rewards or self.preset.scale_rewards

    @model_validator(mode="after")
    def _check_resampling_and_penalty(self) -> Self:
        if self.overlong_buffer > self.max_tokens:
            raise ValueError(f"overlong_buffer {self.overlong_buffer} is longer than max_tokens {self.max_tokens}.")
        if self.zero_variance == "keep" and self.changed("resample_rounds"):
            raise ValueError("resample_rounds is set, but zero_variance is keep; set `zero_variance: resample`.")
        if self.loss == "cispo" and self.clip_range is not None:
            raise ValueError("clip_range is set, but `loss: cispo` only caps the ratio; set clip_range_high instead.")
        if self.max_staleness and self.zero_variance == "resample":
            raise ValueError(
                f"max_staleness is {self.max_staleness}, but `zero_variance: resample` samples more for the current "
                "update; set `zero_variance: keep`, or `max_staleness: 0`."
            )
        return self


class RlooConfig(DriftFields):
    """The fields of ``ppo`` without its critic. A response is one action, and the KL penalty is part of its score."""

    loss: ClassVar[str] = "rloo"
    advantage: ClassVar[None] = None

    samples_per_prompt: int = Field(4, ge=2)
    """Responses to each prompt. The baseline of each is the mean of the others."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """Clip range of a response's probability ratio below 1."""
    clip_range_high: float | None = Field(None, gt=0)
    """Clip range of the ratio above 1; by default ``clip_range``."""
    whiten_advantages: bool = False
    """Scale advantages to mean 0 and variance 1 over the update's responses."""

    @property
    def clip(self) -> tuple[float, float]:
        """Clip range of the ratio below and above 1."""
        return self.clip_range, self.clip_range if self.clip_range_high is None else self.clip_range_high
