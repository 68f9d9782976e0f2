"""Scores of a rollout: the scorer's, the environment's and gold's, and the score of each step on its last token."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from align.data.rows import Row
from align.errors import UserError
from align.rl.advantages import fill_failed
from align.rl.rollout import COMPONENT, STEP_REWARDS, Rollout
from align.scoring.functions import ScoreFunction
from align.scoring.scored import Scored, Scorer, StepScore

AnyScorer = ScoreFunction | Scorer
"""A scorer, or a function ``(rows, responses) -> scores``. Higher is better; NaN and infinities are refused."""


@dataclass(frozen=True)
class PlainScorer(Scorer):
    """A function of a script, which is called as it is."""

    function: ScoreFunction

    def score(self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None) -> Scored:
        """Return the function's scores."""
        return Scored(list(map(float, self.function(rows, responses))))


def as_scorer(scorer: AnyScorer | None) -> Scorer | None:
    """Return a scorer, also of a function."""
    return scorer if scorer is None or isinstance(scorer, Scorer) else PlainScorer(scorer)


def score_rollout(rollout: Rollout, scorer: Scorer, name: str = "scores") -> Scored:
    """Add one number per response to the rollout's tensors under ``name``, and the scorer's components.

    Components of ``gold`` are called ``gold_<component>``, since the reward's components may have the same names.
    Raises ``UserError`` if a scorer returns too few numbers, or a number that is not finite.
    """
    prefix = COMPONENT if name == "scores" else f"{COMPONENT}{name}_"
    truncated = (~rollout.tensors["finished"]).tolist()
    # Scorers read answers; the thoughts before them are attributes.
    scored = scorer.score(rollout.rows, rollout.answers, truncated)
    rollout.tensors[name] = _check_scores(rollout, scored.total, may_lack=False)
    for component, values in scored.columns().items():
        rollout.tensors[f"{prefix}{component}"] = _check_scores(rollout, values, may_lack=True)
    return scored


def add_environment_scores(rollout: Rollout) -> None:
    """Add what the environments of a rollout's episodes scored to ``scores`` (B,), and their parts as components.

    An episode whose environment failed gets the mean of its group's others, whatever a scorer gave to its text, so it
    never makes a group's scores differ. Raises ``UserError`` for a part with the name of a scorer's component.
    """
    episodes = rollout.episodes or []
    totals = torch.tensor([episode.score for episode in episodes])
    failed = rollout.tensors["failed"]
    totals = torch.where(failed, 0.0, totals) + rollout.tensors.get("scores", 0)
    totals = fill_failed(totals, failed, torch.tensor(rollout.groups))
    rollout.tensors["scores"] = _check_scores(rollout, totals.tolist(), may_lack=False)
    for name in dict.fromkeys(name for episode in episodes for name in episode.parts):
        if f"{COMPONENT}{name}" in rollout.tensors:
            raise UserError(
                f"environment: it scores '{name}', and so does a reward of score; set another `name` for that reward, "
                "or rename the environment's."
            )
        values = [episode.parts.get(name, math.nan) for episode in episodes]
        rollout.tensors[f"{COMPONENT}{name}"] = _check_scores(rollout, values, may_lack=True)


def _check_scores(rollout: Rollout, scores: list[float], may_lack: bool) -> torch.Tensor:
    """Return scores as a tensor (B,). Raises ``UserError`` if their number or a value is wrong.

    ``may_lack``: NaN stands for a response without this metric.
    """
    if len(scores) != len(rollout):
        raise UserError(f"the scorer returned {len(scores)} scores for {len(rollout)} responses; one each is expected.")
    for score, text in zip(scores, rollout.texts, strict=True):
        if not math.isfinite(score) and not (may_lack and math.isnan(score)):
            raise UserError(
                f"update {rollout.update + 1}: the scorer gave {score} to {text[:80]!r}; scores must be finite."
            )
    return torch.tensor(scores)


def place_steps(rollout: Rollout, steps: Sequence[Sequence[StepScore]], tokenizer: Any) -> torch.Tensor:
    """Return the scores of steps on the last token of each step, (B, T). ``steps`` has the steps of each response.

    The ends of steps count the characters of the answers. Steps that end in one token add up.
    """
    mask = rollout.tensors["response_mask"]
    rewards = torch.zeros(mask.shape)
    for row, (answer, row_steps) in enumerate(zip(rollout.answers, steps, strict=True)):
        sampled = mask[row].nonzero().flatten().tolist()
        for step in row_steps:
            token = last_token(rollout.responses[row], len(answer.thought) + step.end, tokenizer)
            # Only sampled tokens earn rewards: the last one up to the step's end, else the first one.
            place = max(0, bisect.bisect_right(sampled, token) - 1)
            rewards[row, sampled[place]] += step.score
    return rewards


def last_token(token_ids: Sequence[int], end: int, tokenizer: Any) -> int:
    """Return the index of the token that has the character before ``end`` of the response's text."""

    def characters(count: int) -> int:
        return len(tokenizer.decode(list(token_ids[:count]), skip_special_tokens=True))

    # The fewest tokens whose text reaches the end.
    count = bisect.bisect_left(range(len(token_ids)), end, key=characters)
    return max(0, count - 1)


def refuse_steps(rollout: Rollout, method: str, has_token_credit: bool) -> None:
    """Raise ``UserError`` if a scorer gives scores to steps and the method has one advantage per response."""
    if STEP_REWARDS in rollout.tensors and not has_token_credit:
        raise UserError(
            f"{method}: the scorer returns a score for each step, and {method} has one advantage per response, so the "
            "steps would have no effect. Use PPO, or return their sum."
        )
