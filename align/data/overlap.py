"""How much of known texts stands in rows, by runs of words they share: the maths of decontamination.

A text is covered by a row as far as its words lie in runs of ``size`` words that the row has too (Tülu 3, arXiv
2411.15124, section 3.2). Texts of fewer words are found where a part of a row is equal to them, case, punctuation and
white space apart. Left out: where texts and rows come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from align.data.ngrams import Block, blocks

TEMPLATE_TEXTS = 10
"""As many texts may share a run before it can be a template."""


@dataclass(frozen=True)
class Hits:
    """Which rows cover which texts, ordered by row and text, each pair once. All (H,)."""

    row: np.ndarray
    text: np.ndarray
    coverage: np.ndarray
    """Share of the text's words that count, above 0 and at most 1."""


class Index:
    """Known texts, searchable by their runs of words.

    ``groups`` (N,) int numbers texts that share a template. A run that more than ``template`` of a group's texts have,
    and more than ten, is part of it: it shows nothing, and words that stand in such runs do not count.
    """

    def __init__(
        self, texts: Sequence[str], size: int, groups: np.ndarray | None = None, template: float = 1.0
    ) -> None:
        self.size = size
        self.words = np.zeros(len(texts), dtype=np.int64)
        whole, grams, owners, places = [], [], [], []
        for block in blocks([(text, 0)] for text in texts):
            counts = block.words.counts
            numbers = block.first + np.arange(len(counts))
            self.words[numbers] = counts
            whole.append(block.words.whole())
            hashes, offsets = block.ngrams(size)
            runs = np.diff(offsets)
            long = np.repeat(counts >= size, runs)
            grams.append(hashes[long])
            owners.append(np.repeat(numbers, runs)[long])
            places.append((np.arange(len(hashes)) - np.repeat(offsets[:-1], runs))[long])
        spoken = np.flatnonzero(self.words > 0)
        self._whole, self._whole_text = _by_hash(_joined(whole)[spoken], spoken)
        hashes, order = _by_hash(_joined(grams), np.arange(sum(map(len, grams))))
        owner, place = _joined(owners)[order], _joined(places)[order]
        shown = ~_templates(hashes, owner, np.zeros(len(texts), dtype=np.int64) if groups is None else groups, template)
        self._counted, self._begin = self._count_words(owner[~shown], place[~shown])
        self._gram, self._owner, self._place = hashes[shown], owner[shown], place[shown]

    def _count_words(self, owner: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many words before each word of all texts count, and where each text's words begin among them."""
        begin = np.concatenate([[0], np.cumsum(self.words)])
        counts = np.ones(begin[-1], dtype=bool)
        for step in range(self.size):
            counts[begin[owner] + place + step] = False
        sums = np.concatenate([[0], np.cumsum(counts)])
        for text in np.flatnonzero(np.diff(sums[begin]) == 0):
            counts[begin[text] : begin[text + 1]] = True  # nothing but template: all of it counts
        return np.concatenate([[0], np.cumsum(counts)]), begin

    def search(self, rows: Sequence[Sequence[str]]) -> Hits:
        """What each row, given in parts, covers."""
        found = [self._search(block) for block in blocks([(part, 0) for part in row] for row in rows)]
        return Hits(*(_joined([getattr(hits, name) for hits in found]) for name in ("row", "text", "coverage")))

    def _search(self, block: Block) -> Hits:
        row_of_part = np.repeat(np.arange(len(block.parts) - 1), np.diff(block.parts))
        at, part = _matches(self._whole, block.words.whole())
        equal_row, equal_text = row_of_part[part], self._whole_text[at]
        hashes, offsets = block.ngrams(self.size)
        row_of_gram = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        at, gram = _matches(self._gram, hashes)
        row, text, covered = self._covered(row_of_gram[gram], self._owner[at], self._place[at])
        row, text = np.concatenate([row, equal_row]), np.concatenate([text, equal_text])
        whole = self._counted[self._begin[1:]] - self._counted[self._begin[:-1]]
        covered = np.concatenate([covered, whole[equal_text]])
        order = np.lexsort((text, row))  # found both ways, a pair is covered whole both times
        row, text, covered = row[order], text[order], covered[order]
        best = _changes(row, text)
        row, text, covered = row[best], text[best], covered[best]
        return Hits(block.first + row, text, covered / whole[text])

    def _covered(
        self, row: np.ndarray, text: np.ndarray, place: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs of row and text, and how many words that count lie in the runs that begin at ``place``."""
        order = np.lexsort((place, text, row))
        row, text, place = row[order], text[order], place[order]
        fresh = _changes(row, text)
        last = np.append(fresh[1:], True)[: len(fresh)]
        following = np.where(last, place + self.size, np.append(place[1:], 0)[: len(place)])
        begins = np.flatnonzero(fresh)
        word = self._begin[text] + place
        steps = self._counted[word + np.minimum(following - place, self.size)] - self._counted[word]
        covered = np.add.reduceat(steps, begins) if len(begins) else steps
        return row[begins], text[begins], covered


def _templates(hashes: np.ndarray, owner: np.ndarray, groups: np.ndarray, share: float) -> np.ndarray:
    """(G,) bool: which of the sorted runs belong to the template of their text's group."""
    group = groups[owner]
    order = np.lexsort((owner, group, hashes))
    hashes, owner, group = hashes[order], owner[order], group[order]
    fresh = _changes(hashes, group)
    another = fresh | np.append(True, owner[1:] != owner[:-1])[: len(owner)]
    kind = np.cumsum(fresh) - 1
    texts = np.bincount(kind, weights=another) if len(kind) else np.zeros(0)
    limit = np.maximum(share * np.bincount(groups, minlength=1), TEMPLATE_TEXTS)
    found = np.zeros(len(order), dtype=bool)
    found[order] = texts[kind] > limit[group]
    return found


def _by_hash(hashes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(hashes, kind="stable")
    return hashes.astype(np.uint64)[order], values[order]


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


def _changes(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(H,) bool: where a new pair begins among sorted ones."""
    fresh = np.ones(len(left), dtype=bool)
    fresh[1:] = (left[1:] != left[:-1]) | (right[1:] != right[:-1])
    return fresh


def _matches(known: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of places in sorted ``known`` and in ``hashes`` with the same hash."""
    left = np.searchsorted(known, hashes, side="left")
    found = np.flatnonzero(left < len(known))
    found = found[known[left[found]] == hashes[found]]
    left = left[found]
    many = np.searchsorted(known, hashes[found], side="right") - left
    shift = np.repeat(np.cumsum(many) - many, many)
    return np.repeat(left, many) + np.arange(many.sum()) - shift, np.repeat(found, many)
