"""Reward models of families for which transformers has no sequence classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.models.built_in import make_tiny_tokenizer
from align.models.loading import load_reward, new_reward
from align.models.score_heads import classifier_class
from tests.support.models.families import family_config, write_family
from tests.support.refusals import Refused

WITHOUT_CLASSIFIER = ["granite", "granitemoehybrid", "cohere2", "olmoe", "lfm2", "falcon_h1", "bamba", "ernie4_5"]


@pytest.mark.parametrize("model_type", WITHOUT_CLASSIFIER)
def test_own_score_head_is_saved_and_loaded(model_type: str, tmp_path: Path) -> None:
    model = new_reward(write_family(model_type, tmp_path / "policy"))
    assert type(model).__name__.endswith("ForSequenceClassification")
    torch.manual_seed(0)
    model.score.weight.data.normal_()
    model.save_pretrained(tmp_path / "reward")
    make_tiny_tokenizer().save_pretrained(tmp_path / "reward")
    rows = torch.tensor([[5, 6, 7, 8, 2], [5, 6, 2, 3, 3]])
    with torch.no_grad():
        trained = model(input_ids=rows, attention_mask=(rows != 3).long(), use_cache=False).logits
        loaded = load_reward(tmp_path / "reward")
        scores = loaded(input_ids=rows, attention_mask=(rows != 3).long(), use_cache=False).logits
        single = loaded(input_ids=rows[1:, :3], use_cache=False).logits
    assert torch.equal(scores, trained)
    torch.testing.assert_close(scores[1:], single, atol=1e-5, rtol=0)


def test_causal_model_is_no_reward_model(refused: Refused, tmp_path: Path) -> None:
    folder = write_family("lfm2", tmp_path)
    refused(load_reward, folder)


def test_model_without_attention_has_no_score_head(refused: Refused, tmp_path: Path) -> None:
    assert classifier_class(family_config("mamba2")) is None
    refused(lambda: new_reward(write_family("mamba2", tmp_path)))
