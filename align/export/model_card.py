"""The model card of an exported checkpoint: README.md with the Hub's metadata, results, recipe, data and licenses.

Everything on it was recorded or measured: the records of all stages behind the checkpoint, their ledgers, and a
scorecard with this checkpoint in it. The card names what was not measured. Names and texts of data, models and flags
are untrusted and are escaped. Excluded: samples and texts of rows. Torch-free.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.data.card import CARD, fenced, plain, table
from align.errors import printable
from align.export.fidelity import cost_lines
from align.export.model_card_facts import (
    REWARD_METRICS,
    Facts,
    base_model,
    card_verb,
    is_trained,
    license_of,
    metadata,
    own_names,
    reward_results,
    weight_history,
)
from align.report.page.metric_series import read_events
from align.report.page.number_format import (
    MISSING,
    duration,
    interval,
    number,
    p_value,
    signed,
    size,
    value_with_interval,
)
from align.report.run.data_ledgers import data_sections, license_rows
from align.report.scorecard.conclusions import find_difference
from align.store.artifacts import VERSION, Artifact
from align.store.json_files import write_text_atomically

MOST_COUNTS = 12
MOST_REASONS = 8
MOST_WARNINGS = 12
MOST_RIVALS = 3
"""Most columns for prompted and best-of-N systems."""


def write_model_card(folder: Path, facts: Facts) -> Path:
    """Write ``folder/README.md`` and return its path."""
    text = f"---\n{metadata(facts).to_yaml()}\n---\n\n" + "\n".join(_body(facts)) + "\n"
    path = folder / CARD
    write_text_atomically(path, text)
    return path


def _body(facts: Facts) -> list[str]:
    lines = [f"# {plain(facts.name)}", "", *_about(facts), ""]
    lines += ["## Use", "", *_use(facts), ""]
    lines += ["## Results", "", *_measured_before(facts), *results(facts), ""]
    lines += ["## Limitations", "", *limitations(facts), ""]
    if facts.lineage:
        lines += ["## Training", "", *_training(facts), ""]
        lines += ["## Data", "", *_data(facts), ""]
    lines += ["## Licenses", "", *_licenses(facts), ""]
    if facts.lineage:
        lines += ["## Recipe", "", *_recipe(facts), ""]
        lines += ["## Reproduce", "", *_reproduce(facts)]
    return lines


def _about(facts: Facts) -> list[str]:
    written = facts.written
    kind = "Reward model" if written.is_reward else "Language model"
    size_text = f"{written.parameters:,} parameters, {written.dtype} ({written.architecture})"
    lines = [f"{kind}, {size_text}, written by align {VERSION}."]
    artifact = facts.artifact
    if artifact is None:
        return [*lines, "It has no record of its training."]
    # The verbs of a record are text like any other of its fields, which a bucket may have brought.
    history = [(plain(entry.stage), plain(str(card_verb(entry)))) for entry in weight_history(facts.lineage)]
    base = base_model(facts.lineage)
    lines.append(
        f"It is the result of stage {plain(artifact.stage)} of the pipeline "
        f"{plain(str(artifact.record.get('pipeline', '')))}, key `{artifact.key[:12]}`."
    )
    if history:
        steps = " → ".join(f"{stage} ({verb})" for stage, verb in history)
        lines.append(f"Its weights: {steps}.")
    return lines + ([f"Base model: [{plain(base)}](https://huggingface.co/{base})."] if base else [])


def _use(facts: Facts) -> list[str]:
    examples = json.loads(Path(__file__).with_name("usage.json").read_text(encoding="utf-8"))
    name = facts.written.format
    if name == "transformers":
        name = "reward" if facts.written.is_reward else "policy"
    code = "\n".join(examples.get(name) or examples["compressed"])
    advice = [line for sentence in facts.written.serving_advice for line in (sentence, "")]
    return [*fenced(code, "sh" if facts.written.format == "gguf" else "python"), "", *advice, *_checked(facts)]


def _checked(facts: Facts) -> list[str]:
    agreement = facts.agreement
    if facts.fidelity is not None:
        return cost_lines(facts.fidelity)
    if agreement is None:
        return ["Not checked when it was written: whether the folder answers as the checkpoint did."]
    compared = agreement.what if facts.written.is_reward else f"greedy {agreement.what}"
    lines = [
        f"Checked when it was written: {agreement.compared:,} {compared} of {agreement.prompts} prompts "
        f"are the checkpoint's, in float32, in {' and '.join(agreement.engines)}."
    ]
    if agreement.ties:
        lines.append(
            f"{agreement.ties} answers diverge at two tokens of equal probability and were compared up to there."
        )
    if agreement.rounding:
        lines.append(
            f"Its type, {facts.written.dtype}, changes {agreement.rounding} of those answers by rounding alone."
        )
    if agreement.unchecked:
        lines.append(f"Not checked in vLLM: {plain(agreement.unchecked)}.")
    return lines


def _measured_before(facts: Facts) -> list[str]:
    """Return a note that the results are the checkpoint's, for a format with rounded weights."""
    if facts.written.format == "transformers" or facts.scorecard is None:
        return []
    return [f"Measured on the checkpoint, before its weights were rounded to {facts.written.dtype}.", ""]


def _training(facts: Facts) -> list[str]:
    rows = []
    for artifact in facts.lineage:
        record = artifact.record
        metrics = record.get("metrics") or {}
        steps = metrics.get("updates", metrics.get("steps"))
        rows.append(
            (
                artifact.stage,
                str(record.get("kind", "")),
                str(artifact.kind),
                "" if steps is None else number(steps),
                number(record.get("tokens")),
                duration(record.get("seconds")),
                size(record.get("peak_memory_bytes")),
                str(record.get("seed", "")),
                f"`{artifact.key[:12]}`",
            )
        )
    head = ("stage", "kind", "makes", "steps or updates", "tokens", "time", "peak memory", "seed", "key")
    return table(head, rows, numbers=range(3, 8))


def _data(facts: Facts) -> list[str]:
    lines: list[str] = []
    for section in data_sections(facts.lineage):
        counts = [f"{rows:,} {plain(name)}" for name, rows in section["splits"].items()]
        # Stages without splits list their counts instead.
        counts = counts or [f"{plain(name)} {number(value)}" for name, value in section["counts"][:MOST_COUNTS]]
        row_counts = ", ".join(counts) or "rows not counted"
        lines += [f"### {plain(section['stage'])}", "", f"{plain(section['makes'])}: {row_counts}.", ""]
        if section["sources"]:
            rows = []
            for source in section["sources"]:
                amounts = (f"{source['rows_in']:,}", f"{source['rows_out']:,}")
                rows.append((source["source"], source["type"], _license(source["license"]), *amounts))
            head = ("source", "type", "license", "records", "rows")
            lines += [*table(head, rows, numbers=(3, 4)), ""]
        if section["steps"]:
            lines += [_dropped(section["steps"]), ""]
    return lines[:-1] or ["No rows are recorded."]


def _dropped(steps: Sequence[Mapping[str, Any]]) -> str:
    reasons: Counter[str] = Counter()
    for step in steps:
        for entry in step["reasons"]:
            reasons[entry["reason"]] += entry["rows"]
    if not reasons:
        return "No row was dropped."
    largest = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:MOST_REASONS]
    listed = ", ".join(f"{rows:,} {plain(reason)}" for reason, rows in largest)
    return f"{reasons.total():,} rows were dropped: {listed}."


def _license(name: str) -> str:
    return "**not known**" if name == "unknown" else name


def _licenses(facts: Facts) -> list[str]:
    license = license_of(facts.lineage, facts.license)
    lines = [f"**{', '.join(plain(name) for name in license.names)}.** {plain(license.reason)}", ""]
    lines += [f"- {plain(concern)}." for concern in license.concerns]
    rows = [
        (row["stage"], row["what"], row["name"], _license(row["license"]), row["identity"])
        for row in license_rows(facts.lineage)
    ]
    if rows:
        lines += ["", *table(("stage", "what", "name", "license", "identity"), rows)]
    return [*lines, "", "This is bookkeeping of what is recorded, no legal advice."]


def _recipe(facts: Facts) -> list[str]:
    recipe = facts.pipeline
    if recipe is None:
        stages = {}
        for artifact in facts.lineage:
            stages[artifact.stage] = {"stage": artifact.record.get("kind"), **(artifact.record.get("config") or {})}
        recipe = {"stages": stages}
        lines = ["The resolved settings of every stage; its pipeline file is not recorded.", ""]
    else:
        lines = ["The pipeline file; where and how it ran (`runtime`) changes no result and is omitted.", ""]
    # The runtime describes machines and does not change the result.
    shown = {name: value for name, value in recipe.items() if name != "runtime"}
    text = _without_home(printable(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=110)))
    return [*lines, *fenced(text, "yaml")]


def _reproduce(facts: Facts) -> list[str]:
    commands = _record_values(facts.lineage, "command")
    lines: list[str] = []
    if commands:
        lines = [*fenced("\n".join(printable(_without_home(command)) for command in commands), "sh"), ""]
    record = facts.lineage[-1].record
    packages = ", ".join(f"{name} {version}" for name, version in (record.get("packages") or {}).items())
    commits = ", ".join(_record_values(facts.lineage, "git"))
    rows = [
        ("align", f"{record.get('align', '')} {f'(commit {commits})' if commits else ''}".strip()),
        ("packages", packages),
        ("machine", str(record.get("platform", ""))),
        ("precision", str(record.get("precision") or "")),
        ("made", str(record.get("created", ""))[:19]),
    ]
    return [*lines, *table(("", ""), [row for row in rows if row[1]])]


def _without_home(text: str) -> str:
    """Replace the home folder by ``~``, which hides the user's name."""
    home = str(Path.home())
    return text.replace(f"{home}/", "~/") if len(home) > 1 else text


def _record_values(lineage: Sequence[Artifact], field: str) -> list[str]:
    """Return the different values of a field in the records, in order."""
    return list(dict.fromkeys(str(artifact.record[field]) for artifact in lineage if artifact.record.get(field)))


def results(facts: Facts) -> list[str]:
    """Return a table of every metric of this checkpoint, with the reference and the base."""
    if facts.written.is_reward:
        return _reward_results(facts)
    card = facts.scorecard
    names = own_names(facts)
    if card is None or not names:
        return ["No evaluation of this checkpoint is recorded."]
    own_name = names[0]
    estimates = card["estimates"]
    rivals = [system for system in card.get("systems") or [] if system.get("role") in ("prompted", "best_of")]
    # Columns: the reference, the base, and a few prompted or best-of-N systems, each once.
    candidates = (card["reference"], card["base"], *(str(system["name"]) for system in rivals[:MOST_RIVALS]))
    other_names = [name for name in dict.fromkeys(candidates) if name not in (None, own_name)]
    others = [name for name in other_names if name in estimates]
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
    name = plain(str(system["name"]))
    of = plain(str(system["of"]))
    if system["role"] == "best_of":
        return f"{name} is {of}, the best of {system.get('best_of')} answers by the reward model."
    ways = [f"{system['shots']} examples"] if system.get("shots") else []
    ways += ["a system message"] if system.get("system") else []
    return f"{name} is {of} as it is, prompted with {' and '.join(ways) or 'nothing more'}."


def _estimate(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return MISSING
    return value_with_interval(estimate)


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
    card = facts.scorecard
    names = own_names(facts)
    lines: list[str] = []
    if card is not None:
        for gate in card.get("gates") or []:
            # An undecided gate fails the run as well.
            if gate.get("system") in names and gate.get("passed") is not True:
                state = "not passed" if gate.get("passed") is False else "could not be decided"
                level = plain(str(gate.get("level", "error")))
                lines.append(f"- Gate {state} ({level}): {plain(str(gate['text']))}.")
        flags = [flag for flag in card.get("flags") or [] if flag.get("policy") in (*names, None, "")]
        lines += [f"- {plain(str(flag.get('kind', 'flag')))}: {plain(str(flag.get('text', '')))}." for flag in flags]
    measured = bool(reward_results(facts)) if facts.written.is_reward else bool(names)
    if not measured:
        lines.append("- Nothing was measured of this checkpoint, its safety least of all.")
    elif not lines:
        lines.append(
            "- No flag was raised and no gate failed in the evaluation above. It says nothing beyond its tasks."
        )
    kinds = {task.get("kind") for task in ((card or {}).get("tasks") or {}).values()}
    if measured and not facts.written.is_reward and "xstest" not in kinds:
        lines.append("- Safety was not measured: no task of the evaluation asks for refusals.")
    for artifact in facts.lineage:
        if is_trained(artifact):
            warnings = read_events(artifact.path).warnings[:MOST_WARNINGS]
            lines += [f"- Warning in training, {plain(artifact.stage)}: {plain(text)}" for text in warnings]
    return lines
