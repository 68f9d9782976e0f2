"""The parts of ``continue_from`` that need a trainer of rollouts: its prompts, callbacks and kept state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from align.config.launch import rank
from align.pipeline.context import StageContext
from align.rl.checkpoint import last_checkpoint
from align.rl.prompts import Prompts, derive_seed
from align.training.kept_state import OwnSettings, continued_facts, continued_history, keep_state
from align.training.row_history import Continuation, RowHistory, StateFacts, digests_of

if TYPE_CHECKING:
    from align.rl.trainer import RLTrainer


def continue_prompts(context: StageContext, trainer: RLTrainer) -> Continuation | None:
    """Return the order of the prompts if a stage continues with other prompts; None for the plain order."""
    history, facts = continued_history(context), continued_facts(context)
    if history is None or facts is None:
        return None
    digests = _digests(trainer.prompts)
    if history.is_same(digests):
        return Continuation(history.first, history.start) if history.start else None
    first = history.untrained(digests)
    generator = torch.Generator().manual_seed(derive_seed(trainer.args.seed, "new prompts"))
    order = torch.randperm(len(first), generator=generator).tolist()
    context.note(
        f"{context.name}: {len(first)} of {len(digests)} prompts are new to "
        f"'{context.artifact('continue_from').stage}' and come first"
    )
    return Continuation([first[index] for index in order], _prompts_done(trainer, facts.steps))


def continuing_callbacks(context: StageContext) -> list[TrainerCallback]:
    """Return the callbacks of a stage that continues another."""
    return [] if context.config.continue_from is None else [OwnSettings()]


def keep_rollout_state(context: StageContext, trainer: RLTrainer) -> int:
    """Write ``state/`` of a trained stage from the first process, and return its bytes there."""
    if rank():
        return 0
    args, prompts = trainer.args, trainer.prompts
    steps = int(trainer.state.global_step)
    continuation = prompts.continuation
    facts = StateFacts(
        steps=steps,
        warmup_steps=int(args.get_warmup_steps(args.max_steps)),
        start=0 if continuation is None else continuation.start,
    )

    def history() -> RowHistory:
        before, digests = continued_history(context), _digests(prompts)
        start = facts.start
        # After twice as many draws as there are prompts, all were drawn: first the new ones, then an epoch over all.
        numbers = range(start, min(_prompts_done(trainer, steps), start + len(digests) * 2))
        trained = {digests[index] for index in prompts.next(numbers, args.seed)}
        if before is not None:
            trained |= before.trained
        return RowHistory(digests, trained, [] if continuation is None else continuation.first, start)

    return keep_state(context, last_checkpoint(context.checkpoints, trainer.notify), facts, history)


def _digests(prompts: Prompts) -> list[int]:
    return digests_of({"prompt": ids} for ids in prompts.token_ids)


def _prompts_done(trainer: RLTrainer, steps: int) -> int:
    return steps // trainer.config.steps_per_update * trainer.config.prompts_per_update
