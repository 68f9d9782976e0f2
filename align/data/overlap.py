"""How much of known texts stands in rows, by runs of words they share: the maths of decontamination.

A text is covered by a row as far as its words lie in runs of ``size`` words that the row has too (Tülu 3, arXiv
2411.15124, section 3.2). A text of fewer words is found by all its words in a row: five or more of them anywhere in a
part, three or four where they are a sentence, a line or what stands behind a label, one or two where they are the whole
part. Case, punctuation and white space count nowhere. Left out: where texts and rows come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from align.data.ngrams import Block, blocks, is_unspaced

TEMPLATE_TEXTS = 10
"""As many texts may share a run before it can be a template."""
ANYWHERE = 5
"""Words from which a short text is found in the middle of a sentence: of fewer, other sentences have them by chance."""
STRETCH = 3
"""Words from which a short text is found as a sentence or line; of fewer, it must be a whole part."""
MATCHES = 1 << 19
"""Runs of texts that are looked at in one go, about 60 MiB: texts of one template share as many with one another."""


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
        unspaced = np.array([is_unspaced(text) for text in texts], dtype=bool)
        self._anywhere = (self.words >= ANYWHERE) & ~unspaced
        self._short = {
            int(length): _by_hash(_joined(whole)[short], short)
            for length in np.unique(self.words[(self.words >= STRETCH) & (self.words < size)])
            for short in [np.flatnonzero(self.words == length)]
        }

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

    def search(self, rows: Sequence[Sequence[str]], least: float = 0.0) -> Hits:
        """What each row, given in parts, covers, where that is more than ``least`` of a text."""
        edges = bool(self._short)
        found = [self._search(block, least) for block in blocks(([(part, 0) for part in row] for row in rows), edges)]
        return Hits(*(_joined([getattr(hits, name) for hits in found]) for name in ("row", "text", "coverage")))

    def _search(self, block: Block, least: float) -> Hits:
        row_of_part = np.repeat(np.arange(len(block.parts) - 1), np.diff(block.parts))
        part, equal_text = self._equal(block)
        whole = self._counted[self._begin[1:]] - self._counted[self._begin[:-1]]
        rows, texts, words = [row_of_part[part]], [equal_text], [whole[equal_text]]
        hashes, offsets = block.ngrams(self.size)
        row_of_gram = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        place, many = _places(self._gram, hashes)
        for span in _spans(many, offsets):
            at, gram = _pairs(place[span], many[span])
            row, text, covered = self._covered(row_of_gram[span][gram], self._owner[at], self._place[at])
            enough = covered > least * whole[text]
            rows.append(row[enough])
            texts.append(text[enough])
            words.append(covered[enough])
        row, text, covered = _joined(rows), _joined(texts), _joined(words)
        order = np.lexsort((-covered, text, row))
        row, text, covered = row[order], text[order], covered[order]
        best = _changes(row, text)
        row, text, covered = row[best], text[best], covered[best]
        return Hits(block.first + row, text, covered / whole[text])

    def _equal(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of part and text where the part has all words of the text: it is equal to it, or has it inside."""
        words = block.words
        at, part = _matches(self._whole, words.whole())
        parts, texts = [part], [self._whole_text[at]]
        for length, (known, text) in self._short.items():
            assert words.opens is not None and words.closes is not None
            hashes, part, first = words.exact_runs(length)
            at, run = _matches(known, hashes)
            stretch = words.opens[first[run]] & words.closes[first[run] + length - 1]
            inside = stretch | self._anywhere[text[at]]
            parts.append(part[run[inside]])
            texts.append(text[at[inside]])
        return _joined(parts), _joined(texts)

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
    return _pairs(*_places(known, hashes))


def _places(known: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each hash its first place in sorted ``known`` and how often it is there. (H,) each."""
    left = np.searchsorted(known, hashes, side="left")
    many = np.zeros(len(hashes), dtype=np.int64)
    found = np.flatnonzero(left < len(known))
    found = found[known[left[found]] == hashes[found]]
    many[found] = np.searchsorted(known, hashes[found], side="right") - left[found]
    return left, many


def _pairs(place: np.ndarray, many: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every place in ``known`` of every hash, and the number of the hash."""
    number = np.repeat(np.arange(len(many)), many)
    shift = np.cumsum(many) - many
    return place[number] + np.arange(len(number)) - shift[number], number


def _spans(many: np.ndarray, offsets: np.ndarray) -> Iterator[slice]:
    """Runs of whole rows, which begin at ``offsets``, with about ``MATCHES`` pairs each."""
    before = np.concatenate([[0], np.cumsum(many)])[offsets]
    row, rows = 0, len(offsets) - 1
    while row < rows:
        end = max(row + 1, int(np.searchsorted(before, before[row] + MATCHES, side="right")) - 1)
        if before[end] > before[row]:
            yield slice(offsets[row], offsets[end])
        row = end
