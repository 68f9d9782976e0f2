"""Rows as a model sees them: the rendered template in pieces, each either trained on or not, special tokens apart.

The ids and labels are those that training makes (``align.training.rows``), so what is shown is what is learned. A view
is one sequence of tokens: an instruction has one, a pair one for each side. Leaves out colors and escaping, which are
the page's and the terminal's. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.data.rows import Row, assistant, is_text
from align.errors import UserError

NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one fate, as text; a special token is a piece of its own."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class View:
    """One sequence: what it is, its tokens, which of them a loss is taken on, and what became of it."""

    title: str
    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    notes: tuple[str, ...] = ()

    def pieces(self, tokenizer: Any) -> list[Piece]:
        """Text in runs; together they are the decoded sequence."""
        return pieces(tokenizer, self.ids, self.trained)


def load_for_show(folder: Path | str, **options: Any) -> tuple[Any, list[str]]:
    """A tokenizer to look through, and what a model stage would put right in it first.

    ``folder`` is a model's folder, or a Hub name with ``revision`` among the options. Raises ``UserError`` without a
    chat template or an end token.
    """
    from align.models.pretrained import open_tokenizer
    from align.models.render import require_chat_template
    from align.models.special_tokens import require_turn_end

    tokenizer = open_tokenizer(folder, **options)
    require_chat_template(tokenizer, f"the tokenizer of {folder}")
    notes = []
    end = require_turn_end(tokenizer)
    if end is not None and end != tokenizer.eos_token_id:
        token = tokenizer.convert_ids_to_tokens(end)
        notes.append(f"eos is {tokenizer.eos_token!r}, but turns end with {token!r}, which a model stage makes the eos")
        tokenizer.eos_token = token
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {folder} has no eos token and its chat template writes none.")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        notes.append(f"pad is eos, {tokenizer.eos_token!r}; a model stage chooses another")
    return tokenizer, notes


def views(tokenizer: Any, row: Row, max_length: int | None = None) -> list[View]:
    """The row's sequences; ``max_length`` as of the training stage, None for no limit."""
    most = max_length or NO_LIMIT
    if is_text(row):
        ids = [int(token) for token in tokenizer.encode(row["text"], add_special_tokens=False)]
        return [View("text", tuple(ids), (True,) * len(ids))]
    if "chosen" in row and "rejected" in row:
        return _pair(tokenizer, row, most)
    if "responses" in row:
        return [
            replace(view, title=_response_title(number, response))
            for number, response in enumerate(row["responses"], start=1)
            for view in _supervised(tokenizer, row | _completion(response), most)
        ]
    if "completion" in row:
        found = _supervised(tokenizer, row, most)
        if "label" in row:
            title = "a wanted answer" if row["label"] else "an unwanted answer"
            return [replace(view, title=title) for view in found]
        return found
    return [_untrained(tokenizer, "prompt, up to where the answer begins", row)]


def _completion(response: dict[str, Any]) -> Row:
    return {"completion": [assistant(response["content"])], "completion_finished": response.get("finished")}


def _supervised(tokenizer: Any, row: Row, most: int) -> list[View]:
    from align.training.rows import MASKED, encode_supervised

    try:
        encoded = encode_supervised(tokenizer, [row], most)
    except UserError as error:
        return [_untrained(tokenizer, "supervised", row, "completion", str(error))]
    notes = tuple(encoded.counts)
    if not encoded.rows:
        return [_untrained(tokenizer, "supervised", row, "completion", *notes)]
    ids, labels = encoded.rows[0]["input_ids"], encoded.rows[0]["labels"]
    return [View("supervised", tuple(ids), tuple(label != MASKED for label in labels), notes)]


def _pair(tokenizer: Any, row: Row, most: int) -> list[View]:
    """Both sides as DPO takes them: the prompt's tokens untrained, the answer's trained."""
    from align.training.rows import encode_pairs

    sides = ("chosen", "rejected")
    try:
        encoded = encode_pairs(tokenizer, [row], most)
    except UserError as error:
        return [_untrained(tokenizer, side, row, side, str(error)) for side in sides]
    notes = tuple(encoded.counts)
    if not encoded.rows:
        return [_untrained(tokenizer, side, row, side, *notes) for side in sides]
    prompt = encoded.rows[0]["prompt_ids"]
    found = []
    for side in sides:
        answer = encoded.rows[0][f"{side}_ids"]
        trained = (False,) * len(prompt) + (True,) * len(answer)
        found.append(View(side, (*prompt, *answer), trained, notes))
    return found


def _untrained(tokenizer: Any, title: str, row: Row, side: str | None = None, *notes: str) -> View:
    """A sequence that nothing is learned from: the prompt and an answer, or without ``side`` the prompt alone."""
    from align.models.render import render_answered, render_prompt

    try:
        if side is None:
            ids = render_prompt(tokenizer, row["prompt"], row.get("tools"))
        else:
            ids = render_answered(tokenizer, row, side)
    except UserError as error:
        return View(title, (), (), (*dict.fromkeys((*notes, str(error))),))
    return View(title, tuple(ids), (False,) * len(ids), notes)


def _response_title(number: int, response: dict[str, Any]) -> str:
    said = [f"{name} {response[name]:g}" for name in ("score", "rank") if response.get(name) is not None]
    return " · ".join([f"response {number}", *said])


def pieces(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> list[Piece]:
    """``ids`` as text, cut where ``trained`` changes and around each special token."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
    found: list[Piece] = []
    start, before = 0, ""
    for end in range(1, len(ids) + 1):
        alone = ids[end - 1] in special
        goes_on = end < len(ids) and not alone and ids[end] not in special and trained[end] == trained[end - 1]
        if goes_on:
            continue
        # Decoded by itself a run would lose a space at its start with some tokenizers: whole beginnings are compared.
        whole = _decode(tokenizer, ids[:end])
        text = whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, ids[start:end])
        found.append(Piece(text, bool(trained[end - 1]), alone))
        start, before = end, whole
    return found


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
