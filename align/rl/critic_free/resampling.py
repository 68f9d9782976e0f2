"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): other prompts for those whose responses all score the same.

Which prompts come, and their seeds, follow from the run's seed, the update and the round, so that a resumed run samples
what the uninterrupted one would have, whatever the number of processes. Left out: sampling until every group
varies, which need not end; what is left after some rounds is learned nothing from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from align.rl.critic_free.advantages import without_variance
from align.rl.prompts import derive_seed
from align.rl.rollout import Rollout, joined

if TYPE_CHECKING:
    from align.rl.rollout_trainer import RolloutTrainer


def resampled(trainer: RolloutTrainer, rollout: Rollout, rounds: int) -> Rollout:
    """``rollout`` with groups of other prompts in place of those without variance, as far as ``rounds`` give any."""
    chosen, redrawn = rollout, []
    for number in range(rounds):
        flat = _groups(chosen, varying=False)
        if not flat:
            break
        more = _sample(trainer, rollout, number, rounds, len(flat))
        redrawn.append(more)
        better = _groups(more, varying=True)
        replaced = flat[: len(better)]
        if replaced:
            kept = [i for i, group in enumerate(chosen.groups) if group not in set(replaced)]
            wanted = [i for i, group in enumerate(more.groups) if group in set(better)]
            chosen = joined([chosen.subset(kept), more.subset(wanted)] if kept else [more.subset(wanted)])
    if chosen is not rollout:
        chosen.drawn = rollout
    chosen.redrawn = redrawn
    return chosen


def _groups(rollout: Rollout, varying: bool) -> list[int]:
    flat = without_variance(rollout.tensors["scores"], torch.tensor(rollout.groups)).tolist()
    return sorted({group for group, same in zip(rollout.groups, flat, strict=True) if same != varying})


def _sample(trainer: RolloutTrainer, rollout: Rollout, number: int, rounds: int, count: int) -> Rollout:
    args = trainer.args
    start = (rollout.update * rounds + number) * (args.rollout_batch // args.samples_per_prompt)
    indices = trainer.prompts.draw(start, count, derive_seed(args.seed, "resampled prompts"))
    seeds = [derive_seed(args.seed, "resampling", at) for at in range(start, start + count)]
    more = trainer.draw(rollout.update, indices, seeds)
    for phase, seconds in more.seconds.items():
        rollout.seconds[phase] += seconds
    return more
