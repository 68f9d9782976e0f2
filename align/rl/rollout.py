"""One update's experience: responses, what was measured on them, and what the update learns from.

Left out: the passes of the models over it, which need the Trainer (``trainer.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from align.data.scoring import ScoreFunction, Scorer
from align.errors import UserError
from align.rl.masking import Reduce, local, pad_rows, response_mask
from align.rl.packing import Batch, Form, pack
from align.rl.ppo.advantages import gae, whiten_advantages
from align.rl.prompts import Prompts, Row
from align.rl.rewards import adjust_scores, shape_rewards, whiten_rewards
from align.rl.score_scale import RunningScale

if TYPE_CHECKING:
    from align.rl.arguments import RolloutArguments
    from align.rl.ppo.config import PPOConfig

AnyScorer = ScoreFunction | Scorer
"""A function ``(rows, responses) -> scores``, or an object whose method ``score`` also hears which were truncated.
One with a method ``score_parts`` has its components logged too (``align.rl.scoring``). Higher is better; NaN and
infinities are refused."""

COMPONENT = "score_"
"""Before the names of a score's components among a rollout's tensors."""


@dataclass
class Rollout:
    """B responses, right-padded to T tokens. ``tensors`` holds, once computed, under these names:

    (B,): ``finished`` (EOS was reached), ``scores``, its components as ``score_<name>``, ``gold``; (B, T):
    ``response_mask``, ``sampler_logprobs``, ``logprobs``, ``ref_logprobs``, ``entropy``, ``kl``, ``rewards``,
    ``advantages`` (whitened if asked for), ``raw_advantages``, ``returns``, ``learn_mask`` (tokens learned from);
    (B, T+1): ``values``.
    """

    update: int
    rows: list[Row]
    groups: list[int]
    prompts: list[list[int]]
    responses: list[list[int]]
    texts: list[str]
    tensors: dict[str, torch.Tensor]
    seconds: dict[str, float] = field(default_factory=dict)
    drawn: Rollout | None = None
    """The rollout that this one was chosen from, whose scores are logged; None where all of it is learned from."""
    redrawn: list[Rollout] = field(default_factory=list)
    """Further responses that were sampled to choose from."""
    weights_of: int = 0
    """The update before which the policy had the weights that were sampled from."""
    drawing: float = 0.0
    """Seconds that sampling took, waited for or not."""

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def tokens(self) -> int:
        """Tokens of all responses."""
        return int(self.tensors["response_mask"].sum())

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt and response together."""
        return [len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)]

    def pack(
        self, indices: list[int], pad_id: int, form: Form, ptx: Sequence[tuple[list[int], list[int]]] = ()
    ) -> Batch:
        """Model inputs of some of the responses.

        (prompt, answer) texts may stand behind them; ``ptx`` then counts them, and ``without_ptx`` is a batch without.
        ``supervised`` counts the last rows whose likelihood is learned as in SFT: the texts.
        """
        prompts, responses = [self.prompts[i] for i in indices], [self.responses[i] for i in indices]
        groups = [self.groups[i] for i in indices]
        batch = pack(prompts, responses, groups, pad_id, form)
        if not ptx:
            return batch
        together = pack(
            [*prompts, *(prompt for prompt, _ in ptx)],
            [*responses, *(answer for _, answer in ptx)],
            [*groups, *(-1 - i for i in range(len(ptx)))],
            pad_id,
            form,
        )
        count = torch.tensor(len(ptx))
        return together | {"ptx": count, "supervised": count, "without_ptx": batch}

    def select(self, indices: list[int], names: tuple[str, ...]) -> Batch:
        """Rows of the named tensors, cut to the longest of these responses."""
        width = max(len(self.responses[i]) for i in indices)
        return {name: self.tensors[name][indices][:, : width + (name == "values")] for name in names}

    def subset(self, indices: Sequence[int]) -> Rollout:
        """A rollout of some of the responses, cut to the longest of them; it remembers where it comes from."""
        width = max(len(self.responses[i]) for i in indices)
        wanted = torch.tensor(list(indices))
        full = self.tensors["response_mask"].shape[1]

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            chosen = tensor[wanted]
            return chosen[:, :width] if chosen.dim() == 2 and chosen.shape[1] == full else chosen

        return Rollout(
            update=self.update,
            rows=[self.rows[i] for i in indices],
            groups=[self.groups[i] for i in indices],
            prompts=[self.prompts[i] for i in indices],
            responses=[self.responses[i] for i in indices],
            texts=[self.texts[i] for i in indices],
            tensors={name: cut(tensor) for name, tensor in self.tensors.items()},
            drawn=self,
            weights_of=self.weights_of,
            drawing=self.drawing,
        )

    def store(self, indices: list[int], results: Batch) -> None:
        """Write model outputs for some of the responses into ``tensors``."""
        width = self.tensors["response_mask"].shape[1]
        for name, result in results.items():
            full = width + (name == "values")
            target = self.tensors.setdefault(name, torch.zeros(len(self), full))
            target[indices, : result.shape[1]] = result.float().cpu()


def turn_of(args: RolloutArguments, update: int) -> range:
    """Numbers of the prompts of an update in the endless sequence of all updates' prompts."""
    count = args.rollout_batch // args.samples_per_prompt
    return range(update * count, (update + 1) * count)


def sample_prompts(
    engine: Any, prompts: Prompts, args: RolloutArguments, update: int, indices: list[int], seeds: Sequence[int]
) -> Rollout:
    """Sample ``samples_per_prompt`` responses to each of the prompts at ``indices``, with a seed for each prompt."""
    from align.inference.protocol import Sampling

    sampling = Sampling(
        max_tokens=args.max_tokens, temperature=args.temperature, n=args.samples_per_prompt, seeds=tuple(seeds)
    )
    answers = engine.generate([prompts.token_ids[i] for i in indices], sampling)
    found, asked = sum(len(some) for some in answers), len(indices) * args.samples_per_prompt
    if found != asked:
        raise RuntimeError(f"engine {engine.name} returned {found} responses; asked: {asked}")
    return rollout_of(prompts, indices, answers, update)


def rollout_of(prompts: Prompts, indices: list[int], answers: Sequence[Sequence[Any]], update: int) -> Rollout:
    """A rollout from an engine's ``Response`` lists to the prompts at ``indices``."""
    pairs = [(place, index, answer) for place, index in enumerate(indices) for answer in answers[place]]
    if any(not answer.token_ids for _, _, answer in pairs):
        raise RuntimeError("the engine returned an empty response; even one that ends at once has its end token")
    lengths = [len(answer.token_ids) for _, _, answer in pairs]
    return Rollout(
        update=update,
        rows=[prompts.rows[index] for _, index, _ in pairs],
        groups=[place for place, _, _ in pairs],
        prompts=[prompts.token_ids[index] for _, index, _ in pairs],
        responses=[list(answer.token_ids) for _, _, answer in pairs],
        texts=[answer.text for _, _, answer in pairs],
        tensors={
            "finished": torch.tensor([answer.finished for _, _, answer in pairs]),
            "response_mask": response_mask(lengths),
            "sampler_logprobs": pad_rows([answer.logprobs for _, _, answer in pairs], max(lengths)),
        },
    )


def score_rollout(rollout: Rollout, scorer: AnyScorer, name: str = "scores") -> None:
    """Add one number per response. Raises ``UserError`` for a scorer that returns too few, or a number not finite."""
    truncated = (~rollout.tensors["finished"]).tolist()
    if hasattr(scorer, "score_parts"):
        parts = scorer.score_parts(rollout.rows, rollout.texts, truncated)
    elif callable(scorer):
        parts = {"": scorer(rollout.rows, rollout.texts)}
    else:
        parts = {"": scorer.score(rollout.rows, rollout.texts, truncated)}
    for part, found in parts.items():
        checked = _checked(rollout, [float(score) for score in found])
        rollout.tensors[f"{COMPONENT}{part}" if part else name] = checked


def _checked(rollout: Rollout, scores: list[float]) -> torch.Tensor:
    if len(scores) != len(rollout):
        raise UserError(f"the scorer returned {len(scores)} scores for {len(rollout)} responses; one each is expected.")
    for score, text in zip(scores, rollout.texts, strict=True):
        if not math.isfinite(score):
            raise UserError(
                f"update {rollout.update + 1}: the scorer gave {score} to {text[:80]!r}; scores must be finite."
            )
    return torch.tensor(scores)


def add_advantages(
    rollout: Rollout,
    args: PPOConfig,
    kl_coef: float,
    reduce: Reduce = local,
    scale: RunningScale | None = None,
) -> None:
    """From scores, log-probabilities and values to rewards, advantages and returns, all in float32 on the CPU.

    ``kl_coef`` is what a nat of drift costs in the reward; ``scale`` puts scores on a running scale first.
    """
    tensors = rollout.tensors
    mask, finished = tensors["response_mask"], tensors["finished"]
    scores = adjusted_scores(rollout, args, reduce, scale)
    rewards, tensors["kl"] = shape_rewards(scores, tensors["logprobs"], tensors["ref_logprobs"], mask, kl_coef)
    if args.whiten_rewards:
        rewards = whiten_rewards(rewards, mask, reduce)
    advantages, returns = gae(
        rewards, tensors["values"], mask, finished, gamma=args.gamma, lam=args.lam, truncation=args.truncation
    )
    tensors |= {"rewards": rewards, "raw_advantages": advantages, "returns": returns}
    learned = mask & finished[:, None] if args.truncated == "mask" else mask
    tensors["learn_mask"] = learned
    tensors["advantages"] = whiten_advantages(advantages, learned, reduce) if args.whiten_advantages else advantages


def adjusted_scores(
    rollout: Rollout, args: RolloutArguments, reduce: Reduce = local, scale: RunningScale | None = None
) -> torch.Tensor:
    """Scores (B,) as they are learned from: on the running scale, clipped, penalties subtracted."""
    tensors = rollout.tensors
    scores = tensors["scores"]
    if scale is not None:
        scale.add(scores, reduce)
        scores = scale.apply(scores)
    return adjust_scores(
        scores,
        tensors["finished"],
        missing_eos_penalty=args.missing_eos_penalty,
        score_clip=args.score_clip,
        length_penalty=args.length_penalty,
        lengths=tensors["response_mask"].sum(dim=1),
    )


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
        weights_of=parts[0].weights_of,
        drawing=max(part.drawing for part in parts),
    )


def _widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    if tensor.dim() == 1:
        return tensor
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))


class RolloutLoader:
    """What the Trainer iterates over: micro-batches of rollouts that are made when their turn comes.

    ``make`` returns the micro-batches of one update, none to end the run; ``start`` the first update to make, asked for
    at iteration.
    """

    def __init__(
        self, make: Callable[[int], Iterator[dict[str, Any]]], start: Callable[[], int], updates: int, per_update: int
    ) -> None:
        self._make, self._start, self._updates, self._per_update = make, start, updates, per_update

    def __len__(self) -> int:
        return self._updates * self._per_update

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for update in range(self._start(), self._updates):
            made = self._make(update)
            first = next(made, None)
            if first is None:  # the trainer stops here
                return
            yield first
            yield from made
