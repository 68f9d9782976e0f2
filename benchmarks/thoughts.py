"""Influence of a thought on the answer: a checkpoint answers after thoughts that were changed.

    python -m benchmarks.thoughts pipelines/reason.yaml --policy grpo --data data [--prompts 100] [--store DIR]

The checkpoint answers held-out questions greedily. Then its prompt is continued with a changed thought, and it writes
only the answer. If the thought carries the answer, a changed thought changes the answer, and another question's
thought leads to that question's answer. Both stages must be finished. The rows need a column ``answer``. Their column
``task``, or else their source, groups them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.final_answers import TAGS

Lines = list[str]
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Question:
    """A held-out question with the checkpoint's own thought and answer."""

    task: str
    right: str
    thought: Lines
    """Lines of the thought without its marks."""
    own: str


@dataclass(frozen=True)
class Condition:
    """Answers after one kind of thought."""

    name: str
    questions: Sequence[Question]
    answers: Sequence[str]
    donors: Sequence[Question]
    """Question to which each thought belongs: the question itself, except for foreign thoughts."""


def truncate(thought: Lines) -> Lines:
    """Return the first half of the lines."""
    return thought[: len(thought) // 2]


def shuffle(thought: Lines, generator: random.Random) -> Lines:
    """Return the lines in another order, with another last line; a thought of equal lines stays."""
    others = [index for index, line in enumerate(thought[:-1]) if line != thought[-1]]
    if not others:
        return thought
    last = generator.choice(others)
    rest = [line for index, line in enumerate(thought) if index != last]
    generator.shuffle(rest)
    return [*rest, thought[last]]


def donors(questions: Sequence[Question]) -> list[Question]:
    """Return for each question the next question of the same task whose own answer is another answer."""
    found = []
    for index, question in enumerate(questions):
        others = [*questions[index + 1 :], *questions[:index]]
        same = [other for other in others if other.task == question.task]
        found.append(next((other for other in same if other.own != question.own), question))
    return found


def make_thoughts(questions: Sequence[Question], seed: int = 0) -> dict[str, tuple[list[Lines], Sequence[Question]]]:
    """Return for each condition the thoughts, and the questions that they belong to."""
    generator = random.Random(seed)
    foreign = donors(questions)
    return {
        "own": ([question.thought for question in questions], questions),
        "truncated": ([truncate(question.thought) for question in questions], questions),
        "shuffled": ([shuffle(question.thought, generator) for question in questions], questions),
        "foreign": ([donor.thought for donor in foreign], foreign),
        "empty": ([[] for _ in questions], questions),
    }


def strip_marks(thought: str) -> Lines:
    """Return the lines of a thought between its marks."""
    text = thought.strip()
    for tag in TAGS:
        text = text.removeprefix(f"<{tag}>").removesuffix(f"</{tag}>")
    return text.strip().splitlines()


def table(conditions: Sequence[Condition]) -> list[str]:
    """Return the lines of a Markdown table, with a line for each task and each condition."""
    lines = ["| questions | thought | right | as with the own thought | answer of the thought's question |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for task in sorted({question.task for condition in conditions for question in condition.questions}):
        for condition in conditions:
            rows = list(zip(condition.questions, condition.answers, condition.donors, strict=True))
            rows = [row for row in rows if row[0].task == task]
            right = rate([answer == question.right for question, answer, _ in rows])
            unchanged = rate([answer == question.own for question, answer, _ in rows])
            foreign = rate([answer == donor.own for _, answer, donor in rows])
            lines.append(f"| {task}, {len(rows)} | {condition.name} | {right} | {unchanged} | {foreign} |")
    return lines


def rate(hits: Sequence[bool]) -> str:
    """Return a share with its 95 % interval (Wilson)."""
    from align.evaluation.statistics import wilson

    estimate = wilson(sum(hits), len(hits))
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


# ---- the checkpoint ----


class Responder:
    """A checkpoint that thinks and answers greedily."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        from align.config.runtime import EngineConfig, Runtime
        from align.inference.engine import open_engine
        from align.inference.thoughts import ThoughtReader
        from align.models.loading import load_tokenizer

        self.tokenizer: Any = load_tokenizer(folder)
        self.reader = ThoughtReader(self.tokenizer)
        runtime = Runtime(engine=EngineConfig(name=options.engine), threads=options.threads)
        length = options.prompt_tokens + 2 * options.max_tokens + ANSWER_TOKENS
        self.engine = open_engine(folder, runtime, precision="float32", max_length=length, seed=0, warn=print)
        self._options = options

    def think(self, rows: Sequence[dict[str, Any]]) -> list[Question]:
        """Return the questions with the checkpoint's own thoughts and answers; without a thought it has no lines."""
        from align.inference.protocol import Sampling
        from align.inference.thoughts import generate

        options = self._options
        sampling = Sampling(options.max_tokens, temperature=0.0, thinking_budget=options.thinking_budget)
        prompts = [self.render(row) for row in rows]
        questions = []
        for row, (response,) in zip(rows, generate(self.engine, self.reader, prompts, sampling), strict=True):
            answer = response.answer_text
            thought = strip_marks(answer.thought)
            task = str(row.get("task") or row["source"])
            questions.append(Question(task, str(row["answer"]).strip(), thought, answer.strip()))
        return questions

    def render(self, row: dict[str, Any]) -> list[int]:
        """Return the tokens of a row's prompt."""
        from align.models.chat.render import render_prompt

        return render_prompt(self.tokenizer, row["prompt"])

    def answer(self, rows: Sequence[dict[str, Any]], thoughts: Sequence[Lines]) -> list[str]:
        """Return the answers after thoughts that the checkpoint did not write."""
        from align.inference.protocol import Sampling

        prompts = []
        for row, thought in zip(rows, thoughts, strict=True):
            text = "\n".join(["<think>", *thought, "</think>\n\n"])
            prompts.append(self.render(row) + self.tokenizer(text, add_special_tokens=False)["input_ids"])
        sampled = self.engine.generate(prompts, Sampling(ANSWER_TOKENS, temperature=0.0))
        return [response.text.strip() for (response,) in sampled]


def measure(folder: Path, data: Path, options: argparse.Namespace) -> tuple[list[Question], list[Condition]]:
    """Return the held-out questions with the checkpoint's own answers, and its answers after each kind of thought.

    The second list is empty if it wrote no thought; it has only the questions with a thought and an answer.
    """
    from align.data.rows import read_rows

    rows = read_rows(data / "test.parquet")
    random.Random(0).shuffle(rows)  # rows may be in the order of their sources
    rows = rows[: options.prompts]
    responder = Responder(folder, options)
    questions = responder.think(rows)
    places = [index for index, question in enumerate(questions) if question.thought and question.own]
    conditions = []
    if places:
        thinking = [questions[index] for index in places]
        asked = [rows[index] for index in places]
        for name, (thoughts, owners) in make_thoughts(thinking).items():
            conditions.append(Condition(name, thinking, responder.answer(asked, thoughts), owners))
    responder.engine.close()
    return questions, conditions


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pipeline", help="pipeline file")
    parser.add_argument("--policy", required=True, metavar="STAGE", help="stage with the checkpoint")
    parser.add_argument("--data", required=True, metavar="STAGE", help="data stage with the column answer")
    parser.add_argument("--store", metavar="DIR", help="store of both stages")
    parser.add_argument("--prompts", type=int, default=100, help="held-out questions (100)")
    parser.add_argument("--max-tokens", type=int, default=80, help="tokens of a response (80)")
    parser.add_argument("--thinking-budget", type=int, default=64, help="tokens of a thought (64)")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="tokens of a prompt (256)")
    parser.add_argument("--engine", default="auto", choices=["auto", "vllm", "transformers"])
    parser.add_argument("--threads", type=int, help="threads of this process")
    parser.add_argument("--out", metavar="FILE", help="write every answer to a file of JSON lines")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, and print the table."""
    from align.cli.arguments import find_artifact, find_checkpoint

    options = parse()
    folder = find_checkpoint(f"{options.pipeline}:{options.policy}", options.store)
    data = find_artifact(f"{options.pipeline}:{options.data}", options.store).path
    questions, conditions = measure(folder, data, options)
    own = [question.own for question in questions]
    lines = table([Condition("as sampled", questions, own, questions), *conditions])
    print("\n".join(lines))
    if options.out:
        with Path(options.out).open("w", encoding="utf-8") as file:
            for condition in conditions or [Condition("as sampled", questions, own, questions)]:
                for question, answer in zip(condition.questions, condition.answers, strict=True):
                    line = vars(question) | {"condition": condition.name, "answer": answer}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
