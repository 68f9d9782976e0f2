"""Formats with one answer to a prompt, and the formats ``prompt`` and ``text``."""

from __future__ import annotations

import json
import re
from typing import Any

from align.config.recipe.format_options import ReadingOptions
from align.data.formats.fields import COMPLETIONS, CONVERSATIONS, PROMPTS, TEXTS, Malformed, Unusable, first
from align.data.formats.messages import lone_reply, messages, prompt, text, tools, with_system
from align.data.rows import Dropped, Message, Row, assistant, user


def join_input(instruction: str, instruction_input: str) -> str:
    """Return an instruction and its input as one turn."""
    return f"{instruction}\n\n{instruction_input}" if instruction_input.strip() else instruction


def alpaca_prompt(record: dict[str, Any], instance: dict[str, Any] | None = None) -> list[Message]:
    """Return Alpaca's prompt: instruction and input in one turn, after the turns of ``history`` (pairs of texts).

    ``instance`` holds the input where the record does not.
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
    """Return the draft of an instruction and one of its instances; a record with a single instance is that itself."""
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
    prompt_name, answer = first(record, PROMPTS), first(record, COMPLETIONS)
    assert prompt_name is not None and answer is not None
    completion = lone_reply(record[answer], answer, options)
    return [{"prompt": question(record, prompt_name, options), "completion": [completion], "tools": tools(record)}]


def from_gsm8k(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert a word problem whose solution ends in ``#### number``."""
    solution = text(record["answer"], "answer")
    _, mark, final = solution.rpartition("####")
    if not mark or not re.search(r"\d", final):
        raise Unusable("no number after ####")
    # "<<48/2=24>>" is a note for a calculator, not part of the answer.
    answer = assistant(re.sub(r"<<[^<>]*>>", "", solution))
    problem = user(text(record["question"], "question"))
    number = final.strip().lstrip("$")
    return [
        {"prompt": with_system(record, [problem]), "completion": [answer], "checks": json.dumps({"answer": number})}
    ]


def from_text(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert a document: text and nothing else."""
    name = first(record, TEXTS)
    assert name is not None
    return [{"text": text(record[name], name)}]


def from_prompt(record: dict[str, Any], options: ReadingOptions, kind: str) -> list[Row | Dropped]:
    """Convert a prompt alone: text, or messages that an answer should follow."""
    name = first(record, (*PROMPTS, *CONVERSATIONS))
    assert name is not None
    return [{"prompt": question(record, name, options), "tools": tools(record)}]
