"""Parameter counts of a decoder and of its adapters, from its ``config.json`` only. Torch-free.

``model_types.RULES`` has one function per ``model_type``; a type without one is refused rather than guessed. The tests
compare each with the model that transformers builds. A multimodal model counts with its text part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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
from align.models.compute.layers import Layer, Linear, count

EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "embeddings")
"""Names of the token embedding."""


TIED = (
    "this model's head is tied to its embeddings, so an adapter on one would have to be on both. Remove both, or "
    "train them in full: `save_modules: [embed_tokens]`."
)
"""Ending of the message about ``targets`` that name a tied head or its embeddings."""


class UnknownArchitecture(ValueError):
    """The size of a model is not known; the message gives the reason and follows "unknown: "."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder: counts are numbers of parameters, widths numbers of features."""

    model_type: str
    hidden: int
    vocabulary: int
    blocks: tuple[Layer, ...]
    """The layers, from the first one on."""
    embedded: int
    """Parameters of the token and position embeddings."""
    last_norm: int
    """Parameters of the norms outside the layers."""
    tied: bool
    """True if the output head is the token embedding."""
    outer: tuple[Linear, ...] = ()
    """Linear layers outside the layers, without the head."""
    head_bias: bool = False
    skipped: tuple[str, ...] = ()
    """Last names of the linear layers that ``all-linear`` does not adapt (``align.models.experts.default_targets``)."""
    norms: int | None = None
    """Norms over a layer's width in one layer; None if there is no rule for a layer's activations."""
    normed_heads: int = 0
    """Features of one layer's queries and keys that have their own norms."""
    lean_norms: bool = False
    """True where norms are written as Llama's, and so keep little (``align.models.fast.lean_modules``)."""
    scaled_embeddings: bool = False
    """True if the token embedding is a class that scales its rows, and so is not rounded."""
    unrounded_positions: int = 0
    """Parameters of a position embedding with its own class, which is not rounded."""
    conv1d: bool = False
    """True if the matrices are GPT-2's ``Conv1D`` instead of linear layers."""
    layers_path: str = "model.layers"
    head_path: str = "lm_head"
    heads: tuple[int, int] = (0, 0)
    """Heads of queries, and of keys and values; zeros if they are not known."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.blocks)

    @property
    def largest(self) -> Layer:
        """The layer with the most parameters."""
        return max(self.blocks, key=lambda block: block.parameters)

    @property
    def linears(self) -> list[Linear]:
        """All linear layers below the head."""
        return [*self.outer, *(linear for block in self.blocks for linear in block.linears)]

    @property
    def experts(self) -> int:
        """Parameters of all experts."""
        return sum(count(block.experts) for block in self.blocks)

    @property
    def matrices(self) -> int:
        """Parameters of the linear layers."""
        return count(self.linears)

    @property
    def biases(self) -> int:
        """Parameters of the linear layers' biases."""
        return sum(linear.bias * linear.outputs for linear in self.linears)

    @property
    def token_cache(self) -> int:
        """Values that sampling keeps for a token: the keys and values of all layers."""
        return sum(block.token_cache for block in self.blocks)

    @property
    def state(self) -> int:
        """Values that sampling keeps for a sequence of any length: the states of all layers."""
        return sum(block.state for block in self.blocks)

    @property
    def trunk(self) -> int:
        """Parameters below the head."""
        return self.embedded + self.last_norm + count(self.outer) + sum(block.parameters for block in self.blocks)

    @property
    def unrounded(self) -> int:
        """Parameters of embeddings that stay in float32."""
        return self.embedded if self.scaled_embeddings else self.unrounded_positions

    @property
    def rounded(self) -> int:
        """Parameters of the trunk that ``align.models.compute.precision.cast_frozen_to_bf16`` keeps in bfloat16."""
        linears = 0 if self.conv1d else self.matrices - self.biases
        return self.embedded - self.unrounded + linears

    @property
    def expert_matrices(self) -> int:
        """Parameters of all experts without their biases."""
        return sum(e.experts * e.inputs * e.outputs for block in self.blocks for e in block.experts)

    @property
    def head(self) -> int:
        """Parameters of the output head, tied or not."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the causal language model; a tied head is counted once."""
        return self.trunk + (0 if self.tied else self.head) + self.head_bias * self.vocabulary

    @property
    def active(self) -> int:
        """Parameters of the matrices that compute one token: of a mixture's experts, those that it is routed to."""
        experts = self.largest.experts
        share = self.largest.routed / experts[0].experts if experts else 0.0
        return self.matrices + self.head + round(share * self.experts)

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
        shapes = []
        for name, linear in self._matrices(lowest):
            is_default = linear.experts == 1 and name.rpartition(".")[2] not in self.skipped
            if is_default if targets is None else _is_target(name, targets):
                shapes += [(linear.inputs, linear.outputs)] * linear.experts
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
        """Yield name and shape of each matrix from a layer on; those outside the layers belong to the first layer."""
        for linear in self.outer if lowest == 0 else ():
            yield linear.path, linear
        for number, block in enumerate(self.blocks[lowest:], start=lowest):
            for linear in (*block.linears, *block.experts):
                yield f"{self.layers_path}.{number}.{linear.path}", linear

    def is_tied(self, target: str) -> bool:
        """Return True if a target of peft names the head or the token embedding, and these are one matrix."""
        return self.tied and any(_is_target(f"model.{name}", [target]) for name in (*EMBEDDINGS, self.head_path))

    def has_module(self, target: str) -> bool:
        """Return True if a target of peft, the end of a module's name after a dot, names a matrix or an embedding."""
        names = [self.head_path, *(f"model.{name}" for name in EMBEDDINGS), *(name for name, _ in self._matrices())]
        return any(_is_target(name, [target]) for name in names)

    @property
    def module_names(self) -> list[str]:
        """Last names of the matrices and of the token embeddings, each once."""
        paths = [*(name for name, _ in self._matrices()), self.head_path, EMBEDDINGS[0]]
        return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))

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


def inserted_parameters(model: Architecture, tuning: TuningBase) -> int | None:
    """Count what an inserted method trains next to the frozen model; None for a ``tuning`` of another kind."""
    if isinstance(tuning, PTuning):
        encoder = _p_tuning_encoder(model.hidden, tuning.hidden_size or model.hidden, tuning.encoder)
        return tuning.tokens * model.hidden + encoder
    if isinstance(tuning, PrefixTuning):
        # Every layer has keys and values for each virtual token.
        return tuning.tokens * model.token_cache
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
