"""Coverage of known texts by rows, by shared n-grams of words: the maths of decontamination.

A row covers the words of a text that are in n-grams of ``size`` words which the row has too (Tülu 3, arXiv 2411.15124,
section 3.2). A shorter text is covered by all of its words in succession: five or more anywhere in a part, three or
four as a sentence, a line or the text after a label, one or two as the full part. Shorter n-grams also find a text of
seven or more words with a few changed words, if a part has them in the order of the text (``NEAR_RULES``). Case,
punctuation and white space do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from align.data.ngrams import LONGEST_BYTES, Block, blocks, is_unspaced

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


@dataclass(frozen=True)
class NearRule:
    """Rule by which a text with a few changed words is found: by n-grams of ``size`` words, in the text's order."""

    size: int
    shortest: int
    """Fewest words of a text to which the rule applies."""
    longest: int
    coverage: float
    """Share of the words that a part must exceed, also of the counted words."""
    band: int = 4
    """Displacements of words against the text that count together. Words that were inserted or removed displace those
    behind them; 1 for only replaced words."""
    with_ends: bool = False
    """The part must cover the first and the last word: in short questions another last word asks something else."""


NEAR_RULES = (
    NearRule(3, 8, 9, 0.85, band=1, with_ends=True),
    NearRule(3, 10, 12, 0.7),
    NearRule(4, 13, 24, 0.6),
    NearRule(6, 25, LONGEST_BYTES, 0.6),
)
"""Rules for about one changed word in eight, measured in docs/results.md. Shorter texts are found only unchanged."""


@dataclass
class _Grams:
    """The n-grams of some texts, searchable by hash. All texts keep their numbers."""

    size: int
    shortest: int
    longest: int
    hashes: list[np.ndarray] = field(default_factory=list)
    owners: list[np.ndarray] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)

    def add(self, block: Block, numbers: np.ndarray) -> None:
        """Add the n-grams of a block's texts, which have these numbers."""
        hashes, offsets = block.ngrams(self.size)
        grams_per_text = np.diff(offsets)
        # A text shorter than ``size`` has no n-gram; it is searched for as a sequence of all its words.
        counts = block.words.counts
        is_used = np.repeat((counts >= self.shortest) & (counts <= self.longest), grams_per_text)
        self.hashes.append(hashes[is_used])
        self.owners.append(np.repeat(numbers, grams_per_text)[is_used])
        self.places.append((np.arange(len(hashes)) - np.repeat(offsets[:-1], grams_per_text))[is_used])

    def sort(self, words: np.ndarray, groups: np.ndarray, template: float, keeps_templates: bool) -> None:
        """Sort the n-grams by hash; ``words`` (N,) are the numbers of words of all texts.

        Without ``keeps_templates``, n-grams of templates are no evidence.
        """
        hashes, order = _sort_by_hash(_concatenate(self.hashes), np.arange(sum(map(len, self.hashes))))
        owner = _concatenate(self.owners)[order]
        place = _concatenate(self.places)[order]
        is_member = (words >= self.shortest) & (words <= self.longest)
        is_template = _find_templates(hashes, owner, groups, template, is_member)
        self.begin = np.concatenate([[0], np.cumsum(words)])
        self.counted = self._count_words(owner[is_template], place[is_template])
        self.totals = self.counted[self.begin[1:]] - self.counted[self.begin[:-1]]
        """(N,) counted words of each text."""
        is_evidence = np.full(len(hashes), True) if keeps_templates else ~is_template
        self.gram = hashes[is_evidence]
        self.owner = owner[is_evidence]
        self.place = place[is_evidence]

    def _count_words(self, owner: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Return the number of counted words before each word of all texts (W + 1,).

        ``owner`` and ``place`` are text and first word of the templates' n-grams, whose words do not count.
        """
        counts = np.ones(self.begin[-1], dtype=bool)
        # Words of template n-grams do not count.
        for step in range(self.size):
            counts[self.begin[owner] + place + step] = False
        sums = np.concatenate([[0], np.cumsum(counts)])
        for text in np.flatnonzero(np.diff(sums[self.begin]) == 0):
            counts[self.begin[text] : self.begin[text + 1]] = True  # a text of only templates counts in full
        return np.concatenate([[0], np.cumsum(counts)])

    def cover(self, row: np.ndarray, match: np.ndarray) -> _Covered:
        """Return what pairs of a row and a text share, from the rows (M,) and n-grams (M,) of their matches."""
        text = self.owner[match]
        place = self.place[match]
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
        added = np.minimum(next_place - place, self.size)
        begins = np.flatnonzero(is_first)
        word = self.begin[text] + place
        sums = np.stack([added, self.counted[word + added] - self.counted[word]])
        words, counted = np.add.reduceat(sums, begins, axis=1) if len(begins) else sums
        text = text[begins]
        has_ends = (place[begins] == 0) & (word[is_last] + self.size == self.begin[text + 1])
        return _Covered(row[begins], text, words / np.diff(self.begin)[text], counted / self.totals[text], has_ends)


class _Covered(NamedTuple):
    """Pairs of a row and a text. All (P,)."""

    row: np.ndarray
    text: np.ndarray
    words: np.ndarray
    """Share of the text's words that are covered."""
    counted: np.ndarray
    """Share of its counted words."""
    has_ends: np.ndarray
    """True if its first and its last word are covered."""


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
        self._long = _Grams(size, size, LONGEST_BYTES)
        self._near_rules = [rule for rule in NEAR_RULES if rule.size < size]
        self._near = [_Grams(rule.size, rule.shortest, rule.longest) for rule in self._near_rules]
        for block in blocks([(text, 0)] for text in texts):
            numbers = block.first + np.arange(len(block.words.counts))
            self.words[numbers] = block.words.counts
            text_hashes.append(block.words.hash_texts())
            for grams in (self._long, *self._near):
                grams.add(block, numbers)
        if groups is None:
            groups = np.zeros(len(texts), dtype=np.int64)
        self._long.sort(self.words, groups, template, keeps_templates=False)
        for grams in self._near:
            # A short question shares phrases with others: they are evidence of a copy, together with the other words.
            grams.sort(self.words, groups, template, keeps_templates=True)
        # Full texts, sorted by hash, to find parts that equal a full text.
        text_hash = _concatenate(text_hashes)
        non_empty = np.flatnonzero(self.words > 0)
        self._text_hash, self._hashed_text = _sort_by_hash(text_hash[non_empty], non_empty)
        # In scripts without spaces a word is one character, and five characters are too few to count anywhere.
        unspaced = np.array([is_unspaced(text) for text in texts], dtype=bool)
        self._may_be_anywhere = (self.words >= ANYWHERE_WORDS) & ~unspaced
        # Short texts have no n-gram of ``size`` words, so each length has a separate index.
        self._short: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        """Sorted hashes and texts of the short texts, by their number of words."""
        for length in np.unique(self.words[(self.words >= STRETCH_WORDS) & (self.words < size)]):
            short = np.flatnonzero(self.words == length)
            self._short[int(length)] = _sort_by_hash(text_hash[short], short)

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
        hits = [(row_of_part[part], equal_text, np.ones(len(part)))]
        # Second search: n-grams that the rows share with the long texts.
        hits += self._find_shared(block, least)
        # Third search: shorter n-grams in the order of the text, within one part.
        for rule, grams in zip(self._near_rules, self._near, strict=True):
            for part, text, coverage in _find_near(rule, grams, block, least):
                hits.append((row_of_part[part], text, coverage))
        # A pair may come from several searches: the largest coverage counts.
        row, text, coverage = best_of_pairs(*(_concatenate(list(values)) for values in zip(*hits, strict=True)))
        return Hits(block.first + row, text, coverage)

    def _find_shared(self, block: Block, least: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield row, text and coverage (P,) of texts whose n-grams a row covers to more than ``least``."""
        grams = self._long
        hashes, offsets = block.ngrams(self.size)
        row_of_gram = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        for span, match, gram in _matches(grams, hashes, offsets):
            covered = grams.cover(row_of_gram[span][gram], match)
            is_enough = covered.counted > least
            yield covered.row[is_enough], covered.text[is_enough], covered.counted[is_enough]

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


def _find_near(
    rule: NearRule, grams: _Grams, block: Block, least: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield part, text and coverage (P,) of texts that a part has with a few changed words."""
    hashes, offsets = block.words.ngrams(rule.size)
    part_of_gram = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    for span, match, gram in _matches(grams, hashes, offsets):
        number = gram + span.start
        part = part_of_gram[number]
        # Words of a copy are displaced alike against the text. Bands overlap by half, so a displacement that changes
        # by an inserted word stays in one of them.
        displacement = number - offsets[part] - grams.place[match]
        for half in {0, rule.band // 2}:
            band = (displacement + half) // rule.band + (1 << 30)
            covered = grams.cover((part << 32) + band, match)
            share = np.minimum(covered.words, covered.counted)
            is_enough = (share > max(least, rule.coverage)) & (covered.has_ends | (not rule.with_ends))
            yield covered.row[is_enough] >> 32, covered.text[is_enough], share[is_enough]


def _matches(grams: _Grams, hashes: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield a span of hashes, and the places in ``grams`` and in the span (M,) of those that are equal.

    Rows, which begin at ``offsets``, are not divided. A common template would blow up memory if all came at once.
    """
    place, count = _find_places(grams.gram, hashes)
    for span in _split_rows(count, offsets):
        match, gram = _expand_matches(place[span], count[span])
        yield span, match, gram


def _find_templates(
    hashes: np.ndarray, owner: np.ndarray, groups: np.ndarray, share: float, is_member: np.ndarray
) -> np.ndarray:
    """Return (G,) bool: True for sorted n-grams that belong to the template of their text's group.

    ``hashes`` and ``owner`` (G,) are the n-grams and their texts, ``groups`` (N,) the group of each text. The share is
    of the texts that are members (N,).
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
    limit = np.maximum(share * np.bincount(groups, weights=is_member, minlength=1), TEMPLATE_TEXTS)
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
