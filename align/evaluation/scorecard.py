"""From measurements per response to the scorecard: estimates, paired differences, families, flags.

The schema of ``scorecard.json`` is what :func:`build` returns (format 1):

- ``reference``, ``base`` (or null), ``primary`` (the metric that decides), ``policies`` (names in order), ``settings``
- ``metrics``: name → ``title``, ``better`` (``higher``, ``lower`` or null), ``unit``, ``meaning``
- ``estimates``: policy → metric → ``{value, low, high, n, method}``; ``n`` counts prompts (rows for held-out loss)
- ``families``: source → ``{n, estimates: policy → metric → estimate}``
- ``differences``: list of ``{policy, against, metric, value, low, high, n, p, p_holm, test, verdict}``
- ``family_differences``: the same with ``family``, of the primary metric against the reference, corrected on their own
- ``reward_model``: what :func:`align.evaluation.pairs.pair_accuracy` returns, or null
- ``flags``: list of ``{policy, kind, text}``; kinds ``regression``, ``over-optimised``, ``eos``, ``length``

p-values are corrected (Holm) in two families: the primary metric's comparisons, chosen beforehand, among themselves;
all the others of the table together. Verdicts: ``better`` or ``worse`` (``higher`` or ``lower`` for a metric without a
good side) when the interval is clear of zero and the corrected p is below 0.05; else ``unclear``. Torch-free; numbers
that are not finite are null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.evaluation.statistics import LEVEL, Estimate, holm, mean_interval, paired_difference, rate_interval

FORMAT = 1
MIN_EOS_RATE = 0.9
MAX_LENGTH_FACTOR = 2.0
FAMILY_METRICS = ("gold", "reward", "length", "finished")

METRICS: dict[str, dict[str, Any]] = {
    "gold": {
        "title": "Gold score",
        "better": "higher",
        "unit": "0 to 1",
        "meaning": "what a program that checks the response gives it",
    },
    "reward": {
        "title": "Reward-model score",
        "better": "higher",
        "unit": "score",
        "meaning": "the learned proxy; only differences mean something",
    },
    "finished": {
        "title": "Ends by itself",
        "better": "higher",
        "unit": "share",
        "meaning": "share of responses that end with the end-of-turn token rather than at the token limit",
    },
    "length": {
        "title": "Response length",
        "better": None,
        "unit": "tokens",
        "meaning": "tokens of a response, its end-of-turn token included",
    },
    "kl": {
        "title": "KL to reference",
        "better": None,
        "unit": "nats",
        "meaning": "drift from the reference over a whole response, unbiased k1 estimate on the policy's own samples",
    },
    "kl_k3": {
        "title": "KL to reference (k3)",
        "better": None,
        "unit": "nats",
        "meaning": "the same by the k3 estimate, never negative",
    },
    "heldout_loss": {
        "title": "Held-out SFT loss",
        "better": "lower",
        "unit": "nats per token",
        "meaning": "negative log-likelihood per token of held-out reference answers",
    },
}

Values = list[list[float]]
"""One list per prompt with one number per sample."""


@dataclass
class Measurements:
    """What was measured, aligned by prompt.

    ``sources`` is the source of each prompt, ``values[policy][metric]`` has one list per prompt, and
    ``heldout[policy]`` is (loss per token, tokens) of each held-out row.
    """

    policies: list[str]
    reference: str
    base: str | None
    sources: list[str]
    values: dict[str, dict[str, Values]]
    heldout: dict[str, tuple[list[float], list[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Resampling:
    """How many bootstrap resamples and from which seed."""

    resamples: int
    seed: int


def build(
    found: Measurements, resampling: Resampling, reward_model: dict[str, Any] | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """The scorecard of ``found``; see the module's text for its schema."""
    names = [name for name in METRICS if any(name in per for per in found.values.values())]
    binary = {name for name in names if _is_binary(found, name)}
    everything = list(range(len(found.sources)))
    estimates = {policy: _estimates(found, policy, everything, names, binary, resampling) for policy in found.policies}
    for policy, (losses, tokens) in found.heldout.items():
        loss = mean_interval(losses, weights=tokens, resamples=resampling.resamples, seed=resampling.seed)
        estimates[policy]["heldout_loss"] = loss.as_dict()
    primary = next((name for name in ("gold", "reward") if name in names), "length")
    compared = [name for name in names if not name.startswith("kl")]
    differences = [
        row
        for metric in compared
        for policy, against in _contrasts(found)
        if (row := _difference(found, policy, against, metric, everything, resampling)) is not None
    ] + _heldout_differences(found, resampling)
    families = _group(found.sources)
    by_family = [
        {"family": family, **row}
        for family, indices in families.items()
        for policy, against in _contrasts(found)
        if against == found.reference or policy == found.reference
        if (row := _difference(found, policy, against, primary, indices, resampling)) is not None
    ]
    _correct([row for row in differences if row["metric"] == primary])
    _correct([row for row in differences if row["metric"] != primary])
    _correct(by_family)
    shown = [*names, *(["heldout_loss"] if found.heldout else [])]
    return {
        "format": FORMAT,
        "reference": found.reference,
        "base": found.base,
        "primary": primary,
        "policies": found.policies,
        "settings": {**settings, "level": LEVEL, "bootstrap": resampling.resamples, "correction": "Holm"},
        "metrics": {name: METRICS[name] for name in METRICS if name in shown},
        "estimates": estimates,
        "families": {
            family: {
                "n": len(indices),
                "estimates": {
                    policy: _estimates(
                        found, policy, indices, [n for n in names if n in FAMILY_METRICS], binary, resampling
                    )
                    for policy in found.policies
                },
            }
            for family, indices in families.items()
        },
        "differences": differences,
        "family_differences": by_family,
        "reward_model": reward_model,
        "flags": _flags(found, estimates, differences),
    }


def per_prompt(values: Values) -> list[float]:
    """Mean over the samples of each prompt: the unit every statistic resamples."""
    return [sum(samples) / len(samples) for samples in values]


# -----------------------------------------------------------------------------------------------------------------


def _is_binary(found: Measurements, metric: str) -> bool:
    """Whether every value of every policy is 0 or 1, so that it is a rate."""
    return all(value in (0, 1) for per in found.values.values() for samples in per.get(metric, []) for value in samples)


def _estimates(
    found: Measurements,
    policy: str,
    indices: Sequence[int],
    names: Sequence[str],
    binary: set[str],
    resampling: Resampling,
) -> dict[str, dict[str, Any]]:
    result = {}
    for name in names:
        if name not in found.values[policy]:
            continue
        chosen = [found.values[policy][name][index] for index in indices]
        means = per_prompt(chosen)
        if name in binary and not name.startswith("kl"):
            estimate: Estimate = rate_interval(means, max((len(samples) for samples in chosen), default=1))
        else:
            estimate = mean_interval(means, resamples=resampling.resamples, seed=resampling.seed)
        result[name] = estimate.as_dict()
    return result


def _contrasts(found: Measurements) -> list[tuple[str, str]]:
    """(policy, against): everything against the base, and everything but the base against the reference."""
    pairs = []
    for policy in found.policies:
        if policy not in (found.reference, found.base):
            pairs.append((policy, found.reference))
        if found.base is not None and policy != found.base:
            pairs.append((policy, found.base))
    return pairs


def _difference(
    found: Measurements, policy: str, against: str, metric: str, indices: Sequence[int], resampling: Resampling
) -> dict[str, Any] | None:
    if metric not in found.values[policy] or metric not in found.values[against]:
        return None
    first, second = (per_prompt([found.values[name][metric][index] for index in indices]) for name in (policy, against))
    row = paired_difference(first, second, resamples=resampling.resamples, seed=resampling.seed)
    return {"policy": policy, "against": against, "metric": metric, **row.as_dict()}


def _heldout_differences(found: Measurements, resampling: Resampling) -> list[dict[str, Any]]:
    """Differences of loss per token; none between checkpoints whose tokenizers cut the rows differently."""
    rows = []
    for policy, against in _contrasts(found):
        if policy not in found.heldout or against not in found.heldout:
            continue
        (first, tokens), (second, others) = found.heldout[policy], found.heldout[against]
        if tokens != others:
            continue
        row = paired_difference(
            first, second, weights=np.asarray(tokens, float), resamples=resampling.resamples, seed=resampling.seed
        )
        rows.append({"policy": policy, "against": against, "metric": "heldout_loss", **row.as_dict()})
    return rows


def _group(sources: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        groups.setdefault(source, []).append(index)
    return dict(sorted(groups.items()))


def _correct(differences: list[dict[str, Any]]) -> None:
    """Add ``p_holm`` over the whole list, and the verdict that follows."""
    for row, adjusted in zip(differences, holm([row["p"] for row in differences]), strict=True):
        row["p_holm"] = adjusted
        row["verdict"] = _verdict(row)


def _verdict(row: Mapping[str, Any]) -> str:
    low, high, better = row["low"], row["high"], METRICS[row["metric"]]["better"]
    if low is None or high is None or low <= 0 <= high or row["p_holm"] >= 1 - LEVEL:
        return "unclear"
    up = row["value"] > 0
    if better is None:
        return "higher" if up else "lower"
    return "better" if up == (better == "higher") else "worse"


def _flags(
    found: Measurements, estimates: Mapping[str, Any], differences: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """What a reader must not miss: regressions, a proxy that rose while gold fell, responses that collapsed."""
    flags = []
    verdicts = {(row["policy"], row["against"], row["metric"]): row for row in differences}
    for row in differences:
        if row["verdict"] == "worse":
            title = METRICS[row["metric"]]["title"].lower()
            text = f"{row['policy']} is worse than {row['against']} in {title}: {row['value']:+.3g} "
            flags.append(
                {
                    "policy": row["policy"],
                    "kind": "regression",
                    "text": f"{text}(95 % interval {row['low']:+.3g} to {row['high']:+.3g})",
                }
            )
    for policy in found.policies:
        if policy == found.base:
            continue
        proxy = verdicts.get((policy, found.reference, "reward"))
        gold = verdicts.get((policy, found.reference, "gold"))
        if proxy and gold and proxy["verdict"] == "better" and gold["value"] < 0:
            text = f"{policy} pleases the reward model more than {found.reference} but scores lower by the gold checker"
            flags.append({"policy": policy, "kind": "over-optimised", "text": text})
        flags += _collapse(policy, estimates[policy], found.reference, estimates[found.reference])
    return flags


def _collapse(policy: str, own: Mapping[str, Any], reference: str, theirs: Mapping[str, Any]) -> list[dict[str, str]]:
    flags = []
    finished = own["finished"]["value"]
    if finished is not None and finished < MIN_EOS_RATE:
        text = f"only {finished:.0%} of {policy}'s responses end by themselves; the rest were cut at the token limit"
        flags.append({"policy": policy, "kind": "eos", "text": text})
    length, expected = own["length"]["value"], theirs["length"]["value"]
    if length and expected and not 1 / MAX_LENGTH_FACTOR <= length / expected <= MAX_LENGTH_FACTOR:
        text = f"{policy} answers with {length:.0f} tokens on average, {reference} with {expected:.0f}"
        flags.append({"policy": policy, "kind": "length", "text": text})
    return flags
