"""Decide between checkpoints by the primary metric, or find that no difference is significant. Torch-free.

The checkpoint with the best number is compared with every other, paired over the items that both answered and
corrected together. A number without a test is not a decision: four checkpoints at 0.000 have no winner.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from align.evaluation.comparisons import correct, verdict
from align.report.compare.merged_scorecard import EvaluatedRun, Items, comparable_columns, paired_difference
from align.report.page.number_format import interval, number
from align.report.scorecard.conclusions import UNTRAINED, evidence, find_difference, measured_on, metric_phrase
from align.store.artifacts import Artifact, Kind

Card = dict[str, Any]
Columns = Mapping[tuple[str, str], Items]
"""(system, metric) → item → a number for each sample."""


@dataclass(frozen=True)
class Best:
    """The system with the best primary value, and the paired difference of every other system to it, by system.

    ``beaten`` has the systems that the scorecard finds clearly worse than another system: worse system → the other.
    """

    name: str | None
    differences: Mapping[str, Mapping[str, Any]]
    beaten: Mapping[str, str] = field(default_factory=dict)

    @property
    def below(self) -> dict[str, str]:
        """Systems that are clearly worse than the best or than another system → the other."""
        worse = {name: str(self.name) for name, row in self.differences.items() if row["verdict"] == "worse"}
        return {**self.beaten, **worse}

    @property
    def ties(self) -> list[str]:
        """Systems that are not clearly worse than any other."""
        return [name for name in self.differences if name not in self.below]


@dataclass(frozen=True)
class Decision:
    """One sentence, of which ``lead`` is the bold beginning; ``kind`` is a verdict or ``note``."""

    kind: str
    lead: str
    reason: str


def item_columns(artifacts: Sequence[Artifact], card: Card) -> Columns:
    """Return the primary metric's numbers by item in a run's last evaluation; empty if its folder has none."""
    folder = next((artifact.path for artifact in reversed(artifacts) if artifact.kind == Kind.SCORECARD), None)
    if folder is None:
        return {}
    # There is one run here, so its systems keep their own names.
    run = EvaluatedRun("", card, folder, {name: name for name in card["policies"]}, metrics=[card["primary"]])
    return comparable_columns([run], card)


def find_best(card: Card, columns: Columns, names: Sequence[str]) -> Best:
    """Return the system with the best primary value among ``names``; none if the metric has no better side.

    There are no differences if two systems have no items in common. P-values are Holm-corrected. The scorecard's own
    differences are used if it has them, so a page never gives two p-values for one comparison; other differences are
    corrected together with them.
    """
    primary = card["primary"]
    better = card["metrics"][primary]["better"]
    values = _primary_values(card, names)
    if better is None or not values:
        return Best(None, {})
    # Flip the sign if lower is better, so larger is always better.
    sign = -1 if better == "lower" else 1
    best = max(values, key=lambda name: sign * values[name])
    rows: dict[str, dict[str, Any]] = {}
    new_rows: list[dict[str, Any]] = []
    for name in values:
        if name == best:
            continue
        row = _tested_difference(card, name, best)
        if row is None:
            # Pair the items that both answered, as in the scorecard itself.
            row = paired_difference(columns, (name, best, primary), card)
            if row is None:
                # The best of only some systems is not the best, so without items no system is compared.
                return Best(best, {})
            new_rows.append(row)
        rows[name] = row
    # The best of several was picked by its number, so all comparisons with it count in the correction.
    primary_rows = [row for row in card["differences"] if row["metric"] == primary]
    # Copies: the correction writes into its rows, and the scorecard keeps its own p-values.
    tested_rows = [dict(row) for row in primary_rows if row.get("p") is not None]
    correct([*new_rows, *tested_rows], card["metrics"])
    return Best(best, rows, _find_beaten(card, best, rows))


def _find_beaten(card: Card, best: str, others: Collection[str]) -> dict[str, str]:
    """Return those of ``others`` that the scorecard finds clearly worse than another system → that system."""
    beaten: dict[str, str] = {}
    for row in card["differences"]:
        pair = (row["policy"], row["against"])
        if row["metric"] != card["primary"] or not set(pair) <= {best, *others}:
            continue
        # The best may scatter so much that it differs from no system, while two others clearly differ.
        if row["verdict"] in ("better", "worse"):
            winner, loser = pair if row["verdict"] == "better" else pair[::-1]
            if loser != best:
                beaten.setdefault(loser, winner)
    return beaten


def _tested_difference(card: Card, name: str, best: str) -> dict[str, Any] | None:
    """Return the scorecard's own difference of a system to the best; None if it compared them neither way."""
    primary = card["primary"]
    row = find_difference(card, name, best, primary)
    if row is None:
        turned = find_difference(card, best, name, primary)
        row = None if turned is None else _turn(turned)
    return row and {**row, "verdict": verdict(row, card["metrics"][primary]["better"])}


def checkpoints(card: Card) -> list[str]:
    """Return the systems among which a reader chooses: the base and trained checkpoints, each as it is and once."""
    return [system["name"] for system in card["systems"] if system["role"] in ("base", "checkpoint")]


def decide_by_items(card: Card, columns: Columns, names: Sequence[str]) -> Decision | None:
    """Return the recommended system among ``names``, by the items that they answered."""
    if card["primary"] not in card["metrics"]:
        return None
    return decide(card, names, find_best(card, columns, names), f"on {measured_on(card)}")


def decide(card: Card, names: Sequence[str], best: Best, place: str) -> Decision | None:
    """Return the recommended system among ``names`` and the reason; None if the primary metric was not measured.

    ``place`` describes the measurement: ``on 400 held-out prompts``.
    """
    values = _primary_values(card, names)
    if not values:
        return None
    decision = _decide(card, values, best, place)
    missing = [name for name in names if name not in values]
    if not missing:
        return decision
    absent = f"{join_names(missing)} {'was' if len(missing) == 1 else 'were'} not measured"
    return replace(decision, reason=f"{absent}; among the others, {decision.reason}")


def _decide(card: Card, values: Mapping[str, float], best: Best, place: str) -> Decision:
    """Return the decision between the systems that have a primary value."""
    title = metric_phrase(card, card["primary"])
    if len(values) == 1:
        return Decision("note", "There is nothing to choose from", f"only {next(iter(values))} was measured.")
    if best.name is None:
        return Decision("note", "No checkpoint can be called best", f"{title} has no better side.")
    doubt = _doubt_reward_model(card)
    if doubt is not None:
        return Decision("note", "No checkpoint can be recommended", doubt)
    if len(best.differences) < len(values) - 1:
        reason = (
            f"{best.name} has the best {title} with {_value_text(card, best.name)}, but the items that would show "
            "whether the difference is clear are not here."
        )
        return Decision("note", "No checkpoint can be recommended", reason)
    if len(best.ties) == len(values) - 1:
        return _tied_decision(card, best.name, values, place)
    return _clear_decision(card, best, title)


def _doubt_reward_model(card: Card) -> str | None:
    """Return why the reward model's scores cannot decide; None if they are not the primary metric, or it can rank."""
    reports = card.get("reward_models", ())
    if card["primary"] != "reward" or not reports:
        return None
    # The stage's ``reward``, whose scores are the metric, is reported first. A second reward model decides nothing.
    for report in (report for report in reports if report["stage"] == reports[0]["stage"]):
        accuracy = report.get("as_labeled") or {}
        low = accuracy.get("low")
        high = accuracy.get("high")
        if low is None or high is None or low > 0.5:
            continue
        if high < 0.5:
            finding = "so it prefers what the labels reject. Check which answers are `chosen` in its data, or give"
        else:
            finding = "which guessing could reach. Measure more pairs, train it on more, or give"
        return (
            f"the primary metric is {metric_phrase(card, 'reward')}, and the reward model '{report['stage']}' "
            f"ranks {number(accuracy['value'])} of {accuracy['n']} held-out pairs as labeled (95 % interval "
            f"{interval(accuracy)}), {finding} `score:` a function."
        )
    return None


def _primary_values(card: Card, names: Sequence[str]) -> dict[str, float]:
    estimates = {name: card["estimates"].get(name, {}).get(card["primary"]) for name in names}
    values = {name: row["value"] for name, row in estimates.items() if row}
    return {name: value for name, value in values.items() if value is not None}


def _value_text(card: Card, name: str) -> str:
    return number(card["estimates"][name][card["primary"]]["value"])


def _tied_decision(card: Card, best: str, values: Mapping[str, float], place: str) -> Decision:
    title = metric_phrase(card, card["primary"])
    low = number(min(values.values()))
    high = number(max(values.values()))
    names = join_names(list(values))
    if low == high:
        reason = f"in {title}, {names} all have {low} {place}."
    else:
        reason = (
            f"in {title}, {names} lie between {low} and {high} {place}, and none is clearly below the highest, {best}."
        )
        if card["metrics"][card["primary"]]["better"] == "lower":
            reason = reason.replace("below the highest", "above the lowest")
    return Decision("unclear", "No checkpoint can be told apart from the others", reason)


def _clear_decision(card: Card, best: Best, title: str) -> Decision:
    assert best.name is not None
    estimate = card["estimates"][best.name][card["primary"]]
    below = [name for name in best.differences if best.below.get(name) == best.name]
    worse = "above" if card["metrics"][card["primary"]]["better"] == "lower" else "below"
    verb = "is" if len(below) == 1 else "are"
    clauses = [f"{join_names(below)} {verb} clearly {worse}{'' if best.ties else ' it'}"] if below else []
    clauses += [f"{name} is clearly {worse} {other}" for name, other in best.below.items() if other != best.name]
    lead = f"Take {best.name}"
    if best.ties:
        tied = ", ".join(f"{name} ({_value_text(card, name)})" for name in best.ties)
        lead = f"Take {join_names([best.name, *best.ties], 'or')}"
        reason = (
            f"{best.name} has the best {title}, {number(estimate['value'])}, {tied} cannot be told apart from it, and "
            f"{join_names(clauses)}"
        )
    else:
        closest = min(below or best.differences, key=lambda name: abs(best.differences[name]["value"]))
        gap = _turn(best.differences[closest])
        reason = (
            f"its {title} of {number(estimate['value'])} (95 % interval {interval(estimate)}) is the best, and "
            f"{join_names(clauses)}; closest is {closest}, a difference of {evidence(gap)}"
        )
    problems = _reservations(card, best.name)
    kind = "worse" if problems and problems[0].startswith("it fails") else "better"
    return Decision(kind, lead, "; but ".join([reason, *problems]) + ".")


def _turn(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a difference to the best as the difference of the best."""
    low = None if row["high"] is None else -row["high"]
    high = None if row["low"] is None else -row["low"]
    return {**row, "value": -row["value"], "low": low, "high": high}


def _reservations(card: Card, name: str) -> list[str]:
    """Return the reasons against the best system: gates that it fails, and untrained systems that equal it."""
    gates = [gate for gate in card["gates"] if gate["system"] == name]
    strict_gates = [gate for gate in gates if gate["level"] != "warning"]
    failed = [str(gate["name"]) for gate in strict_gates if gate["passed"] is not True]
    reasons = [f"it fails the gate{'' if len(failed) == 1 else 's'} {join_names(failed)}"] if failed else []
    untrained = [system["name"] for system in card["systems"] if system["role"] in UNTRAINED]
    rivals = [rival for rival in untrained if _equals(card, name, rival)]
    if rivals:
        reasons.append(f"{join_names(rivals)}, without training, is not clearly worse")
    return reasons


def _equals(card: Card, name: str, rival: str) -> bool:
    row = find_difference(card, name, rival, card["primary"])
    return row is not None and row["verdict"] != "better"


def join_names(names: Sequence[str], word: str = "and") -> str:
    """Return names as a sentence lists them: ``a``, ``a and b``, ``a, b and c``."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {word} {names[-1]}"
