"""The rollout of one update: responses, their measurements, and the tensors that the update learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from align.data.final_answers import AnswerText
from align.environments.episode import Episode
from align.rl.masking import pad_rows
from align.rl.packing import Batch, Form, pack
from align.rl.prompts import Prompts, Row, Text

THOUGHTS = ("thought_tokens", "thought_end", "open_thought", "forced")
"""Tensors that a rollout has if a response has a thought."""
COMPONENT = "score_"
"""Prefix of the names of a score's components among a rollout's tensors."""
STEP_REWARDS = "step_rewards"
"""Tensor (B, T) of a rollout: the score of each step on its last token, 0 elsewhere."""


@dataclass
class Rollout:
    """B responses, right-padded to T tokens. ``tensors`` holds, once computed, under these names:

    (B,): ``finished`` (EOS was reached), ``scores``, its components as ``score_<name>`` (NaN if a response lacks a
    metric), ``gold``, ``place`` (number among all responses that were sampled for the update); (B, T):
    ``response_mask``, ``weights_update`` (update before which the policy had the weights that sampled the token),
    ``sampler_logprobs``, ``logprobs``, ``ref_logprobs``, ``entropy``, ``kl``, ``rewards``, ``advantages`` (whitened if
    the settings say so), ``raw_advantages``, ``returns``, ``learn_mask`` (tokens that the loss includes); (B, T+1):
    ``values``; with thoughts also (B,): ``thought_tokens``, ``thought_end`` (characters before the answer),
    ``open_thought`` (the response ends inside its thought), (B, T): ``forced``.
    """

    update: int
    rows: list[Row]
    groups: list[int]
    """Equal for responses to the same prompt."""
    prompts: list[list[int]]
    responses: list[list[int]]
    """Token ids after the prompts. For an episode they include the environment's tokens between the turns."""
    texts: list[str]
    tensors: dict[str, torch.Tensor]
    episodes: list[Episode] | None = None
    """Turns, calls and scores of each response, if an environment gave the prompts."""
    explanations: list[dict[str, Any]] = field(default_factory=list)
    """Reasons of judges for the scores, by reward; empty without any."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time by phase of the update."""
    candidates: Rollout | None = None
    """Rollout that these responses were selected from, whose scores are logged; None if all were selected."""
    resampled: list[Rollout] = field(default_factory=list)
    """Further responses that were sampled to select from."""
    sampling_seconds: float = 0.0
    """Time that sampling took, in the background or not."""

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def tokens(self) -> int:
        """Tokens of all responses that the policy sampled."""
        return int(self.tensors["response_mask"].sum())

    @property
    def has_thoughts(self) -> bool:
        """True if a response has a thought."""
        return "thought_end" in self.tensors

    @property
    def answers(self) -> list[AnswerText]:
        """The texts after their thoughts, which are scored."""
        if not self.has_thoughts:
            return [AnswerText.cut(text, 0) for text in self.texts]
        ends = self.tensors["thought_end"].tolist()
        are_open = self.tensors["open_thought"].tolist()
        return [AnswerText.cut(*thought) for thought in zip(self.texts, ends, are_open, strict=True)]

    @property
    def answer_lengths(self) -> torch.Tensor:
        """Tokens after the thoughts, without an environment's, (B,)."""
        tensors = self.tensors
        lengths = self.tensors["response_mask"].sum(dim=1)
        if not self.has_thoughts:
            return lengths
        return lengths + tensors["forced"].sum(dim=1) - tensors["thought_tokens"]

    @property
    def judged(self) -> torch.Tensor:
        """Responses that count in statistics, (B,): all except episodes whose environment failed."""
        failed = self.tensors.get("failed")
        return torch.ones(len(self), dtype=torch.bool) if failed is None else ~failed

    @property
    def staleness(self) -> torch.Tensor:
        """Updates that the policy had learned from since it had the weights of each sampled token, shape (N,)."""
        mask = self.tensors["response_mask"]
        return self.update - self.tensors["weights_update"][mask]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt and response together."""
        return [len(prompt) + len(response) for prompt, response in zip(self.prompts, self.responses, strict=True)]

    @property
    def sampled(self) -> list[Rollout]:
        """All rollouts that were sampled for this rollout."""
        return [self.candidates or self, *self.resampled]

    def pack(self, indices: list[int], pad_id: int, form: Form, texts: Sequence[Text] = ()) -> Batch:
        """Return model inputs of some of the responses, with supervised ``texts`` behind them.

        The batch then also has ``ptx``, the number of texts; ``supervised``, the number of last rows that are learned
        by SFT's loss; and ``without_ptx``, a batch of only the responses.
        """
        prompts = [self.prompts[i] for i in indices]
        responses = [self.responses[i] for i in indices]
        groups = self._prompt_numbers(indices)
        masks = self._masks(indices)
        batch = pack(prompts, responses, groups, pad_id, form, masks=masks)
        if not texts:
            return batch
        if masks is not None:
            masks = [*masks, *([True] * len(answer) for _, answer in texts)]
        # A critic with its own trunk does not learn from texts, so it reads the first batch.
        batch_with_texts = pack(
            [*prompts, *(prompt for prompt, _ in texts)],
            [*responses, *(answer for _, answer in texts)],
            [*groups, *(-1 - i for i in range(len(texts)))],  # a separate group for each text
            pad_id,
            form,
            masks=masks,
        )
        count = torch.tensor(len(texts))
        return batch_with_texts | {"ptx": count, "supervised": count, "without_ptx": batch}

    def _prompt_numbers(self, indices: list[int]) -> list[int]:
        """Return numbers that are equal for responses to equal prompts of one group.

        An environment may begin each episode of a group differently.
        """
        if self.episodes is None:
            return [self.groups[i] for i in indices]
        numbers: dict[tuple[int, tuple[int, ...]], int] = {}
        return [numbers.setdefault((self.groups[i], tuple(self.prompts[i])), len(numbers)) for i in indices]

    def _masks(self, indices: list[int]) -> list[list[bool]] | None:
        """Return which tokens of responses were sampled; None if all were."""
        # Without an environment and without forced tokens every response token was sampled. ``pack`` makes
        # such a mask from the lengths.
        if self.episodes is None and self.tokens == sum(map(len, self.responses)):
            return None
        rows = self.tensors["response_mask"].tolist()
        return [rows[i][: len(self.responses[i])] for i in indices]

    def select(self, indices: list[int], names: tuple[str, ...]) -> Batch:
        """Return rows of the named tensors, cut to the longest of these responses: (b, t), ``values`` (b, t+1)."""
        width = max(len(self.responses[i]) for i in indices)
        # Values have one more place than tokens: the state before each token, and the state after the last.
        return {name: self.tensors[name][indices][:, : width + (name == "values")] for name in names}

    def subset(self, indices: Sequence[int]) -> Rollout:
        """Return a rollout of some responses, cut to the longest of them, with this rollout as ``candidates``."""
        width = max(len(self.responses[i]) for i in indices)
        rows = torch.tensor(list(indices))
        full_width = self.tensors["response_mask"].shape[1]

        def select_rows(tensor: torch.Tensor) -> torch.Tensor:
            """Return the rows of a tensor (B,), (B, 1) or (B, T), the last cut to ``width``."""
            selected = tensor[rows]
            is_per_token = selected.dim() == 2 and selected.shape[1] == full_width
            return selected[:, :width] if is_per_token else selected

        return Rollout(
            update=self.update,
            rows=[self.rows[i] for i in indices],
            groups=[self.groups[i] for i in indices],
            prompts=[self.prompts[i] for i in indices],
            responses=[self.responses[i] for i in indices],
            texts=[self.texts[i] for i in indices],
            tensors={name: select_rows(tensor) for name, tensor in self.tensors.items()},
            episodes=None if self.episodes is None else [self.episodes[i] for i in indices],
            explanations=[self.explanations[i] for i in indices] if self.explanations else [],
            candidates=self,
            sampling_seconds=self.sampling_seconds,
        )

    def store(self, indices: list[int], results: Batch) -> None:
        """Write model outputs (b, t) for some of the responses into ``tensors``, in float32 on the CPU."""
        width = self.tensors["response_mask"].shape[1]
        for name, result in results.items():
            full_width = width + (name == "values")
            target = self.tensors.setdefault(name, torch.zeros(len(self), full_width))
            target[indices, : result.shape[1]] = result.float().cpu()


def make_rollout(
    prompts: Prompts,
    indices: list[int],
    responses: Sequence[Sequence[Any]],
    update: int,
    weights_update: int | None = None,
) -> Rollout:
    """Return a rollout of an engine's ``Response`` lists, or of lists of ``Episode``, to the prompts at ``indices``.

    ``weights_update`` is the update whose weights sampled it, by default its own. Turns of episodes may name another.
    """
    if weights_update is None:
        weights_update = update
    # One row per response. The responses to one prompt follow each other.
    flat = [(group, index, response) for group, index in enumerate(indices) for response in responses[group]]
    if any(not response.token_ids for _, _, response in flat):
        raise RuntimeError("the engine returned an empty response; even one that ends at once has its end token")
    return rollout_of(
        [response for _, _, response in flat],
        update,
        weights_update,
        rows=[prompts.rows[index] for _, index, _ in flat],
        groups=[group for group, _, _ in flat],
        prompts=[prompts.token_ids[index] for _, index, _ in flat],
    )


def rollout_of(
    responses: Sequence[Any],
    update: int,
    weights_update: int,
    *,
    rows: list[Row],
    groups: list[int],
    prompts: list[list[int]],
) -> Rollout:
    """Return a rollout of responses or episodes; ``rows``, ``groups`` and ``prompts`` are of each response."""
    token_ids = [list(response.token_ids) for response in responses]
    episodes = [response for response in responses if isinstance(response, Episode)]
    width = max(map(len, token_ids))
    # The environment's tokens, and those that closed a thought by force, were not sampled.
    mask = pad_rows([response.mask for response in responses], width, torch.bool)
    rollout = Rollout(
        update=update,
        rows=rows,
        groups=groups,
        prompts=prompts,
        responses=token_ids,
        texts=[response.text for response in responses],
        tensors={
            "finished": torch.tensor([response.finished for response in responses]),
            "response_mask": mask,
            "weights_update": torch.full(mask.shape, weights_update),
            "sampler_logprobs": pad_rows([response.logprobs for response in responses], width),
        },
    )
    rollout.tensors |= _thoughts(responses, mask)
    if episodes:
        rollout.episodes = episodes
        # The environment may have begun each episode with its own prompt.
        rollout.prompts = [episode.prompt_ids for episode in episodes]
        rollout.tensors["weights_update"] = _weights_updates(episodes, width, weights_update)
        _add_episode_scores(rollout, episodes)
    return rollout


def _thoughts(responses: Sequence[Any], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of ``THOUGHTS``, (B,) and (B, T) as ``mask``; empty if no response has a thought."""
    if not any(response.thought_tokens for response in responses):
        return {}
    answers = [response.answer_text for response in responses]
    forced = torch.zeros_like(mask)
    for row, response in enumerate(responses):
        forced[row, response.forced] = True
    return {
        "thought_tokens": torch.tensor([response.thought_tokens for response in responses]),
        "thought_end": torch.tensor([len(answer.thought) for answer in answers]),
        "open_thought": torch.tensor([answer.is_open for answer in answers]),
        "forced": forced,
    }


def _weights_updates(episodes: list[Episode], width: int, default: int) -> torch.Tensor:
    """Return the update whose weights sampled each token, (B, T); ``default`` if a turn names none."""
    updates = torch.full((len(episodes), width), default)
    for row, episode in enumerate(episodes):
        weights_updates = [default if update is None else update for update in episode.weights_updates]
        updates[row, : len(weights_updates)] = torch.tensor(weights_updates)
    return updates


def _add_episode_scores(rollout: Rollout, episodes: list[Episode]) -> None:
    """Add ``failed`` (B,), and ``turn_rewards`` (B, T): each turn's score on its last token, 0 elsewhere."""
    rollout.tensors["failed"] = torch.tensor([episode.stop == "failed" for episode in episodes])
    rewards = torch.zeros(rollout.tensors["response_mask"].shape)
    for row, episode in enumerate(episodes):
        # Turns and observations alternate in the response. `end` is the index of the last token seen so far.
        end = -1
        for turn, score in enumerate(episode.turn_scores or []):
            end += len(episode.turns[turn].token_ids)
            rewards[row, end] = score
            end += len(episode.observations[turn]) if turn < len(episode.observations) else 0
    rollout.tensors["turn_rewards"] = rewards


def join_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Return one rollout of several of the same update. Groups are renumbered, so different rollouts share no group."""
    width = max(part.tensors["response_mask"].shape[1] for part in parts)
    # Each part counts its groups from 0, so equal numbers in two parts are different prompts.
    groups: list[int] = []
    for part in parts:
        first = max(groups, default=-1) + 1
        numbers = {group: first + number for number, group in enumerate(dict.fromkeys(part.groups))}
        groups += [numbers[group] for group in part.groups]
    tensors = {name: torch.cat([_pad_to(part.tensors[name], width) for part in parts]) for name in _tensor_names(parts)}
    return Rollout(
        update=parts[0].update,
        rows=[row for part in parts for row in part.rows],
        groups=groups,
        prompts=[prompt for part in parts for prompt in part.prompts],
        responses=[response for part in parts for response in part.responses],
        texts=[text for part in parts for text in part.texts],
        tensors=tensors,
        episodes=_join_episodes(parts),
        explanations=_join_explanations(parts),
        # Processes sample at the same time, so the slowest one counts.
        sampling_seconds=max(part.sampling_seconds for part in parts),
    )


def _join_episodes(parts: Sequence[Rollout]) -> list[Episode] | None:
    if any(part.episodes is None for part in parts):
        return None
    return [episode for part in parts for episode in part.episodes or ()]


def _join_explanations(parts: Sequence[Rollout]) -> list[dict[str, Any]]:
    if not any(part.explanations for part in parts):
        return []
    return [explanation for part in parts for explanation in part.explanations or [{}] * len(part)]


def _tensor_names(parts: Sequence[Rollout]) -> list[str]:
    """Return the names of the parts' tensors, and fill in what some lack: thoughts, or a score's component as NaN."""
    names = list(dict.fromkeys(name for part in parts for name in part.tensors))
    for name in names:
        for part in parts:
            # A reward may return a metric for some responses only, and another process may have had none of those.
            if name.startswith(COMPONENT) and name not in part.tensors:
                part.tensors[name] = torch.full((len(part),), torch.nan)
            elif name in THOUGHTS and name not in part.tensors:
                example = next(other.tensors[name] for other in parts if name in other.tensors)
                shape = part.tensors["response_mask"].shape[: example.dim()]
                part.tensors[name] = torch.zeros(shape, dtype=example.dtype)
    return names


def _pad_to(tensor: torch.Tensor, width: int) -> torch.Tensor:
    if tensor.dim() == 1:
        return tensor
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))
