"""Rules that read a decoder's sizes from its config; ``model_types`` has one for each type. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from align.models.compute.architecture import Architecture, UnknownArchitecture
from align.models.compute.layers import (
    FEED_FORWARD,
    GATED,
    KERNEL_MATRICES,
    READ_BY_KERNELS,
    Config,
    HeadNorms,
    Layer,
    Linear,
    attention,
    expert_count,
    feed_forward,
    head_size,
    mixture,
    state_space,
)

WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba")
"""Values of ``layer_types`` for layers with a state from token to token."""
DENSE = ("up_proj", "down_proj")
"""Matrices of a feed-forward block without a gate."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Rule for decoders with attention and a feed-forward block in each layer: config → architecture.

    The defaults describe Llama. A flag is a value, or the name of the config's field that has it.
    """

    needs: tuple[str, ...] = ()
    """Sizes without a default that follows from others, so the config must have them."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the config that differ from false if they are missing."""
    qkv_bias: bool | str = "attention_bias"
    out_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    head_norms: HeadNorms = "none"
    norms: int = 2
    """Norms over a layer's width."""
    norm_bias: bool = False
    counts_activations: bool = True
    """True if a layer keeps what Llama's keeps, which ``align.models.compute.costs`` counts."""
    lean: bool = True
    """Norms are written as Llama's."""
    scaled_embeddings: bool = False
    """The token embedding is a class that scales its rows, as Gemma's."""
    fused: bool = False
    """One matrix for queries, keys and values."""
    gated_attention: bool = False
    out: str = "o_proj"
    """Name of attention's last matrix."""
    mlp: tuple[str, ...] = GATED
    mlp_path: str = "mlp"
    attention: Callable[[Config], Layer] | None = None
    """Attention of another kind."""
    mixer: Callable[[Config], Layer] | None = None
    """Part of the layers without attention."""
    parallel: bool = False
    """Each layer has both attention and the mixer."""
    mixture: Callable[[Config], Layer] | None = None
    """Feed-forward block of the layers with experts."""
    other: Callable[[Config], Layer] | None = None
    """Another part of each layer."""
    head_bias: bool = False

    def __call__(self, config: Config) -> Architecture:
        """Return the architecture. Raises ``KeyError`` for a size that the config lacks."""
        config = {**self.defaults, **config}
        missing = [name for name in self.needs if not config.get(name)]
        if missing:
            raise KeyError(missing[0])
        blocks = tuple(self._layer(config, index) for index in range(config["num_hidden_layers"]))
        hidden, heads, size = config["hidden_size"], config["num_attention_heads"], head_size(config)
        groups = config.get("num_key_value_heads") or heads
        return Architecture(
            model_type=config["model_type"],
            hidden=hidden,
            vocabulary=config["vocab_size"],
            blocks=blocks,
            embedded=config["vocab_size"] * hidden,
            last_norm=(1 + self.norm_bias) * hidden,
            tied=bool(config.get("tie_word_embeddings", False)),
            head_bias=self.head_bias,
            skipped=_skipped(config),
            norms=self.norms if self.counts_activations else None,
            normed_heads=0 if self.head_norms == "none" else (heads + groups) * size,
            lean_norms=self.lean,
            scaled_embeddings=self.scaled_embeddings,
            heads=(heads, groups),
        )

    def _layer(self, config: Config, index: int) -> Layer:
        layer = Layer(vectors=self.norms * (1 + self.norm_bias) * config["hidden_size"])
        has_attention = self.mixer is None or self.parallel or _has_attention(config, index)
        if has_attention:
            layer += self._attention(config)
        if self.mixer is not None and (self.parallel or not has_attention):
            layer += self.mixer(config)
        if self.mixture is not None and _has_experts(config, index):
            layer += self.mixture(config)
        elif self.mlp:
            bias = _flag(config, self.mlp_bias)
            layer += feed_forward(config, config["intermediate_size"], self.mlp, path=self.mlp_path, bias=bias)
        return layer if self.other is None else layer + self.other(config)

    def _attention(self, config: Config) -> Layer:
        if self.attention is not None:
            return self.attention(config)
        return attention(
            config,
            bias=_flag(config, self.qkv_bias),
            out_bias=_flag(config, self.out_bias),
            head_norms=self.head_norms,
            fused=self.fused,
            gated=self.gated_attention,
            out=self.out,
        )


def _flag(config: Config, setting: bool | str) -> bool:
    return bool(config.get(setting)) if isinstance(setting, str) else setting


def _skipped(config: Config) -> tuple[str, ...]:
    of_experts = (*FEED_FORWARD, "shared_expert_gate") if expert_count(config) else ()
    return (*of_experts, *(KERNEL_MATRICES if config["model_type"] in READ_BY_KERNELS else ()))


def _has_attention(config: Config, index: int) -> bool:
    """Return True for a layer of a hybrid with attention, by the field that the hybrid's config has."""
    for name in ("layer_types", "layers_block_type"):
        if config.get(name):
            return config[name][index] not in WITHOUT_ATTENTION
    for name in ("attn_layer_indices", "full_attn_idxs"):
        if config.get(name) is not None:
            return index in config[name]
    return bool((index + 1) % config["full_attention_interval"] == 0)


def _has_experts(config: Config, index: int) -> bool:
    """Return True for a layer of a mixture whose feed-forward block has experts."""
    if not expert_count(config) or index in (config.get("mlp_only_layers") or ()):
        return False
    is_late = index >= config.get("first_k_dense_replace", 0)
    return bool(is_late and (index + 1) % config.get("decoder_sparse_step", 1) == 0)


def granite_block(config: Config) -> Layer:
    """Return Granite 4's feed-forward block: one shared by all tokens, and experts if there are any."""
    layer = feed_forward(
        config, config["shared_intermediate_size"], ("input_linear", "output_linear"), path="shared_mlp"
    )
    if not expert_count(config):
        return layer
    return layer + mixture(config, config["intermediate_size"], path="block_sparse_moe")


def lfm2_block(config: Config) -> Layer:
    width = config["intermediate_size"]
    if config.get("block_auto_adjust_ff_dim", True):
        multiple = config.get("block_multiple_of", 256)
        factor = config.get("block_ffn_dim_multiplier", 1.0)
        # Three matrices of two thirds of the width have as many parameters as two matrices of the full width.
        width = int(2 * width / 3)
        width = multiple * -(-int(width if factor is None else factor * width) // multiple)
    return feed_forward(config, width, ("w1", "w3", "w2"), path="feed_forward")


def deepseek_mixture(config: Config) -> Layer:
    width = config["moe_intermediate_size"]
    return mixture(config, width, shared=width * config["n_shared_experts"])


def qwen_mixture(config: Config) -> Layer:
    return mixture(
        config,
        config["moe_intermediate_size"],
        shared=config["shared_expert_intermediate_size"],
        gate=True,
    )


def gpt_oss_mixture(config: Config) -> Layer:
    sinks = Layer(vectors=config["num_attention_heads"])
    return sinks + mixture(config, config["intermediate_size"], bias=True)


def stablelm(config: Config) -> Architecture:
    """Return StableLM's architecture. Layers with a parallel residual have one norm."""
    rule = Decoder(
        qkv_bias="use_qkv_bias",
        out_bias=False,
        head_norms="each" if config.get("qk_layernorm") else "none",
        norm_bias=True,
        counts_activations=False,
        lean=False,
    )
    architecture = rule(config)
    if not config.get("use_parallel_residual"):
        return architecture
    removed = Layer(vectors=-2 * config["hidden_size"])
    return replace(architecture, blocks=tuple(block + removed for block in architecture.blocks))


def phi(config: Config) -> Architecture:
    """Return Phi's architecture. The norms of queries and keys have biases."""
    norms = Layer(vectors=4 * head_size(config) if config.get("qk_layernorm") else 0)
    rule = Decoder(
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        norms=1,
        norm_bias=True,
        counts_activations=False,
        lean=False,
        out="dense",
        mlp=("fc1", "fc2"),
        other=lambda _: norms,
        head_bias=True,
    )
    return rule(config)


def gemma4(config: Config) -> Architecture:
    """Return Gemma 4's architecture: layers differ, and each layer reads an embedding of its own."""
    if config.get("enable_moe_block"):
        raise UnknownArchitecture("there is no rule for the mixtures of experts of model_type 'gemma4_text'")
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    width = config.get("hidden_size_per_layer_input") or 0
    base = Decoder(norms=4, head_norms="head", lean=False, counts_activations=False, scaled_embeddings=True)
    architecture = base({"tie_word_embeddings": True, **config})
    blocks = tuple(_gemma4_layer(config, index, width) for index in range(layers))
    embeddings = config["vocab_size_per_layer_input"] * layers * width if width else 0
    # One matrix projects the token's embedding to the inputs of all layers, which share one norm.
    outer = (Linear("model.per_layer_model_projection", hidden, layers * width),) if width else ()
    return replace(
        architecture,
        blocks=blocks,
        outer=outer,
        embedded=architecture.embedded + embeddings,
        last_norm=architecture.last_norm + width,
    )


def _gemma4_layer(config: Config, index: int, width: int) -> Layer:
    """Return a layer; ``width`` is the features of its own embedding. The last layers may reuse earlier keys."""
    hidden, is_full = config["hidden_size"], config["layer_types"][index] == "full_attention"
    overrides = {"head_dim": config.get("global_head_dim"), "num_key_value_heads": None}
    if config.get("attention_k_eq_v"):
        overrides["num_key_value_heads"] = config.get("num_global_key_value_heads")
    overrides = (config.get("per_layer_config") or {}).get(str(index), overrides if is_full else {})
    sizes = {**config, **{name: value for name, value in overrides.items() if value}}
    # Layers at the end read the keys and values of an earlier layer, so they have neither matrices nor a cache for
    # them.
    is_shared = index >= config["num_hidden_layers"] - config.get("num_kv_shared_layers", 0)
    part = attention(sizes, bias=_flag(config, "attention_bias"), out_bias=_flag(config, "attention_bias"))
    dropped = {"k_proj", "v_proj"} if is_shared else set()
    if config.get("attention_k_eq_v") and is_full:
        dropped.add("v_proj")
    linears = tuple(linear for linear in part.linears if linear.path.rpartition(".")[2] not in dropped)
    norms = head_size(sizes) * (1 if is_shared else 2)
    layer = Layer(linears, vectors=norms + 4 * hidden, token_cache=0 if is_shared else part.token_cache)
    inner = config["intermediate_size"] * (2 if is_shared and config.get("use_double_wide_mlp") else 1)
    layer += feed_forward(config, inner, GATED)
    if not width:
        return layer
    gates = (Linear("per_layer_input_gate", hidden, width), Linear("per_layer_projection", width, hidden))
    return layer + Layer(gates, vectors=hidden)


def mamba2(config: Config) -> Architecture:
    """Return Mamba 2's architecture, whose config has other names than the state spaces of hybrids."""
    names = {
        "mamba_n_heads": "num_heads",
        "mamba_d_state": "state_size",
        "mamba_expand": "expand",
        "mamba_n_groups": "n_groups",
        "mamba_d_conv": "conv_kernel",
    }
    sizes = {**config, **{name: config[source] for name, source in names.items()}}
    sizes |= {"mamba_proj_bias": config.get("use_bias"), "mamba_conv_bias": config.get("use_conv_bias", True)}
    layer = state_space(sizes, path="mixer") + Layer(vectors=config["hidden_size"])
    return Architecture(
        model_type="mamba2",
        hidden=config["hidden_size"],
        vocabulary=config["vocab_size"],
        blocks=(layer,) * config["num_hidden_layers"],
        embedded=config["vocab_size"] * config["hidden_size"],
        last_norm=config["hidden_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        skipped=KERNEL_MATRICES,
        layers_path="backbone.layers",
    )
