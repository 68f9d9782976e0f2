"""Writes ``preview.html`` about a build, and shows rows as a model sees them.

The page has the sources of the rows, the rows that every step dropped and why, and sample rows. It is one file without
a script. Nothing that a dataset wrote becomes markup: Jinja escapes it, hidden characters are spelled out, and a
content security policy forbids to fetch or run anything. Its texts include dropped rows, so ``align data push`` skips
it. The same build gives the same page.

A view of a row is one sequence of tokens: an instruction has a single view, a pair a view for each side. Ids and
labels are made by the code that training uses (``align.training.rows``), so a view shows exactly the tokens that are
learned. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from align.data.builds.build_files import kept_texts, message_text, read_ledger
from align.data.card import mixture_license
from align.data.rows import Row, assistant, is_text
from align.errors import UserError
from align.report.dataset.build_summary import BuildSummary, Cluster, Lengths, length_plots, quantile, summarize
from align.report.page.panels import Panel
from align.report.page.templates import load_template, style_sheets
from align.report.run.data_ledgers import source_row, step_row
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
    ``max_length`` tokens, with the trained tokens in color.
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
        lengths = summary.lengths.get(line["source"], Lengths())
        answers = list(lengths.answers.values())
        rows.append(
            {
                **source_row(line),
                "share": line["rows_out"] / ledger["rows_out"] if ledger["rows_out"] else 0,
                "splits": lengths.rows,
                "prompt": quantile(lengths.prompt, 0.5) if lengths.prompt.any() else None,
                "answer": quantile(answers[0], 0.5) if answers else None,
            }
        )
    return rows


def _step_row(line: Mapping[str, Any], records: int) -> dict[str, Any]:
    """Return a row of the table of steps, with examples of the rows that it dropped."""
    row = step_row(line, records)
    for reason in row["reasons"]:
        reason["examples"] = []
        for example in (line.get("examples") or {}).get(reason["reason"], []):
            detail = json.dumps(example["detail"], ensure_ascii=False) if example["detail"] else ""
            reason["examples"].append({**example, "detail": detail})
    notes = json.dumps(line["notes"], ensure_ascii=False, indent=1) if line.get("notes") else ""
    return {**row, "notes": _shorten(notes, MAX_NOTES)}


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
            pieces.append(replace(piece, text=_shorten(piece.text, MAX_TEXT if piece.trained else MAX_CONTEXT)))
        counts = {"tokens": len(view.ids), "trained": sum(view.trained)}
        views.append({"title": view.title, **counts, "notes": view.notes, "pieces": pieces})
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
    members = []
    for member in cluster.members:
        detail = {name: value for name, value in member["detail"].items() if name != "instead"}
        text = _summary_text(member["row"])
        members.append({**member, "detail": json.dumps(detail, ensure_ascii=False), "text": text})
    stays = _summary_text(cluster.kept) if cluster.kept else None
    return {"size": cluster.size, "instead": cluster.instead, "kept": stays, "members": members}


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


NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Piece:
    """Text of a run of tokens that are all trained on or all not; a special token is a piece by itself."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class View:
    """A sequence of tokens: its title, ids, which tokens count in the loss, and notes such as cuts."""

    title: str
    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    notes: tuple[str, ...] = ()

    def pieces(self, tokenizer: Any) -> list[Piece]:
        """Return the sequence as pieces, which together are its decoded text."""
        return split_pieces(tokenizer, self.ids, self.trained)


def load_preview_tokenizer(folder: Path | str, **options: Any) -> tuple[Any, list[str]]:
    """Return a tokenizer to view rows with, and notes on a model stage's corrections to it.

    ``folder`` is a model's folder, or a Hub name with ``revision`` among the options. The end-of-turn token becomes its
    eos token, as in a model stage. Raises ``UserError`` without a chat template or an end token.
    """
    from align.models.chat.render import require_chat_template
    from align.models.chat.special_tokens import require_turn_end
    from align.models.pretrained import open_tokenizer

    tokenizer = open_tokenizer(folder, **options)
    require_chat_template(tokenizer, f"the tokenizer of {folder}")
    notes = []
    end = require_turn_end(tokenizer)
    if end is not None and end != tokenizer.eos_token_id:
        token = tokenizer.convert_ids_to_tokens(end)
        notes.append(f"eos is {tokenizer.eos_token!r}, but turns end with {token!r}, which a model stage makes the eos")
        # A model stage also makes this correction; without it the view would differ from training.
        tokenizer.eos_token = token
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {folder} has no eos token and its chat template writes none.")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        notes.append(f"pad is eos, {tokenizer.eos_token!r}; a model stage chooses another")
    return tokenizer, notes


def token_views(tokenizer: Any, row: Row, max_length: int | None = None) -> list[View]:
    """Return the row's sequences; ``max_length`` is the training stage's, in tokens; None for no limit."""
    limit = max_length or NO_LIMIT
    if is_text(row):
        ids = [int(token) for token in tokenizer.encode(row["text"], add_special_tokens=False)]
        return [View("text", tuple(ids), (True,) * len(ids))]
    # The fields of a row tell its kind, as in training.
    if "chosen" in row and "rejected" in row:
        return _pair(tokenizer, row, limit)
    if "responses" in row:
        views = []
        for number, response in enumerate(row["responses"], start=1):
            title = _response_title(number, response)
            completion = [assistant(response["content"])]
            answered = {**row, "completion": completion, "completion_finished": response.get("finished")}
            views += [replace(view, title=title) for view in _supervised(tokenizer, answered, limit)]
        return views
    if "completion" in row:
        views = _supervised(tokenizer, row, limit)
        if "label" in row:
            title = "a desirable answer" if row["label"] else "an undesirable answer"
            return [replace(view, title=title) for view in views]
        return views
    return [_untrained(tokenizer, "prompt, up to where the answer begins", row)]


def _supervised(tokenizer: Any, row: Row, limit: int) -> list[View]:
    """Return the sequence as SFT encodes it; untrained and with the reason if SFT would drop the row."""
    from align.training.rows import MASKED, encode_supervised

    encoded, notes = _encode(encode_supervised, tokenizer, row, limit)
    if encoded is None:
        return [_untrained(tokenizer, "supervised", row, "completion", *notes)]
    trained = tuple(label != MASKED for label in encoded["labels"])
    return [View("supervised", tuple(encoded["input_ids"]), trained, notes)]


def _encode(
    encode: Callable[..., Any], tokenizer: Any, row: Row, limit: int
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Return the row as ``encode`` encodes it for training, and notes; None and the reasons if training drops it."""
    try:
        encoded = encode(tokenizer, [row], limit)
    except UserError as error:
        return None, (str(error),)
    return next(iter(encoded.rows), None), tuple(encoded.counts)


def _pair(tokenizer: Any, row: Row, limit: int) -> list[View]:
    """Return both sides as DPO encodes them: the prompt's tokens untrained, the answer's trained."""
    from align.training.rows import encode_pairs

    sides = ("chosen", "rejected")
    encoded, notes = _encode(encode_pairs, tokenizer, row, limit)
    if encoded is None:
        return [_untrained(tokenizer, side, row, side, *notes) for side in sides]
    prompt = encoded["prompt_ids"]
    views = []
    for side in sides:
        answer = encoded[f"{side}_ids"]
        mask = encoded.get(f"{side}_mask", [1] * len(answer))
        trained = (False,) * len(prompt) + tuple(map(bool, mask))
        views.append(View(side, (*prompt, *answer), trained, notes))
    return views


def _untrained(tokenizer: Any, title: str, row: Row, side: str | None = None, *notes: str) -> View:
    """Return a sequence with no trained tokens: the prompt and an answer, or without ``side`` only the prompt."""
    from align.models.chat.render import render_answered, render_prompt

    try:
        if side is None:
            ids = render_prompt(tokenizer, row["prompt"], row.get("tools"))
        else:
            ids = render_answered(tokenizer, row, side)
    except UserError as error:
        return View(title, (), (), (*dict.fromkeys((*notes, str(error))),))
    return View(title, tuple(ids), (False,) * len(ids), notes)


def _response_title(number: int, response: dict[str, Any]) -> str:
    numbers = [f"{name} {response[name]:g}" for name in ("score", "rank") if response.get(name) is not None]
    return " · ".join([f"response {number}", *numbers])


def split_pieces(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> list[Piece]:
    """Return ``ids`` as text, cut where ``trained`` changes and around each special token."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
    pieces: list[Piece] = []
    start = 0
    prefix = ""
    for end in range(1, len(ids) + 1):
        is_special = ids[end - 1] in special
        if end < len(ids) and not is_special and ids[end] not in special and trained[end] == trained[end - 1]:
            continue  # the piece continues
        # With some tokenizers a run that is decoded separately loses a space at its start. So the sequence is decoded
        # from its beginning to each cut, and a piece is what the text grew by.
        text_so_far = _decode(tokenizer, ids[:end])
        is_prefix = text_so_far.startswith(prefix)
        text = text_so_far[len(prefix) :] if is_prefix else _decode(tokenizer, ids[start:end])
        pieces.append(Piece(text, bool(trained[end - 1]), is_special))
        start = end
        prefix = text_so_far
    return pieces


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
