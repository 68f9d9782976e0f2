"""Plots of a build's preview page: lengths by source, lengths of both sides of pairs, turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from align.errors import printable
from align.report.dataset.build_summary import EDGES, MAX_TURNS, Lengths
from align.report.page.panels import COLORS, LINES, Panel, styled

MAX_OUTLINES = 6
"""Maximum number of sources with a separate outline; the others are merged."""
MAX_LABEL_LENGTH = 28
CAPTIONS = {"completion": ("answer", "Answers."), "chosen": ("answer", "Chosen answers."), "text": ("text", "Texts.")}
"""Side → the subject of its axis, and the caption of its plot."""


def length_plots(lengths: Mapping[str, Lengths]) -> list[tuple[Markup, str]]:
    """Return each plot with its caption; plain texts have none of prompts and turns."""
    groups = merge_small_sources(lengths)
    total = _sum(groups.values())
    has_prompts = bool(total.prompt.any())
    plots = []
    if has_prompts:
        prompts = {name: group.prompt for name, group in groups.items()}
        plots.append((plot_lengths(prompts, "prompt"), "Prompts, all turns together."))
    for side, (subject, caption) in CAPTIONS.items():
        counts = {name: group.answers[side] for name, group in groups.items() if side in group.answers}
        if counts:
            plots.append((plot_lengths(counts, subject), caption))
    if "chosen" in total.answers and "rejected" in total.answers:
        pair = {side: total.answers[side] for side in ("chosen", "rejected")}
        caption = "Both sides of all pairs: a model can learn that longer is better."
        plots.append((plot_lengths(pair, "answer"), caption))
    if has_prompts:
        plots.append((plot_turns(groups), "Messages in the prompt; 1 is a single question."))
    return plots


def merge_small_sources(lengths: Mapping[str, Lengths]) -> dict[str, Lengths]:
    """Return the largest sources, and all others as one."""
    # Sort by size, then by name, so the same build always gets the same colors.
    order = sorted(lengths, key=lambda name: (-lengths[name].total, name))
    # One source more than the limit is drawn as itself, because "1 others" would not save an outline.
    if len(order) <= MAX_OUTLINES + 1:
        return {name: lengths[name] for name in order}
    rest = order[MAX_OUTLINES:]
    largest = {name: lengths[name] for name in order[:MAX_OUTLINES]}
    return largest | {f"{len(rest)} others": _sum(lengths[name] for name in rest)}


def _sum(parts: Iterable[Lengths]) -> Lengths:
    total = Lengths()
    for part in parts:
        total.prompt = total.prompt + part.prompt
        total.turns = total.turns + part.turns
        total.rows.update(part.rows)
        for side, counts in part.answers.items():
            total.answers[side] = total.answers.get(side, 0) + counts
    return total


@styled
def plot_lengths(counts: Mapping[str, np.ndarray], subject: str) -> Markup:
    """Draw the share of rows by length in characters on a logarithmic axis, with an outline for each name.

    ``subject`` says what is measured: a prompt, an answer or a text.
    """
    from matplotlib.ticker import FuncFormatter

    panel = Panel()
    # Only bins with rows are drawn, of the millions of characters that the bins cover.
    used = np.flatnonzero(sum(counts.values(), np.zeros(len(EDGES), np.int64)))
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 1)
    # The axis ends one empty bin beyond the shortest and the longest row.
    edges = np.r_[EDGES, EDGES[-1] * 2][max(0, first - 1) : last + 3]
    for index, (name, numbers) in enumerate(counts.items()):
        if numbers.sum():
            part = numbers[max(0, first - 1) : last + 2]
            panel.axes.stairs(
                part / numbers.sum(),
                edges[: len(part) + 1],
                color=COLORS[index % len(COLORS)],
                linestyle=LINES[index % len(LINES)],
                linewidth=1.5,
                label=_label(name),
            )
    panel.axes.set_xscale("log", base=2)
    panel.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.axes.set_xlabel(f"characters of the {subject}")
    panel.axes.set_ylabel("share of rows")
    if len(counts) > 1:
        panel.figure.legend(loc="outside upper center", ncols=2)
    return panel.svg(f"Lengths of the {subject} in characters, by {', '.join(counts)}")


@styled
def plot_turns(groups: Mapping[str, Lengths]) -> Markup:
    """Draw the share of rows by messages in the prompt."""
    panel = Panel()
    used = np.flatnonzero(_sum(groups.values()).turns)
    longest = int(used[-1]) if len(used) else 1
    width = 0.8 / max(1, len(groups))
    for index, (name, group) in enumerate(groups.items()):
        # The bars of a count of messages are side by side, centered on it.
        positions = np.arange(longest + 1) + (index - (len(groups) - 1) / 2) * width
        panel.axes.bar(
            positions[1:],
            group.turns[1 : longest + 1] / max(1, group.total),
            width,
            color=COLORS[index % len(COLORS)],
            label=_label(name),
        )
    ticks: Sequence[int] = range(1, longest + 1) if longest <= 10 else range(1, longest + 1, 3)
    panel.axes.set_xticks(list(ticks), [f"{tick}+" if tick == MAX_TURNS else str(tick) for tick in ticks])
    panel.axes.set_xlabel("messages in the prompt")
    panel.axes.set_ylabel("share of rows")
    panel.axes.grid(axis="x", visible=False)
    if len(groups) > 1:
        panel.figure.legend(loc="outside upper center", ncols=2)
    return panel.svg(f"Messages in prompts, by {', '.join(groups)}")


def _label(name: str) -> str:
    """Return a source's name as a legend shows it; matplotlib would leave out labels that begin with ``_``."""
    text = printable(name)
    if len(text) > MAX_LABEL_LENGTH:
        text = f"{text[: MAX_LABEL_LENGTH - 1]}…"
    return f" {text}" if text.startswith("_") else text
