"""The rollouts that ``sample`` stores: a file for each chunk of prompts, with the scores once all are sampled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.config.runtime.rollouts import SAMPLE_CHUNK
from align.data.rows import Row
from align.evaluation.score_validation.references import reference_of
from align.inference.protocol import Response
from align.models.chat.token_texts import TokenTexts
from align.pipeline.context import StageContext
from align.rl.rollout_tables import episode_columns
from align.store.rollouts import (
    ROLLOUTS,
    SCHEMA,
    encode_value,
    identify_prompt,
    is_kept,
    make_table,
    rollout_files,
    write_rollouts,
)
from align.synthesis.selection import PromptResponses
from align.training.sampled_answers import response_columns
from align.verifiers.verdict import reasons_in


class SampledRollouts:
    """Writes the responses of a stage ``sample``, up to ``rollouts.max_gb``; further files have no rows."""

    def __init__(self, context: StageContext, tokenizer: Any) -> None:
        self.context = context
        self.config = context.config.rollouts
        self.folder = context.checkpoints / ROLLOUTS
        self.output = context.output / ROLLOUTS
        self.settings = {"stage": "sample", "keep": self.config.keep, "temperature": context.config.temperature}
        self.token_texts = TokenTexts(tokenizer)
        self._has_warned = False

    def has_chunk(self, split: str, start: int) -> bool:
        """Return True if the responses of a chunk need not be sampled again to store them."""
        return not self.config.keep or _path(self.folder, split, start).exists()

    def write_chunk(self, split: str, start: int, chunk: Iterable[tuple[Row, list[int], list[Response]]]) -> None:
        """Write the responses to the prompts from number ``start`` on, which have no scores yet.

        ``chunk`` has the row, the token ids and the responses of each prompt.
        """
        lines: list[dict[str, Any]] = []
        for number, (row, prompt_ids, responses) in enumerate(chunk, start):
            columns = self._prompt_columns(row, split, number)
            if columns is not None:
                columns["prompt_ids"] = prompt_ids
                lines += [
                    columns | {"index": i} | response_columns(r, self.token_texts) for i, r in enumerate(responses)
                ]
        self._write(make_table(lines), _path(self.folder, split, start))

    def finish(self, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Write the chunks with their scores into the stage's output; ``samples`` has the samples of each split."""
        for path in rollout_files(self.folder):
            split, _, start = path.stem.partition("-")
            if int(start) < len(samples.get(split, ())):
                table = _with_scores(pq.read_table(path, schema=SCHEMA), samples[split])
                write_rollouts(table, self.output / path.name, self.settings)

    def write_episodes(self, split: str, prompts: Sequence[PromptResponses]) -> None:
        """Write the scored episodes of a split into the stage's output."""
        for start in range(0, len(prompts), SAMPLE_CHUNK):
            lines: list[dict[str, Any]] = []
            for number, prompt in enumerate(prompts[start : start + SAMPLE_CHUNK], start):
                columns = self._prompt_columns(prompt.row, split, number)
                if columns is not None:
                    lines += [columns | line for line in self._episode_lines(prompt)]
            self._write(make_table(lines), _path(self.output, split, start))

    def _write(self, table: pa.Table, path: Path) -> None:
        if not self.config.keep:
            return
        size = sum(file.stat().st_size for file in rollout_files(path.parent) if file != path)
        if size + write_rollouts(table, path, self.settings) > self.config.max_bytes:
            # An empty file shows a resumed stage that the chunk was sampled.
            write_rollouts(SCHEMA.empty_table(), path, self.settings)
            if not self._has_warned:
                self._has_warned = True
                self.context.warn(f"the rollouts reached rollouts.max_gb {self.config.max_gb:g}; no more are stored")

    def _prompt_columns(self, row: Row, split: str, number: int) -> dict[str, Any] | None:
        """Return the columns of a prompt; None if its responses are not stored."""
        identity = identify_prompt(row)
        if not is_kept(identity, self.config.keep):
            return None
        return {
            "split": split,
            "group": number,
            "prompt_id": identity,
            "prompt": row["prompt"],
            "reference": reference_of(row),
            "learned": False,
        }

    def _episode_lines(self, prompt: PromptResponses) -> Iterable[dict[str, Any]]:
        for index, episode in enumerate(prompt.episodes):
            parts = {name: values[index] for name, values in prompt.parts.items()}
            yield {
                "index": index,
                **_score_columns(prompt.scores[index], parts),
                "response": episode.text,
                "finished": episode.finished,
                "tokens": episode.length,
                "prompt_ids": episode.prompt_ids,
                "token_ids": episode.token_ids,
                "token_texts": self.token_texts(episode.token_ids),
                "response_mask": episode.mask,
                "sampler_logprobs": episode.logprobs,
                **episode_columns(episode),
            }


def _path(folder: Path, split: str, start: int) -> Path:
    return folder / f"{split}-{start:07d}.parquet"


def _with_scores(table: pa.Table, samples: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return the rows of a chunk with the scores of the split's samples."""
    columns: dict[str, list[Any]] = {"score": [], "scores": [], "reasons": [], "explanation": []}
    for group, index in zip(table["group"].to_pylist(), table["index"].to_pylist(), strict=True):
        sample = samples[group]
        parts = {name: values[index] for name, values in (sample.get("parts") or {}).items()}
        explanations = sample.get("explanations")
        scored = _score_columns(sample["scores"][index], parts)
        scored["explanation"] = (explanations[index] if explanations else None) or None
        for name, value in scored.items():
            columns[name].append(encode_value(name, value))
    for name, values in columns.items():
        field = SCHEMA.field(name)
        table = table.set_column(SCHEMA.get_field_index(name), field, pa.array(values, field.type))
    return table


def _score_columns(score: float | None, parts: Mapping[str, float | None]) -> dict[str, Any]:
    scores = {name: value for name, value in parts.items() if value is not None and math.isfinite(value)}
    return {"score": score, "scores": scores, "reasons": reasons_in(scores)}
