"""Score responses with a trained reward model, as a whole or step by step.

A process reward model scores every step of a solution at its last token (arXiv 2305.20050). A step ends with the
separator's last character, the last step with the end of the turn. Excluded: steps without a separator in the text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from align.config.base import PrecisionSetting
from align.config.runtime.launch import world_size
from align.config.runtime.rollouts import SCORED_AT_ONCE
from align.errors import UserError
from align.models.chat.render import Message, render_conversation, render_prompt
from align.models.checkpoints.files import read_optional
from align.models.compute.precision import autocast, low_residual, resolve_precision
from align.models.fast.ragged_rows import hidden_states, to_device, try_ragged
from align.models.fast.shared_parts import PrefixBatch, batches_of_shared, common_prefix, share_prefixes
from align.models.loading import load_reward, load_rounded_reward, load_tokenizer, round_reward
from align.models.tuning.peft_layers import PEFT_PREFIX
from align.store.json_files import write_text_atomically

Answer = tuple[list[Message], str, bool, str | None]
"""Prompt, text, whether the answer is finished, and the tools of its row."""
Request = tuple[tuple[int, ...], tuple[int, ...]]
"""A rendered conversation, and the places in it that are scored."""
OnProgress = Callable[[int, int], None]
"""(done, total) → None."""


class RewardModel:
    """One score per response, read at the last token of the conversation, as the reward model was trained."""

    def __init__(
        self,
        model_dir: Path,
        device: Any = "cpu",
        precision: PrecisionSetting = "auto",
        batch_size: int = SCORED_AT_ONCE,
        share_beginnings: bool = False,
        pass_tokens: int | None = None,
        rounded: bool = False,
    ) -> None:
        """Load the model. Raises ``UserError`` for a checkpoint without a score head.

        With ``share_beginnings`` a prefix that all conversations of a batch share is computed once. With
        ``pass_tokens`` a batch has about that many tokens, in place of ``batch_size`` rows, and whatever several of its
        conversations begin with is computed once. Rounding then depends on the batch, so the same answer may get a
        slightly different score in the next call; within a call equal answers have equal scores. A model that cannot
        run without padding uses batches of ``batch_size`` rows. ``rounded`` is for a model whose weights are rounded
        in any case (``round_weights``).
        """
        self.tokenizer = load_tokenizer(model_dir)
        self.device = torch.device(device)
        self.precision = resolve_precision(precision, self.device)
        self.rounded = rounded and self.precision == "bfloat16"
        load = load_rounded_reward if self.rounded else load_reward
        self.model = load(model_dir).to(device).requires_grad_(False)
        self.batch_size = batch_size
        self.share_beginnings = share_beginnings
        self.pass_tokens = pass_tokens
        self.on_progress: OnProgress | None = None
        """Told of the different rows that were scored, and of all rows of the call."""
        self.steps = Steps.read(model_dir)
        """Rule by which a process reward model splits answers; None for a model that scores whole answers."""
        self._ragged = try_ragged(self.model)

    def round_weights(self) -> None:
        """Keep the trunk in bfloat16 if it computes in it: half the memory; scores change by rounding."""
        if self.precision == "bfloat16" and not self.rounded:
            round_reward(self.model)
            self.rounded = True

    def share_tensors(self, other: Any) -> None:
        """Use the frozen tensors of ``other``, a model that may have adapters, in place of equal ones, bit for bit.

        A reward model that was trained by adapters from the same base has the base's embeddings, and its matrices
        outside the adapted layers. No score changes. Several processes may divide the policy's tensors: they keep
        both.
        """
        if world_size() > 1:
            return
        frozen = {
            name.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."): parameter
            for name, parameter in other.named_parameters()
            if not parameter.requires_grad
        }
        for name, parameter in self.model.named_parameters():
            twin = frozen.get(name)
            if twin is None or (twin.dtype, twin.device) != (parameter.dtype, parameter.device):
                continue
            if torch.equal(parameter, twin):
                parameter.data = twin.data

    def prepare_for_inference(self) -> None:
        """Round weights and what flows between layers to bfloat16 if the model computes in it.

        The fastest form of a model that is only read; scores change by rounding.
        """
        if self.precision == "bfloat16":
            low_residual(self.model)
        self.round_weights()

    def score(
        self,
        prompts: list[list[Message]],
        responses: list[str],
        finished: list[bool] | None = None,
        tools: list[str | None] | None = None,
    ) -> list[float]:
        """Score ``responses[i]`` as the assistant's answer to ``prompts[i]``, with this model's own chat template.

        Answers that are not ``finished`` (cut off at their length limit) are read without the end-of-turn token, which
        the policy did not write; None means that all are finished. ``tools`` are the tools of each prompt's row. A
        process reward model combines the probabilities that the steps are right into one score from 0 to 1.
        """
        ended = finished if finished is not None else [True] * len(responses)
        offered = tools if tools is not None else [None] * len(responses)
        answers = list(zip(prompts, responses, ended, offered, strict=True))
        if self.steps is not None:
            return [combine_steps(logits, self.steps.aggregate) for logits in self._score_steps(answers, self.steps)]
        rows = [
            render_conversation(
                self.tokenizer, [*prompt, {"role": "assistant", "content": response}], is_finished_answer, row_tools
            )
            for prompt, response, is_finished_answer, row_tools in answers
        ]
        return self.score_tokens(rows)

    def _score_steps(self, answers: Sequence[Answer], steps: Steps) -> list[list[float]]:
        """Return the log-odds of each step of each answer."""
        encoded = [
            tokenize_steps(
                self.tokenizer,
                prompt,
                [{"role": "assistant", "content": text}],
                steps.separator,
                finished=ended,
                tools=tools,
            )
            for prompt, text, ended, tools in answers
        ]
        return self.score_places([ids for ids, _ in encoded], [ends for _, ends in encoded])

    def score_tokens(self, rows: list[list[int]]) -> list[float]:
        """Score rendered conversations at their last tokens, in order."""
        return [scores[0] for scores in self.score_places(rows, [[len(row) - 1] for row in rows])]

    @torch.inference_mode()
    def score_places(self, rows: list[list[int]], places: list[list[int]]) -> list[list[float]]:
        """Return the scores at the tokens ``places[i]`` of each row, in order.

        Equal rows are computed once, so their scores are equal as well.
        """
        requests = [(tuple(row), tuple(row_places)) for row, row_places in zip(rows, places, strict=True)]
        scores: dict[Request, list[float]] = {}
        different = list(dict.fromkeys(requests))
        for batch in self._batches(different):
            values = iter(self._forward([list(row) for row, _ in batch], [list(row_places) for _, row_places in batch]))
            for request in batch:
                scores[request] = [next(values) for _ in request[1]]
            if self.on_progress is not None:
                self.on_progress(len(scores), len(different))
        return [list(scores[request]) for request in requests]

    def _batches(self, requests: list[Request]) -> list[list[Request]]:
        """Return the requests in batches: by what they begin with, or else by length."""
        if self.pass_tokens is not None and self._ragged:
            by_tokens = batches_of_shared([row for row, _ in requests], self.pass_tokens)
            return [[requests[index] for index in batch] for batch in by_tokens]
        # The longest rows come first: a batch then has rows of similar length, and memory peaks at the first batch.
        order = sorted(requests, key=lambda request: -len(request[0]))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def _forward(self, rows: list[list[int]], places: list[list[int]]) -> list[float]:
        with autocast(self.device, self.precision):
            states = (self._ragged_states if self._ragged else self._padded_states)(rows, places)  # (P, H)
        # The head is one dot product: in float32, so scores of similar answers do not tie by rounding.
        values: list[float] = self.model.score(states.float())[:, 0].tolist()
        return values

    def _ragged_states(self, rows: list[list[int]], places: list[list[int]]) -> torch.Tensor:
        """Return the (P, H) states at ``places`` from one line of tokens, in which a common prefix appears once."""
        # `in_line` maps each row's places to places in the common line.
        line, in_line = share_prefixes(rows) if self.pass_tokens is not None else self._line_of(rows)
        indices = [in_line[row][place] for row, row_places in enumerate(places) for place in row_places]
        batch = line.batch()
        ids = batch["input_ids"].to(self.device)
        position_ids = batch["position_ids"].to(self.device)
        trunk = getattr(self.model, self.model.base_model_prefix)
        states = hidden_states(trunk, ids, position_ids, to_device(batch["layout"], self.device))
        return states[torch.tensor(indices, device=self.device)]

    def _line_of(self, rows: list[list[int]]) -> tuple[PrefixBatch, list[list[int]]]:
        """Return a line of the rows, with ``share_beginnings`` their common prefix once, and their places in it."""
        line = PrefixBatch()
        shared = common_prefix(rows) if self.share_beginnings else 0
        prefix = line.add(rows[0][:shared]) if shared else None
        places = []
        for row in rows:
            start = line.starts[line.add(row[shared:], prefix)]
            places.append([*range(shared), *range(start, start + len(row) - shared)])
        return line, places

    def _padded_states(self, rows: list[list[int]], places: list[list[int]]) -> torch.Tensor:
        """Return the (P, H) states at ``places``, right-padded: positions need no shift, padding is masked."""
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        width = int(lengths.max())
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.device)  # (B, T)
        mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        trunk = getattr(self.model, self.model.base_model_prefix)
        hidden = trunk(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, H)
        indices = torch.tensor(
            [[row, place] for row, row_places in enumerate(places) for place in row_places], device=self.device
        )
        states: torch.Tensor = hidden[indices[:, 0], indices[:, 1]]
        return states


Aggregate = Literal["min", "product", "last", "mean"]
FILE = "align.json"
FIELD = "steps"


@dataclass(frozen=True)
class Steps:
    """Rule by which a process reward model splits answers; stored in ``align.json`` next to the weights."""

    separator: str
    aggregate: Aggregate

    def write(self, folder: Path) -> None:
        """Add these settings to the folder's ``align.json``."""
        file = folder / FILE
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        write_text_atomically(file, json.dumps(settings | {FIELD: asdict(self)}, indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Steps | None:
        """Return the settings in a folder's ``align.json``; None for a model that scores whole answers."""
        settings = read_optional(folder / FILE).get(FIELD)
        if settings is None:
            return None
        try:
            steps = cls(**settings)
        except TypeError:
            steps = cls("", "min")
        if not steps.separator or not isinstance(steps.separator, str) or steps.aggregate not in get_args(Aggregate):
            raise UserError(f"{folder / FILE}: its field '{FIELD}' does not say how answers are cut into steps.")
        return steps


def combine_steps(logits: Sequence[float], how: Aggregate) -> float:
    """Return one score in (0, 1) from the log-odds of each step being right."""
    chances = [1 / (1 + math.exp(-logit)) if logit > -700 else 0.0 for logit in logits]
    if how == "product":
        return math.prod(chances)
    if how == "last":
        return chances[-1]
    if how == "min":
        return min(chances)
    return sum(chances) / len(chances)


def tokenize_steps(
    tokenizer: Any,
    prompt: list[Message],
    answer: list[Message],
    separator: str,
    *,
    finished: bool = True,
    tools: str | None = "",
) -> tuple[list[int], list[int]]:
    """Return the conversation's token ids as a reward model reads it, and the index of each step's last token.

    Steps of white space are skipped. There is at least one step: the whole answer.
    """
    ids = render_conversation(tokenizer, [*prompt, *answer], finished, tools)
    start = len(render_prompt(tokenizer, prompt, tools))

    def text(end: int) -> str:
        return str(tokenizer.decode(ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    # The separator may begin or end inside a token, so step ends are found by decoding prefixes of the answer.
    parts = text(len(ids)).split(separator)
    places: list[int] = []
    for number in range(len(parts) - 1):
        if not parts[number].strip():
            continue
        # Bisect for the first token that completes this step's separator: text(low) has too few, text(high) enough.
        low = start
        high = len(ids)
        while high - low > 1:
            middle = (low + high) // 2
            if text(middle).count(separator) > number:
                high = middle
            else:
                low = middle
        places.append(high - 1)
    if parts[-1].strip() or not places:
        places.append(len(ids) - 1)
    return ids, places
