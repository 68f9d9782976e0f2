"""What the run showed, in plain words: which stage helped or not, by how much, how sure that is. Torch-free."""

from __future__ import annotations

from typing import Any

from align.report.wording import MISSING, interval, number, p_value, signed

Card = dict[str, Any]

UNTRAINED = ("prompted", "best_of")
"""Roles of systems that are a way to use a checkpoint, without training."""


def find(card: Card, policy: str, against: str, metric: str) -> dict[str, Any] | None:
    """The scorecard's difference of two systems in one metric."""
    for row in card["differences"]:
        if (row["policy"], row["against"], row["metric"]) == (policy, against, metric):
            return dict(row)
    return None


def compared_with(card: Card, policy: str) -> str | None:
    """What a system is first compared with: the reference, or for the reference itself the base."""
    if policy == card["reference"]:
        return card["base"] if card["base"] != policy else None
    return None if policy == card["base"] else str(card["reference"])


def role(card: Card, policy: str) -> str:
    """What a system is, in a word or two; empty for an ordinary checkpoint."""
    about: dict[str, Any] = next((one for one in card["systems"] if one["name"] == policy), {})
    if about.get("role") == "best_of":
        return f"best of {about['best_of']}"
    if about.get("role") == "prompted":
        return "prompted"
    return "base" if policy == card["base"] else "reference" if policy == card["reference"] else ""


def way(card: Card, policy: str) -> str:
    """How a system that is no checkpoint by itself is made, for a reader: ``sft, 3 examples, a system prompt``."""
    about: dict[str, Any] = next((one for one in card["systems"] if one["name"] == policy), {})
    if about.get("role") not in UNTRAINED:
        return ""
    parts = [f"of {about['of']}"]
    if about.get("shots"):
        parts.append(f"{about['shots']} example{'' if about['shots'] == 1 else 's'}")
    if about.get("system"):
        parts.append("a system prompt")
    return ", ".join(parts)


def headlines(card: Card) -> list[dict[str, Any]]:
    """One card per system: its primary value, and the paired difference to what it started from.

    Empty where nothing was measured of the systems, as in an evaluation of reward models alone.
    """
    found: list[dict[str, Any]] = []
    if card["primary"] not in card["metrics"]:
        return found
    for policy in card["policies"]:
        against = compared_with(card, policy)
        found.append(
            {
                "policy": policy,
                "estimate": card["estimates"][policy].get(card["primary"]),
                "against": against,
                "difference": None if against is None else find(card, policy, against, card["primary"]),
                "role": role(card, policy),
                "way": way(card, policy),
            }
        )
    return found


def measured_on(card: Card) -> str:
    """What the headline's numbers rest on: ``held-out prompts`` or a task's items, with their count."""
    task = card["metrics"].get(card["primary"], {}).get("task")
    if task in card["tasks"]:
        about = card["tasks"][task]
        return f"{about['n']:,} items of {about['title']}"
    return f"{card['settings'].get('prompts', 0):,} held-out prompts"


def name_of(card: Card, metric: str) -> str:
    """A metric as a sentence has it; a task's keeps its own spelling."""
    about = card["metrics"][metric]
    title = str(about["title"])
    if about["task"] not in card["tasks"]:
        return title.lower()
    task = str(card["tasks"][about["task"]]["title"])
    return title if task.lower() in title.lower() else f"{task}: {title}"


def sentences(card: Card) -> list[dict[str, str]]:
    """Sentences with a verdict each, most important first; ``kind`` is a verdict of the scorecard or ``note``."""
    found = []
    for policy in card["policies"]:
        against = compared_with(card, policy)
        row = None if against is None else find(card, policy, against, card["primary"])
        if row is not None:
            found.append(_change(card, row))
    found += _rivals(card)
    found += [{"kind": "worse", "text": _sentence(flag["text"])} for flag in card["flags"] if not _repeats(card, flag)]
    return found + [{"kind": "note", "text": _accuracy(accuracy)} for accuracy in card["reward_models"]]


def _change(card: Card, row: dict[str, Any]) -> dict[str, str]:
    policy, against, title = row["policy"], row["against"], name_of(card, row["metric"])
    before, after = (card["estimates"][name][row["metric"]]["value"] for name in (against, policy))
    change = _how_sure(row)
    if row["verdict"] == "unclear":
        text = f"{policy}: no clear change in {title} over {against} ({number(before)} → {number(after)}; {change})."
    else:
        verb = "raised" if row["value"] > 0 else "lowered"
        text = f"{policy} {verb} the {title} over {against} from {number(before)} to {number(after)} ({change})."
    return {"kind": row["verdict"], "text": text}


def _rivals(card: Card) -> list[dict[str, str]]:
    """Whether training beat what needs none: every trained checkpoint beside each prompted and best-of-N system."""
    untrained = {one["name"] for one in card["systems"] if one["role"] in UNTRAINED}
    found = []
    for row in card["differences"]:
        if row["metric"] != card["primary"] or row["against"] not in untrained:
            continue
        against = f"{row['against']} ({role(card, row['against'])}, not trained)"
        said = {
            "better": "beats",
            "worse": "is worse than",
            "higher": "is higher than",
            "lower": "is lower than",
            "unclear": "is not clearly different from",
        }[row["verdict"]]
        text = f"{row['policy']} {said} {against}: {_how_sure(row)}."
        found.append({"kind": row["verdict"], "text": text})
    return found


def gate_rows(card: Card) -> list[dict[str, Any]]:
    """Gates in the order of their weight: what fails the run, what only warns, what passed.

    ``state`` is one of ``failed``, ``undecided``, ``warning`` and ``passed``; ``mark`` shows it, ``said`` says it.
    """
    rows = []
    for gate in card["gates"]:
        warning = gate["level"] == "warning"
        if gate["passed"]:
            state, mark, said = "passed", "✓", "passed"
        elif gate["passed"] is None:
            state, mark, said = "undecided", "?", "could not be decided"
            said += "" if warning else ", which fails the run"
        elif warning:
            state, mark, said = "warning", "⚠", "not kept (a warning)"
        else:
            state, mark, said = "failed", "✗", "failed"
        if gate["passed"] is False:
            said += ", the interval too" if gate["clear"] else ", but the interval reaches over the bound"
        rows.append({**gate, "state": state, "mark": mark, "said": said})
    order = ("failed", "undecided", "warning", "passed")
    return sorted(
        rows, key=lambda row: (row["state"] == "passed", row["level"] == "warning", order.index(row["state"]))
    )


def gate_sentence(rows: list[dict[str, Any]]) -> str:
    """How many gates were kept, and how many were not."""
    fails = sum(row["state"] in ("failed", "undecided") and row["level"] != "warning" for row in rows)
    kept = sum(row["state"] == "passed" for row in rows)
    warned = len(rows) - fails - kept
    parts = [f"{fails} failed"] if fails else []
    parts += [f"{warned} not kept as a warning"] if warned else []
    return ", ".join([*parts, f"{kept} of {len(rows)} passed"])


def _how_sure(row: dict[str, Any]) -> str:
    """A verdict needs both: an interval clear of zero may stand beside a p that is not small once corrected."""
    return f"{signed(row['value'])}, 95 % interval {interval(row, True)}, corrected p {_p(row['p_holm'])}"


def _p(value: float) -> str:
    text = p_value(value)
    return text if text.startswith("<") or text == MISSING else f"= {text}"


def _sentence(text: str) -> str:
    """A flag as a sentence; a stage's name at its start keeps its spelling."""
    return ("Only" + text[4:] if text.startswith("only ") else text) + "."


def _repeats(card: Card, flag: dict[str, str]) -> bool:
    """A regression in the primary metric already has its sentence, unless it is one against something else."""
    if card["primary"] not in card["metrics"]:
        return False
    about = card["metrics"][card["primary"]]
    title = about["title"] if about["task"] in card["tasks"] else about["title"].lower()
    against = compared_with(card, flag["policy"])
    return flag["kind"] == "regression" and f"worse than {against} in {title}:" in flag["text"]


def _accuracy(accuracy: dict[str, Any]) -> str:
    labeled = accuracy["as_labeled"]
    pairs = f"pairs of {accuracy['task']}" if accuracy.get("task") not in (None, "pairs") else "held-out pairs"
    name = f"The reward model {accuracy['stage']}" if accuracy.get("stage") else "The reward model"
    text = (
        f"{name} orders {number(labeled['value'])} of {labeled['n']} {pairs} as labeled "
        f"(95 % interval {interval(labeled)})"
    )
    if accuracy.get("true"):
        text += f", and {number(accuracy['true']['value'])} as the gold score does ({interval(accuracy['true'])})"
    if accuracy.get("longer"):
        text += f"; always taking the longer answer gets {number(accuracy['longer']['value'])}"
    return f"{text}."
