"""Validation on held-out prompts every few updates, and the weights of the best policy so far.

Validation does not test significance. Scores of a few prompts are noisy, and the best of several is biased upward. The
``evaluate`` stage measures a checkpoint on other prompts: prompts that select a policy come from the ``train`` split,
evaluations read the ``test`` split.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align.errors import UserError
from align.models.checkpoints.sharding import full_model
from align.rl import checkpoint
from align.rl.prompts import Prompts
from align.rl.rollout import COMPONENT, Rollout

if TYPE_CHECKING:
    from align.rl.arguments import RolloutArguments

FOLDER = "best-"


class BestPolicy:
    """The weights of the best policy so far, by a validated score or by a task's metric."""

    def __init__(self, args: RolloutArguments) -> None:
        self.args, self.folder = args, Path(str(args.output_dir))
        self.best: dict[str, float] | None = None
        """``update`` and measures of the best policy so far. Its weights are in ``best-<update>``."""

    def consider(self, model: Any, update: int, scores: Mapping[str, float], name: str, sign: int) -> None:
        """Save the weights of ``model`` if its ``sign * scores[name]`` is the highest so far."""
        if self.best is None or sign * scores[name] > sign * self.best[name]:
            self._replace(model, update, scores)

    def _replace(self, model: Any, update: int, scores: Mapping[str, float]) -> None:
        # Save under the update: a killed run may still need the former best, which ``tidy`` deletes later.
        self._save(model, update)
        self.best = {"update": float(update), **scores}

    def _save(self, model: Any, update: int) -> None:
        with full_model(model) as gathered_model:
            if self.args.should_save:
                # A killed run may have left a part of this folder.
                target = self.folder / f"{FOLDER}{update}"
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir(parents=True)
                checkpoint.save_trained(gathered_model, target)

    @property
    def weights(self) -> Path | None:
        """File with the weights of the best policy so far, None if there is none."""
        if self.best is None:
            return None
        return self.folder / f"{FOLDER}{int(self.best['update'])}" / checkpoint.WEIGHTS

    def tidy(self) -> None:
        """Delete the weights of policies that are no longer the best."""
        current = None if self.weights is None else self.weights.parent
        for folder in self.folder.glob(f"{FOLDER}*"):
            if folder != current:
                shutil.rmtree(folder, ignore_errors=True)

    def restore(self, model: Any) -> None:
        """Load the best policy's weights into the model."""
        if self.weights is None:
            return
        with full_model(model, store=True) as gathered_model:
            checkpoint.load_trained(gathered_model, self.weights.parent)


class Validation(BestPolicy):
    """Held-out ``prompts``, and the best policy on them. It is the trainer that samples and measures responses."""

    def __init__(self, prompts: Prompts, args: RolloutArguments) -> None:
        super().__init__(args)
        self.prompts = prompts

    def run(self, rollout: Rollout, update: int, model: Any) -> dict[str, float]:
        """Summarize measured responses of ``model`` after ``update`` updates, and save its weights if it is the best.

        Returns means over all processes as ``eval_<measure>``, the KL in nats per response (k1). Scores are means over
        the episodes that did not fail; there are none if all failed.
        """
        means = _means(rollout)
        if self._is_best(means):
            self._replace(model, update, means)
        return {f"eval_{name}": value for name, value in means.items()}

    def _is_best(self, means: dict[str, float]) -> bool:
        if self.args.config.keep == "last" or self.args.config.best_metric is not None:
            return False
        # A policy far from the reference may just exploit the score, so it does not count as better.
        if self.args.config.keep_kl is not None and means["kl"] > self.args.config.keep_kl:
            return False
        name = "gold" if self.args.config.keep == "best_gold" else "score"
        if name not in means:
            return False
        return self.best is None or means[name] > self.best[name]


def make_best(args: RolloutArguments) -> BestPolicy | None:
    """Return the holder of the best policy by a task's metric, None if no metric selects the policy."""
    return None if args.config.best_metric is None else BestPolicy(args)


def make_validation(
    args: RolloutArguments, rows: Iterable[Mapping[str, Any]] | None, tokenizer: Any
) -> Validation | None:
    """Return the validation that ``eval_updates`` asks for, None if it is not set.

    Raises ``ValueError`` without prompts, and ``UserError`` for fewer prompts than processes.
    """
    if args.config.eval_updates is None:
        return None
    if rows is None:
        raise ValueError("eval_updates is set, but no eval_dataset is given.")
    prompts = Prompts(rows, tokenizer, args.config.max_prompt_tokens)
    if len(prompts) < args.world_size:
        raise UserError(
            f"{len(prompts)} prompts to validate on, {prompts.dropped} longer prompts were skipped, for "
            f"{args.world_size} processes, each of which needs one. Use more prompts (if they select the policy, at "
            "most a fifth of the questions is held out), raise max_prompt_tokens, or use fewer processes."
        )
    return Validation(prompts, args)


def _means(rollout: Rollout) -> dict[str, float]:
    tensors = rollout.tensors
    mask = tensors["response_mask"]
    # A failed episode is no evidence about the policy. A score of 0 for it would look good if scores are negative.
    is_scored = ~tensors.get("failed", torch.zeros(len(rollout), dtype=torch.bool))
    scores = {"score": tensors["scores"]} | ({"gold": tensors["gold"]} if "gold" in tensors else {})
    means = {name: float(values[is_scored].double().mean()) for name, values in scores.items() if is_scored.any()}
    sums = {
        "kl": ((tensors["logprobs"] - tensors["ref_logprobs"]) * mask).double().sum(),
        "length": mask.double().sum(),
        "eos_rate": tensors["finished"].double().sum(),
    }
    if rollout.has_thoughts:
        sums["thought_length"] = tensors["thought_tokens"].double().sum()
        sums["open_thoughts"] = tensors["open_thought"].double().sum()
    means |= {name: float(total) / len(rollout) for name, total in sums.items()}
    for name in (name for name in tensors if name.startswith(COMPONENT)):
        values = tensors[name][torch.isfinite(tensors[name]) & is_scored].double()
        if len(values):
            means[name] = float(values.mean())
    return means
