"""The properties that an own function must have, checked on synthetic items before training begins.

Only values of the trained model have a gradient, here and in training, so none can flow into a reference or a score.
Each property has a name. A violation is refused with the name, the smallest example and the numbers. The check costs
milliseconds: it needs no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from align.errors import UserError
from align.methods.call import FunctionFailed, Method, Record, tensors_of
from align.methods.records import AnswerTokens, PairLogprobs, PairScores, ResponseTokens, Row

ITEMS = 6
"""Synthetic items: answers, pairs or responses."""
WIDTH = 7
"""Tokens of the longest synthetic item."""
TOLERANCE = 1e-4
"""Largest relative difference by rounding in float32."""
SEED = 20

Shape = Callable[[Record], tuple[int, ...]]


@dataclass(frozen=True)
class Form:
    """The kind of record that a function gets, and what of it the function may learn from."""

    name: str
    sample: Callable[[], Record]
    """Makes a record of ``ITEMS`` synthetic items in float32, without gradients."""
    learned: tuple[str, ...]
    """Fields with values of the trained model; only these may have a gradient."""
    masked: Sequence[tuple[str, str]] = ()
    """Fields of tokens, each with the mask outside of which their values must not matter."""
    per_token: bool = False
    """True if the function returns one number per token, (B, T), instead of one per item, (B,)."""

    def shape(self, record: Record) -> tuple[int, ...]:
        """Return the shape of the function's result."""
        return tuple(record.mask.shape) if self.per_token else (len(record),)


def check(method: Method, form: Form, place: str, rows: Sequence[Row] = (), **fields: float) -> None:
    """Check every property. Raises ``UserError``, which begins with ``place``, for the first that does not hold.

    ``rows`` are rows of the stage, since the function may read their columns. ``fields`` are the stage's values that
    the function may have as parameters.
    """
    try:
        for name, problem in violations(method, form, rows, **fields):
            raise UserError(f"{place}: {method.path} fails the check '{name}': {problem}")
    except FunctionFailed as error:
        raise UserError(f"{place}: {error} (on synthetic numbers, before training).") from error


def violations(method: Method, form: Form, rows: Sequence[Row], **fields: float) -> Iterator[tuple[str, str]]:
    """Yield the name of each property that does not hold, and a description with numbers."""
    record = _sample(form, rows)

    def run(items: Record) -> torch.Tensor:
        values = method(items, form.shape(items), fields=fields).values
        # Losses of tokens outside the mask do not count.
        return values * items.mask if form.per_token else values

    yield from _check_inputs(run, _sample(form, rows), record)
    losses = run(record)
    order = torch.randperm(ITEMS, generator=_generator())
    yield from _compare("order", "items in another order", losses[order], run(_select(record, order)), order)
    for item in range(ITEMS):
        single = run(_select(record, torch.tensor([item])))
        yield from _compare(
            "micro-batch", "items one by one, as in micro-batches of one", losses[[item]], single, torch.tensor([item])
        )
    for field, mask in form.masked:
        yield from _compare("mask", f"{field} changed outside the mask", losses, run(_noisy(record, field, mask)))
    precise = run(_map(record, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor))
    yield from _compare("dtype", "float32 instead of float64", precise.float(), losses)
    yield from _check_gradient(run, record, form)


def _sample(form: Form, rows: Sequence[Row]) -> Record:
    """Return a synthetic record, with the first of ``rows`` if there are any."""
    record = form.sample()
    chosen = [rows[number % len(rows)] for number in range(ITEMS)] if rows else record.rows
    return dataclasses.replace(record, rows=chosen)


def _check_inputs(
    run: Callable[[Record], torch.Tensor], record: Record, untouched: Record
) -> Iterator[tuple[str, str]]:
    """Check that the call leaves its inputs as they are."""
    run(record)
    before = tensors_of(untouched)
    for name, tensor in tensors_of(record).items():
        if not torch.equal(tensor, before[name]):
            yield "inputs", f"it changes {name} in place. Work on a copy: `.clone()`."
            return


def _check_gradient(run: Callable[[Record], torch.Tensor], record: Record, form: Form) -> Iterator[tuple[str, str]]:
    """Check that the gradient of the model's values is finite and is not zero everywhere."""
    leaves = {name: getattr(record, name).clone().requires_grad_() for name in form.learned}
    losses = run(dataclasses.replace(record, **leaves))
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    total = 0.0
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is None:
            continue
        if not torch.isfinite(gradient).all():
            yield "gradient", f"the gradient of {name} is {_first_unfinite(gradient)}."
        total += float(gradient.abs().sum())
    if total == 0:
        yield "gradient", f"the gradient of {' and '.join(form.learned)} is 0 everywhere, so nothing would be learned."


def _compare(
    name: str, change: str, expected: torch.Tensor, actual: torch.Tensor, items: torch.Tensor | None = None
) -> Iterator[tuple[str, str]]:
    """Yield a violation if two results differ by more than rounding."""
    gap = (expected - actual).detach().abs()
    allowed = TOLERANCE * (1 + expected.detach().abs())
    if bool((gap <= allowed).all()):
        return
    place = tuple((gap > allowed).nonzero()[0].tolist())
    item = place[0] if items is None else int(items[place[0]])
    yield name, f"{change}: the loss of item {item} is {actual[place].item():g} instead of {expected[place].item():g}."


def _first_unfinite(gradient: torch.Tensor) -> float:
    return float(gradient[~torch.isfinite(gradient)][0])


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _map(record: Record, change: Callable[[torch.Tensor], torch.Tensor]) -> Record:
    return dataclasses.replace(record, **{name: change(tensor) for name, tensor in tensors_of(record).items()})


def _select(record: Record, items: torch.Tensor) -> Record:
    """Return the record of some items, in this order."""
    chosen = _map(record, lambda tensor: tensor[items])
    return dataclasses.replace(chosen, rows=[record.rows[item] for item in items.tolist()])


def _noisy(record: Record, field: str, mask: str) -> Record:
    """Return the record with other values of a field outside a mask."""
    tensor = getattr(record, field)
    noise = torch.randn(tensor.shape, generator=_generator())
    return dataclasses.replace(record, **{field: torch.where(getattr(record, mask), tensor, noise)})


# ---- synthetic records ---------------------------------------------------------------------------------------------


def _rows(*columns: str) -> list[dict[str, Any]]:
    return [{"id": f"synthetic-{number}", **{column: [] for column in columns}} for number in range(ITEMS)]


def _token_logprobs(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of tokens, 0 outside the mask, and the mask of items of 1 to ``WIDTH`` tokens."""
    lengths = torch.tensor([WIDTH, 1, 3, 5, 2, 4])
    mask = torch.arange(WIDTH) < lengths[:, None]
    return -torch.rand(ITEMS, WIDTH, generator=generator) * 3 * mask, mask


def sample_pairs() -> PairLogprobs:
    """Return pairs whose margins have both signs."""
    generator = _generator()
    chosen, chosen_mask = _token_logprobs(generator)
    rejected, rejected_mask = _token_logprobs(generator)
    rejected, rejected_mask = rejected.flip(0), rejected_mask.flip(0)
    drifts = torch.randn(2, ITEMS, generator=generator)
    return PairLogprobs(
        chosen_logprobs=chosen.sum(dim=1),
        rejected_logprobs=rejected.sum(dim=1),
        ref_chosen_logprobs=chosen.sum(dim=1) - drifts[0],
        ref_rejected_logprobs=rejected.sum(dim=1) - drifts[1],
        chosen_token_logprobs=chosen,
        rejected_token_logprobs=rejected,
        chosen_mask=chosen_mask,
        rejected_mask=rejected_mask,
        rows=_rows("prompt", "chosen", "rejected"),
    )


def sample_scores() -> PairScores:
    """Return pairs of scores in both orders, some with a margin."""
    generator = _generator()
    chosen, rejected = torch.randn(2, ITEMS, generator=generator)
    margins = torch.rand(ITEMS, generator=generator) * (torch.arange(ITEMS) % 2)
    return PairScores(chosen, rejected, margins, _rows("prompt", "chosen", "rejected"))


def sample_answers() -> AnswerTokens:
    """Return answers of several lengths."""
    logprobs, mask = _token_logprobs(_generator())
    return AnswerTokens(logprobs, mask, _rows("prompt", "completion"))


def sample_responses() -> ResponseTokens:
    """Return responses at ratios below and above 1, with advantages of both signs."""
    generator = _generator()
    logprobs, mask = _token_logprobs(generator)
    drift, noise, reference = torch.randn(3, ITEMS, WIDTH, generator=generator) * 0.3 * mask
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])[:, None] * mask
    return ResponseTokens(
        new_logprobs=logprobs + drift,
        logprobs=logprobs,
        sampler_logprobs=logprobs + 0.01 * noise,
        ref_logprobs=logprobs + reference,
        advantages=advantages,
        entropy=torch.rand(ITEMS, WIDTH, generator=generator) * mask,
        mask=mask,
        group=torch.tensor([0, 0, 1, 1, 2, 2]),
        values=torch.randn(ITEMS, WIDTH, generator=generator) * mask,
        returns=torch.randn(ITEMS, WIDTH, generator=generator) * mask,
        rows=_rows("prompt"),
    )


PAIRS = Form(
    "pairs",
    sample_pairs,
    ("chosen_logprobs", "rejected_logprobs", "chosen_token_logprobs", "rejected_token_logprobs"),
    (("chosen_token_logprobs", "chosen_mask"), ("rejected_token_logprobs", "rejected_mask")),
)
SCORES = Form("scores", sample_scores, ("chosen_scores", "rejected_scores"))
ANSWERS = Form("answers", sample_answers, ("logprobs",), (("logprobs", "mask"),), per_token=True)
_RESPONSE_MASKS = tuple((name, "mask") for name in ("new_logprobs", "logprobs", "ref_logprobs", "entropy"))
TOKENS = Form("tokens", sample_responses, ("new_logprobs", "entropy"), _RESPONSE_MASKS, per_token=True)
RESPONSES = dataclasses.replace(TOKENS, name="responses", per_token=False)


def response_form(method: Method) -> Form:
    """Return the form of a loss of sampled responses, by the shape of its result. Raises ``FunctionFailed``."""
    record = sample_responses()
    values = method(record, tuple(record.mask.shape), or_shape=(len(record),)).values
    return TOKENS if values.dim() == 2 else RESPONSES
