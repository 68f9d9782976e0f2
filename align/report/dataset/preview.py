"""Writes ``preview.html`` about a build: sources of its rows, rows dropped at every step and why, and sample rows.

It is one file without a script. Nothing that a dataset wrote becomes markup: Jinja escapes it, hidden characters are
spelled out, and a content security policy forbids to fetch or run anything. Its texts include dropped rows, so
``align data push`` leaves it out. The same build gives the same page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from align.data.builds.build_files import kept_texts, message_text, read_ledger
from align.data.card import UNKNOWN, mixture_license, normalize_license
from align.data.rows import Row, is_text
from align.report.dataset.build_summary import BuildSummary, Cluster, quantile, summarize
from align.report.dataset.length_plots import length_plots
from align.report.dataset.token_views import Piece, token_views
from align.report.page.panels import Panel
from align.report.page.templates import load_template, style_sheets
from align.store.json_files import write_text_atomically

PREVIEW = "preview.html"
MAX_TEXT = 3_000
"""Characters of one message or run of tokens; the middle of a longer text is omitted."""
MAX_CONTEXT = 900
"""Characters of a run of tokens that is not trained on. The limit keeps the trained runs in sight."""
MAX_NOTES = 4_000
MAX_CLUSTER_TEXT = 700


def write_preview(
    folder: Path,
    recipe: Mapping[str, Any],
    name: str,
    out: Path | None = None,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
) -> Path:
    """Write the page about the build in ``folder`` to ``out`` (by default ``folder/preview.html``) and return its path.

    ``recipe`` is the recipe as plain values. With ``tokenizer`` samples are shown as a model's tokens, cut at
    ``max_length`` tokens, with the trained ones in color.
    """
    ledger = read_ledger(folder)
    summary = summarize(folder)
    Panel.start_page()
    html = load_template("preview.html.jinja").render(
        name=name,
        style=style_sheets("page.css", "preview.css", "dark.css"),
        recipe=yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=110) if recipe else "",
        kind=str(recipe.get("kind", "")),
        description=str(recipe.get("description", "")),
        ledger=ledger,
        dropped=sum(ledger["dropped"].values()),
        license=mixture_license(source.get("license") for source in ledger["sources"]),
        sources=_source_rows(ledger, summary),
        steps=[_step_row(line, ledger["rows_in"]) for line in ledger.get("steps", [])],
        figures=length_plots(summary.lengths),
        samples=[
            {"source": source, "rows": [_sample(row, split, tokenizer, max_length) for split, row in rows]}
            for source, rows in summary.samples.items()
        ],
        hidden=len(summary.lengths) - len(summary.samples),
        masks=tokenizer is not None,
        clusters=[_cluster(cluster) for cluster in summary.clusters],
        duplicates=summary.duplicates,
    )
    out = out or folder / PREVIEW
    write_text_atomically(out, html)
    return out


def _source_rows(ledger: Mapping[str, Any], summary: BuildSummary) -> list[dict[str, Any]]:
    """Return the lines of the table of sources; ``prompt`` and ``answer`` are median lengths in characters.

    The answer of a plain text is the text itself; its prompt is None.
    """
    rows = []
    for line in ledger["sources"]:
        lengths = summary.lengths.get(line["source"])
        answers = list(lengths.answers.values()) if lengths else []
        license = normalize_license(line.get("license"))
        rows.append(
            {
                **line,
                "license": license,
                "unknown": license == UNKNOWN,
                "share": line["rows_out"] / ledger["rows_out"] if ledger["rows_out"] else 0,
                "splits": dict(lengths.rows) if lengths else {},
                "prompt": quantile(lengths.prompt, 0.5) if lengths and lengths.prompt.any() else None,
                "answer": quantile(answers[0], 0.5) if answers else None,
                "lost": sum(line["dropped"].values()),
            }
        )
    return rows


def _step_row(line: Mapping[str, Any], records: int) -> dict[str, Any]:
    """Return a line of the table of steps; the widths of its bars are percentages of all ``records`` that were read."""
    # Steps that add rows may have more than were read, and a bar cannot be wider than its cell.
    total = max(1, records, line["rows_in"] + line["added"])
    notes = json.dumps(line.get("notes") or {}, ensure_ascii=False, indent=1)
    by_reason = sorted(line["dropped"].items(), key=lambda item: (-item[1], item[0]))
    return {
        **line,
        "changed": line.get("changed", 0),
        "lost": sum(line["dropped"].values()),
        "width": 100 * line["rows_out"] / total,
        "reasons": [_reason(line, reason, rows, total) for reason, rows in by_reason],
        "notes": "" if notes == "{}" else _shorten(notes, MAX_NOTES),
    }


def _reason(line: Mapping[str, Any], reason: str, rows: int, total: int) -> dict[str, Any]:
    """Return the rows that a step dropped for ``reason``, by source, with examples."""
    by_source = {
        source: counts["dropped"][reason]
        for source, counts in (line.get("by_source") or {}).items()
        if counts["dropped"].get(reason)
    }
    examples = [
        {**example, "detail": json.dumps(example["detail"], ensure_ascii=False) if example["detail"] else ""}
        for example in (line.get("examples") or {}).get(reason, [])
    ]
    return {
        "reason": reason,
        "rows": rows,
        "width": 100 * rows / total,
        "by_source": by_source,
        "examples": examples,
    }


def _sample(row: Row, split: str, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    """Return a row for the page: as tokens if there is a tokenizer, else as messages."""
    sample: dict[str, Any] = {"id": row.get("id", ""), "split": split, "views": [], "turns": [], "answers": []}
    sample["kept"] = [{"name": name, "text": _shorten(text)} for name, text in kept_texts(row).items()]
    if tokenizer is not None:
        return sample | {"views": _token_sample(row, tokenizer, max_length)}
    if is_text(row):
        turns = [{"role": "text", "text": _shorten(row["text"])}]
    else:
        turns = [{"role": turn["role"], "text": _shorten(message_text(turn))} for turn in row.get("prompt", [])]
    return sample | {"turns": turns, "answers": _answers(row)}


def _token_sample(row: Row, tokenizer: Any, max_length: int | None) -> list[dict[str, Any]]:
    """Return the row's sequences in pieces of bounded length."""
    views = []
    for view in token_views(tokenizer, row, max_length):
        pieces = []
        for piece in view.pieces(tokenizer):
            text = _shorten(piece.text, MAX_TEXT if piece.trained else MAX_CONTEXT)
            pieces.append(Piece(text, piece.trained, piece.special))
        views.append(
            {
                "title": view.title,
                "tokens": len(view.ids),
                "trained": sum(view.trained),
                "notes": view.notes,
                "pieces": pieces,
            }
        )
    return views


def _answers(row: Row) -> list[dict[str, Any]]:
    """Return the row's answers with their titles and scores."""
    answers: list[dict[str, Any]] = []
    for side in ("completion", "chosen", "rejected"):
        for turn in row.get(side, []):
            text = _shorten(message_text(turn))
            answers.append({"title": side, "score": row.get(f"{side}_score"), "text": text})
    for number, response in enumerate(row.get("responses", []), start=1):
        text = _shorten(message_text(response))
        answers.append({"title": f"response {number}", "score": response.get("score"), "text": text})
    if "label" in row and answers:
        # A row with a label has a single answer.
        answers[0]["title"] = "a desirable answer" if row["label"] else "an undesirable answer"
    return answers


def _cluster(cluster: Cluster) -> dict[str, Any]:
    """Return a cluster of duplicates for the page."""
    return {
        "size": cluster.size,
        "instead": cluster.instead,
        "kept": _summary_text(cluster.kept) if cluster.kept else None,
        "members": [_cluster_member(member) for member in cluster.members],
    }


def _cluster_member(member: Mapping[str, Any]) -> dict[str, Any]:
    detail = {name: value for name, value in member["detail"].items() if name != "instead"}
    return {
        "where": member["where"],
        "source": member["source"],
        "step": member["step"],
        "reason": member["reason"],
        "detail": json.dumps(detail, ensure_ascii=False),
        "text": _summary_text(member["row"]),
    }


def _summary_text(row: Row) -> str:
    """Return the prompt's turns and the first answer, or a plain text, shortened."""
    if is_text(row):
        return _shorten(row["text"], MAX_CLUSTER_TEXT)
    answer: list[dict[str, str]] = next((row[side] for side in ("completion", "chosen") if row.get(side)), [])
    turns = [*row.get("prompt", []), *answer]
    text = "\n".join(f"{turn.get('role', '')}: {message_text(turn)}" for turn in turns)
    return _shorten(text, MAX_CLUSTER_TEXT)


def _shorten(text: str, limit: int = MAX_TEXT) -> str:
    """Return ``text`` without its middle if it has more than ``limit`` characters."""
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]} … ({len(text) - limit:,} more characters) … {text[-(limit // 3) :]}"
