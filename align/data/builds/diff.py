"""Differences between two builds: rows added, removed, changed, moved between splits, and their ledgers side by side.

Each row is reduced to three 64-bit hashes (of its id, its prompt, and all other content), which are sorted and
compared. Memory is 29 bytes a row, and as much again to sort, independent of the rows' sizes. Torch-free.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.data.builds.build_files import LEDGER, SPLITS, count_rows, message_text, read_ledger, rows, rows_by_number
from align.data.rows import Row, is_text, prompt_key

EXAMPLES = 3
EXCERPT = 160
"""Characters of a text in an example."""
KINDS = ("unchanged", "changed", "new answer", "moved out", "moved in", "removed", "added")
"""Changes of rows. ``new answer`` pairs a removed and an added row of the same prompt, split and source."""
_CHANGES_OF_A = ("unchanged", "changed", "new answer", "moved out", "removed")
_CHANGES_OF_B = ("unchanged", "changed", "new answer", "moved in", "added")
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Hashes:
    """All N rows of a build, train first, as (N,) arrays."""

    id: np.ndarray
    prompt: np.ndarray
    content: np.ndarray
    split: np.ndarray
    source: np.ndarray
    """Index into the source names of both builds."""
    starts: tuple[int, ...]
    """First row of each split."""

    def place(self, row: int) -> tuple[str, int]:
        """Return a row's split and its number in it."""
        split = int(self.split[row])
        return SPLITS[split], row - self.starts[split]


@dataclass(frozen=True)
class Comparison:
    """Rows of two builds A and B, and their changes."""

    folder_a: Path
    folder_b: Path
    rows_a: Hashes
    rows_b: Hashes
    changes_a: np.ndarray
    """(N_A,) uint8, index into ``_CHANGES_OF_A``."""
    changes_b: np.ndarray
    """(N_B,) uint8, index into ``_CHANGES_OF_B``."""
    pairs: np.ndarray
    """(2, matched): rows of A and the rows of B that they correspond to."""


def compare(a: Path, b: Path, examples: int = EXAMPLES) -> dict[str, Any]:
    """Return all differences, JSON-able.

    ``groups`` has a line for each split and source: ``a`` and ``b`` are its rows in either build; ``a`` is the sum of
    unchanged, changed, new answer, moved out and removed, and ``b`` the sum of unchanged, changed, new answer,
    moved in and added. ``trained_then_tested`` counts prompts of ``a``'s train split that are in ``b``'s test split.
    """
    names: dict[str, int] = {}
    rows_a = _hash_rows(a, names)
    rows_b = _hash_rows(b, names)
    changes_a, changes_b, pairs = _match_rows(rows_a, rows_b)
    comparison = Comparison(a, b, rows_a, rows_b, changes_a, changes_b, pairs)
    has_same_rows = bool((changes_a == 0).all() and (changes_b == 0).all())
    # A model that was trained on A has seen these prompts, so B's test split flatters it.
    trained = rows_a.prompt[rows_a.split == 0]
    tested = rows_b.prompt[rows_b.split == 1]
    return {
        "a": str(a),
        "b": str(b),
        "identical": _have_equal_digests(a, b) and has_same_rows,
        "same rows": has_same_rows,
        "groups": _count_groups(comparison, list(names)),
        "moved": _count_moves(comparison),
        "trained_then_tested": len(np.intersect1d(trained, tested)),
        "examples": _examples(comparison, examples),
        **_compare_ledgers(a, b),
    }


def _hash_rows(folder: Path, names: dict[str, int]) -> Hashes:
    counts = [count_rows(folder, split) for split in SPLITS]
    keys = np.zeros((3, sum(counts)), dtype=np.uint64)
    source = np.zeros(sum(counts), dtype=np.uint32)
    number = 0
    for split in SPLITS:
        for row in rows(folder, split):
            # Three hashes a row instead of the row: builds of millions of rows are compared in memory.
            keys[:, number] = _hash(str(row.get("id"))), _hash(prompt_key(row)), _hash(_content(row))
            source[number] = names.setdefault(str(row.get("source")), len(names))
            number += 1
    split_of = np.repeat(np.arange(len(SPLITS), dtype=np.uint8), counts)
    return Hashes(keys[0], keys[1], keys[2], split_of, source, tuple(np.cumsum([0, *counts[:-1]]).tolist()))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _content(row: Row) -> str:
    return json.dumps({name: value for name, value in row.items() if name not in ("id", "source")}, sort_keys=True)


def _make_unique(keys: np.ndarray) -> np.ndarray:
    """Return (N,) different keys: the n-th occurrence of a key gets the same new key in both builds."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    places = np.arange(len(keys))
    new = np.r_[True, ordered[1:] != ordered[:-1]] if len(keys) else np.zeros(0, bool)
    # Place within the run of equal keys: the place minus the place of the run's first member.
    rank = places - np.maximum.accumulate(np.where(new, places, 0)) if len(keys) else places
    unique = np.empty_like(keys)
    unique[order] = ordered + rank.astype(np.uint64) * _ODD
    return unique


def _match_rows(rows_a: Hashes, rows_b: Hashes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ``changes_a``, ``changes_b`` and ``pairs`` of a comparison."""
    # First by id: unchanged (0), changed (1) or moved (3); the rest is removed or added (4).
    _, same_a, same_b = np.intersect1d(
        _make_unique(rows_a.id), _make_unique(rows_b.id), assume_unique=True, return_indices=True
    )
    changes_a = np.full(len(rows_a.id), 4, np.uint8)
    changes_b = np.full(len(rows_b.id), 4, np.uint8)
    is_moved = (rows_a.split[same_a] != rows_b.split[same_b]) | (rows_a.source[same_a] != rows_b.source[same_b])
    is_changed = np.where(rows_a.content[same_a] == rows_b.content[same_b], 0, 1)
    changes = np.where(is_moved, 3, is_changed).astype(np.uint8)
    changes_a[same_a] = changes
    changes_b[same_b] = changes
    # Then by prompt: a removed and an added row of one prompt have another answer (2).
    removed = np.flatnonzero(changes_a == 4)
    added = np.flatnonzero(changes_b == 4)
    _, removed_places, added_places = np.intersect1d(
        _make_unique(_prompt_in_group(rows_a, removed)),
        _make_unique(_prompt_in_group(rows_b, added)),
        assume_unique=True,
        return_indices=True,
    )
    changes_a[removed[removed_places]] = 2
    changes_b[added[added_places]] = 2
    pairs = np.stack([np.r_[same_a, removed[removed_places]], np.r_[same_b, added[added_places]]])
    return changes_a, changes_b, pairs


def _prompt_in_group(hashes: Hashes, places: np.ndarray) -> np.ndarray:
    """Return (M,) keys of the prompts of some rows together with their split and source."""
    # Only rows of one split and source are paired; a change of these is a move, not a new answer.
    group = hashes.source[places].astype(np.uint64) * np.uint64(2) + hashes.split[places].astype(np.uint64)
    return np.asarray(hashes.prompt[places] ^ (group * _ODD), dtype=np.uint64)


def _count_groups(comparison: Comparison, sources: list[str]) -> list[dict[str, Any]]:
    """Return the numbers of rows and of changes for each split and source."""
    rows_a = comparison.rows_a
    rows_b = comparison.rows_b
    lines = []
    for split, split_name in enumerate(SPLITS):
        for source, name in enumerate(sources):
            of_a = comparison.changes_a[(rows_a.split == split) & (rows_a.source == source)]
            of_b = comparison.changes_b[(rows_b.split == split) & (rows_b.source == source)]
            if len(of_a) or len(of_b):
                line = {"split": split_name, "source": name, "a": len(of_a), "b": len(of_b)}
                line |= {change: int((of_a == number).sum()) for number, change in enumerate(_CHANGES_OF_A)}
                # The first three changes are the same in both builds.
                line |= {
                    change: int((of_b == number).sum()) for number, change in enumerate(_CHANGES_OF_B) if number > 2
                }
                lines.append(line)
    return lines


def _count_moves(comparison: Comparison) -> dict[str, int]:
    """Return the numbers of rows that changed their split, and of rows of one split with another source."""
    in_a, in_b = comparison.pairs
    before = comparison.rows_a.split[in_a]
    after = comparison.rows_b.split[in_b]
    has_other_source = comparison.rows_a.source[in_a] != comparison.rows_b.source[in_b]
    return {
        "train to test": int(((before == 0) & (after == 1)).sum()),
        "test to train": int(((before == 1) & (after == 0)).sum()),
        "to another source": int(((before == after) & has_other_source).sum()),
    }


def _examples(comparison: Comparison, most: int) -> dict[str, list[dict[str, Any]]]:
    """Return the first rows of each change, before and after it."""
    in_a, in_b = comparison.pairs
    selected: dict[str, list[tuple[int | None, int | None]]] = {}
    selected["removed"] = [(int(row), None) for row in np.flatnonzero(comparison.changes_a == 4)[:most]]
    selected["added"] = [(None, int(row)) for row in np.flatnonzero(comparison.changes_b == 4)[:most]]
    for number, change in ((1, "changed"), (2, "new answer"), (3, "moved")):
        rows_after = np.flatnonzero(comparison.changes_b == number)[:most]
        selected[change] = [(int(in_a[in_b == row][0]), int(row)) for row in rows_after]
    # Collect the rows of all examples first, so each build is read once.
    numbers_a = [before for pairs in selected.values() for before, _ in pairs if before is not None]
    numbers_b = [after for pairs in selected.values() for _, after in pairs if after is not None]
    read_a = _read_rows(comparison.folder_a, comparison.rows_a, numbers_a)
    read_b = _read_rows(comparison.folder_b, comparison.rows_b, numbers_b)
    examples: dict[str, list[dict[str, Any]]] = {}
    for change, pairs in selected.items():
        for before, after in pairs:
            example = _example(None if before is None else read_a[before], None if after is None else read_b[after])
            examples.setdefault(change, []).append(example)
    return examples


def _read_rows(folder: Path, hashes: Hashes, numbers: list[int]) -> dict[int, tuple[str, Row]]:
    """Return split and row of some rows, by their numbers among all rows of a build."""
    rows_read = {}
    for split in SPLITS:
        number_of_place = {}
        for number in numbers:
            row_split, place = hashes.place(number)
            if row_split == split:
                number_of_place[place] = number
        if number_of_place:
            for place, row in rows_by_number(folder, split, number_of_place).items():
                rows_read[number_of_place[place]] = (split, row)
    return rows_read


def _example(before: tuple[str, Row] | None, after: tuple[str, Row] | None) -> dict[str, Any]:
    split, row = after or before or ("", {})
    example: dict[str, Any] = {"id": row.get("id"), "source": row.get("source"), "split": split, "text": _excerpt(row)}
    if before is not None and after is not None:
        old_split, old = before
        new = after[1]
        example["was"] = {"id": old.get("id"), "source": old.get("source"), "split": old_split}
        names = [name for name in {**old, **new} if name not in ("id", "source")]
        example["fields"] = {
            name: [_short(old.get(name)), _short(new.get(name))] for name in names if old.get(name) != new.get(name)
        }
    return example


def _excerpt(row: Row) -> str:
    if is_text(row):
        return _short(row["text"])
    return _short(next((message_text(turn) for turn in row.get("prompt", []) if turn.get("role") == "user"), ""))


def _short(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(turn, dict) and "content" in turn for turn in value):
        value = "\n".join(map(message_text, value))
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}…"


def _have_equal_digests(a: Path, b: Path) -> bool:
    """Return True for ledgers with the same digests, which depend on the order of rows."""
    if not ((a / LEDGER).exists() and (b / LEDGER).exists()):
        return False
    return bool(read_ledger(a).get("digests") == read_ledger(b).get("digests"))


def _compare_ledgers(a: Path, b: Path) -> dict[str, Any]:
    """Return steps and sources of both ledgers, matched by name and order; None if a build has no such line."""
    if not ((a / LEDGER).exists() and (b / LEDGER).exists()):
        return {"steps": [], "sources": []}
    ledger_a = read_ledger(a)
    ledger_b = read_ledger(b)
    steps = _match_lines(_named_steps(ledger_a), _named_steps(ledger_b), "step")
    sources = _match_lines(
        [(str(line["source"]), line) for line in ledger_a["sources"]],
        [(str(line["source"]), line) for line in ledger_b["sources"]],
        "source",
    )
    return {"steps": steps, "sources": sources}


def _named_steps(ledger: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return a ledger's steps by name, without their numbers."""
    # A step that was inserted shifts the numbers of all later steps.
    return [(str(line["step"]).split(" ", 1)[-1], line) for line in ledger.get("steps", [])]


def _match_lines(
    lines_a: list[tuple[str, Mapping[str, Any]]], lines_b: list[tuple[str, Mapping[str, Any]]], key: str
) -> list[dict[str, Any]]:
    """Return the lines of both ledgers side by side, aligned like the lines of a text diff."""
    names_a = [name for name, _ in lines_a]
    names_b = [name for name, _ in lines_b]
    matcher = difflib.SequenceMatcher(None, names_a, names_b, autojunk=False)
    matched: list[dict[str, Any]] = []
    for operation, start_a, end_a, start_b, end_b in matcher.get_opcodes():
        part_a = lines_a[start_a:end_a]
        part_b = lines_b[start_b:end_b]
        if operation == "equal":
            for (name, line_a), (_, line_b) in zip(part_a, part_b, strict=True):
                matched.append({key: name, "a": _numbers(line_a), "b": _numbers(line_b)})
        else:
            matched += [{key: name, "a": _numbers(line), "b": None} for name, line in part_a]
            matched += [{key: name, "a": None, "b": _numbers(line)} for name, line in part_b]
    return matched


def _numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: line.get(name, 0) for name in ("rows_in", "added", "changed", "rows_out")} | {
        "dropped": dict(line.get("dropped") or {})
    }
