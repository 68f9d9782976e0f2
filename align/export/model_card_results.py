"""Results and limitations on a model card, from a scorecard of any format. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.data.markdown import plain, table
from align.export.model_card_facts import REWARD_METRICS, Facts, is_trained, own_names, reward_results
from align.report.curves.metric_series import read_events
from align.report.page.number_format import MISSING, interval, number, p_value, signed
from align.report.scorecard.conclusions import find_difference

MOST_WARNINGS = 12
MOST_RIVALS = 3
"""Most columns for prompted and best-of-N systems."""


def results(facts: Facts) -> list[str]:
    """Return a table of every metric of this checkpoint, beside the reference and the base."""
    if facts.written.is_reward:
        return _reward_results(facts)
    card, names = facts.scorecard, own_names(facts)
    if card is None or not names:
        return ["No evaluation of this checkpoint is recorded."]
    own_name, estimates = names[0], card["estimates"]
    rivals = [system for system in card.get("systems") or [] if system.get("role") in ("prompted", "best_of")]
    # Columns: the reference, the base, and a few prompted or best-of-N systems, each once.
    named = (card["reference"], card["base"], *(str(system["name"]) for system in rivals[:MOST_RIVALS]))
    others = [name for name in dict.fromkeys(named) if name is not None and name != own_name and name in estimates]
    header = ["task", "metric", "unit", "n", f"**{plain(own_name)}**", *(plain(name) for name in others)]
    rows = []
    for metric, estimate in estimates[own_name].items():
        description = card["metrics"].get(metric, {})
        row = [
            description.get("task", ""),
            description.get("title", metric),
            description.get("unit", ""),
            number(estimate["n"]),
            _estimate(estimate),
            *(_estimate(estimates[name].get(metric)) for name in others),
        ]
        if others:
            row.append(_change(card, own_name, others[0], metric))
        rows.append(row)
    lines = table([*header, *(f"change from {plain(name)}" for name in others[:1])], rows, numbers=(3,))
    return [
        *lines,
        "",
        f"Measured by the evaluation {_cited(facts)}. In brackets 95 % intervals. Changes are paired over the same "
        "items, their p-values corrected for the number of comparisons (Holm).",
        *(_describe_rival(system) for system in rivals if system["name"] in others),
        *_settings(card),
    ]


def _describe_rival(system: Mapping[str, Any]) -> str:
    """Describe a prompted or best-of-N system: the fair alternatives to training."""
    name, of = plain(str(system["name"])), plain(str(system["of"]))
    if system["role"] == "best_of":
        return f"{name} is {of}, the best of {system.get('best_of')} answers by the reward model."
    ways = [f"{system['shots']} examples"] if system.get("shots") else []
    ways += ["a system message"] if system.get("system") else []
    return f"{name} is {of} as it is, prompted with {' and '.join(ways) or 'nothing more'}."


def _estimate(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return MISSING
    return f"{number(estimate['value'])} ({interval(dict(estimate))})"


def _change(card: Mapping[str, Any], own_name: str, against: str, metric: str) -> str:
    row = find_difference(dict(card), own_name, against, metric)
    if row is None:
        return MISSING
    p = p_value(row.get("p_holm"))
    return f"{signed(row['value'])} ({interval(row, True)}), p {p if p.startswith('<') else f'= {p}'}"


def _cited(facts: Facts) -> str:
    by = facts.scored_by
    return "" if by is None else f"{plain(by.stage)} (key `{by.key[:12]}`, {str(by.record.get('created', ''))[:10]})"


def _settings(card: Mapping[str, Any]) -> list[str]:
    settings = card.get("settings") or {}
    sampling = settings.get("sampling") or {}
    shown = {
        "prompts": settings.get("prompts"),
        "samples per prompt": settings.get("samples_per_prompt"),
        "temperature": sampling.get("temperature"),
        "max tokens": sampling.get("max_tokens"),
        "seed": settings.get("seed"),
        "precision": settings.get("precision"),
        "engine": ", ".join(map(str, settings.get("engines") or [])) or None,
    }
    parts = [f"{name} {value}" for name, value in shown.items() if value is not None]
    return ["", f"Sampling: {plain(', '.join(parts))}."] if parts else []


def _reward_results(facts: Facts) -> list[str]:
    rows = [
        (result.get("task") or "held-out pairs", title, number(result[name]["n"]), _estimate(result[name]))
        for result in reward_results(facts)
        for name, title in REWARD_METRICS.items()
        if result.get(name)
    ]
    if not rows:
        return ["No evaluation of this reward model is recorded."]
    lines = table(("pairs", "metric", "n", "value (95 % interval)"), rows, numbers=(2,))
    return [*lines, "", f"Measured by the evaluation {_cited(facts)}."]


def limitations(facts: Facts) -> list[str]:
    """Return a list of measured problems and of what was not measured."""
    card, names = facts.scorecard, own_names(facts)
    lines: list[str] = []
    if card is not None:
        for gate in card.get("gates") or []:
            # An undecided gate fails the run as well.
            if gate.get("system") in names and gate.get("passed") is not True:
                state = "not passed" if gate.get("passed") is False else "could not be decided"
                level = plain(str(gate.get("level", "error")))
                lines.append(f"- Gate {state} ({level}): {plain(str(gate['text']))}.")
        lines += [f"- {_flag(flag)}" for flag in card.get("flags") or [] if flag.get("policy") in (*names, None, "")]
    measured = bool(reward_results(facts)) if facts.written.is_reward else bool(names)
    if not measured:
        lines.append("- Nothing was measured of this checkpoint, its safety least of all.")
    elif not lines:
        lines.append(
            "- No flag was raised and no gate failed in the evaluation above. It says nothing beyond its tasks."
        )
    if measured and not facts.written.is_reward and "xstest" not in _kinds(card):
        lines.append("- Safety was not measured: no task of the evaluation asks for refusals.")
    for artifact in facts.lineage:
        if is_trained(artifact):
            warnings = read_events(artifact.path).warnings[:MOST_WARNINGS]
            lines += [f"- Warning in training, {plain(artifact.stage)}: {plain(text)}" for text in warnings]
    return lines


def _flag(flag: Mapping[str, Any]) -> str:
    return f"{plain(str(flag.get('kind', 'flag')))}: {plain(str(flag.get('text', '')))}."


def _kinds(card: Mapping[str, Any] | None) -> set[str]:
    return {str(task.get("kind")) for task in ((card or {}).get("tasks") or {}).values()}
