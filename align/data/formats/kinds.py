"""From a draft, which has all that a record says, to a row of the recipe's kind; and what no trainer could use."""

from __future__ import annotations

from itertools import pairwise

from align.data.rows import Dropped, Message, Row, answer_side, assistant, is_finished, is_text, row_id

ANSWERS = ("completion", "chosen", "rejected", "responses")
COMPLETION = ("completion", "completion_finished")
OF_PAIRS = ("chosen", "rejected", "chosen_score", "rejected_score", "chosen_finished", "rejected_finished", "flipped")
FOLLOWS = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}


def finished(draft: Row | Dropped, kind: str, check: bool) -> list[Row | Dropped]:
    """Rows of ``kind``, each checked; what the kind has no use for is left out."""
    if isinstance(draft, Dropped):
        return [draft]
    found: list[Row | Dropped] = []
    made = of_kind(draft, kind)
    for row in made:
        why = row if isinstance(row, Dropped) else unusable(row, mendable=not check)
        found.append(why if why is not None else _complete(row, draft, len(made)))  # type: ignore[arg-type]
    return found


def _complete(row: Row, draft: Row, count: int) -> Row:
    row = {name: value for name, value in row.items() if value is not None and (name != "tools" or value)}
    if not is_text(row):
        row.setdefault("checks", "")
    return {"id": draft["id"] if count == 1 and draft.get("id") else row_id(row), **_without(row, ("id",))}


def _without(row: Row, names: tuple[str, ...]) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def of_kind(draft: Row, kind: str) -> list[Row | Dropped]:
    """What a draft gives for a kind of dataset, unchecked."""
    if kind == "texts":
        return [_text(draft)]
    if is_text(draft):
        return [Dropped("a plain text, which has no turns")]
    if kind == "prompts":
        return [_without(draft, (*COMPLETION, "responses", "label", "steps", *OF_PAIRS))]
    if kind == "instructions":
        return [_instruction(draft)]
    if draft.get("responses") is not None:  # the pairs step makes pairs of them
        return [_without(draft, (*COMPLETION, "label", *OF_PAIRS))]
    paired = draft.get("chosen") is not None and draft.get("rejected") is not None
    if kind == "preferences":
        return [_without(draft, (*COMPLETION, "label")) if paired else Dropped("no pair of answers")]
    if draft.get("label") is not None and draft.get("completion") is not None:
        return [_without(draft, OF_PAIRS)]
    if not paired:
        return [Dropped("no label")]
    if _same(draft["chosen"], draft["rejected"]):
        return [Dropped("chosen equals rejected")]
    rest = _without(draft, (*COMPLETION, *OF_PAIRS))
    return [{**rest, **_completion(draft, side), "label": side == "chosen"} for side in ("chosen", "rejected")]


def _completion(draft: Row, side: str) -> Row:
    """One of a draft's answers as a completion, with the mark of one that was cut off."""
    finished = draft.get(f"{side}_finished")
    return {"completion": draft[side], **({} if finished is None else {"completion_finished": finished})}


def _text(draft: Row) -> Row | Dropped:
    """A draft's text; of a conversation what its turns say, a blank line between them, without any template."""
    kept = {name: draft[name] for name in ("id", "source") if draft.get(name)}
    if draft.get("text") is not None:
        kept |= {"text_finished": False} if not is_finished(draft, "text") else {}
        return kept | {"text": draft["text"]}
    if draft.get("label") is False:
        return Dropped("labeled as bad")
    side = answer_side(draft)
    turns = [*draft.get("prompt", []), *(draft.get(side) or [])]
    if draft.get(side) and not is_finished(draft, side):
        kept["text_finished"] = False
    return kept | {"text": "\n\n".join(turn["content"] for turn in turns if (turn.get("content") or "").strip())}


def _instruction(draft: Row) -> Row | Dropped:
    if draft.get("label") is False:
        return Dropped("labeled as bad")
    rest = _without(draft, (*COMPLETION, "responses", "label", *OF_PAIRS))
    if draft.get(answer_side(draft)):
        return rest | _completion(draft, answer_side(draft))
    if draft.get("responses") is None:
        return Dropped("last turn is not the assistant's")
    best = best_response(draft["responses"])
    if best is None:
        return Dropped("no answer with a score or a rank")
    cut_off = {"completion_finished": False} if best.get("finished") is False else {}
    return {**rest, "completion": [assistant(str(best["content"]))], **cut_off}


def best_response(responses: list[dict[str, object]]) -> dict[str, object] | None:
    """The one with the highest score, or the smallest rank where none has a score; the first of equals."""
    scored = [(float(item["score"]), item) for item in responses if item.get("score") is not None]  # type: ignore[arg-type]
    ranked = [(-float(item["rank"]), item) for item in responses if item.get("rank") is not None]  # type: ignore[arg-type]
    usable = [(value, item) for value, item in scored or ranked if str(item["content"]).strip()]
    return max(usable, key=lambda pair: pair[0])[1] if usable else None


def unusable(row: Row, mendable: bool = False) -> Dropped | None:
    """Why no trainer could use a row; None for a good one. ``mendable`` passes what a ``normalize`` step may mend."""
    if is_text(row):
        return None if row["text"].strip() else Dropped("empty text")
    prompt: list[Message] = row["prompt"]
    turns = [message for message in prompt if message["role"] != "system"]
    if not mendable:
        if any(message["role"] == "system" for message in prompt[1:]):
            return Dropped("system turn in the middle")
        if any(not _says(message) for message in prompt if message["role"] != "tool"):
            return Dropped("empty prompt turn")
        if turns and turns[0]["role"] != "user" and len(turns) > 1:
            return Dropped("first turn is not the user's")
        if any(later["role"] not in FOLLOWS[one["role"]] for one, later in pairwise(turns)):
            return Dropped("roles do not alternate")
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        return Dropped("last prompt turn is not the user's")
    sides = [row[name] for name in ("completion", "chosen", "rejected") if row.get(name) is not None]
    if any(not side or not _says(side[-1]) for side in sides):
        return Dropped("empty reply")
    if any(side[-1]["role"] != "assistant" for side in sides):
        return Dropped("last turn is not the assistant's")
    if row.get("chosen") is not None and _same(row["chosen"], row["rejected"]):
        return Dropped("chosen equals rejected")
    if row.get("responses") is not None and sum(bool(item["content"].strip()) for item in row["responses"]) < 2:
        return Dropped("fewer than two answers")
    return None


def _says(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _same(one: list[Message], other: list[Message]) -> bool:
    def content(side: list[Message]) -> list[tuple[str, str]]:
        return [(message["content"].strip(), message.get("tool_calls", "")) for message in side]

    return content(one) == content(other)
