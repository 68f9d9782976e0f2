"""Builds judged tasks: MT-Bench, AlpacaEval, or any questions, from the usual records of these. Torch-free.

``grade`` asks an endpoint for 1 to 10, turn by turn; ``compare`` asks for the better of two systems' answers, in both
orders, where verdicts that differ are a tie. The prompts are this project's own, so the numbers compare systems with
each other, and with no published table. A checkpoint of the pipeline judges when it is served as an endpoint. Win rates
weighted by a judge's probabilities are not supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.config.recipe.source_settings import FilesSource
from align.config.stages.evaluation_tasks import JudgedConfig
from align.data.rows import Message, user
from align.errors import UserError
from align.evaluation.judges.client import warn_if_unreachable
from align.evaluation.judges.compared import ComparedTask
from align.evaluation.judges.graded import GradedTask, JudgedTask
from align.evaluation.tasks.base import Item, TaskInputs
from align.evaluation.tasks.task_records import TaskRecord, file_identities, item_ids, load_records, read_records
from align.store.fingerprint import canonical

ID_FIELDS = ("question_id", "prompt_id", "id")
SOURCE_FIELDS = ("category", "dataset", "source")
"""Fields that may hold an item's category: MT-Bench's, AlpacaEval's, a row's of this project."""
QUESTION_FIELDS = ("turns", "instruction", "prompt", "question")
REFERENCED_CATEGORIES = frozenset({"math", "reasoning", "coding"})
"""Categories of MT-Bench whose answers FastChat judges beside a reference (llm_judge/common.py, NEED_REF_CATS)."""


def identities(config: JudgedConfig, base: Path) -> dict[str, str]:
    """Return digests of the files, and the judge's identity."""
    from align.data.source_identity import identity

    digests = file_identities(config, base)
    if config.references_files is not None:
        try:
            references = identity(FilesSource(type="files", paths=config.references_files), base)
        except UserError as error:
            raise UserError(f"references_files: {error}") from None
        digests |= {f"references: {name}": digest for name, digest in references.items()}
    return digests | {"judge": canonical(config.judge.identity())}


def build(name: str, config: JudgedConfig, inputs: TaskInputs) -> JudgedTask:
    """Read the questions, and warn where the judge cannot be reached yet."""
    records = load_records(config, inputs.base, inputs.seed)
    _check_records(config, records)
    references = None if config.references_files is None else read_references(config.references_files, inputs.base)
    is_mt_bench = config.preset == "mt_bench"
    items = make_items(records, references, REFERENCED_CATEGORIES if is_mt_bench else None, name)
    task: JudgedTask
    if config.judging_mode == "grade":
        task = GradedTask(name, config, items, inputs)
    else:
        task = ComparedTask(name, config, items, inputs)
    if config.judge.endpoint is not None:
        warn_if_unreachable(config.judge.endpoint, f"tasks.{name}.judge.endpoint", inputs.warn)
        lacking = [item for item in items if item.source in REFERENCED_CATEGORIES and not item.data["references"]]
        if is_mt_bench and lacking:
            inputs.warn(
                f"tasks.{name}: {len(lacking)} questions of math, reasoning and coding have no reference answer, "
                "and judges are often wrong there; name references_files"
            )
    return task


def _check_records(config: JudgedConfig, records: list[TaskRecord]) -> None:
    """Check the fields that the preset and ``against`` need in every record."""
    for record in records:
        if config.preset == "mt_bench":
            record.text("category")
        if config.against != "file":
            continue
        if not isinstance(record["output"], str):
            raise record.field_error("output", "text: the answer that systems are compared with")
        if isinstance(record.get("turns"), list) and len(record["turns"]) > 1:
            raise UserError(
                f"{record.where}: there are {len(record['turns'])} turns and one output; `against: file` compares "
                "answers to single questions."
            )


def make_items(
    records: Sequence[TaskRecord],
    references: dict[str, list[str]] | None,
    categories: frozenset[str] | None,
    name: str,
) -> list[Item]:
    """Return one item per record.

    ``data`` has ``later`` (user messages after the first answer), ``references`` (an answer to each message, or none)
    and ``output`` (an answer that came with the question, or None). ``references`` are by the records' ids; None takes
    the records' own. ``categories`` restricts references to some categories. Raises ``UserError`` for a record without
    a question, and for references that belong to no record.
    """
    field = next((name for name in ID_FIELDS if name in records[0]), None)
    ids = item_ids(list(records), field)
    if references is not None and not set(references) & set(ids):
        raise UserError(
            f"references_files: none of {len(references)} references has the id of a question; the questions' are "
            f"{ids[0]}, … (field {field or 'question_id'}), the references' {next(iter(references), 'none')}, …."
        )
    items = []
    for id, record in zip(ids, records, strict=True):
        prompt, later = _question(record)
        source = str(next((record[field] for field in SOURCE_FIELDS if record.get(field)), name))
        item_references: list[str] = []
        if categories is None or source in categories:
            item_references = _record_references(record) if references is None else references.get(id, [])
        output = record.get("output")
        data: dict[str, Any] = {
            "later": later,
            "references": item_references,
            "output": output if isinstance(output, str) else None,
        }
        data["record"] = dict(record)
        items.append(Item(id, source, prompt, data))
    return items


def read_references(files: list[str], base: Path) -> dict[str, list[str]]:
    """Read reference answers by the id of their question.

    Records are FastChat's (``question_id`` and ``choices`` with ``turns``), or have ``reference``, a text or a list.
    """
    by_id: dict[str, list[str]] = {}
    for record in read_records(FilesSource(type="files", paths=files), base):
        field = next((name for name in ID_FIELDS if name in record), ID_FIELDS[0])
        if "choices" in record:
            try:
                turns: Any = record["choices"][0]["turns"]
            except (TypeError, LookupError):
                raise record.field_error("choices", "a list of one choice with turns, as FastChat writes it") from None
            references = TaskRecord(record.where, {"turns": turns}).texts("turns")
        else:
            references = _record_references(record)
            if not references:
                raise UserError(
                    f"{record.where}: there is no reference answer; expected `choices` with turns, or `reference`."
                )
        by_id[str(record[field])] = references
    return by_id


def _question(record: TaskRecord) -> tuple[list[Message], list[str]]:
    """Return the first conversation to answer, and the user's messages after each answer."""
    field = next((name for name in QUESTION_FIELDS if record.get(name) is not None), None)
    if field is None:
        raise UserError(
            f"{record.where}: no field holds a question; expected one of {', '.join(QUESTION_FIELDS)}, there are "
            f"{', '.join(sorted(record)) or 'none'}."
        )
    value = record[field]
    if isinstance(value, str):
        # Alpaca's records have an instruction and perhaps an input, which belongs to the question.
        text = record.text(field)
        extra = record.get("input") if field == "instruction" else None
        if isinstance(extra, str) and extra.strip():
            text = f"{text}\n\n{extra}"
        return [user(text)], []
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        if value[-1]["role"] != "user":
            raise record.field_error(field, "messages of which the user's is the last")
        return [{"role": message["role"], "content": message["content"]} for message in value], []
    turns = record.texts(field)
    if not all(turn.strip() for turn in turns):
        raise record.field_error(field, "texts that are not blank")
    return [user(turns[0])], turns[1:]


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ("system", "user", "assistant")
        and isinstance(value.get("content"), str)
    )


def _record_references(record: TaskRecord) -> list[str]:
    value = record.get("reference")
    if not value:
        return []
    return [value] if isinstance(value, str) else record.texts("reference")
