"""Open Assistant's message trees: turns of people, and several answers to each, ranked.

Preferences are the ranked answers to each turn, with the conversation up to it; instructions are conversations along
the best answers. A message that is dropped (deleted, written by a model, in another language) takes all messages below
it with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from align.config.recipe.format_options import ReadingOptions
from align.data.formats.fields import Malformed
from align.data.formats.messages import text
from align.data.formats.responses import dense_ranks
from align.data.rows import Dropped, Message, Row, assistant, user

Node = dict[str, Any]
PROMPTER, ASSISTANT = "prompter", "assistant"


def from_oasst(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert one tree."""
    root = record["prompt"]
    if not isinstance(root, dict) or root.get("role") != PROMPTER:
        raise Malformed("'prompt' is not the first message of a tree (text, role prompter, replies)")
    if not is_selected(root, options):
        return [Dropped("deleted, by a model, or of another language")]
    if kind in ("preferences", "unpaired"):
        return list(ranked_turns(root, [], options)) or [Dropped("no two ranked answers")]
    drafts: list[Row | Dropped] = list(best_conversations(root, [], options))
    if not drafts and kind == "prompts":
        return [{"prompt": [_turn(root)]}]
    return drafts or [Dropped("no answers")]


def is_selected(node: Node, options: ReadingOptions) -> bool:
    """Return True where the options keep a message."""
    return (
        (options.deleted or not node.get("deleted"))
        and (options.synthetic or not node.get("synthetic"))
        and (options.languages is None or node.get("lang") in options.languages)
    )


def replies(node: Node, role: str, options: ReadingOptions) -> list[Node]:
    """Return the selected messages of ``role`` directly below a message."""
    children = node.get("replies") or []
    if not isinstance(children, list) or not all(isinstance(child, dict) for child in children):
        raise Malformed("'replies' is not a list of messages")
    return [child for child in children if child.get("role") == role and is_selected(child, options)]


def _turn(node: Node) -> Message:
    return (user if node["role"] == PROMPTER else assistant)(text(node.get("text"), "text"))


def ranked_turns(node: Node, before: list[Message], options: ReadingOptions) -> Iterator[Row | Dropped]:
    """Yield one draft for each turn from ``node`` downwards that has two ranked answers or more."""
    prompt = [*before, _turn(node)]
    answers = replies(node, ASSISTANT, options)
    ranked = [answer for answer in answers if answer.get("rank") is not None]
    if len(ranked) > 1:
        ranks = dense_ranks([float(answer["rank"]) for answer in ranked])
        order = sorted(range(len(ranked)), key=ranks.__getitem__)
        responses = [
            {"content": _turn(ranked[index])["content"], "score": None, "rank": ranks[index]} for index in order
        ]
        yield {"prompt": prompt, "responses": responses}
    # Ranked answers existed, but the options or deletions left fewer than two.
    elif sum(reply.get("rank") is not None for reply in node.get("replies") or []) > 1:
        yield Dropped("ranked answers deleted, by a model, or of another language")
    for answer in answers:
        for turn in replies(answer, PROMPTER, options):
            yield from ranked_turns(turn, [*prompt, _turn(answer)], options)


def best_conversations(node: Node, before: list[Message], options: ReadingOptions) -> Iterator[Row]:
    """Yield conversations along the best answer to each turn; ``options.paths`` follows one continuation of it or all.

    A turn's answers without a rank come after those with one, in the order of the file.
    """
    answers = replies(node, ASSISTANT, options)
    if not answers:
        return
    prompt = [*before, _turn(node)]
    # Rank 0 is the best; ``min`` keeps the first of several unranked answers.
    chosen = min(answers, key=lambda answer: answer["rank"] if answer.get("rank") is not None else float("inf"))
    continuations = [turn for turn in replies(chosen, PROMPTER, options) if replies(turn, ASSISTANT, options)]
    if options.turns == "all" or not continuations:
        yield {"prompt": prompt, "completion": [_turn(chosen)]}
    for turn in continuations[:1] if options.paths == "best" else continuations:
        yield from best_conversations(turn, [*prompt, _turn(chosen)], options)
