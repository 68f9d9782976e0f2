"""New instructions in the manner of seeds (self-instruct, arXiv 2212.10560). Torch-free.

Requests go out in rounds: each shows some seeds and some instructions made in earlier rounds, so a round can be
answered in parallel and a resumed stage asks the very same ones. Left out: telling classification tasks apart, and
writing inputs and outputs; another ``synthesize`` stage answers what comes out here.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from align.config.stages.synthesis_tasks import InstructionsTask
from align.data.novelty import Nearest, Pool
from align.data.rows import Message, Row, user
from align.errors import UserError
from align.inference.requests import Answer
from align.synthesis.counts import Book

LEVEL = "candidates"
SOURCE = "synthetic/instructions"

_NUMBERED = re.compile(
    r"^[ \t]*(?:[#>*•-]+[ \t]*)?(?:task[ \t]+)?(\d{1,4})[ \t]*[.):]+\**[ \t]*(?:\d{1,4}[.)]+[ \t]+)*",
    re.IGNORECASE | re.MULTILINE,
)

Ask = Callable[[list[list[Message]], int], list[Answer]]
"""Answers to some conversations, given with the number of the first of them among all."""


class Seed(NamedTuple):
    """A seed instruction; one that needs an input is compared with, but not shown."""

    text: str
    shown: bool = True


def read_seeds(path: Path) -> list[Seed]:
    """Seeds of a .jsonl file, a record a line with ``instruction``, and an input in ``input`` or the first of
    ``instances``. Raises ``UserError`` naming the line of a record that has none.
    """
    seeds = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record["instruction"]
            instances = record.get("instances") or [record]
            given = str(instances[0].get("input") or "")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"seeds: {path}:{number}: expected a JSON object with 'instruction' ({type(error).__name__}: {error})."
            ) from None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"seeds: {path}:{number}: its instruction is {text!r}; expected some text.")
        seeds.append(Seed(text.strip(), not given.strip()))
    return seeds


def seeds_of(rows: list[Row]) -> list[Seed]:
    """The questions of single-turn prompts."""
    return [Seed(row["prompt"][0]["content"]) for row in rows if [one["role"] for one in row["prompt"]] == ["user"]]


def make_instructions(
    task: InstructionsTask, seeds: list[Seed], ask: Ask, seed: int, book: Book
) -> tuple[list[Row], list[dict[str, object]]]:
    """Rows of kind prompts, each with its ``similarity`` to the nearest text before it, and a record of every answer.

    Stops at ``task.count`` instructions or ``task.max_requests`` requests. Raises ``UserError`` for too few seeds.
    """
    return _Making(task, seeds, seed, book).run(ask)


class _Making:
    def __init__(self, task: InstructionsTask, seeds: list[Seed], seed: int, book: Book) -> None:
        self.task, self.seed, self.book = task, seed, book
        self.shown = [one.text for one in seeds if one.shown]
        if len(self.shown) < task.seed_examples + task.made_examples:
            raise UserError(
                f"seeds: {len(self.shown)} of {len(seeds)} stand alone, without an input; each request shows "
                f"{task.seed_examples + task.made_examples} (seed_examples and made_examples). Add seeds or show fewer."
            )
        self.pool = Pool()
        for one in seeds:
            self.pool.add(one.text)
        self.rows: list[Row] = []
        self.records: list[dict[str, object]] = []
        words = "|".join(re.escape(word) for word in task.blacklist)
        self.blacklist = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE) if words else None
        book.take(LEVEL, 0)

    def run(self, ask: Ask) -> tuple[list[Row], list[dict[str, object]]]:
        asked, most = 0, self.task.max_requests or self.task.count
        while len(self.rows) < self.task.count and asked < most:
            numbers = range(asked, min(most, asked + self.task.at_once))
            examples = [self._examples(number) for number in numbers]
            answers = ask([[user(self._question(shown))] for shown in examples], asked)
            for number, shown, answer in zip(numbers, examples, answers, strict=True):
                self._read(number, len(shown), answer)
            asked = numbers.stop
        return self.rows, self.records

    def _examples(self, number: int) -> list[str]:
        """What request ``number`` shows; follows from the seed and what is made so far."""
        rng = random.Random(f"{self.seed}:{number}")  # noqa: S311  (data, not secrecy)
        made = [row["prompt"][0]["content"] for row in self.rows]
        chosen = rng.sample(made, min(self.task.made_examples, len(made)))
        chosen += rng.sample(self.shown, self.task.seed_examples + self.task.made_examples - len(chosen))
        rng.shuffle(chosen)
        return chosen

    def _question(self, examples: list[str]) -> str:
        tasks = "\n".join(f"{number}. {' '.join(text.split())}" for number, text in enumerate(examples, 1))
        first = len(examples) + 1
        return self.task.prompt.format(tasks=tasks, first=first, last=len(examples) + self.task.per_request)

    def _read(self, number: int, shown: int, answer: Answer) -> None:
        where, book = f"request {number}", self.book
        book.take("requests")
        found = list(parse_list(answer.text)) if not (answer.error or answer.refused) else []
        self.records.append({"request": number, "text": answer.text, "finished": answer.finished, "tasks": len(found)})
        if answer.error or answer.refused or not found:
            reason = "no numbered list in the answer" if answer.text.strip() else "empty answer"
            reason = "refused by the endpoint" if answer.refused else reason
            book.drop("requests", "request failed" if answer.error else reason, where, answer.text, error=answer.error)
            return
        book.keep("requests")
        for place, text in enumerate(found):
            book.take(LEVEL)
            last = place == len(found) - 1
            if last and not answer.finished:
                book.drop(LEVEL, "cut off at max_tokens", where, text)
            elif len(self.rows) >= self.task.count:
                book.drop(LEVEL, "more than count", where, text)
            else:
                self._judge(where, text)

    def _judge(self, where: str, text: str) -> None:
        reason, detail = self._fault(text)
        if reason:
            self.book.drop(LEVEL, reason, where, text, **detail)
            return
        nearest = self.pool.nearest(text) or Nearest(0.0, "")
        if nearest.similarity > self.task.max_similarity + 1e-9:  # 2 LCS / (m + n) is rounded
            like = round(nearest.similarity, 4)
            self.book.drop(LEVEL, "not novel", where, text, similarity=like, nearest=nearest.text)
            return
        self.pool.add(text)
        self.book.keep(LEVEL)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        row = {"id": name, "source": SOURCE, "prompt": [user(text)], "checks": ""}
        self.rows.append({**row, "similarity": nearest.similarity})

    def _fault(self, text: str) -> tuple[str, dict[str, object]]:
        """Why a text is no instruction to keep, after self-instruct's rules; an empty reason where it may be one."""
        task, words = self.task, len(text.split())
        if words < task.min_words:
            return f"fewer than {task.min_words} words", {"words": words}
        if words > task.max_words:
            return f"more than {task.max_words} words", {"words": words}
        if not text[0].isalnum() and text[0] not in "\"'“‘«¿¡(":
            return "begins with a sign", {"sign": text[0]}
        start = next((one for one in task.blacklist_starts if text.lower().startswith(one.lower())), None)
        if start is not None:
            return "begins with a phrase of the blacklist", {"phrase": start}
        hit = self.blacklist.search(text) if self.blacklist is not None else None
        return ("holds a word of the blacklist", {"word": hit[0].lower()}) if hit else ("", {})


def parse_list(text: str) -> Iterator[str]:
    """Items of a numbered list (``9. ...``, ``9) ...``, ``Task 9: ...``), each up to the next higher number, so that a
    list within an item stays in it; text before the first is left out.
    """
    marks: list[re.Match[str]] = []
    for found in _NUMBERED.finditer(text):
        if not marks or int(found[1]) > int(marks[-1][1]):
            marks.append(found)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=False):
        item = "\n".join(line.strip() for line in text[mark.end() : end].strip().splitlines()).strip("* \n")
        if item:
            yield item
