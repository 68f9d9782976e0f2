"""What the run showed, in plain words: which stage helped or not, by how much, how sure that is. Torch-free."""

from __future__ import annotations

from typing import Any

from align.report.wording import interval, number, p_value, signed

Card = dict[str, Any]


def find(card: Card, policy: str, against: str, metric: str) -> dict[str, Any] | None:
    """The scorecard's difference of two checkpoints in one metric."""
    for row in card["differences"]:
        if (row["policy"], row["against"], row["metric"]) == (policy, against, metric):
            return dict(row)
    return None


def compared_with(card: Card, policy: str) -> str | None:
    """What a checkpoint is first compared with: the reference, or for the reference itself the base."""
    if policy == card["reference"]:
        return card["base"] if card["base"] != policy else None
    return None if policy == card["base"] else str(card["reference"])


def headlines(card: Card) -> list[dict[str, Any]]:
    """One card per checkpoint: its primary value, and the paired difference to what it started from."""
    found = []
    for policy in card["policies"]:
        against = compared_with(card, policy)
        found.append(
            {
                "policy": policy,
                "estimate": card["estimates"][policy][card["primary"]],
                "against": against,
                "difference": None if against is None else find(card, policy, against, card["primary"]),
                "role": "base" if policy == card["base"] else "reference" if policy == card["reference"] else "",
            }
        )
    return found


def sentences(card: Card) -> list[dict[str, str]]:
    """Sentences with a verdict each, most important first; ``kind`` is a verdict of the scorecard or ``note``."""
    title = card["metrics"][card["primary"]]["title"].lower()
    found = []
    for policy in card["policies"]:
        against = compared_with(card, policy)
        row = None if against is None else find(card, policy, against, card["primary"])
        if against is None or row is None:
            continue
        before = card["estimates"][against][card["primary"]]["value"]
        after = card["estimates"][policy][card["primary"]]["value"]
        change = f"{signed(row['value'])}, 95 % interval {interval(row, True)}, p {_p(row['p_holm'])}"
        if row["verdict"] == "unclear":
            text = (
                f"{policy}: no clear change in {title} over {against} ({number(before)} → {number(after)}; {change})."
            )
        else:
            verb = "raised" if row["value"] > 0 else "lowered"
            text = f"{policy} {verb} the {title} over {against} from {number(before)} to {number(after)} ({change})."
        found.append({"kind": row["verdict"], "text": text})
    found += [{"kind": "worse", "text": _sentence(flag["text"])} for flag in card["flags"] if not _repeats(card, flag)]
    accuracy = card.get("reward_model")
    if accuracy:
        found.append({"kind": "note", "text": _accuracy(accuracy)})
    return found


def _p(value: float) -> str:
    text = p_value(value)
    return text if text.startswith("<") else f"= {text}"


def _sentence(text: str) -> str:
    """A flag as a sentence; a stage's name at its start keeps its spelling."""
    return ("Only" + text[4:] if text.startswith("only") else text) + "."


def _repeats(card: Card, flag: dict[str, str]) -> bool:
    """A regression in the primary metric already has its sentence."""
    return flag["kind"] == "regression" and card["metrics"][card["primary"]]["title"].lower() in flag["text"]


def _accuracy(accuracy: dict[str, Any]) -> str:
    labelled = accuracy["as_labelled"]
    text = (
        f"The reward model orders {number(labelled['value'])} of {labelled['n']} held-out pairs as labelled "
        f"(95 % interval {interval(labelled)})"
    )
    if accuracy.get("true"):
        text += f", and {number(accuracy['true']['value'])} as the gold score does ({interval(accuracy['true'])})"
    return f"{text}; always taking the longer answer gets {number(accuracy['longer']['value'])}."
