"""Arguments of the trainers without a critic, on what every trainer that samples takes (``align.rl.arguments``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from align.rl.arguments import RolloutArguments
from align.rl.critic_free.presets import PRESETS, GroupLoss, Preset, Scale


def need_groups(samples: int, why: str) -> None:
    """Raise ``ValueError`` unless there are several responses to a prompt."""
    if samples < 2:
        raise ValueError(f"samples_per_prompt is {samples}; {why} needs at least 2 responses to each prompt.")


@dataclass
class GRPOConfig(RolloutArguments):
    """Field names and meanings are those of the ``grpo`` stage; counts are over all processes together."""

    loss: GroupLoss = field(default="grpo", metadata={"help": "Variant of the objective; it decides what is not set."})
    clip_range: float | None = field(default=None, metadata={"help": "The ratio falls no further below 1 than this."})
    clip_range_high: float | None = field(default=None, metadata={"help": "And rises no further above it than this."})
    scale_rewards: Scale | None = field(
        default=None, metadata={"help": "Divide scores by their spread in the group, in the batch, or not at all."}
    )
    zero_variance: Literal["keep", "resample"] = field(
        default="keep", metadata={"help": "What becomes of groups whose scores are all the same."}
    )
    resample_rounds: int = field(default=3, metadata={"help": "Times that other prompts are tried in their place."})
    overlong_buffer: int = field(default=0, metadata={"help": "Last tokens before max_tokens that cost; 0 for none."})
    overlong_penalty: float = field(default=1.0, metadata={"help": "Subtracted from a score at max_tokens."})

    samples_per_prompt: int = field(default=8, metadata={"help": "Responses to each prompt: a group."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's usual epsilon."})
    kl_coef: float = field(default=0.04, metadata={"help": "Weight of the drift from the reference; 0 for none."})
    kl_in: Literal["reward", "loss"] = field(default="loss", metadata={"help": "Where drift is paid for."})
    loss_estimator: ClassVar[Literal["k2", "k3"]] = "k3"

    @property
    def preset(self) -> Preset:
        """What the loss's name stands for."""
        return PRESETS[self.loss]

    @property
    def clip(self) -> tuple[float, float]:
        """How far the ratio may fall below 1, and rise above it; a range given alone is both."""
        low = self.preset.clip_range if self.clip_range is None else self.clip_range
        high = self.clip_range_high
        if high is None and (self.clip_range is None or not self.preset.clips):
            high = self.preset.clip_range_high
        return low, low if high is None else high

    @property
    def scale(self) -> Scale:
        """``scale_rewards`` or the loss's own."""
        return self.scale_rewards or self.preset.scale_rewards

    def _check(self) -> None:
        super()._check()
        need_groups(self.samples_per_prompt, "a group's mean as the baseline")
        if self.max_staleness and self.zero_variance == "resample":
            raise ValueError(
                f"max_staleness is {self.max_staleness}, but resampling asks the engine for more of this very update; "
                "set zero_variance keep, or max_staleness 0."
            )
        if not 0 <= self.overlong_buffer <= self.max_tokens:
            raise ValueError(f"overlong_buffer is {self.overlong_buffer}; it lies within max_tokens {self.max_tokens}.")


@dataclass
class RLOOConfig(RolloutArguments):
    """Field names and meanings are those of the ``rloo`` stage; counts are over all processes together."""

    clip_range: float = field(default=0.2, metadata={"help": "A response's ratio earns nothing further from 1."})
    clip_range_high: float | None = field(default=None, metadata={"help": "Above 1; by default clip_range."})
    whiten_advantages: bool = field(default=False, metadata={"help": "Mean 0 and variance 1 over the rollout."})

    samples_per_prompt: int = field(default=4, metadata={"help": "Responses to each prompt."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's usual epsilon."})

    @property
    def clip(self) -> tuple[float, float]:
        """How far the ratio may fall below 1, and rise above it."""
        return self.clip_range, self.clip_range if self.clip_range_high is None else self.clip_range_high

    def _check(self) -> None:
        super()._check()
        need_groups(self.samples_per_prompt, "the mean of the others as the baseline")


@dataclass
class OnlineDPOConfig(RolloutArguments):
    """Field names and meanings are those of the ``online_dpo`` stage; counts are over all processes together."""

    corrects: ClassVar[bool] = False

    beta: float = field(default=0.1, metadata={"help": "What a nat of drift costs; for ipo that paper's tau."})
    loss: Literal["sigmoid", "ipo", "hinge"] = field(default="sigmoid", metadata={"help": "Of a pair."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Share of pairs the scorer gets wrong (sigmoid)."})

    samples_per_prompt: int = field(default=2, metadata={"help": "Responses to each prompt; best and worst pair up."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's usual epsilon."})

    @property
    def kept_per_prompt(self) -> int:
        """The best and the worst."""
        return 2

    def _check(self) -> None:
        super()._check()
        need_groups(self.samples_per_prompt, "a pair")
        if self.per_device_train_batch_size % 2:
            raise ValueError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size}; the two responses of a pair are "
                "learned from together, so it must be even."
            )


@dataclass
class BestOfNConfig(RolloutArguments):
    """Field names and meanings are those of the ``rejection`` stage; an update is one of its rounds."""

    corrects: ClassVar[bool] = False

    best: int = field(default=1, metadata={"help": "Best responses to each prompt that are learned from."})
    threshold: float | list[float] | None = field(
        default=None, metadata={"help": "Lowest score that is learned from; a list has one for each round."}
    )

    samples_per_prompt: int = field(default=8, metadata={"help": "Responses to each prompt to choose from."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's usual epsilon."})
    truncated: Literal["learn", "mask"] = field(
        default="mask", metadata={"help": "Whether a response cut at max_tokens may be learned from."}
    )

    @property
    def kept_per_prompt(self) -> int:
        """The best of a prompt's responses."""
        return self.best

    def lowest(self, update: int) -> float | None:
        """The threshold of a round; the last one of a list stays."""
        if not isinstance(self.threshold, list):
            return self.threshold
        return self.threshold[min(update, len(self.threshold) - 1)]

    def _check(self) -> None:
        super()._check()
        if not 1 <= self.best <= self.samples_per_prompt:
            raise ValueError(f"best is {self.best}; it is chosen from samples_per_prompt {self.samples_per_prompt}.")
