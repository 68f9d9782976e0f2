"""Rows end to end instead of side by side: packing, and batches without padding.

Packing fills rows of ``max_length`` tokens with whole short ones (best fit decreasing, arXiv 2404.10830); a batch
without padding puts its rows behind one another. Either way positions begin anew with every row and no row attends to
another, so that what is computed is what is computed for each row alone. How attention keeps them apart depends on the
model: ``ragged`` (``align.models.fast.ragged_rows``, the fastest on a CPU), ``flash`` (the kernels
of flash attention, told where
rows end) or ``blocks`` (transformers' own mask, made from the positions; its memory grows with the square of a batch's
tokens). ``check_separate`` proves it on the model at hand. Left out: cutting rows to fill a pack to the brim.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import torch

from align.errors import UserError
from align.models.fast.ragged_rows import NotRaggedError, can_run_ragged, lay_out, run_ragged
from align.training.rows import MASKED, Encoded

Form = Literal["ragged", "flash", "blocks"]
PROBE = 48
"""Tokens of each of the two rows that are computed alone and together before training."""
TOLERANCE, TOLERANCE_IN_16_BITS = 2e-3, 0.2
"""Largest difference of a token's log-probability that the order of sums can explain; sight of another row changes it
by whole nats."""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Row numbers of each pack of at most ``capacity`` tokens: the longest row first, into the fullest pack with room.

    Raises ``ValueError`` for a row longer than a pack.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a row of {max(lengths)} tokens fits no pack of {capacity}")
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        at = bisect.bisect_left(room, (lengths[row], -1))
        left, pack = room.pop(at) if at < len(room) else (capacity, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(row)
        bisect.insort(room, (left - lengths[row], pack))
    return packs


def packed(encoded: Encoded, capacity: int) -> list[dict[str, list[int]]]:
    """``input_ids``, ``labels`` and ``seq_lengths`` of every pack; a row's first token follows a stranger: no label."""
    packs = []
    for members in best_fit(encoded.lengths, capacity):
        rows = [encoded.rows[at] for at in members]
        packs.append(
            {
                "input_ids": [token for row in rows for token in row["input_ids"]],
                "labels": [label for row in rows for label in [MASKED, *row["labels"][1:]]],
                "seq_lengths": [len(row["input_ids"]) for row in rows],
            }
        )
    return packs


def fill(packs: Sequence[dict[str, list[int]]], capacity: int) -> float:
    """Share of the packs' room that holds tokens."""
    return sum(len(pack["input_ids"]) for pack in packs) / (len(packs) * capacity)


def form_of(model: Any) -> Form:
    """How ``model`` can keep rows of one line apart.

    Raises ``UserError`` for one that has no such way.
    """
    plain = plain_of(model)
    if str(plain.config._attn_implementation).startswith("flash"):
        return "flash"
    if can_run_ragged(plain):
        return "ragged"
    if plain.config._attn_implementation in ("sdpa", "eager"):
        return "blocks"
    raise UserError(
        f"packing and padding_free: the attention '{plain.config._attn_implementation}' of this model cannot keep rows "
        "in one line apart. Turn them off."
    )


def plain_of(model: Any) -> Any:
    """The transformers model behind an adapter's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def run_flat(model: Any, form: Form) -> None:
    """Let ``model`` take what ``Flat`` collates."""
    if form != "ragged":
        return
    plain = plain_of(model)
    run_ragged(plain)

    def mark(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("layout") is not None:  # transformers leaves a mask of four dimensions alone
            device = kwargs["input_ids"].device
            kwargs = kwargs | {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)}
        return args, kwargs

    plain.base_model.register_forward_pre_hook(mark, with_kwargs=True)


class Flat:
    """Collates rows, or packs of them, into one line: ``input_ids``, ``labels`` and ``position_ids`` (1, N), and what
    ``form`` needs beside them."""

    def __init__(self, form: Form) -> None:
        self.form = form

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids = [token for row in rows for token in row["input_ids"]]
        labels = [label for row in rows for label in row["labels"]]
        lengths = [size for row in rows for size in row.get("seq_lengths") or [len(row["input_ids"])]]
        start = 0
        for size in lengths:
            labels[start] = MASKED
            start += size
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([[place for size in lengths for place in range(size)]]),
        }
        if self.form == "ragged":
            batch["layout"] = lay_out(lengths)
        if self.form == "flash":
            ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return batch


def check_separate(stage: str, trainer: Any, encoded: Encoded) -> float:
    """The largest difference that standing in one line makes to a token's log-probability, in nats.

    Raises ``UserError`` when it is more than rounding: one row would then see another.
    """
    rows = [encoded.rows[at]["input_ids"][:PROBE] for at in (0, -1)]
    rows = [ids for ids in rows if len(ids) > 1]
    if not rows:
        return 0.0
    pair = [*rows, rows[0]] if len(rows) == 1 else rows
    model, device = trainer.model, trainer.args.device
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _precise(trainer):
            alone = [
                _logprobs(trainer, {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}) for ids in pair
            ]
            line = Flat(trainer.data_collator.form)([{"input_ids": ids, "labels": list(ids)} for ids in pair])
            together = _logprobs(trainer, line)
    except NotRaggedError as error:
        raise UserError(f"{stage}: {error}; set packing off too.") from None
    finally:
        model.train(training)
    gap = float((torch.cat(alone) - together).abs().max())
    limit = TOLERANCE if device.type == "cpu" else TOLERANCE_IN_16_BITS
    if not gap <= limit:
        raise UserError(
            f"{stage}: rows in one line are not kept apart by this model: log-probabilities change by up to {gap:.3g} "
            f"nats (expected at most {limit:g}). Set packing and padding_free to false."
        )
    return gap


def _precise(trainer: Any) -> Any:
    """Kernels of flash attention take 16 bits only; elsewhere the comparison is made in full precision."""
    return contextlib.nullcontext() if trainer.args.device.type == "cpu" else trainer.accelerator.autocast()


def _logprobs(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """(N,) of the tokens with a label."""
    if "position_ids" not in batch:
        batch = batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
    outputs = trainer.model(**trainer._prepare_inputs(batch), use_cache=False, fused_lm_head=True)
    found: torch.Tensor = outputs.log_probs[outputs.label_mask].float().cpu()
    return found
