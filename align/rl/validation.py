"""Held-out prompts answered every so many updates, and the best policy so far kept aside.

Left out: significance. Scores of a few prompts are noisy, and the best of several is a little too good to be true: what
a checkpoint is worth is for the ``evaluate`` stage to say, on other prompts. Stages see to that: prompts that choose
come out of the ``train`` split, evaluations read the ``test`` split.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.inference.shared_engine import part_for
from align.models.processes import gathered
from align.models.sharding import whole
from align.rl import checkpoint
from align.rl.prompts import Prompts, derive_seed
from align.rl.rollout import Rollout, joined, rollout_of

if TYPE_CHECKING:
    from align.rl.arguments import RolloutArguments
    from align.rl.rollout_trainer import RolloutTrainer

FOLDER = "best-"


class Validation:
    """Asked at update 0, every ``eval_updates`` updates, and at the end of training."""

    def __init__(self, prompts: Prompts, folder: Path) -> None:
        self.prompts, self.folder = prompts, folder
        self.best: dict[str, float] | None = None
        """``update`` and measures of the best policy so far; its weights lie in ``best-<update>``."""

    def run(self, trainer: RolloutTrainer, update: int) -> dict[str, float]:
        """Answer the prompts with the policy as it is after ``update`` updates; the engine holds its weights.

        Returns means over all processes under ``eval_<measure>``, ``kl`` in nats per response (k1).
        """
        rollout = self._answer(trainer)
        size = trainer.args.per_device_train_batch_size
        order = sorted(range(len(rollout)), key=rollout.lengths.__getitem__)
        trainer.measure(rollout, [order[at : at + size] for at in range(0, len(order), size)])
        found = _means(rollout)
        self._keep(trainer, update, found)
        return {f"eval_{name}": value for name, value in found.items()}

    def _answer(self, trainer: RolloutTrainer) -> Rollout:
        from align.inference.protocol import Sampling

        args = trainer.args
        mine = part_for(trainer.engine, len(self.prompts))
        sampling = Sampling(
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            # The same at every validation, in any number of processes: what changes between two is the policy.
            seeds=tuple(derive_seed(args.seed, "validation", i) for i in mine),
        )
        own = None
        if mine:
            answers = trainer.engine.generate([self.prompts.token_ids[i] for i in mine], sampling)
            own = rollout_of(self.prompts, list(mine), answers, 0)
            trainer.score(own)
        return joined([part for part in gathered(own) if part is not None])

    def _keep(self, trainer: RolloutTrainer, update: int, found: dict[str, float]) -> None:
        args = trainer.args
        name = "gold" if args.keep == "best_gold" else "score"
        if args.keep == "last" or (args.keep_kl is not None and found["kl"] > args.keep_kl):
            return
        if self.best is not None and found[name] <= self.best[name]:
            return
        with whole(trainer.model) as model:
            if args.should_save:
                target = self.folder / f"{FOLDER}{update}"
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir(parents=True)
                checkpoint.save_trained(model, target)
        self.best = {"update": float(update), **found}

    @property
    def weights(self) -> Path | None:
        """File with the weights of the best policy so far, None where there is none."""
        if self.best is None:
            return None
        return self.folder / f"{FOLDER}{int(self.best['update'])}" / checkpoint.WEIGHTS

    def tidy(self) -> None:
        """Delete the weights of policies that are no longer the best."""
        kept = None if self.best is None else f"{FOLDER}{int(self.best['update'])}"
        for folder in self.folder.glob(f"{FOLDER}*"):
            if folder.name != kept:
                shutil.rmtree(folder, ignore_errors=True)

    def restore(self, model: Any) -> None:
        """Put the best policy's weights into the model."""
        if self.best is None:
            return
        with whole(model, store=True) as plain:
            checkpoint.load_trained(plain, self.folder / f"{FOLDER}{int(self.best['update'])}")


def make_validation(
    args: RolloutArguments, rows: Iterable[Mapping[str, Any]] | None, tokenizer: Any
) -> Validation | None:
    """The validation that ``eval_updates`` asks for.

    Raises ``ValueError`` where no prompts are given, and ``UserError`` where too few of them are left.
    """
    if args.eval_updates is None:
        return None
    if rows is None:
        raise ValueError("eval_updates is set, but no eval_dataset is given.")
    prompts = Prompts(rows, tokenizer, args.max_prompt_tokens)
    if len(prompts) < args.world_size:
        raise UserError(
            f"{len(prompts)} prompts to validate on, {prompts.dropped} longer ones left out, for {args.world_size} "
            "processes, each of which needs one. Give more prompts (where they choose the policy, a fifth of the "
            "questions at most is taken), raise max_prompt_tokens, or take fewer processes."
        )
    return Validation(prompts, Path(str(args.output_dir)))


def _means(rollout: Rollout) -> dict[str, float]:
    tensors = rollout.tensors
    mask = tensors["response_mask"]
    sums = {
        "score": tensors["scores"].double().sum(),
        "gold": tensors["gold"].double().sum() if "gold" in tensors else None,
        "kl": ((tensors["logprobs"] - tensors["ref_logprobs"]) * mask).double().sum(),
        "length": mask.double().sum(),
        "eos_rate": tensors["finished"].double().sum(),
    }
    known = {name: total for name, total in sums.items() if total is not None}
    return {name: float(total) / len(rollout) for name, total in known.items()}
