"""Rollouts on the page: episodes as conversations, and the lines of JSON files.

A missing file has no lines, and damaged lines are skipped. No line is trusted: texts come from a model and its
environment. The number of lines is bounded, each text is cut, and so is the whole. The page escapes them. Torch-free.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from align.data.final_answers import AnswerText, split_thought
from align.report.page.number_format import number

MAX_ROLLOUTS = 48
"""Responses of a stage on the page."""

Line = dict[str, Any]


def read_lines(path: Path, fields: Set[str]) -> Iterator[Line]:
    """Yield the objects of a JSONL file that have ``fields``; damaged lines are skipped, a missing file has none."""
    return (line for _, line in numbered_lines(path, fields))


def numbered_lines(path: Path, fields: Set[str]) -> Iterator[tuple[int, Line]]:
    """Yield the objects of :func:`read_lines`, each with the byte at which its line begins."""
    start = 0
    try:
        with path.open("rb") as file:
            for text in file:
                try:
                    line = parse_line(text)
                except (ValueError, RecursionError):  # the latter for brackets that nest without end
                    line = None
                if isinstance(line, dict) and fields <= line.keys():
                    yield start, line
                start += len(text)
    except OSError:
        return


def parse_line(text: bytes) -> Any:
    """Return the JSON value of a line, whose bytes may be damaged."""
    return json.loads(text.decode("utf-8", errors="replace"))


class SampleFile:
    """The lines of a ``samples.jsonl``, read one at a time, because an evaluation may have hundreds of thousands.

    A missing file has none, a damaged line is skipped. An index is valid after the file was read once from its start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = array("q")

    def __iter__(self) -> Iterator[Line]:
        self._starts = array("q")
        for start, sample in numbered_lines(self.path, {"prompt", "responses"}):
            self._starts.append(start)
            yield sample

    def __getitem__(self, index: int) -> Line:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            sample: Line = parse_line(file.readline())
            return sample


def read_episodes(path: Path) -> list[Line]:
    """Return the first :data:`MAX_ROLLOUTS` episodes of a stage that samples in an environment, as lines of rollouts.

    ``path`` is its ``samples.jsonl``, in which a line has all episodes of a prompt. No more of the file is read: it may
    have millions of lines, and the page is written again and again.
    """
    lines = (line for prompt in read_lines(path, {"prompt", "episodes"}) for line in _episode_lines(prompt))
    return list(islice(lines, MAX_ROLLOUTS))


def _episode_lines(prompt: Line) -> Iterator[Line]:
    episodes, scores = prompt["episodes"], prompt.get("scores") or []
    if not isinstance(episodes, list) or not isinstance(scores, list):
        return
    for index, episode in enumerate(episodes):
        if not isinstance(episode, dict):
            continue
        turns = episode.get("turns")
        score = scores[index] if index < len(scores) else None
        yield episode | {
            "prompt": prompt["prompt"],
            "response": str(episode.get("text", "")),
            "source": f"{prompt.get('split', '')} {prompt.get('id', '')}".strip(),
            "score": score if isinstance(score, int | float) else None,
            "turns": len(turns) if isinstance(turns, list) else 0,
        }


MAX_EPISODE = 40_000
"""Characters of a conversation, and of the prompt before it; later messages are omitted and counted."""
MAX_TEXT = 6_000
"""Characters of a message."""
MAX_RESULT = 3_000
"""Characters of a result, of the arguments of a call, and of the reason of a failure."""
MAX_NAME = 100
ENTRY_COST = 100
"""Characters that an entry costs besides its text, because thousands of empty messages also fill a page."""
ERRORS = {
    "malformed": "malformed call",
    "arguments": "no such tool or arguments",
    "raised": "the tool raised",
    "timeout": "timed out",
}
"""Words for what went wrong with a call."""
ENDS = {
    "finished": "■ ended by the model or its environment",
    "truncated": "✂ cut at the token limit",
    "max_turns": "✂ cut at max_turns",
    "failed": "✗ the environment failed",
}
"""Mark and words for the end of an episode."""

Message = Mapping[str, Any]


def is_episode(line: Mapping[str, Any]) -> bool:
    """Return True if a line describes an episode that can be shown."""
    messages, calls = line.get("messages"), line.get("calls")
    return _is_list_of_mappings(messages) and _is_list_of_mappings(calls)


def _is_list_of_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def episode_view(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of an episode on the page: ``prompt``, ``entries``, ``left_out``, ``facts``, ``end``, ``ok``.

    An entry has ``role``, ``note``, ``text``, ``calls`` and ``policy`` (True for the policy's own turns). A call has
    ``name`` (empty if it is malformed), ``arguments``, ``result``, ``note`` and ``ok``. All texts are bounded.
    """
    prompt, conversation = _split(line)
    budget = _Budget(MAX_EPISODE)
    messages = list(_messages(conversation, line))
    entries = []
    for message in messages:
        if budget.left <= 0:
            break
        entries.append(_entry(message, budget))
    return {
        "prompt": _prompt_turns(prompt),
        "entries": entries,
        "left_out": _left_out(len(messages) - len(entries), "message"),
        "facts": _facts(line),
        "end": _end(line),
        "ok": line.get("stop") == "finished",
    }


def cut(text: str, most: int) -> str:
    """Return a text of at most ``most`` characters, and how many more it had."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"


class _Budget:
    """Characters that are left for a conversation."""

    def __init__(self, characters: int) -> None:
        self.left = characters

    def cut(self, text: str, most: int) -> str:
        """Return a text cut to ``most`` characters and to the remaining budget, and count it."""
        most = max(0, min(most, self.left))
        self.left -= min(most, len(text))
        return cut(text, most)


@dataclass(frozen=True)
class _ViewedMessage:
    """A message of the conversation; ``turn`` counts the policy's messages from 1 and is 0 for all others."""

    role: str
    text: str
    turn: int = 0
    score: float | None = None
    calls: Sequence[Mapping[str, Any]] = ()


def _split(line: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    """Return the messages before the policy's first turn, and those from it on."""
    messages: list[Message] = line["messages"]
    sampled = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
    # A prompt may also have answers, as examples; an environment adds none. So the last answers are the policy's turns.
    turns = 0 if _failed_at_once(line) else _count(line.get("turns"))
    first = sampled[-turns:][0] if turns and sampled else len(messages)
    return messages[:first], messages[first:]


def _failed_at_once(line: Mapping[str, Any]) -> bool:
    """Return True if the environment failed before the first turn; an end of turn then replaces the response."""
    is_empty = not line.get("response") and line.get("turns") == line.get("tokens") == 1
    messages = line["messages"]
    has_turn = bool(messages) and messages[-1].get("role") == "assistant"
    return line.get("stop") == "failed" and is_empty and not has_turn


def _messages(conversation: Sequence[Message], line: Mapping[str, Any]) -> Iterator[_ViewedMessage]:
    """Yield the messages of a conversation; results of calls go with their calls."""
    turn = results = 0
    for message in conversation:
        role, text = str(message.get("role", "")), str(message.get("content") or "")
        if role == "assistant":
            records = [call for call in line["calls"] if call.get("turn") == turn]
            # Each call is answered by one message, right after the turn.
            results = len(records)
            calls = [*records, *_unanswered(message, records, line)]
            turn += 1
            yield _ViewedMessage(role, text, turn, _turn_score(line, turn), calls)
        elif role == "tool" and results:
            results -= 1
        else:
            results = 0
            yield _ViewedMessage(role, text)


def _unanswered(message: Message, records: Sequence[Mapping[str, Any]], line: Mapping[str, Any]) -> list[Message]:
    """Return the calls of a turn that have no result, because the episode ended before."""
    calls = message.get("tool_calls")
    if not _is_list_of_mappings(calls):
        return []
    answered = sum(record.get("error") != "malformed" for record in records)
    reason = "no result" if line.get("stop") == "failed" else "not run"
    return [{**call, "error": reason} for call in (calls or [])[answered:]]


def _turn_score(line: Mapping[str, Any], turn: int) -> float | None:
    scores = line.get("turn_scores")
    if not isinstance(scores, list) or turn > len(scores):
        return None
    score = scores[turn - 1]
    return score if isinstance(score, int | float) else None


def _entry(message: _ViewedMessage, budget: _Budget) -> dict[str, Any]:
    budget.left -= ENTRY_COST
    notes = [f"turn {message.turn}"] if message.turn else []
    if message.score is not None:
        notes.append(f"score {number(float(message.score))}")
    entry: dict[str, Any] = {
        "role": budget.cut(message.role, MAX_NAME),
        "note": " · ".join(notes),
        "policy": message.turn > 0,
        **_texts(message, budget),
        "calls": [],
    }
    for call in message.calls:
        if budget.left <= 0:
            break
        entry["calls"].append(_call(call, budget))
    entry["left_out"] = _left_out(len(message.calls) - len(entry["calls"]), "call")
    return entry


def _texts(message: _ViewedMessage, budget: _Budget) -> dict[str, str]:
    """Return the ``text`` of a message after its ``thought``, if the policy wrote one."""
    answer = split_thought(message.text) if message.turn else AnswerText.cut(message.text, 0)
    thought = {"thought": budget.cut(answer.thought, MAX_TEXT)} if answer.thought else {}
    return {"text": budget.cut(answer, MAX_TEXT), **thought}


def _call(call: Mapping[str, Any], budget: _Budget) -> dict[str, Any]:
    budget.left -= ENTRY_COST
    error = str(call.get("error") or "")
    seconds = call.get("seconds")
    notes = [f"✗ {ERRORS.get(error, cut(error, MAX_NAME))}"] if error else []
    if isinstance(seconds, int | float) and seconds > 0:
        notes.append(f"{number(float(seconds))} s")
    return {
        "name": budget.cut(str(call.get("name") or ""), MAX_NAME),
        "arguments": "" if error == "malformed" else budget.cut(_arguments(call.get("arguments")), MAX_RESULT),
        "result": budget.cut(str(call.get("result") or ""), MAX_RESULT),
        "note": " · ".join(notes),
        "ok": not error,
    }


def _arguments(arguments: Any) -> str:
    try:
        return json.dumps(arguments, ensure_ascii=False)
    except RecursionError:  # brackets that nest without end
        return "(arguments that nest too deeply to be shown)"


def _prompt_turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return the messages of the prompt as ``role`` and ``text``."""
    budget = _Budget(MAX_EPISODE)
    turns: list[dict[str, str]] = []
    for message in messages:
        if budget.left <= 0:
            turns.append({"role": "", "text": _left_out(len(messages) - len(turns), "message")})
            break
        budget.left -= ENTRY_COST
        role, text = str(message.get("role", "")), str(message.get("content") or "")
        turns.append({"role": budget.cut(role, MAX_NAME), "text": budget.cut(text, MAX_TEXT)})
    return turns


def _facts(line: Mapping[str, Any]) -> list[str]:
    """Return the episode's counts: turns, calls, and calls that went wrong, by kind."""
    turns = 0 if _failed_at_once(line) else _count(line.get("turns"))
    kinds = [str(call.get("error") or "") for call in line["calls"]]
    wrong = [f"{kinds.count(kind)} × {words}" for kind, words in ERRORS.items() if kind in kinds]
    return [_plural(turns, "turn"), _plural(len(kinds), "call"), *wrong]


def _end(line: Mapping[str, Any]) -> str:
    stop = str(line.get("stop") or "")
    words = ENDS.get(stop, cut(stop, MAX_NAME))
    failure = str(line.get("failure") or "")
    return f"{words}: {cut(failure, MAX_RESULT)}" if failure else words


def _left_out(count: int, noun: str) -> str:
    return f"… {_plural(count, f'more {noun}')}, left out for size" if count > 0 else ""


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
