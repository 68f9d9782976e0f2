"""Rows as a model sees them: the rendered template in pieces, each trained on or not, special tokens apart.

Ids and labels are made by the code that training uses (``align.training.rows``), so a view shows exactly the tokens
that are learned. A view is one sequence of tokens. An instruction has one view, and a pair has a view for each side.
Colors and escaping are left to the page and the terminal. Torch-free.
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
        return [
            replace(view, title=_response_title(number, response))
            for number, response in enumerate(row["responses"], start=1)
            for view in _supervised(tokenizer, row | _completion(response), limit)
        ]
    if "completion" in row:
        views = _supervised(tokenizer, row, limit)
        if "label" in row:
            title = "a desirable answer" if row["label"] else "an undesirable answer"
            return [replace(view, title=title) for view in views]
        return views
    return [_untrained(tokenizer, "prompt, up to where the answer begins", row)]


def _completion(response: dict[str, Any]) -> Row:
    return {"completion": [assistant(response["content"])], "completion_finished": response.get("finished")}


def _supervised(tokenizer: Any, row: Row, limit: int) -> list[View]:
    """Return the sequence as SFT encodes it; untrained and with the reason if SFT would drop the row."""
    from align.training.rows import MASKED, encode_supervised

    try:
        encoded = encode_supervised(tokenizer, [row], limit)
    except UserError as error:
        return [_untrained(tokenizer, "supervised", row, "completion", str(error))]
    notes = tuple(encoded.counts)
    if not encoded.rows:
        return [_untrained(tokenizer, "supervised", row, "completion", *notes)]
    ids, labels = encoded.rows[0]["input_ids"], encoded.rows[0]["labels"]
    return [View("supervised", tuple(ids), tuple(label != MASKED for label in labels), notes)]


def _pair(tokenizer: Any, row: Row, limit: int) -> list[View]:
    """Return both sides as DPO encodes them: the prompt's tokens untrained, the answer's trained."""
    from align.training.rows import encode_pairs

    sides = ("chosen", "rejected")
    try:
        encoded = encode_pairs(tokenizer, [row], limit)
    except UserError as error:
        return [_untrained(tokenizer, side, row, side, str(error)) for side in sides]
    notes = tuple(encoded.counts)
    if not encoded.rows:
        return [_untrained(tokenizer, side, row, side, *notes) for side in sides]
    prompt = encoded.rows[0]["prompt_ids"]
    views = []
    for side in sides:
        answer = encoded.rows[0][f"{side}_ids"]
        mask = encoded.rows[0].get(f"{side}_mask", [1] * len(answer))
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
    start, prefix = 0, ""
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
        start, prefix = end, text_so_far
    return pieces


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
