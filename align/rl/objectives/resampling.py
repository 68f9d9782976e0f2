"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): other prompts for those whose responses all score the same.

The prompts and their seeds follow from the run's seed, the update and the round, so that a resumed run samples what the
uninterrupted one would have, in any number of processes. Left out: sampling until every group varies, which need not
end. Groups that still do not vary after some rounds teach nothing.
"""

from __future__ import annotations

import torch

from align.rl.advantages import without_variance
from align.rl.prompts import derive_seed
from align.rl.rollout import Rollout, join_rollouts
from align.rl.sampler import RolloutSampler


def resample(rollout: Rollout, sampler: RolloutSampler, rounds: int) -> Rollout:
    """Return ``rollout`` with groups without variance replaced, as far as ``rounds`` of sampling yield others."""
    selected, resampled = rollout, []
    for number in range(rounds):
        flat = _groups(selected, varying=False)
        if not flat:
            break
        extra = _sample_more(sampler, rollout, rounds * rollout.update + number, len(flat))
        resampled.append(extra)
        # As many flat groups go as varying ones came, so the number of prompts stays the same.
        varying = set(_groups(extra, varying=True))
        replaced = set(flat[: len(varying)])
        if replaced:
            parts = []
            remaining = [i for i, group in enumerate(selected.groups) if group not in replaced]
            if remaining:
                parts.append(selected.subset(remaining))
            parts.append(extra.subset([i for i, group in enumerate(extra.groups) if group in varying]))
            selected = join_rollouts(parts)
    if selected is not rollout:
        selected.candidates = rollout
    selected.resampled = resampled
    return selected


def _groups(rollout: Rollout, varying: bool) -> list[int]:
    """Return the groups whose scores vary, or those whose scores are all equal."""
    is_flat = without_variance(rollout.tensors["scores"], torch.tensor(rollout.groups)).tolist()
    return sorted({group for group, flat in zip(rollout.groups, is_flat, strict=True) if flat != varying})


def _sample_more(sampler: RolloutSampler, rollout: Rollout, round_number: int, count: int) -> Rollout:
    """Return responses to ``count`` other prompts; the time counts as the rollout's.

    ``round_number`` counts rounds over all updates. Each has room for a rollout's prompts in an endless sequence of its
    own, so no two rounds get the same seeds.
    """
    args = sampler.args
    start = round_number * args.prompts_per_update
    indices = sampler.prompts.draw(start, count, derive_seed(args.seed, "resampled prompts"))
    seeds = [derive_seed(args.seed, "resampling", number) for number in range(start, start + count)]
    extra = sampler.sample(rollout.update, indices, seeds)
    for phase, seconds in extra.seconds.items():
        rollout.seconds[phase] += seconds
    return extra
