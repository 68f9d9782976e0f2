"""The results and limitations on a model card, from a scorecard of format 1 or 2. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.data.markdown import plain, table
from align.export.model_card_facts import REWARD_METRICS, TRAINING, Facts, own_names, reward_results
from align.report.curves import read_events
from align.report.summary import find
from align.report.wording import MISSING, interval, number, p_value, signed

MOST_WARNINGS = 12
MOST_RIVALS = 3
"""Columns for ways of prompting and best-of-N."""


def results(facts: Facts) -> list[str]:
    """A table of every metric of this checkpoint, beside the reference and the base."""
    if facts.written.is_reward:
        return _reward_results(facts)
    card, names = facts.scorecard, own_names(facts)
    if card is None or not names:
        return ["No evaluation of this checkpoint is recorded."]
    own, estimates = names[0], card["estimates"]
    rivals = [system for system in card.get("systems") or [] if system.get("role") in ("prompted", "best_of")]
    named = (card["reference"], card["base"], *(str(system["name"]) for system in rivals[:MOST_RIVALS]))
    others = [one for one in dict.fromkeys(named) if one is not None and one != own and one in estimates]
    head = ["task", "metric", "unit", "n", f"**{plain(own)}**", *(plain(one) for one in others)]
    rows = []
    for metric, estimate in estimates[own].items():
        about = card["metrics"].get(metric, {})
        row = [about.get("task", ""), about.get("title", metric), about.get("unit", ""), number(estimate["n"])]
        row += [_estimate(estimate), *(_estimate(estimates[one].get(metric)) for one in others)]
        rows.append(row + ([_change(card, own, others[0], metric)] if others else []))
    lines = table([*head, *(f"change from {plain(one)}" for one in others[:1])], rows, numbers=(3,))
    return [
        *lines, "",
        f"Measured by the evaluation {_cited(facts)}. In brackets 95 % intervals. Changes are paired over the same "
        "items, their p-values corrected for the number of comparisons (Holm).",
        *(_rival(system) for system in rivals if system["name"] in others), *_settings(card),
    ]  # fmt: skip


def _rival(system: Mapping[str, Any]) -> str:
    """What a way to use a checkpoint is: the honest rivals of training."""
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


def _change(card: Mapping[str, Any], own: str, against: str, metric: str) -> str:
    row = find(dict(card), own, against, metric)
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
    parts = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in (
            ("prompts", settings.get("prompts")), ("samples_per_prompt", settings.get("samples_per_prompt")),
            ("temperature", sampling.get("temperature")), ("max_tokens", sampling.get("max_tokens")),
            ("seed", settings.get("seed")), ("precision", settings.get("precision")),
            ("engine", ", ".join(map(str, settings.get("engines") or [])) or None),
        )
        if value is not None
    ]  # fmt: skip
    return ["", f"Sampling: {plain(', '.join(parts))}."] if parts else []


def _reward_results(facts: Facts) -> list[str]:
    rows = [
        (one.get("task") or "held-out pairs", title, number(one[name]["n"]), _estimate(one[name]))
        for one in reward_results(facts)
        for name, title in REWARD_METRICS.items()
        if one.get(name)
    ]
    if not rows:
        return ["No evaluation of this reward model is recorded."]
    lines = table(("pairs", "metric", "n", "value (95 % interval)"), rows, numbers=(2,))
    return [*lines, "", f"Measured by the evaluation {_cited(facts)}."]


def limitations(facts: Facts) -> list[str]:
    """A list of what was measured to be wrong, and of what was not measured."""
    card, names = facts.scorecard, own_names(facts)
    lines: list[str] = []
    if card is not None:
        for gate in card.get("gates") or []:
            if gate.get("system") in names and gate.get("passed") is False:
                lines.append(
                    f"- Gate not passed ({plain(str(gate.get('level', 'error')))}): {plain(str(gate['text']))}."
                )
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
        if artifact.record.get("kind") in TRAINING:
            warnings = read_events(artifact.path).warnings[:MOST_WARNINGS]
            lines += [f"- Warning in training, {plain(artifact.stage)}: {plain(text)}" for text in warnings]
    return lines


def _flag(flag: Mapping[str, Any]) -> str:
    return f"{plain(str(flag.get('kind', 'flag')))}: {plain(str(flag.get('text', '')))}."


def _kinds(card: Mapping[str, Any] | None) -> set[str]:
    return {str(task.get("kind")) for task in ((card or {}).get("tasks") or {}).values()}
