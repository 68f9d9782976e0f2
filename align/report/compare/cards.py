"""Scorecards of several runs as one: every system under a name of its own, differences paired across runs. Torch-free.

A system that all runs share (the same checkpoint, used and measured alike) stands in it once; any other is called
``run: system``. Differences between runs are computed from their items, paired by task and id, where both answered the
same ones; metrics whose items weigh differently cannot be, since items do not carry their weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from align.evaluation.comparisons import Column, Resampling, correct_table, difference, per_item
from align.evaluation.scorecard import DRIFT, FORMAT
from align.report.samples import read_samples
from align.store.artifacts import Artifact, Kind

Card = dict[str, Any]
Row = dict[str, Any]

PROMPTS = "prompts"
SCORECARD, SAMPLES, ITEMS = "scorecard.json", "samples.jsonl", "items.jsonl"
CLOSE = 1e-6
"""Relative difference up to which a mean over items is the scorecard's own number."""


@dataclass
class Evaluated:
    """A run with its scorecard, and what its systems are called in the merged one."""

    run: str
    card: Card
    folder: Path
    labels: dict[str, str]

    @property
    def subject(self) -> str:
        """The system that the run is about: the last trained checkpoint that others are not measured against."""
        trained = [one["name"] for one in self.card["systems"] if one["role"] == "checkpoint"]
        own = [name for name in trained if name != self.card["reference"]]
        return str([*self.card["policies"][-1:], *trained, *own][-1])

    @cached_property
    def items(self) -> dict[str, dict[str, dict[tuple[str, str], list[float]]]]:
        """Label → metric → (task, id) → numbers of the samples; empty where there is no such file."""
        found: dict[str, dict[str, dict[tuple[str, str], list[float]]]] = {}
        for line in _lines(self.folder / ITEMS):
            task, place = str(line["task"]), (str(line["task"]), str(line["id"]))
            for system, per in line["values"].items():
                for metric, samples in per.items():
                    name = metric if task == PROMPTS else f"{task}.{metric}"
                    if samples and system in self.labels:
                        found.setdefault(self.labels[system], {}).setdefault(name, {})[place] = samples
        return found


def read_cards(runs: Mapping[str, Mapping[str, Artifact]]) -> tuple[list[Evaluated], dict[str, str]]:
    """Every run's last scorecard, and by run why there is none."""
    found: list[Evaluated] = []
    problems: dict[str, str] = {}
    for run, artifacts in runs.items():
        cards = [one for one in artifacts.values() if one.kind == Kind.SCORECARD]
        if not cards:
            problems[run] = "not evaluated"
            continue
        try:
            card = json.loads((cards[-1].path / SCORECARD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            problems[run] = f"the scorecard of {cards[-1].stage} cannot be read"
            continue
        if not isinstance(card, dict) or card.get("format") != FORMAT:
            problems[run] = f"the scorecard of {cards[-1].stage} is of another format; rebuild it"
            continue
        found.append(Evaluated(run, card, cards[-1].path, {}))
    shared = _shared([one.card for one in found])
    for each in found:
        each.labels = {name: name if name in shared else f"{each.run}: {name}" for name in each.card["policies"]}
    return found, problems


def _shared(cards: Sequence[Card]) -> set[str]:
    """Systems that are the same in all cards: the same key, and the same numbers."""
    if len(cards) < 2:
        return set()

    def about(card: Card, name: str) -> Any:
        keys = [one["key"] for one in card["systems"] if one["name"] == name]
        return keys, card["estimates"].get(name), card["primary"]

    return {name for name in cards[0]["policies"] if all(about(card, name) == about(cards[0], name) for card in cards)}


def merge(found: Sequence[Evaluated]) -> Card:
    """One scorecard of all runs, of the same format; ``found`` has at least one.

    The reference and the base are those of the first run. Corrections for many comparisons are made anew over it all.
    """
    first = found[0]
    metrics: dict[str, Any] = {}
    for one in found:
        metrics |= {name: about for name, about in one.card["metrics"].items() if name not in metrics}
    reference = first.labels[first.card["reference"]]
    base = None if first.card["base"] is None else first.labels[first.card["base"]]
    estimates = {one.labels[name]: per for one in found for name, per in one.card["estimates"].items()}
    policies = [label for label in (base, reference) if label is not None] + list(estimates)
    card: Card = {
        "format": FORMAT,
        "reference": reference,
        "base": base,
        "primary": first.card["primary"],
        "policies": list(dict.fromkeys(policies)),
        "systems": _systems(found),
        "settings": first.card["settings"],
        "metrics": metrics,
        "tasks": _tasks(found),
        "estimates": estimates,
        "families": _families(found, lambda card: card["families"]),
        "task_families": {
            task: _families(found, lambda card, task=task: card["task_families"].get(task, {}))  # type: ignore[misc]
            for one in found
            for task in one.card["task_families"]
        },
        "family_differences": [],
        "win_rates": [
            {**row, "one": one.labels[row["one"]], "other": one.labels[row["other"]]}
            for one in found
            for row in one.card["win_rates"]
        ],
        "reward_models": _reward_models(found),
        "gates": _once([_gate(one, gate) for one in found for gate in one.card["gates"]]),
        "flags": _once([_flag(one, flag) for one in found for flag in one.card["flags"]]),
    }
    card["differences"] = _differences(found, card)
    correct_table(card["differences"], {one["name"]: one["role"] for one in card["systems"]}, card["primary"], metrics)
    return card


def _systems(found: Sequence[Evaluated]) -> list[Row]:
    systems: dict[str, Row] = {}
    for one in found:
        for system in one.card["systems"]:
            label = one.labels[system["name"]]
            of = one.labels.get(system["of"], system["of"])
            systems.setdefault(label, {**system, "name": label, "of": of})
    return list(systems.values())


def _tasks(found: Sequence[Evaluated]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for one in found:
        for name, about in one.card["tasks"].items():
            notes = {one.labels.get(system, system): note for system, note in (about.get("notes") or {}).items()}
            known = tasks.setdefault(name, {**about, "notes": {}})
            known["notes"] = {**known["notes"], **notes}
    return tasks


def other_items(found: Sequence[Evaluated]) -> list[str]:
    """Sentences on tasks, and the prompt set, that runs did not measure on the same number of items."""
    sizes: dict[str, dict[str, int]] = {}
    for one in found:
        if one.card["settings"].get("prompts"):
            sizes.setdefault("the prompt set", {})[one.run] = int(one.card["settings"]["prompts"])
        for about in one.card["tasks"].values():
            sizes.setdefault(str(about["title"]), {})[one.run] = int(about["n"])
    return [
        f"{name} has other items in some runs ({', '.join(f'{run}: {n:,}' for run, n in per.items())}); "
        "differences are over those that both sides answered."
        for name, per in sizes.items()
        if len(set(per.values())) > 1
    ]


def _families(found: Sequence[Evaluated], of: Any) -> dict[str, Any]:
    families: dict[str, Any] = {}
    for one in found:
        for source, about in of(one.card).items():
            known = families.setdefault(source, {"n": about["n"], "estimates": {}})
            known["n"] = max(known["n"], about["n"])
            known["estimates"] |= {one.labels[name]: per for name, per in about["estimates"].items()}
    return families


def _reward_models(found: Sequence[Evaluated]) -> list[Row]:
    """Those that all runs share once, others under their run's name."""
    lists = [one.card["reward_models"] for one in found]
    if all(each == lists[0] for each in lists):
        return list(lists[0])
    return [{**row, "stage": f"{one.run}: {row.get('stage')}"} for one in found for row in one.card["reward_models"]]


def _gate(one: Evaluated, gate: Row) -> Row:
    label = one.labels.get(gate["system"], gate["system"])
    return {**gate, "system": label, "text": _text(one, gate["system"], gate["text"])}


def _flag(one: Evaluated, flag: Row) -> Row:
    return {**flag, "policy": one.labels.get(flag["policy"], flag["policy"]),
            "text": _text(one, flag["policy"], flag["text"])}  # fmt: skip


def _text(one: Evaluated, system: str | None, text: str) -> str:
    return text if system is not None and one.labels.get(system) == system else f"{one.run}: {text}"


def _once(rows: Sequence[Row]) -> list[Row]:
    return list({json.dumps(row, sort_keys=True, default=str): row for row in rows}.values())


# ---- differences ------------------------------------------------------------------------------------------------


def _differences(found: Sequence[Evaluated], card: Card) -> list[Row]:
    """Each run's own, and across runs: everything with the reference and the base, subjects with the first one's."""
    rows: dict[tuple[str, str, str], Row] = {}
    for one in found:
        for row in one.card["differences"]:
            policy, against = one.labels[row["policy"]], one.labels[row["against"]]
            rows.setdefault((policy, against, row["metric"]), {**row, "policy": policy, "against": against})
    columns = _columns(found, card)
    first = found[0].labels[found[0].subject]
    wanted = [(one.labels[one.subject], first) for one in found[1:]]
    for policy in card["policies"]:
        wanted += [(policy, other) for other in (card["reference"], card["base"]) if other not in (None, policy)]
    resampling = Resampling(int(card["settings"].get("bootstrap", 10_000)), int(card["settings"].get("seed", 0)))
    for policy, against in dict.fromkeys(wanted):
        if policy in (against, card["base"]):
            continue
        for metric in card["metrics"]:
            place = policy, against, metric
            if place not in rows and metric not in DRIFT:
                made = _pair(columns, place, resampling)
                if made is not None:
                    rows[place] = made
    return list(rows.values())


def _columns(found: Sequence[Evaluated], card: Card) -> dict[tuple[str, str], dict[tuple[str, str], list[float]]]:
    """(label, metric) → place → samples, where the plain mean over items is the scorecard's number."""
    columns: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
    for one in found:
        for label, per in one.items.items():
            for metric, values in per.items():
                estimate = card["estimates"].get(label, {}).get(metric)
                means = per_item(list(values.values()))
                if estimate is None or estimate["value"] is None or not means:
                    continue
                if math.isclose(sum(means) / len(means), estimate["value"], rel_tol=CLOSE, abs_tol=CLOSE):
                    columns.setdefault((label, metric), values)
    return columns


def _pair(
    columns: Mapping[tuple[str, str], Mapping[tuple[str, str], list[float]]],
    place: tuple[str, str, str],
    resampling: Resampling,
) -> Row | None:
    policy, against, metric = place
    first, second = columns.get((policy, metric)), columns.get((against, metric))
    if first is None or second is None:
        return None
    common = [one for one in first if one in second]
    if not common:
        return None
    row = difference(Column([first[at] for at in common]), Column([second[at] for at in common]), resampling)
    return None if row is None else {"policy": policy, "against": against, "metric": metric, **row}


# ---- samples ----------------------------------------------------------------------------------------------------


def merge_samples(found: Sequence[Evaluated]) -> Iterator[Row]:
    """Lines of ``samples.jsonl`` with the answers of all runs to the same question side by side."""
    lines: dict[tuple[str, str, str], Row] = {}
    for one in found:
        for sample in read_samples(one.folder / SAMPLES):
            prompt = json.dumps(sample["prompt"], sort_keys=True)
            line = lines.setdefault((str(sample.get("task", PROMPTS)), str(sample.get("id", "")), prompt),
                                    {**sample, "responses": {}})  # fmt: skip
            for system, answers in sample["responses"].items():
                line["responses"].setdefault(one.labels.get(system, system), answers)
    yield from lines.values()


def _lines(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                if isinstance(found, dict) and {"task", "id", "values"} <= found.keys():
                    yield found
    except OSError:
        return
