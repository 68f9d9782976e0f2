"""MinHash against Jaccard similarities counted by hand and by sets, and clusters against a plain union of pairs."""

from __future__ import annotations

import itertools
import multiprocessing
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data import minhash
from align.data.minhash import (
    choose_bands,
    estimate,
    find_clusters,
    first_equal,
    first_stays,
    join,
    signatures,
    sketch,
    standard_error,
)
from align.data.ngrams import Sets, read_sets


def cluster(signature: np.ndarray, exact_keys: np.ndarray, threshold: float) -> np.ndarray:
    return find_clusters(signature, exact_keys, threshold).label


def jaccard(first: str, second: str, size: int) -> float:
    sets = []
    for text in (first, second):
        words = text.split()
        sets.append({tuple(words[i : i + size]) for i in range(max(len(words) - size + 1, 1))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def estimated(first: str, second: str, size: int, permutations: int = 1024) -> float:
    result = signatures([first, second], shingle=size, permutations=permutations)
    return float(estimate(result, np.array([0]), np.array([1]))[0])


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(2000)}" for _ in range(count)]


@pytest.mark.parametrize(
    "first, second, size, expected",
    [
        ("a b c d", "a b c e", 2, 2 / 4),  # ab bc cd | ab bc ce
        ("a b c d", "d c b a", 1, 1.0),  # the same words in another order
        ("a b c d", "d c b a", 2, 0.0),  # no pair of words in common
        ("a a a a", "a a", 2, 1.0),  # sets: a pair counts once
        ("a b", "a b c", 3, 0.0),  # a short text is one shingle of its own
        ("a b c d e f", "a b c x e f", 3, 1 / 7),  # abc | bcd cde def | bcx cxe xef
    ],
)
def test_hand_worked_similarities(first: str, second: str, size: int, expected: float) -> None:
    assert jaccard(first, second, size) == pytest.approx(expected)
    assert estimated(first, second, size) == pytest.approx(expected, abs=4 * standard_error(0.5, 1024))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, 150), st.floats(0, 0.5), st.integers(1, 5))
def test_estimates_are_within_five_standard_errors(seed: int, count: int, edits: float, size: int) -> None:
    rng = random.Random(seed)
    text = words(rng, count)
    edited = [word if rng.random() > edits else "new" for word in text]
    expected = jaccard(" ".join(text), " ".join(edited), size)
    error = max(standard_error(expected, 1024), standard_error(1 / 256, 1024))
    assert abs(estimated(" ".join(text), " ".join(edited), size) - expected) < 5 * error


def test_estimates_are_unbiased_and_as_wide_as_stated() -> None:
    rng = random.Random(0)
    pairs, expected = [], []
    for _ in range(800):
        text = words(rng, 60)
        edited = text[:50] + words(rng, 10)
        pairs += [" ".join(text), " ".join(edited)]
        expected.append(jaccard(pairs[-2], pairs[-1], 2))
    actual = signatures(pairs, shingle=2, permutations=128)
    off = estimate(actual, np.arange(0, 1600, 2), np.arange(1, 1600, 2)) - np.array(expected)
    stated = standard_error(float(np.mean(expected)), 128)
    assert abs(off.mean()) < 4 * stated / 800**0.5
    assert 0.85 < off.std() / stated < 1.15


def test_chance_agreement_of_bytes_is_taken_off() -> None:
    rng = random.Random(1)
    actual = signatures([" ".join(words(rng, 60)) for _ in range(800)], shingle=3, permutations=128)
    off = estimate(actual, np.arange(0, 800, 2), np.arange(1, 800, 2))
    assert abs(off.mean()) < 4 * standard_error(1 / 256, 128) / 400**0.5  # it would be 1 / 256 = 0.0039


def test_marked_parts_match_only_marked_parts() -> None:
    sketched = sketch([[("a b c", 0), ("d e f", 1)]], shingle=2)
    assert (sketched[0] != sketch([[("a b c d e f", 0)]], shingle=2)[0]).any()
    swapped = sketch([[("d e f", 0), ("a b c", 1)]], shingle=2)
    both = np.concatenate([sketched[0], swapped[0]])
    assert abs(float(estimate(both, np.array([0]), np.array([1]))[0])) < 0.05
    assert sketched[1] != swapped[1]
    assert sketch([[("a B c!", 0), ("d e f", 1)]], shingle=2)[1] == sketched[1]
    unmarked = sketch([[("a b", 0), ("c d", 0)], [("c d", 0), ("a b", 0)], [("a b", 0), ("c d", 0)]])[1]
    assert unmarked[0] != unmarked[1] and unmarked[0] == unmarked[2]


def test_texts_without_words_are_like_each_other_only() -> None:
    texts = ["a b c", "?!", "...", "d e f", "", "a b c"]
    signature, full = sketch([[(text, 0)] for text in texts])
    assert cluster(signature, full, 0.5).tolist() == [0, 1, 1, 3, 1, 0]
    assert full[1] == full[2] != full[0]
    assert (signature[[1, 2]] == signature[4]).all()


def plain_components(similar: np.ndarray) -> list[int]:
    label = list(range(len(similar)))
    for _ in label:
        for i, j in itertools.product(range(len(similar)), repeat=2):
            if similar[i, j]:
                label[i] = label[j] = min(label[i], label[j])
    return label


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.4, 0.7, 0.9]))
def test_clusters_are_the_components_of_like_pairs(seed: int, threshold: float) -> None:
    rng = random.Random(seed)
    texts = [" ".join(words(rng, 20)) for _ in range(4)]
    for _ in range(10):
        copy = rng.choice(texts).split()
        copy[rng.randrange(20)] = "edited"
        texts.append(" ".join(copy))
    signature, full = sketch([[(text, 0)] for text in texts], shingle=2, permutations=32)
    every = np.arange(len(texts))
    left, right = np.repeat(every, len(texts)), np.tile(every, len(texts))
    similar = (estimate(signature, left, right) >= threshold).reshape(len(texts), -1)
    with pytest.MonkeyPatch.context() as patch:  # bands of one row each: every like pair is a candidate
        patch.setattr(minhash, "choose_bands", lambda *_: minhash.Bands(32, 1))
        clusters = find_clusters(signature, full, threshold)
        assert clusters.label.tolist() == plain_components(similar)
        shuffled = np.array(rng.sample(range(len(texts)), len(texts)))
        again = cluster(signature[shuffled], full[shuffled], threshold)
    same = clusters.label[shuffled][:, None] == clusters.label[shuffled][None]
    assert (same == (again[:, None] == again[None])).all()
    assert (again <= np.arange(len(texts))).all()


def test_exact_keys_join_what_signatures_do_not() -> None:
    signature = signatures(["a b c d e", "v w x y z", "a b c d e", "k l m n o"])
    assert cluster(signature, np.array([0.5, 0.25, 0.75, 0.25]), 0.7).tolist() == [0, 1, 0, 1]


def test_a_chain_of_like_rows_is_one_cluster() -> None:
    text = [f"w{number}" for number in range(60)]
    chain = [" ".join(text[begin : begin + 40]) for begin in (12, 0, 4, 8, 16, 20)]
    assert jaccard(chain[1], chain[5], 3) < 0.5
    signature, full = sketch([[(text, 0)] for text in chain])
    assert cluster(signature, full, 0.7).tolist() == [0] * 6


def template_rows(count: int, shared: int) -> list[str]:
    """Texts of 100 words, the first of them shared."""
    rng = random.Random(1)
    first = words(rng, shared)
    return [" ".join([*first, *words(rng, 100 - shared)]) for _ in range(count)]


def test_large_buckets_are_compared_within_the_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(minhash, "WINDOW", 4)
    monkeypatch.setattr(minhash, "_PAIRS", 7)
    texts = template_rows(60, shared=60)
    texts += [texts[number] + " more" for number in range(0, 60, 3)]
    signature, full = sketch([[(text, 0)] for text in texts], shingle=1)
    clusters = find_clusters(signature, full, 0.8)
    assert clusters.left_out > 0
    assert clusters.label.tolist() == [*range(60), *range(0, 60, 3)]
    assert clusters.compared < len(texts) * 4 * choose_bands(0.8, 128).count


def test_pairs_left_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minhash, "WINDOW", 2)
    signature = np.zeros((7, 16), dtype=np.uint8)
    signature[5:] = 1  # a bucket of five and one of two in each band
    clusters = find_clusters(signature, np.arange(7), 0.9)
    assert clusters.label.tolist() == [0, 0, 0, 0, 0, 5, 5]
    # of five, the pairs 3 and 4 apart: 0-3, 1-4, 0-4
    assert clusters.left_out == 3 * choose_bands(0.9, 16).count


@pytest.mark.parametrize("remembered", [0, 1 << 22])
def test_shingles_decide_where_estimates_are_unsure(remembered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one template, 0.6 alike: estimates alone put most of them together, for a few are above 0.7."""
    monkeypatch.setattr(minhash, "STORED_PAIRS", remembered)
    texts = template_rows(400, shared=75)
    sets_of_words = [set(text.split()) for text in texts]
    parts = [[(text, 0)] for text in texts]
    signature, full = sketch(parts, shingle=1)
    estimated = find_clusters(signature, full, 0.7)
    assert len(set(estimated.label.tolist())) < 360 and estimated.exact == 0
    read: list[int] = []

    def sets(rows: np.ndarray) -> Sets:
        read.extend(rows.tolist())
        return read_sets(rows, [parts[row] for row in rows], 1)

    clusters = find_clusters(signature, full, 0.7, read=sets)
    similar = [
        [len(first & second) / len(first | second) >= 0.7 for second in sets_of_words] for first in sets_of_words
    ]
    assert clusters.label.tolist() == [row.index(True) for row in similar]
    assert read == sorted(set(read)) and clusters.exact > 0


def test_a_pair_exactly_at_the_threshold_is_alike() -> None:
    shared = [f"s{place}" for place in range(20)]
    texts = [" ".join([*shared, *(f"{letter}{place}" for place in range(10))]) for letter in "ab"]  # 20 of 40
    parts = [[(text, 0)] for text in texts]
    signature, full = sketch(parts, shingle=1)

    def read(rows: np.ndarray) -> Sets:
        return read_sets(rows, [parts[row] for row in rows], 1)

    assert find_clusters(signature, full, 0.5, 0.999999, read).label.tolist() == [0, 0]
    assert find_clusters(signature, full, 0.501, 0.999999, read).label.tolist() == [0, 1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.5, 0.8, 1.0]))
def test_with_shingles_clusters_are_those_of_exact_similarity(seed: int, threshold: float) -> None:
    rng = random.Random(seed)
    texts = [" ".join(words(rng, 20)) for _ in range(4)]
    for _ in range(10):
        copy = rng.choice(texts).split()
        copy[rng.randrange(20)] = "edited"
        texts.append(" ".join(copy))
    parts = [[(text, 0)] for text in texts]
    signature, full = sketch(parts, shingle=2, permutations=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "choose_bands", lambda *_: minhash.Bands(32, 1))
        patch.setattr(minhash, "DOUBT", 40)  # else a pair in a thousand is passed over for its estimate
        clusters = find_clusters(
            signature, full, threshold, read=lambda rows: read_sets(rows, [parts[row] for row in rows], 2)
        )
    similar = np.array([[jaccard(first, second, 2) >= threshold for second in texts] for first in texts])
    assert clusters.label.tolist() == plain_components(similar)


@settings(deadline=None)
@given(st.floats(0.3, 1.0), st.integers(16, 256), st.floats(0.5, 0.99))
def test_bands_look_at_pairs_at_the_threshold(threshold: float, permutations: int, recall: float) -> None:
    bands = choose_bands(threshold, permutations, recall)
    assert bands.count * bands.rows <= permutations
    assert bands.chance(threshold) >= recall or bands.rows == 1
    fewer = minhash.Bands(permutations // (bands.rows + 1), bands.rows + 1)
    assert fewer.count == 0 or fewer.chance(threshold) < recall


def test_bands_by_hand() -> None:
    # 25 bands of 5: 1 - (1 - 0.7012^5)^25 = 0.990; 21 of 6: 1 - (1 - 0.7012^6)^21 = 0.929, too little
    assert choose_bands(0.7, 128) == minhash.Bands(25, 5)
    assert minhash.Bands(25, 5).chance(0.7) == pytest.approx(0.990, abs=0.001)


def test_planted_near_duplicates_are_found_and_nothing_else() -> None:
    rng = random.Random(3)
    originals = [words(rng, rng.randrange(40, 200)) for _ in range(1500)]
    texts = [" ".join(text) for text in originals]
    planted = []
    for number in range(300):
        copy = list(originals[number])
        for _ in range(max(1, len(copy) // 60)):
            copy[rng.randrange(len(copy))] = "edit"
        planted.append((number, len(texts)))
        texts.append(" ".join(copy))
    signature, full = sketch([[(text, 0)] for text in texts], shingle=5)
    label = cluster(signature, full, 0.7)
    dropped = {number for number in range(len(texts)) if label[number] != number}
    wanted = {copy for original, copy in planted if jaccard(texts[original], texts[copy], 5) >= 0.75}
    assert len(wanted) > 200
    assert len(dropped & wanted) / len(wanted) >= 0.95
    assert len([n for n in dropped if jaccard(texts[n], texts[label[n]], 5) < 0.6]) / len(dropped) <= 0.01


def _in_child(texts: list[str]) -> bytes:
    return signatures(texts).tobytes()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_signatures_are_the_same_in_every_process(method: str) -> None:
    texts = ["What is three plus four?", "今天天气好", "", "née Ärger"]
    here = signatures(texts).tobytes()
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(_in_child, (texts,)).get(60) == here


def test_signatures_are_frozen() -> None:
    """Builds of the same recipe must agree for ever; if this changes, so must the version of the ``data`` stage."""
    assert signatures(["The quick brown fox jumps"])[0, :8].tolist() == FROZEN


FROZEN = [244, 245, 192, 27, 38, 137, 193, 131]


@settings(deadline=None)
@given(st.integers(1, 15), st.data())
def test_components_carry_the_label_of_their_first_row(count: int, data: st.DataObject) -> None:
    node = st.integers(0, count - 1)
    batches = data.draw(st.lists(st.lists(st.tuples(node, node), max_size=8), max_size=3))
    expected = list(range(count))
    for left, right in [pair for batch in batches for pair in batch]:
        first, second = sorted((expected[left], expected[right]))
        expected = [first if label == second else label for label in expected]
    label = np.arange(count)
    for batch in batches:
        pairs = np.array(batch, dtype=np.int64).reshape(-1, 2)
        join(label, pairs[:, 0], pairs[:, 1])
        assert (label[label] == label).all()
    assert label.tolist() == expected


def test_the_first_of_equal_keys() -> None:
    assert first_equal(np.array([3.5, 1.0, 3.5, 2.0, 1.0])).tolist() == [0, 1, 0, 3, 1]
    assert first_equal(np.array([[2, 1], [1, 2], [2, 1]]).view("i8,i8")[:, 0]).tolist() == [0, 1, 0]
    assert first_equal(np.zeros(0)).tolist() == []


def test_first_stays_uses_row_numbers_of_the_table() -> None:
    code, instead = first_stays(6, np.array([1, 2, 4, 5]), np.array([0, 1, 0, 1]))
    assert code.tolist() == [-1, -1, -1, -1, 0, 0] and code.dtype == np.int32
    assert instead.tolist() == [-1, -1, -1, -1, 1, 2] and instead.dtype == np.int64
