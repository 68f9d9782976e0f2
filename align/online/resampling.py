"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): other prompts for those whose responses all score the same.

Which prompts come, and their seeds, follow from the run's seed, the update and the round, so that a resumed run samples
what the uninterrupted one would have. Each process looks after its own groups. Left out: sampling until every group
varies, which need not end; what is left after some rounds is learnt nothing from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from align.online.advantages import without_variance
from align.ppo.prompts import derive_seed
from align.ppo.rollout import Rollout, sample_prompts

if TYPE_CHECKING:
    from align.ppo.experience import RolloutTrainer


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
    args, since = trainer.args, time.perf_counter()
    most = args.local_batch // args.samples_per_prompt
    start = ((rollout.update * rounds + number) * args.world_size + args.process_index) * most
    indices = trainer.prompts.draw(start, count, derive_seed(args.seed, "resampled prompts"))
    seeds = [derive_seed(args.seed, "resampling", at) for at in range(start, start + count)]
    more = sample_prompts(trainer.engine, trainer.prompts, args, rollout.update, indices, seeds)
    sampled = time.perf_counter()
    trainer.score(more)
    rollout.seconds["sampling"] += sampled - since
    rollout.seconds["scoring"] += time.perf_counter() - sampled
    return more


def joined(parts: Sequence[Rollout]) -> Rollout:
    """One rollout of several of the same update, group after group; none of theirs are taken for the same."""
    width = max(part.tensors["response_mask"].shape[1] for part in parts)
    groups: list[int] = []
    for part in parts:
        first = max(groups, default=-1) + 1
        places = {group: first + at for at, group in enumerate(dict.fromkeys(part.groups))}
        groups += [places[group] for group in part.groups]
    return Rollout(
        update=parts[0].update,
        rows=[row for part in parts for row in part.rows],
        groups=groups,
        prompts=[prompt for part in parts for prompt in part.prompts],
        responses=[response for part in parts for response in part.responses],
        texts=[text for part in parts for text in part.texts],
        tensors={name: torch.cat([_widened(part.tensors[name], width) for part in parts]) for name in parts[0].tensors},
    )


def _widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    if tensor.dim() == 1:
        return tensor
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))
