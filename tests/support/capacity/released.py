"""Twelve released models of six families: values of their ``config.json``, a commit, a chat template, their size.

The sizes are the numbers of parameters that the models' pages on the Hub show, so a wrong value of a config is noticed.
Templates are those that trl ships, or align's for the family.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.models.chat.named_templates import FOLDER, TRAINING

_TRL = importlib.util.find_spec("trl")
assert _TRL is not None and _TRL.submodule_search_locations
# trl is found, not imported, which would load torch.
OF_TRL = Path(_TRL.submodule_search_locations[0]) / "chat_templates"


@dataclass(frozen=True)
class Released:
    """A released model."""

    commit: str
    template: Path
    parameters: int
    """Parameters of its text part."""
    config: dict[str, Any]


def _config(kind: str, hidden: int, layers: int, inner: int, heads: int, kv: int, words: int, **more: Any) -> Any:
    """Return the values of a ``config.json`` that give the sizes of a dense decoder."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": words}
    return {"model_type": kind, **sizes, "num_attention_heads": heads, "num_key_value_heads": kv, **more}


GEMMA_3_4B = _config("gemma3_text", 2560, 34, 10240, 8, 4, 262208, head_dim=256, max_position_embeddings=131072)
QWEN_3 = {"head_dim": 128, "max_position_embeddings": 40960}
LLAMA_3 = {"max_position_embeddings": 131072, "tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}

RELEASED = {
    "Qwen/Qwen3-4B-Instruct-2507": Released(
        "cdbee75f17c01a7cc42f958dc650907174af0554", OF_TRL / "qwen3_instruct_2507.jinja", 4_022_468_096,
        _config("qwen3", 2560, 36, 9728, 32, 8, 151936, head_dim=128, max_position_embeddings=262144, **TIED),
    ),
    "Qwen/Qwen3-8B": Released(
        "b968826d9c46dd6066d109eabc6255188de91218", OF_TRL / "qwen3.jinja", 8_190_735_360,
        _config("qwen3", 4096, 36, 12288, 32, 8, 151936, tie_word_embeddings=False, **QWEN_3),
    ),
    "Qwen/Qwen3-14B": Released(
        "40c069824f4251a91eefaf281ebe4c544efd3e18", OF_TRL / "qwen3.jinja", 14_768_307_200,
        _config("qwen3", 5120, 40, 17408, 40, 8, 151936, tie_word_embeddings=False, **QWEN_3),
    ),
    "meta-llama/Llama-3.1-8B-Instruct": Released(
        "0e9e39f249a16976918f6564b8830bc894c89659", OF_TRL / "llama3_1.jinja", 8_030_261_248,
        _config("llama", 4096, 32, 14336, 32, 8, 128256, **LLAMA_3),
    ),
    "meta-llama/Llama-3.2-3B-Instruct": Released(
        "0cb88a4f764b7a12671c53f0838cd831a0843b95", OF_TRL / "llama3_2.jinja", 3_212_749_824,
        _config("llama", 3072, 28, 8192, 24, 8, 128256, head_dim=128, **LLAMA_3 | TIED),
    ),
    "meta-llama/Llama-3.2-1B-Instruct": Released(
        "9213176726f574b556790deb65791e0c5aa438b6", OF_TRL / "llama3_2.jinja", 1_235_814_400,
        _config("llama", 2048, 16, 8192, 32, 8, 128256, head_dim=64, **LLAMA_3 | TIED),
    ),
    "google/gemma-3-1b-it": Released(
        "dcc83ea841ab6100d6b47a070329e1ba4cf78752", OF_TRL / "gemma3.jinja", 999_885_952,
        _config("gemma3_text", 1152, 26, 6912, 4, 1, 262144, head_dim=256, max_position_embeddings=32768),
    ),
    "google/gemma-3-4b-it": Released(
        "093f9f388b31de276ce2de164bdc2081324b9767", OF_TRL / "gemma3.jinja", 3_880_263_168,
        {"model_type": "gemma3", "text_config": GEMMA_3_4B, "vision_config": {"model_type": "siglip_vision_model"}},
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": Released(
        "c170c708c41dac9275d15a8fff4eca08d52bab71", TRAINING / "mistral.jinja", 7_248_023_552,
        _config("mistral", 4096, 32, 14336, 32, 8, 32768, max_position_embeddings=32768, tie_word_embeddings=False),
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": Released(
        "31b70e2e869a7173562077fd711b654946d38674", TRAINING / "smollm2.jinja", 1_711_376_384,
        _config("llama", 2048, 24, 8192, 32, 32, 49152, max_position_embeddings=8192, **TIED),
    ),
    "HuggingFaceTB/SmolLM3-3B": Released(
        "a07cc9a04f16550a088caea529712d1d335b0ac1", TRAINING / "smollm3.jinja", 3_075_098_624,
        _config("smollm3", 2048, 36, 11008, 16, 4, 128256, max_position_embeddings=65536, **TIED),
    ),
    "microsoft/Phi-4-mini-instruct": Released(
        "cfbefacb99257ffa30c83adab238a50856ac3083", FOLDER / "phi3.jinja", 3_836_021_760,
        _config("phi3", 3072, 32, 8192, 24, 8, 200064, max_position_embeddings=131072, **TIED),
    ),
}  # fmt: skip


def write_hub_cache(folder: Path, has_template: bool = True) -> None:
    """Write the small files of every model into a Hub's cache, where a download by commit puts them."""
    for name, model in RELEASED.items():
        repository = folder / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / model.commit
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(model.commit)
        (snapshot / "config.json").write_text(json.dumps(model.config))
        (snapshot / "tokenizer_config.json").write_text("{}")
        if has_template:
            (snapshot / "chat_template.jinja").write_text(model.template.read_text(encoding="utf-8"))
