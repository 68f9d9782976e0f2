"""Formats with one answer to a prompt, and the one with none."""

from __future__ import annotations

import json
import re
from typing import Any

from align.data.formats.fields import COMPLETIONS, CONVERSATIONS, PROMPTS, TEXTS, Malformed, Unusable, first
from align.data.formats.messages import messages, prompt, reply, text, tools, with_system
from align.data.formats.options import FormatOptions
from align.data.rows import Dropped, Message, Row, assistant, user


def folded(instruction: str, more: str) -> str:
    """An instruction and what it is about, as one turn."""
    return f"{instruction}\n\n{more}" if more.strip() else instruction


def asked(record: dict[str, Any], instance: dict[str, Any] | None = None) -> list[Message]:
    """Alpaca's prompt: instruction and input in one turn, behind the turns of ``history`` (pairs of texts).

    ``instance`` has the input where it is not the record.
    """
    turns: list[Message] = []
    for pair in record.get("history") or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Malformed("'history' holds something that is not a pair of question and answer")
        turns += [user(text(pair[0], "history")), assistant(text(pair[1], "history"))]
    more = text((record if instance is None else instance).get("input") or "", "input")
    return with_system(record, [*turns, user(folded(text(record["instruction"], "instruction"), more))])


def question(record: dict[str, Any], name: str, options: FormatOptions) -> list[Message]:
    """The prompt in the field ``name``, with what alpaca writes beside an instruction, or behind a system prompt."""
    if name == "instruction" and not isinstance(record[name], list):
        return asked(record)
    read = messages if name in CONVERSATIONS else prompt
    return with_system(record, read(record[name], name, options))


def from_alpaca(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """instruction, input, output; also system and history."""
    return [_alpaca_draft(record, record)]


def _alpaca_draft(record: dict[str, Any], instance: dict[str, Any]) -> Row:
    """A draft of an instruction and one of its instances, which is the record itself where it has one alone."""
    return {"prompt": asked(record, instance), "completion": [assistant(text(instance["output"], "output"))]}


def from_dolly(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """instruction, context, response."""
    words = folded(text(record["instruction"], "instruction"), text(record.get("context") or "", "context"))
    answer = assistant(text(record["response"], "response"))
    return [{"prompt": with_system(record, [user(words)]), "completion": [answer]}]


def from_self_instruct(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """An instruction and its instances (input, output): a row for each."""
    instances = record["instances"]
    if not isinstance(instances, list) or not all(isinstance(item, dict) for item in instances):
        raise Malformed("'instances' is not a list of input and output")
    if not instances:
        raise Unusable("no instances")
    if any("output" not in item for item in instances):
        raise Malformed("'instances' has an item without 'output'")
    return [_alpaca_draft(record, item) for item in instances]


def from_prompt_completion(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """A prompt and its answer, each text or messages."""
    ask, answer = first(record, PROMPTS), first(record, COMPLETIONS)
    assert ask is not None and answer is not None
    before, completion = reply(record[answer], answer, options)
    if before:
        raise Malformed(f"'{answer}' holds {len(before) + 1} messages, expected the answer alone")
    return [{"prompt": question(record, ask, options), "completion": [completion], "tools": tools(record)}]


def from_gsm8k(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """A word problem whose solution ends in ``#### number``."""
    solution = text(record["answer"], "answer")
    _, mark, final = solution.rpartition("####")
    if not mark or not re.search(r"\d", final):
        raise Unusable("no number after ####")
    # "<<48/2=24>>" are notes to a calculator, not something to say.
    answer = assistant(re.sub(r"<<[^<>]*>>", "", solution))
    problem = user(text(record["question"], "question"))
    number = final.strip().lstrip("$")
    return [
        {"prompt": with_system(record, [problem]), "completion": [answer], "checks": json.dumps({"answer": number})}
    ]


def from_text(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """A document: text and nothing else."""
    name = first(record, TEXTS)
    assert name is not None
    return [{"text": text(record[name], name)}]


def from_prompt(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """A prompt alone: text, or messages up to where an answer is wanted."""
    name = first(record, (*PROMPTS, *CONVERSATIONS))
    assert name is not None
    return [{"prompt": question(record, name, options), "tools": tools(record)}]
