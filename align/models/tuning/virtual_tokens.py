"""Virtual tokens: entries of the vocabulary with learned embeddings, with which every conversation begins.

The tokenizer gets the tokens and the chat template begins with them, so whatever renders a conversation has them in
place: training, engines, scoring, a saved checkpoint elsewhere. Before training the vocabulary has a row of zeros for
each; the learned vectors (of ``prompt``: arXiv 2104.08691; of ``p_tuning``, where a network makes them: arXiv
2103.10385) stand in for those of the embedding. Saving writes them into the embedding and leaves the head's rows zero,
untied if need be: a plain checkpoint with the very logits that were trained. ``prefix`` builds on this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from align.config.tuning import PromptTuning, PTuning, VirtualTokens
from align.errors import UserError
from align.models.render import render_prompt
from align.models.tuning.inserted import Insertion, train_insertions_only

NAME = "virtual"
LARGEST_MASS = 1e-3
"""Probability that virtual tokens may have together: they must not be sampled, and other tokens' must not shrink."""
PROBES = ("Hello!", "What is 2 + 2?", "Name three colors of the rainbow.", "Write a short poem about the sea.")


def token_text(number: int) -> str:
    """How the virtual token of this number is written."""
    return f"<|virtual_{number}|>"


def extend_tokenizer(tokenizer: Any, tuning: Any) -> Any:
    """``tokenizer`` with the virtual tokens that ``tuning`` wants, its chat template beginning with them.

    It is changed in place, and left alone where ``tuning`` wants none. A tokenizer that has some from an earlier stage
    gets more, in front of those. Raises ``UserError`` where text behind the new tokens would be cut up differently.
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
    ids = [int(one) for one in tokenizer.convert_tokens_to_ids(names)]
    template = tokenizer.chat_template
    if isinstance(template, str):
        tokenizer.chat_template = "".join(names) + template
    else:
        tokenizer.chat_template = {name: "".join(names) + text for name, text in template.items()}
    if render_prompt(tokenizer, probe) != ids + before or ids != list(range(ids[0], ids[0] + len(ids))):
        raise UserError(
            f"tuning.method: {tuning.method}: with {len(ids)} new tokens in front, this tokenizer cuts the text behind "
            "them up differently, so the model would not see what it knows. Take lora or adapters."
        )
    tokenizer.new_virtual_tokens = ids
    return tokenizer


def new_tokens(tokenizer: Any, tuning: VirtualTokens) -> list[int]:
    """The ids that :func:`extend_tokenizer` has added for this stage. ``UserError`` when it was not asked to."""
    ids: list[int] = getattr(tokenizer, "new_virtual_tokens", [])
    if len(ids) != tuning.tokens:
        raise UserError(
            f"tuning.method: {tuning.method} puts virtual tokens in front of every conversation, which this kind of "
            "stage does not do. Take lora or adapters."
        )
    return ids


def make_room(model: Any, ids: list[int]) -> None:
    """Give ``model`` a row of zeros for each new token, in the embedding and in a head of its own.

    Until they are learned it reads rows as if the tokens were not there.
    """
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding:
        raise UserError(
            f"tuning: virtual tokens need a plain embedding, and this model's is {type(table).__name__}, which changes "
            "what it looks up. Take lora or adapters."
        )
    if ids[-1] >= table.weight.shape[0]:
        with torch.random.fork_rng(devices=[]):  # the new rows are drawn before they are zero
            model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                module.weight[ids] = 0.0
    hidden = Tokens(ids[0], len(ids))
    hidden.enabled = False
    put(model, hidden)


class Tokens(Insertion):
    """At the embedding: which places of the last rows are virtual tokens. ``vectors`` is None where only that counts.

    ``places`` has the shape of the last ids seen while enabled: the number of the virtual token there, or -1.
    """

    places: torch.Tensor

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.first, self.count = first, count

    def vectors(self) -> torch.Tensor | None:
        """(count, hidden) embeddings of the tokens."""
        return None


class Prompt(Tokens):
    """Embeddings that are trained themselves."""

    def __init__(self, first: int, vectors: torch.Tensor) -> None:
        super().__init__(first, len(vectors))
        self.rows = nn.Parameter(vectors.detach().clone().float())

    def vectors(self) -> torch.Tensor:
        """See ``Tokens``."""
        return self.rows


class Encoded(Tokens):
    """Embeddings that a network makes, which is trained; the network is peft's."""

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
        """See ``Tokens``."""
        made: torch.Tensor = self.encoder(torch.arange(self.count, device=self.encoder.embedding.weight.device))
        return made


def wrap(model: Any, tuning: PromptTuning | PTuning, seed: int, tokenizer: Any) -> Any:
    """``model`` with virtual tokens drawn from ``seed``, all that is trained.

    ``tokenizer`` has been through :func:`extend_tokenizer`. Raises ``UserError`` where it was not, and for a model that
    gives tokens without a row in its head too much of the probability.
    """
    ids = new_tokens(tokenizer, tuning)
    if not hasattr(model.get_input_embeddings(), NAME):
        make_room(model, ids)
    require_small_mass(model, tokenizer, ids, f"tuning.method: {tuning.method}")
    table = model.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(tuning, PTuning):
            made: Tokens = Encoded(ids[0], len(ids), table.shape[1], tuning)
        else:
            made = Prompt(ids[0], table[first_ids(tokenizer, tuning.text, len(ids))])
    put(model, made)
    return train_insertions_only(model)


def first_ids(tokenizer: Any, text: str | None, count: int) -> list[int]:
    """Ids of ``count`` real tokens to start from: those of ``text`` again and again, or drawn at random."""
    if text is not None:
        known = [int(one) for one in tokenizer(text, add_special_tokens=False)["input_ids"]]
        return [known[at % len(known)] for at in range(count)]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    usable = [one for one in range(len(tokenizer)) if one not in special]
    return [usable[at] for at in torch.randint(len(usable), (count,)).tolist()]


def put(model: Any, tokens: Tokens) -> None:
    """Insert ``tokens`` at the embedding of ``model``, in place of any that are there."""
    embedding = model.get_input_embeddings()
    hooked = hasattr(embedding, NAME)
    embedding.add_module(NAME, tokens.to(embedding.weight.device))
    if hooked:
        return
    embedding.register_forward_hook(_look_up)
    trunk = getattr(model, model.base_model_prefix)
    trunk.register_forward_pre_hook(_hide_when_off, with_kwargs=True)


def _look_up(embedding: Any, inputs: tuple[torch.Tensor, ...], found: torch.Tensor) -> torch.Tensor:
    tokens = embedding.virtual
    if not tokens.enabled:
        return found  # the places stay those of the pass before, whose layers checkpointing may run again
    numbers = inputs[0] - tokens.first  # (B, T)
    inside = (numbers >= 0) & (numbers < tokens.count)
    tokens.places = torch.where(inside, numbers, -1)
    vectors = tokens.vectors()
    if vectors is None:
        return found
    return torch.where(inside[..., None], vectors[numbers.clamp(0, tokens.count - 1)].to(found.dtype), found)


def _hide_when_off(trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Switched off, the tokens must not be seen at all: masked like padding, and not counted in the positions."""
    tokens = trunk.get_input_embeddings().virtual
    if tokens.enabled:
        return None
    ids = args[0] if args else kwargs["input_ids"]
    mask = kwargs.get("attention_mask")
    if "layout" in kwargs or (mask is not None and mask.dim() != 2) or kwargs.get("past_key_values") is not None:
        raise RuntimeError("virtual tokens can be switched off for padded rows without a cache only")
    numbers = ids - tokens.first
    seen = (numbers < 0) | (numbers >= tokens.count)
    mask = seen.long() if mask is None else mask * seen
    return args, kwargs | {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}


@torch.no_grad()
def virtual_mass(model: Any, tokenizer: Any, ids: list[int]) -> float:
    """Probability of the tokens ``ids`` together, the largest there is at any place of a few short prompts."""
    if model.get_output_embeddings() is None:
        return 0.0
    device, largest = model.get_input_embeddings().weight.device, 0.0
    for text in PROBES:
        row = torch.tensor([render_prompt(tokenizer, [{"role": "user", "content": text}])], device=device)
        logits = model(input_ids=row, use_cache=False).logits[0].float()  # (T, V)
        real = (row[0] < ids[0]) | (row[0] > ids[-1])
        largest = max(largest, float(logits.softmax(dim=-1)[real][:, ids].sum(dim=-1).max()))
    return largest


def require_small_mass(model: Any, tokenizer: Any, ids: list[int], where: str) -> None:
    """``UserError`` when virtual tokens would be sampled: a model so unsure that logits of 0 matter is untrained."""
    mass = virtual_mass(model, tokenizer, ids)
    if mass > LARGEST_MASS:
        raise UserError(
            f"{where}: this model gives its {len(ids)} new tokens {mass:.2g} of the probability, and {LARGEST_MASS:g} "
            "is the most that does no harm: it tells tokens apart too little, as an untrained model does. Train it "
            "with lora or in full first, or take fewer tokens."
        )


def prompt_of(model: Any) -> Tokens | None:
    """The virtual tokens of ``model`` whose embeddings are learned, if it has any."""
    found = getattr(model.get_input_embeddings(), NAME, None)
    return found if isinstance(found, (Prompt, Encoded)) else None


@torch.no_grad()
def folded(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``weights`` of ``model`` with the learned vectors in its embedding.

    A tied head becomes one of its own, whose rows for the virtual tokens stay zero.
    """
    tokens, embedding, head = prompt_of(model), model.get_input_embeddings(), model.get_output_embeddings()
    assert tokens is not None
    names = {id(module): name for name, module in model.named_modules()}
    prefix, found = f"{names[id(embedding)]}.{NAME}.", dict(weights)
    for name in [one for one in found if one.startswith(prefix)]:
        del found[name]
    key = f"{names[id(embedding)]}.weight"
    if head is not None and head.weight is embedding.weight:
        found[f"{names[id(head)]}.weight"] = found[key]
    table, vectors = found[key].clone(), tokens.vectors()
    assert vectors is not None
    table[tokens.first : tokens.first + tokens.count] = vectors.to(table.dtype)
    return found | {key: table}


def write_peft(tokens: Tokens, folder: Path, reward: bool) -> None:
    """The learned vectors as peft stores a soft prompt: ``PeftModel.from_pretrained(base, folder)`` reads it."""
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
