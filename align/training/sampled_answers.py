"""The answers that a student samples in the on-policy steps of ``distill``, stored as rollouts (docs/rollouts.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.config.runtime.launch import rank
from align.data.rows import Row
from align.evaluation.score_validation.references import reference_of
from align.inference.protocol import Response
from align.inference.thoughts import thought_facts
from align.models.chat.token_texts import TokenTexts
from align.models.compute.processes import all_gather
from align.pipeline.context import StageContext
from align.store.rollout_writer import RolloutFiles, merge
from align.store.rollouts import ROLLOUTS, identify_prompt, is_kept, make_table


class AnswerRecorder:
    """Writes sampled answers next to the checkpoints, as the stage's ``rollouts`` says."""

    def __init__(self, context: StageContext, tokenizer: Any, sources: Sequence[Row]) -> None:
        """Record answers to the prompts of ``sources``, the rows of the training split."""
        self.context = context
        self.config = context.config.rollouts
        self.sources = sources
        self.token_texts = TokenTexts(tokenizer)
        settings = {"stage": "distill", "keep": self.config.keep, "temperature": context.config.sample_temperature}
        self.files = RolloutFiles(context.checkpoints, self.config.max_bytes, settings, context.warn)
        self._has_started = False

    def write(self, step: int, numbers: list[int], prompts: list[list[int]], answers: list[Response]) -> None:
        """Write the answers of all processes in a step, counted from 0, to the prompts of the rows ``numbers``.

        Every process must call it; the first one writes.
        """
        if not self.config.keep:
            return
        mine = [self._line(*each) for each in zip(numbers, prompts, answers, strict=True)]
        lines = [line for part in all_gather(mine) for line in part]
        if rank() > 0:
            return
        if not self._has_started:
            # A resumed run repeats the steps after its checkpoint, and samples the same answers again.
            self.files.rewind(step)
            self._has_started = True
        for index, line in enumerate(lines):
            line |= {"update": step + 1, "round": 0, "index": index, "group": index}
            line["weights_update"] = [step] * line["tokens"]
        self.files.write(make_table([line for line in lines if is_kept(line["prompt_id"], self.config.keep)]))

    def finish(self) -> None:
        """Write the answers as few files into the stage's output."""
        if rank() == 0:
            merge(self.context.checkpoints / ROLLOUTS, self.context.output / ROLLOUTS, self.context.warn)

    def _line(self, number: int, prompt_ids: list[int], answer: Response) -> dict[str, Any]:
        row = self.sources[number]
        return {
            "split": "train",
            "prompt_id": identify_prompt(row),
            "prompt": row["prompt"],
            "reference": reference_of(row),
            "learned": True,
            "prompt_ids": prompt_ids,
            "learn_mask": answer.mask,
            **response_columns(answer, self.token_texts),
        }


def response_columns(response: Response, token_texts: TokenTexts) -> dict[str, Any]:
    """Return the columns of rollouts that a response has before it is scored."""
    return {
        "response": response.text,
        "finished": response.finished,
        "tokens": len(response.token_ids),
        "token_ids": response.token_ids,
        "token_texts": token_texts(response.token_ids),
        "response_mask": response.mask,
        "sampler_logprobs": response.logprobs,
        **thought_facts(response),
    }
