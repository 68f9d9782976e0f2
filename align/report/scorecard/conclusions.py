"""Findings of an evaluation in sentences: which stage helped, by how much, and how certain that is. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.evaluation.scorecard import FORMAT
from align.report.page.number_format import MISSING, interval, number, p_value, signed, with_minus_signs
from align.store.artifacts import Artifact, Kind

Card = dict[str, Any]

SCORECARD = "scorecard.json"

UNTRAINED = ("prompted", "best_of")
"""Roles of systems that use a checkpoint in another way, without training."""
RELATIONS = {
    "better": "beats",
    "worse": "is worse than",
    "higher": "is higher than",
    "lower": "is lower than",
    "unclear": "is not clearly different from",
}
"""Words between two systems, by verdict."""
GATE_STATES = ("failed", "undecided", "warning", "passed")


def load_scorecard(artifacts: Sequence[Artifact], scorecard: Card | None) -> tuple[Card | None, str]:
    """Return the scorecard to show, and a message if it exists but cannot be shown.

    The scorecard is ``scorecard``, or else the last scorecard among the artifacts. Another format cannot be shown.
    """
    evaluations = [artifact for artifact in artifacts if artifact.kind == Kind.SCORECARD]
    stage = evaluations[-1].stage if evaluations else "evaluate"
    if scorecard is None and evaluations:
        try:
            scorecard = json.loads((evaluations[-1].path / SCORECARD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return None, f"The scorecard of {stage} cannot be read ({error}); rebuild it with --rebuild {stage}."
    if scorecard is not None and scorecard.get("format") != FORMAT:
        return None, (
            f"The scorecard of {stage} has format {scorecard.get('format')}, this align shows {FORMAT}; "
            f"rebuild it with --rebuild {stage}."
        )
    return scorecard, ""


def find_difference(card: Card, policy: str, against: str, metric: str) -> dict[str, Any] | None:
    """Return the scorecard's paired difference of two systems in one metric; None if it has no such difference."""
    comparison = (policy, against, metric)
    rows = (row for row in card["differences"] if (row["policy"], row["against"], row["metric"]) == comparison)
    return next((dict(row) for row in rows), None)


def baseline_of(card: Card, policy: str) -> str | None:
    """Return the system that ``policy`` is compared with first: the reference, or the base for the reference itself."""
    if policy == card["reference"]:
        # The reference can only be compared with the base.
        return card["base"] if card["base"] != policy else None
    return None if policy == card["base"] else str(card["reference"])


def role(card: Card, policy: str) -> str:
    """Return a system's role in a word or two; empty for an ordinary checkpoint."""
    system = _system(card, policy)
    if system.get("role") == "best_of":
        return f"best of {system['best_of']}"
    if system.get("role") == "prompted":
        return "prompted"
    if policy == card["base"]:
        return "base"
    return "reference" if policy == card["reference"] else ""


def setup(card: Card, policy: str) -> str:
    """Return an untrained system's use of a checkpoint, ``of sft, 3 examples, a system prompt``; empty for others."""
    system = _system(card, policy)
    if system.get("role") not in UNTRAINED:
        return ""
    parts = [f"of {system['of']}"]
    if system.get("shots"):
        parts.append(f"{system['shots']} example{'' if system['shots'] == 1 else 's'}")
    if system.get("system"):
        parts.append("a system prompt")
    return ", ".join(parts)


def _system(card: Card, policy: str) -> dict[str, Any]:
    return next((system for system in card["systems"] if system["name"] == policy), {})


def headlines(card: Card) -> list[dict[str, Any]]:
    """Return for each system its primary value and the paired difference to its baseline.

    Empty if no system was measured, as in an evaluation of only reward models.
    """
    primary = card["primary"]
    if primary not in card["metrics"]:
        return []
    boxes = []
    for policy in card["policies"]:
        against = baseline_of(card, policy)
        boxes.append(
            {
                "policy": policy,
                "estimate": card["estimates"][policy].get(primary),
                "against": against,
                "difference": None if against is None else find_difference(card, policy, against, primary),
                "role": role(card, policy),
                "setup": setup(card, policy),
            }
        )
    return boxes


def measured_on(card: Card) -> str:
    """Return the data behind the headlines: ``400 held-out prompts``, or a task's items, with their count."""
    task = card["metrics"].get(card["primary"], {}).get("task")
    if task in card["tasks"]:
        return f"{card['tasks'][task]['n']:,} items of {card['tasks'][task]['title']}"
    return f"{card['settings'].get('prompts', 0):,} held-out prompts"


def metric_phrase(card: Card, metric: str) -> str:
    """Return a metric's title for use in a sentence; the title of a task's metric keeps its case and names the task."""
    title = str(card["metrics"][metric]["title"])
    task = card["tasks"].get(card["metrics"][metric]["task"])
    if task is None:
        # ``gold`` and the like are names, which read better as "the gold score".
        return f"{title} score" if title == metric else title.lower()
    task_title = str(task["title"])
    return title if task_title.lower() in title.lower() else f"{task_title}: {title}"


def sentences(card: Card) -> list[dict[str, str]]:
    """Return the findings as sentences, most important first; ``kind`` is a verdict or ``note``."""
    findings = []
    for policy in card["policies"]:
        against = baseline_of(card, policy)
        row = None if against is None else find_difference(card, policy, against, card["primary"])
        if row is not None:
            findings.append({"kind": row["verdict"], "text": _change_sentence(card, row)})
    # After the changes between stages: did they beat the systems that need no training?
    untrained = {system["name"] for system in card["systems"] if system["role"] in UNTRAINED}
    for row in card["differences"]:
        if row["metric"] == card["primary"] and row["against"] in untrained:
            rival = f"{row['against']} ({role(card, row['against'])}, not trained)"
            text = f"{row['policy']} {RELATIONS[row['verdict']]} {rival}: {evidence(row)}."
            findings.append({"kind": row["verdict"], "text": text})
    # The primary metric against the baseline has its sentence above.
    for flag in card["flags"]:
        if not _is_repetition(card, flag):
            findings.append({"kind": "worse", "text": _flag_sentence(flag["text"])})
    return findings + [{"kind": "note", "text": _accuracy_sentence(report)} for report in card["reward_models"]]


def last_change(card: Card) -> str | None:
    """Return the sentence about the last checkpoint that was trained, or else the first finding; None without any."""
    untrained = {system["name"] for system in card["systems"] if system["role"] in UNTRAINED}
    for policy in reversed(card["policies"]):
        against = baseline_of(card, policy)
        row = None if against is None else find_difference(card, policy, against, card["primary"])
        if row is not None and policy not in untrained:
            return _change_sentence(card, row)
    return next((finding["text"] for finding in sentences(card)), None)


def _change_sentence(card: Card, row: dict[str, Any]) -> str:
    policy = row["policy"]
    against = row["against"]
    title = metric_phrase(card, row["metric"])
    before = number(card["estimates"][against][row["metric"]]["value"])
    after = number(card["estimates"][policy][row["metric"]]["value"])
    reasons = evidence(row)
    if row["verdict"] == "unclear":
        return f"{policy}: no clear change in {title} over {against} ({before} → {after}; {reasons})."
    verb = "raised" if row["value"] > 0 else "lowered"
    return f"{policy} {verb} the {title} over {against} from {before} to {after} ({reasons})."


GROUPS = {
    "Problems": ("worse",),
    "Clear changes": ("better", "higher", "lower"),
    "No clear change": ("unclear",),
    "Notes": ("note",),
}
"""Groups of findings, the most important first, with their kinds."""
MAX_OPEN_FINDINGS = 4
"""Findings of a group of lesser importance that are open at first."""


def group_findings(findings: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return the findings by group, most important first; ``folded`` says that a long group starts closed."""
    groups = []
    for title, kinds in GROUPS.items():
        rows = [finding for finding in findings if finding["kind"] in kinds]
        is_minor = title in ("No clear change", "Notes")
        if rows:
            groups.append({"title": title, "rows": rows, "folded": is_minor and len(rows) > MAX_OPEN_FINDINGS})
    return groups


def gate_rows(card: Card) -> list[dict[str, Any]]:
    """Return the gates by weight: first gates that fail the run, then gates that only warn, then passed gates.

    ``state`` is an entry of :data:`GATE_STATES`, ``mark`` its sign and ``outcome`` its words.
    """
    rows = []
    for gate in card["gates"]:
        state, mark, outcome = _gate_state(gate)
        words = {name: with_minus_signs(str(gate[name])) for name in ("expression", "text")}
        rows.append({**gate, **words, "state": state, "mark": mark, "outcome": outcome})

    def weight(row: dict[str, Any]) -> tuple[bool, bool, int]:
        return row["state"] == "passed", row["level"] == "warning", GATE_STATES.index(row["state"])

    return sorted(rows, key=weight)


def _gate_state(gate: dict[str, Any]) -> tuple[str, str, str]:
    """Return a gate's state, its mark and its words."""
    is_warning = gate["level"] == "warning"
    if gate["passed"]:
        return "passed", "✓", "passed"
    if gate["passed"] is None:
        return "undecided", "?", "could not be decided" + ("" if is_warning else ", which fails the run")
    # A failed gate whose interval reaches over the bound may be noise, and the reader should know.
    certainty = ", the interval too" if gate["clear"] else ", but the interval reaches over the bound"
    if is_warning:
        return "warning", "⚠", "not met (a warning)" + certainty
    return "failed", "✗", "failed" + certainty


def gate_sentence(rows: list[dict[str, Any]]) -> str:
    """Return the numbers of gates that failed, warned and passed."""
    failed = sum(row["state"] in ("failed", "undecided") and row["level"] != "warning" for row in rows)
    passed = sum(row["state"] == "passed" for row in rows)
    warned = len(rows) - failed - passed
    parts = []
    if failed:
        parts.append(f"{failed} failed")
    if warned:
        parts.append(f"{warned} not met as a warning")
    return ", ".join([*parts, f"{passed} of {len(rows)} passed"])


def evidence(row: dict[str, Any]) -> str:
    """Return a difference with its interval and corrected p.

    A verdict needs both: the interval may be clear of zero while p is not small after the correction.
    """
    p = p_value(row["p_holm"])
    equation = p if p.startswith("<") or p == MISSING else f"= {p}"
    return f"{signed(row['value'])}, 95 % interval {interval(row, True)}, corrected p {equation}"


def _flag_sentence(text: str) -> str:
    """Return a flag as a sentence; a stage's name at its start keeps its case."""
    if text.startswith("only "):
        text = "Only" + text.removeprefix("only")
    return f"{with_minus_signs(text)}."


def _is_repetition(card: Card, flag: dict[str, str]) -> bool:
    """Return True if a flag is about the primary metric against the baseline, which has its own sentence."""
    if card["primary"] not in card["metrics"]:
        return False
    metric = card["metrics"][card["primary"]]
    title = metric["title"] if metric["task"] in card["tasks"] else metric["title"].lower()
    against = baseline_of(card, flag["policy"])
    return flag["kind"] == "regression" and f"worse than {against} in {title}:" in flag["text"]


def _accuracy_sentence(report: dict[str, Any]) -> str:
    """Return a sentence with the share of pairs that a reward model orders correctly."""
    labeled = report["as_labeled"]
    pairs = f"pairs of {report['task']}" if report.get("task") not in (None, "pairs") else "held-out pairs"
    name = f"The reward model {report['stage']}" if report.get("stage") else "The reward model"
    text = (
        f"{name} orders {number(labeled['value'])} of {labeled['n']} {pairs} as labeled "
        f"(95 % interval {interval(labeled)})"
    )
    if report.get("true"):
        text += f", and {number(report['true']['value'])} as the gold score does ({interval(report['true'])})"
    if report.get("longer"):
        text += f"; always taking the longer answer gets {number(report['longer']['value'])}"
    return f"{text}."
