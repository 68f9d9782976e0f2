"""Embeddings of static vectors and of transformers models: their means by hand, and what padding must not change."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from align.models.row_scores import make_embedder
from tests.support.refusals import Refused

TEXTS = ["Name a color.", "Name a color, please, and say why it is your favorite one.", "", "no"]


def static_model(folder: Path) -> Path:
    """Three words with known vectors."""
    model2vec = pytest.importorskip("model2vec", reason="pip install 'align-pipeline[data]'")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "blue": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    model2vec.StaticModel(vectors, tokenizer, normalize=False).save_pretrained(folder)
    return folder


def test_static_embeddings_are_means_of_vectors(tmp_path: Path) -> None:
    embed = make_embedder(static_model(tmp_path), "cpu", 256, 64)
    assert embed(["red", "red blue", ""]).tolist() == [[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


def test_the_mean_hidden_state_of_a_transformers_model(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    actual = make_embedder(tiny_model, "cpu", 256, 64)(TEXTS)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModel.from_pretrained(tiny_model).eval()
    for text, embedding in zip(TEXTS, actual, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] == 0:
            assert not embedding.any()
            continue
        with torch.inference_mode():
            hidden = model(input_ids=ids.long()).last_hidden_state[0]
        assert embedding == pytest.approx(hidden.mean(dim=0).numpy(), abs=1e-5)


def test_embeddings_ignore_padding_and_cut_long_texts(tiny_model: Path) -> None:
    together = make_embedder(tiny_model, "cpu", 256, 64)(TEXTS)
    alone = make_embedder(tiny_model, "cpu", 256, 1)(TEXTS)
    assert together == pytest.approx(alone, abs=1e-5)
    embed = make_embedder(tiny_model, "cpu", 8, 64)
    first, second = embed(["12345678 and so on", "12345678, and another end"])
    assert first == pytest.approx(second, abs=1e-6)


def test_folders_that_hold_no_model(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(make_embedder, tmp_path, "cpu", 256, 64)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(make_embedder, tmp_path, "cpu", 256, 64)
    (tmp_path / "config.json").write_text("{")
    refused(make_embedder, tmp_path, "cpu", 256, 64)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "model2vec", None)
    refused(make_embedder, tmp_path, "cpu", 256, 64)
