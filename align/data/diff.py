"""What differs between two builds: rows added, removed, changed, moved between splits, and their ledgers side by side.

Each row is reduced to three 64-bit hashes (its id, its prompt, everything else it holds) and compared sorted, so memory
takes 29 bytes a row, and as much again to sort, whatever rows hold. Leaves out how it is shown. Torch-free.
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

from align.data.built import LEDGER, SPLITS, count_rows, message_text, read_ledger, rows, rows_at
from align.data.rows import Row, is_text, prompt_key

EXAMPLES = 3
EXCERPT = 160
"""Characters of a text in an example."""
KINDS = ("unchanged", "changed", "answered anew", "moved out", "moved in", "removed", "added")
"""What becomes of rows. ``answered anew`` pairs a removed and an added row of the same prompt, split and source."""
_OF_A = ("unchanged", "changed", "answered anew", "moved out", "removed")
_OF_B = ("unchanged", "changed", "answered anew", "moved in", "added")
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Hashes:
    """All N rows of a build, train first, as (N,) arrays."""

    id: np.ndarray
    prompt: np.ndarray
    content: np.ndarray
    split: np.ndarray
    source: np.ndarray
    """Index into the names that both builds share."""
    starts: tuple[int, ...]
    """Where each split begins."""

    def place(self, at: int) -> tuple[str, int]:
        """A row's split and its number there."""
        split = int(self.split[at])
        return SPLITS[split], at - self.starts[split]


def compare(a: Path, b: Path, examples: int = EXAMPLES) -> dict[str, Any]:
    """All differences, JSON-able.

    ``groups`` has a line for each split and source: ``a`` and ``b`` are its rows in either build; ``a`` is the sum of
    unchanged, changed, answered anew, moved out and removed, and ``b`` that of unchanged, changed, answered anew, moved
    in and added. ``trained_then_tested`` counts prompts of ``a``'s train split that are in ``b``'s test split.
    """
    names: dict[str, int] = {}
    one, two = _hashes(a, names), _hashes(b, names)
    fate_a, fate_b, pairs = _fates(one, two)
    labels = list(names)
    return {
        "a": str(a),
        "b": str(b),
        "identical": _identical(a, b) and bool((fate_a == 0).all() and (fate_b == 0).all()),
        "same rows": bool((fate_a == 0).all() and (fate_b == 0).all()),
        "groups": _groups(one, two, fate_a, fate_b, labels),
        "moved": _moved(one, two, pairs),
        "trained_then_tested": len(np.intersect1d(one.prompt[one.split == 0], two.prompt[two.split == 1])),
        "examples": _examples(a, b, one, two, fate_a, fate_b, pairs, examples),
        **_ledgers(a, b),
    }


def _hashes(folder: Path, names: dict[str, int]) -> Hashes:
    counts = [count_rows(folder, split) for split in SPLITS]
    keys = np.zeros((3, sum(counts)), dtype=np.uint64)
    source = np.zeros(sum(counts), dtype=np.uint32)
    at = 0
    for split in SPLITS:
        for row in rows(folder, split):
            keys[:, at] = _hash(str(row.get("id"))), _hash(prompt_key(row)), _hash(_content(row))
            source[at] = names.setdefault(str(row.get("source")), len(names))
            at += 1
    split_of = np.repeat(np.arange(len(SPLITS), dtype=np.uint8), counts)
    return Hashes(keys[0], keys[1], keys[2], split_of, source, tuple(np.cumsum([0, *counts[:-1]]).tolist()))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _content(row: Row) -> str:
    return json.dumps({name: value for name, value in row.items() if name not in ("id", "source")}, sort_keys=True)


def _nth(keys: np.ndarray) -> np.ndarray:
    """Keys made different from each other: the second of its kind is another than the first, in both builds alike."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    places = np.arange(len(keys))
    new = np.r_[True, ordered[1:] != ordered[:-1]] if len(keys) else np.zeros(0, bool)
    rank = places - np.maximum.accumulate(np.where(new, places, 0)) if len(keys) else places
    found = np.empty_like(keys)
    found[order] = ordered + rank.astype(np.uint64) * _ODD
    return found


def _fates(one: Hashes, two: Hashes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What becomes of each row of either build (index into ``_OF_A``, ``_OF_B``), and which rows belong together."""
    _, at, of = np.intersect1d(_nth(one.id), _nth(two.id), assume_unique=True, return_indices=True)
    fate_a, fate_b = np.full(len(one.id), 4, np.uint8), np.full(len(two.id), 4, np.uint8)
    moved = (one.split[at] != two.split[of]) | (one.source[at] != two.source[of])
    fate = np.where(moved, 3, np.where(one.content[at] == two.content[of], 0, 1)).astype(np.uint8)
    fate_a[at], fate_b[of] = fate, fate
    gone, new = np.flatnonzero(fate_a == 4), np.flatnonzero(fate_b == 4)
    _, left, right = np.intersect1d(
        _nth(_asked(one, gone)), _nth(_asked(two, new)), assume_unique=True, return_indices=True
    )
    fate_a[gone[left]], fate_b[new[right]] = 2, 2
    pairs = np.stack([np.r_[at, gone[left]], np.r_[of, new[right]]])  # (2, matched)
    return fate_a, fate_b, pairs


def _asked(hashes: Hashes, some: np.ndarray) -> np.ndarray:
    """One key for a prompt in a split and source."""
    group = hashes.source[some].astype(np.uint64) * np.uint64(2) + hashes.split[some].astype(np.uint64)
    return np.asarray(hashes.prompt[some] ^ (group * _ODD), dtype=np.uint64)


def _groups(
    one: Hashes, two: Hashes, fate_a: np.ndarray, fate_b: np.ndarray, labels: list[str]
) -> list[dict[str, Any]]:
    lines = []
    for split, split_name in enumerate(SPLITS):
        for source, name in enumerate(labels):
            of_a = fate_a[(one.split == split) & (one.source == source)]
            of_b = fate_b[(two.split == split) & (two.source == source)]
            if len(of_a) or len(of_b):
                line = {"split": split_name, "source": name, "a": len(of_a), "b": len(of_b)}
                line |= {kind: int((of_a == number).sum()) for number, kind in enumerate(_OF_A)}
                line |= {kind: int((of_b == number).sum()) for number, kind in enumerate(_OF_B) if number > 2}
                lines.append(line)
    return lines


def _moved(one: Hashes, two: Hashes, pairs: np.ndarray) -> dict[str, int]:
    """Rows that changed sides, and rows of the same side whose source has another name."""
    before, after = one.split[pairs[0]], two.split[pairs[1]]
    return {
        "train to test": int(((before == 0) & (after == 1)).sum()),
        "test to train": int(((before == 1) & (after == 0)).sum()),
        "to another source": int(((before == after) & (one.source[pairs[0]] != two.source[pairs[1]])).sum()),
    }


def _examples(
    a: Path,
    b: Path,
    one: Hashes,
    two: Hashes,
    fate_a: np.ndarray,
    fate_b: np.ndarray,
    pairs: np.ndarray,
    most: int,
) -> dict[str, list[dict[str, Any]]]:
    """The first rows of each fate, as they were and as they are."""
    chosen: dict[str, list[tuple[int | None, int | None]]] = {"removed": [], "added": []}
    chosen["removed"] = [(int(at), None) for at in np.flatnonzero(fate_a == 4)[:most]]
    chosen["added"] = [(None, int(at)) for at in np.flatnonzero(fate_b == 4)[:most]]
    for number, kind in ((1, "changed"), (2, "answered anew"), (3, "moved")):
        places = np.flatnonzero(fate_b == number)[:most]
        chosen[kind] = [(int(pairs[0][pairs[1] == at][0]), int(at)) for at in places]
    read_a = _read(a, one, [was for some in chosen.values() for was, _ in some if was is not None])
    read_b = _read(b, two, [now for some in chosen.values() for _, now in some if now is not None])
    return {
        kind: [
            _example(None if was is None else read_a[was], None if now is None else read_b[now]) for was, now in some
        ]
        for kind, some in chosen.items()
        if some
    }


def _read(folder: Path, hashes: Hashes, some: list[int]) -> dict[int, tuple[str, Row]]:
    found = {}
    for split in SPLITS:
        places = {hashes.place(at)[1]: at for at in some if hashes.place(at)[0] == split}
        for place, row in rows_at(folder, split, places).items() if places else ():
            found[places[place]] = (split, row)
    return found


def _example(was: tuple[str, Row] | None, now: tuple[str, Row] | None) -> dict[str, Any]:
    split, row = now or was or ("", {})
    found: dict[str, Any] = {"id": row.get("id"), "source": row.get("source"), "split": split, "text": _excerpt(row)}
    if was is not None and now is not None:
        before, after = was[1], now[1]
        found["was"] = {"id": before.get("id"), "source": before.get("source"), "split": was[0]}
        names = [name for name in {**before, **after} if name not in ("id", "source")]
        found["fields"] = {
            name: [_short(before.get(name)), _short(after.get(name))]
            for name in names
            if before.get(name) != after.get(name)
        }
    return found


def _excerpt(row: Row) -> str:
    if is_text(row):
        return _short(row["text"])
    return _short(next((message_text(turn) for turn in row.get("prompt", []) if turn.get("role") == "user"), ""))


def _short(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(turn, dict) and "content" in turn for turn in value):
        value = "\n".join(map(message_text, value))
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}…"


def _identical(a: Path, b: Path) -> bool:
    """Whether the ledgers say the same digests; order counts."""
    if not ((a / LEDGER).exists() and (b / LEDGER).exists()):
        return False
    return bool(read_ledger(a).get("digests") == read_ledger(b).get("digests"))


def _ledgers(a: Path, b: Path) -> dict[str, Any]:
    """Steps and sources of both ledgers, matched by name and order; None where one build has no such line."""
    if not ((a / LEDGER).exists() and (b / LEDGER).exists()):
        return {"steps": [], "sources": []}
    one, two = read_ledger(a), read_ledger(b)
    steps = _side_by_side(
        [(str(line["step"]).split(" ", 1)[-1], line) for line in one.get("steps", [])],
        [(str(line["step"]).split(" ", 1)[-1], line) for line in two.get("steps", [])],
        "step",
    )
    sources = _side_by_side(
        [(str(line["source"]), line) for line in one["sources"]],
        [(str(line["source"]), line) for line in two["sources"]],
        "source",
    )
    return {"steps": steps, "sources": sources}


def _side_by_side(
    one: list[tuple[str, Mapping[str, Any]]], two: list[tuple[str, Mapping[str, Any]]], word: str
) -> list[dict[str, Any]]:
    matcher = difflib.SequenceMatcher(None, [name for name, _ in one], [name for name, _ in two], autojunk=False)
    lines: list[dict[str, Any]] = []
    for what, a_from, a_to, b_from, b_to in matcher.get_opcodes():
        if what == "equal":
            lines += [
                {word: one[at][0], "a": _numbers(one[at][1]), "b": _numbers(two[of][1])}
                for at, of in zip(range(a_from, a_to), range(b_from, b_to), strict=True)
            ]
        else:
            lines += [{word: name, "a": _numbers(line), "b": None} for name, line in one[a_from:a_to]]
            lines += [{word: name, "a": None, "b": _numbers(line)} for name, line in two[b_from:b_to]]
    return lines


def _numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: line.get(name, 0) for name in ("rows_in", "added", "changed", "rows_out")} | {
        "dropped": dict(line.get("dropped") or {})
    }


__all__ = ["KINDS", "compare"]
