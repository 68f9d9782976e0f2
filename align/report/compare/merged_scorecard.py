"""Merges the scorecards of several runs into one, with differences paired across runs. Torch-free.

A system that all runs share (the same checkpoint, used and measured alike) is in the merged scorecard once. Every other
system is called ``run: system``. Differences between runs are computed from their items, paired by task, id and prompt,
if both answered the same items. Metrics with weighted items have no such differences, because items do not carry their
weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from align.evaluation.comparisons import Column, Resampling, correct_table, difference, per_item
from align.evaluation.scorecard import FORMAT
from align.evaluation.scorecard.scorecard_builder import DRIFT
from align.report.scorecard.rollouts import SampleFile, is_episode, read_lines
from align.store.artifacts import Artifact, Kind

Card = dict[str, Any]
Row = dict[str, Any]
ItemId = tuple[str, ...]
"""Task and id of an item; across runs also the digest of its prompt, because runs may number other prompts alike."""
Items = dict[ItemId, Sequence[float]]
"""Item → a number for each sample."""

PROMPTS = "prompts"
SCORECARD = "scorecard.json"
SAMPLES = "samples.jsonl"
ITEMS = "items.jsonl"
MAX_DRAWS, MIN_RESAMPLES = 2 * 10**8, 1_000
"""Items that a bootstrap draws in all, about two seconds, and the resamples that it has in any case."""
MEAN_TOLERANCE = 1e-6
"""Relative difference up to which a plain mean over items is the scorecard's own number."""


@dataclass
class EvaluatedRun:
    """A run with its scorecard; ``labels`` maps its systems to their names in the merged scorecard."""

    name: str
    card: Card
    folder: Path
    labels: dict[str, str]
    metrics: Collection[str] | None = None
    """Metrics whose items are read; None for all."""

    @property
    def subject(self) -> str:
        """The system that the run is about: its last trained checkpoint, preferably other than the reference."""
        checkpoints = [system["name"] for system in self.card["systems"] if system["role"] == "checkpoint"]
        compared = [name for name in checkpoints if name != self.card["reference"]]
        # An evaluation without any trained checkpoint is about its last system.
        candidates = compared or checkpoints or self.card["policies"]
        return str(candidates[-1])

    @property
    def subject_label(self) -> str:
        """Name of the subject in the merged scorecard."""
        return self.labels[self.subject]

    @cached_property
    def items(self) -> dict[str, dict[str, Items]]:
        """Label → metric → item → numbers of the samples; empty if the run has no ``items.jsonl``."""
        items: dict[str, dict[str, Items]] = {}
        for line in read_lines(self.folder / ITEMS, {"task", "id", "values"}):
            task = str(line["task"])
            item: ItemId = (task, str(line["id"]))
            for system, metrics in line["values"].items():
                for metric, samples in metrics.items():
                    name = metric if task == PROMPTS else f"{task}.{metric}"
                    is_wanted = self.metrics is None or name in self.metrics
                    if samples and is_wanted and system in self.labels:
                        # The garbage collector visits a million lists again and again, but tuples of numbers once.
                        items.setdefault(self.labels[system], {}).setdefault(name, {})[item] = tuple(samples)
        return items

    @cached_property
    def prompts(self) -> dict[ItemId, str]:
        """Item → digest of its prompt, for the items in ``samples.jsonl``.

        Episodes are skipped. A sample has the first message of an episode, which a model may have played.
        """
        digests: dict[ItemId, str] = {}
        for sample in SampleFile(self.folder / SAMPLES):
            responses = [response for answers in sample["responses"].values() for response in answers]
            if not any(is_episode(response) for response in responses):
                digests[_sample_id(sample)] = _prompt_digest(sample)
        return digests


def read_cards(runs: Mapping[str, Mapping[str, Artifact]]) -> tuple[list[EvaluatedRun], dict[str, str]]:
    """Return every run's last scorecard, and for each run without one the reason."""
    evaluated: list[EvaluatedRun] = []
    problems: dict[str, str] = {}
    for run, artifacts in runs.items():
        scorecards = [artifact for artifact in artifacts.values() if artifact.kind == Kind.SCORECARD]
        if not scorecards:
            problems[run] = "not evaluated"
            continue
        artifact = scorecards[-1]
        try:
            card = json.loads((artifact.path / SCORECARD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            problems[run] = f"the scorecard of {artifact.stage} cannot be read"
            continue
        if not isinstance(card, dict) or card.get("format") != FORMAT:
            problems[run] = f"the scorecard of {artifact.stage} is of another format; rebuild it"
            continue
        evaluated.append(EvaluatedRun(run, card, artifact.path, {}))
    # Labels need all cards: a system keeps its name only if every run has the same system.
    shared = _shared_systems([run.card for run in evaluated])
    for each in evaluated:
        each.labels = {name: name if name in shared else f"{each.name}: {name}" for name in each.card["policies"]}
    return evaluated, problems


def _shared_systems(cards: Sequence[Card]) -> set[str]:
    """Return the systems with the same key and the same numbers in all cards."""
    if len(cards) < 2:
        return set()

    def identity(card: Card, name: str) -> Any:
        keys = [system["key"] for system in card["systems"] if system["name"] == name]
        # Equal weights are not enough: runs may have measured them on other items.
        return keys, card["estimates"].get(name), card["primary"]

    first = cards[0]
    return {name for name in first["policies"] if all(identity(card, name) == identity(first, name) for card in cards)}


def merge(evaluated: Sequence[EvaluatedRun]) -> Card:
    """Return one scorecard of all runs, in the same format as each run's; ``evaluated`` has at least one run.

    The reference and the base come from the first run. P-values are corrected for all comparisons together.
    """
    first = evaluated[0]
    metrics: dict[str, Any] = {}
    for run in evaluated:
        # The first run that has a metric decides its title, unit and direction.
        metrics |= {name: metric for name, metric in run.card["metrics"].items() if name not in metrics}
    reference = first.labels[first.card["reference"]]
    base = None if first.card["base"] is None else first.labels[first.card["base"]]
    estimates = {run.labels[name]: values for run in evaluated for name, values in run.card["estimates"].items()}
    policies = [label for label in (base, reference) if label is not None] + list(estimates)
    card: Card = {
        "format": FORMAT,
        "reference": reference,
        "base": base,
        "primary": first.card["primary"],
        "policies": list(dict.fromkeys(policies)),
        "systems": _merge_systems(evaluated),
        "settings": first.card["settings"],
        "metrics": metrics,
        "tasks": _merge_tasks(evaluated),
        "estimates": estimates,
        "families": _merge_families(evaluated, lambda card: card["families"]),
        "task_families": _merge_task_families(evaluated),
        "family_differences": [],
        "win_rates": _merge_win_rates(evaluated),
        "reward_models": _merge_reward_models(evaluated),
        "gates": _unique_rows([_labeled(run, gate, "system") for run in evaluated for gate in run.card["gates"]]),
        "flags": _unique_rows([_labeled(run, flag, "policy") for run in evaluated for flag in run.card["flags"]]),
    }
    card["differences"] = _differences(evaluated, card)
    roles = {system["name"]: system["role"] for system in card["systems"]}
    correct_table(card["differences"], roles, card["primary"], metrics)
    return card


def _merge_systems(evaluated: Sequence[EvaluatedRun]) -> list[Row]:
    systems: dict[str, Row] = {}
    for run in evaluated:
        for system in run.card["systems"]:
            label = run.labels[system["name"]]
            source = run.labels.get(system["of"], system["of"])
            systems.setdefault(label, {**system, "name": label, "of": source})
    return list(systems.values())


def _merge_tasks(evaluated: Sequence[EvaluatedRun]) -> dict[str, Any]:
    """Return the tasks of all runs, with the notes on every run's systems."""
    tasks: dict[str, Any] = {}
    for run in evaluated:
        for name, task in run.card["tasks"].items():
            notes = {run.labels.get(system, system): note for system, note in (task.get("notes") or {}).items()}
            merged = tasks.setdefault(name, {**task, "notes": {}})
            merged["notes"] = {**merged["notes"], **notes}
    return tasks


def differing_item_counts(evaluated: Sequence[EvaluatedRun]) -> list[str]:
    """Return a sentence for each task, and the prompt set, that runs measured on different numbers of items."""
    counts: dict[str, dict[str, int]] = {}
    for run in evaluated:
        if run.card["settings"].get("prompts"):
            counts.setdefault("the prompt set", {})[run.name] = int(run.card["settings"]["prompts"])
        for task in run.card["tasks"].values():
            counts.setdefault(str(task["title"]), {})[run.name] = int(task["n"])
    sentences = []
    for name, by_run in counts.items():
        if len(set(by_run.values())) > 1:
            listed = ", ".join(f"{run}: {count:,}" for run, count in by_run.items())
            sentences.append(
                f"{name} has other items in some runs ({listed}); differences are over those that both sides answered."
            )
    return sentences


def differing_prompts(evaluated: Sequence[EvaluatedRun]) -> list[str]:
    """Return a sentence for each task, and the prompt set, that has other prompts under the same ids in some runs."""
    prompts: dict[ItemId, set[str]] = {}
    for run in evaluated:
        for item, prompt in run.prompts.items():
            prompts.setdefault(item, set()).add(prompt)
    counts = Counter(task for (task, _), digests in prompts.items() if len(digests) > 1)
    titles = {name: str(task["title"]) for run in evaluated for name, task in run.card["tasks"].items()}
    return [
        f"{titles.get(task, 'The prompt set')} has other prompts under the same id in {count:,} items; these are not "
        "compared across runs that differ in them."
        for task, count in counts.items()
    ]


def _merge_families(evaluated: Sequence[EvaluatedRun], families_of: Callable[[Card], Any]) -> dict[str, Any]:
    """Return the estimates by source (family) of all runs; ``n`` is the largest of a source."""
    families: dict[str, Any] = {}
    for run in evaluated:
        for source, family in families_of(run.card).items():
            merged = families.setdefault(source, {"n": family["n"], "estimates": {}})
            merged["n"] = max(merged["n"], family["n"])
            merged["estimates"] |= {run.labels[name]: values for name, values in family["estimates"].items()}
    return families


def _merge_task_families(evaluated: Sequence[EvaluatedRun]) -> dict[str, Any]:
    tasks = dict.fromkeys(task for run in evaluated for task in run.card["task_families"])
    return {
        task: _merge_families(evaluated, lambda card, task=task: card["task_families"].get(task, {}))  # type: ignore[misc]
        for task in tasks
    }


def _merge_win_rates(evaluated: Sequence[EvaluatedRun]) -> list[Row]:
    """Return the win rates of all runs; two systems that several runs compared alike have one row."""
    rows: dict[tuple[str, str, str, str], Row] = {}
    for run in evaluated:
        for row in run.card["win_rates"]:
            # An opponent that is a file's answers is not a system and has no label.
            first, second = (run.labels.get(row[side], row[side]) for side in ("one", "other"))
            rows.setdefault((row["task"], row["judge"], first, second), {**row, "one": first, "other": second})
    return list(rows.values())


def _merge_reward_models(evaluated: Sequence[EvaluatedRun]) -> list[Row]:
    """Return the reward models' numbers: once if all runs have the same numbers, else under each run's name."""
    first = evaluated[0].card["reward_models"]
    if all(run.card["reward_models"] == first for run in evaluated):
        return list(first)
    return [
        {**row, "stage": f"{run.name}: {row.get('stage')}"} for run in evaluated for row in run.card["reward_models"]
    ]


def _labeled(run: EvaluatedRun, row: Row, field: str) -> Row:
    """Return a gate or flag under its system's name in the merged scorecard; ``field`` names the system."""
    system = row[field]
    return {**row, field: run.labels.get(system, system), "text": _text_with_run(run, system, row["text"])}


def _text_with_run(run: EvaluatedRun, system: str | None, text: str) -> str:
    """Return ``text`` with the run's name in front, unless it is about a system that all runs share."""
    is_shared = system is not None and run.labels.get(system) == system
    return text if is_shared else f"{run.name}: {text}"


def _unique_rows(rows: Sequence[Row]) -> list[Row]:
    return list({json.dumps(row, sort_keys=True, default=str): row for row in rows}.values())


# ---- differences ------------------------------------------------------------------------------------------------


def _differences(evaluated: Sequence[EvaluatedRun], card: Card) -> list[Row]:
    """Return each run's own differences, and those across runs.

    Across runs every system is compared with the reference and the base, and every subject with the first run's.
    """
    rows: dict[tuple[str, str, str], Row] = {}
    for run in evaluated:
        for row in run.card["differences"]:
            policy = run.labels[row["policy"]]
            against = run.labels[row["against"]]
            rows.setdefault((policy, against, row["metric"]), {**row, "policy": policy, "against": against})
    # Differences within a run were computed by its own evaluation, with the weights of its items. Only the
    # comparisons that no run has are computed here, from items.
    columns = comparable_columns(evaluated, card)
    # Runs are compared with the first run; then every system with the shared reference and base.
    first = evaluated[0].subject_label
    # In the order of importance: a comparison that occurs twice keeps its first place.
    pairs = [(run.subject_label, first) for run in evaluated[1:]]
    for policy in card["policies"]:
        pairs += [(policy, against) for against in (card["reference"], card["base"]) if against not in (None, policy)]
    for policy, against in dict.fromkeys(pairs):
        if policy in (against, card["base"]):
            continue
        for metric in card["metrics"]:
            comparison = policy, against, metric
            if comparison in rows or metric in DRIFT:
                continue
            row = paired_difference(columns, comparison, card)
            if row is not None:
                rows[comparison] = row
    return list(rows.values())


def comparable_columns(evaluated: Sequence[EvaluatedRun], card: Card) -> dict[tuple[str, str], Items]:
    """Return (label, metric) → item → samples, for metrics whose plain mean over items is the scorecard's number.

    A metric with weighted items fails this test and is skipped.
    """
    columns: dict[tuple[str, str], Items] = {}
    for run in evaluated:
        for label, metrics in run.items.items():
            for metric, items in metrics.items():
                if len(evaluated) > 1:
                    # Runs may give one id to different prompts, so the prompt becomes a part of the key.
                    items = {(*item, run.prompts.get(item, "")): samples for item, samples in items.items()}
                estimate = card["estimates"].get(label, {}).get(metric)
                means = per_item(list(items.values()))
                if estimate is None or estimate["value"] is None or not means:
                    continue
                mean = sum(means) / len(means)
                if math.isclose(mean, estimate["value"], rel_tol=MEAN_TOLERANCE, abs_tol=MEAN_TOLERANCE):
                    columns.setdefault((label, metric), items)
    return columns


def paired_difference(
    columns: Mapping[tuple[str, str], Items], comparison: tuple[str, str, str], card: Card
) -> Row | None:
    """Return a difference over the items that both systems answered; None without such items.

    ``comparison`` is (system, the other system, metric); ``card`` has the settings of the resampling.
    """
    policy, against, metric = comparison
    first = columns.get((policy, metric), {})
    second = columns.get((against, metric), {})
    common = [item for item in first if item in second]
    if not common:
        return None
    first_column = Column([first[item] for item in common])
    second_column = Column([second[item] for item in common])
    settings = card["settings"]
    resamples = min(int(settings.get("bootstrap", 10_000)), max(MIN_RESAMPLES, MAX_DRAWS // len(common)))
    resampling = Resampling(resamples, int(settings.get("seed", 0)))
    row = difference(first_column, second_column, resampling)
    return None if row is None else {"policy": policy, "against": against, "metric": metric, **row}


# ---- samples ----------------------------------------------------------------------------------------------------


def merge_samples(evaluated: Sequence[EvaluatedRun]) -> Iterator[Row]:
    """Yield lines of ``samples.jsonl`` that have the responses of all runs to the same prompt."""
    lines: dict[ItemId, Row] = {}
    for run in evaluated:
        for sample in SampleFile(run.folder / SAMPLES):
            place = (*_sample_id(sample), _prompt_digest(sample))
            line = lines.setdefault(place, {**sample, "responses": {}})
            for system, responses in sample["responses"].items():
                line["responses"].setdefault(run.labels.get(system, system), responses)
    yield from lines.values()


def _sample_id(sample: Row) -> ItemId:
    return str(sample.get("task", PROMPTS)), str(sample.get("id", ""))


def _prompt_digest(sample: Row) -> str:
    return hashlib.sha256(json.dumps(sample["prompt"], sort_keys=True).encode()).hexdigest()
