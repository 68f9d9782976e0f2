"""IFEval (arXiv 2311.07911): 541 prompts with 834 instructions of 25 kinds that a program can check.

Strict scores the answer as it is. Loose scores the best of eight variants of it: without its first line, its last line,
both, and each of these without asterisks. A prompt counts when all its instructions are followed.

The checkers are if-verifiable's, which are Google's. Arguments and empty answers are treated as in lm-eval, and the
numbers for the same answers are the same except where lm-eval leaves something to chance: langdetect guesses the
language at random unless its seed is set, which it is here; and two prompts (1122, 1129) ask for a sign, "#" or "!",
where Google's checker counts a randomly drawn letter. Here the sign is counted.

IFBench (arXiv 2507.02833) has 58 other kinds of instructions in the same layout, which the same package checks. Some of
its checkers need NLTK's data, which is never fetched here.

The checkers read the answer after a model's thought.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from align.config.stages.evaluation.tasks import IfbenchConfig, IfevalConfig
from align.data.rows import user
from align.errors import UserError
from align.evaluation.answers import Item
from align.evaluation.tasks.base import TaskInputs
from align.evaluation.tasks.records import TaskRecord
from align.evaluation.tasks.sampled import SampledTask
from align.verifiers.instructions import (
    LANGUAGE_SEED,
    NEEDS_SENTENCES,
    check_instruction,
    ensure_punkt,
    is_followed,
    make_checker,
    seeded_language_guess,
)

SEVERAL = "several"
"""Source of prompts whose instructions are of more than one group."""


class IfevalTask(SampledTask):
    """The prompts and their checkers."""

    kind = "ifeval"
    title = "IFEval: instructions a program can check"
    primary = "prompt_strict"
    id_field = "key"

    def __init__(self, name: str, config: IfevalConfig, inputs: TaskInputs) -> None:
        """Construct every checker once, to find a wrong argument before the run."""
        super().__init__(name, config, inputs)
        if isinstance(config, IfbenchConfig):
            self.title = "IFBench: instructions a program can check"
            self.metrics = {
                metric: replace(entry, title=entry.title.replace("IFEval", "IFBench"))
                for metric, entry in self.metrics.items()
            }
        if any(set(item.data["instructions"]) & NEEDS_SENTENCES for item in self.items):
            ensure_punkt()

    def make_item(self, id: str, record: TaskRecord) -> Item:
        """Return the item of a record, whose instructions are checked."""
        prompt = record.text("prompt")
        instructions = record.texts("instruction_id_list")
        arguments = record["kwargs"]
        if not isinstance(arguments, list) or not all(isinstance(mapping, dict) for mapping in arguments):
            raise record.field_error("kwargs", "a list with one mapping of arguments for each instruction")
        if len(arguments) != len(instructions):
            raise UserError(
                f"{record.where}: there are {len(instructions)} instructions and {len(arguments)} kwargs; expected one "
                "mapping of arguments for each, {} for none."
            )
        for instruction, mapping in zip(instructions, arguments, strict=True):
            check_instruction(instruction, mapping, record.where)
        return Item(id, _source(instructions), [user(prompt)], {"instructions": instructions, "arguments": arguments})

    def settings(self) -> dict[str, Any]:
        """Return data, sampling and the seed of the language guess."""
        return {
            "data": self._data,
            "sampling": self._config.sampling_settings(self._seed),
            "instructions": sum(len(item.data["instructions"]) for item in self.items),
            "langdetect_seed": LANGUAGE_SEED,
        }

    def weights(self) -> dict[str, list[float]]:
        """Return the numbers of the prompts' instructions, by which their shares add up to the share of all."""
        counts = [float(len(item.data["instructions"])) for item in self.items]
        return {"instruction_strict": counts, "instruction_loose": counts}

    def grading(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which langdetect guesses the same language for a text every time."""
        return seeded_language_guess()

    def grade(self, item: Item, text: str) -> dict[str, float]:
        """Return the share of instructions that an answer follows, and 1 if it follows all of them, else 0."""
        strict, loose = check(item, text)
        return {
            "prompt_strict": float(all(strict)),
            "prompt_loose": float(all(loose)),
            "instruction_strict": sum(strict) / len(strict),
            "instruction_loose": sum(loose) / len(loose),
        }


def check(item: Item, text: str) -> tuple[list[bool], list[bool]]:
    """Return for each of an item's instructions whether an answer follows it: strictly, and loosely.

    A blank answer or variant follows none. A checker that runs out of stack (JSON nested a thousand deep) is not
    satisfied.
    """
    pairs = zip(item.data["instructions"], item.data["arguments"], strict=True)
    checkers = [make_checker(id, arguments) for id, arguments in pairs]
    # Loose follows from strict, so variants are only tried if the answer itself fails.
    strict = [is_followed(checker, text) for checker in checkers]
    loose = [
        is_strict or any(is_followed(checker, variant) for variant in variants(text))
        for is_strict, checker in zip(strict, checkers, strict=True)
    ]
    return strict, loose


def variants(text: str) -> list[str]:
    """Return the loose variants of an answer without the answer itself, each once."""
    # The first line may be an introduction and the last a closing remark. Asterisks are Markdown.
    lines = text.split("\n")
    shorter = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    without_asterisks = [variant.replace("*", "") for variant in (text, *shorter)]
    return [variant for variant in dict.fromkeys((*shorter, *without_asterisks)) if variant != text]


def _source(instructions: Sequence[str]) -> str:
    groups = {instruction.split(":", 1)[0] for instruction in instructions}
    return groups.pop() if len(groups) == 1 else SEVERAL


build = IfevalTask
