"""Questions for judges, from the field's usual records: MT-Bench's, AlpacaEval's, and plain prompts. Torch-free.

Left out: what is asked about the answers (``judged.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.data.rows import Message, user
from align.data.source_configs import FilesSource
from align.errors import UserError
from align.evaluation.tasks.base import Item
from align.evaluation.tasks.reading import TaskRecord, item_ids, read_records

IDS = ("question_id", "prompt_id", "id")
SOURCES = ("category", "dataset", "source")
"""Fields that may hold an item's category: MT-Bench's, AlpacaEval's, a row's of this project."""
QUESTIONS = ("turns", "instruction", "prompt", "question")
REFERENCED = frozenset({"math", "reasoning", "coding"})
"""Categories of MT-Bench whose answers FastChat judges beside a reference (llm_judge/common.py, NEED_REF_CATS)."""


def make_items(
    records: Sequence[TaskRecord], references: dict[str, list[str]] | None, only: frozenset[str] | None, name: str
) -> list[Item]:
    """One item a record. ``data`` has ``later`` (user messages after the first answer), ``references`` (an answer to
    each message, or none) and ``output`` (an answer that came with the question, or None).

    ``references`` are by the records' ids; None takes those that records have themselves. ``only`` restricts them to
    categories. Raises ``UserError`` for a record without a question, and for references that belong to no record.
    """
    field = next((one for one in IDS if one in records[0]), None)
    ids = item_ids(list(records), field)
    if references is not None and not set(references) & set(ids):
        raise UserError(
            f"references_files: none of {len(references)} references has the id of a question; the questions' are "
            f"{ids[0]}, … (field {field or 'question_id'}), the references' {next(iter(references), 'none')}, …."
        )
    items = []
    for id, record in zip(ids, records, strict=True):
        prompt, later = _question(record)
        source = str(next((record[one] for one in SOURCES if record.get(one)), name))
        known: list[str] = []
        if only is None or source in only:
            known = references.get(id, []) if references is not None else _own_references(record)
        output = record.get("output")
        data = {"later": later, "references": known, "output": output if isinstance(output, str) else None}
        items.append(Item(id, source, prompt, data))
    return items


def read_references(files: list[str], base: Path) -> dict[str, list[str]]:
    """Reference answers by the id of their question.

    Records are FastChat's (``question_id`` and ``choices`` with ``turns``), or have ``reference``, a text or a list.
    """
    found: dict[str, list[str]] = {}
    for record in read_records(FilesSource(type="files", paths=files), base):
        field = next((one for one in IDS if one in record), IDS[0])
        if "choices" in record:
            try:
                turns: Any = record["choices"][0]["turns"]
            except (TypeError, LookupError):
                raise record.wrong("choices", "a list of one choice with turns, as FastChat writes it") from None
            references = TaskRecord(record.where, {"turns": turns}).texts("turns")
        else:
            references = _own_references(record)
            if not references:
                raise UserError(
                    f"{record.where}: there is no reference answer; expected `choices` with turns, or `reference`."
                )
        found[str(record[field])] = references
    return found


def _question(record: TaskRecord) -> tuple[list[Message], list[str]]:
    """The first conversation to answer, and what the user says after each answer."""
    field = next((one for one in QUESTIONS if record.get(one) is not None), None)
    if field is None:
        raise UserError(
            f"{record.where}: no field holds a question; expected one of {', '.join(QUESTIONS)}, there are "
            f"{', '.join(sorted(record)) or 'none'}."
        )
    value = record[field]
    if isinstance(value, str):
        text = record.text(field)
        more = record.get("input") if field == "instruction" else None
        return [user(f"{text}\n\n{more}" if isinstance(more, str) and more.strip() else text)], []
    if isinstance(value, list) and value and all(_is_message(one) for one in value):
        if value[-1]["role"] != "user":
            raise record.wrong(field, "messages of which the user's is the last")
        return [{"role": one["role"], "content": one["content"]} for one in value], []
    turns = record.texts(field)
    if not all(turn.strip() for turn in turns):
        raise record.wrong(field, "texts with more than space in them")
    return [user(turns[0])], turns[1:]


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ("system", "user", "assistant")
        and isinstance(value.get("content"), str)
    )


def _own_references(record: TaskRecord) -> list[str]:
    value = record.get("reference")
    if not value:
        return []
    return [value] if isinstance(value, str) else record.texts("reference")
