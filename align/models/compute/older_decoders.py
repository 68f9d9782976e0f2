"""Rules for decoders from before Llama, with layer norms, biases and names of their own. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from align.models.compute.architecture import Architecture, UnknownArchitecture
from align.models.compute.layers import Config, Layer, Linear

LAST_NORM_REMOVED = "_remove_final_layer_norm"


@dataclass(frozen=True, kw_only=True)
class _Decoder:
    """Rule for decoders whose layers are equal and whose matrices have biases: config → architecture."""

    names: tuple[str, ...]
    """Matrices of attention, whose last one reads the values, and of the feed-forward block."""
    sizes: tuple[str, str, str]
    """Fields with the width, the number of layers and the number of heads."""
    inner: str = "intermediate_size"
    """Field with the feed-forward block's width; 4 times the model's if it is missing."""
    bias: str = ""
    """Field for attention's biases, which are there if it is missing."""
    positions: Callable[[Config], int] = lambda _: 0
    """Positions with an embedding."""
    last_norms: Callable[[Config], int] = lambda _: 1
    tied: bool = False
    conv1d: bool = False
    layers_path: str
    head_path: str = "lm_head"

    def __call__(self, config: Config) -> Architecture:
        """Return the architecture. Raises ``KeyError`` for a size that the config lacks."""
        hidden, layers, heads = (config[name] for name in self.sizes)
        inner = config.get(self.inner) or 4 * hidden
        *readers, out, up, down = self.names
        bias = bool(config.get(self.bias, True))
        linears = [Linear(name, hidden, hidden if len(readers) > 1 else 3 * hidden, bias) for name in readers]
        linears.append(Linear(out, hidden, hidden, bias))
        linears += [Linear(up, hidden, inner, True), Linear(down, inner, hidden, True)]
        norm = 2 * hidden  # a weight and a bias
        layer = Layer(tuple(linears), vectors=2 * norm, token_cache=2 * hidden)
        return Architecture(
            model_type=config["model_type"],
            hidden=hidden,
            vocabulary=config["vocab_size"],
            blocks=(layer,) * layers,
            embedded=(config["vocab_size"] + self.positions(config)) * hidden,
            last_norm=self.last_norms(config) * norm,
            tied=bool(config.get("tie_word_embeddings", self.tied)),
            conv1d=self.conv1d,
            heads=(heads, heads),
            layers_path=self.layers_path,
            head_path=self.head_path,
        )


def _opt(config: Config) -> Architecture:
    """Return OPT's architecture; raise ``UnknownArchitecture`` for the models whose embeddings have another width."""
    if config.get("word_embed_proj_dim", config["hidden_size"]) != config["hidden_size"]:
        raise UnknownArchitecture("there is no rule for model_type 'opt' with a word_embed_proj_dim of its own")
    if not config.get("enable_bias", True) or not config.get("layer_norm_elementwise_affine", True):
        raise UnknownArchitecture("there is no rule for model_type 'opt' without biases")
    names = tuple(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out"))
    rule = _Decoder(
        names=(*names, "fc1", "fc2"),
        sizes=("hidden_size", "num_hidden_layers", "num_attention_heads"),
        inner="ffn_dim",
        positions=lambda config: int(config["max_position_embeddings"]) + 2,  # two rows before the first position
        last_norms=lambda config: int(config.get("do_layer_norm_before", True) and not config.get(LAST_NORM_REMOVED)),
        tied=True,
        layers_path="model.decoder.layers",
    )
    architecture = rule(config)
    positions = rule.positions(config) * architecture.hidden
    return replace(architecture, unrounded_positions=positions)  # its class adds the offset of two rows


OLDER: dict[str, Callable[[Config], Architecture]] = {
    "gpt_neox": _Decoder(
        bias="attention_bias",
        names=("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        sizes=("hidden_size", "num_hidden_layers", "num_attention_heads"),
        layers_path="gpt_neox.layers",
        head_path="embed_out",
    ),
    "gpt2": _Decoder(
        names=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        sizes=("n_embd", "n_layer", "n_head"),
        inner="n_inner",
        positions=lambda config: int(config["n_positions"]),
        tied=True,
        conv1d=True,
        layers_path="transformer.h",
    ),
    "bloom": _Decoder(
        names=("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        sizes=("hidden_size", "n_layer", "n_head"),
        last_norms=lambda _: 2,  # one after the embeddings
        tied=True,
        layers_path="transformer.h",
    ),
    "opt": _opt,
}
"""``model_type`` -> rule that reads the architecture from a config of that type."""
