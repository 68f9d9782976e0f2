"""A stage's process reads its tuning back from JSON, every default written out: nothing may be refused then."""

import pytest
from pydantic import TypeAdapter

from align.config.base import Config
from align.config.tuning import Tuning
from align.config.validation import validate_plain

ADAPTER: TypeAdapter[Tuning] = TypeAdapter(Tuning)


class Example(Config):
    """A stage's config with a tuning."""

    tuning: Tuning


@pytest.mark.parametrize(
    "block",
    [
        {"method": "full"},
        {"method": "full", "unfreeze": {"at": {0: 2, 0.5: 3}, "unit": "epochs"}, "layer_decay": 0.9},
        {"method": "full", "lisa": {"layers": 1}},
        {"method": "lora", "rank": 4, "init": "pissa"},
        {"method": "qlora", "init": "loftq"},
        {"method": "ia3"},
        {"method": "ia3", "targets": ["k_proj"], "feedforward": []},
        {"method": "peft", "type": "vera", "options": {"r": 8}},
        {"method": "prefix", "tokens": 4},
        {"method": "prompt", "text": "Answer."},
        {"method": "p_tuning", "encoder": "lstm"},
        {"method": "adapters", "size": 16},
        {"method": "adapters", "position": "sequential", "after": ["attention", "mlp"]},
        {"method": "adapters", "kind": "llama_adapter", "tokens": 4},
    ],
    ids=lambda block: "-".join(map(str, block.values())),
)
def test_what_a_record_holds_is_read_back_the_same(block):
    stage = validate_plain(Example, {"tuning": block})
    assert validate_plain(Example, stage.model_dump(mode="json")) == stage


@pytest.mark.parametrize(
    "block",
    [
        {"method": "adapters", "tokens": 4},
        {"method": "adapters", "kind": "llama_adapter", "size": 16},
        {"method": "adapters", "after": ["attention"]},
    ],
)
def test_a_field_of_the_other_kind_is_refused(refused, block):
    refused(ADAPTER.validate_python, block)
