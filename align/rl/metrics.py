"""Metrics of each update, as means over the tokens or responses of all processes. ``alarms.py`` judges them."""

from __future__ import annotations

import re
import resource
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch

from align.config.scores import verifier_kinds
from align.config.stages.rl import RolloutFields
from align.environments.episode import Episode
from align.rl.advantages import explained_variance
from align.rl.masking import masked_sum
from align.rl.rewards import estimate_kl
from align.rl.rollout import COMPONENT, Rollout
from align.verifiers.verdict import explain_low_scores


class Averages:
    """Means from sums and counts that arrive in pieces; every process adds the same names in the same order."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float = 1) -> None:
        """Add a sum over ``count`` items, both scalars."""
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += float(total)
        entry[1] += float(count)

    def means(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the mean of each name over all processes, and start over; ``reduce`` sums (N, 2) over them."""
        if not self._sums:
            return {}
        # One reduction for all names, in the order in which they were added, which is the same in every process.
        totals = reduce(torch.tensor(list(self._sums.values()), dtype=torch.float64))
        names = list(self._sums)
        self._sums = {}
        return {
            name: float(total / count) if count else 0.0 for name, (total, count) in zip(names, totals, strict=True)
        }


def rollout_statistics(averages: Averages, rollout: Rollout, is_prefetched: bool) -> dict[str, float]:
    """Add a rollout's sums to ``averages``; return statistics that are not means, seconds by phase, and sampling speed.

    ``is_prefetched``: sampling ran in the background, with weights that may be older.
    """
    numbers = add_rollout(averages, rollout)
    numbers |= {f"seconds_{name}": value for name, value in rollout.seconds.items()}
    seconds = rollout.seconds["sampling"]
    if is_prefetched:
        seconds = rollout.sampling_seconds
        numbers |= add_staleness(averages, rollout)
    tokens = sum(part.tokens for part in rollout.sampled)
    numbers["sampled_tokens_per_second"] = tokens / max(seconds, 1e-9)
    return numbers


def add_rollout(averages: Averages, rollout: Rollout) -> dict[str, float]:
    """Add a rollout's sums to ``averages``, and return the statistics that are not means.

    Scores and lengths are of all responses that were sampled, the rest of those that are learned from. Episodes whose
    environment failed count only in ``failure_rate`` and in the gap between engine and trainer.
    """
    candidates = rollout.candidates or rollout
    _add_scores(averages, candidates)
    tensors = rollout.tensors
    mask = tensors["response_mask"] & rollout.judged[:, None]
    responses = rollout.judged.sum()
    tokens = mask.sum()
    k3 = estimate_kl(tensors["logprobs"], tensors["ref_logprobs"], "k3")
    averages.add("kl", tensors["kl"][rollout.judged].sum(), responses)
    averages.add("kl_k3", masked_sum(k3, mask), responses)
    averages.add("entropy", masked_sum(tensors["entropy"], mask), tokens)
    if "rewards" in tensors:
        averages.add("reward", tensors["rewards"][rollout.judged].sum(), responses)
    if "values" in tensors:
        averages.add("value", masked_sum(tensors["values"][:, :-1], mask), tokens)
        averages.add("return", masked_sum(tensors["returns"], mask), tokens)
    if "raw_advantages" in tensors:
        averages.add("advantage", masked_sum(tensors["raw_advantages"], mask), tokens)
        averages.add("advantage_square", masked_sum(tensors["raw_advantages"] ** 2, mask), tokens)
    gap, is_known = _parity_gap(rollout)
    averages.add("parity_gap", masked_sum(gap, is_known), is_known.sum())
    averages.add("parity_ratio", masked_sum(gap.exp(), is_known), is_known.sum())
    numbers = {"parity_gap_max": float(torch.where(is_known, gap, gap.new_zeros(())).max())}
    if "values" in tensors:
        values = tensors["values"][:, :-1]
        numbers["explained_variance"] = explained_variance(values, tensors["returns"], mask) if tokens else 0.0
    if candidates.episodes is not None:
        add_episodes(averages, candidates.episodes)
    return numbers | _score_numbers(candidates)


def _score_numbers(candidates: Rollout) -> dict[str, float]:
    """Return range of the scores, their correlation with lengths, and the share of identical answers."""
    judged = candidates.judged
    if not judged.any():
        return {}
    scores = candidates.tensors["scores"][judged]
    texts = [
        (group, text)
        for group, text, counts in zip(candidates.groups, candidates.answers, judged, strict=True)
        if counts
    ]
    return {
        "score_range": float(scores.max() - scores.min()),
        # Scores are of answers.
        "score_length_correlation": correlation(scores, candidates.answer_lengths[judged]),
        "identical_answers": identical_answers(*zip(*texts, strict=True)),
    }


def _parity_gap(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distance of the engine's log-probabilities from the trainer's, (B, T), and a mask of those known.

    Large gaps of tokens that the current weights sampled mean that engine and trainer hold different models.
    """
    gap = (rollout.tensors["logprobs"] - rollout.tensors["sampler_logprobs"]).abs()
    return gap, rollout.tensors["response_mask"] & torch.isfinite(gap)


def add_staleness(averages: Averages, rollout: Rollout) -> dict[str, float]:
    """Return the age of the weights that sampled the tokens, in updates: mean and maximum.

    Where they were not equally old, the gap between engine and trainer is added by age: the current weights' shows
    whether the two agree, the others' also how far the policy has moved.
    """
    ages = rollout.staleness
    different = ages.unique().tolist()
    if len(different) > 1:
        gap, is_known = _parity_gap(rollout)
        all_ages = rollout.update - rollout.tensors["weights_update"]
        for age in different:
            is_counted = is_known & (all_ages == age)
            averages.add(f"parity_gap_stale_{age}", masked_sum(gap, is_counted), is_counted.sum())
    return {"staleness": float(ages.double().mean()), "staleness_max": float(ages.max())}


def _add_scores(averages: Averages, candidates: Rollout) -> None:
    judged = candidates.judged
    tensors = {name: tensor[judged] for name, tensor in candidates.tensors.items()}
    responses = judged.sum()
    averages.add("score", tensors["scores"].sum(), responses)
    averages.add("score_square", (tensors["scores"].double() ** 2).sum(), responses)
    for name in (name for name in tensors if name.startswith(COMPONENT)):
        # A response that lacks a metric counts in none of its means.
        values = tensors[name][torch.isfinite(tensors[name])]
        averages.add(name, values.sum(), len(values))
        averages.add(f"{name}_square", (values.double() ** 2).sum(), len(values))
    if "gold" in tensors:
        averages.add("gold", tensors["gold"].sum(), responses)
    averages.add("length", tensors["response_mask"].sum(), responses)
    if candidates.has_thoughts:
        averages.add("thought_length", tensors["thought_tokens"].sum(), responses)
        averages.add("answer_length", candidates.answer_lengths[judged].sum(), responses)
        averages.add("open_thoughts", tensors["open_thought"].sum(), responses)
        averages.add("forced_tokens", tensors["forced"].sum(), responses)
    averages.add("eos_rate", tensors["finished"].sum(), responses)
    averages.add("truncation_rate", truncated(candidates)[judged].sum(), responses)


def truncated(rollout: Rollout) -> torch.Tensor:
    """Return which responses reached their maximum of tokens, (B,)."""
    if rollout.episodes is None:
        return ~rollout.tensors["finished"]
    return torch.tensor([episode.stop == "truncated" for episode in rollout.episodes])


def add_episodes(averages: Averages, episodes: Sequence[Episode]) -> None:
    """Add turns and calls per episode that did not fail, the score of each turn, and the rate of failures."""
    averages.add("failure_rate", sum(episode.stop == "failed" for episode in episodes), len(episodes))
    episodes = [episode for episode in episodes if episode.stop != "failed"]
    count = len(episodes)
    calls = [call for episode in episodes for call in episode.calls]
    averages.add("turns", sum(len(episode.turns) for episode in episodes), count)
    averages.add("episode_tokens", sum(episode.length for episode in episodes), count)
    averages.add("calls", len(calls), count)
    averages.add("malformed_calls", sum(call.error == "malformed" for call in calls), count)
    averages.add("tool_errors", sum(call.error in ("arguments", "raised", "timeout") for call in calls), count)
    averages.add("tool_seconds", sum(call.seconds for call in calls), count)
    averages.add("max_turns_rate", sum(episode.stop == "max_turns" for episode in episodes), count)
    # Every process has all episodes of a rollout, so all processes add the same names.
    scored = [episode.turn_scores for episode in episodes if episode.turn_scores]
    for turn in range(max(map(len, scored), default=0)):
        scores = [turn_scores[turn] for turn_scores in scored if turn < len(turn_scores)]
        averages.add(f"score_turn_{turn + 1}", sum(scores), len(scores))


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the Pearson correlation of ``x`` and ``y``, (B,) each; 0 if either does not vary."""
    x = x.double() - x.double().sum() / len(x)
    y = y.double() - y.double().sum() / len(y)
    xx = float((x * x).sum())
    yy = float((y * y).sum())
    xy = float((x * y).sum())
    return float(xy / (xx * yy) ** 0.5) if xx > 0 and yy > 0 else 0.0


def identical_answers(groups: Sequence[int], answers: Sequence[str]) -> float:
    """Return the share of prompts whose most common answer is also the most common answer to another prompt."""
    by_prompt: dict[int, list[str]] = {}
    for group, answer in zip(groups, answers, strict=True):
        by_prompt.setdefault(group, []).append(answer)
    most_common = Counter(statistics.mode(texts) for texts in by_prompt.values())
    return sum(count for count in most_common.values() if count > 1) / len(by_prompt)


UNIT = re.compile(r"\w+|[^\w\s]+")
"""A word, or a run of signs such as ``!!``."""
ANSWER_FORMS = re.compile(r"#{2,}|boxed|answer", re.IGNORECASE)
"""Forms of answers that verifiers read; a policy that learns them is honest."""
READ_CHARACTERS = 4000
LEAST_RESPONSES = 16
NOTICED_CORRELATION = 0.5
NOTICED_SIGNIFICANCE = 5.0
"""Student's t of a correlation from which a marker is noticed: about 1 of 400,000 unrelated ones has it."""
RARE = 0.05


class Markers:
    """Words and signs that the score follows, whatever the row: the share of responses that have them, from update to
    update.

    An n-gram of one or two units is noticed if responses with it score higher, in an update in which some have it and
    some do not. Only answers count that have it although their row (prompt, references and all other columns) does not:
    an answer that follows its prompt or its reference is honest.
    """

    def __init__(self) -> None:
        self.noticed: dict[str, float] = {}
        """Share of responses with each noticed n-gram, in the update in which it was noticed."""

    def observe(self, candidates: Rollout) -> dict[str, float]:
        """Return the share of the most widespread noticed n-gram, and its rise; empty if none was noticed."""
        judged = candidates.judged
        if int(judged.sum()) < LEAST_RESPONSES:
            return {}
        rows = [row for row, counts in zip(candidates.rows, judged, strict=True) if counts]
        answers = [answer for answer, counts in zip(candidates.answers, judged, strict=True) if counts]
        own = [ngrams(answer) - ngrams(" ".join(_texts(row))) for row, answer in zip(rows, answers, strict=True)]
        counts = Counter(ngram for present in own for ngram in present)
        scores = candidates.tensors["scores"][judged]
        for ngram, count in counts.items():
            if ngram in self.noticed or not RARE <= count / len(own) <= 1 - RARE or ANSWER_FORMS.search(ngram):
                continue
            if _is_followed(correlation(torch.tensor([ngram in present for present in own]), scores), len(own)):
                self.noticed[ngram] = count / len(own)
        if not self.noticed:
            return {}
        shares = {ngram: counts[ngram] / len(own) for ngram in self.noticed}
        widest = max(shares, key=lambda ngram: shares[ngram])
        return {"marker_share": shares[widest], "marker_rise": shares[widest] - self.noticed[widest]}

    def describe(self) -> str:
        """Return the noticed n-grams, quoted."""
        return ", ".join(f"'{ngram}'" for ngram in self.noticed)


def _is_followed(value: float, count: int) -> bool:
    significance = value * ((count - 2) / max(1e-12, 1 - value * value)) ** 0.5
    return value >= NOTICED_CORRELATION and significance >= NOTICED_SIGNIFICANCE


def ngrams(text: str) -> set[str]:
    """Return the words and signs of a text, and its pairs of them, without those in the middle of a long text."""
    if len(text) > READ_CHARACTERS:
        text = f"{text[: READ_CHARACTERS // 2]} {text[-READ_CHARACTERS // 2 :]}"
    units = UNIT.findall(text)
    return {*units, *(" ".join(pair) for pair in pairwise(units))}


def _texts(value: object) -> Iterator[str]:
    """Yield all texts of a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for part in value.values() for text in _texts(part))
    elif isinstance(value, list | tuple):
        yield from (text for part in value for text in _texts(part))


def finish(means: dict[str, float]) -> dict[str, float]:
    """Return the means, with means of squares turned into standard deviations."""
    metrics = {name: value for name, value in means.items() if not name.endswith("_square")}
    for name, square in means.items():
        if name.endswith("_square"):
            base = name.removesuffix("_square")
            # Rounding can make this difference slightly negative.
            metrics[f"{base}_std"] = max(square - means[base] ** 2, 0.0) ** 0.5
    return metrics


def score_reasons(config: RolloutFields, entry: Mapping[str, float]) -> list[str]:
    """Return why the verifiers of a stage score nearly all responses of an update 0, from the update's metrics."""
    parts = {name.removeprefix(COMPONENT): value for name, value in entry.items() if name.startswith(COMPONENT)}
    if config.score is None and not config.reward:
        parts[""] = entry["score"]
    # Failed episodes have no scores.
    total = round(config.rollout_batch * (1 - entry.get("failure_rate", 0.0)))
    return explain_low_scores(verifier_kinds(config), parts, total, parts)


def peak_memory_gib() -> float:
    """Return the largest resident memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return peak / unit
