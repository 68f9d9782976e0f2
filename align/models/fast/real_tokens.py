"""Let a model compute right-padded batches on their real tokens, with the prefixes that rows share computed once.

Trainers call a model with ``input_ids`` and ``attention_mask`` (B, T) and read states or log-probabilities of that
shape. Two hooks on the trunk keep this so:

1. Before the trunk, the rows become one line of N tokens without padding (``shared_parts.PrefixBatch``). It holds a
   system message that all rows begin with, and a prompt with several answers, once.
2. After the trunk, the line's states go back to the places of their tokens: (1, N, H) becomes (B, T, H), 0 on padding.

What is around the trunk (heads, losses, adapters, parallel wrappers) sees no difference but time and memory. Results
change by rounding. Calls of any other kind pass unchanged: caches, generation, left padding, embeddings in place of
tokens, routers' logits. Excluded: attention dropout and sliding windows (``can_compute_real_tokens``).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from align.models.checkpoints.conversion import plain_of
from align.models.compute.precision import float32_products
from align.models.fast.ragged_rows import NotRaggedError, can_run_ragged, enable_ragged, to_device
from align.models.fast.shared_parts import PrefixBatch, share_prefixes
from align.models.fast.stateful_layers import Spread

LOG = logging.getLogger(__name__)

PASSED_ON = ("input_ids", "attention_mask", "use_cache")
"""Arguments of the calls that are changed; all others but ``UNREAD`` must be None or False."""
UNREAD = ("margin",)
"""Inputs of the loss that trl passes to the model with the tokens, and that no trunk reads."""
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""Names that transformers' configs have for the dropout of attention weights, which a line of rows lacks."""
TOLERANCE = 2e-2
"""Largest difference that rounding makes to a state, as a share of the largest state; another row changes it by more
than a tenth."""


def compute_real_tokens(model: nn.Module, share: bool = True) -> bool:
    """Install the hooks on ``model``'s trunk, and return False if the model cannot run this way.

    With ``share`` off every row is computed whole, for methods that treat rows as separate (noise on embeddings). The
    hooks are verified on two short rows, by the model itself, and removed with a warning if its states differ.
    """
    inner = plain_of(model)
    if not can_compute_real_tokens(inner):
        return False
    trunk = inner.base_model
    remove_hooks(trunk)
    enable_ragged(inner)
    hooks = _RealTokens(trunk, share)
    if not hooks.are_exact(trunk):
        hooks.remove()
        LOG.warning("%s computes rows in one line differently; its rows are padded instead", type(inner).__name__)
        return False
    return True


def can_compute_real_tokens(model: PreTrainedModel) -> bool:
    """Return True for a transformers model with full attention from the registry, and without attention dropout."""
    config = model.config.get_text_config()
    has_dropout = any(getattr(config, name, None) for name in ATTENTION_DROPOUTS)
    return not has_dropout and can_run_ragged(model)


def computes_real_tokens(model: nn.Module) -> bool:
    """Return True if the hooks are installed."""
    return hasattr(plain_of(model).base_model, "real_token_hooks")


def remove_hooks(trunk: Any) -> None:
    """Remove the hooks of ``compute_real_tokens`` from a trunk that may have them."""
    hooks = getattr(trunk, "real_token_hooks", None)
    if hooks is not None:
        hooks.remove()


class _RealTokens:
    """The two hooks of one trunk."""

    def __init__(self, trunk: Any, share: bool) -> None:
        self.trunk = trunk
        self.share = share
        self._places: torch.Tensor | None = None
        """For a call that was changed, (B, T): the index in the line of each token, N on padding."""
        self._handles = [
            trunk.register_forward_pre_hook(self._pack, with_kwargs=True),
            trunk.register_forward_hook(self._unpack),
        ]
        trunk.real_token_hooks = self

    def remove(self) -> None:
        """Leave the trunk as it was."""
        for handle in self._handles:
            handle.remove()
        del self.trunk.real_token_hooks

    def _pack(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace a right-padded batch by one line of its real tokens."""
        self._places = None
        inputs = dict(zip(("input_ids",), args, strict=False)) | kwargs
        lengths = _row_lengths(inputs) if len(args) <= 1 else None
        if lengths is None:
            return None
        ids = inputs["input_ids"]
        rows = [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
        line, row_places = share_prefixes(rows) if self.share else _whole_rows(rows)
        batch = line.batch()
        places = torch.full(ids.shape, len(line.tokens))
        for row, indices in enumerate(row_places):
            places[row, : len(indices)] = torch.tensor(indices)
        self._places = places.to(ids.device)
        return (), {
            "input_ids": batch["input_ids"].to(ids.device),
            "position_ids": batch["position_ids"].to(ids.device),
            # transformers leaves a 4D mask only. This one marks the line for ``ragged_attention``.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
            "layout": to_device(batch["layout"], ids.device),
            "use_cache": False,
        }

    def _unpack(self, module: Any, args: Any, output: Any) -> Any:
        """Put the states of the line back to the places of their tokens."""
        places = self._places
        self._places = None
        if places is not None:
            output.last_hidden_state = Spread.apply(output.last_hidden_state[0], places)
        return output

    @torch.no_grad()
    def are_exact(self, trunk: Any) -> bool:
        """Return True where two rows with a common prefix have the same states in one line as padded."""
        # Of the config: adapters wrap the embedding, and their modules do not tell its size.
        vocabulary = trunk.config.get_text_config().vocab_size
        device = next(trunk.parameters()).device
        # Three segments: a prefix of 16 tokens, and behind it 8 and 24. No random numbers are drawn.
        rows = [[(place * 7919 + (place >= 16) * row * 31) % vocabulary for place in range(40)] for row in range(2)]
        mask = torch.ones(2, 40, dtype=torch.long, device=device)
        mask[0, 24:] = 0
        inputs = {"input_ids": torch.tensor(rows, device=device), "attention_mask": mask, "use_cache": False}
        training = [module for module in trunk.modules() if module.training]
        trunk.eval()
        try:
            with float32_products(trunk):
                in_line = trunk(**inputs).last_hidden_state[mask.bool()]
                # A call that the hooks do not change.
                padded = trunk(**{**inputs, "use_cache": True}).last_hidden_state[mask.bool()]
        except NotRaggedError:
            return False
        finally:
            for module in training:
                module.training = True
        difference = (in_line - padded).abs().max()
        return bool(difference <= TOLERANCE * padded.abs().max())


def _whole_rows(rows: list[list[int]]) -> tuple[PrefixBatch, list[list[int]]]:
    """Return a line of the rows, one after the other, and each row's places in it."""
    line = PrefixBatch()
    starts = [line.starts[line.add(row)] for row in rows]
    return line, [list(range(start, start + len(row))) for start, row in zip(starts, rows, strict=True)]


def _row_lengths(inputs: dict[str, Any]) -> torch.Tensor | None:
    """Return the lengths (B,) of a right-padded batch's rows; None for a call of another kind."""
    ids = inputs.get("input_ids")
    mask = inputs.get("attention_mask")
    others = [value for name, value in inputs.items() if name not in (*PASSED_ON, *UNREAD)]
    if inputs.get("use_cache") is not False or any(value is not None and value is not False for value in others):
        return None
    if ids is None or mask is None or mask.dim() != 2 or mask.shape != ids.shape:
        return None
    real = mask != 0
    lengths: torch.Tensor = real.sum(dim=1)
    # Right-padded: the last real token of each row is where its number of tokens says, and no row is empty.
    is_right_padded = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    if not bool((real == is_right_padded).all()) or int(lengths.min()) == 0:
        return None
    return lengths
