"""Parameter counts of a decoder and of its adapters, from its ``config.json`` only. Torch-free.

``RULES`` has one function per ``model_type``; a type without one is refused rather than guessed. The tests compare each
with the model that transformers builds. Excluded: mixtures of experts, encoders, models of several parts (vision).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.config.tuning import (
    IA3_INPUTS,
    IA3_OUTPUTS,
    AdaptersTuning,
    FullTuning,
    Ia3Tuning,
    LowRank,
    PrefixTuning,
    PTuning,
    TuningBase,
    VirtualTokens,
)

EMBEDDINGS = ("embed_tokens", "embed_in", "wte")
"""Names of the token embedding."""


class UnknownArchitecture(ValueError):
    """The size of a model is not known; the message gives the reason and follows "unknown: "."""


@dataclass(frozen=True)
class Linear:
    """A matrix of one layer; ``path`` is its module's name below the layer, such as ``self_attn.q_proj``."""

    path: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Parameters of the matrix and its bias."""
        return self.inputs * self.outputs + self.bias * self.outputs


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder: counts are numbers of parameters, widths numbers of features."""

    model_type: str
    hidden: int
    layers: int
    vocabulary: int
    key_value_width: int
    """Features of one token's keys in one layer; the values have as many."""
    linears: tuple[Linear, ...]
    """The matrices of one layer."""
    vectors: int
    """Parameters of one layer outside the matrices: norms."""
    embedded: int
    """Parameters of the token and position embeddings."""
    last_norm: int
    """Parameters of the norm after the layers."""
    tied: bool
    """True if the output head is the token embedding."""
    norms: int | None = None
    """Norms over a layer's width in one layer; None if there is no rule for a layer's activations."""
    normed_heads: int = 0
    """Features of one layer's queries and keys that have their own norms."""
    lean_norms: bool = False
    """True where norms are written as Llama's, and so keep little (``align.models.fast.lean_modules``)."""
    scaled_embeddings: bool = False
    """True if the token embedding is a class that scales its rows, and so is not rounded."""
    conv1d: bool = False
    """True if the matrices are GPT-2's ``Conv1D`` instead of linear layers."""
    layers_path: str = "model.layers"
    head_path: str = "lm_head"
    heads: tuple[int, int] = (0, 0)
    """Heads of queries, and of keys and values; zeros if they are not known."""

    @property
    def matrices(self) -> int:
        """Parameters of all layers' matrices."""
        return self.layers * sum(linear.parameters for linear in self.linears)

    @property
    def trunk(self) -> int:
        """Parameters below the head."""
        return self.embedded + self.last_norm + self.layers * self.vectors + self.matrices

    @property
    def rounded(self) -> int:
        """Parameters of the trunk that ``align.models.compute.precision.cast_frozen_to_bf16`` keeps in bfloat16."""
        linears = 0 if self.conv1d else sum(linear.inputs * linear.outputs for linear in self.linears)
        return (0 if self.scaled_embeddings else self.embedded) + self.layers * linears

    @property
    def head(self) -> int:
        """Parameters of the output head, tied or not."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the causal language model; a tied head is counted once."""
        return self.trunk + (0 if self.tied else self.head)

    def adapters(self, tuning: TuningBase, part: Literal["model", "trunk"]) -> int:
        """Count the parameters that ``tuning`` adds to the causal model, or to its trunk; 0 for full tuning.

        A target names a module as in peft: its full name, or the end of it after a dot. Raises ``UnknownArchitecture``
        for a method without a rule.
        """
        if isinstance(tuning, FullTuning):
            return 0
        if isinstance(tuning, LowRank):
            return self._low_rank(tuning, part) + sum(self._module(name, part) for name in set(tuning.save_modules))
        if isinstance(tuning, Ia3Tuning):
            return self._ia3(tuning)
        inserted = inserted_parameters(self, tuning)
        if inserted is None:
            raise UnknownArchitecture(f"there is no rule for what tuning {tuning.label} adds to a model")
        return inserted

    def _ia3(self, tuning: Ia3Tuning) -> int:
        targets = tuning.targets or [*IA3_OUTPUTS, *IA3_INPUTS]
        scaled_inputs = list(IA3_INPUTS) if tuning.feedforward is None else tuning.feedforward
        return sum(
            linear.inputs if _is_target(name, scaled_inputs) else linear.outputs
            for name, linear in self._matrices()
            if _is_target(name, targets)
        )

    def _low_rank(self, tuning: LowRank, part: Literal["model", "trunk"]) -> int:
        targets = tuning.targets if isinstance(tuning.targets, list) else None  # None is all-linear
        # With last_layers only the uppermost layers have adapters, and the head has none.
        lowest = 0 if tuning.last_layers is None else self.layers - min(tuning.last_layers, self.layers)
        shapes = [
            (linear.inputs, linear.outputs)
            for name, linear in self._matrices(lowest)
            if targets is None or _is_target(name, targets)
        ]
        head = targets is not None and tuning.last_layers is None and _is_target(self.head_path, targets)
        if part == "model" and head:
            shapes.append((self.hidden, self.vocabulary))
        # A has rank x inputs, B outputs x rank; DoRA adds one magnitude per output.
        return sum(tuning.rank * (inputs + outputs) + tuning.dora * outputs for inputs, outputs in shapes)

    def learning_layers(self, tuning: TuningBase) -> int:
        """Count the layers, from the last one down, that gradients flow through."""
        last = tuning.last_layers if isinstance(tuning, LowRank) and not tuning.save_modules else None
        return self.layers if last is None else min(last, self.layers)

    def _matrices(self, lowest: int = 0) -> Iterator[tuple[str, Linear]]:
        for layer in range(lowest, self.layers):
            for linear in self.linears:
                yield f"{self.layers_path}.{layer}.{linear.path}", linear

    def _module(self, name: str, part: Literal["model", "trunk"]) -> int:
        """Count the parameters of the modules called ``name``; a tied head counts with the embeddings only."""
        if name in EMBEDDINGS:
            return self.vocabulary * self.hidden
        if name == self.head_path:
            return self.head if part == "model" else 0
        count = sum(linear.parameters for path, linear in self._matrices() if _is_target(path, [name]))
        if not count:
            raise UnknownArchitecture(f"there is no rule for the size of the module '{name}' in save_modules")
        return count


def _is_target(name: str, targets: list[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def read_architecture(config_file: Path) -> Architecture:
    """Read the architecture from a model folder's ``config.json``. Raises ``UnknownArchitecture`` without one."""
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownArchitecture(f"{config_file} cannot be read ({type(error).__name__})") from None
    return architecture_of(config if isinstance(config, dict) else {})


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a parsed ``config.json``.

    Raises ``UnknownArchitecture`` for a type without a rule and for a missing size.
    """
    kind = str(config.get("model_type"))
    if kind not in RULES:
        raise UnknownArchitecture(f"there is no rule for model_type '{kind}', only for {', '.join(sorted(RULES))}")
    try:
        return RULES[kind](config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UnknownArchitecture(
            f"the config.json of this {kind} lacks a size or has an invalid one ({error})"
        ) from None


@dataclass(frozen=True, kw_only=True)
class _LlamaLike:
    """Rule for decoders with RMS norms, grouped keys and a gated MLP: config → architecture."""

    needs: tuple[str, ...] = ()
    """Sizes without a default that follows from others, so the config must have them."""
    qkv_bias: bool | None = None
    """None follows ``attention_bias``, which then applies to the output projection as well."""
    mlp_bias: bool = False
    """The config's field of that name counts."""
    head_norms: Literal["none", "head", "all"] = "none"
    """Norms of queries and keys over one head's features, or over all heads'."""
    norms: int = 2
    """Norms over a layer's width."""
    lean: bool = True
    """Norms are written as Llama's."""
    scaled_embeddings: bool = False
    """The token embedding is a class that scales its rows, as Gemma's."""
    tied: bool = False
    """Default if the config has no such field."""
    fused: bool = False
    """One matrix for queries, keys and values, and another for gate and up."""

    def __call__(self, config: Mapping[str, Any]) -> Architecture:
        """Return the architecture. Raises ``KeyError`` for a size that the config lacks."""
        missing = [name for name in self.needs if not config.get(name)]
        if missing:
            raise KeyError(missing[0])
        hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        groups = config.get("num_key_value_heads") or heads
        queries, keys = heads * size, groups * size
        # Norms of queries and keys: one pair over a head's features, or over all heads' features.
        of_heads = {"none": 0, "head": 2 * size, "all": queries + keys}[self.head_norms]
        return Architecture(
            model_type=config["model_type"],
            hidden=hidden,
            layers=config["num_hidden_layers"],
            vocabulary=config["vocab_size"],
            key_value_width=keys,
            linears=self._linears(config, inner, queries, keys),
            vectors=self.norms * hidden + of_heads,
            embedded=config["vocab_size"] * hidden,
            last_norm=hidden,
            tied=bool(config.get("tie_word_embeddings", self.tied)),
            norms=self.norms,
            normed_heads=0 if self.head_norms == "none" else queries + keys,
            lean_norms=self.lean,
            scaled_embeddings=self.scaled_embeddings,
            heads=(heads, groups),
        )

    def _linears(self, config: Mapping[str, Any], inner: int, queries: int, keys: int) -> tuple[Linear, ...]:
        """Return a layer's matrices: MLP of width ``inner``, queries and keys of these widths over all heads."""
        hidden = config["hidden_size"]
        in_bias = out_bias = bool(config.get("attention_bias", False))
        if self.qkv_bias is not None:
            in_bias, out_bias = self.qkv_bias, False
        inner_bias = self.mlp_bias and bool(config.get("mlp_bias", False))
        if self.fused:
            inputs = [Linear("self_attn.qkv_proj", hidden, queries + 2 * keys, in_bias)]
            gated = [Linear("mlp.gate_up_proj", hidden, 2 * inner, inner_bias)]
        else:
            widths = (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))
            inputs = [Linear(f"self_attn.{name}", hidden, width, in_bias) for name, width in widths]
            gated = [Linear(f"mlp.{name}", hidden, inner, inner_bias) for name in ("gate_proj", "up_proj")]
        outputs = [Linear("self_attn.o_proj", queries, hidden, out_bias)]
        down = [Linear("mlp.down_proj", inner, hidden, inner_bias)]
        return (*inputs, *outputs, *gated, *down)


def _gpt_neox(config: Mapping[str, Any]) -> Architecture:
    hidden, inner, bias = config["hidden_size"], config["intermediate_size"], bool(config.get("attention_bias", True))
    return Architecture(
        model_type="gpt_neox",
        hidden=hidden,
        layers=config["num_hidden_layers"],
        vocabulary=config["vocab_size"],
        key_value_width=hidden,
        linears=(
            Linear("attention.query_key_value", hidden, 3 * hidden, bias),
            Linear("attention.dense", hidden, hidden, bias),
            Linear("mlp.dense_h_to_4h", hidden, inner, True),
            Linear("mlp.dense_4h_to_h", inner, hidden, True),
        ),
        vectors=2 * 2 * hidden,  # two layer norms, each with weight and bias
        embedded=config["vocab_size"] * hidden,
        last_norm=2 * hidden,
        tied=bool(config.get("tie_word_embeddings", False)),
        heads=(config.get("num_attention_heads") or 0,) * 2,
        layers_path="gpt_neox.layers",
        head_path="embed_out",
    )


def _gpt2(config: Mapping[str, Any]) -> Architecture:
    hidden = config["n_embd"]
    inner = config.get("n_inner") or 4 * hidden
    return Architecture(
        model_type="gpt2",
        hidden=hidden,
        layers=config["n_layer"],
        vocabulary=config["vocab_size"],
        key_value_width=hidden,
        linears=(
            Linear("attn.c_attn", hidden, 3 * hidden, True),
            Linear("attn.c_proj", hidden, hidden, True),
            Linear("mlp.c_fc", hidden, inner, True),
            Linear("mlp.c_proj", inner, hidden, True),
        ),
        vectors=2 * 2 * hidden,
        embedded=(config["vocab_size"] + config["n_positions"]) * hidden,
        last_norm=2 * hidden,
        tied=bool(config.get("tie_word_embeddings", True)),
        conv1d=True,
        heads=(config.get("n_head") or 0,) * 2,
        layers_path="transformer.h",
    )


GROUPS, HEADS = ("num_key_value_heads",), ("num_key_value_heads", "head_dim")

RULES: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {
    "llama": _LlamaLike(mlp_bias=True),
    "granite": _LlamaLike(mlp_bias=True),
    "smollm3": _LlamaLike(needs=GROUPS, mlp_bias=True, tied=True),
    "mistral": _LlamaLike(needs=GROUPS, qkv_bias=False),
    "phi3": _LlamaLike(qkv_bias=False, fused=True),
    "qwen2": _LlamaLike(needs=GROUPS, qkv_bias=True),
    "qwen3": _LlamaLike(needs=HEADS, head_norms="head"),
    "olmo2": _LlamaLike(head_norms="all", lean=False),
    "gemma": _LlamaLike(needs=HEADS, lean=False, scaled_embeddings=True, tied=True),
    "gemma2": _LlamaLike(needs=HEADS, norms=4, lean=False, scaled_embeddings=True, tied=True),
    "gemma3_text": _LlamaLike(needs=HEADS, norms=4, head_norms="head", lean=False, scaled_embeddings=True, tied=True),
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
}
"""``model_type`` -> rule that reads the architecture from a config of that type."""


def inserted_parameters(model: Architecture, tuning: TuningBase) -> int | None:
    """Count what an inserted method trains next to the frozen model; None for a ``tuning`` of another kind."""
    if isinstance(tuning, PTuning):
        encoder = _p_tuning_encoder(model.hidden, tuning.hidden_size or model.hidden, tuning.encoder)
        return tuning.tokens * model.hidden + encoder
    if isinstance(tuning, PrefixTuning):
        # Every layer has keys and values for each virtual token.
        return tuning.tokens * model.layers * 2 * model.key_value_width
    if isinstance(tuning, VirtualTokens):
        return tuning.tokens * model.hidden
    if not isinstance(tuning, AdaptersTuning):
        return None
    if tuning.kind == "llama_adapter":
        layers = tuning.layers if tuning.layers is not None else max(1, model.layers - 2)
        # Every adapted layer has the learned tokens and one gate.
        return layers * (tuning.tokens * model.hidden + 1)
    if tuning.position == "parallel":
        # Parallel: gate, up and down, without biases.
        return model.layers * 3 * tuning.size * model.hidden
    # Sequential: down and up with their biases, after attention, the MLP or both.
    return model.layers * len(tuning.after) * (2 * tuning.size * model.hidden + tuning.size + model.hidden)


def _p_tuning_encoder(hidden: int, inner: int, kind: str) -> int:
    """Count peft's p-tuning network: three linear layers, or a bidirectional LSTM of two layers and two linear ones."""
    if kind == "mlp":
        return (hidden * inner + inner) + (inner * inner + inner) + (inner * hidden + hidden)
    # Per direction four gates, each with a matrix for inputs, a matrix for the state, and two biases.
    first, second = (2 * 4 * inner * (width + inner + 2) for width in (hidden, 2 * inner))
    return first + second + (4 * inner * inner + 2 * inner) + (2 * inner * hidden + hidden)
