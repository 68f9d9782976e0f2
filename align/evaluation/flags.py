"""Flags of a scorecard: regressions, a proxy that rose while the truth fell, answers that collapsed. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.evaluation.prompt_metrics import program_metrics

MIN_EOS_RATE = 0.9
MAX_LENGTH_FACTOR = 2.0

Flag = dict[str, str]


def find_flags(card: Mapping[str, Any]) -> list[Flag]:
    """Return the flags of a scorecard that has its estimates and differences."""
    flags = [_regression(row, card["metrics"]) for row in card["differences"] if row["verdict"] == "worse"]
    verdicts = {(row["policy"], row["against"], row["metric"]): row for row in card["differences"]}
    reference = card["reference"]
    if card["base"] is None:
        text = "the base model is not among the compared systems, so it is unknown whether training helped at all"
        flags.append({"policy": reference, "kind": "no-base", "text": text})
    # The first program decides, so it stands for the truth that a reward model is a proxy of.
    program = next(iter(program_metrics(card["metrics"])), None)
    for policy in card["policies"]:
        if policy == card["base"]:
            continue
        proxy = verdicts.get((policy, reference, "reward"))
        truth = verdicts.get((policy, reference, program))
        # The proxy's gain must be clear, while any loss in truth is a warning: that is how over-optimization begins.
        if proxy and truth and proxy["verdict"] == "better" and _is_loss(truth, card["metrics"][program]):
            text = f"{policy} pleases the reward model more than {reference} but does worse by {program}"
            flags.append({"policy": policy, "kind": "over-optimized", "text": text})
        flags += _collapse(policy, card["estimates"][policy], reference, card["estimates"][reference])
    return flags + _inconsistent_judges(card.get("win_rates", ())) + _copies(card)


def _is_loss(row: Mapping[str, Any], metric: Mapping[str, Any]) -> bool:
    return bool(row["value"] > 0) if metric["better"] == "lower" else bool(row["value"] < 0)


def _regression(row: Mapping[str, Any], metrics: Mapping[str, Any]) -> Flag:
    title = metrics[row["metric"]]["title"]
    if "." not in row["metric"]:
        title = title.lower()
    text = f"{row['policy']} is worse than {row['against']} in {title}: {row['value']:+.3g} "
    interval = f"(95 % interval {row['low']:+.3g} to {row['high']:+.3g})"
    return {"policy": row["policy"], "kind": "regression", "text": text + interval}


def _collapse(
    policy: str, estimates: Mapping[str, Any], reference: str, ref_estimates: Mapping[str, Any]
) -> list[Flag]:
    """Return flags for responses that seldom end by themselves or whose length differs by more than a factor of two."""
    flags: list[Flag] = []
    if "finished" not in estimates or "finished" not in ref_estimates:
        return flags
    finished = estimates["finished"]["value"]
    if finished is not None and finished < MIN_EOS_RATE:
        text = f"only {finished:.0%} of {policy}'s responses end by themselves; the rest were cut at the token limit"
        flags.append({"policy": policy, "kind": "eos", "text": text})
    length, expected = estimates["length"]["value"], ref_estimates["length"]["value"]
    if length and expected and not 1 / MAX_LENGTH_FACTOR <= length / expected <= MAX_LENGTH_FACTOR:
        text = f"{policy} answers with {length:.0f} tokens on average, {reference} with {expected:.0f}"
        flags.append({"policy": policy, "kind": "length", "text": text})
    return flags


def _copies(card: Mapping[str, Any]) -> list[Flag]:
    """Return a flag for each checkpoint whose second sampling repeated the first: it measures no noise."""
    originals = {system["name"]: system["of"] for system in card.get("systems", ())}
    flags = []
    for policy, tasks in card.get("copies", {}).items():
        text = (
            f"{policy} repeats {originals[policy]} word for word in {', '.join(tasks)}, so the noise was not measured "
            "there: greedy answers do not change with the seed; sample at a temperature above 0"
        )
        flags.append({"policy": policy, "kind": "noise", "text": text})
    return flags


def _inconsistent_judges(win_rates: Sequence[Mapping[str, Any]]) -> list[Flag]:
    """Return a flag for each judge that contradicts itself in most pairs once their order is swapped."""
    flags = []
    for row in win_rates:
        if row["n"] and row["disagreements"] > row["n"] / 2:
            text = (
                f"the judge of {row['task']} ({row['judge']}) contradicts itself, once answers are swapped, in "
                f"{row['disagreements']} of {row['n']} comparisons of {row['one']} and {row['other']}"
            )
            flags.append({"policy": row["one"], "kind": "judge", "text": text})
    return flags
