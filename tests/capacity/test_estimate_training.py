"""What trl's stages cost in memory, by hand and on the command line's terms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from align.capacity import estimate_training
from align.config.runtime import Runtime
from align.config.stages.reward import RewardConfig
from align.config.stages.sft import SftConfig
from align.config.tuning import FullTuning
from align.models.compute.architecture import UnknownArchitecture
from align.models.compute.costs import activations_of_layer, activations_per_token
from align.models.compute.model_types import architecture_of
from tests.support.capacity.models import TOY

# A layer: 25 in its matrix with its bias, 4 in its norm. The trunk: 44 + 2 * 29 = 102; the head 40.
LORA = {"method": "lora", "rank": 2}  # 2 layers x 2 x (4 + 5) = 36


def counted(stage: Any, tuning: dict[str, Any], **fields: Any) -> Any:
    runtime = fields.pop("runtime", Runtime(device="cpu"))
    config = stage(model="m", data="d", learning_rate=1e-3, tuning=tuning, **fields)
    return estimate_training.estimate(config, {"model": [TOY]}, runtime)


def test_sft_by_hand() -> None:
    full, lora = counted(SftConfig, LORA).choices[::-1]
    assert [c.settings["tuning"] for c in (lora, full)] == ["lora r2", "full"]
    assert (lora.chosen, full.chosen) == (True, False)
    base = 2 * (40 + 40 + 40) + 4 * 22  # embedding, matrices and head in bfloat16, biases and norms in float32
    assert (lora.memory.weights, lora.memory.gradients, lora.memory.optimizer) == (base + 4 * 36, 4 * 36, 8 * 36)
    assert (full.memory.weights, full.memory.gradients, full.memory.optimizer) == (4 * 142, 4 * 142, 8 * 142)
    assert lora.memory.copies == 0
    wide = counted(SftConfig, LORA | {"base_dtype": "float32"}).choices[0].memory
    assert (wide.weights, wide.copies) == (4 * 178, 2 * 50)
    narrow = counted(SftConfig, LORA, precision="float32").choices[0].memory
    assert (narrow.weights, narrow.copies) == (4 * 178, 0)


def test_the_head_s_work_space_by_hand() -> None:
    blocks = (2 * 4 + 2 * 2) * 2**20  # two blocks of logits, in float32 and in bfloat16
    states = 4 * 8192 * 4  # the gradient of 8 x 1024 tokens' states
    tile = 4096 * 10  # on a GPU: 4,096 tokens and 10 words
    gpu = 2 * tile + 2 * 40 + states + 4 * (tile + 40)
    lora = counted(SftConfig, LORA).choices[0].memory
    assert (lora.logits, lora.scoring) == (blocks + states, blocks + 4 * 4096 * 4)
    parts = lora.fullest(0)
    heap = parts.pop("heap")
    assert sum(parts.values()) == 2 * 120 + 4 * 22 + 16 * 36 + blocks + states
    assert heap == 100 * 2**20 + int(0.06 * sum(parts.values()))
    assert lora.total == sum(parts.values()) + heap
    assert lora.per_token is None, "this architecture has no rule for activations"
    assert replace(lora, activations=1000).per_token == 1060
    assert replace(lora, activations=1000, in_heap=False).per_token == 1000
    shown = counted(SftConfig, LORA).to_json()["choices"][0]["memory"]
    assert (shown["heap"], shown["total"]) == (heap, lora.total)
    card = {"runtime": Runtime(device="cuda")}
    assert counted(SftConfig, LORA, **card).choices[0].memory.logits == gpu
    full = counted(SftConfig, {"method": "full"}, **card).choices[0].memory
    assert full.logits == gpu + 4 * 40  # the head's own gradient is summed up in float32
    assert "heap" not in full.fullest(0)


def test_what_stands_beside_the_model_is_counted() -> None:
    plain, averaged = (
        counted(SftConfig, {"method": "full"}, **fields).choices[0].memory
        for fields in ({}, {"ema": 0.99, "anchor": {"to": "l2", "weight": 0.1}})
    )
    assert averaged.reference == plain.reference + 2 * 4 * 142


def test_checkpointing_keeps_a_layer_s_input_and_one_layer() -> None:
    sizes = {"model_type": "llama", "vocab_size": 10, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 10, "num_attention_heads": 2}  # fmt: skip
    model = architecture_of(sizes)
    layer = activations_of_layer(model, FullTuning(), "bfloat16", False, True)
    assert layer is not None
    last = 2 * 4 * 64
    full: Any = {"tuning": FullTuning(), "precision": "bfloat16", "low_residual": False}
    assert activations_per_token(model, **full) == 10 * layer + last
    assert activations_per_token(model, **full, checkpointing=True) == 10 * 4 * 64 + layer + last


def test_reward_model_has_a_score_head_instead() -> None:
    lora = counted(RewardConfig, LORA).choices[0].memory
    assert (lora.weights, lora.gradients, lora.copies) == (2 * 80 + 4 * (22 + 36 + 4), 4 * (36 + 4), 0)
    full = counted(RewardConfig, {"method": "full"}).choices[0].memory
    assert (full.weights, full.optimizer) == (4 * 106, 8 * 106)


def test_a_method_without_a_rule_is_said_to_be_unknown() -> None:
    with pytest.raises(UnknownArchitecture, match="no rule for what tuning vera adds"):
        counted(SftConfig, {"method": "peft", "type": "vera"})


def test_what_may_differ_is_noted() -> None:
    scheduled = counted(SftConfig, {"method": "full", "unfreeze": {"at": {0: 1}}}, trainer={"optim": "adafactor"})
    assert any("an upper bound" in note for note in scheduled.notes)
    assert any("optim adafactor" in note for note in scheduled.notes)
    assert not any("at most" in note for note in counted(SftConfig, LORA).notes)


def test_8_bit_state_leaves_embeddings_in_32_bits() -> None:
    eight = counted(SftConfig, {"method": "full"}, trainer={"optim": "adamw_8bit"})
    assert eight.choices[0].memory.optimizer == round(2.03125 * 102) + 8 * 40
    torchao = counted(SftConfig, {"method": "full"}, trainer={"optim": "adamw_torch_8bit"})
    assert torchao.choices[0].memory.optimizer == round(2.03125 * 142)
    assert not any("optim" in note for note in eight.notes)
