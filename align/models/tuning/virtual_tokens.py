"""Virtual tokens: vocabulary entries with learned embeddings at the start of every conversation.

The tokens are added to the tokenizer and to the start of the chat template, so everything that renders a conversation
includes them: training, engines, scoring, a saved checkpoint elsewhere. Embedding and head get a row of zeros for each.
While training, the learned vectors (``prompt``: arXiv 2104.08691; ``p_tuning``, where a network computes them: arXiv
2103.10385) replace these embeddings in the forward pass. Saving writes them into the embedding and leaves the head's
rows zero, untying the two if necessary. The result is a plain checkpoint with exactly the trained logits. ``prefix``
builds on this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from align.config.tuning import PromptTuning, PTuning, VirtualTokens
from align.errors import UserError
from align.models.chat.render import render_prompt
from align.models.compute.precision import float32_products
from align.models.tuning.inserted import Insertion, train_insertions_only

NAME = "virtual"
LARGEST_MASS = 1e-3
"""Largest joint probability of the virtual tokens: they must not be sampled, nor reduce the probability from others."""
PROBES = ("Hello!", "What is 2 + 2?", "Name three colors of the rainbow.", "Write a short poem about the sea.")


def token_text(number: int) -> str:
    """Return the text of the virtual token with this number."""
    return f"<|virtual_{number}|>"


def extend_tokenizer(tokenizer: Any, tuning: Any) -> Any:
    """Add the virtual tokens of ``tuning`` to ``tokenizer`` and to the start of its chat template, and return it.

    It is changed in place, and not at all where ``tuning`` needs none. Tokens of an earlier stage stay, behind the new
    ones. Raises ``UserError`` if the tokenizer would split the text after the new tokens differently.
    """
    if not isinstance(tuning, VirtualTokens):
        return tokenizer
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    start = next(n for n in range(len(vocabulary) + 1) if token_text(n) not in vocabulary)
    names = [token_text(start + number) for number in range(tuning.tokens)]
    probe = [{"role": "user", "content": PROBES[0]}]
    before = render_prompt(tokenizer, probe)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    ids = [int(token) for token in tokenizer.convert_tokens_to_ids(names)]
    template = tokenizer.chat_template
    # A tokenizer may have several templates by name. Each gets the tokens.
    if isinstance(template, str):
        tokenizer.chat_template = "".join(names) + template
    else:
        tokenizer.chat_template = {name: "".join(names) + text for name, text in template.items()}
    # The rest of the prompt must keep its token ids, which some tokenizers change after new tokens.
    if render_prompt(tokenizer, probe) != ids + before or ids != list(range(ids[0], ids[0] + len(ids))):
        raise UserError(
            f"tuning.method: {tuning.method}: with {len(ids)} new tokens in front, this tokenizer splits the text "
            "after them differently, so the model would see unfamiliar tokens. Use lora or adapters."
        )
    tokenizer.new_virtual_tokens = ids
    return tokenizer


def new_tokens(tokenizer: Any, tuning: VirtualTokens) -> list[int]:
    """Return the ids that :func:`extend_tokenizer` added for this stage. Raises ``UserError`` if there are none."""
    ids: list[int] = getattr(tokenizer, "new_virtual_tokens", [])
    if len(ids) != tuning.tokens:
        raise UserError(
            f"tuning.method: this kind of stage does not support the virtual tokens of {tuning.method}. Use lora."
        )
    return ids


def add_embedding_rows(model: Any, ids: list[int]) -> None:
    """Add a row of zeros for each new token to the embedding and to an untied head.

    Until the tokens are trained, the model ignores them.
    """
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding:
        raise UserError(
            f"tuning: virtual tokens need a plain embedding, not {type(table).__name__}. Use lora or adapters."
        )
    if ids[-1] >= table.weight.shape[0]:
        with torch.random.fork_rng(devices=[]):  # transformers draws the new rows before they are set to zero
            model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                module.weight[ids] = 0.0
    # Disabled tokens are masked like padding, so the model behaves as without them.
    hidden = Tokens(ids[0], len(ids))
    hidden.enabled = False
    insert_tokens(model, hidden)


class Tokens(Insertion):
    """Insertion at the embedding that finds the virtual tokens in a batch and supplies their vectors."""

    places: torch.Tensor
    """(B, T) for the last batch while enabled: the number of the virtual token at each position, or -1."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.first = first
        self.count = count

    def vectors(self) -> torch.Tensor | None:
        """Return the learned embeddings, of shape (count, hidden); None where only the positions matter."""
        return None


class Prompt(Tokens):
    """Virtual tokens whose embeddings are parameters."""

    def __init__(self, first: int, vectors: torch.Tensor) -> None:
        super().__init__(first, len(vectors))
        self.rows = nn.Parameter(vectors.detach().clone().float())

    def vectors(self) -> torch.Tensor:
        """Return the embeddings, of shape (count, hidden)."""
        return self.rows


class Encoded(Tokens):
    """Virtual tokens whose embeddings a trained network of peft computes."""

    def __init__(self, first: int, count: int, hidden: int, tuning: PTuning) -> None:
        super().__init__(first, count)
        from peft import PromptEncoder, PromptEncoderConfig

        self.encoder = PromptEncoder(
            PromptEncoderConfig(
                num_virtual_tokens=count,
                token_dim=hidden,
                num_transformer_submodules=1,
                encoder_reparameterization_type=tuning.encoder.upper(),
                encoder_hidden_size=tuning.hidden_size or hidden,
            )
        )

    def vectors(self) -> torch.Tensor:
        """Return the embeddings, of shape (count, hidden)."""
        vectors: torch.Tensor = self.encoder(torch.arange(self.count, device=self.encoder.embedding.weight.device))
        return vectors


def wrap(model: Any, tuning: PromptTuning | PTuning, seed: int, tokenizer: Any) -> Any:
    """Return ``model`` with virtual tokens drawn from ``seed``; the rest is frozen.

    ``tokenizer`` comes from :func:`extend_tokenizer`. Raises ``UserError`` if it does not, and for a model that
    gives tokens with zero logits too much probability.
    """
    ids = new_tokens(tokenizer, tuning)
    if not hasattr(model.get_input_embeddings(), NAME):
        add_embedding_rows(model, ids)
    require_small_mass(model, tokenizer, ids, f"tuning.method: {tuning.method}")
    table = model.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(tuning, PTuning):
            tokens: Tokens = Encoded(ids[0], len(ids), table.shape[1], tuning)
        else:
            tokens = Prompt(ids[0], table[first_ids(tokenizer, tuning.text, len(ids))])
    insert_tokens(model, tokens)
    return train_insertions_only(model)


def first_ids(tokenizer: Any, text: str | None, count: int) -> list[int]:
    """Return ids of ``count`` real tokens to start from: the tokens of ``text``, repeated, or random ones."""
    if text is not None:
        ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        return [ids[index % len(ids)] for index in range(count)]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    usable = [token for token in range(len(tokenizer)) if token not in special]
    return [usable[index] for index in torch.randint(len(usable), (count,)).tolist()]


def insert_tokens(model: Any, tokens: Tokens) -> None:
    """Insert ``tokens`` at the embedding of ``model``, replacing earlier ones."""
    embedding = model.get_input_embeddings()
    hooked = hasattr(embedding, NAME)
    embedding.add_module(NAME, tokens.to(embedding.weight.device))
    # The hooks from before read whatever module has this name now.
    if hooked:
        return
    embedding.register_forward_hook(_look_up)
    trunk = getattr(model, model.base_model_prefix)
    trunk.register_forward_pre_hook(_hide_when_off, with_kwargs=True)


def _look_up(embedding: Any, inputs: tuple[torch.Tensor, ...], embedded: torch.Tensor) -> torch.Tensor:
    tokens = embedding.virtual
    if not tokens.enabled:
        return embedded  # keep the places of the pass before: gradient checkpointing may run its layers again
    # The virtual tokens have consecutive ids, so a subtraction gives their numbers.
    numbers = inputs[0] - tokens.first  # (B, T)
    is_virtual = (numbers >= 0) & (numbers < tokens.count)
    tokens.places = torch.where(is_virtual, numbers, -1)
    # A prefix only needs the places: it replaces keys and values, not embeddings.
    vectors = tokens.vectors()
    if vectors is None:
        return embedded
    return torch.where(is_virtual[..., None], vectors[numbers.clamp(0, tokens.count - 1)].to(embedded.dtype), embedded)


def _hide_when_off(trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hide disabled tokens completely: mask them like padding and leave them out of the positions."""
    tokens = trunk.get_input_embeddings().virtual
    if tokens.enabled:
        return None
    ids = args[0] if args else kwargs["input_ids"]
    mask = kwargs.get("attention_mask")
    if "layout" in kwargs or (mask is not None and mask.dim() != 2) or kwargs.get("past_key_values") is not None:
        raise RuntimeError("virtual tokens can be disabled for padded rows without a cache only")
    numbers = ids - tokens.first
    is_real = (numbers < 0) | (numbers >= tokens.count)
    mask = is_real.long() if mask is None else mask * is_real
    return args, kwargs | {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}


@torch.no_grad()
def virtual_mass(model: Any, tokenizer: Any, ids: list[int]) -> float:
    """Return the largest joint probability of the tokens ``ids`` at any position of a few short prompts."""
    if model.get_output_embeddings() is None:
        return 0.0
    device = model.get_input_embeddings().weight.device
    largest = 0.0
    for text in PROBES:
        row = torch.tensor([render_prompt(tokenizer, [{"role": "user", "content": text}])], device=device)
        with float32_products(model):
            logits = model(input_ids=row, use_cache=False).logits[0].float()  # (T, V)
        # Only positions of real tokens count: no answer continues after a virtual token.
        real = (row[0] < ids[0]) | (row[0] > ids[-1])
        largest = max(largest, float(logits.softmax(dim=-1)[real][:, ids].sum(dim=-1).max()))
    return largest


def require_small_mass(model: PreTrainedModel, tokenizer: Any, ids: list[int], where: str) -> None:
    """Raise ``UserError`` when virtual tokens would be sampled, as from an untrained model whose logits are near 0."""
    mass = virtual_mass(model, tokenizer, ids)
    if mass > LARGEST_MASS:
        raise UserError(
            f"{where}: this model gives its {len(ids)} new tokens {mass:.2g} of the probability, and {LARGEST_MASS:g} "
            "is the limit: it barely distinguishes tokens, as an untrained model does. Train it "
            "with lora or in full first, or use fewer tokens."
        )


def learned_tokens(model: PreTrainedModel) -> Tokens | None:
    """Return the virtual tokens of ``model`` whose embeddings are trained, if any."""
    tokens = getattr(model.get_input_embeddings(), NAME, None)
    return tokens if isinstance(tokens, (Prompt, Encoded)) else None


@torch.no_grad()
def merge_into_embedding(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``weights`` of ``model`` with the learned vectors in its embedding (V, hidden).

    A tied head becomes a separate one, whose rows for the virtual tokens stay zero.
    """
    tokens = learned_tokens(model)
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    assert tokens is not None
    names = {id(module): name for name, module in model.named_modules()}
    prefix = f"{names[id(embedding)]}.{NAME}."
    merged = dict(weights)
    for name in [name for name in merged if name.startswith(prefix)]:
        del merged[name]
    key = f"{names[id(embedding)]}.weight"
    # Untie: the head keeps the rows of zeros, and the embedding gets the learned vectors.
    if head is not None and head.weight is embedding.weight:
        merged[f"{names[id(head)]}.weight"] = merged[key]
    table = merged[key].clone()
    vectors = tokens.vectors()
    assert vectors is not None
    table[tokens.first : tokens.first + tokens.count] = vectors.to(table.dtype)
    return merged | {key: table}


def write_peft(tokens: Tokens, folder: Path, reward: bool) -> None:
    """Write the learned vectors as peft's soft prompt, which ``PeftModel.from_pretrained(base, folder)`` reads."""
    from peft import PromptTuningConfig, TaskType
    from safetensors.torch import save_file

    vectors = tokens.vectors()
    assert vectors is not None
    folder.mkdir(parents=True, exist_ok=True)
    PromptTuningConfig(
        task_type=TaskType.SEQ_CLS if reward else TaskType.CAUSAL_LM,
        num_virtual_tokens=tokens.count,
        token_dim=vectors.shape[1],
        num_transformer_submodules=1,
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file({"prompt_embeddings": vectors.detach().float().cpu().contiguous()}, folder / "adapter_model.safetensors")
