"""Packing, and batches without padding: rows are concatenated instead of stacked.

Packing fills sequences of ``max_length`` tokens with short rows (best fit decreasing, arXiv 2404.10830). A padding-free
batch concatenates its rows. In both, positions restart with every row and no row attends to another, so each row's
result is the same as in a separate pass. The model decides how attention separates the rows:

- ``ragged``: ``align.models.fast.ragged_rows``, the fastest on a CPU.
- ``flash``: flash attention's kernels, which get the offsets of the rows.
- ``blocks``: transformers' own mask, made from the positions; its memory grows with the square of a batch's tokens.

``check_separate`` verifies the separation on the model at hand. Rows are never split to fill a pack completely.
"""

from __future__ import annotations

import bisect
import contextlib
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device

from align.errors import UserError
from align.models.checkpoints.conversion import plain_of
from align.models.fast.ragged_rows import NotRaggedError, enable_ragged, make_layout
from align.models.fast.real_tokens import can_compute_real_tokens
from align.models.fast.stateful_layers import carries_state
from align.patches.transformers import attention_name
from align.training.rows import MASKED, ROW, Encoded, collate_numbers

Form = Literal["ragged", "flash", "blocks"]
PROBE = 48
"""Tokens of each of the two rows that ``check_separate`` computes separately and together."""
TOLERANCE = 2e-3
TOLERANCE_IN_16_BITS = 0.2
"""Largest difference of a token's log-probability by rounding; attending to another row changes it by whole nats."""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the row indices of each pack of at most ``capacity`` tokens.

    Rows are placed by falling length, each into the fullest pack that has room.

    Raises ``ValueError`` for a row longer than a pack.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a row of {max(lengths)} tokens fits no pack of {capacity}")
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (free tokens, index of the pack), ascending
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        # open_packs is sorted by free tokens, so the first entry with enough of them is the fullest pack with room.
        index = bisect.bisect_left(open_packs, (lengths[row], -1))
        free, pack = open_packs.pop(index) if index < len(open_packs) else (capacity, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(row)
        bisect.insort(open_packs, (free - lengths[row], pack))
    return packs


def pack_rows(encoded: Encoded, capacity: int) -> list[dict[str, list[int]]]:
    """Return ``input_ids``, ``labels`` and ``seq_lengths`` of every pack.

    A row's first token has no label, because the token before it belongs to another row.
    """
    packs = []
    for members in best_fit(encoded.lengths, capacity):
        rows = [encoded.rows[row] for row in members]
        packs.append(
            {
                "input_ids": [token for row in rows for token in row["input_ids"]],
                "labels": [label for row in rows for label in [MASKED, *row["labels"][1:]]],
                "seq_lengths": [len(row["input_ids"]) for row in rows],
                **({ROW: [number for row in rows for number in row[ROW]]} if ROW in rows[0] else {}),
            }
        )
    return packs


def fill_ratio(packs: Sequence[dict[str, list[int]]], capacity: int) -> float:
    """Return the share of the packs' capacity that holds tokens."""
    return sum(len(pack["input_ids"]) for pack in packs) / (len(packs) * capacity)


def packing_form(model: Any) -> Form:
    """Return the form in which ``model`` can separate concatenated rows. Raises ``UserError`` if it cannot."""
    causal_model = plain_of(model)
    is_ragged = can_compute_real_tokens(causal_model)
    if carries_state(causal_model.config) and not is_ragged:
        raise UserError(
            f"packing and padding_free: layers of this {causal_model.config.model_type} carry a state from token to "
            "token, which would pass from row to row. Turn them off."
        )
    attention = attention_name(causal_model.config)
    if attention.startswith("flash"):
        return "flash"
    if is_ragged:
        return "ragged"
    # transformers makes the mask of several rows from their positions, which a few families (BLOOM, MPT) do not accept.
    accepts_positions = "position_ids" in inspect.signature(causal_model.base_model.forward).parameters
    if attention in ("sdpa", "eager") and accepts_positions:
        return "blocks"
    raise UserError(
        f"packing and padding_free: the attention '{attention}' of this {causal_model.config.model_type} cannot keep "
        "rows in one line apart. Turn them off."
    )


def enable_flat(model: Any, form: Form) -> None:
    """Prepare ``model`` for the batches of ``FlatCollator``."""
    if form != "ragged":
        return
    causal_model = plain_of(model)
    enable_ragged(causal_model)

    # The layout keeps the rows apart. Without this mark transformers would build a mask from the positions, and its
    # size is the square of the line's.
    def mark(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("layout") is not None:  # transformers does not change a 4D mask
            device = kwargs["input_ids"].device
            kwargs = kwargs | {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)}
        return args, kwargs

    causal_model.base_model.register_forward_pre_hook(mark, with_kwargs=True)


class FlatCollator:
    """Collate rows, or packs of them, into ``input_ids``, ``labels``, ``position_ids`` (1, N) and ``form``'s inputs."""

    def __init__(self, form: Form) -> None:
        self.form = form

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids = [token for row in rows for token in row["input_ids"]]
        labels = [label for row in rows for label in row["labels"]]
        lengths = [size for row in rows for size in row.get("seq_lengths") or [len(row["input_ids"])]]
        # The first token of each row would be predicted from the row before, so it has no label.
        start = 0
        for size in lengths:
            labels[start] = MASKED
            start += size
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([[place for size in lengths for place in range(size)]]),
        }
        batch |= collate_numbers(rows)
        if self.form == "ragged":
            batch["layout"] = make_layout(lengths)
        # Flash attention reads the rows' offsets instead of a mask.
        if self.form == "flash":
            ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return batch


def check_separate(stage: str, trainer: Any, encoded: Encoded) -> float:
    """Return the largest difference that concatenation makes to a token's log-probability, in nats.

    Raises ``UserError`` when it exceeds rounding: rows would then see one another.
    """
    rows = [encoded.rows[row]["input_ids"][:PROBE] for row in (0, -1)]
    rows = [ids for ids in rows if len(ids) > 1]
    if not rows:
        return 0.0
    # A single row is compared with a copy of itself.
    sequences = [*rows, rows[0]] if len(rows) == 1 else rows
    model = trainer.model
    device = trainer.args.device
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _precise(trainer):
            # The same two rows are computed separately and then concatenated.
            alone = [
                _logprobs(trainer, {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])})
                for ids in sequences
            ]
            batch = FlatCollator(trainer.data_collator.form)(
                [{"input_ids": ids, "labels": list(ids)} for ids in sequences]
            )
            together = _logprobs(trainer, batch)
    except NotRaggedError as error:
        raise UserError(f"{stage}: {error}; turn packing off as well.") from None
    finally:
        model.train(training)
    gap = float((torch.cat(alone) - together).abs().max())
    limit = TOLERANCE if device.type == "cpu" else TOLERANCE_IN_16_BITS
    # The comparison is negated to refuse NaN as well.
    if not gap <= limit:
        raise UserError(
            f"{stage}: this model does not keep rows in one line apart: log-probabilities change by up to {gap:.3g} "
            f"nats (expected at most {limit:g}). Set packing and padding_free to false."
        )
    return gap


def _precise(trainer: Any) -> Any:
    """Return autocast on a GPU, whose flash kernels need 16 bits; elsewhere a null context, for full precision."""
    return contextlib.nullcontext() if trainer.args.device.type == "cpu" else trainer.accelerator.autocast()


def _logprobs(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return the log-probabilities (N,) of the labeled tokens."""
    if "position_ids" not in batch:
        batch = batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
    outputs = trainer.model(**send_to_device(batch, trainer.args.device), use_cache=False, fused_lm_head=True)
    logprobs: torch.Tensor = outputs.log_probs[outputs.label_mask].float().cpu()
    return logprobs
