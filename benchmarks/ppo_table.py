"""Output of ``ppo_vs_trl``, from the measurements of its runs: pure, and tested without trl.

A *run* is the result of one process: ``updates`` without those that warmed up (seconds by phase, the whole under
``seconds``, real tokens and, of align, how many a model reads: what all prompts of a micro-batch begin with counts
once), ``peak_gib`` and, of align, ``parameters`` and ``matrix_peak``.
"""

from __future__ import annotations

import statistics
from typing import Any

Run = dict[str, Any]
Round = dict[str, Run]
"""A run of each side, under ``align`` and ``trl``; a curve may have align's alone."""

PHASES = ("sampling", "scoring", "measuring", "learning", "other", "seconds")
"""``seconds`` is the whole update; ``other`` what is left of it: weights to the engine, prompts, garbage."""
UPDATE = ("scoring", "measuring", "learning")
"""The update phase: everything that is matrix products of a training pass."""
FLOPS = {"full": 16, "lora": 12, "lora_last": 9}
"""Per parameter and real token, see :func:`floor_flops`."""


def floor_flops(method: str, parameters: int, tokens: float) -> float:
    """FLOPs that an update phase cannot do without, at a multiplication and an addition per parameter and token.

    A forward pass is 2 per parameter and real token (prompt and response, no padding), gradients of its inputs 2 more,
    those of its weights another 2. ``full``: policy and critic 6 + 6, reference and reward model 2 + 2, in all 16.
    ``lora``: policy and critic need no gradients of their frozen weights, 4 + 4, and again 2 + 2, in all 12.
    ``lora_last``: no gradients in the lower half of the layers, 3 + 3, which the reference need not pass either, 1 + 2,
    in all 9. Every model counts with all parameters of the policy. Left out: attention between tokens and the adapters,
    some 5 %; the second pass of policy and critic before the advantages are known, which is work but no necessity.
    """
    return FLOPS[method] * parameters * tokens


def matrix_flops(method: str, parameters: int, head: int, prompt_tokens: float, response_tokens: float) -> float:
    """The same without products nobody needs: an embedding is looked up, and the output head, which is the embedding
    of a tied model, is for response tokens of policy and reference only.

    ``full``: 16 per parameter of the trunk and token, 6 + 2 per parameter of the head and response token; ``lora``:
    12, and 4 + 2.
    """
    trunk = FLOPS[method] * (parameters - head) * (prompt_tokens + response_tokens)
    return trunk + (8 if method == "full" else 6) * head * response_tokens


def phases(run: Run) -> dict[str, float]:
    """Median seconds of each phase over the updates, of a token's share in milliseconds, and peak GiB."""
    rows = []
    for update in run["updates"]:
        known = {name: update[name] for name in PHASES[:4]}
        row = known | {"other": update["seconds"] - sum(known.values()), "seconds": update["seconds"]}
        tokens = update["prompt_tokens"] + update["response_tokens"]
        row["per_token"] = 1000 * update["seconds"] / tokens
        row["per_response_token"] = 1000 * update["seconds"] / update["response_tokens"]
        rows.append(row)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]} | {"peak_gib": run["peak_gib"]}


LABELS = {
    **{name: f"{name}, s" for name in PHASES[:5]},
    "seconds": "whole update, s",
    "per_token": "per real token, ms",
    "per_response_token": "per response token, ms",
    "peak_gib": "peak memory, GiB",
}


def table(rounds: list[Round]) -> list[str]:
    """Return medians over the rounds by side and phase, the median of the rounds' ratios, and these ratios."""
    medians = [{side: phases(run) for side, run in runs.items()} for runs in rounds]
    lines = [f"{'':<24}{'align':>9}{'trl':>9}{'ratio':>9}   align / trl, round by round"]
    for name, label in LABELS.items():
        ours, theirs = ([by_side[side][name] for by_side in medians if side in by_side] for side in ("align", "trl"))
        line = f"{label:<24}{statistics.median(ours):9.2f}"
        if theirs:
            line += f"{statistics.median(theirs):9.2f}"
        ratios = [a / b for a, b in zip(ours, theirs, strict=False) if b > 0]
        if ratios and name != "other":  # what is in it differs
            line += f"{statistics.median(ratios):9.2f}   {' '.join(f'{ratio:.2f}' for ratio in ratios)}"
        lines.append(line)
    return lines


def efficiency(rounds: list[Round], method: str) -> dict[str, float]:
    """Return the best matrix rate of the runs, and medians of align's update phase: seconds, and shares of that rate.

    A share is the time that the phase needs at that rate over the time that it took.
    """
    runs = [round_runs["align"] for round_runs in rounds if "align" in round_runs]
    peak = max(run["matrix_peak"] for run in runs)
    sizes = runs[0]["parameters"]
    shares, needed, read, seconds = [], [], [], []
    for update in (update for run in runs for update in run["updates"]):
        spent = sum(update[name] for name in UPDATE)
        prompt, response = update["prompt_tokens"], update["response_tokens"]
        seconds.append(spent)
        shares.append(floor_flops(method, sizes["all"], prompt + response) / peak / spent)
        read.append(floor_flops(method, sizes["all"], update["read_tokens"]) / peak / spent)
        needed.append(matrix_flops(method, sizes["all"], sizes["head"], prompt, response) / peak / spent)
    series = {"share": shares, "share_needed": needed, "share_read": read, "update_phase": seconds}
    return {"matrix_peak": peak} | {name: statistics.median(values) for name, values in series.items()}


def efficiency_lines(rounds: list[Round], method: str) -> list[str]:
    """Return ``efficiency`` in words."""
    results = efficiency(rounds, method)
    floor = results["share"] * results["update_phase"]
    return [
        f"align's update phase ({', '.join(UPDATE)}) takes {results['update_phase']:.1f} s; {FLOPS[method]} FLOPs per "
        f"parameter and real token at {results['matrix_peak'] / 1e9:.0f} GFLOP/s (bf16, 2048 square) are "
        f"{floor:.1f} s:",
        f"{results['share']:.0%} of the matrix peak; {results['share_needed']:.0%} counting only products that are "
        "needed (no embedding, the head at response tokens); "
        f"{results['share_read']:.0%} counting once a micro-batch what all its prompts begin with, as it is read",
    ]


def tokens_line(rounds: list[Round]) -> str:
    """Return the real tokens of an update by side."""
    sides = []
    for side in ("align", "trl"):
        updates = [update for runs in rounds if side in runs for update in runs[side]["updates"]]
        if updates:
            prompt, response = (
                statistics.mean(update[name] for update in updates) for name in ("prompt_tokens", "response_tokens")
            )
            sides.append(f"{side} {prompt:.0f} prompt + {response:.0f} response")
    return "real tokens an update: " + "; ".join(sides)
