"""The rule for each ``model_type``, and architectures read from config files. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.models.checkpoints.files import refuse_quantized
from align.models.compute.architecture import Architecture, UnknownArchitecture
from align.models.compute.decoders import (
    DENSE,
    Decoder,
    deepseek_mixture,
    gemma4,
    gpt_oss_mixture,
    granite_block,
    lfm2_block,
    mamba2,
    phi,
    qwen_mixture,
    stablelm,
)
from align.models.compute.layers import (
    Config,
    gated_delta,
    latent_attention,
    mixture,
    short_convolution,
    state_space,
)
from align.models.compute.older_decoders import OLDER

GROUPS = ("num_key_value_heads",)
HEADS = ("num_key_value_heads", "head_dim")
TIED = {"tie_word_embeddings": True}
DELTA: dict[str, Any] = {
    "needs": HEADS,
    "head_norms": "head",
    "lean": False,
    "counts_activations": False,
    "gated_attention": True,
}

RULES: dict[str, Callable[[Config], Architecture]] = {
    "llama": Decoder(mlp_bias="mlp_bias"),
    "granite": Decoder(mlp_bias="mlp_bias"),
    "smollm3": Decoder(needs=GROUPS, mlp_bias="mlp_bias", defaults=TIED),
    "mistral": Decoder(needs=GROUPS, qkv_bias=False, out_bias=False),
    "ministral": Decoder(needs=GROUPS, qkv_bias=False, out_bias=False),
    "phi3": Decoder(qkv_bias=False, out_bias=False, fused=True, mlp=("gate_up_proj", "down_proj")),
    "qwen2": Decoder(needs=GROUPS, qkv_bias=True, out_bias=False),
    "qwen3": Decoder(needs=HEADS, head_norms="head"),
    "olmo2": Decoder(head_norms="all", lean=False),
    "olmo3": Decoder(head_norms="all", lean=False),
    "glm4": Decoder(
        needs=HEADS,
        defaults={"attention_bias": False},
        out_bias=False,
        norms=4,
        mlp=("gate_up_proj", "down_proj"),
    ),
    "exaone4": Decoder(needs=GROUPS, qkv_bias=False, out_bias=False, head_norms="head"),
    "ernie4_5": Decoder(needs=HEADS, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", defaults=TIED),
    "gemma": Decoder(needs=HEADS, lean=False, scaled_embeddings=True, defaults=TIED),
    "gemma2": Decoder(needs=HEADS, norms=4, lean=False, scaled_embeddings=True, defaults=TIED),
    "gemma3_text": Decoder(needs=HEADS, norms=4, head_norms="head", lean=False, scaled_embeddings=True, defaults=TIED),
    "gemma4_text": gemma4,
    # ---- other norms and feed-forward blocks ----
    "cohere2": Decoder(needs=GROUPS, norms=1, counts_activations=False, lean=False, defaults=TIED),
    "nemotron": Decoder(
        needs=GROUPS, mlp_bias="mlp_bias", norm_bias=True, counts_activations=False, lean=False, mlp=DENSE
    ),
    "arcee": Decoder(needs=GROUPS, mlp_bias="mlp_bias", counts_activations=False, mlp=DENSE),
    "starcoder2": Decoder(
        needs=GROUPS,
        defaults=TIED | {"use_bias": True},
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        norm_bias=True,
        counts_activations=False,
        lean=False,
        mlp=("c_fc", "c_proj"),
    ),
    "stablelm": stablelm,
    "phi": phi,
    # ---- mixtures of experts ----
    "qwen3_moe": Decoder(
        needs=HEADS,
        head_norms="head",
        mixture=lambda config: mixture(config, config["moe_intermediate_size"]),
    ),
    "mixtral": Decoder(
        needs=GROUPS,
        qkv_bias=False,
        out_bias=False,
        mixture=lambda config: mixture(config, config["intermediate_size"]),
    ),
    "olmoe": Decoder(
        head_norms="all",
        mixture=lambda config: mixture(config, config["intermediate_size"]),
    ),
    "gpt_oss": Decoder(
        needs=HEADS, defaults={"attention_bias": True}, counts_activations=False, lean=False, mixture=gpt_oss_mixture
    ),
    "deepseek_v3": Decoder(attention=latent_attention, counts_activations=False, mixture=deepseek_mixture),
    # ---- hybrids ----
    "qwen3_5_text": Decoder(**DELTA, mixer=lambda config: gated_delta(config, fused=False)),
    "qwen3_next": Decoder(**DELTA, mixer=lambda config: gated_delta(config, fused=True), mixture=qwen_mixture),
    "granitemoehybrid": Decoder(counts_activations=False, mixer=state_space, mlp=(), other=granite_block),
    "bamba": Decoder(mlp_bias="mlp_bias", mlp_path="feed_forward", counts_activations=False, mixer=state_space),
    "falcon_h1": Decoder(
        mlp_bias="mlp_bias",
        mlp_path="feed_forward",
        counts_activations=False,
        mixer=lambda config: state_space(config, out_bias="projectors_bias", norm=bool(config.get("mamba_rms_norm"))),
        parallel=True,
    ),
    "lfm2": Decoder(
        needs=GROUPS,
        qkv_bias=False,
        out_bias=False,
        head_norms="head",
        counts_activations=False,
        out="out_proj",
        mixer=short_convolution,
        mlp=(),
        other=lfm2_block,
        defaults=TIED,
    ),
    "mamba2": mamba2,
    **OLDER,
}
"""``model_type`` -> rule that reads the architecture from a config of that type."""


def read_architecture(config_file: Path) -> Architecture:
    """Read the architecture from a model folder's ``config.json``. Raises ``UnknownArchitecture`` without one.

    Raises ``UserError`` for quantized weights, which no stage reads.
    """
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownArchitecture(f"{config_file} cannot be read ({type(error).__name__})") from None
    config = config if isinstance(config, dict) else {}
    refuse_quantized(config_file, config)
    return architecture_of(config)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a parsed ``config.json``.

    Raises ``UnknownArchitecture`` for a type without a rule and for a missing size.
    """
    if isinstance(config.get("text_config"), Mapping):
        # The whole config says if the head is tied, if it says anything.
        tied = {name: config[name] for name in ("tie_word_embeddings",) if name in config}
        config = {**config["text_config"], **tied}
    kind = str(config.get("model_type"))
    if kind not in RULES:
        raise UnknownArchitecture(f"there is no rule for model_type '{kind}', only for {', '.join(sorted(RULES))}")
    try:
        return RULES[kind](config)
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise UnknownArchitecture(
            f"the config.json of this {kind} lacks a size or has an invalid one ({error})"
        ) from None
