"""Figures of a build's preview page: lengths by source, both sides of pairs, turns. Drawn as those of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from align.errors import printable
from align.report.dataset.rows import EDGES, MOST_TURNS, Lengths
from align.report.figures import COLORS, LINES, Panel, styled

SHOWN = 6
"""Sources with an outline of their own; the rest are one."""
LABEL = 28


def figures(lengths: Mapping[str, Lengths]) -> list[tuple[Markup, str]]:
    """Each figure with its caption."""
    groups = grouped(lengths)
    sides = [side for side in ("completion", "chosen") if any(side in one.answers for one in groups.values())]
    found = [(outlines({n: one.prompt for n, one in groups.items()}, "prompt"), "Prompts, all turns together.")]
    for side in sides:
        counts = {name: one.answers[side] for name, one in groups.items() if side in one.answers}
        found.append((outlines(counts, "answer"), "Answers." if side == "completion" else "Chosen answers."))
    whole = _whole(groups.values())
    if "chosen" in whole.answers and "rejected" in whole.answers:
        both = {side: whole.answers[side] for side in ("chosen", "rejected")}
        found.append((outlines(both, "answer"), "Both sides of all pairs: a model can learn that longer is better."))
    found.append((turns(groups), "Messages in the prompt; 1 is a single question."))
    return found


def grouped(lengths: Mapping[str, Lengths]) -> dict[str, Lengths]:
    """The largest sources, and all others as one."""
    order = sorted(lengths, key=lambda name: (-lengths[name].total, name))
    if len(order) <= SHOWN + 1:
        return {name: lengths[name] for name in order}
    rest = order[SHOWN:]
    return {name: lengths[name] for name in order[:SHOWN]} | {
        f"{len(rest)} others": _whole(lengths[name] for name in rest)
    }


def _whole(parts: Iterable[Lengths]) -> Lengths:
    whole = Lengths()
    for part in parts:
        whole.prompt = whole.prompt + part.prompt
        whole.turns = whole.turns + part.turns
        whole.rows.update(part.rows)
        for side, counts in part.answers.items():
            whole.answers[side] = whole.answers.get(side, 0) + counts
    return whole


@styled
def outlines(counts: Mapping[str, np.ndarray], what: str) -> Markup:
    """Share of rows by length in characters on a logarithmic axis, one outline for each name."""
    from matplotlib.ticker import FuncFormatter

    panel = Panel()
    used = np.flatnonzero(sum(counts.values(), np.zeros(len(EDGES), np.int64)))
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 1)
    edges = np.r_[EDGES, EDGES[-1] * 2][max(0, first - 1) : last + 3]
    for index, (name, numbers) in enumerate(counts.items()):
        if numbers.sum():
            part = numbers[max(0, first - 1) : last + 2]
            panel.axes.stairs(
                part / numbers.sum(), edges[: len(part) + 1], color=COLORS[index % len(COLORS)],
                linestyle=LINES[index % len(LINES)], linewidth=1.5, label=_label(name),
            )  # fmt: skip
    panel.axes.set_xscale("log", base=2)
    panel.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.axes.set_xlabel(f"characters of the {what}")
    panel.axes.set_ylabel("share of rows")
    if len(counts) > 1:
        panel.figure.legend(loc="outside upper center", ncols=2)
    return panel.svg(f"Lengths of the {what} in characters, by {', '.join(counts)}")


@styled
def turns(groups: Mapping[str, Lengths]) -> Markup:
    """Share of rows by messages in the prompt."""
    panel = Panel()
    used = np.flatnonzero(_whole(groups.values()).turns)
    most = int(used[-1]) if len(used) else 1
    width = 0.8 / max(1, len(groups))
    for index, (name, one) in enumerate(groups.items()):
        places = np.arange(most + 1) + (index - (len(groups) - 1) / 2) * width
        panel.axes.bar(
            places[1:], one.turns[1 : most + 1] / max(1, one.total), width, color=COLORS[index % len(COLORS)],
            label=_label(name),
        )  # fmt: skip
    ticks: Sequence[int] = range(1, most + 1) if most <= 10 else range(1, most + 1, 3)
    panel.axes.set_xticks(list(ticks), [f"{tick}+" if tick == MOST_TURNS else str(tick) for tick in ticks])
    panel.axes.set_xlabel("messages in the prompt")
    panel.axes.set_ylabel("share of rows")
    panel.axes.grid(axis="x", visible=False)
    if len(groups) > 1:
        panel.figure.legend(loc="outside upper center", ncols=2)
    return panel.svg(f"Messages in prompts, by {', '.join(groups)}")


def _label(name: str) -> str:
    text = printable(name)
    text = text if len(text) <= LABEL else f"{text[: LABEL - 1]}…"
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves labels that begin so out of a legend
