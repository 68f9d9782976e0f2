"""IFEval (arXiv 2311.07911): 541 prompts with 834 instructions of 25 kinds that a program can check.

Strict judges the answer as it is, loose takes the best of eight variants of it (without its first line, its last line,
both, and each of these without asterisks). A prompt counts when all its instructions are followed. The checkers are
if-verifiable's, which are Google's; arguments and empty answers are treated as in lm-eval, whose numbers for the same
answers are the same, but for what is left to chance there: langdetect guesses the language at random unless its seed is
set, which it is here, and two prompts (1122, 1129) ask for a sign, "#" or "!", where Google's checker counts a letter
that it draws. Here the sign is counted.

Left out: cutting away a reasoning model's thoughts before its answer.
"""

from __future__ import annotations

import contextlib
import logging
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from align.config.validation import nearest
from align.data.rows import user
from align.errors import UserError
from align.evaluation.tasks.base import (
    Answers,
    Bench,
    Given,
    Item,
    Measured,
    Metric,
    Respondent,
    Task,
    TaskConfig,
    answer_all,
)
from align.evaluation.tasks.reading import TaskData, TaskRecord, item_ids
from align.evaluation.tasks.sampled import Sampled, answer_counts

SEVERAL = "several"
"""Source of prompts whose instructions are of more than one group."""
PROMPT_STRICT, PROMPT_LOOSE = "prompt_strict", "prompt_loose"
INSTRUCTION_STRICT, INSTRUCTION_LOOSE = "instruction_strict", "instruction_loose"
LANGUAGE_SEED = 0

METRICS = {
    PROMPT_STRICT: Metric("IFEval, prompts (strict)", "higher", "", "share of prompts with every instruction followed"),
    PROMPT_LOOSE: Metric(
        "IFEval, prompts (loose)",
        "higher",
        "",
        "the same, each instruction by the best of the answer's eight variants",
    ),
    INSTRUCTION_STRICT: Metric("IFEval, instructions (strict)", "higher", "", "share of all instructions followed"),
    INSTRUCTION_LOOSE: Metric(
        "IFEval, instructions (loose)", "higher", "", "the same, each by the best of the answer's eight variants"
    ),
}


class IfevalConfig(TaskData, Sampled, TaskConfig):
    """Settings of IFEval. Records: ``key``, ``prompt``, ``instruction_id_list``, ``kwargs``, as google/IFEval has."""

    task: Literal["ifeval"] = "ifeval"
    max_tokens: int = Field(1280, ge=1)
    """Longest answer. 1280 is lm-eval's; fewer are cheaper, and many instructions ask for hundreds of words."""

    def build(self, name: str, given: Given) -> IfevalTask:
        """Read the prompts and make every checker once, so that a wrong argument is found now."""
        return IfevalTask(name, self, self.records(given.base, given.seed), given)


class IfevalTask(Task):
    """The prompts and their checkers."""

    responds = True
    kind = "ifeval"
    title = "IFEval: instructions a program can check"
    metrics = METRICS
    primary = PROMPT_STRICT

    def __init__(self, name: str, config: IfevalConfig, records: list[TaskRecord], given: Given) -> None:
        self.name, self._config, self._seed = name, config, given.seed
        self._described = config.described(given.base)
        self.items = [_item(id, record) for id, record in zip(item_ids(records, "key"), records, strict=True)]
        if any(set(item.data["instructions"]) & NEEDS_SENTENCES for item in self.items):
            from align.evaluation.punkt import ensure_punkt

            ensure_punkt()

    def settings(self) -> dict[str, Any]:
        """Data, sampling and the seed of the language guess."""
        return {
            "data": self._described,
            "sampling": self._config.sampling_settings(self._seed),
            "instructions": sum(len(item.data["instructions"]) for item in self.items),
            "langdetect_seed": LANGUAGE_SEED,
        }

    def respond(self, respondent: Respondent) -> Answers:
        """Every prompt as one user turn."""
        return answer_all(self, respondent, self._config.sampling(self._seed))

    def score(self, answers: Mapping[str, Answers], bench: Bench) -> dict[str, Measured]:
        """Share of instructions followed; of a prompt, all of them or not."""
        total, done, found = len(answers) * len(self.items), 0, {}
        with seeded_language_guess():
            for system, given in answers.items():
                values: dict[str, list[list[float]]] = {metric: [] for metric in METRICS}
                for item, samples in zip(self.items, given, strict=True):
                    followed = [check(item, turns[-1].response.text) for turns in samples]
                    for level, outcomes in zip(("strict", "loose"), zip(*followed, strict=True), strict=True):
                        values[f"prompt_{level}"].append([float(all(one)) for one in outcomes])
                        values[f"instruction_{level}"].append([sum(one) / len(one) for one in outcomes])
                    done += 1
                    bench.progress(done, total, "answers")
                count = [float(len(item.data["instructions"])) for item in self.items]
                weights = {INSTRUCTION_STRICT: count, INSTRUCTION_LOOSE: count}
                found[system] = Measured(values, weights, dict(answer_counts(given)))
        return found


NEEDS_SENTENCES = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})
"""Instructions whose checkers split text into sentences by NLTK's model."""


def check(item: Item, text: str) -> tuple[list[bool], list[bool]]:
    """Which of an item's instructions an answer follows: strictly, and loosely.

    An answer, or a variant of it, that is nothing but space follows none. A checker that runs out of stack (JSON nested
    a thousand deep) is not satisfied.
    """
    checkers = [
        _checker(id, arguments) for id, arguments in zip(item.data["instructions"], item.data["arguments"], strict=True)
    ]
    strict = [_follows(checker, text) for checker in checkers]
    loose = [
        first or any(_follows(checker, variant) for variant in variants(text))
        for first, checker in zip(strict, checkers, strict=True)
    ]
    return strict, loose


def variants(text: str) -> list[str]:
    """The loose variants of an answer beside the answer itself, each once."""
    lines = text.split("\n")
    shorter = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    plain = [one.replace("*", "") for one in (text, *shorter)]
    return [one for one in dict.fromkeys((*shorter, *plain)) if one != text]


@contextlib.contextmanager
def seeded_language_guess() -> Iterator[None]:
    """Within it, langdetect guesses the same language for a text every time, and what it cannot guess is not logged.

    Without letters to go by the checkers count the instruction as followed and log the whole answer, which may be
    anything.
    """
    from langdetect import DetectorFactory

    def quiet(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Unable to detect language")

    before, root = DetectorFactory.seed, logging.getLogger()
    DetectorFactory.seed = LANGUAGE_SEED
    root.addFilter(quiet)
    try:
        yield
    finally:
        DetectorFactory.seed = before
        root.removeFilter(quiet)


# -----------------------------------------------------------------------------------------------------------------


def _follows(checker: Any, text: str) -> bool:
    try:
        return bool(text.strip()) and bool(checker.check_following(text))
    except RecursionError:
        return False


def _checker(id: str, arguments: Mapping[str, Any]) -> Any:
    """A checker with its arguments set; ``None`` and other empty values count as not given, as in lm-eval."""
    # Its package imports `datasets` (1.5 s), which reading settings should not pay.
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    kept = {name: value for name, value in arguments.items() if value}
    checker = INSTRUCTION_DICT[id](id)
    checker.build_description(**kept)
    if id == "keywords:letter_frequency" and kept["letter"].lower() not in list(string.ascii_lowercase):
        return _SignFrequency(kept["letter"], kept["let_relation"], kept["let_frequency"])
    return checker


class _SignFrequency:
    """How often a sign appears. Google's checker counts a random letter for what is not a to z (prompts 1122, 1129)."""

    def __init__(self, sign: str, relation: str, frequency: int) -> None:
        self._sign, self._relation, self._frequency = sign.lower(), relation, frequency

    def check_following(self, value: str) -> bool:
        count = value.lower().count(self._sign)
        return count < self._frequency if self._relation == "less than" else count >= self._frequency


def _item(id: str, record: TaskRecord) -> Item:
    prompt, instructions = record.text("prompt"), record.texts("instruction_id_list")
    arguments = record["kwargs"]
    if not isinstance(arguments, list) or not all(isinstance(one, dict) for one in arguments):
        raise record.wrong("kwargs", "a list with one mapping of arguments for each instruction")
    if len(arguments) != len(instructions):
        raise UserError(
            f"{record.where}: there are {len(instructions)} instructions and {len(arguments)} kwargs; expected one "
            "mapping of arguments for each, {} for none."
        )
    for instruction, given in zip(instructions, arguments, strict=True):
        _try(instruction, given, record.where)
    return Item(id, _source(instructions), [user(prompt)], {"instructions": instructions, "arguments": arguments})


def _source(instructions: Sequence[str]) -> str:
    groups = {instruction.split(":", 1)[0] for instruction in instructions}
    return groups.pop() if len(groups) == 1 else SEVERAL


def _try(instruction: str, arguments: Mapping[str, Any], where: str) -> None:
    """Raise ``UserError`` for an instruction that is not known or lacks an argument, which would be drawn at random."""
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    if instruction not in INSTRUCTION_DICT:
        close = nearest(instruction, INSTRUCTION_DICT)
        raise UserError(
            f"{where}: there is no instruction '{instruction}'."
            + (f" Did you mean '{close}'?" if close else f" Known are {', '.join(sorted(INSTRUCTION_DICT))}.")
        )
    wanted = INSTRUCTION_DICT[instruction](instruction).get_instruction_args_keys()
    missing = [name for name in wanted if not arguments.get(name)]
    if missing:
        raise UserError(
            f"{where}: '{instruction}' needs {', '.join(missing)} in its kwargs, which has "
            f"{', '.join(name for name, value in arguments.items() if value) or 'none'}; without, the checker would "
            "draw a value at random that the prompt does not name."
        )
    try:
        _checker(instruction, arguments)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        said = f"{error} is not known" if isinstance(error, KeyError) else error
        raise UserError(f"{where}: kwargs of '{instruction}' do not fit: {said}. Given: {dict(arguments)}.") from None
