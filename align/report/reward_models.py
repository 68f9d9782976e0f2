"""How good the reward models are: accuracy by margin and source, calibration, length, agreement with another scorer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from align.report.assets import Beside, Figure
from align.report.figures import COLORS, INK, Panel, bars, dots, legend_name, styled
from align.report.wording import ACCURACIES, interval, number

Card = Mapping[str, Any]
Report = Mapping[str, Any]

MARGINS = {
    "model": "how far apart the model's own two scores are: is it right where it is sure?",
    "gold": "how far apart the two gold scores are, right by those: is it wrong where the answers are close?",
}
CHANCE = 0.5


def sections(card: Card, beside: Beside) -> list[dict[str, Any]]:
    """For each reward model and pair set: title, figures, and rows of numbers, by source and by section."""
    found = []
    for report in card["reward_models"]:
        name = f"{report.get('stage', 'reward model')}-{report.get('task', 'pairs')}"
        found.append(
            {
                "title": _title(card, report),
                "pairs": report["pairs"],
                "ties": report.get("ties", 0),
                "figures": list(_figures(report, name, beside)),
                "rows": list(numbers(report)),
                "by_source": _rows(report.get("by_source") or {}),
                "by_margin": [
                    {"range": _range(one), "n": one["n"], **_ends(one["accuracy"])}
                    for one in report.get("by_margin") or []
                ],
                "margin_of": _margin_of(report),
                "note": (report.get("calibration") or {}).get("note"),
                "sections": _rows(dict(_section_estimates(report))),
                "agreement": (report.get("agreement") or {}).get("other"),
            }
        )
    if card["reward_models"]:
        _keep_tables(card, beside)
    return found


def _title(card: Card, report: Report) -> str:
    task = report.get("task", "pairs")
    on = card["tasks"][task]["title"] if task in card["tasks"] else "the held-out pairs" if task == "pairs" else task
    return f"{report.get('stage', 'Reward model')} on {on}"


def numbers(report: Report) -> Iterator[dict[str, Any]]:
    """Every single number about a reward model: ``name``, ``note``, ``value`` and interval as text, ``estimate``."""
    for key, title in ACCURACIES.items():
        if report.get(key):
            yield _number(title, "share of pairs", report[key])
    calibration = report.get("calibration") or {}
    for key, title, note in (
        ("ece", "calibration error (ECE)", "of sigmoid(score difference) as a probability, its noise taken off"),
        ("ece_plain", "the same, noise included", "as others publish it"),
        ("ece_scaled", "calibration error after scaling", "with the temperature that fits these pairs best"),
        ("temperature", "temperature that fits best", "above 1: too sure of itself"),
    ):
        if calibration.get(key) is not None:
            yield _number(title, note, calibration[key])
    for key, title, note in (
        ("length_correlation", "score and length", "Spearman over all answers; 0 is no taste for length"),
        ("length_margin_correlation", "difference in score and in length", "the same within pairs"),
    ):
        if report.get(key):
            yield _number(title, note, report[key])
    agreement = report.get("agreement") or {}
    for key, title in (("accuracy", "same order"), ("kappa", "Cohen's kappa"), ("spearman", "Spearman of differences")):
        if agreement.get(key) is not None:
            yield _number(f"agreement with {agreement.get('other', 'another scorer')}: {title}", "", agreement[key])
    if report.get("margin") is not None:
        yield _number("mean score difference", "chosen minus rejected", report["margin"])


def _number(name: str, note: str, value: Any) -> dict[str, Any]:
    estimate = value if isinstance(value, Mapping) else {"value": value, "low": None, "high": None, "n": None}
    return {"name": name, "note": note, "estimate": estimate, **_ends(estimate)}


def _ends(estimate: Mapping[str, Any]) -> dict[str, str]:
    known = estimate.get("low") is not None or estimate.get("high") is not None
    return {"value": number(estimate["value"]), "interval": interval(dict(estimate)) if known else "–"}


def _rows(estimates: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "n": one.get("n"), **_ends(one)} for name, one in estimates.items()]


def _section_estimates(report: Report, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Estimates in ``sections``, however deep: ``Chat Hard``, ``Chat Hard: llmbar-adver-neighbor``."""
    for name, value in (report.get("sections") or {}).items():
        if isinstance(value, Mapping) and "value" in value:
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _section_estimates({"sections": value}, f"{prefix}{name}: ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", {"value": value, "low": None, "high": None, "n": None}


def _margin_of(report: Report) -> str:
    """Whose differences ``by_margin`` is about."""
    return "gold" if report.get("by_margin_of") == "gold" else "model"


def _range(one: Mapping[str, Any]) -> str:
    low, high = one.get("low"), one.get("high")
    if high is None:
        return f"from {number(low)}"
    return f"below {number(high)}" if low is None else f"{number(low)} to {number(high)}"


# ---- figures ------------------------------------------------------------------------------------------------------


def _figures(report: Report, name: str, beside: Beside) -> Iterator[Figure]:
    shares = [(title, report[key]) for key, title in ACCURACIES.items() if report.get(key)]
    svg = dots(shares, "share of held-out pairs ordered right", f"Reward model accuracy: {name}", line=CHANCE)
    caption = f"{report['pairs']:,} pairs. Dotted: chance. Noise in the labels caps “as labeled”."
    yield beside.figure(f"accuracy-{name}", svg, caption)
    bins = (report.get("calibration") or {}).get("bins") or []
    if bins:
        caption = "Reliability: how often the answer that the model prefers is the chosen one, by how sure it is."
        yield beside.figure(f"reliability-{name}", reliability(bins, name), caption)
    margins = report.get("by_margin") or []
    if margins:
        caption = f"Accuracy by {MARGINS[_margin_of(report)]}. Dotted: chance."
        svg = dots(
            [(f"{_range(one)} (n={one['n']})", one["accuracy"]) for one in margins], "share of pairs ordered right",
            f"Reward model accuracy by margin: {name}", line=CHANCE,
        )  # fmt: skip
        yield beside.figure(f"margins-{name}", svg, caption)
    sources = report.get("by_source") or {}
    if len(sources) > 1:
        largest = sorted(sources.items(), key=lambda item: -item[1]["n"])[:24]
        svg = dots(sorted(largest), "share of pairs ordered as labeled", f"Reward model accuracy by source: {name}",
                   line=CHANCE)  # fmt: skip
        yield beside.figure(f"accuracy-by-source-{name}", svg, "Accuracy as labeled, by source. Dotted: chance.")


@styled
def reliability(bins: Sequence[Mapping[str, Any]], name: str) -> Markup:
    """Accuracy over confidence by bin with 95 % intervals, the diagonal, and how many pairs each bin has."""
    panel = Panel()
    used = [one for one in bins if one["n"] and one["accuracy"]["value"] is not None]
    panel.axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1.2, label="calibrated")
    for at, one in enumerate(used):
        panel.axes.errorbar(
            one["confidence"], one["accuracy"]["value"], yerr=bars(one["accuracy"]), marker="o", color=COLORS[0],
            markersize=5.5, capsize=2, linewidth=1.2, label=legend_name(name) if at == 0 else None,
        )  # fmt: skip
        panel.axes.annotate(f"{one['n']}", (one["confidence"], 0.02), xycoords=("data", "axes fraction"), fontsize=7,
                            ha="center")  # fmt: skip
    panel.axes.plot(
        [one["confidence"] for one in used], [one["accuracy"]["value"] for one in used], color=COLORS[0], linewidth=1
    )
    lowest = min((one["confidence"] for one in used), default=0.0)
    panel.axes.set_xlim(0.48 if lowest >= 0.5 else -0.02, 1.02)
    panel.axes.set_ylim(0, 1.03)
    panel.axes.set_xlabel("how sure (sigmoid of the difference); below: pairs")
    panel.axes.set_ylabel("share ordered as labeled")
    panel.axes.legend(loc="best")
    return panel.svg(f"Reliability of the reward model: {name}")


# ---- files --------------------------------------------------------------------------------------------------------


def _keep_tables(card: Card, beside: Beside) -> None:
    rows: list[dict[str, Any]] = []
    for report in card["reward_models"]:
        of = {"stage": report.get("stage"), "task": report.get("task")}
        rows += [{**of, "part": "", "name": one["name"], **one["estimate"]} for one in numbers(report)]
        for part, estimates in (
            ("source", report.get("by_source") or {}),
            ("margin", {_range(one): one["accuracy"] for one in report.get("by_margin") or []}),
            ("section", dict(_section_estimates(report))),
        ):
            rows += [{**of, "part": part, "name": name, **estimate} for name, estimate in estimates.items()]
        for one in (report.get("calibration") or {}).get("bins") or []:
            rows.append({**of, "part": "confidence", "name": f"{one['confidence']}", **one["accuracy"]})
    beside.table(
        "reward-models",
        "Reward models",
        {"stage": "Stage", "task": "Pairs of", "part": "By", "name": "Name", "value": "Value", "low": "95 % low",
         "high": "95 % high", "n": "n"},
        rows,
    )  # fmt: skip
