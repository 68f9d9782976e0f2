"""Quality of reward models: accuracy by margin and source, calibration, length bias, agreement with another scorer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from align.report.page.assets import AssetWriter, Figure
from align.report.page.number_format import ACCURACIES, MISSING, estimate_text, number
from align.report.page.panels import COLORS, INK, Panel, dots, legend_name, styled

Card = Mapping[str, Any]
Report = Mapping[str, Any]
"""A scorecard's results for one reward model on one set of pairs."""

MARGINS = {
    "model": "how far apart the model's own two scores are: is it right where it is sure?",
    "gold": "how far apart the two gold scores are, right by those: is it wrong where the answers are close?",
}
CALIBRATION = (
    ("ece", "calibration error (ECE)", "of sigmoid(score difference) as a probability, its noise taken off"),
    ("ece_plain", "the same, noise included", "as others publish it"),
    ("ece_scaled", "calibration error after scaling", "with the temperature that fits these pairs best"),
    ("temperature", "temperature that fits best", "above 1: too sure of itself"),
)
"""Key, title and note of the numbers about calibration."""
LENGTH = (
    ("length_correlation", "score and length", "Spearman over all answers; 0 is no preference for length"),
    ("length_margin_correlation", "difference in score and in length", "the same within pairs"),
)
AGREEMENT = (("accuracy", "same order"), ("kappa", "Cohen's kappa"), ("spearman", "Spearman of differences"))
CHANCE = 0.5
MAX_SOURCES = 24


def sections(card: Card, assets: AssetWriter) -> list[dict[str, Any]]:
    """Return for each reward model and pair set: title, figures, and rows of numbers, by source and by section."""
    parts = [_section(card, report, assets) for report in card["reward_models"]]
    if parts:
        assets.add_table("reward-models", [row for report in card["reward_models"] for row in _table_rows(report)])
    return parts


def _section(card: Card, report: Report, assets: AssetWriter) -> dict[str, Any]:
    name = f"{report.get('stage', 'reward model')}-{report.get('task', 'pairs')}"
    return {
        "title": _title(card, report),
        "pairs": report["pairs"],
        "ties": report.get("ties", 0),
        "figures": list(_figures(report, name, assets)),
        "rows": list(numbers(report)),
        "by_source": _rows((report.get("by_source") or {}).items()),
        "by_margin": _rows(_by_margin(report)),
        "margin_of": _margin_of(report),
        "note": (report.get("calibration") or {}).get("note"),
        "sections": _rows(_section_estimates(report)),
        "agreement": (report.get("agreement") or {}).get("other"),
    }


def _title(card: Card, report: Report) -> str:
    task = report.get("task", "pairs")
    if task in card["tasks"]:
        pair_set = card["tasks"][task]["title"]
    else:
        pair_set = "the held-out pairs" if task == "pairs" else task
    return f"{report.get('stage', 'Reward model')} on {pair_set}"


def numbers(report: Report) -> Iterator[dict[str, Any]]:
    """Yield every number about a reward model: ``name``, ``note``, ``value`` and interval as text, ``estimate``."""
    for key, title in ACCURACIES.items():
        if report.get(key):
            yield _number_row(title, "share of pairs", report[key])
    calibration = report.get("calibration") or {}
    for key, title, note in CALIBRATION:
        if calibration.get(key) is not None:
            yield _number_row(title, note, calibration[key])
    for key, title, note in LENGTH:
        if report.get(key):
            yield _number_row(title, note, report[key])
    agreement = report.get("agreement") or {}
    scorer = agreement.get("other", "another scorer")
    for key, title in AGREEMENT:
        if agreement.get(key) is not None:
            yield _number_row(f"agreement with {scorer}: {title}", "", agreement[key])
    if report.get("margin") is not None:
        yield _number_row("mean score difference", "chosen minus rejected", report["margin"])


def _number_row(name: str, note: str, value: Any) -> dict[str, Any]:
    estimate = value if isinstance(value, Mapping) else _without_interval(value)
    return {"name": name, "note": note, "estimate": estimate, **_as_text(estimate)}


def _without_interval(value: Any) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "n": None}


def _as_text(estimate: Mapping[str, Any]) -> dict[str, str]:
    """Return an estimate's value and interval as text; a dash for an unknown interval."""
    # One bound may be infinite, such as a temperature's, so either of them is enough.
    has_interval = estimate.get("low") is not None or estimate.get("high") is not None
    return estimate_text(estimate) | ({} if has_interval else {"interval": MISSING})


def _rows(estimates: Iterable[tuple[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": name, "n": estimate.get("n"), **_as_text(estimate)} for name, estimate in estimates]


def _section_estimates(report: Report, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the estimates in ``sections`` at any depth: ``Chat Hard``, ``Chat Hard: llmbar-adver-neighbor``."""
    for name, value in (report.get("sections") or {}).items():
        # A block with a value is an estimate; any other block is a section with further parts.
        if isinstance(value, Mapping) and "value" in value:
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _section_estimates({"sections": value}, f"{prefix}{name}: ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", _without_interval(value)


def _by_margin(report: Report) -> list[tuple[str, Any]]:
    """Return (range of score differences, accuracy on the pairs in it)."""
    return [(_margin_range(part), {**part["accuracy"], "n": part["n"]}) for part in report.get("by_margin") or []]


def _margin_of(report: Report) -> str:
    """Return whose score differences ``by_margin`` is about: ``gold`` or ``model``."""
    return "gold" if report.get("by_margin_of") == "gold" else "model"


def _margin_range(part: Mapping[str, Any]) -> str:
    low = part.get("low")
    high = part.get("high")
    if high is None:
        return f"from {number(low)}"
    return f"below {number(high)}" if low is None else f"{number(low)} to {number(high)}"


# ---- figures ------------------------------------------------------------------------------------------------------


def _figures(report: Report, name: str, assets: AssetWriter) -> Iterator[Figure]:
    """Yield figures of accuracy, reliability, accuracy by margin and by source, as far as the report has them."""
    accuracies = [(title, report[key]) for key, title in ACCURACIES.items() if report.get(key)]
    svg = dots(accuracies, "share of held-out pairs ordered right", f"Reward model accuracy: {name}", line=CHANCE)
    caption = f"{report['pairs']:,} pairs. Dotted: chance. Noise in the labels caps “as labeled”."
    yield assets.add_figure(f"accuracy-{name}", svg, caption)
    bins = (report.get("calibration") or {}).get("bins") or []
    if bins:
        caption = "Reliability: how often the answer that the model prefers is the chosen one, by how sure it is."
        yield assets.add_figure(f"reliability-{name}", reliability_plot(bins, name), caption)
    margins = _by_margin(report)
    if margins:
        rows = [(f"{name} (n={accuracy['n']})", accuracy) for name, accuracy in margins]
        svg = dots(rows, "share of pairs ordered right", f"Reward model accuracy by margin: {name}", line=CHANCE)
        caption = f"Accuracy by {MARGINS[_margin_of(report)]}. Dotted: chance."
        yield assets.add_figure(f"margins-{name}", svg, caption)
    sources = report.get("by_source") or {}
    if len(sources) > 1:
        # The largest sources, then by name, as in the tables.
        largest = sorted(sources.items(), key=lambda item: -item[1]["n"])[:MAX_SOURCES]
        xlabel = "share of pairs ordered as labeled"
        svg = dots(sorted(largest), xlabel, f"Reward model accuracy by source: {name}", line=CHANCE)
        caption = "Accuracy as labeled, by source. Dotted: chance."
        yield assets.add_figure(f"accuracy-by-source-{name}", svg, caption)


@styled
def reliability_plot(bins: Sequence[Mapping[str, Any]], name: str) -> Markup:
    """Draw accuracy over confidence by bin, with 95 % intervals, the diagonal and the number of pairs in each bin."""
    panel = Panel()
    filled = [part for part in bins if part["n"]]
    used = [part for part in filled if part["accuracy"]["value"] is not None]
    panel.axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1.2, label="calibrated")
    for index, part in enumerate(used):
        label = legend_name(name) if index == 0 else None
        panel.add_point(part["confidence"], part["accuracy"], markersize=5.5, label=label)
        position = (part["confidence"], 0.02)
        panel.axes.annotate(f"{part['n']}", position, xycoords=("data", "axes fraction"), fontsize=7, ha="center")
    confidences = [part["confidence"] for part in used]
    panel.axes.plot(confidences, [part["accuracy"]["value"] for part in used], color=COLORS[0], linewidth=1)
    panel.axes.set_xlim(0.48 if min(confidences, default=0.0) >= 0.5 else -0.02, 1.02)
    panel.axes.set_ylim(0, 1.03)
    panel.axes.set_xlabel("how sure (sigmoid of the difference); below: pairs")
    panel.axes.set_ylabel("share ordered as labeled")
    panel.axes.legend(loc="best")
    return panel.svg(f"Reliability of the reward model: {name}")


def _table_rows(report: Report) -> Iterator[dict[str, Any]]:
    """Yield every number about a reward model, unrounded, for the files next to the page."""
    bins = (report.get("calibration") or {}).get("bins") or []
    parts: dict[str, Iterable[tuple[str, Any]]] = {
        "": [(row["name"], row["estimate"]) for row in numbers(report)],
        "source": (report.get("by_source") or {}).items(),
        "margin": _by_margin(report),
        "section": _section_estimates(report),
        "confidence": [(str(part["confidence"]), part["accuracy"]) for part in bins],
    }
    for part, estimates in parts.items():
        for name, estimate in estimates:
            yield {"stage": report.get("stage"), "task": report.get("task"), "part": part, "name": name, **estimate}
