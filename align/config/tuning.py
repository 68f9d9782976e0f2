"""The block ``tuning``, ``{method: lora, rank: 16}``, of every stage that trains. Torch-free.

``full`` trains the model's own weights; every other method trains few additional weights and freezes the model.
``align.models.tuning`` applies the methods to a model.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.config.options import check_options, check_type
from align.config.tuning_blocks import FrozenBase, Lisa, TrainedTokens, Unfreeze
from align.config.tuning_blocks import TuningBase as TuningBase
from align.config.validation import hint_nearest

Targets = Literal["all-linear"] | list[str]

LORA_INITS = ("default", "gaussian", "orthogonal", "eva", "pissa", "olora", "loftq")
"""Initializations of LoRA's matrices; ``pissa_niter_N`` is also allowed."""


class FullTuning(TuningBase):
    """Train the model's own weights: all of them, or a part at a time."""

    method: Literal["full"] = "full"
    freeze: list[str] = Field(default_factory=list)
    """Weights that are never trained, by their name or a parent module's name: ``model.layers.{0..11}``, ``*norm*``.

    ``*`` and ``?`` are wildcards, ``{0..11}`` and ``{q_proj,k_proj}`` lists. A pattern without a match is refused.
    """
    unfreeze: Unfreeze | None = None
    """Unfreeze the model from the last layers down: ``{at: {0: 2, 50: 8}}``."""
    lisa: Lisa | None = None
    """Train random layers: ``{layers: 2, every: 20}``."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of a layer as a share of the next layer's; the last layer and the head use the full rate."""

    @property
    def scheduled(self) -> bool:
        """True if different weights are trained at different steps."""
        return self.unfreeze is not None or self.lisa is not None

    @property
    def label(self) -> str:
        """Name for tables, with every setting that is not a default."""
        parts: list[str] = [self.method]
        if self.freeze:
            parts.append("freeze")
        if self.unfreeze is not None:
            parts.append("unfreeze")
        if self.lisa is not None:
            parts.append("LISA")
        if self.layer_decay < 1:
            parts.append(f"decay {self.layer_decay:g}")
        return " ".join(parts)

    @model_validator(mode="after")
    def _check_single_schedule(self) -> FullTuning:
        if self.unfreeze is not None and self.lisa is not None:
            raise ValueError("unfreeze and lisa both choose the layers to train; remove one of them.")
        return self


class LowRank(TrainedTokens, FrozenBase):
    """Fields of every kind of LoRA."""

    rank: int = Field(16, ge=1, le=1024)
    """Rank of each update; a higher rank has more capacity and needs more memory."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / rank; raising it acts like a higher learning rate."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input; keep 0 for PPO and DPO, whose ratios assume a deterministic model."""
    targets: Targets = "all-linear"
    """Module names that get an adapter; ``all-linear`` leaves out only the output head."""
    last_layers: int | None = Field(None, ge=1)
    """Adapters in only so many of the last layers. The layers below need no backward pass and keep no activations,
    and PPO runs them once for policy and reference together."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so a high rank keeps its step size (arXiv 2312.03732)."""
    dora: bool = False
    """Train the magnitude of each matrix's rows and its direction separately (arXiv 2402.09353): slower."""
    init: str = "default"
    """Initialization of the adapters: ``default`` (the update is 0), ``gaussian``, ``orthogonal``, ``eva``, and others.

    ``pissa`` (the largest singular vectors, arXiv 2404.02948; ``pissa_niter_4`` finds them faster, by 4 rounds of
    subspace iteration) and ``olora`` (a QR decomposition, 2406.01775) subtract their part from the frozen weights.
    ``eva`` (2410.07170) uses the first training rows. ``loftq`` (2310.08659) corrects the quantization error, so qlora
    only.
    """
    save_modules: list[str] = Field(default_factory=list)
    """Modules trained in full and saved in checkpoints, such as ``embed_tokens``."""

    @property
    def starts_from_weights(self) -> bool:
        """True for PiSSA and OLoRA."""
        return self.init == "olora" or self.init.startswith("pissa")

    @property
    def completes_weights(self) -> bool:
        """True for LoftQ, whose adapters hold the quantization error."""
        return self.init == "loftq"

    @property
    def online_objection(self) -> str | None:
        """Dropout makes passes differ, and ``eva`` needs training rows."""
        if self.dropout:
            return (
                f"tuning.dropout is {self.dropout}, but this stage compares log-probabilities of one model; set it to 0"
            )
        if self.init == "eva":
            return "tuning.init eva needs training rows, and there are none yet"
        return None

    @property
    def label(self) -> str:
        """Name for tables, with the rank and every setting that is not a default."""
        parts = [f"{self.method} r{self.rank}"]
        if self.rslora:
            parts.append("rsLoRA")
        if self.dora:
            parts.append("DoRA")
        if self.init != "default":
            parts.append(self.init)
        if self.last_layers is not None:
            parts.append(f"last {self.last_layers} layers")
        return " ".join(parts)

    @field_validator("init")
    @classmethod
    def _check_init(cls, init: str) -> str:
        if init not in LORA_INITS and not re.fullmatch(r"pissa_niter_[1-9]\d?", init):
            hint = hint_nearest(init, LORA_INITS)
            raise ValueError(f"'{init}' is none of {', '.join(LORA_INITS)}, pissa_niter_<1 to 99>.{hint}")
        return init

    @model_validator(mode="after")
    def _check_parts_compatible(self) -> Self:
        if self.init == "eva" and self.dora:
            raise ValueError("dora with init eva is not supported: dora measures the matrices before eva is done.")
        if self.init == "loftq" and self.method != "qlora":
            raise ValueError("init loftq corrects the quantization error; take `method: qlora`, or another init.")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"init orthogonal needs an even rank; found {self.rank}.")
        return self


class LoraTuning(LowRank):
    """Train low-rank adapters on frozen weights (arXiv 2106.09685)."""

    method: Literal["lora"] = "lora"


class QloraTuning(LowRank):
    """LoRA on weights in 4 bits (arXiv 2305.14314): an eighth of the model's memory, and slower.

    Policy and reference both use the quantized model, with LoftQ's initial adapters if that is the ``init``. The saved
    checkpoint has dequantized weights with the adapters merged, in the base's type. Needs bitsandbytes; also runs on
    CPUs.
    """

    method: Literal["qlora"] = "qlora"
    quantization: Literal["nf4", "fp4"] = "nf4"
    """The 16 values of a weight: quantiles of a normal distribution, or 4-bit floating point."""
    double_quantization: bool = True
    """Also quantize the scales, which saves 0.4 bits per weight."""

    @model_validator(mode="after")
    def _check_init_keeps_weights(self) -> Self:
        if self.starts_from_weights:
            raise ValueError(
                f"init {self.init} changes the weights, which 4 bits cannot hold; take `init: loftq`, "
                "which is made for this, or `method: lora`."
            )
        return self


IA3_OUTPUTS = ("k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn")
"""Modules whose output IA3 scales by default: keys and values, or the fused matrix that computes them."""
IA3_INPUTS = ("down_proj", "dense_4h_to_h", "mlp.c_proj")
"""Modules whose input IA3 scales by default: the MLP's last projection."""


class Ia3Tuning(FrozenBase):
    """Train scales of keys, values and the MLP's inner features (arXiv 2205.05638); use a learning rate near 1e-2."""

    method: Literal["ia3"] = "ia3"
    targets: list[str] | None = Field(None, min_length=1)
    """Modules whose output is scaled, or whose input if in ``feedforward``; null: keys, values and MLP outputs."""
    feedforward: list[str] | None = None
    """Those of ``targets`` whose input is scaled, not their output; by default the MLP's last projection."""

    @model_validator(mode="after")
    def _check_feedforward(self) -> Self:
        if (self.targets is None) != (self.feedforward is None):
            raise ValueError("targets and feedforward go together: give both or neither (feedforward may be []).")
        unknown = [name for name in self.feedforward or () if name not in (self.targets or ())]
        if unknown:
            raise ValueError(f"feedforward names {', '.join(unknown)}, which is not among targets.")
        return self


class PeftTuning(FrozenBase):
    """Any other method of peft that can be merged into the weights: ``{method: peft, type: vera, options: {r:
    64}}``."""

    method: Literal["peft"] = "peft"
    type: str
    """peft's name of the method in lower case: vera, loha, lokr, oft, boft, c3a, hra, miss, randlora, ln_tuning..."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of peft's config class, checked against it; ``target_modules`` is ``all-linear`` by default."""

    @property
    def online_objection(self) -> str | None:
        """Dropout and random updates make two forward passes differ."""
        for name, value in self.options.items():
            if name.endswith("dropout") and value:
                return f"tuning.options.{name} is {value}, but this stage compares log-probabilities of one model"
        return "pvera samples its update at random in each pass" if self.type == "pvera" else None

    @property
    def label(self) -> str:
        """peft's name of the method."""
        return self.type

    @field_validator("type")
    @classmethod
    def _check_peft_type(cls, name: str) -> str:
        check_type(name)
        return name

    @model_validator(mode="after")
    def _check_peft_options(self) -> Self:
        check_options(self.type, self.options)
        return self


class VirtualTokens(FrozenBase):
    """Trained tokens in front of every conversation: new entries of the vocabulary, first in the chat template.

    The model's own weights do not change. ``max_length`` counts the tokens.
    """

    input_only: ClassVar[bool] = True

    tokens: int = Field(20, ge=1, le=512)
    """Number of virtual tokens; each costs as much as a real token, in every row and every sampled response."""

    @property
    def label(self) -> str:
        """Name for tables, with the number of tokens."""
        return f"{self.method} {self.tokens}"


class PromptTuning(VirtualTokens):
    """Train the virtual tokens' embeddings (arXiv 2104.08691). Use a high learning rate, 1e-2 or more."""

    method: Literal["prompt"] = "prompt"
    text: str | None = Field(None, min_length=1)
    """Initialize with the embeddings of this text's tokens, repeated or cut to fit; by default of random tokens."""


class PTuning(VirtualTokens):
    """Train a small network that computes virtual tokens (arXiv 2103.10385); the checkpoint has only its output."""

    method: Literal["p_tuning"] = "p_tuning"
    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network: an MLP of three layers, or a bidirectional LSTM followed by two layers."""
    hidden_size: int | None = Field(None, ge=1)
    """Width of the network; by default the model's hidden size."""


class PrefixTuning(VirtualTokens):
    """Train the keys and values of virtual tokens in every layer (arXiv 2101.00190).

    A plain checkpoint cannot hold them, so they are saved in ``model/adapter`` next to the frozen model.
    """

    method: Literal["prefix"] = "prefix"
    text: str | None = Field(None, min_length=1)
    """Initialize with the keys and values of this text as a prompt, repeated or cut to fit; by default random
    tokens."""


class AdaptersTuning(FrozenBase):
    """Train small modules between frozen layers: ``bottleneck`` or ``llama_adapter``.

    On saving, a parallel bottleneck is merged into a wider MLP, so the result is a plain checkpoint. The others are
    saved in ``model/adapter`` next to the frozen model.
    """

    method: Literal["adapters"] = "adapters"
    kind: Literal["bottleneck", "llama_adapter"] = "bottleneck"
    """``llama_adapter`` (arXiv 2303.16199): trained tokens that upper layers attend to, with a gate that starts at
    0."""
    size: int = Field(64, ge=8, multiple_of=8, le=8192)
    """Bottleneck: its width."""
    position: Literal["parallel", "sequential"] = "parallel"
    """Bottleneck: parallel to the MLP (arXiv 2110.04366), or after a part of the layer (arXiv 1902.00751)."""
    after: list[Literal["attention", "mlp"]] = Field(["mlp"], min_length=1)
    """Sequential bottleneck: the parts of a layer that it follows; both as in Houlsby, ``[mlp]`` as in Pfeiffer."""
    tokens: int = Field(10, ge=1, le=512)
    """LLaMA-Adapter: trained tokens per layer."""
    layers: int | None = Field(None, ge=1)
    """LLaMA-Adapter: number of last layers that get tokens; by default all but the first two."""

    @property
    def label(self) -> str:
        """Name for tables, with size and position."""
        if self.kind == "llama_adapter":
            return f"llama_adapter {self.tokens}"
        return f"bottleneck {self.size} {self.position}"

    @model_validator(mode="after")
    def _check_kind_fields(self) -> Self:
        allowed = {"size", "position", "after"} if self.kind == "bottleneck" else {"tokens", "layers"}
        # compare values, not which fields were set: a stage's process gets its config with every default written out
        defaults = type(self).model_construct().__dict__
        others = self.__dict__.keys() - allowed - {"method", "kind", "base_dtype"}
        foreign = sorted(name for name in others if self.__dict__[name] != defaults[name])
        if foreign:
            raise ValueError(
                f"'{foreign[0]}' has no effect with kind {self.kind}, which has {', '.join(sorted(allowed))}."
            )
        if self.position == "parallel" and self.after != defaults["after"]:
            raise ValueError("'after' is for a sequential bottleneck; a parallel one runs next to the MLP.")
        if len(set(self.after)) < len(self.after):
            raise ValueError(f"'after' names a part twice: {', '.join(self.after)}.")
        return self


Tuning = Annotated[
    FullTuning
    | LoraTuning
    | QloraTuning
    | Ia3Tuning
    | PeftTuning
    | PrefixTuning
    | PromptTuning
    | PTuning
    | AdaptersTuning,
    Field(discriminator="method"),
]
"""The block ``tuning``, such as ``{method: lora, rank: 16}``."""
