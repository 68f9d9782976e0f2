"""Hidden states of a teacher and its student at the answers' tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.training.distill_trainer import answer_states
from align.training.rows import MASKED

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SIZES_OF = {
    "llama": SIZES,
    "gemma2": {**SIZES, "num_key_value_heads": 1, "head_dim": 8},  # with a soft cap on its logits
    "gpt_neox": SIZES,
    "gpt2": {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "phi3": {**SIZES, "pad_token_id": 0},
}


@pytest.mark.parametrize("kind", SIZES_OF)
def test_the_head_reads_no_position(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES_OF[kind])).eval()
    positions: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: positions.append(inputs[0].shape[1]))
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[MASKED, MASKED, 7, 8, 9], [MASKED, MASKED, 10, MASKED, MASKED]])

    states = answer_states(model, model, {"input_ids": ids, "attention_mask": mask, "labels": labels})

    assert positions == [0]
    # Token 7 of the first row is at position 2, so position 1 predicts it; token 10 of the second is there, too.
    every = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = torch.stack([every[0, 1], every[0, 2], every[0, 3], every[1, 1]])
    assert torch.allclose(states, expected, atol=1e-5)
