"""Writes the report: one HTML file with everything in it, for a finished run, a partial one, or a failed one.

Nothing on the page is fetched, and nothing that a model, a dataset or a log wrote is markup: Jinja escapes it, hidden
characters are spelled out, and a content security policy allows only the page's own script, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from align import __version__
from align.artifacts import Artifact, Kind
from align.report import figures
from align.report.curves import Events, panels, read_events
from align.report.escape import finalize, script_json
from align.report.picture import lay_out
from align.report.samples import for_page, lengths, read_samples
from align.report.summary import headlines, sentences
from align.report.tables import difference_rows, family_rows, scorecard_rows, stage_rows
from align.report.wording import MARKS, count, duration, interval, number, signed, size

HERE = Path(__file__).parent
SHOWN_PANELS = 8
"""Curves of a stage that are open at first; the rest unfolds."""
MAX_PANELS = 18
LOG_TAIL = 6_000
"""Characters of a failed stage's log on the page."""


def write_report(
    artifacts: Sequence[Artifact],
    scorecard: dict[str, Any] | None,
    out: Path,
    failed: dict[str, Any] | None = None,
    title: str = "Alignment report",
) -> Path:
    """Write the page about ``artifacts`` (finished stages, in order) to ``out`` and return ``out``.

    ``scorecard`` is the parsed ``scorecard.json``; when None, that of the last scorecard among the artifacts is taken.
    ``failed`` describes a stage that did not finish: ``stage`` and ``message``, and optionally ``kind``, ``log``
    (path), ``folder`` (its partial folder, whose curves are shown), ``inputs`` and ``pending`` (stage names).
    """
    cards = [artifact for artifact in artifacts if artifact.kind == Kind.SCORECARD]
    if scorecard is None and cards:
        scorecard = json.loads((cards[-1].path / "scorecard.json").read_text(encoding="utf-8"))
    samples = read_samples(cards[-1].path / "samples.jsonl") if cards else []
    events = {artifact.stage: read_events(artifact.path) for artifact in artifacts}
    script = (HERE / "page.js").read_text(encoding="utf-8")
    html = _template().render(
        title=title,
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704  (our own file)
        script=Markup(script),  # noqa: S704  (our own file)
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        totals=_totals(artifacts),
        failure=_failure(failed),
        picture=lay_out(artifacts, failed),
        stages=stage_rows(artifacts, events),
        curves=_curves(events, failed),
        **_scores(scorecard, samples),
    )
    draft = out.with_name(f"{out.name}.draft")
    draft.write_text(html, encoding="utf-8")
    draft.replace(out)
    return out


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, signed=signed, interval=interval, duration=duration, size=size, count=count
    )
    environment.globals["marks"] = MARKS
    return environment.get_template("page.html.jinja")


def _scores(card: dict[str, Any] | None, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything on the page that comes from an evaluation; empty without one."""
    page = for_page(samples, card)
    found: dict[str, Any] = {
        "card": card,
        "samples": page,
        "samples_json": script_json(page),
        "headlines": [],
        "sentences": [],
        "scorecard": [],
        "differences": [],
        "families": [],
        "drift": [],
        "family_figure": None,
        "length_figure": None,
        "finish_figure": None,
        "accuracy_figure": None,
    }
    if card is None:
        return found
    found |= {
        "headlines": headlines(card),
        "sentences": sentences(card),
        "scorecard": scorecard_rows(card),
        "differences": difference_rows(card),
        "families": family_rows(card) if len(card["families"]) > 1 else [],
        "drift": _drift(card),
        "finish_figure": figures.dots(
            [(policy, card["estimates"][policy]["finished"]) for policy in card["policies"]],
            "share of responses that end by themselves",
            "Share of finished responses of each checkpoint",
        ),
    }
    if len(card["families"]) > 1:
        found["family_figure"] = figures.by_family(card, card["primary"])
    if samples:
        found["length_figure"] = figures.length_histogram(lengths(samples, card["policies"]))
    if card.get("reward_model"):
        found["accuracy_figure"] = _accuracy(card["reward_model"])
    return found


def _drift(card: dict[str, Any]) -> list[Markup]:
    """Reward against KL, proxy first, gold second; nothing where KL was not measured."""
    measured = any("kl" in per for per in card["estimates"].values())
    names = [name for name in ("reward", "gold") if name in card["metrics"]]
    return [figures.reward_against_kl(card, name) for name in names] if measured else []


def _accuracy(accuracy: dict[str, Any]) -> Markup:
    rows = [("as labelled", accuracy["as_labelled"])]
    if accuracy.get("true"):
        rows += [("by gold score", accuracy["true"]), ("labels themselves", accuracy["labels_true"])]
    rows.append(("longer answer wins", accuracy["longer"]))
    return figures.dots(rows, "share of held-out pairs ordered right", "Reward model accuracy", line=0.5)


def _curves(events: dict[str, Events], failed: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Per stage its panels: the first few shown, the rest folded, and the names of those beyond the limit."""
    if failed and failed.get("folder"):
        events = {**events, str(failed["stage"]): read_events(Path(failed["folder"]))}
    found = []
    for stage, reported in events.items():
        # a single point is no curve; its value stands in the record
        groups = panels({name: points for name, points in reported.series.items() if len(points[0]) > 1})
        drawn = [figures.curve(name, names, reported.series) for name, names in groups[:MAX_PANELS]]
        if drawn:
            left_out = [name for name, _ in groups[MAX_PANELS:]]
            found.append(
                {"stage": stage, "first": drawn[:SHOWN_PANELS], "more": drawn[SHOWN_PANELS:], "left_out": left_out}
            )
    return found


def _totals(artifacts: Sequence[Artifact]) -> dict[str, Any]:
    records = [artifact.record for artifact in artifacts]
    return {
        "stages": len(records),
        "seconds": sum(record.get("seconds") or 0 for record in records),
        "memory": max((record.get("peak_memory_bytes") or 0 for record in records), default=0),
        "tokens": sum(record.get("tokens") or 0 for record in records),
        "command": next((str(r["command"]) for r in reversed(records) if r.get("command")), None),
        "git": next((str(r["git"]) for r in reversed(records) if r.get("git")), None),
        "platform": next((str(r["platform"]) for r in reversed(records) if r.get("platform")), None),
    }


def _failure(failed: dict[str, Any] | None) -> dict[str, Any] | None:
    """The failed stage's message and the end of its log."""
    if failed is None:
        return None
    tail = ""
    if failed.get("log"):
        try:
            tail = Path(failed["log"]).read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:]
        except OSError:
            tail = "(the log cannot be read)"
    return {
        "stage": str(failed["stage"]),
        "message": str(failed.get("message", "")),
        "log": str(failed.get("log") or ""),
        "tail": tail,
        "pending": [str(name) for name in failed.get("pending", [])],
    }
