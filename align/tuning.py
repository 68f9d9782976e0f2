"""How weights are fitted: one block, ``tuning: {method: lora, rank: 16}``, for every stage that trains. Torch-free.

``full`` trains the model's own weights; every other method trains few weights beside frozen ones. What the methods do
to a model stands in ``align.models.tuning``.
"""

from __future__ import annotations

import itertools
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_serializer, model_validator

from align.stage import Config

LORA_HEAD_RATE = 0.1
"""Learning rate of a score or value head, as a share of the adapters' beside it. A step of Adam moves every weight of a
head by about the learning rate, and a score by that times the hidden size and the features' size: 1e-3, right for
adapters, moves SmolLM2's scores by about 1.
"""

Targets = Literal["all-linear"] | list[str]


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
    def label(self) -> str:
        """Short name for tables: ``lora r16``."""
        return self.method


class Unfreeze(Config):
    """Open the model from its last layers down while it is trained (gradual unfreezing, arXiv 1801.06146).

    A layer that is closed gets no gradient and no optimizer state. The last norm is open from the start.
    """

    at: dict[float, int] = Field(min_length=1)
    """When -> how many of the last layers are open from then on: ``{0: 2, 50: 8}``. More than there are means all."""
    unit: Literal["steps", "epochs"] = "steps"
    """What the left side counts: optimizer steps, or epochs (a fraction is a part of one)."""
    embeddings: bool = False
    """Open the embeddings too, from when every layer is open; a model that ties its head to them opens both."""
    head: bool = False
    """Open the vocabulary head from the start; with tied embeddings these too. A reward model's is always open."""

    @model_validator(mode="after")
    def _opens_more_and_more(self) -> Unfreeze:
        times = sorted(self.at)
        if times[0] != 0:
            raise ValueError(
                f"at starts at {times[0]:g}: nothing would be trained before. Give `0:` a number of layers."
            )
        if self.unit == "steps" and any(time != int(time) for time in times):
            raise ValueError(f"at counts steps, whole numbers; found {', '.join(f'{t:g}' for t in times)}.")
        opened = [self.at[time] for time in times]
        if opened[0] < 0 or any(later <= earlier for earlier, later in itertools.pairwise(opened)):
            raise ValueError(f"at opens {opened} layers one after another; each must be more than the one before.")
        return self

    @field_serializer("at")
    def _in_order_with_text_keys(self, at: dict[float, int]) -> dict[str, int]:
        return {str(int(time) if time == int(time) else time): at[time] for time in sorted(at)}

    def last_layers(self, time: float) -> int:
        """How many of the last layers are open at ``time``, in ``unit``."""
        return max(count for start, count in self.at.items() if start <= time)


class Lisa(Config):
    """Train a few layers drawn at random, others after some steps (LISA, arXiv 2403.17919)."""

    layers: int = Field(2, ge=1)
    """Layers open at once; optimizer state and gradients exist for these only."""
    every: int = Field(20, ge=1)
    """Optimizer steps until others are drawn; AdamW's averages of a layer that closes are lost."""
    embeddings: bool = True
    """Train the embeddings all along, as the paper does."""
    head: bool = True
    """Train the vocabulary head all along, as the paper does; tied to the embeddings it is open if either is."""


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


class LoraTuning(TuningBase):
    """Train low-rank adapters beside frozen weights (arXiv 2106.09685)."""

    method: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=1024)
    """Rank of each update; more rank, more capacity and memory."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / rank; raising it acts like a higher learning rate."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input; keep 0 for PPO and DPO, whose ratios assume a deterministic model."""
    targets: Targets = "all-linear"
    """Module names that get an adapter; ``all-linear`` leaves out only the output head."""

    @property
    def label(self) -> str:
        """With its rank."""
        return f"{self.method} r{self.rank}"


class VirtualTokens(TuningBase):
    """Learnt tokens in front of every conversation: new entries of the vocabulary, with which the chat template begins.

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
    """``llama_adapter`` (arXiv 2303.16199): learnt tokens upper layers attend to, through a gate that starts at 0."""
    size: int = Field(64, ge=8, multiple_of=8, le=8192)
    """Of a bottleneck: features inside."""
    position: Literal["parallel", "sequential"] = "parallel"
    """Of a bottleneck: beside the MLP (arXiv 2110.04366), or behind a part of the layer (arXiv 1902.00751)."""
    after: list[Literal["attention", "mlp"]] = Field(["mlp"], min_length=1)
    """Of a sequential bottleneck: behind which parts of a layer; both is Houlsby's, ``[mlp]`` Pfeiffer's."""
    tokens: int = Field(10, ge=1, le=512)
    """Of a LLaMA-Adapter: learnt tokens of each layer."""
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
        strange = sorted(self.model_fields_set - meant - {"method", "kind"})
        if strange:
            raise ValueError(
                f"'{strange[0]}' means nothing for kind {self.kind}, which has {', '.join(sorted(meant))}."
            )
        if self.position == "parallel" and "after" in self.model_fields_set:
            raise ValueError("'after' is of a sequential bottleneck; a parallel one is beside the MLP.")
        if len(set(self.after)) < len(self.after):
            raise ValueError(f"'after' names a part twice: {', '.join(self.after)}.")
        return self


Tuning = Annotated[
    FullTuning | LoraTuning | PrefixTuning | PromptTuning | PTuning | AdaptersTuning, Field(discriminator="method")
]
"""How weights are fitted. ``tuning: {method: lora, rank: 16}``"""
