"""Model families that GGUF can hold: architecture names, metadata and changes of tensors, as llama.cpp reads them.

Each family was compared with transformers in llama.cpp on tensors with random values (``docs/export.md``). A config
whose computation llama.cpp would not reproduce is refused by field. Torch-free at import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

Config = Any
"""A config of transformers."""
SILU = ("silu",)
GELU = ("gelu_pytorch_tanh", "gelu_new")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Architecture → layers of the model that scales attention by the width of the layer."""
YARN = {
    "extrapolation_factor": "yarn_ext_factor",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
"""Field of YaRN in transformers → the key behind ``rope.scaling.``."""


@dataclass(frozen=True)
class Family:
    """The way to write one ``model_type``."""

    arch: str
    """Name of the architecture in GGUF."""
    activations: tuple[str, ...] = SILU
    """Values of ``hidden_act`` that llama.cpp computes for it."""
    rotates_pairs: bool = False
    """Rotary positions turn neighboring pairs of numbers, so rows of queries and keys are reordered."""
    shifts_norms: bool = False
    """Norms multiply by 1 + weight, and the file holds the sum."""
    transposes: tuple[str, ...] = ()
    """Endings of the names of matrices that transformers stores transposed."""
    has_experts: bool = False
    """The matrices of all experts of a layer become one tensor."""
    full_attention_every: int = 0
    """Every n-th layer has full attention and the others a window; 0 for no windows."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields of the config with the values that llama.cpp assumes."""
    metadata: Callable[[GGUFWriter, Config], None] | None = None
    """Metadata that only this family has."""


def _gemma2(writer: GGUFWriter, config: Config) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _granite(writer: GGUFWriter, config: Config) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _phi3(writer: GGUFWriter, config: Config) -> None:
    writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    # llama.cpp tells Phi-4 from Phi-3 by this zero.
    writer.add_sliding_window(0)


def _expert_width(writer: GGUFWriter, config: Config) -> None:
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


NO_WINDOW: dict[str, tuple[Any, ...]] = {"sliding_window": (None,)}
NOT_SLIDING: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False, None)}
ALL_SPARSE: dict[str, tuple[Any, ...]] = {"norm_topk_prob": (True,), "mlp_only_layers": ([],)}
NO_CAPS: dict[str, tuple[Any, ...]] = {"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)}
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", rotates_pairs=True),
    "mistral": Family("llama", rotates_pairs=True, required=NO_WINDOW),
    "mixtral": Family("llama", rotates_pairs=True, has_experts=True, required=NO_WINDOW),
    "smollm3": Family("smollm3", rotates_pairs=True, required=NOT_SLIDING),
    "granite": Family("granite", rotates_pairs=True, metadata=_granite),
    "qwen2": Family("qwen2", required=NOT_SLIDING),
    "qwen3": Family("qwen3", required=NOT_SLIDING),
    "qwen3_moe": Family(
        "qwen3moe",
        has_experts=True,
        required=NOT_SLIDING | ALL_SPARSE | {"decoder_sparse_step": (1,)},
        metadata=_expert_width,
    ),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo2", full_attention_every=4),
    "phi3": Family("phi3", required=NO_WINDOW | {"partial_rotary_factor": (1.0, None)}, metadata=_phi3),
    "gemma2": Family("gemma2", GELU, shifts_norms=True, full_attention_every=2, metadata=_gemma2),
    "gemma3_text": Family("gemma3", GELU, shifts_norms=True, full_attention_every=6, required=NO_CAPS),
    "starcoder2": Family("starcoder2", GELU, required=NO_WINDOW),
    "gpt2": Family("gpt2", GELU, transposes=("c_attn.weight", "c_proj.weight", "c_fc.weight")),
}
"""``model_type`` → its family."""


def find_family(model_type: str, place: str) -> Family:
    """Return the family of a ``model_type``. Raises ``UserError`` for a type that is not supported."""
    family = FAMILIES.get(model_type)
    if family is None:
        raise UserError(
            f"{place}: --format gguf does not support models of type {model_type}. Supported: "
            f"{', '.join(sorted(FAMILIES))}. Convert the result of --format transformers with llama.cpp's "
            "convert_hf_to_gguf.py instead."
        )
    return family


def check_config(family: Family, config: Config, place: str) -> None:
    """Raise ``UserError`` for a config that llama.cpp would compute otherwise."""
    for name, (value, allowed) in _conditions(family, config).items():
        if value not in allowed:
            raise UserError(
                f"{place}: {name} is {value!r}, and llama.cpp computes models of type {config.model_type} only with "
                f"{' or '.join(map(repr, allowed))}. Use --format transformers."
            )


def _conditions(family: Family, config: Config) -> dict[str, tuple[Any, Sequence[Any]]]:
    """Return name → the config's value and the values that llama.cpp computes."""
    activation = None
    for name in ("activation_function", "hidden_act", "hidden_activation"):
        activation = getattr(config, name, None) or activation
    conditions: dict[str, tuple[Any, Sequence[Any]]] = {
        "the activation": (activation, family.activations),
        "the rope type": (_rope(config).get("rope_type", "default"), ROPE_TYPES),
    }
    for name, allowed in family.required.items():
        conditions[name] = (getattr(config, name, None), allowed)
    layers = range(1, config.num_hidden_layers + 1)
    if family.full_attention_every:
        kinds = ["sliding_attention" if layer % family.full_attention_every else "full_attention" for layer in layers]
        conditions["layer_types"] = (config.layer_types, [kinds])
    if family.arch == "smollm3":
        conditions["no_rope_layers"] = (config.no_rope_layers, [[int(layer % 4 != 0) for layer in layers]])
    if family.arch in LARGEST_GEMMA:
        # llama.cpp tells the largest Gemma by its number of layers.
        is_largest = config.num_hidden_layers == LARGEST_GEMMA[family.arch]
        scale = config.hidden_size // config.num_attention_heads if is_largest else config.head_dim
        conditions["query_pre_attn_scalar"] = (config.query_pre_attn_scalar, [scale])
    return conditions


def add_metadata(writer: GGUFWriter, family: Family, config: Config) -> None:
    """Write the metadata of a model: sizes, norms, rotary positions, and what only its family has."""
    heads = config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    # GPT-2 has no field for the usual width.
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if (epsilon := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(epsilon)
    for name in ("layer_norm_epsilon", "norm_epsilon", "layer_norm_eps"):
        if (epsilon := getattr(config, name, None)) is not None:
            writer.add_layer_norm_eps(epsilon)
    if family.has_experts:
        # transformers names the number of experts in two ways.
        count = getattr(config, "num_local_experts", None) or config.num_experts
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if family.arch != "gpt2":
        writer.add_rope_dimension_count(head_dim)
        _add_rope(writer, config)
    if family.full_attention_every:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if family.metadata is not None:
        family.metadata(writer, config)


def rope_factors(config: Config) -> list[float] | None:
    """Return Llama 3's divisors of the rotary frequencies, a tensor in GGUF; None for other rotary positions.

    The formula is the function ``_compute_llama3_parameters`` of transformers.
    """
    parameters = _rope(config)
    if parameters.get("rope_type") != "llama3":
        return None
    dimension = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    original = parameters["original_max_position_embeddings"]
    low = parameters["low_freq_factor"]
    high = parameters["high_freq_factor"]
    factor = parameters["factor"]
    factors = []
    for index in range(0, dimension, 2):
        wavelength = 2 * math.pi * parameters["rope_theta"] ** (index / dimension)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(float(factor))
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _rope(config: Config) -> Mapping[str, Any]:
    """Return the rotary positions of full attention."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention") or parameters


def _add_rope(writer: GGUFWriter, config: Config) -> None:
    from gguf import RopeScalingType

    parameters = _rope(config)
    writer.add_rope_freq_base(parameters["rope_theta"])
    windows = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if windows:
        writer.add_rope_freq_base_swa(windows["rope_theta"])
    kind = parameters.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        for name, key in YARN.items():
            if parameters.get(name) is not None:
                getattr(writer, f"add_rope_scaling_{key}")(parameters[name])
