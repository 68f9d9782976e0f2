"""Writes ``preview.html`` about a build: where its rows come from, what every step dropped and why, how rows look.

One file with everything in it and no script. Nothing a dataset wrote is markup: Jinja escapes it, hidden characters are
spelled out, and a content security policy forbids whatever would be fetched or run. Its texts include dropped rows, so
``align data push`` leaves it out. The same build gives the same page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from align.data.built import message_text, read_ledger
from align.data.licenses import normalize, of_mixture
from align.data.rows import Row, is_text
from align.report.dataset.figures import figures
from align.report.dataset.rows import Cluster, Found, look, quantile
from align.report.escape import finalize
from align.report.figures import Panel
from align.report.tokens import Piece, views
from align.report.wording import count, number
from align.store.atomic_write import write_text_atomically

HERE = Path(__file__).parents[1]
PREVIEW = "preview.html"
MOST_TEXT = 3_000
"""Characters of one message or run of tokens; the middle of a longer one is left out."""
MOST_CONTEXT = 900
"""Characters of a run of tokens that is not trained on, so that what is trained on stays in sight."""
MOST_NOTES = 4_000


def write_preview(
    folder: Path,
    recipe: Mapping[str, Any],
    name: str,
    out: Path | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
) -> Path:
    """Write the page about the build in ``folder`` to ``out`` (by default ``folder/preview.html``); returns its path.

    ``recipe`` is the recipe as plain values. With ``tokenizer`` samples are shown as the tokens a model is given,
    those trained on in color, as ``max_length`` cuts them.
    """
    ledger, found = read_ledger(folder), look(folder)
    Panel.made = 0  # names in the figures count from here, so that the page does not depend on what was drawn before
    html = _template().render(
        name=name,
        style=Markup("\n".join((HERE / file).read_text(encoding="utf-8") for file in ("page.css", "preview.css"))),  # noqa: S704
        recipe=yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=110) if recipe else "",
        kind=str(recipe.get("kind", "")),
        description=str(recipe.get("description", "")),
        ledger=ledger,
        dropped=sum(ledger["dropped"].values()),
        license=of_mixture(source.get("license") for source in ledger["sources"]),
        sources=_sources(ledger, found),
        steps=[_step(line, ledger["rows_in"]) for line in ledger.get("steps", [])],
        figures=figures(found.lengths),
        samples=[
            {"source": source, "rows": [_sample(row, split, tokenizer, max_length) for split, row in some]}
            for source, some in found.samples.items()
        ],
        hidden=len(found.lengths) - len(found.samples),
        masks=tokenizer is not None,
        clusters=[_cluster(cluster) for cluster in found.clusters],
        duplicates=found.duplicates,
    )
    out = out or folder / PREVIEW
    write_text_atomically(out, html)
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
    environment.filters.update(count=count, number=number)
    return environment.get_template("preview.html.jinja")


def _sources(ledger: Mapping[str, Any], found: Found) -> list[dict[str, Any]]:
    lines = []
    for line in ledger["sources"]:
        lengths = found.lengths.get(line["source"])
        sides = list(lengths.answers.values())[:1] if lengths else []
        license = normalize(line.get("license"))
        lines.append(
            {
                **line,
                "license": license,
                "unknown": license == "unknown",
                "share": line["rows_out"] / ledger["rows_out"] if ledger["rows_out"] else 0,
                "splits": dict(lengths.rows) if lengths else {},
                "prompt": quantile(lengths.prompt, 0.5) if lengths else 0,
                "answer": quantile(sides[0], 0.5) if sides else None,
                "lost": sum(line["dropped"].values()),
            }
        )
    return lines


def _step(line: Mapping[str, Any], records: int) -> dict[str, Any]:
    """A line of the steps' table; bars are shares of all records that were read."""
    whole = max(1, records, line["rows_in"] + line["added"])
    notes = json.dumps(line.get("notes") or {}, ensure_ascii=False, indent=1)
    reasons = [
        {
            "reason": reason,
            "rows": rows,
            "width": 100 * rows / whole,
            "by_source": {
                source: part["dropped"][reason]
                for source, part in (line.get("by_source") or {}).items()
                if part["dropped"].get(reason)
            },
            "examples": [
                {**example, "detail": json.dumps(example["detail"], ensure_ascii=False) if example["detail"] else ""}
                for example in (line.get("examples") or {}).get(reason, [])
            ],
        }
        for reason, rows in sorted(line["dropped"].items(), key=lambda one: (-one[1], one[0]))
    ]
    return {
        **line,
        "changed": line.get("changed", 0),
        "lost": sum(line["dropped"].values()),
        "width": 100 * line["rows_out"] / whole,
        "reasons": reasons,
        "notes": "" if notes == "{}" else _shortened(notes, MOST_NOTES),
    }


def _sample(row: Row, split: str, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": row.get("id", ""), "split": split, "views": [], "turns": [], "answers": []}
    if tokenizer is not None:
        for view in views(tokenizer, row, max_length):
            cut = [
                Piece(
                    _shortened(piece.text, MOST_TEXT if piece.trained else MOST_CONTEXT), piece.trained, piece.special
                )
                for piece in view.pieces(tokenizer)
            ]
            shown["views"].append(
                {
                    "title": view.title,
                    "tokens": len(view.ids),
                    "trained": sum(view.trained),
                    "notes": view.notes,
                    "pieces": cut,
                }
            )
        return shown
    shown["turns"] = [{"role": turn["role"], "text": _shortened(message_text(turn))} for turn in row.get("prompt", [])]
    if is_text(row):
        shown["turns"] = [{"role": "text", "text": _shortened(row["text"])}]
    for side in ("completion", "chosen", "rejected"):
        for turn in row.get(side, []):
            score = row.get(f"{side}_score")
            shown["answers"].append({"who": side, "score": score, "text": _shortened(message_text(turn))})
    for number_, one in enumerate(row.get("responses", []), start=1):
        answer = {"who": f"response {number_}", "score": one.get("score"), "text": _shortened(message_text(one))}
        shown["answers"].append(answer)
    if "label" in row and shown["answers"]:
        shown["answers"][0]["who"] = "a wanted answer" if row["label"] else "an unwanted answer"
    return shown


def _cluster(cluster: Cluster) -> dict[str, Any]:
    return {
        "size": cluster.size,
        "instead": cluster.instead,
        "kept": _question(cluster.kept) if cluster.kept else None,
        "members": [
            {
                "where": member["where"],
                "source": member["source"],
                "step": member["step"],
                "reason": member["reason"],
                "detail": json.dumps(
                    {name: value for name, value in member["detail"].items() if name != "instead"}, ensure_ascii=False
                ),
                "text": _question(member["row"]),
            }
            for member in cluster.members
        ],
    }


def _question(row: Row) -> str:
    """The prompt's turns and the first answer, or a text; short."""
    if is_text(row):
        return _shortened(row["text"], 700)
    answers: list[dict[str, str]] = next((row[side] for side in ("completion", "chosen") if row.get(side)), [])
    turns = [*row.get("prompt", []), *answers]
    return _shortened("\n".join(f"{turn.get('role', '')}: {message_text(turn)}" for turn in turns), 700)


def _shortened(text: str, most: int = MOST_TEXT) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]} … ({len(text) - most:,} more characters) … {text[-(most // 3) :]}"
