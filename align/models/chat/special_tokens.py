"""Special tokens: add them to a model, and make eos and pad agree between tokenizer, configs and chat template.

Two faults ruin a chat model silently: an eos token that differs from the one the chat template writes (the model never
stops), and padding with the eos token (masks hide it, so it is never learned). Both are corrected once, when a model
enters the store. Torch-free.

A new row of the embedding, and of an untied head, starts as the mean of the rows that the model was trained with
(Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"): its first logits are then near the
average, and no draw decides them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.models.chat.render import MAX_TRAILING, explain_refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFERRED_PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>", "[UNK]")
"""Special tokens to pad with, by preference: meant for it, or never part of a conversation."""


def unify_special_tokens(tokenizer: Any, model: PreTrainedModel, warn: Callable[[str], None]) -> None:
    """Make the end-of-turn token the eos everywhere, and choose a pad token that is not it.

    ``tokenizer`` must have a chat template. ``model`` gets its config and generation config set, and one more row of
    embeddings in the rare case that no existing special token can pad.
    """
    end = require_turn_end(tokenizer)
    if end is None:
        warn(
            f"the chat template writes no special token at the end of a turn; {tokenizer.eos_token!r} is added there. "
            "A model trained without it may not know when to stop."
        )
    elif end != tokenizer.eos_token_id:
        token = tokenizer.convert_ids_to_tokens(end)
        if tokenizer.eos_token is not None:
            warn(
                f"the tokenizer's eos is {tokenizer.eos_token!r} but its chat template ends turns with {token!r}; "
                f"eos is now {token!r}."
            )
        tokenizer.eos_token = token
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token and its chat template writes none: no response could ever end.")
    # After eos is final: the pad token must differ from it.
    choose_pad(tokenizer, model)
    for settings in (model.config, model.generation_config):
        if settings is not None:
            settings.eos_token_id = tokenizer.eos_token_id
            settings.pad_token_id = tokenizer.pad_token_id
            settings.bos_token_id = tokenizer.bos_token_id


ANSWER = "b"
CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]


def require_turn_end(tokenizer: Any) -> int | None:
    """Return :func:`turn_end_token`; ``UserError`` for a template that does not render a question and its answer."""
    from jinja2 import TemplateError

    try:
        return turn_end_token(tokenizer)
    except TemplateError as error:
        raise explain_refusal(tokenizer, CONVERSATION, error) from None


def turn_end_token(tokenizer: Any) -> int | None:
    """Return the id of the special token with which the chat template closes an assistant's turn, or None.

    None as well, for a template that closes a turn only by the role of the next one.

    Raises the template's ``TemplateError``, and ``UserError`` for a template that exceeds its bounds
    (``chat_template.py``).
    """
    from align.models.chat.chat_template import TemplateOutOfBounds

    try:
        ids = tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False)
    except TemplateOutOfBounds as error:
        raise explain_refusal(tokenizer, CONVERSATION, error) from None
    # Search backwards among the last tokens: some templates write a line break after the special token.
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    for token in reversed(ids[-1 - MAX_TRAILING :]):
        if token in special:
            return int(token)
        # A special token before the answer opens the turn.
        if ANSWER in tokenizer.decode([token]):
            return None
    return None


def choose_pad(tokenizer: Any, model: Any) -> None:
    """Keep a pad token that differs from eos and bos; else use an unused special token, or add one."""
    reserved = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in reserved:
        return
    # Only tokens that the tokenizer has already; a new one would need another row of embeddings.
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token in PREFERRED_PADS:
        if token in added and added[token] not in reserved:
            tokenizer.pad_token = token
            return
    # The last resort: no special token is free, so the vocabulary grows by one.
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


def add_tokens(tokenizer: Any, model: PreTrainedModel, tokens: Sequence[str]) -> list[int]:
    """Register ``tokens`` as special tokens of ``tokenizer``; return the ids of those that were not in its vocabulary.

    Both change in place. A model with more rows than its tokenizer has tokens gives the new ones spare rows, which are
    also set to the mean: they were never trained.
    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    new = [token for token in tokens if token not in vocabulary]
    trained_rows = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    ids = [int(index) for index in tokenizer.convert_tokens_to_ids(new)]
    grow_embeddings(model, len(tokenizer))
    if ids:
        _set_to_mean(model, ids, trained_rows)
    return ids


def grow_embeddings(model: Any, rows: int) -> None:
    """Give embedding and head ``rows`` rows, if they have fewer; the new ones are the mean of the others."""
    before = model.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return
    # mean_resizing would draw the rows from a distribution around the mean.
    model.resize_token_embeddings(rows, mean_resizing=False)
    _set_to_mean(model, range(before, rows), before)


def _set_to_mean(model: Any, ids: Sequence[int], trained_rows: int) -> None:
    import torch

    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tables = [embedding.weight]
    if head is not None and head.weight is not embedding.weight:
        tables.append(head.weight)
    with torch.no_grad():
        for table in tables:  # (V, hidden)
            table[list(ids)] = table[:trained_rows].float().mean(dim=0).to(table.dtype)
        bias = getattr(head, "bias", None)
        if bias is not None:
            bias[list(ids)] = bias[:trained_rows].float().mean().to(bias.dtype)
