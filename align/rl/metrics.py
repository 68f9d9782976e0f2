"""What is logged about each update, as means over the tokens or responses of all processes.

Leaves out alarms: the numbers say what happened, the caller decides what to make of them.
"""

from __future__ import annotations

import resource
import sys

import torch

from align.rl.kl import estimate_kl
from align.rl.masking import Reduce, masked_sum
from align.rl.ppo.advantages import explained_variance
from align.rl.rollout import COMPONENT, Rollout


class Averages:
    """Means from sums and counts that arrive in pieces; every process adds the same names in the same order."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float = 1) -> None:
        """Add a sum over ``count`` items."""
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += float(total)
        entry[1] += float(count)

    def means(self, reduce: Reduce) -> dict[str, float]:
        """The mean under each name, over all processes; what was added is forgotten."""
        if not self._sums:
            return {}
        totals = reduce(torch.tensor(list(self._sums.values()), dtype=torch.float64))
        names, self._sums = list(self._sums), {}
        return {
            name: float(total / count) if count else 0.0 for name, (total, count) in zip(names, totals, strict=True)
        }


def add_rollout(averages: Averages, rollout: Rollout, reduce: Reduce) -> dict[str, float]:
    """Add a rollout's sums to ``averages``, and return the statistics that are no means.

    Scores and lengths are those of all responses that were drawn, the rest of those learned from.
    """
    drawn = rollout.drawn or rollout
    _add_scores(averages, drawn)
    t = rollout.tensors
    mask, responses = t["response_mask"], len(rollout)
    tokens = mask.sum()
    averages.add("kl", t["kl"].sum(), responses)
    averages.add("kl_k3", masked_sum(estimate_kl(t["logprobs"], t["ref_logprobs"], "k3"), mask), responses)
    averages.add("entropy", masked_sum(t["entropy"], mask), tokens)
    if "rewards" in t:
        averages.add("reward", t["rewards"].sum(), responses)
    if "values" in t:
        averages.add("value", masked_sum(t["values"][:, :-1], mask), tokens)
        averages.add("return", masked_sum(t["returns"], mask), tokens)
    if "raw_advantages" in t:
        averages.add("advantage", masked_sum(t["raw_advantages"], mask), tokens)
        averages.add("advantage_square", masked_sum(t["raw_advantages"] ** 2, mask), tokens)
    gap = (t["logprobs"] - t["sampler_logprobs"]).abs()
    known = mask & torch.isfinite(gap)
    averages.add("parity_gap", masked_sum(gap, known), known.sum())
    averages.add("parity_ratio", masked_sum(gap.exp(), known), known.sum())
    found = {"parity_gap_max": float(torch.where(known, gap, gap.new_zeros(())).max())}
    if "values" in t:
        found["explained_variance"] = explained_variance(t["values"][:, :-1], t["returns"], mask, reduce)
    lengths = drawn.tensors["response_mask"].sum(dim=1)
    found["score_length_correlation"] = correlation(drawn.tensors["scores"], lengths, reduce)
    return found


def _add_scores(averages: Averages, drawn: Rollout) -> None:
    t, responses = drawn.tensors, len(drawn)
    averages.add("score", t["scores"].sum(), responses)
    averages.add("score_square", (t["scores"].double() ** 2).sum(), responses)
    for name in (name for name in t if name.startswith(COMPONENT)):
        averages.add(name, t[name].sum(), responses)
    if "gold" in t:
        averages.add("gold", t["gold"].sum(), responses)
    averages.add("length", t["response_mask"].sum(), responses)
    averages.add("eos_rate", t["finished"].sum(), responses)
    averages.add("truncation_rate", (~t["finished"]).sum(), responses)


def correlation(one: torch.Tensor, other: torch.Tensor, reduce: Reduce) -> float:
    """Pearson correlation of two (B,) over all processes; 0 where one of them does not vary."""
    x, y = one.double(), other.double()
    count, sum_x, sum_y = reduce(torch.stack([torch.tensor(float(len(x)), dtype=torch.float64), x.sum(), y.sum()]))
    x, y = x - sum_x / count, y - sum_y / count
    xx, yy, xy = reduce(torch.stack([(x * x).sum(), (y * y).sum(), (x * y).sum()])).tolist()
    return float(xy / (xx * yy) ** 0.5) if xx > 0 and yy > 0 else 0.0


def finish(means: dict[str, float]) -> dict[str, float]:
    """Turn means of squares into standard deviations; the rest passes."""
    out = {name: value for name, value in means.items() if not name.endswith("_square")}
    for name, square in means.items():
        if name.endswith("_square"):
            base = name.removesuffix("_square")
            out[f"{base}_std"] = max(square - means[base] ** 2, 0.0) ** 0.5
    return out


def peak_memory_gib() -> float:
    """Largest resident memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB on Linux
