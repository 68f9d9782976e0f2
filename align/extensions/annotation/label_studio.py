"""Exchange with Label Studio: its JSON of tasks with annotations, for pairwise comparison.

A task's ``data`` has ``prompt``, ``left`` and ``right``; the left text is answer ``a``. An annotation's ``result`` has
an item of type ``pairwise`` (``left`` or ``right``), or ``choices`` named ``verdict`` (``tie``, ``both bad``, ``much
better``), and may have ``choices`` named ``tags`` and ``textarea`` named ``rewrite`` and ``comment``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.data.rows import user
from align.errors import UserError
from align.extensions.annotation.pairs import make_pair
from align.extensions.annotation.report import first_answers
from align.store.annotations import (
    NAME,
    AnnotationSet,
    Answer,
    AnswerWriter,
    Pair,
    Side,
    Verdict,
    new_id,
    now,
)
from align.store.fingerprint import digest
from align.store.json_files import DamagedFile, parse_json, read_file, write_text_atomically

VERDICTS: dict[str, Verdict] = {"much better": "much_better", "better": "better", "tie": "tie", "both bad": "both_bad"}
WORDS = {verdict: word for word, verdict in VERDICTS.items()}
SIDES: dict[str, Side] = {"left": "a", "right": "b"}


def export_tasks(pairs: Mapping[str, Pair], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Return tasks with the first answers to each pair; hidden duplicates and undone answers are not exported."""
    by_pair: dict[str, list[Answer]] = {}
    for answer in first_answers(answers):
        by_pair.setdefault(answer.pair, []).append(answer)
    return [_task(number, pair, by_pair.get(pair.id, ())) for number, pair in enumerate(pairs.values(), start=1)]


def _task(number: int, pair: Pair, answers: Iterable[Answer]) -> dict[str, Any]:
    prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in pair.prompt)
    data: dict[str, Any] = {"prompt": prompt, "left": pair.a, "right": pair.b, "pair": pair.model_dump()}
    annotations = [
        {
            "result": _result(answer),
            "lead_time": answer.seconds,
            "created_at": answer.time,
            "annotator": answer.annotator,
            "shown_left": answer.left,
            "active": answer.active,
        }
        for answer in answers
    ]
    return {"id": number, "data": data, "annotations": annotations}


def _result(answer: Answer) -> list[dict[str, Any]]:
    result = [_item("verdict", "pair", "choices", {"choices": [WORDS[answer.verdict]]})]
    if answer.preferred is not None:
        result.append(
            _item("preference", "pair", "pairwise", {"selected": "left" if answer.preferred == "a" else "right"})
        )
    if answer.tags:
        result.append(_item("tags", "pair", "choices", {"choices": list(answer.tags)}))
    for name, text in (("rewrite", answer.rewrite), ("comment", answer.comment)):
        if text:
            result.append(_item(name, "pair", "textarea", {"text": [text]}))
    return result


def _item(name: str, target: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"from_name": name, "to_name": target, "type": kind, "value": value}


def write_tasks(path: Path, annotations: AnnotationSet) -> int:
    """Write a set as Label Studio's JSON, and return the number of tasks."""
    tasks = export_tasks(annotations.pairs(), annotations.answers())
    write_text_atomically(path, json.dumps(tasks, indent=1) + "\n")
    return len(tasks)


def import_tasks(path: Path, annotations: AnnotationSet) -> tuple[int, int]:
    """Add the pairs and answers of a file of tasks, and return the numbers of new pairs and new answers.

    Everything is read before anything is written, and an answer that the set has is not added again. An annotator is
    the annotation's ``annotator``, or ``completed_by`` as ``ls-<id>``, so no address of a person enters the set. Raises
    ``UserError`` with the task for content that is not a comparison.
    """
    try:
        tasks = parse_json(read_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except DamagedFile as error:
        raise UserError(f"{path} {error}.") from None
    return add_tasks(tasks, str(path), annotations)


def add_tasks(tasks: Any, source: str, annotations: AnnotationSet) -> tuple[int, int]:
    """Add the pairs and answers of tasks as ``import_tasks`` does; ``source`` names them in errors."""
    if not isinstance(tasks, list):
        raise UserError(f"{source}: is not a list of tasks; export the project as JSON, not JSON_MIN.")
    pairs: list[Pair] = []
    answers: list[Answer] = []
    for number, task in enumerate(tasks, start=1):
        place = f"{source}: task {number}"
        pair = _read_pair(task, place)
        pairs.append(pair)
        for annotation in task.get("annotations") or []:
            is_cancelled = isinstance(annotation, dict) and annotation.get("was_cancelled")
            if not is_cancelled:
                answers.append(_read_answer(annotation, pair, place))
    new_pairs = annotations.add_pairs(pairs)
    # The same export may be imported twice, or once more with new answers.
    present = {_identity(answer) for answer in annotations.answers()}
    new_answers = [answer for answer in answers if _identity(answer) not in present]
    writers = {answer.annotator: AnswerWriter(annotations, answer.annotator) for answer in new_answers}
    for answer in new_answers:
        writers[answer.annotator].write(answer)
    return new_pairs, len(new_answers)


def _identity(answer: Answer) -> str:
    """Return a digest of what an answer says, without its id."""
    return digest(answer.model_dump(exclude={"id", "repeat", "active"}))


def _read_pair(task: Any, place: str) -> Pair:
    data = task.get("data") if isinstance(task, dict) else None
    if not isinstance(data, dict):
        raise UserError(f"{place}: has no data.")
    if isinstance(data.get("pair"), dict):
        try:
            return Pair.model_validate(data["pair"])
        except ValueError:
            raise UserError(f"{place}: data.pair is not what `align annotate --export` writes.") from None
    texts = [data.get(name) for name in ("prompt", "left", "right")]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{place}: data needs the texts prompt, left and right; it has {', '.join(map(repr, data))}.")
    prompt, left_text, right_text = map(str, texts)
    return make_pair([user(prompt)], left_text, right_text)


def _read_answer(annotation: Any, pair: Pair, place: str) -> Answer:
    if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
        raise UserError(f"{place}: an annotation has no result.")
    values = {item.get("from_name"): item for item in annotation["result"] if isinstance(item, dict)}
    selected = _selected(annotation["result"], place)
    words = _texts(values.get("verdict"), "choices")
    verdict = VERDICTS.get(words[0].replace("_", " ")) if words else None
    if verdict is None:
        # A project without the question of the verdict has only the side that was selected.
        verdict = "better" if selected is not None else "tie"
    preferred = SIDES[selected] if selected is not None and verdict in ("better", "much_better") else None
    if preferred is None and verdict in ("better", "much_better"):
        raise UserError(f"{place}: the verdict is '{WORDS[verdict]}' without a pairwise result of left or right.")
    seconds = annotation.get("lead_time")
    return Answer(
        id=new_id(),
        pair=pair.id,
        annotator=_annotator(annotation, place),
        time=str(annotation.get("created_at") or now()),
        left="b" if annotation.get("shown_left") == "b" else "a",
        verdict=verdict,
        preferred=preferred,
        tags=_texts(values.get("tags"), "choices"),
        rewrite="\n".join(_texts(values.get("rewrite"), "text")),
        comment="\n".join(_texts(values.get("comment"), "text")),
        seconds=float(seconds) if isinstance(seconds, (int, float)) and seconds > 0 else 0.0,
        active=annotation.get("active") is True,
    )


def _selected(result: list[Any], place: str) -> str | None:
    """Return the side that the pairwise item selects; None without such an item."""
    for item in result:
        if isinstance(item, dict) and item.get("type") == "pairwise":
            selected = (item.get("value") or {}).get("selected")
            if selected not in SIDES:
                raise UserError(f"{place}: a pairwise result selects {selected!r}, expected left or right.")
            return str(selected)
    return None


def _texts(item: Any, field: str) -> list[str]:
    """Return the texts in an item's value; none without the item."""
    value = (item.get("value") or {}).get(field, []) if isinstance(item, dict) else []
    return [str(text) for text in (value if isinstance(value, list) else [value])]


def _annotator(annotation: Mapping[str, Any], place: str) -> str:
    name = annotation.get("annotator")
    if isinstance(name, str) and NAME.fullmatch(name):
        return name
    person = annotation.get("completed_by")
    number = person.get("id") if isinstance(person, dict) else person
    if isinstance(number, int):
        return f"ls-{number}"
    raise UserError(f"{place}: an annotation names nobody; completed_by is a number, or an object with id.")
