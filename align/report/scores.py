"""Everything on the page that comes from an evaluation: its numbers in tables, in figures and in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.evaluation.scorecard import FORMAT
from align.report import card_figures as draw
from align.report import drift, methods, reward_models, tables, win_rates
from align.report.assets import Beside, Figure
from align.report.curves import Events
from align.report.samples import for_page, lengths, page_json, read_rollouts, read_samples
from align.report.summary import gate_rows, gate_sentence, headlines, measured_on, sentences
from align.report.tables import PROMPTS
from align.store.artifacts import Artifact, Kind

Card = dict[str, Any]

MOST_TASK_FIGURES = 12
LISTS = (
    *("headlines", "sentences", "gates", "columns", "groups", "differences", "families", "sources", "task_settings"),
    *("task_figures", "drift", "matrices", "reward_models", "lengths", "rates"),
)
"""What the template asks of an evaluation, and may be empty."""
SCORECARD, SAMPLES, ROLLOUTS = "scorecard.json", "samples.jsonl", "completions.jsonl"


def find_card(artifacts: Sequence[Artifact], given: Card | None) -> tuple[Card | None, str]:
    """The scorecard to show, and why there is none where one was expected.

    ``given``, else that of the last scorecard among the artifacts; one of another format cannot be shown.
    """
    cards = [artifact for artifact in artifacts if artifact.kind == Kind.SCORECARD]
    card, stage = given, cards[-1].stage if cards else "evaluate"
    if card is None and cards:
        try:
            card = json.loads((cards[-1].path / SCORECARD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return None, f"The scorecard of {stage} cannot be read ({error}); rebuild it with --rebuild {stage}."
    if card is not None and card.get("format") != FORMAT:
        said = f"The scorecard of {stage} has format {card.get('format')}, this align shows {FORMAT}; "
        return None, f"{said}rebuild it with --rebuild {stage}."
    return card, ""


def context(
    artifacts: Sequence[Artifact], given: Card | None, events: Mapping[str, Events], beside: Beside
) -> dict[str, Any]:
    """What the template needs; the same names without an evaluation, and empty."""
    card, problem = find_card(artifacts, given)
    cards = [artifact for artifact in artifacts if artifact.kind == Kind.SCORECARD]
    samples = read_samples(cards[-1].path / SAMPLES) if cards else []
    rollouts = {artifact.stage: read_rollouts(artifact.path / ROLLOUTS) for artifact in artifacts}
    page = for_page(samples, card, rollouts)
    found: dict[str, Any] = {
        "card": card,
        "card_problem": problem,
        "samples": page,
        "samples_json": page_json(page),
        "paths": _paths(events, beside),
        **{name: [] for name in LISTS},
        **dict.fromkeys(("family_figure", "on", "gate_sentence", "methods")),
    }
    if card is None:
        return found
    tables.keep_tables(card, beside)
    gates = gate_rows(card)
    return found | {
        "headlines": headlines(card),
        "on": measured_on(card),
        "sentences": sentences(card),
        "gates": gates,
        "gate_sentence": gate_sentence(gates),
        "columns": tables.columns(card),
        "methods": methods.section(artifacts, card, beside),
        "groups": tables.task_groups(card),
        "differences": tables.difference_rows(card),
        "families": tables.family_rows(card) if len(card["families"]) > 1 else [],
        "family_figure": _family_figure(card, beside),
        "sources": tables.source_tables(card),
        "task_settings": tables.task_settings(card),
        "task_figures": _task_figures(card, beside),
        "drift": _drift(card, beside),
        "matrices": win_rates.matrices(card, beside),
        "reward_models": reward_models.sections(card, beside),
        "lengths": _lengths(card, samples, beside),
        "rates": _rates(card, beside),
    }


def _task_figures(card: Card, beside: Beside) -> list[Figure]:
    """The main number of each task, and that of the prompt set."""
    of = card["metrics"].get(card["primary"], {}).get("task")
    mains = [(card["primary"], "Held-out prompts")] if of == PROMPTS else []
    mains += [(about["primary"], str(about["title"])) for about in card["tasks"].values()]
    drawn = []
    for metric, task in mains[:MOST_TASK_FIGURES]:
        if not any(metric in per for per in card["estimates"].values()):
            continue
        about = card["metrics"][metric]
        better = f"; {about['better']} is better" if about["better"] else ""
        svg = draw.task_scores(card, metric, task)
        drawn.append(beside.figure(f"task-{metric}", svg, f"{about['title']}{better}. Dotted: {card['reference']}."))
    return drawn if len(drawn) > 1 else []


def _family_figure(card: Card, beside: Beside) -> Figure | None:
    if len(card["families"]) < 2:
        return None
    svg = draw.by_family(card, card["primary"]) if card["metrics"][card["primary"]]["task"] == PROMPTS else None
    return None if svg is None else beside.figure("sources", svg, f"{card['metrics'][card['primary']]['title']}")


def _drift(card: Card, beside: Beside) -> list[Figure]:
    """Score against KL, proxy first, gold second; nothing where KL was not measured."""
    if not any("kl" in per for per in card["estimates"].values()):
        return []
    said = {"reward": "The proxy, the reward model's score,", "gold": "What it stands for, the gold score,"}
    return [
        beside.figure(
            f"kl-{name}",
            drift.reward_against_kl(card, name),
            f"{said[name]} against drift from {card['reference']}: up is better, right is further away.",
        )
        for name in drift.SCORES
        if name in card["metrics"]
    ]


def _paths(events: Mapping[str, Events], beside: Beside) -> list[Figure]:
    """The way that stages took, for those that logged it."""
    with_path = {stage: found for stage, found in events.items() if drift.has_path(found)}
    drawn = []
    for name, title in drift.PATHS.items():
        svg = drift.path(with_path, name)
        if svg is not None:
            text = (
                f"The {title} against drift over the updates of training, numbered at their first and last: means over "
                "an update's own rollouts, against the model that the stage started from."
            )
            drawn.append(beside.figure(f"path-{name}", svg, text))
    return drawn


def _lengths(card: Card, samples: list[dict[str, Any]], beside: Beside) -> list[Figure]:
    drawn = []
    for task, per in lengths(samples, card["policies"]).items():
        answered = {policy: sizes for policy, sizes in per.items() if sizes}
        if not answered:
            continue
        what = "" if task == PROMPTS else f", {tables.task_title(card, task)}"
        caption = f"Response lengths{what}; a peak at the right edge is responses cut at the limit."
        drawn.append(beside.figure(f"lengths-{task}", draw.length_histogram(answered, what), caption))
    return drawn


def _rates(card: Card, beside: Beside) -> list[Figure]:
    """What ends by itself, and what is refused."""
    drawn = []
    finished = [name for name in card["metrics"] if name.rpartition(".")[2] == "finished"]
    if finished:
        svg = draw.rates(card, finished, "share of responses that end by themselves", "Share of finished responses")
        drawn.append(beside.figure("finished", svg, "Below 0.9, a policy has not learned to stop."))
    for task, metrics in draw.refusal_metrics(card).items():
        if metrics:
            svg = draw.rates(card, metrics, "share of prompts", f"Refusals of each system, {task}")
            title = card["tasks"][task]["title"]
            meanings = "; ".join(
                f"{card['metrics'][one]['title']}: {card['metrics'][one]['meaning']}" for one in metrics
            )
            drawn.append(beside.figure(f"refusals-{task}", svg, f"{title}. {meanings}."))
    return drawn
