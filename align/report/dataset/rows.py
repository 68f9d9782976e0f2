"""What the preview page shows of a build's rows: samples of each source, lengths, turns, clusters of duplicates.

One pass over the rows and two over the dropped ones, a batch at a time; what is kept does not grow with the rows, but
for 8 bytes a duplicate. Samples are chosen by their ids, so they are the same on every machine. Torch-free.
"""

from __future__ import annotations

import heapq
import itertools
import json
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from align.data.built import SPLITS, batches, row_of
from align.data.rows import Row

MOST_SOURCES = 24
"""Sources with samples on the page, the largest first."""
SAMPLES = 3
CLUSTERS, MEMBERS = 8, 4
"""Clusters of duplicates on the page, and dropped rows shown of each."""
MOST_TURNS = 20
"""Longer conversations are counted with these."""
EDGES = np.unique(np.round(2.0 ** (np.arange(0, 4 * 22 + 1) / 4)).astype(np.int64))
"""Bins of lengths in characters, four to a doubling, up to four million."""
ANSWERS = ("completion", "chosen", "rejected")
INSTEAD = '"instead"'
_NUMBERS = itertools.count()
"""So that no two samples are compared by their rows, which have no order."""


@dataclass
class Lengths:
    """Counts by bin of ``EDGES`` (the last one is open), by turns, and of rows, of one source."""

    prompt: np.ndarray = field(default_factory=lambda: np.zeros(len(EDGES), np.int64))
    answers: dict[str, np.ndarray] = field(default_factory=dict)
    turns: np.ndarray = field(default_factory=lambda: np.zeros(MOST_TURNS + 1, np.int64))
    rows: Counter[str] = field(default_factory=Counter)
    """By split."""

    @property
    def total(self) -> int:
        """Rows of all splits."""
        return sum(self.rows.values())


@dataclass
class Cluster:
    """Dropped rows and the one that stands for them: ``instead`` as the ledger names it, its row where it was found."""

    instead: dict[str, str]
    size: int
    kept: Row | None = None
    members: list[dict[str, Any]] = field(default_factory=list)
    """``row``, ``where``, ``step``, ``reason``, ``detail``."""


@dataclass
class Found:
    """Everything the page needs."""

    lengths: dict[str, Lengths]
    samples: dict[str, list[tuple[str, Row]]]
    """By source: split and row."""
    clusters: list[Cluster]
    duplicates: int
    """Dropped rows that another stands for."""


def look(folder: Path) -> Found:
    """Read a build."""
    clusters, duplicates = _clusters(folder)
    wanted: dict[str, list[Cluster]] = defaultdict(list)
    for cluster in clusters:
        wanted[cluster.instead.get("id", "")].append(cluster)
    lengths: dict[str, Lengths] = defaultdict(Lengths)
    heaps: dict[str, list[tuple[int, str, int, str, Row]]] = defaultdict(list)
    for split in SPLITS:
        for batch in batches(folder, split):
            sources, ids = batch.column("source").to_pylist(), batch.column("id").to_pylist()
            _count(batch, split, sources, lengths)
            _draw(batch, split, sources, ids, heaps)
            for at, name in enumerate(ids):
                for cluster in wanted.get(name, ()) if wanted else ():
                    cluster.kept = cluster.kept or row_of(batch, at)
    largest = sorted(heaps, key=lambda name: (-lengths[name].total, name))[:MOST_SOURCES]
    samples = {
        name: [(split, row) for _, _, _, split, row in sorted(heaps[name], key=lambda one: (-one[0], one[1]))]
        for name in largest
    }
    return Found(dict(lengths), samples, clusters, duplicates)


def _draw(batch: pa.RecordBatch, split: str, sources: list[str], ids: list[str], heaps: dict[str, Any]) -> None:
    """Keep of each source the ids with the lowest checksums: a random choice that nothing else decides."""
    for at, (source, name) in enumerate(zip(sources, ids, strict=True)):
        draw = -zlib.crc32(str(name).encode())
        heap = heaps[source]
        if len(heap) < SAMPLES or draw > heap[0][0]:
            entry = (draw, str(name), next(_NUMBERS), split, row_of(batch, at))
            (heapq.heappush if len(heap) < SAMPLES else heapq.heapreplace)(heap, entry)


def _count(batch: pa.RecordBatch, split: str, sources: list[str], lengths: dict[str, Lengths]) -> None:
    names, codes = np.unique(np.array(sources, dtype=object).astype(str), return_inverse=True)
    if "prompt" in batch.schema.names:
        prompt, turns = _characters(batch.column("prompt"))
        answers = {name: _characters(batch.column(name))[0] for name in ANSWERS if name in batch.schema.names}
    else:  # plain texts, which have no turns
        prompt = turns = np.zeros(len(sources), np.int64)
        answers = {"text": pc.utf8_length(batch.column("text")).to_numpy(zero_copy_only=False)}
    for code, name in enumerate(names.tolist()):
        mine, found = codes == code, lengths[name]
        found.rows[split] += int(mine.sum())
        found.prompt += _binned(prompt[mine])
        found.turns += np.bincount(np.minimum(turns[mine], MOST_TURNS), minlength=MOST_TURNS + 1)
        for side, size in answers.items():
            found.answers.setdefault(side, np.zeros(len(EDGES), np.int64))
            found.answers[side] += _binned(size[mine])


def _binned(sizes: np.ndarray) -> np.ndarray:
    return np.bincount(np.searchsorted(EDGES, np.maximum(sizes, 1), side="right") - 1, minlength=len(EDGES))


def _characters(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Characters and messages of each row's list of messages; an empty field has none."""
    contents = pc.struct_field(pc.list_flatten(column), "content")
    sizes = np.asarray(pc.fill_null(pc.utf8_length(contents), 0), dtype=np.int64)
    parents = np.asarray(pc.list_parent_indices(column), dtype=np.int64)
    characters = np.bincount(parents, weights=sizes, minlength=len(column)).astype(np.int64)
    return characters, np.bincount(parents, minlength=len(column))


def _clusters(folder: Path) -> tuple[list[Cluster], int]:
    """The largest groups of dropped rows that one row stands for, and how many such rows there are in all."""
    keys = array("Q")
    for instead, _ in _with_stand_in(folder):
        keys.append(_key(instead))
    if not keys:
        return [], 0
    found, counts = np.unique(np.frombuffer(keys, dtype=np.uint64), return_counts=True)
    order = np.lexsort((found, -counts))[:CLUSTERS]
    sizes = {int(found[at]): int(counts[at]) for at in order}
    clusters: dict[int, Cluster] = {}
    for instead, line in _with_stand_in(folder):
        key = _key(instead)
        if key not in sizes:
            continue
        cluster = clusters.setdefault(key, Cluster(instead, sizes[key]))
        if len(cluster.members) < MEMBERS:
            cluster.members.append({**line, "row": _parsed(line["row"]), "detail": _parsed(line["detail"])})
    return sorted(clusters.values(), key=lambda cluster: (-cluster.size, cluster.instead["where"])), len(keys)


def _with_stand_in(folder: Path) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    for batch in batches(folder, "dropped"):
        some = batch.filter(pc.match_substring(batch.column("detail"), INSTEAD))
        for line in some.to_pylist():
            instead = _parsed(line["detail"]).get("instead")
            if instead:
                yield _named(instead), line


def _named(instead: Any) -> dict[str, str]:
    """A stand-in is an id and a place; either may be all that is known."""
    if isinstance(instead, dict):
        return {"id": str(instead.get("id", "")), "where": str(instead.get("where", ""))}
    return {"id": str(instead), "where": ""}


def _key(instead: dict[str, str]) -> int:
    text = f"{instead['id']}\0{instead['where']}".encode("utf-8", "surrogatepass")
    return (zlib.crc32(text) << 32) | zlib.crc32(text[::-1])


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def quantile(counts: Iterable[int], share: float) -> int:
    """The lower edge of the bin of ``EDGES`` that holds this quantile; 0 for no rows."""
    numbers = np.asarray(list(counts))
    if numbers.sum() == 0:
        return 0
    return int(EDGES[np.searchsorted(np.cumsum(numbers), share * numbers.sum())])
