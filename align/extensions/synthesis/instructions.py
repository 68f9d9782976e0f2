"""New instructions in the style of seeds (self-instruct, arXiv 2212.10560). Torch-free.

Requests are sent in rounds: each shows some seeds and some instructions from earlier rounds, so a round can be
answered in parallel and a resumed stage sends the same requests. Not implemented: a separate treatment of
classification tasks, and inputs and outputs; another ``synthesize`` stage answers the instructions.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from align.data.rows import Message, Row, user
from align.errors import UserError, missing_extra
from align.extensions.synthesis.config import InstructionsTask
from align.extensions.synthesis.selection import Ledger
from align.inference.requests import Answer
from align.store.json_files import numbered_lines

LEVEL = "candidates"
SOURCE = "synthetic/instructions"

_NUMBERED = re.compile(
    r"^[ \t]*(?:[#>*•-]+[ \t]*)?(?:task[ \t]+)?(\d{1,4})[ \t]*[.):]+\**[ \t]*(?:\d{1,4}[.)]+[ \t]+)*",
    re.IGNORECASE | re.MULTILINE,
)

Ask = Callable[[list[list[Message]], int], list[Answer]]
"""A function from conversations and the number of the first of them among all requests to their answers."""


class Seed(NamedTuple):
    """A seed instruction. A seed that needs an input is compared with, but not shown in requests."""

    text: str
    shown: bool = True


def read_seeds(path: Path) -> list[Seed]:
    """Return the seeds of a .jsonl file. Raises ``UserError`` with the line of a record that has none.

    Each line is a record with ``instruction``, and perhaps an input in ``input`` or in the first of ``instances``.
    """
    seeds = []
    for number, line in numbered_lines(path):
        try:
            record = json.loads(line)
            text = record["instruction"]
            instances = record.get("instances") or [record]
            seed_input = str(instances[0].get("input") or "")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"seeds: {path}:{number}: expected a JSON object with 'instruction' ({type(error).__name__}: {error})."
            ) from None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"seeds: {path}:{number}: its instruction is {text!r}; expected some text.")
        seeds.append(Seed(text.strip(), not seed_input.strip()))
    return seeds


def seeds_from_prompts(rows: list[Row]) -> list[Seed]:
    """Return the questions of single-turn prompts."""
    return [
        Seed(row["prompt"][0]["content"]) for row in rows if [message["role"] for message in row["prompt"]] == ["user"]
    ]


def make_instructions(
    task: InstructionsTask, seeds: list[Seed], ask: Ask, seed: int, ledger: Ledger
) -> tuple[list[Row], list[dict[str, object]]]:
    """Return rows of kind prompts, each with its ``similarity`` to the nearest earlier text, and a record per answer.

    Stops at ``task.count`` instructions or ``task.max_requests`` requests. Raises ``UserError`` for too few seeds.
    """
    return _InstructionGenerator(task, seeds, seed, ledger).run(ask)


class _InstructionGenerator:
    """Collects new instructions from numbered lists, and drops those that are faulty or too similar to known ones."""

    def __init__(self, task: InstructionsTask, seeds: list[Seed], seed: int, ledger: Ledger) -> None:
        self.task = task
        self.seed = seed
        self.ledger = ledger
        self.example_seeds = [example.text for example in seeds if example.shown]
        if len(self.example_seeds) < task.seed_examples + task.made_examples:
            raise UserError(
                f"seeds: {len(self.example_seeds)} of {len(seeds)} stand alone, without an input; each request shows "
                f"{task.seed_examples + task.made_examples} (seed_examples and made_examples). Add seeds or show fewer."
            )
        # Seeds count as known texts, so no new instruction repeats one.
        self.pool = Pool()
        for example in seeds:
            self.pool.add(example.text)
        self.rows: list[Row] = []
        self.records: list[dict[str, object]] = []
        words = "|".join(re.escape(word) for word in task.blacklist)
        self.blacklist = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE) if words else None
        ledger.add(LEVEL, 0)

    def run(self, ask: Ask) -> tuple[list[Row], list[dict[str, object]]]:
        """Send requests in rounds until there are enough instructions or no requests are left."""
        requests = 0
        max_requests = self.task.max_requests or self.task.count
        while len(self.rows) < self.task.count and requests < max_requests:
            numbers = range(requests, min(max_requests, requests + self.task.at_once))
            questions = [self._question(self._examples(number)) for number in numbers]
            answers = ask([[user(question)] for question in questions], requests)
            for number, answer in zip(numbers, answers, strict=True):
                self._read_answer(number, answer)
            requests = numbers.stop
        return self.rows, self.records

    def _examples(self, number: int) -> list[str]:
        """Return the examples of request ``number``, which the seed and the instructions so far decide."""
        # One stream per request, so a resumed run builds the same requests and reads them from the cache.
        rng = random.Random(f"{self.seed}:{number}")  # noqa: S311  (data, not secrecy)
        new = [row["prompt"][0]["content"] for row in self.rows]
        chosen = rng.sample(new, min(self.task.made_examples, len(new)))
        # The first rounds have few new instructions, so seeds take the places that are left.
        chosen += rng.sample(self.example_seeds, self.task.seed_examples + self.task.made_examples - len(chosen))
        rng.shuffle(chosen)
        return chosen

    def _question(self, examples: list[str]) -> str:
        tasks = "\n".join(f"{number}. {' '.join(text.split())}" for number, text in enumerate(examples, 1))
        first = len(examples) + 1
        return self.task.prompt.format(tasks=tasks, first=first, last=len(examples) + self.task.per_request)

    def _read_answer(self, number: int, answer: Answer) -> None:
        where = f"request {number}"
        ledger = self.ledger
        ledger.add("requests")
        items = [] if answer.error or answer.refused else list(parse_list(answer.text))
        self.records.append({"request": number, "text": answer.text, "finished": answer.finished, "tasks": len(items)})
        if not items:
            ledger.drop("requests", _no_items(answer), where, answer.text, error=answer.error)
            return
        ledger.keep("requests")
        for place, text in enumerate(items):
            ledger.add(LEVEL)
            is_last = place == len(items) - 1
            # The last item of a truncated answer is incomplete.
            if is_last and not answer.finished:
                ledger.drop(LEVEL, "cut off at max_tokens", where, text)
            elif len(self.rows) >= self.task.count:
                ledger.drop(LEVEL, "more than count", where, text)
            else:
                self._judge(where, text)

    def _judge(self, where: str, text: str) -> None:
        reason, detail = self._find_fault(text)
        if reason:
            self.ledger.drop(LEVEL, reason, where, text, **detail)
            return
        nearest = self.pool.nearest(text) or Nearest(0.0, "")
        if nearest.similarity > self.task.max_similarity + 1e-9:  # 2 LCS / (m + n) is rounded
            similarity = round(nearest.similarity, 4)
            self.ledger.drop(LEVEL, "not novel", where, text, similarity=similarity, nearest=nearest.text)
            return
        self.pool.add(text)
        self.ledger.keep(LEVEL)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        row = {"id": name, "source": SOURCE, "prompt": [user(text)], "checks": ""}
        self.rows.append({**row, "similarity": nearest.similarity})

    def _find_fault(self, text: str) -> tuple[str, dict[str, object]]:
        """Return self-instruct's reason to drop a text, and its details; an empty reason for a good text."""
        task = self.task
        words = len(text.split())
        if words < task.min_words:
            return f"fewer than {task.min_words} words", {"words": words}
        if words > task.max_words:
            return f"more than {task.max_words} words", {"words": words}
        if not text[0].isalnum() and text[0] not in "\"'“‘«¿¡(":
            return "begins with a sign", {"sign": text[0]}
        start = next((phrase for phrase in task.blacklist_starts if text.lower().startswith(phrase.lower())), None)
        if start is not None:
            return "begins with a phrase of the blacklist", {"phrase": start}
        hit = self.blacklist.search(text) if self.blacklist is not None else None
        if hit:
            return "holds a word of the blacklist", {"word": hit[0].lower()}
        return "", {}


def _no_items(answer: Answer) -> str:
    """Return the reason why an answer has no items."""
    if answer.error:
        return "request failed"
    if answer.refused:
        return "refused by the endpoint"
    return "no numbered list in the answer" if answer.text.strip() else "empty answer"


def parse_list(text: str) -> Iterator[str]:
    """Yield the items of a numbered list (``9. ...``, ``9) ...``, ``Task 9: ...``), without the text before the first.

    An item ends at the next higher number, so a list within an item stays part of it.
    """
    marks: list[re.Match[str]] = []
    for match in _NUMBERED.finditer(text):
        # Numbers must rise: a list inside an item counts from 1 again and does not begin a new item.
        if not marks or int(match[1]) > int(marks[-1][1]):
            marks.append(match)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=False):
        item = "\n".join(line.strip() for line in text[mark.end() : end].strip().splitlines()).strip("* \n")
        if item:
            yield item


try:
    from rapidfuzz import process
    from rapidfuzz.distance import Indel
except ModuleNotFoundError:
    raise missing_extra("rapidfuzz", "data", "synthesize with task: instructions") from None

# Letters and digits in lower case, as in Google's rouge_score; here of every script, and in scripts without spaces
# every character is a word.
_WORD = re.compile(r"[^\W_]+")
_UNSPACED = re.compile(r"([\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_CODES = 0x110000


def rouge_words(text: str) -> list[str]:
    """Return the words that ROUGE-L compares."""
    return _WORD.findall((text if text.isascii() else _UNSPACED.sub(r" \1 ", text)).lower())


class Nearest(NamedTuple):
    """The most similar text of the pool, and its similarity: 0 without a common word, 1 for the same words."""

    similarity: float
    text: str


class Pool:
    """Texts to compare with, indexed by their number of words."""

    def __init__(self) -> None:
        self._codes: dict[str, str] = {}
        self._texts: defaultdict[int, list[str]] = defaultdict(list)  # by number of words
        self._coded: defaultdict[int, list[str]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Add a text to the pool."""
        coded = self._code(text)
        self._texts[len(coded)].append(text)
        self._coded[len(coded)].append(coded)

    def __len__(self) -> int:
        return sum(map(len, self._texts.values()))

    def _code(self, text: str) -> str:
        """Return the text with each word as one character. Beyond a million different words some share one."""
        return "".join(self._codes.setdefault(word, chr(len(self._codes) % _CODES)) for word in rouge_words(text))

    def nearest(self, text: str) -> Nearest | None:
        """Return the most similar text, among equals a text of similar length; None if no text shares a word."""
        coded = self._code(text)
        best: Nearest | None = None
        # Nearest lengths first. The lengths already bound the similarity, so most texts need no comparison.
        for length in sorted(self._coded, key=lambda length: (abs(length - len(coded)), length)):
            lower_bound = 0.0 if best is None else best.similarity
            upper_bound = 2 * min(length, len(coded)) / max(1, length + len(coded))
            if upper_bound <= lower_bound:
                continue
            # Below the cutoff rapidfuzz gives up early and returns None.
            match = process.extractOne(
                coded, self._coded[length], scorer=Indel.normalized_similarity, score_cutoff=lower_bound or None
            )
            if match is None:
                continue
            _, similarity, index = match
            if similarity > lower_bound:
                best = Nearest(similarity, self._texts[length][index])
        return best
