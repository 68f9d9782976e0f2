"""How weights are fitted: one block, ``tuning: {method: lora, rank: 16}``, for every stage that trains. Torch-free.

``full`` trains the model's own weights; every other method trains few weights beside frozen ones. What the methods do
to a model stands in ``align.models.tuning``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.config.base import Config
from align.config.peft_options import check_options, check_type
from align.config.tuning_schedules import Lisa, Unfreeze
from align.config.validation import nearest

LORA_HEAD_RATE = 0.1
"""Learning rate of a score or value head, as a share of the adapters' beside it. A step of Adam moves every weight of a
head by about the learning rate, and a score by that times the hidden size and the features' size: 1e-3, right for
adapters, moves SmolLM2's scores by about 1.
"""

Targets = Literal["all-linear"] | list[str]

LORA_INITS = ("default", "gaussian", "orthogonal", "eva", "pissa", "olora", "loftq")
"""Where LoRA's matrices may start; ``pissa_niter_N`` beside them."""


class TuningBase(Config):
    """What every method can tell of itself."""

    method: str
    input_only: ClassVar[bool] = False
    """Whether the method acts on the model's input or keys and values as a whole (virtual tokens), not on modules."""

    @property
    def trains_all(self) -> bool:
        """Whether the model's own weights are trained, so that a reference needs a copy of them."""
        return self.method == "full"

    @property
    def starts_from_weights(self) -> bool:
        """Whether adapters start with a part of the weights, so that without them the model is another."""
        return False

    @property
    def completes_weights(self) -> bool:
        """Whether adapters start with what the frozen weights lack of the model that came in."""
        return False

    @property
    def head_share(self) -> float:
        """Default learning rate of a score or value head, as a share of what is trained beside it."""
        return 1.0 if self.trains_all else LORA_HEAD_RATE

    @property
    def online_objection(self) -> str | None:
        """Why PPO and its kind cannot train so, which compare log-probabilities of one model; None where they can."""
        return f"tuning {self.method} acts on the model's input, and there rows share them" if self.input_only else None

    @property
    def label(self) -> str:
        """Short name for tables: ``lora r16``."""
        return self.method


class FullTuning(TuningBase):
    """Train the model's own weights: all of them, or those that are open at a time."""

    method: Literal["full"] = "full"
    freeze: list[str] = Field(default_factory=list)
    """Weights that are never trained, by name or the name of a module above them: ``model.layers.{0..11}``, ``*norm*``.

    ``*`` and ``?`` are wildcards, ``{0..11}`` and ``{q_proj,k_proj}`` lists; a pattern that fits nothing is refused.
    """
    unfreeze: Unfreeze | None = None
    """Open the model from the last layers down: ``{at: {0: 2, 50: 8}}``."""
    lisa: Lisa | None = None
    """Train layers drawn at random: ``{layers: 2, every: 20}``."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of a layer as a share of the layer above it; the last layer and the head learn at the full rate."""

    @property
    def scheduled(self) -> bool:
        """Whether other weights are open at different steps."""
        return self.unfreeze is not None or self.lisa is not None

    @property
    def label(self) -> str:
        """With what is not plain about it."""
        parts = ["freeze"] * bool(self.freeze) + ["unfreeze"] * (self.unfreeze is not None)
        parts += ["LISA"] * (self.lisa is not None) + [f"decay {self.layer_decay:g}"] * (self.layer_decay < 1)
        return " ".join([self.method, *parts])

    @model_validator(mode="after")
    def _one_schedule(self) -> FullTuning:
        if self.unfreeze is not None and self.lisa is not None:
            raise ValueError("unfreeze and lisa both say which layers are open; take one of them out.")
        return self


class LowRank(TuningBase):
    """What every kind of LoRA has."""

    rank: int = Field(16, ge=1, le=1024)
    """Rank of each update; more rank, more capacity and memory."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / rank; raising it acts like a higher learning rate."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input; keep 0 for PPO and DPO, whose ratios assume a deterministic model."""
    targets: Targets = "all-linear"
    """Module names that get an adapter; ``all-linear`` leaves out only the output head."""
    last_layers: int | None = Field(None, ge=1)
    """Adapters in so many of the last layers only. What is below needs no backward pass and keeps no activations, and
    PPO passes it once for policy and reference together."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so that a high rank keeps its step size (arXiv 2312.03732)."""
    dora: bool = False
    """Train each matrix's row lengths apart from its direction (arXiv 2402.09353): closer to full tuning, slower."""
    init: str = "default"
    """Where adapters start: ``default`` (the update is 0), ``gaussian``, ``orthogonal``, ``eva``, or from the weights.

    ``pissa`` (the largest singular vectors, arXiv 2404.02948; ``pissa_niter_4`` finds them by 4 rounds of subspace
    iteration, faster) and ``olora`` (a QR decomposition, 2406.01775) take their part out of the frozen weights. ``eva``
    (2410.07170) looks at the first training rows. ``loftq`` (2310.08659) makes up for quantization: with qlora only.
    """
    save_modules: list[str] = Field(default_factory=list)
    """Modules trained whole beside the adapters and kept in checkpoints, such as ``embed_tokens`` for new tokens."""

    @property
    def starts_from_weights(self) -> bool:
        """PiSSA and OLoRA."""
        return self.init == "olora" or self.init.startswith("pissa")

    @property
    def completes_weights(self) -> bool:
        """LoftQ, of what quantization loses."""
        return self.init == "loftq"

    @property
    def online_objection(self) -> str | None:
        """Dropout and a look at training rows are no good there."""
        if self.dropout:
            return f"tuning.dropout is {self.dropout}; log-probabilities of one model are compared here, so set it to 0"
        return "tuning.init eva looks at training rows, and here there are none yet" if self.init == "eva" else None

    @property
    def label(self) -> str:
        """With its rank and what is not plain about it."""
        parts = ["rsLoRA"] * self.rslora + ["DoRA"] * self.dora + [self.init] * (self.init != "default")
        parts += [f"last {self.last_layers} layers"] * (self.last_layers is not None)
        return " ".join([f"{self.method} r{self.rank}", *parts])

    @field_validator("init")
    @classmethod
    def _there_is_such_a_start(cls, init: str) -> str:
        if init not in LORA_INITS and not re.fullmatch(r"pissa_niter_[1-9]\d?", init):
            close = nearest(init, LORA_INITS)
            hint = f" Did you mean '{close}'?" if close else ""
            raise ValueError(f"'{init}' is none of {', '.join(LORA_INITS)}, pissa_niter_<1 to 99>.{hint}")
        return init

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        if self.init == "eva" and self.dora:
            raise ValueError("dora with init eva is not supported: the matrices' lengths are taken before eva is done.")
        if self.init == "loftq" and self.method != "qlora":
            raise ValueError("init loftq makes up for what quantization loses; take `method: qlora`, or another init.")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"init orthogonal needs an even rank; found {self.rank}.")
        return self


class LoraTuning(LowRank):
    """Train low-rank adapters beside frozen weights (arXiv 2106.09685)."""

    method: Literal["lora"] = "lora"


class QloraTuning(LowRank):
    """LoRA on weights kept in 4 bits (arXiv 2305.14314): the model takes an eighth of the memory, and is slower.

    The quantized model is what is trained, and the reference too, with LoftQ's first adapters where it has them. What
    is saved is its weights, dequantized, with the adapters added, in float32. Needs bitsandbytes; runs on CPUs too.
    """

    method: Literal["qlora"] = "qlora"
    quantization: Literal["nf4", "fp4"] = "nf4"
    """The 16 values of a weight: quantiles of a normal distribution, or 4-bit floating point."""
    double_quantization: bool = True
    """Quantize the scales too, which saves 0.4 bits a weight."""

    @model_validator(mode="after")
    def _weights_stay_as_they_are(self) -> Self:
        if self.starts_from_weights:
            raise ValueError(
                f"init {self.init} takes a part out of the weights, which 4 bits cannot hold; take `init: loftq`, "
                "which is made for this, or `method: lora`."
            )
        return self


IA3_OUTPUTS = ("k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn")
"""Modules whose output IA3 scales by default: keys and values, or the one matrix that makes them."""
IA3_INPUTS = ("down_proj", "dense_4h_to_h", "mlp.c_proj")
"""Modules whose input it scales by default: the last of the MLP."""


class Ia3Tuning(TuningBase):
    """Train factors of keys, values and the MLP's inner features (arXiv 2205.05638); they want a rate near 1e-2."""

    method: Literal["ia3"] = "ia3"
    targets: list[str] | None = Field(None, min_length=1)
    """Module names whose output is scaled, or input if in ``feedforward``; null takes keys, values and MLP outputs."""
    feedforward: list[str] | None = None
    """Those of ``targets`` whose input is scaled rather than their output; by default the MLP's outputs."""

    @model_validator(mode="after")
    def _feedforward_are_targets(self) -> Self:
        if (self.targets is None) != (self.feedforward is None):
            raise ValueError("targets and feedforward go together: give both or neither (feedforward may be []).")
        strange = [name for name in self.feedforward or () if name not in (self.targets or ())]
        if strange:
            raise ValueError(f"feedforward names {', '.join(strange)}, which is not among targets.")
        return self


class PeftTuning(TuningBase):
    """Any other method of peft that folds into the weights: ``{method: peft, type: vera, options: {r: 64}}``."""

    method: Literal["peft"] = "peft"
    type: str
    """peft's name of it, in small letters: vera, loha, lokr, oft, boft, c3a, hra, miss, randlora, ln_tuning..."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of peft's own config class, checked against it; ``target_modules`` is ``all-linear`` by default."""

    @property
    def online_objection(self) -> str | None:
        """Whatever makes two forward passes differ."""
        found = next((name for name, value in self.options.items() if name.endswith("dropout") and value), None)
        if found is not None:
            return f"tuning.options.{found} is {self.options[found]}; log-probabilities of one model are compared here"
        return "pvera draws its update at random in each pass" if self.type == "pvera" else None

    @property
    def label(self) -> str:
        """peft's name."""
        return self.type

    @field_validator("type")
    @classmethod
    def _is_a_method(cls, name: str) -> str:
        check_type(name)
        return name

    @model_validator(mode="after")
    def _options_exist(self) -> Self:
        check_options(self.type, self.options)
        return self


class VirtualTokens(TuningBase):
    """Learned tokens in front of every conversation: new entries of the vocabulary, put first in the chat template.

    The model itself stays as it is. One row's ``max_length`` counts them.
    """

    input_only: ClassVar[bool] = True

    tokens: int = Field(20, ge=1, le=512)
    """Virtual tokens; each costs what a real one costs, in every row and every answer sampled."""

    @property
    def label(self) -> str:
        """With their number."""
        return f"{self.method} {self.tokens}"


class PromptTuning(VirtualTokens):
    """Train the virtual tokens' embeddings (arXiv 2104.08691). They want a high learning rate, 1e-2 and more."""

    method: Literal["prompt"] = "prompt"
    text: str | None = Field(None, min_length=1)
    """Start from the embeddings of this text's tokens, repeated or cut to fit; by default from tokens at random."""


class PTuning(VirtualTokens):
    """Train virtual tokens that a small network makes (arXiv 2103.10385); once trained only its output is kept."""

    method: Literal["p_tuning"] = "p_tuning"
    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network: three layers, or an LSTM in both directions with two layers behind it."""
    hidden_size: int | None = Field(None, ge=1)
    """Width of that network; by default the model's own."""


class PrefixTuning(VirtualTokens):
    """Train the keys and values of virtual tokens in every layer (arXiv 2101.00190).

    No plain checkpoint can hold them: ``model/adapter`` keeps them beside the frozen model.
    """

    method: Literal["prefix"] = "prefix"
    text: str | None = Field(None, min_length=1)
    """Start from the keys and values this text has as a prompt, repeated or cut to fit; by default tokens at random."""


class AdaptersTuning(TuningBase):
    """Train small modules between frozen layers: ``bottleneck`` or ``llama_adapter``.

    A parallel bottleneck becomes part of a wider MLP on saving, and the result is a plain checkpoint. The others stay
    beside the frozen model, in ``model/adapter``.
    """

    method: Literal["adapters"] = "adapters"
    kind: Literal["bottleneck", "llama_adapter"] = "bottleneck"
    """``llama_adapter`` (arXiv 2303.16199): learned tokens upper layers attend to, through a gate that starts at 0."""
    size: int = Field(64, ge=8, multiple_of=8, le=8192)
    """Of a bottleneck: features inside."""
    position: Literal["parallel", "sequential"] = "parallel"
    """Of a bottleneck: beside the MLP (arXiv 2110.04366), or behind a part of the layer (arXiv 1902.00751)."""
    after: list[Literal["attention", "mlp"]] = Field(["mlp"], min_length=1)
    """Of a sequential bottleneck: behind which parts of a layer; both is Houlsby's, ``[mlp]`` Pfeiffer's."""
    tokens: int = Field(10, ge=1, le=512)
    """Of a LLaMA-Adapter: learned tokens of each layer."""
    layers: int | None = Field(None, ge=1)
    """Of a LLaMA-Adapter: the last layers that get them; by default all but the first two."""

    @property
    def label(self) -> str:
        """What is put where."""
        if self.kind == "llama_adapter":
            return f"llama_adapter {self.tokens}"
        return f"bottleneck {self.size} {self.position}"

    @model_validator(mode="after")
    def _fields_are_of_this_kind(self) -> Self:
        bottleneck = self.kind == "bottleneck"
        meant = {"size", "position", "after"} if bottleneck else {"tokens", "layers"}
        # By value, not by what was set: a stage's process reads the whole block back, defaults written out.
        plain = type(self).model_construct().__dict__
        strange = sorted(
            name for name, value in self.__dict__.items()
            if name not in meant | {"method", "kind"} and value != plain[name]
        )  # fmt: skip
        if strange:
            raise ValueError(
                f"'{strange[0]}' means nothing for kind {self.kind}, which has {', '.join(sorted(meant))}."
            )
        if self.position == "parallel" and self.after != plain["after"]:
            raise ValueError("'after' is of a sequential bottleneck; a parallel one is beside the MLP.")
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
"""How weights are fitted. ``tuning: {method: lora, rank: 16}``"""
