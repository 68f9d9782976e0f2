"""Output of ``episodes``, from the measurements of its runs: pure, and tested without trl."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.ppo_table import Round, Run, phases, table

SAMPLING_TARGET = 1.0
"""align's seconds for each sampled episode over trl's, at most."""
UPDATE_TARGET = 0.5
"""align's seconds for an update over trl's, at most."""
LATENCY_FACTOR = 1.3
"""Times the seconds without sleeping that episodes with slow tools may take, beside one call for each turn."""


def phase_run(run: Run) -> Run:
    """Return a run as ``ppo_table`` reads it: what is sampled and what tools write are tokens of the response."""
    updates = [
        update | {"response_tokens": update["sampled_tokens"] + update["tool_tokens"]} for update in run["updates"]
    ]
    return run | {"updates": updates}


def episode_seconds(run: Run) -> dict[str, float]:
    """Return median seconds: of sampling per episode, of the whole update per episode, and of an update."""
    medians = phases(phase_run(run))
    episodes = run["updates"][0]["episodes"]
    return {
        "sampling": medians["sampling"] / episodes,
        "whole": medians["seconds"] / episodes,
        "update": medians["seconds"],
    }


def summary(rounds: list[Round]) -> dict[str, Any]:
    """Return medians over the rounds by side, and the median and all of the rounds' ratios."""
    measured = [{side: episode_seconds(run) for side, run in runs.items()} for runs in rounds]
    sides = list(measured[0])
    result: dict[str, Any] = {
        side: {
            name: statistics.median(runs[side][name] for runs in measured) for name in ("sampling", "whole", "update")
        }
        for side in sides
    }
    if "trl" in sides and "align" in sides:
        for name in ("sampling", "update"):
            ratios = [runs["align"][name] / runs["trl"][name] for runs in measured]
            result[f"{name}_ratio"] = statistics.median(ratios)
            result[f"{name}_ratios"] = ratios
    return result


def lines(rounds: list[Round]) -> list[str]:
    """Return the table of phases, and seconds by the episode against the targets."""
    results = summary(rounds)
    text = [tokens_line(rounds), *table([{side: phase_run(run) for side, run in runs.items()} for runs in rounds]), ""]
    text += [
        f"{side}: {values['sampling']:.2f} s to sample an episode, {values['whole']:.2f} s of an update by the episode"
        for side, values in results.items()
        if isinstance(values, dict)
    ]
    if "update_ratio" in results:
        text += [
            verdict("an episode sampled", results["sampling_ratio"], SAMPLING_TARGET),
            verdict("an update", results["update_ratio"], UPDATE_TARGET),
        ]
    return text


def verdict(name: str, ratio: float, target: float) -> str:
    """Return a ratio beside its target, in words."""
    return f"{name}: {ratio:.2f} of trl's time; target at most {target:g}: {'met' if ratio <= target else 'missed'}"


def tokens_line(rounds: list[Round]) -> str:
    """Return the tokens and calls of an update by side, which should be equal."""
    sides = []
    for side in rounds[0]:
        updates = [update for runs in rounds for update in runs[side]["updates"]]
        counts = [
            f"{statistics.mean(update[f'{name}_tokens'] for update in updates):.0f} {name}"
            for name in ("prompt", "sampled", "tool")
        ]
        calls = statistics.mean(update["calls"] for update in updates)
        sides.append(f"{side} {' + '.join(counts)} ({calls:.0f} calls, engine {rounds[0][side]['engine']})")
    return "tokens an update: " + "; ".join(sides)


def latency_bound(sampling: float, calls: int, tool_seconds: float) -> float:
    """Return the seconds that episodes with slow tools may take.

    ``sampling``: seconds of the same episodes with tools that do not sleep. ``calls``: turns with a call of the longest
    episode.
    """
    return LATENCY_FACTOR * sampling + calls * tool_seconds


def latency_summary(run: dict[str, Any]) -> dict[str, float]:
    """Return medians over the plays of a run, and the worst share of the bound of its pairs of plays."""
    shares = []
    for quick, slow in zip(run["quick"], run["slow"], strict=True):
        shares.append(slow["seconds"] / latency_bound(quick["seconds"], run["calls"], run["tool_seconds"]))
    result = {
        f"{kind}_{name}": statistics.median(play[name] for play in run[kind])
        for kind in ("quick", "slow")
        for name in ("seconds", "prefix_hit_rate")
        if run[kind][0][name] is not None
    }
    result["bound"] = latency_bound(result["quick_seconds"], run["calls"], run["tool_seconds"])
    return result | {"share": statistics.median(shares), "worst_share": max(shares)}


def latency_lines(run: dict[str, Any]) -> list[str]:
    """Return lines on the cost of slow tools against the bound, and on the use of the prefix cache."""
    results = latency_summary(run)
    met = "met" if results["share"] <= 1 else "missed"
    text = [
        f"{run['episodes']} episodes of up to {run['calls'] + 1} turns, engine {run['engine']}, {run['workers']} "
        f"workers ({run['isolation']})",
        f"tools that return at once: {results['quick_seconds']:.1f} s; tools that sleep {run['tool_seconds']:g} s: "
        f"{results['slow_seconds']:.1f} s",
        f"bound: {LATENCY_FACTOR:g} x {results['quick_seconds']:.1f} s + {run['calls']} calls x "
        f"{run['tool_seconds']:g} s = {results['bound']:.1f} s; {results['share']:.2f} of it (worst of "
        f"{len(run['slow'])}: {results['worst_share']:.2f}): {met}",
    ]
    if "slow_prefix_hit_rate" in results:
        text.append(
            f"prompt tokens of turns from the prefix cache: {results['quick_prefix_hit_rate']:.0%}, with slow tools "
            f"{results['slow_prefix_hit_rate']:.0%}"
        )
    return text
