"""Puts together everything on a page that comes from an evaluation: numbers in tables, in figures and in sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.evaluation.scorecard import program_metrics
from align.report.page.assets import AssetWriter, Figure
from align.report.page.metric_series import Events
from align.report.scorecard import conclusions, decision, reward_models, score_plots, tuning_methods, win_rates
from align.report.scorecard import scorecard_tables as tables
from align.report.scorecard.rollouts import Line, SampleFile, read_episodes
from align.report.scorecard.samples import page_json, page_samples
from align.report.scorecard.scorecard_tables import PROMPTS
from align.report.scorecard.stored_rollouts import read_rollouts, read_validations
from align.store.artifacts import Artifact, Kind
from align.store.rollouts import ROLLOUTS, VALIDATIONS

Card = dict[str, Any]

MAX_TASK_FIGURES = 12
SAMPLES = "samples.jsonl"


def _rollouts_of(artifact: Artifact) -> list[dict[str, Any]]:
    """Return responses or episodes of a stage that trains on its rollouts, or that samples in an environment."""
    # Without an environment there are no episodes to look for in a file that may be large.
    plays = artifact.kind != Kind.SCORECARD and (artifact.record.get("config") or {}).get("environment") is not None
    episodes = read_episodes(artifact.path / SAMPLES) if plays else []
    # A stage that samples data stores rollouts, too; its page has pairs.
    learned = read_rollouts(artifact.path / ROLLOUTS) if artifact.kind == Kind.POLICY else []
    return learned + episodes


def evaluation_sections(
    artifacts: Sequence[Artifact], scorecard: Card | None, events: Mapping[str, Events], assets: AssetWriter
) -> dict[str, Any]:
    """Return the template's values of an evaluation, by name; without an evaluation all values are empty."""
    card, problem = conclusions.load_scorecard(artifacts, scorecard)
    evaluations = [artifact for artifact in artifacts if artifact.kind == Kind.SCORECARD]
    samples: SampleFile | list[Line] = SampleFile(evaluations[-1].path / SAMPLES) if evaluations else []
    rollouts = {artifact.stage: _rollouts_of(artifact) for artifact in artifacts}
    # Samples and training paths exist even if no scorecard can be shown.
    validations = {artifact.stage: read_validations(artifact.path / VALIDATIONS) for artifact in artifacts}
    page = page_samples(samples, card, rollouts, validations)
    sections: dict[str, Any] = {
        "card": card,
        "card_problem": problem,
        "samples": page,
        "samples_json": page_json(page),
        "paths": _training_paths(events, assets),
    }
    # Each part of a scorecard under its name in the template; without an evaluation all are empty.
    parts: dict[str, Callable[[Card], Any]] = {
        "headlines": conclusions.headlines,
        "on": conclusions.measured_on,
        "decision": lambda card: decision.decide_by_items(
            card, decision.item_columns(artifacts, card), decision.checkpoints(card)
        ),
        "findings": lambda card: conclusions.group_findings(conclusions.sentences(card)),
        "gates": conclusions.gate_rows,
        "columns": tables.columns,
        "methods": lambda card: tuning_methods.methods_section(artifacts, card, assets),
        "groups": tables.task_groups,
        "differences": tables.difference_rows,
        "families": lambda card: tables.family_rows(card) if len(card["families"]) > 1 else [],
        "family_figure": lambda card: _family_figure(card, assets),
        "sources": tables.source_tables,
        "task_settings": tables.task_settings,
        "task_figures": lambda card: _task_figures(card, assets),
        "drift": lambda card: _kl_figures(card, assets),
        "matrices": lambda card: win_rates.matrices(card, assets),
        "reward_models": lambda card: reward_models.sections(card, assets),
        "lengths": lambda card: _length_figures(card, page["lengths"], assets),
        "rates": lambda card: _rate_figures(card, assets),
    }
    if card is None:
        return sections | dict.fromkeys([*parts, "gate_sentence"], ())
    tables.add_scorecard_tables(card, assets)
    sections |= {name: part(card) for name, part in parts.items()}
    return sections | {"gate_sentence": conclusions.gate_sentence(sections["gates"])}


def _task_figures(card: Card, assets: AssetWriter) -> list[Figure]:
    """Return a figure of each task's primary metric and of the prompt set's; none if there would be only one figure."""
    metrics = [(task["primary"], str(task["title"])) for task in card["tasks"].values()]
    if card["metrics"].get(card["primary"], {}).get("task") == PROMPTS:
        metrics.insert(0, (card["primary"], "Held-out prompts"))
    figures = []
    for name, task in metrics[:MAX_TASK_FIGURES]:
        if not any(name in estimates for estimates in card["estimates"].values()):
            continue
        metric = card["metrics"][name]
        better = f"; {metric['better']} is better" if metric["better"] else ""
        caption = f"{metric['title']}{better}. Dotted: {card['reference']}."
        figures.append(assets.add_figure(f"task-{name}", score_plots.task_scores(card, name, task), caption))
    return figures if len(figures) > 1 else []


def _family_figure(card: Card, assets: AssetWriter) -> Figure | None:
    """Return the primary metric by source (family) of the prompt set; None for fewer than two sources."""
    metric = card["metrics"].get(card["primary"])
    if len(card["families"]) < 2 or metric is None or metric["task"] != PROMPTS:
        return None
    svg = score_plots.scores_by_family(card, card["primary"])
    return None if svg is None else assets.add_figure("sources", svg, str(metric["title"]))


def _kl_figures(card: Card, assets: AssetWriter) -> list[Figure]:
    """Return score against KL, the proxy first and the programs' scores next; none if KL was not measured."""
    if not any("kl" in estimates for estimates in card["estimates"].values()):
        return []
    subjects = {"reward": "The proxy, the reward model's score,"} if "reward" in card["metrics"] else {}
    subjects |= {name: f"The {name} score, which a proxy stands for," for name in program_metrics(card["metrics"])}
    figures = []
    for name, subject in subjects.items():
        caption = f"{subject} against drift from {card['reference']}: up is better, right is further away."
        figures.append(assets.add_figure(f"kl-{name}", score_plots.reward_against_kl(card, name), caption))
    return figures


def _training_paths(events: Mapping[str, Events], assets: AssetWriter) -> list[Figure]:
    """Return score against KL over the updates of training, for the stages that logged both."""
    figures = []
    for name, title in score_plots.PATHS.items():
        svg = score_plots.training_path(events, name)
        if svg is not None:
            caption = (
                f"The {title} against drift over the updates of training, with the numbers of the first and the last: "
                "means over an update's own rollouts, against the model that the stage started from."
            )
            figures.append(assets.add_figure(f"path-{name}", svg, caption))
    return figures


def _length_figures(card: Card, lengths: Mapping[str, Mapping[str, list[int]]], assets: AssetWriter) -> list[Figure]:
    figures = []
    for task, by_policy in lengths.items():
        answered = {policy: tokens for policy, tokens in by_policy.items() if tokens}
        if not answered:
            continue
        suffix = "" if task == PROMPTS else f", {tables.task_title(card, task)}"
        caption = f"Response lengths{suffix}; a peak at the right edge is responses cut at the limit."
        figures.append(assets.add_figure(f"lengths-{task}", score_plots.length_histogram(answered, suffix), caption))
    return figures


def _rate_figures(card: Card, assets: AssetWriter) -> list[Figure]:
    """Return the share of responses that end by themselves, and the refusal rates of each task about refusing."""
    figures = []
    metrics = [name for name in card["metrics"] if name.rpartition(".")[2] == "finished"]
    if metrics:
        label = "share of responses that end by themselves"
        svg = score_plots.rates(card, metrics, label, "Share of finished responses")
        figures.append(assets.add_figure("finished", svg, "Below 0.9, a policy has not learned to stop."))
    for task, metrics in score_plots.refusal_metrics(card).items():
        if metrics:
            svg = score_plots.rates(card, metrics, "share of prompts", f"Refusals of each system, {task}")
            meanings = "; ".join(
                f"{card['metrics'][name]['title']}: {card['metrics'][name]['meaning']}" for name in metrics
            )
            caption = f"{card['tasks'][task]['title']}. {meanings}."
            figures.append(assets.add_figure(f"refusals-{task}", svg, caption))
    return figures
