"""Formats with answers to a prompt: one answer, a preferred and a rejected one, labeled answers, scored answers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from align.config.recipe.format_options import ReadingOptions
from align.data.formats.fields import (
    CHOSEN,
    COMPLETIONS,
    CONVERSATIONS,
    LABELS,
    PROMPTS,
    REJECTED,
    RESPONSES,
    TEXTS,
    Malformed,
    TrackedRecord,
    Unusable,
    first,
    require,
)
from align.data.formats.messages import (
    THOUGHTS,
    is_number,
    lone_reply,
    messages,
    parse_json,
    prompt,
    read_thought,
    reply,
    text,
    tools,
    with_system,
    with_thought,
)
from align.data.rows import Dropped, Message, Row, assistant, user


def join_input(instruction: str, instruction_input: str) -> str:
    """Return an instruction and its input as one turn."""
    return f"{instruction}\n\n{instruction_input}" if instruction_input.strip() else instruction


def alpaca_prompt(record: dict[str, Any], instance: dict[str, Any] | None = None) -> list[Message]:
    """Return Alpaca's prompt: instruction and input in one turn, after the turns of ``history`` (pairs of texts).

    ``instance`` holds the input if the record does not.
    """
    turns: list[Message] = []
    for pair in record.get("history") or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Malformed("'history' holds something that is not a pair of question and answer")
        turns += [user(text(pair[0], "history")), assistant(text(pair[1], "history"))]
    instruction = text(record["instruction"], "instruction")
    instruction_input = text((record if instance is None else instance).get("input") or "", "input")
    return with_system(record, [*turns, user(join_input(instruction, instruction_input))])


def question(record: dict[str, Any], name: str, options: ReadingOptions) -> list[Message]:
    """Return the prompt in the field ``name``, after a system prompt; an instruction is read with Alpaca's fields."""
    if name == "instruction" and not isinstance(record[name], list):
        return alpaca_prompt(record)
    read = messages if name in CONVERSATIONS else prompt
    return with_system(record, read(record[name], name, options))


def from_alpaca(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert instruction, input, output; also system and history."""
    return [_alpaca_draft(record, record)]


def _alpaca_draft(record: dict[str, Any], instance: dict[str, Any]) -> Row:
    """Return the draft of an instruction with an instance; a record with a single instance is its own instance."""
    return {"prompt": alpaca_prompt(record, instance), "completion": [assistant(text(instance["output"], "output"))]}


def from_dolly(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert instruction, context, response."""
    prompt_text = join_input(text(record["instruction"], "instruction"), text(record.get("context") or "", "context"))
    answer = assistant(text(record["response"], "response"))
    return [{"prompt": with_system(record, [user(prompt_text)]), "completion": [answer]}]


def from_self_instruct(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert an instruction and its instances (input, output) to a row for each."""
    instances = record["instances"]
    if not isinstance(instances, list) or not all(isinstance(item, dict) for item in instances):
        raise Malformed("'instances' is not a list of input and output")
    if not instances:
        raise Unusable("no instances")
    if any("output" not in item for item in instances):
        raise Malformed("'instances' has an item without 'output'")
    return [_alpaca_draft(record, item) for item in instances]


def from_prompt_completion(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert a prompt and its answer, each text or messages."""
    answer = require(record, COMPLETIONS)
    completion = lone_reply(record[answer], answer, options)
    # A column called reasoning is often a label's explanation, so only the names of chat servers count here.
    thought = read_thought(record, "", options, THOUGHTS[:2])
    completion["content"] = with_thought(completion["content"], thought)
    return [{"prompt": shared_prompt(record, options), "completion": [completion], "tools": tools(record)}]


def from_gsm8k(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert a word problem whose solution ends in ``#### number``."""
    solution = text(record["answer"], "answer")
    _, mark, final = solution.rpartition("####")
    if not mark or not re.search(r"\d", final):
        raise Unusable("no number after ####")
    # "<<48/2=24>>" is a note for a calculator, not part of the answer.
    answer = assistant(re.sub(r"<<[^<>]*>>", "", solution))
    prompt = with_system(record, [user(text(record["question"], "question"))])
    checks = json.dumps({"answer": final.strip().lstrip("$")})
    return [{"prompt": prompt, "completion": [answer], "checks": checks}]


def from_text(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert a document, which has only a text."""
    name = require(record, TEXTS)
    return [{"text": text(record[name], name)}]


def from_prompt(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert a prompt without an answer: text, or messages that an answer should follow."""
    name = require(record, (*PROMPTS, *CONVERSATIONS))
    return [{"prompt": question(record, name, options), "tools": tools(record)}]


TRUE = ("true", "yes", "1", "good", "desirable", "chosen")
FALSE = ("false", "no", "0", "bad", "undesirable", "rejected")
KINDS_WITH_REJECTED = ("preferences", "unpaired")
"""Kinds of rows that use the rejected answer."""


def parse_number(value: Any, name: str = "score") -> float | None:
    """Return a score as a finite number; None if there is none. Raises ``Malformed`` for anything else."""
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise Malformed(f"a {name} is {value!r}, expected a number") from None
    if not math.isfinite(number):
        raise Malformed(f"a {name} is {value!r}, expected a finite number")
    return number


def parse_label(value: Any) -> bool:
    """Return a label as a truth value. Text is read as a word, since any text would count as true otherwise."""
    if isinstance(value, bool):
        return value
    # CSV and tables write labels as 1, 1.0, "yes" and the like.
    word = str(int(value)) if isinstance(value, float) and value in (0, 1) else str(value).strip().lower()
    if word in TRUE or word in FALSE:
        return word in TRUE
    raise Malformed(f"a label is {value!r}, expected true or false")


def parse_transcript(transcript: str) -> list[Message] | None:
    """Return the turns of an hh-rlhf transcript, or None when text precedes the first turn.

    Turns are cut before chosen and rejected are compared: a comparison by characters would put the opening that both
    replies share into the prompt. The two line breaks before a role and the blank after its colon belong to the
    separator; all other white space is text.
    """
    # The split keeps the speakers, so names and texts alternate in ``rest``.
    head, *rest = re.split(r"\n\n(Human|Assistant): ?", transcript)
    if head.strip() or not rest:
        return None
    roles = {"Human": user, "Assistant": assistant}
    return [roles[role](content) for role, content in zip(rest[::2], rest[1::2], strict=True)]


def from_hh(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert two transcripts that differ in their last turn; kinds without pairs get only the chosen one."""
    chosen = _conversation(record, "chosen")
    draft: Row = {"prompt": chosen[:-1], "chosen": [chosen[-1]]}
    # Without use for the rejected side, its faults should not cost the row.
    if kind not in KINDS_WITH_REJECTED:
        return [draft]
    rejected = _conversation(record, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("prompts differ")
    return [draft | {"rejected": [rejected[-1]]}]


def _conversation(record: dict[str, Any], side: str) -> list[Message]:
    turns = parse_transcript(text(record[side], side))
    if turns is None:
        raise Unusable("not a transcript")
    if turns[-1]["role"] != "assistant":
        raise Unusable("last turn is not the assistant's")
    return turns


def from_preferences(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert chosen and rejected, each text, one message or a conversation, with a shared prompt field or inside."""
    chosen_name = require(record, CHOSEN)
    rejected_name = require(record, REJECTED)
    # Each side may carry its prompt; then both must be the same.
    prompt, chosen = reply(record[chosen_name], chosen_name, options)
    rejected_prompt, rejected = reply(record[rejected_name], rejected_name, options)
    if prompt != rejected_prompt:
        raise Unusable("prompts differ")
    prompt = with_system(record, prompt) if prompt else _prompt_field(record, chosen_name, rejected_name, options)
    draft: Row = {"prompt": prompt, "chosen": [chosen], "rejected": [rejected], "tools": tools(record)}
    for side in ("chosen", "rejected"):
        name = first(record, (f"{side}_score", f"score_{side}", f"{side}_rating", f"{side}-rating"))
        score = parse_number(record[name]) if name else None
        if score is not None:
            draft[f"{side}_score"] = score
    return [draft]


def _prompt_field(record: dict[str, Any], chosen: str, rejected: str, options: ReadingOptions) -> list[Message]:
    name = first(record, (*PROMPTS, *CONVERSATIONS))
    if name is None:
        names = ", ".join((*PROMPTS, *CONVERSATIONS))
        raise Malformed(f"'{chosen}' and '{rejected}' are single replies and there is no prompt ({names})")
    return question(record, name, options)


def from_unpaired(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert a labeled answer: prompt, completion and label, or messages and label."""
    label = parse_label(record[require(record, LABELS)])
    answer = first(record, COMPLETIONS)
    conversation = first(record, CONVERSATIONS)
    if answer is not None:
        prompt = question(record, require(record, (*PROMPTS, *CONVERSATIONS)), options)
        completion = lone_reply(record[answer], answer, options)
    elif conversation is not None:
        turns, completion = reply(messages(record[conversation], conversation, options), conversation, options)
        prompt = with_system(record, turns)
    else:
        raise Malformed(f"a label without an answer ({', '.join((*COMPLETIONS, *CONVERSATIONS))})")
    return [{"prompt": prompt, "completion": [completion], "label": label, "tools": tools(record)}]


CONTENTS = ("content", "text", "response", "completion", "answer", "output", "generated_text")
SCORES = ("score", "rating", "reward", "pm_score", "fine-grained_score", "overall_score")
RANKS = ("rank", "ranking")

TOP_SCORE = 10.0
BOTTOM_SCORE = 1.0
MIDDLE_RATING = 3.0
"""Middle of ratings from 1 to 5."""


def answers(record: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Return the answers, each with its text as ``content`` next to its other fields, and the name of their field."""
    name = require(record, RESPONSES)
    items = parse_json(record[name], name)
    if not isinstance(items, list):
        raise Malformed(f"'{name}' holds {type(items).__name__}, expected a list of answers")
    normalized = []
    for item in items:
        if isinstance(item, str) or is_number(item):
            normalized.append({"content": text(item, name)})
            continue
        if isinstance(item, list) and item and isinstance(item[-1], dict):
            item = item[-1]  # a conversation, whose last message is the answer
        key = first(item, CONTENTS) if isinstance(item, dict) else None
        if key is None:
            raise Malformed(f"'{name}' has an answer without its text ({', '.join(CONTENTS)})")
        content = {"content": text(item[key], f"{name}.{key}")}
        normalized.append(item.with_fields(content) if isinstance(item, TrackedRecord) else {**item, **content})
    return normalized, name


def shared_prompt(record: dict[str, Any], options: ReadingOptions) -> list[Message]:
    """Return the prompt of all answers."""
    return question(record, require(record, PROMPTS), options)


def list_beside_answers(record: dict[str, Any], names: Sequence[str], count: int) -> list[Any] | None:
    """Return the list with a value for each answer; None if the record has none."""
    name = first(record, names)
    values = parse_json(record[name], name) if name else None
    if values is not None and (not isinstance(values, list) or len(values) != count):
        raise Malformed(f"'{name}' does not have one value for each of the {count} answers")
    return values


def score_of(answer: dict[str, Any], field: str) -> float | None:
    """Return an answer's score: the value of a field (``a.b`` is field b of a), or ``auto``; None without a score."""
    if field == "auto":
        mean = mean_rating(answer)
        if mean is not None:
            return mean
        name = first(answer, SCORES)
        return parse_number(answer[name]) if name else None
    value: Any = answer
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    # UltraFeedback writes missing ratings as N/A.
    score = None if value == "N/A" else parse_number(value)
    mean = mean_rating(answer)
    if field == "overall_score" and score == TOP_SCORE and mean is not None and mean < MIDDLE_RATING:
        # UltraFeedback has about two thousand scores of 1 written as 10: those with low ratings.
        return BOTTOM_SCORE
    return score


def mean_rating(answer: dict[str, Any]) -> float | None:
    """Return the mean of UltraFeedback's ratings per aspect (helpfulness and so on), from 1 to 5; None without any."""
    annotations = answer.get("annotations")
    aspects = annotations.values() if isinstance(annotations, dict) else []
    ratings = [aspect.get("Rating", "N/A") for aspect in aspects if isinstance(aspect, dict)]
    parsed = [parse_number(rating) for rating in ratings if str(rating) not in ("N/A", "None", "")]
    numbers = [number for number in parsed if number is not None]
    return sum(numbers) / len(numbers) if numbers else None


def from_scored(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert answers with scores, in each answer or in a list next to them."""
    items, name = answers(record)
    values = list_beside_answers(record, ("scores", "ratings", "rewards"), len(items))
    if values is None:
        scores = [score_of(answer, options.score) for answer in items]
    else:
        scores = [parse_number(value) for value in values]
    if items and all(score is None for score in scores):
        fields = sorted({key for answer in items for key in answer if key != "content"})
        raise Malformed(
            f"no answer in '{name}' has a score ({options.score}); they have {', '.join(fields) or 'their text alone'}."
            " options.score names the field"
        )
    responses = [_response(answer, score, None) for answer, score in zip(items, scores, strict=True)]
    return [{"prompt": shared_prompt(record, options), "responses": responses, "tools": tools(record)}]


def from_ranked(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert answers with ranks, in each answer or in a list next to them; the smallest is the best.

    Answers without any ranks count as sorted, the best first.
    """
    items, name = answers(record)
    values = list_beside_answers(record, ("ranks", "ranking"), len(items))
    if values is None:
        # Ranks in the answers, else their order: lists of answers are often sorted from the best down.
        rank_names = [first(answer, RANKS) for answer in items]
        values = [None if key is None else answer[key] for answer, key in zip(items, rank_names, strict=True)]
        if all(value is None for value in values):
            values = list(range(len(items)))
    ranks = [parse_number(value, "rank") for value in values]
    if any(rank is None for rank in ranks):
        raise Malformed(f"some answers in '{name}' have a rank and some have none")
    responses = [_response(answer, None, rank) for answer, rank in zip(items, dense_ranks(ranks), strict=True)]
    return [{"prompt": shared_prompt(record, options), "responses": responses, "tools": tools(record)}]


def dense_ranks(ranks: Sequence[float | None]) -> list[int]:
    """Return ranks as 0, 1, 2 without gaps; ties stay ties."""
    order = sorted({rank for rank in ranks if rank is not None})
    if not order:
        raise Unusable("no answers")
    return [order.index(rank) for rank in ranks if rank is not None]


def _response(answer: dict[str, Any], score: float | None, rank: int | None) -> dict[str, Any]:
    response = {"content": answer["content"], "score": score, "rank": rank}
    if isinstance(answer.get("model"), str):
        response["model"] = answer["model"]
    return response
