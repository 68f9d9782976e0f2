"""Matrices, vectors and states of one layer of a decoder, from the numbers of its ``config.json``. Torch-free.

Each function returns the part of a layer that one module has: attention, a linear attention, a state space, a
convolution, a feed-forward block or a mixture of experts. A layer is the sum of its parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
"""Names of matrices of experts, shared experts and dense feed-forward layers, which peft moves to the experts."""
READ_BY_KERNELS = ("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "mamba", "mamba2", "nemotron_h")
"""Types of models with state-space layers; peft refuses ``KERNEL_MATRICES`` of some of them."""
KERNEL_MATRICES = ("out_proj", "conv1d")
"""Modules whose weights the kernels of state-space layers read in training."""

Config = Mapping[str, Any]
HeadNorms = Literal["none", "head", "all", "each"]


@dataclass(frozen=True)
class Linear:
    """A matrix of one layer; ``path`` is its module's name below the layer, such as ``self_attn.q_proj``."""

    path: str
    inputs: int
    outputs: int
    bias: bool = False
    experts: int = 1
    """Matrices of this shape in one tensor: the experts of a mixture."""

    @property
    def parameters(self) -> int:
        """Parameters of the matrix and its bias, for all experts."""
        return self.experts * (self.inputs + self.bias) * self.outputs


@dataclass(frozen=True)
class Layer:
    """Parts of one layer. Counts are numbers of parameters or of values."""

    linears: tuple[Linear, ...] = ()
    """Its linear layers."""
    experts: tuple[Linear, ...] = ()
    """Its tensors with a matrix for each expert, which are not linear layers."""
    vectors: int = 0
    """Other parameters: norms, routers, convolutions, and numbers of a state space."""
    token_cache: int = 0
    """Values that sampling keeps for a token: its keys and values."""
    state: int = 0
    """Values that sampling keeps for a sequence of any length, such as the state of a linear attention."""
    routed: int = 0
    """Experts that a token passes."""

    def __add__(self, other: Layer) -> Layer:
        """Return a layer with the parts of both."""
        return Layer(
            self.linears + other.linears,
            self.experts + other.experts,
            self.vectors + other.vectors,
            self.token_cache + other.token_cache,
            self.state + other.state,
            self.routed + other.routed,
        )

    @property
    def matrices(self) -> int:
        """Parameters of the linear layers."""
        return count(self.linears)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.matrices + count(self.experts) + self.vectors


def count(matrices: Iterable[Linear]) -> int:
    """Return the parameters of matrices with their biases."""
    return sum(matrix.parameters for matrix in matrices)


def head_size(config: Config) -> int:
    """Return the features of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def attention(
    config: Config,
    *,
    bias: bool = False,
    out_bias: bool = False,
    head_norms: HeadNorms = "none",
    fused: bool = False,
    gated: bool = False,
    out: str = "o_proj",
) -> Layer:
    """Return attention with grouped keys.

    Args:
        config: Numbers of heads and features.
        bias: True if queries, keys and values have biases.
        out_bias: True if the last matrix has a bias.
        head_norms: Norms of queries and keys: over one head's features, over all heads', or one for each head.
        fused: True if one matrix computes queries, keys and values.
        gated: True if the matrix of queries also computes a gate of the same width.
        out: Name of the last matrix.
    """
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], head_size(config)
    groups = config.get("num_key_value_heads") or heads
    queries, keys = heads * size, groups * size
    widths = {"q_proj": (1 + gated) * queries, "k_proj": keys, "v_proj": keys}
    if fused:
        widths = {"qkv_proj": queries + 2 * keys}
    linears = [Linear(f"self_attn.{name}", hidden, width, bias) for name, width in widths.items()]
    linears.append(Linear(f"self_attn.{out}", queries, hidden, out_bias))
    norms = {"none": 0, "head": 2 * size, "all": queries + keys, "each": queries + keys}[head_norms]
    return Layer(tuple(linears), vectors=norms, token_cache=2 * keys)


def latent_attention(config: Config) -> Layer:
    """Return attention with keys and values from a narrow latent vector (DeepSeek-V2), which is what is cached."""
    hidden, heads, bias = config["hidden_size"], config["num_attention_heads"], bool(config.get("attention_bias"))
    latent, rotated, unrotated = config["kv_lora_rank"], config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    queries, values, rank = heads * (unrotated + rotated), heads * config["v_head_dim"], config.get("q_lora_rank")
    linears = [Linear("self_attn.q_proj", hidden, queries)]
    if rank:
        linears = [
            Linear("self_attn.q_a_proj", hidden, rank, bias),
            Linear("self_attn.q_b_proj", rank, queries),
        ]
    linears += [
        # The rotated key has one head, which all query heads share, and is cached with the latent vector.
        Linear("self_attn.kv_a_proj_with_mqa", hidden, latent + rotated, bias),
        Linear("self_attn.kv_b_proj", latent, heads * unrotated + values),
        Linear("self_attn.o_proj", values, hidden, bias),
    ]
    return Layer(tuple(linears), vectors=(rank or 0) + latent, token_cache=latent + rotated)


def gated_delta(config: Config, *, fused: bool) -> Layer:
    """Return a gated delta net (Qwen3-Next, ``fused``, and Qwen3.5), whose state is a matrix for each value head."""
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    key_size, value_size = config["linear_key_head_dim"], config["linear_value_head_dim"]
    keys, values = config["linear_num_key_heads"] * key_size, heads * value_size
    widths = {"in_proj_qkv": 2 * keys + values, "in_proj_z": values, "in_proj_b": heads, "in_proj_a": heads}
    if fused:
        widths = {"in_proj_qkvz": 2 * keys + 2 * values, "in_proj_ba": 2 * heads}
    linears = [Linear(f"linear_attn.{name}", hidden, width) for name, width in widths.items()]
    # The convolution runs over queries, keys and values, but not over the gate.
    convolution = (2 * keys + values) * config["linear_conv_kernel_dim"]
    return Layer(
        (*linears, Linear("linear_attn.out_proj", values, hidden)),
        vectors=convolution + 2 * heads + value_size,  # per head a decay and a step, and one norm
        state=convolution + heads * key_size * value_size,
    )


def state_space(config: Config, *, path: str = "mamba", out_bias: str = "mamba_proj_bias", norm: bool = True) -> Layer:
    """Return a state space of Mamba 2 with the names of a hybrid's config; ``out_bias`` names a field."""
    hidden, heads, states = config["hidden_size"], config["mamba_n_heads"], config["mamba_d_state"]
    inner = config.get("mamba_d_ssm") or int(config["mamba_expand"] * hidden)
    # The convolution runs over the inputs and over B and C, which each group of heads shares.
    width = inner + 2 * config["mamba_n_groups"] * states
    convolution = width * config["mamba_d_conv"]
    return Layer(
        (
            Linear(f"{path}.in_proj", hidden, inner + width + heads, bool(config.get("mamba_proj_bias"))),
            Linear(f"{path}.out_proj", inner, hidden, bool(config.get(out_bias))),
        ),
        # per head a decay, a step and a direct path
        vectors=convolution + width * bool(config.get("mamba_conv_bias", True)) + 3 * heads + norm * inner,
        state=convolution + inner * states,
    )


def short_convolution(config: Config) -> Layer:
    """Return LFM2's gated convolution over the last tokens."""
    hidden, bias = config["hidden_size"], bool(config.get("conv_bias"))
    kernel = hidden * config["conv_L_cache"]
    linears = (Linear("conv.in_proj", hidden, 3 * hidden, bias), Linear("conv.out_proj", hidden, hidden, bias))
    return Layer(linears, vectors=kernel + bias * hidden, state=kernel)


def feed_forward(config: Config, width: int, names: Iterable[str], *, path: str = "mlp", bias: bool = False) -> Layer:
    """Return a feed-forward block of that width: all matrices but the last one read the hidden states.

    A matrix with ``gate_up`` or ``input`` in its name computes the gate and its factor together.
    """
    hidden = config["hidden_size"]
    *readers, last = names
    linears = [
        Linear(f"{path}.{name}", hidden, (2 if name in ("gate_up_proj", "input_linear") else 1) * width, bias)
        for name in readers
    ]
    return Layer((*linears, Linear(f"{path}.{last}", width, hidden, bias)))


def mixture(
    config: Config, width: int, *, shared: int = 0, gate: bool = False, bias: bool = False, path: str = "mlp"
) -> Layer:
    """Return a mixture of experts of that width with its router.

    ``shared`` is the width of the experts that every token passes, which have a ``gate`` of their own in Qwen's models.
    """
    hidden, experts = config["hidden_size"], expert_count(config)
    layer = Layer(
        experts=(
            Linear(f"{path}.experts.gate_up_proj", hidden, 2 * width, bias, experts),
            Linear(f"{path}.experts.down_proj", width, hidden, bias, experts),
        ),
        vectors=experts * (hidden + bias),
        routed=config.get("num_experts_per_tok") or 0,
    )
    if shared:
        name = "shared_expert" if gate else "shared_experts"
        layer += feed_forward(config, shared, GATED, path=f"{path}.{name}")
    return layer + Layer((Linear(f"{path}.shared_expert_gate", hidden, 1),)) if gate else layer


def expert_count(config: Config) -> int:
    """Return the experts that a router chooses from; 0 for a dense model."""
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    return int(next((config[name] for name in names if config.get(name)), 0))


GATED = ("gate_proj", "up_proj", "down_proj")
"""Matrices of Llama's feed-forward block."""
