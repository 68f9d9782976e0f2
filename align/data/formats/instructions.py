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
    return f"{instruction.strip()}\n\n{more.strip()}" if more.strip() else instruction.strip()


def asked(record: dict[str, Any]) -> list[Message]:
    """Alpaca's prompt: instruction and input in one turn, behind the turns of ``history`` (pairs of texts)."""
    turns: list[Message] = []
    for pair in record.get("history") or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Malformed("'history' holds something that is not a pair of question and answer")
        turns += [user(text(pair[0], "history").strip()), assistant(text(pair[1], "history").strip())]
    more = text(record.get("input") or "", "input")
    return with_system(record, [*turns, user(folded(text(record["instruction"], "instruction"), more))])


def from_alpaca(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """instruction, input, output; also system and history."""
    answer = assistant(text(record["output"], "output").strip())
    return [{"prompt": asked(record), "completion": [answer]}]


def from_dolly(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """instruction, context, response."""
    words = folded(text(record["instruction"], "instruction"), text(record.get("context") or "", "context"))
    answer = assistant(text(record["response"], "response").strip())
    return [{"prompt": [user(words)], "completion": [answer]}]


def from_self_instruct(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """An instruction and its instances (input, output): a row for each."""
    instances = record["instances"]
    if not isinstance(instances, list) or not all(isinstance(item, dict) for item in instances):
        raise Malformed("'instances' is not a list of input and output")
    if not instances:
        raise Unusable("no instances")
    return [
        draft
        for item in instances
        for draft in from_alpaca({**item, "instruction": record["instruction"]}, options, kind)
    ]


def from_prompt_completion(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """A prompt and its answer, each text or messages."""
    ask, answer = first(record, PROMPTS), first(record, COMPLETIONS)
    assert ask is not None and answer is not None
    before, completion = reply(record[answer], answer, options)
    if before:
        raise Malformed(f"'{answer}' holds {len(before) + 1} messages, expected the answer alone")
    found = with_system(record, prompt(record[ask], ask, options))
    return [{"prompt": found, "completion": [completion], "tools": tools(record)}]


def from_gsm8k(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """A word problem whose solution ends in ``#### number``."""
    solution, mark, final = text(record["answer"], "answer").rpartition("####")
    if not mark or not re.search(r"\d", final):
        raise Unusable("no number after ####")
    # "<<48/2=24>>" are notes to a calculator, not something to say.
    solution = re.sub(r"<<[^<>]*>>", "", solution).strip()
    number = final.strip().lstrip("$")
    question = user(text(record["question"], "question").strip())
    answer = assistant(f"{solution}\n#### {number}")
    return [{"prompt": [question], "completion": [answer], "checks": json.dumps({"answer": number})}]


def from_text(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """A document: text and nothing else."""
    name = first(record, TEXTS)
    assert name is not None
    return [{"text": text(record[name], name)}]


def from_prompt(record: dict[str, Any], options: FormatOptions, kind: str) -> list[Row | Dropped]:
    """A prompt alone: text, or messages up to where an answer is wanted."""
    name = first(record, (*PROMPTS, *CONVERSATIONS))
    assert name is not None
    value = record[name]
    found = messages(value, name, options) if name in CONVERSATIONS else prompt(value, name, options)
    return [{"prompt": with_system(record, found), "tools": tools(record)}]
