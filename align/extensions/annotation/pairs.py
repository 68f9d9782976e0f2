"""Pairs to annotate: from the samples of a stage or of an evaluation, or from a file of JSON lines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data.rows import user
from align.errors import UserError, shorten
from align.extensions.annotation.questions import share_of
from align.store.annotations import Pair, pair_id
from align.store.json_files import DamagedFile, numbered_lines, parse_object

SAMPLES = "samples.jsonl"
SIDES = (("a", "b"), ("chosen", "rejected"))
"""Names of the two answers in a file."""


@dataclass
class Selection:
    """Pairs from a source, and what became of the others."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    """Pairs by id."""
    prompts: int = 0
    equal: int = 0
    """Pairs of equal answers."""
    without: int = 0
    """Prompts that make no pair."""
    surplus: int = 0
    """Pairs beyond the number per prompt."""
    repeated: int = 0
    """Pairs that the source has again."""

    def add(self, pair: Pair) -> None:
        """Add a pair unless it is there already."""
        self.repeated += pair.id in self.pairs
        self.pairs.setdefault(pair.id, pair)

    def explain(self, per_prompt: int = 1) -> list[str]:
        """Return a line for each reason to skip pairs, with its count."""
        reasons = [
            (self.equal, "pairs of equal answers are skipped: no verdict is possible"),
            (self.without, f"of {self.prompts} prompts have no two different answers, so no pair"),
            (self.surplus, f"further pairs are not used, because --per-prompt is {per_prompt}"),
            (self.repeated, "pairs repeat another pair, in the same or the other order"),
        ]
        return [f"{count} {text}" for count, text in reasons if count]


def read_artifact_pairs(folder: Path, per_prompt: int = 1) -> Selection:
    """Return pairs of the samples in an artifact's folder: of one policy's responses, or of an evaluation's systems.

    A hash selects ``per_prompt`` of a prompt's pairs. Equal answers make no pair. Raises ``UserError`` for an artifact
    without samples, or whose samples make no pair.
    """
    path = folder / SAMPLES
    if not path.is_file():
        raise UserError(
            f"{folder}: has no {SAMPLES}; pairs come from a `sample`, `synthesize` or `evaluate` stage, or from a "
            ".jsonl file."
        )
    selection = Selection()
    for place, line in _lines(path):
        candidates = list(_sampled_pairs(line, place) if "texts" in line else _evaluated_pairs(line))
        different = [pair for pair in candidates if pair.a.strip() != pair.b.strip()]
        different.sort(key=lambda pair: share_of("select", pair.id))
        selection.prompts += 1
        selection.equal += len(candidates) - len(different)
        selection.without += not different
        selection.surplus += max(0, len(different) - per_prompt)
        for pair in different[:per_prompt]:
            selection.add(pair)
    if not selection.pairs:
        raise UserError(f"{path}: no prompt has two different answers, so there is nothing to compare.")
    return selection


def _sampled_pairs(line: Mapping[str, Any], place: str) -> Iterator[Pair]:
    """Yield the pairs of a prompt's responses, with the stage's scores."""
    texts = line["texts"]
    by_model = {"score": line.get("scores"), **(line.get("parts") or {})}
    for first, second in itertools.combinations(range(len(texts)), 2):
        scores = {}
        for name, values in by_model.items():
            if values and values[first] is not None and values[second] is not None:
                scores[name] = (float(values[first]), float(values[second]))
        yield make_pair(_prompt(line["prompt"], place), texts[first], texts[second], scores=scores)


def _evaluated_pairs(line: Mapping[str, Any]) -> Iterator[Pair]:
    """Yield the pairs of the systems' first answers to a question."""
    firsts = {name: samples[0] for name, samples in line.get("responses", {}).items() if samples}
    texts = {name: sample["text"] for name, sample in firsts.items() if isinstance(sample.get("text"), str)}
    for first, second in itertools.combinations(texts, 2):
        rewards = [firsts[name].get("reward") for name in (first, second)]
        scores = {} if None in rewards else {"reward": (float(rewards[0]), float(rewards[1]))}
        prompt = _prompt(line["prompt"], "samples")
        yield make_pair(prompt, texts[first], texts[second], systems=(first, second), scores=scores)


def make_pair(prompt: list[dict[str, Any]], a: str, b: str, **fields: Any) -> Pair:
    return Pair(id=pair_id(prompt, a, b), prompt=prompt, a=a, b=b, **fields)


def read_file_pairs(path: Path) -> Selection:
    """Return the pairs of a file of JSON lines.

    A line has ``prompt`` (text or messages), the answers ``a`` and ``b`` or ``chosen`` and ``rejected`` (text or one
    message), and may have ``systems`` (two names), ``scores`` (``{model: [a, b]}``), ``gold`` (``a``, ``b``, ``tie`` or
    ``both_bad``) and ``tools``. ``chosen`` is the first answer and no gold. Raises ``UserError`` with the line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; --pairs is a .jsonl file, an artifact's key or PIPELINE:STAGE.")
    return parse_pairs(_lines(path), str(path))


def parse_pairs(lines: Iterable[tuple[str, Mapping[str, Any]]], source: str) -> Selection:
    """Return the pairs of lines with their places, as ``read_file_pairs`` reads them; ``source`` names all lines."""
    selection = Selection()
    for place, line in lines:
        pair = _file_pair(line, place)
        if pair.a.strip() == pair.b.strip():
            raise UserError(f"{place}: both answers are equal, so no verdict is possible; remove the line.")
        selection.add(pair)
    if not selection.pairs:
        raise UserError(f"{source}: has no pairs.")
    return selection


def _file_pair(line: Mapping[str, Any], place: str) -> Pair:
    sides = next((names for names in SIDES if all(name in line for name in names)), None)
    if sides is None or "prompt" not in line:
        raise UserError(
            f"{place}: a pair has prompt, and a and b or chosen and rejected; this line has "
            f"{', '.join(map(repr, line)) or 'no fields'}."
        )
    a, b = (_answer(line[name], place, name) for name in sides)
    fields = {name: line[name] for name in ("systems", "scores", "gold", "tools") if line.get(name) is not None}
    unknown = set(line) - {"prompt", *sides, "systems", "scores", "gold", "tools", "id", "source", "checks"}
    if "gold" not in line and {"better", "label", "preferred"} & unknown:
        raise UserError(f"{place}: the field of the right answer is named gold: a, b, tie or both_bad.")
    try:
        return make_pair(_prompt(line["prompt"], place), a, b, **_typed(fields))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{place}: systems is a list of two names, scores maps a model to two numbers, and gold is a, b, tie or "
            f"both_bad ({shorten(str(error).splitlines()[0])})."
        ) from None


def _typed(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a file in the types of ``Pair``."""
    if "systems" in fields:
        fields["systems"] = tuple(map(str, fields["systems"]))
    if "scores" in fields:
        fields["scores"] = {str(name): tuple(map(float, values)) for name, values in fields["scores"].items()}
    if "tools" in fields and not isinstance(fields["tools"], str):
        fields["tools"] = json.dumps(fields["tools"])
    return fields


def _answer(value: Any, place: str, name: str) -> str:
    """Return an answer's text, from a text or from a list with one message."""
    if isinstance(value, str) and value.strip():
        return value
    is_message = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
    if is_message and isinstance(value[0].get("content"), str) and value[0]["content"].strip():
        return str(value[0]["content"])
    raise UserError(f"{place}: {name} is neither a text nor a list with one message.")


def _prompt(value: Any, place: str) -> list[dict[str, Any]]:
    """Return a prompt's messages, from a text or from messages."""
    if isinstance(value, str) and value.strip():
        return [user(value)]
    is_list = isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
    if not is_list or not all(isinstance(message.get("content"), str) and "role" in message for message in value):
        raise UserError(f"{place}: prompt is neither a text nor a list of messages with role and content.")
    return [dict(message) for message in value]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        for number, line in numbered_lines(path):
            place = f"{path}:{number}"
            try:
                yield place, parse_object(line.encode("utf-8", "surrogatepass"))
            except DamagedFile as error:
                raise UserError(f"{place} {error}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.") from None


def names_of(pairs: Sequence[Pair]) -> list[str]:
    """Return the names of the systems in the pairs."""
    return sorted({name for pair in pairs if pair.systems is not None for name in pair.systems})
