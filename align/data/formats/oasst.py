"""Open Assistant's message trees: turns of people, and several answers to each, ranked.

Preferences are the ranked answers to each turn, with the conversation up to it; instructions are conversations along
the best answers. A message that is left out (deleted, written by a model, in another language) takes what stands below
it with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from align.data.formats.fields import Malformed
from align.data.formats.messages import text
from align.data.formats.options import FormatOptions
from align.data.formats.responses import dense
from align.data.rows import Dropped, Message, Row, assistant, user

Node = dict[str, Any]
PEOPLE, MODEL = "prompter", "assistant"


def from_oasst(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """Drafts of one tree."""
    root = record["prompt"]
    if not isinstance(root, dict) or root.get("role") != PEOPLE:
        raise Malformed("'prompt' is not the first message of a tree (text, role prompter, replies)")
    if not wanted(root, options):
        return [Dropped("deleted, by a model, or of another language")]
    if kind in ("preferences", "unpaired"):
        return list(ranked(root, [], options)) or [Dropped("no two ranked answers")]
    drafts: list[Row | Dropped] = list(best(root, [], options))
    if not drafts and kind == "prompts":
        return [{"prompt": [_turn(root)]}]
    return drafts or [Dropped("no answers")]


def wanted(node: Node, options: FormatOptions) -> bool:
    """Whether the options keep a message."""
    return (
        (options.deleted or not node.get("deleted"))
        and (options.synthetic or not node.get("synthetic"))
        and (options.languages is None or node.get("lang") in options.languages)
    )


def replies(node: Node, role: str, options: FormatOptions) -> list[Node]:
    """The messages of ``role`` below a message that the options keep."""
    found = node.get("replies") or []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise Malformed("'replies' is not a list of messages")
    return [item for item in found if item.get("role") == role and wanted(item, options)]


def _turn(node: Node) -> Message:
    return (user if node["role"] == PEOPLE else assistant)(text(node.get("text"), "text"))


def ranked(node: Node, before: list[Message], options: FormatOptions) -> Iterator[Row | Dropped]:
    """One draft for each turn below ``node`` that has two ranked answers or more."""
    prompt = [*before, _turn(node)]
    answers = replies(node, MODEL, options)
    placed = [answer for answer in answers if answer.get("rank") is not None]
    if len(placed) > 1:
        ranks = dense([float(answer["rank"]) for answer in placed])
        order = sorted(range(len(placed)), key=ranks.__getitem__)
        responses = [{"content": _turn(placed[at])["content"], "score": None, "rank": ranks[at]} for at in order]
        yield {"prompt": prompt, "responses": responses}
    elif sum(reply.get("rank") is not None for reply in node.get("replies") or []) > 1:
        yield Dropped("ranked answers deleted, by a model, or of another language")
    for answer in answers:
        for turn in replies(answer, PEOPLE, options):
            yield from ranked(turn, [*prompt, _turn(answer)], options)


def best(node: Node, before: list[Message], options: FormatOptions) -> Iterator[Row]:
    """Conversations along the best answer to each turn; ``options.paths``: by its first way on, or each.

    A turn's answers without a rank come after those with one, in the order of the file.
    """
    answers = replies(node, MODEL, options)
    if not answers:
        return
    prompt = [*before, _turn(node)]
    chosen = min(answers, key=lambda answer: answer["rank"] if answer.get("rank") is not None else float("inf"))
    onward = [turn for turn in replies(chosen, PEOPLE, options) if replies(turn, MODEL, options)]
    if options.turns == "all" or not onward:
        yield {"prompt": prompt, "completion": [_turn(chosen)]}
    for turn in onward[:1] if options.paths == "best" else onward:
        yield from best(turn, [*prompt, _turn(chosen)], options)
