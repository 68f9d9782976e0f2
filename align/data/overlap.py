"""Coverage of known texts by rows, by shared n-grams of words: the maths of decontamination.

A row covers the words of a text that are in n-grams of ``size`` words which the row has too (Tülu 3, arXiv 2411.15124,
section 3.2). A shorter text is covered by all of its words in succession: five or more anywhere in a part, three or
four as a sentence, a line or the text after a label, one or two as the full part. Case, punctuation and white space do
not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from align.data.ngrams import Block, blocks, is_unspaced

TEMPLATE_TEXTS = 10
"""Number of texts that may share an n-gram before it can belong to a template."""
ANYWHERE_WORDS = 5
"""Words from which a short text may be inside a sentence: fewer are in other sentences by chance."""
STRETCH_WORDS = 3
"""Words from which a short text may be a sentence or line; a text of fewer words must be a full part."""
MAX_MATCHES = 1 << 19
"""Matches of n-grams that are processed at once, about 60 MiB: texts of one template share many with each other."""


@dataclass(frozen=True)
class Hits:
    """Pairs of a row and a text that it covers, ordered by row and text, each pair once. All (H,)."""

    row: np.ndarray
    text: np.ndarray
    coverage: np.ndarray
    """Share of the text's counted words that are covered, above 0 and at most 1."""


class Index:
    """Known texts, searchable by their n-grams of words.

    ``groups`` (N,) int numbers groups of texts that may share a template. An n-gram in more than ``template`` of a
    group's texts, and in more than ten, belongs to it: it is no evidence, and its words do not count.
    """

    def __init__(
        self, texts: Sequence[str], size: int, groups: np.ndarray | None = None, template: float = 1.0
    ) -> None:
        self.size = size
        self.words = np.zeros(len(texts), dtype=np.int64)
        text_hashes = []
        grams = []
        owners = []
        places = []
        for block in blocks([(text, 0)] for text in texts):
            counts = block.words.counts
            numbers = block.first + np.arange(len(counts))
            self.words[numbers] = counts
            text_hashes.append(block.words.hash_texts())
            hashes, offsets = block.ngrams(size)
            grams_per_text = np.diff(offsets)
            # A text shorter than ``size`` has no n-gram; it is searched for as a sequence of all its words.
            is_long = np.repeat(counts >= size, grams_per_text)
            grams.append(hashes[is_long])
            owners.append(np.repeat(numbers, grams_per_text)[is_long])
            places.append((np.arange(len(hashes)) - np.repeat(offsets[:-1], grams_per_text))[is_long])
        # Full texts, sorted by hash, to find parts that equal a full text.
        text_hash = _concatenate(text_hashes)
        non_empty = np.flatnonzero(self.words > 0)
        self._text_hash, self._hashed_text = _sort_by_hash(text_hash[non_empty], non_empty)
        # All n-grams, sorted by hash, with their text and their place in it; shingles of templates are skipped.
        hashes, order = _sort_by_hash(_concatenate(grams), np.arange(sum(map(len, grams))))
        owner = _concatenate(owners)[order]
        place = _concatenate(places)[order]
        if groups is None:
            groups = np.zeros(len(texts), dtype=np.int64)
        is_template = _find_templates(hashes, owner, groups, template)
        self._counted, self._begin = self._count_words(owner[is_template], place[is_template])
        self._gram = hashes[~is_template]
        self._owner = owner[~is_template]
        self._place = place[~is_template]
        # In scripts without spaces a word is one character, and five characters are too few to count anywhere.
        unspaced = np.array([is_unspaced(text) for text in texts], dtype=bool)
        self._may_be_anywhere = (self.words >= ANYWHERE_WORDS) & ~unspaced
        # Short texts have no n-gram of ``size`` words, so each length has a separate index.
        self._short: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        """Sorted hashes and texts of the short texts, by their number of words."""
        for length in np.unique(self.words[(self.words >= STRETCH_WORDS) & (self.words < size)]):
            short = np.flatnonzero(self.words == length)
            self._short[int(length)] = _sort_by_hash(text_hash[short], short)

    def _count_words(self, owner: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of counted words before each word of all texts (W + 1,), and each text's first (N + 1,).

        ``owner`` and ``place`` are text and first word of the templates' n-grams, whose words do not count.
        """
        begin = np.concatenate([[0], np.cumsum(self.words)])
        counts = np.ones(begin[-1], dtype=bool)
        # Words of template n-grams do not count.
        for step in range(self.size):
            counts[begin[owner] + place + step] = False
        sums = np.concatenate([[0], np.cumsum(counts)])
        for text in np.flatnonzero(np.diff(sums[begin]) == 0):
            counts[begin[text] : begin[text + 1]] = True  # a text of only templates counts in full
        return np.concatenate([[0], np.cumsum(counts)]), begin

    def search(self, rows: Sequence[Sequence[str]], least: float = 0.0) -> Hits:
        """Return the texts that each row covers to more than ``least``; a row is given as its parts."""
        parts_with_marks = ([(part, 0) for part in row] for row in rows)
        hits = [self._search(block, least) for block in blocks(parts_with_marks, edges=bool(self._short))]
        return Hits(
            row=_concatenate([block_hits.row for block_hits in hits]),
            text=_concatenate([block_hits.text for block_hits in hits]),
            coverage=_concatenate([block_hits.coverage for block_hits in hits]),
        )

    def _search(self, block: Block, least: float) -> Hits:
        row_of_part = np.repeat(np.arange(len(block.parts) - 1), np.diff(block.parts))
        # First search: parts that equal a text, or hold a short text. Such a text is covered in full.
        part, equal_text = self._find_equal(block)
        total = self._counted[self._begin[1:]] - self._counted[self._begin[:-1]]  # counted words of each text
        rows = [row_of_part[part]]
        texts = [equal_text]
        words = [total[equal_text]]
        # Second search: n-grams that the rows share with the long texts.
        hashes, offsets = block.ngrams(self.size)
        row_of_gram = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        place, count = _find_places(self._gram, hashes)
        # All matches of some rows at a time: a common template would otherwise blow up memory.
        for span in _split_rows(count, offsets):
            match, gram = _expand_matches(place[span], count[span])
            row, text, covered = self._count_covered(row_of_gram[span][gram], self._owner[match], self._place[match])
            is_enough = covered > least * total[text]
            rows.append(row[is_enough])
            texts.append(text[is_enough])
            words.append(covered[is_enough])
        # A pair may come from both searches: the larger coverage counts.
        row, text, covered = best_of_pairs(_concatenate(rows), _concatenate(texts), _concatenate(words))
        return Hits(block.first + row, text, covered / total[text])

    def _find_equal(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Return pairs of a part and a text (P,) if the part equals the text, or contains a short text."""
        words = block.words
        match, part = _find_matches(self._text_hash, words.hash_texts())
        parts = [part]
        texts = [self._hashed_text[match]]
        # Then runs of words inside the parts that equal a short text.
        for length, (short_hashes, text) in self._short.items():
            assert words.opens is not None and words.closes is not None
            hashes, part, first = words.exact_runs(length)
            match, run = _find_matches(short_hashes, hashes)
            # Few words occur in other sentences by chance, so short texts must be a separate stretch.
            is_stretch = words.opens[first[run]] & words.closes[first[run] + length - 1]
            is_hit = is_stretch | self._may_be_anywhere[text[match]]
            parts.append(part[run[is_hit]])
            texts.append(text[match[is_hit]])
        return _concatenate(parts), _concatenate(texts)

    def _count_covered(
        self, row: np.ndarray, text: np.ndarray, place: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return row, text and covered words (P,) of each pair; its n-grams begin at ``place`` (M,)."""
        # Sort the matches, so a pair's matches follow each other by their place in the text.
        order = np.lexsort((place, text, row))
        row = row[order]
        text = text[order]
        place = place[order]
        is_first = _starts_pair(row, text)
        # A pair's last match has no next one and adds its full n-gram.
        is_last = np.append(is_first[1:], True)[: len(is_first)]
        # Each match adds its words up to the next match, so overlapping n-grams count no word twice.
        next_place = np.where(is_last, place + self.size, np.append(place[1:], 0)[: len(place)])
        begins = np.flatnonzero(is_first)
        word = self._begin[text] + place
        added = self._counted[word + np.minimum(next_place - place, self.size)] - self._counted[word]
        covered = np.add.reduceat(added, begins) if len(begins) else added
        return row[begins], text[begins], covered


def _find_templates(hashes: np.ndarray, owner: np.ndarray, groups: np.ndarray, share: float) -> np.ndarray:
    """Return (G,) bool: True for sorted n-grams that belong to the template of their text's group.

    ``hashes`` and ``owner`` (G,) are the n-grams and their texts, ``groups`` (N,) the group of each text.
    """
    group = groups[owner]
    order = np.lexsort((owner, group, hashes))
    hashes = hashes[order]
    owner = owner[order]
    group = group[order]
    # Count the texts of each n-gram within a group.
    is_first = _starts_pair(hashes, group)
    # A gram that a text repeats counts once, since owners are sorted within it.
    is_new_text = is_first | np.append(True, owner[1:] != owner[:-1])[: len(owner)]
    gram = np.cumsum(is_first) - 1
    texts = np.bincount(gram, weights=is_new_text) if len(gram) else np.zeros(0)
    limit = np.maximum(share * np.bincount(groups, minlength=1), TEMPLATE_TEXTS)
    is_template = np.zeros(len(order), dtype=bool)
    is_template[order] = texts[gram] > limit[group]
    return is_template


def _sort_by_hash(hashes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(hashes, kind="stable")
    return hashes.astype(np.uint64)[order], values[order]


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


def _starts_pair(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return (H,) bool: True for the first entry of each pair among sorted ones."""
    is_first = np.ones(len(first), dtype=bool)
    is_first[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return is_first


def best_of_pairs(
    first: np.ndarray, second: np.ndarray, amount: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each pair once, in order, with the largest of its amounts; all (H,)."""
    order = np.lexsort((-amount, second, first))
    first = first[order]
    second = second[order]
    amount = amount[order]
    best = _starts_pair(first, second)
    return first[best], second[best], amount[best]


def _find_matches(sorted_hashes: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs (P,) of places in ``sorted_hashes`` and in ``hashes`` with the same hash."""
    return _expand_matches(*_find_places(sorted_hashes, hashes))


def _find_places(sorted_hashes: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first place of each hash in ``sorted_hashes``, and its number of occurrences there. (H,) each."""
    first_places = np.searchsorted(sorted_hashes, hashes, side="left")
    count = np.zeros(len(hashes), dtype=np.int64)
    matching = np.flatnonzero(first_places < len(sorted_hashes))
    matching = matching[sorted_hashes[first_places[matching]] == hashes[matching]]
    count[matching] = np.searchsorted(sorted_hashes, hashes[matching], side="right") - first_places[matching]
    return first_places, count


def _expand_matches(place: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (P,) every place in ``known`` of every hash, and the number of the hash."""
    # Equal hashes are side by side in ``known``: count up from the first place of each.
    number = np.repeat(np.arange(len(count)), count)
    shift = np.cumsum(count) - count
    return place[number] + np.arange(len(number)) - shift[number], number


def _split_rows(count: np.ndarray, offsets: np.ndarray) -> Iterator[slice]:
    """Yield spans of hashes of full rows, which begin at ``offsets``, with about ``MAX_MATCHES`` matches each."""
    # Matches before each row; a binary search finds how many rows fit into one group.
    before = np.concatenate([[0], np.cumsum(count)])[offsets]
    row = 0
    rows = len(offsets) - 1
    while row < rows:
        end = max(row + 1, int(np.searchsorted(before, before[row] + MAX_MATCHES, side="right")) - 1)
        if before[end] > before[row]:
            yield slice(offsets[row], offsets[end])
        row = end
